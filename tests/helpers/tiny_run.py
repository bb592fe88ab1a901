"""A small run for the tests of the trainer: made-up text that can be learnt, a small model, main() in this process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_fast.run import checkpoint
from nanogpt_fast.train import main

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 29
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


def write_dataset(folder: Path, tokens: int = 6_000) -> Path:
    """folder/data/toy with train.bin and val.bin: a random walk over VOCAB ids, so the next id is one of three."""
    rng = np.random.default_rng(7)
    for split, count in (("train", tokens), ("val", tokens // 4)):
        walk = np.cumsum(rng.integers(-1, 2, count)) % VOCAB
        (folder / "data/toy").mkdir(parents=True, exist_ok=True)
        walk.astype(np.uint16).tofile(folder / f"data/toy/{split}.bin")
    return folder / "data"


def flags(folder: Path, **changes: Any) -> list[str]:
    """Command-line flags of the small run; changes override or add."""
    settings: dict[str, Any] = dict(
        dataset="toy", data_dir=folder / "data", out_dir=folder / "out", device="cpu", dtype="float32", compile=False,
        n_layer=2, n_head=2, n_embd=16, block_size=8, batch_size=4, gradient_accumulation_steps=1, vocab_size=VOCAB,
        max_iters=20, eval_interval=10, eval_iters=2, log_interval=1, warmup_iters=5, lr_decay_iters=200,
        learning_rate=1e-2, min_lr=1e-3, dropout=0.0,
    )  # fmt: skip
    return [f"--{key}={value}" for key, value in (settings | changes).items()]


def train(folder: Path, **changes: Any) -> int:
    """main() of the small run; its exit code."""
    return main(flags(folder, **changes))


def train_process(folder: Path, *args: str, **changes: Any) -> subprocess.Popen[str]:
    """The same as a process of its own."""
    command = [sys.executable, "-m", "nanogpt_fast.train", *flags(folder, **changes), *args]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)


def metrics(folder: Path, kind: str, key: str) -> dict[int, Any]:
    """{iteration: value} from out/metrics.jsonl so far; the last line of an iteration wins."""
    rows = folder / "out/metrics.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    return {line["iter"]: line[key] for line in lines if line["kind"] == kind}


def losses(folder: Path) -> dict[int, float]:
    """{iteration: loss} of the training steps so far."""
    return metrics(folder, "train", "loss")


def wait_for_iteration(folder: Path, iteration: int, seconds: float = 120.0) -> None:
    """Until that one is logged."""
    until = time.monotonic() + seconds
    while max(losses(folder), default=-1) < iteration:
        assert time.monotonic() < until, f"{folder}: the run does not come to iteration {iteration}"
        time.sleep(0.05)


def steps_of(folder: Path) -> list[int]:
    """The steps of out/checkpoints, in order."""
    return list(checkpoint.list_steps(folder / "out"))
