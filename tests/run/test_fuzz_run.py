"""Seeded mutations of what a run leaves behind and a resume reads: used, or refused by an error of ours.

Never another exception, never over 1 GiB, never over 10 s. Marked slow: 2,000 of each file; in the default suite a few
dozen. A failure names its seed. The manifest's hashes are made right for a mutated state.json: its content is reached.
"""

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mutations import FEW, GIB, MANY, SECONDS, mutated, mutated_json, peak_bytes
from tiny_run import metrics, train

from nanogpt_fast.data.preparation import PrepareConfig, prepare
from nanogpt_fast.errors import NanogptError
from nanogpt_fast.restore import restore
from nanogpt_fast.run import checkpoint
from nanogpt_fast.run.log import set_rows_aside
from nanogpt_fast.settings.cli import load_config
from nanogpt_fast.train import main

pytest.importorskip("resource", reason="memory is measured by POSIX's getrusage")
MORE = dict(vocab_size=0, data_order="nanogpt", skip_step_sigma=6.0, eval_iters=1)  # settings of the run
RESUMED = {FEW: 4, MANY: 100}  # of the mutations of a file that are resumed from
LAST = 12  # iterations of those resumes


def seal(step: Path) -> None:
    """Make the manifest right for what lies in a step's folder."""
    path = step / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        data = (step / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest))


def mutated_state(data: bytes, rng: random.Random) -> bytes:
    """Mostly of the part that trainers read, which one in 40 characters is."""
    if rng.random() < 0.3:
        return mutated_json(data, rng)
    value = json.loads(data)
    part = rng.choice(("state", "state", "model_args"))
    try:
        value[part] = json.loads(mutated_json(json.dumps(value[part]).encode(), rng))
    except ValueError:
        return mutated(data, rng)
    return json.dumps(value).encode()


def mutated_toml(data: bytes, rng: random.Random) -> bytes:
    """config.toml: a setting's value replaced by another or an odd one; or any byte."""
    if rng.random() < 0.2:
        return mutated(data, rng)
    lines = data.decode().splitlines()
    settings = [i for i, line in enumerate(lines) if " = " in line]
    for at in rng.sample(settings, rng.choice((1, 1, 3))):
        key, _, old = lines[at].partition(" = ")
        other = lines[rng.choice(settings)].partition(" = ")[2]
        if old.replace(".", "").isdigit() and rng.random() < 0.5:
            value = rng.choice(("0", "1", "3", "0.5", "20", str(10**9)))
        else:
            value = rng.choice([*VALUES, old, other, other])
        lines[at] = f"{key} = {value}"
    return "\n".join(lines).encode()


def mutated_lines(data: bytes, rng: random.Random) -> bytes:
    """metrics.jsonl: a row's JSON, or any byte."""
    if rng.random() < 0.4:
        return mutated(data, rng)
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = mutated_json(lines[at], rng) + b"\n"
    return b"".join(lines)


def from_checkpoint(folder: Path) -> None:
    found = restore("resume", str(folder / "out"), str(folder / "data"))
    restore("best", str(folder / "out"), str(folder / "data"))
    found.tokenizer().decode([0])


def from_config(folder: Path) -> None:
    load_config(["--config", str(folder / "out/config.toml"), "--init_from=resume"])


def from_metrics(folder: Path) -> None:
    set_rows_aside(folder / "out/metrics.jsonl", 10)
    for line in (folder / "out").glob("metrics.*"):
        assert line.name == "metrics.jsonl" or line.name == "metrics.abandoned.jsonl"


VALUES = [
    "-1",
    "1e308",
    "nan",
    "inf",
    str(10**400),
    '""',
    '"x"',
    '"\\u0000"',
    "true",
    "[]",
    "{}",
    "1979-05-27",
    "'a' = 1",
]
STEP = "out/checkpoints/step_00000010"
Mutate = Callable[[bytes, random.Random], bytes]
FILES: dict[str, tuple[str, Mutate, Callable[[Path], None]]] = {
    "manifest.json": (f"{STEP}/manifest.json", mutated_json, from_checkpoint),
    "state.json": (f"{STEP}/state.json", mutated_state, from_checkpoint),
    "config.toml": ("out/config.toml", mutated_toml, from_config),
    "metrics.jsonl": ("out/metrics.jsonl", mutated_lines, from_metrics),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 iterations with one checkpoint, from nanoGPT's order, so that its state holds the draws too."""
    folder, draw = tmp_path_factory.mktemp("made"), random.Random(7)
    (folder / "toy.txt").write_text("".join(draw.choice("abcdefgh \n") for _ in range(3000)))
    prepare(PrepareConfig(name="toy", source=str(folder / "toy.txt"), tokenizer="char", out=str(folder / "data/toy")))
    train(folder, **MORE, max_iters=10)
    return folder


def attempt(action: Callable[[], object], name: str) -> bool:
    """Whether it succeeds; AssertionError where it does neither that nor fail as it may."""
    before, began = peak_bytes(), time.monotonic()
    try:
        action()
        done = True
    except NanogptError as error:
        str(error).encode()
        done = False
    except Exception as error:
        raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    assert time.monotonic() - began < SECONDS, name
    assert peak_bytes() - before < GIB, name
    return done


def resume(folder: Path, name: str) -> int:
    """A real resume, in this process, from the run as it lies there."""
    if name == "config.toml":  # what decides how long it runs, and where, is not left to chance
        place = [f"--data_dir={folder / 'data'}", f"--out_dir={folder / 'out'}", "--device=cpu", "--profile="]
        sizes = ["--eval_iters=1", "--batch_size=2", "--gradient_accumulation_steps=1", "--batch_ramp="]
        config = ["--config", str(folder / "out/config.toml"), "--init_from=resume"]
        return main([*config, *place, *sizes, f"--max_iters={LAST}", "--sample_at_end=0", "--eval_interval=5"])
    return train(folder, **MORE, max_iters=LAST, init_from="resume")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_mutated_files_of_a_run_are_used_or_refused(made: Path, tmp_path: Path, name: str, count: int) -> None:
    where, mutate, read = FILES[name]
    data, outcomes = (made / where).read_bytes(), {True: 0, False: 0}
    folder = shutil.copytree(made, tmp_path / "run")
    for seed in range(count):
        (folder / where).write_bytes(mutate(data, random.Random(seed)))
        if name == "state.json":
            seal(folder / STEP)
        outcomes[attempt(lambda: read(folder), f"{name}, seed {seed}")] += 1
        for path in (folder / "out").glob("metrics.abandoned*"):
            path.unlink()
        if seed % (count // RESUMED[count]) == 0:
            shutil.rmtree(folder / "out")
            shutil.copytree(made / "out", folder / "out")
            (folder / where).write_bytes(mutate(data, random.Random(seed)))
            if name == "state.json":
                seal(folder / STEP)
            outcomes[attempt(lambda: resume(folder, name), f"{name}, seed {seed}, resumed")] += 1
            shutil.rmtree(folder / "out")
            shutil.copytree(made / "out", folder / "out")
    assert outcomes[True] and (outcomes[False] or name == "metrics.jsonl"), f"{outcomes}: one side is not reached"


def test_the_helper_reaches_what_it_mutates(made: Path, tmp_path: Path) -> None:
    """Unchanged and sealed, the run loads and goes on."""
    shutil.copytree(made, tmp_path / "run")
    seal(tmp_path / "run" / STEP)
    assert list(checkpoint.list_steps(tmp_path / "run/out")) == [10]
    for name in ("state.json", "config.toml"):
        assert resume(tmp_path / "run", name) == 0
    assert max(metrics(tmp_path / "run", "train", "loss")) == LAST
