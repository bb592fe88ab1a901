"""kill -9 and signals at random moments over every command that writes: what is typed next ends where no kill ends.

Slow: 62 kills in chains and 520 signals, 6.5 min on 2 new cores; `-s` shows how long each took to end.
"""

import json
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_commands import Ended, Forker
from tiny_run import ENV, flags

from nanogpt_fast.data.dataset import verify
from nanogpt_fast.data.preparation import PrepareConfig, prepare
from nanogpt_fast.files import sha256_of
from nanogpt_fast.run import checkpoint
from nanogpt_fast.weights import formats

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.name == "nt", reason="signals of POSIX"),
]
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
MOMENTS = 10  # each signal comes so often in each place
HANGS = 10.0  # seconds
LOCKS = {".run.lock", ".prepare.lock"}
OFTEN: dict[str, Any] = {
    "nanogpt_fast.data.encode.BATCH_CHARS": 2000,
    "nanogpt_fast.data.preparation.COMMIT_TOKENS": 5000,
}
RUN = flags(Path(), vocab_size=0, max_iters=20, eval_interval=5, eval_iters=30, sample_at_end=100)
TIMES: dict[tuple[str, str], list[float]] = defaultdict(list)  # seconds to exit, by place and signal
Words = list[str]


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    with Forker(ENV) as forker:
        yield forker
    if TIMES:
        print(f"\n{'seconds to exit':<20}" + "".join(f"{name:>16}" for name in SIGNALS) + "   median, longest")
        for place in dict.fromkeys(place for place, _ in TIMES):
            cells = [(statistics.median(t), max(t)) if (t := TIMES[place, name]) else (0, 0) for name in SIGNALS]
            print(f"{place:<20}" + "".join(f"{middle:>9.2f}{longest:>7.2f}" for middle, longest in cells))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, forker: Forker) -> Path:
    """A corpus, data/toy, and `out`, a run of 20 iterations on it: what a test's own folder is copied from."""
    folder = tmp_path_factory.mktemp("made")
    draw = random.Random(7)
    (folder / "toy.txt").write_text("".join(draw.choice("abcdefgh \n") for _ in range(6000)))
    rows = ({"text": f"Document {i}. " + "Some words. " * (i % 17)} for i in range(3000))
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(PrepareConfig(name="toy", source=str(folder / "toy.txt"), tokenizer="char", out=str(folder / "data/toy")))
    forker.cwd = folder
    ok(forker.run(["train", *RUN]))
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path, forker: Forker) -> Path:
    """The same, this test's own, the forker in it."""
    shutil.copytree(made, tmp_path / "home")
    forker.cwd = tmp_path / "home"
    return forker.cwd


def ok(ended: Ended) -> Ended:
    assert ended.code == 0, ended
    return ended


def litter(folder: Path) -> list[str]:
    """What a killed process left and nobody cleared away."""
    return [p.name for p in folder.rglob("*") if (p.name.startswith(".") and p.name not in LOCKS) or p.suffix == ".tmp"]


def losses(out: Path) -> dict[tuple[str, int], float]:
    """{(kind, iteration): loss} of metrics.jsonl, in which every row stands once and no line is broken."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line]
    found = [(r["kind"], r["iter"], r["loss"] if r["kind"] == "train" else r["val_loss"]) for r in rows if "iter" in r]
    assert max(Counter(row[:2] for row in found).values()) == 1
    return {row[:2]: row[2] for row in found}


def trained(out: Path, end: int | None = None) -> tuple[int, str, str, dict[tuple[str, int], float]]:
    """All that a run's end must have in common with that of the same run without kills. end: the step that it ends with
    by itself; a signal in the iteration after it saves that one too."""
    steps = checkpoint.list_steps(out)
    step = list(steps)[-1] if end is None else end
    path = steps[step]
    return step, sha256_of(path / checkpoint.MODEL), sha256_of(path / checkpoint.OPTIMIZER), losses(out)


def tokens(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of a dataset's files."""
    verify(folder)
    return {path.name: sha256_of(path) for path in folder.iterdir() if path.name not in LOCKS}


def tensors(path: Path) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in formats.read(path, optimizer=False).model.items()}


def next_of(words: Words, out: Path) -> Words:
    """After a kill: the resume that a run prints, where there is something to resume; else the same again."""
    if not (checkpoint.readable_steps(out) and (out / "config.toml").exists()):
        return words
    return ["train", "--config", f"{out.name}/config.toml", "--init_from=resume"]


# ---- kill -9 ----


def chain(
    forker: Forker,
    kills: int,
    seed: str,
    words: Callable[[], Words],
    straight: float,
    between: Callable[[], object] = lambda: None,
) -> None:
    """Kill words() at so many random moments, straight seconds being its length, and let it come to its end.

    between: holds what must be true after each kill.
    """
    draw, killed = random.Random(seed), 0
    for _ in range(4 * kills):
        forker.start(words(), **OFTEN)
        ended = forker.end(signal.SIGKILL, draw.uniform(0.1, 0.9) * straight, group=draw.random() < 0.5)
        assert ended.code in (-9, 0) and "Traceback" not in ended.err, ended  # 0: it was done first
        assert not forker.left_alive()
        killed += ended.code == -9
        between()
        if killed == kills:
            break
    assert killed == kills, "most kills came too late: they prove nothing"
    ok(forker.run(words(), **OFTEN))


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("format", ["bin", "llmc"])
def test_killed_preparations_end_in_the_same_files(
    forker: Forker, home: Path, format: str, force: bool, num_proc: int
) -> None:
    words = ["prepare", "mine", "--source=corpus.jsonl", "--tokenizer=char", f"--num_proc={num_proc}"]
    words += [f"--format={format}", "--shard_tokens=30000"]
    straight = ok(forker.run([*words, "--out=straight/mine"], **OFTEN))
    if force:
        ok(forker.run([*words, "--out=data/mine", "--seed=1"], **OFTEN))
        words.append("--force")
    folder = home / "data/mine"

    def whole_or_none() -> None:
        if (folder / "meta.json").exists():
            verify(folder)

    seed = f"prepare {format} {force} {num_proc}"
    chain(forker, 3, seed, lambda: [*words, "--out=data/mine"], straight.seconds, whole_or_none)
    assert tokens(folder) == tokens(home / "straight/mine") and litter(folder) == []


@pytest.mark.parametrize(
    "changes",
    [{"dropout": 0.1}, {"data_order": "nanogpt", "gradient_accumulation_steps": 2}, {"eval_interval": 7, "bias": True}],
)
def test_killed_runs_end_in_the_same_weights(forker: Forker, home: Path, changes: dict[str, Any]) -> None:
    run = [*RUN, "--max_iters=60", *(f"--{key}={value}" for key, value in changes.items())]
    straight = ok(forker.run(["train", *run, "--out_dir=straight"]))
    words = ["train", *run, "--out_dir=killed"]
    chain(forker, 6, f"train {changes}", lambda: next_of(words, home / "killed"), straight.seconds)
    assert trained(home / "killed") == trained(home / "straight") and litter(home / "killed") == []


def test_kills_while_checkpoints_are_written_beside_the_training(forker: Forker, home: Path) -> None:
    """30 of them; a save every third iteration, so that most find one under way."""
    run = [*RUN, "--max_iters=60", "--dropout=0.1", "--eval_interval=3", "--eval_iters=1"]
    straight = ok(forker.run(["train", *run, "--out_dir=straight"]))
    words = ["train", *run, "--async_save=True", "--out_dir=killed"]
    chain(forker, 30, "async", lambda: next_of(words, home / "killed"), straight.seconds)
    assert trained(home / "killed") == trained(home / "straight") and litter(home / "killed") == []


def test_killed_resumes_end_in_the_same_weights(forker: Forker, home: Path) -> None:
    shutil.copytree(home / "out", home / "straight")
    words = ["train", "--config", "out/config.toml", "--init_from=resume", "--max_iters=80"]
    straight = ok(forker.run([*words, "--out_dir=straight"]))
    chain(forker, 4, "resume", lambda: words, straight.seconds)
    assert trained(home / "out") == trained(home / "straight") and litter(home / "out") == []


@pytest.mark.parametrize("to", ["hf", "nanogpt", "native", "llmc"])
def test_killed_exports_are_the_old_one_or_the_new_one(forker: Forker, home: Path, to: str) -> None:
    old_step, *_, new_step = (str(path.relative_to(home)) for path in checkpoint.list_steps(home / "out").values())
    ok(forker.run(["convert", old_step, "new", "--to", to]))
    straight = ok(forker.run(["convert", new_step, "straight", "--to", to]))
    old, new = tensors(home / "new"), tensors(home / "straight")
    assert old != new

    def one_of_both() -> None:
        if to == "native":
            assert not (steps := checkpoint.list_steps(home / "new")) or tensors(home / "new") in (old, new), steps
        elif (home / "new").exists():
            assert tensors(home / "new") in (old, new)

    chain(forker, 4, to, lambda: ["convert", new_step, "new", "--to", to, "--force"], straight.seconds, one_of_both)
    assert tensors(home / "new") == new and litter(home) == []


# ---- signals ----


def sent(forker: Forker, place: str, name: str, after: float, group: bool) -> Ended:
    """The signal, its time noted; what every command owes whoever sent it."""
    ended = forker.end(getattr(signal, name), after, group)
    number = getattr(signal, name)
    TIMES[place, name].append(ended.seconds)
    assert ended.code in ((0,) if name == "SIGUSR1" else (0, 128 + number, -number)), ended
    assert "Traceback" not in ended.err and "Exception ignored" not in ended.err, ended
    assert ended.seconds < HANGS or name == "SIGUSR1", ended
    assert not forker.left_alive()
    return ended


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize(
    "place, lasts", [("startup", 0.3), ("a step", 0.01), ("an evaluation", 0.1), ("a save", 0.03),
                     ("the final sample", 0.1)]
)  # fmt: skip
def test_a_signalled_run_goes_on_as_it_says(
    forker: Forker, home: Path, made: Path, place: str, lasts: float, name: str
) -> None:
    draw, straight = random.Random(f"{place} {name}"), trained(made / "out", 20)
    for moment in range(MOMENTS):
        shutil.rmtree(home / "out")
        turn = draw.randint(1, 3) if place in ("a step", "an evaluation", "a save") else 1
        forker.start(["train", *RUN], place, turn)
        ended = sent(forker, place, name, lasts * (moment + draw.random()) / MOMENTS, moment % 2 == 0)
        assert all(checkpoint.load(path) for path in checkpoint.list_steps(home / "out").values())
        if ended.code > 0:
            _, _, told = ended.out.partition("To continue:\n  python -m nanogpt_fast.")
            words = shlex.split(told.splitlines()[0]) if told else ["train", *RUN]
            if not told and checkpoint.list_steps(home / "out"):
                assert "--init_from=resume goes on from it" in ended.err
                words.append("--init_from=resume")
            ok(forker.run(words, quick=True))
        assert trained(home / "out", 20) == straight and litter(home / "out") == []


def first_line(text: str) -> dict[str, Any]:
    line = json.loads(text.splitlines()[0])
    return {key: line[key] for key in ("loss", "tokens", "text_bytes")}


PREPARE = ["prepare", "mine", "--source=corpus.jsonl", "--tokenizer=char", "--out=to/mine"]
ON_CPU = ["--out_dir=out", "--device=cpu"]
OTHERS: dict[str, tuple[Words, Callable[[Path, Ended], object]]] = {
    "evaluate": (["evaluate", *ON_CPU, "--batch_size=1", "--json"], lambda folder, ended: first_line(ended.out)),
    "sample": (["sample", *ON_CPU, "--num_samples=3", "--max_new_tokens=60"], lambda folder, ended: ended.out),
    "prepare": ([*PREPARE, "--num_proc=1"], lambda folder, ended: tokens(folder / "to/mine")),
    "prepare, 2 workers": ([*PREPARE, "--num_proc=2"], lambda folder, ended: tokens(folder / "to/mine")),
    "convert to hf": (["convert", "out", "to/hf", "--to=hf"], lambda folder, ended: tensors(folder / "to/hf")),
    "convert to native": (
        ["convert", "out", "to/run", "--to=native"],
        lambda folder, ended: tensors(folder / "to/run"),
    ),
}


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("place", OTHERS)
def test_a_signalled_command_can_be_typed_again(forker: Forker, home: Path, place: str, name: str) -> None:
    draw, (words, result_of) = random.Random(f"{place} {name}"), OTHERS[place]
    straight = ok(forker.run(words, **OFTEN))
    result = result_of(home, straight)
    for moment in range(MOMENTS):
        shutil.rmtree(home / "to", ignore_errors=True)
        forker.start(words, "startup", **OFTEN)
        ended = sent(forker, place, name, straight.seconds * (moment + draw.random()) / MOMENTS, moment % 2 == 0)
        kept = {".partial"} if ended.code and place.startswith("prepare") else set()  # what it goes on from
        assert set(litter(home)) <= kept
        if ended.code:
            if ended.code < 0:  # all was done and said, and Python was taking itself down
                assert result_of(home, ended) == result
                continue
            assert ended.err.count(f"interrupted ({name}): ") == 1, ended
            native = place == "convert to native"  # its folder may stay, with no checkpoint in it
            if place.startswith("convert") and (checkpoint.list_steps if native else Path.exists)(home / words[2]):
                assert result_of(home, ended) == result
                words = [*words, "--force"]
            ended = ok(forker.run(words, quick=True, **OFTEN))
        assert result_of(home, ended) == result and litter(home) == []


# ---- while torch is imported ----


def importing(words: Words, folder: Path, name: str, after: float) -> Ended:
    """A command in an interpreter of its own, which is signalled while torch comes into it."""
    files = [(folder / stream).open("w+") for stream in ("stdout", "stderr")]
    with subprocess.Popen(
        [sys.executable, "-m", *words], env=ENV, stdout=files[0], stderr=files[1], start_new_session=True
    ) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(after)
        began = time.perf_counter()
        process.send_signal(getattr(signal, name))
        code = process.wait(60)
    seconds = time.perf_counter() - began
    for file in files:
        file.seek(0)
    return Ended(code, files[0].read(), files[1].read(), seconds)


@pytest.mark.usefixtures("signals_heeded")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see torch come")
@pytest.mark.parametrize("name", SIGNALS)
def test_the_import_of_torch_is_inside_the_boundary(tmp_path: Path, name: str) -> None:
    """Of a command in its long form and in its short one."""
    draw, number = random.Random(name), getattr(signal, name)
    for moment in range(MOMENTS):
        after = (moment + draw.random()) / MOMENTS
        for words in (["nanogpt_fast.train", "quickstart", "--dry_run"], ["nanogpt_fast", "plan", "--tokens=2.5e9"]):
            ended = importing(words, tmp_path, name, after)
            TIMES["importing torch", name].append(ended.seconds)
            assert "Traceback" not in ended.err, ended
            if name == "SIGUSR1":
                assert ended.code == 0 and ended.out
            else:
                assert ended.code in (0, 128 + number, -number) and (ended.code < 128 or "interrupted" in ended.err)
                assert ended.seconds < HANGS
