"""kill -9 at random moments of two nodes that prepare a dataset on a shared folder at the same time: the files of one.

Slow: 2 times 20 kills, 40 s on 2 cores.
"""

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from forked_commands import Forker
from tiny_run import ENV

from nanogpt_fast.data.dataset import verify
from nanogpt_fast.data.tokenizer import _cached_vocabularies
from nanogpt_fast.files import sha256_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.name == "nt", reason="signals of POSIX"),
    pytest.mark.skipif(not any(p.is_file() for p in _cached_vocabularies()), reason="no vocab.bpe"),
]
KILLS = 20
OFTEN: dict[str, Any] = {
    "nanogpt_fast.data.encode.BATCH_CHARS": 2000,
    "nanogpt_fast.data.preparation.COMMIT_TOKENS": 5000,
    "nanogpt_fast.data.nodes.READ_BYTES": 1000,
}


def tokens(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of a dataset's files, whole; parts that a kill left beside them aside."""
    verify(folder)
    return {path.name: sha256_of(path) for path in folder.iterdir() if path.is_file() and path.name != ".prepare.lock"}


@pytest.mark.parametrize("num_proc", [1, 2])
def test_two_nodes_killed_at_random_end_in_the_files_of_one(tmp_path: Path, num_proc: int) -> None:
    draw, many = random.Random(num_proc), tmp_path / "many/mine"
    (tmp_path / "texts").mkdir()
    for k in range(8):
        rows = ({"text": f"Document {k}.{i}. " + "Some words. " * (i % 17)} for i in range(400))
        (tmp_path / f"texts/{k}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["prepare", "mine", "--source=../texts", "--out=../many/mine", "--format=llmc", "--shard_tokens=30000"]
    words.append(f"--num_proc={num_proc}")
    killed = 0
    with Forker(ENV) as one, Forker(ENV) as two:
        for forker, name in ((one, "a"), (two, "b")):  # each has its own folder for what it says
            forker.cwd = tmp_path / name
            forker.cwd.mkdir()
        straight = one.run([*words, "--out=../one/mine"], **OFTEN)
        assert straight.code == 0, straight
        expected = tokens(tmp_path / "one/mine")
        for _ in range(4 * KILLS):
            pair = [(one, "--node=1/2"), (two, "--node=2/2")]
            draw.shuffle(pair)
            for forker, node in pair:
                forker.start([*words, node], **OFTEN)
            for forker, _ in pair:
                ended = forker.end(signal.SIGKILL, draw.uniform(0.05, 0.4) * straight.seconds, draw.random() < 0.5)
                assert ended.code in (-9, 0) and "Traceback" not in ended.err, ended  # 0: it was done first
                assert not forker.left_alive()
                killed += ended.code == -9
            if (many / "meta.json").exists():
                assert tokens(many) == expected
                if not (many / "parts").exists():  # else what the kill left beside it is for the next ones
                    shutil.rmtree(many)
            if killed >= KILLS:
                break
        assert killed >= KILLS, "most kills came too late: they prove nothing"
        for forker, node in ((one, "--node=1/2"), (two, "--node=2/2"), (one, "--node=1/2")):
            ended = forker.run([*words, node], **OFTEN)
            assert ended.code == 0, ended
    assert tokens(many) == expected
    left = {path.name for path in many.iterdir()} - set(expected)
    assert left <= {".prepare.lock"}, left
