"""Slow: torchrun's ranks killed and stopped at random moments of one run, 20 times, end in what no fault would have."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import ENV, Ranks
from tiny_run import flags, losses, write_dataset

from nanogpt_fast.run import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
FAULTS, SIZE, TIMEOUT = 20, 3, 3.0
RUN: dict[str, Any] = dict(gradient_accumulation_steps=6, dropout=0.1, eval_interval=40, eval_iters=1, keep_last=3)
STOPPED = 75.0  # seconds: torchrun kills what does not heed its SIGTERM after 30, and three Pythons start


def workers(agent: int) -> list[int]:
    """The ranks' process ids, in their order."""
    found = {}
    for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        with suppress(OSError):  # it has ended meanwhile
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(word[5:]): int(pid) for word in environment if word.startswith(b"RANK=")}
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize("mode", ["ddp", "zero1"])
def test_a_run_goes_on_as_if_nothing_had_been(tmp_path: Path, mode: str):
    write_dataset(tmp_path)
    settings = {**RUN, "parallel": mode, "timeout": TIMEOUT, "async_save": mode == "zero1"}
    gap = 60  # iterations from one fault to the next, at most
    settings["max_iters"] = FAULTS * gap
    log, draw, seconds = tmp_path / "log", random.Random(mode), []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={SIZE}"]
    command += [f"--max-restarts={FAULTS + 5}", "-m", "nanogpt_fast.train", *flags(tmp_path, **settings)]
    with log.open("w") as out, subprocess.Popen(command, env=ENV, stdout=out, stderr=out) as agent:
        for fault in range(FAULTS):
            at = max(losses(tmp_path), default=0) + draw.randrange(5, gap // 2)
            until = time.monotonic() + 120
            while max(losses(tmp_path), default=0) < at:
                assert agent.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
                time.sleep(0.02)
            rank, number = draw.randrange(SIZE), draw.choice([signal.SIGKILL, signal.SIGSTOP])
            pids, began = workers(agent.pid), time.monotonic()
            os.kill(pids[rank], number)
            while set(workers(agent.pid)) & set(pids):
                assert time.monotonic() - began < STOPPED, f"fault {fault}: rank {rank}, {number!r}"
                time.sleep(0.1)
            seconds.append((number.name, round(time.monotonic() - began, 1)))
        assert agent.wait(600) == 0, log.read_text()[-3000:]
    said = log.read_text()
    named = re.findall(r"rank (\d) \(process \d+ on [^)]*\) is silent", said)
    print(f"\n{mode}: {FAULTS} faults, seconds until all had ended: {seconds}; ranks named {len(named)} times")
    assert said.count("tokens per iteration") == FAULTS + 1 and len(named) >= FAULTS
    straight = tmp_path / "straight"
    straight.mkdir()
    (straight / "data").symlink_to(tmp_path / "data")
    with Ranks() as ranks:
        ranks.start(SIZE, ["train", *flags(straight, **{**settings, "timeout": 60})])
        assert [rank.code for rank in ranks.wait()] == [0] * SIZE
    assert losses(tmp_path) == losses(straight)
    ours, theirs = (checkpoint.newest(folder / "out")[0] for folder in (tmp_path, straight))
    for name in theirs.model:
        assert torch.equal(ours.model[name], theirs.model[name]), name
