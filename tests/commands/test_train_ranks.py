"""Two gloo ranks train what one rank trains: same data, same masks, same losses; one of them writes."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ENV, flags, metrics, train

from nanogpt_fast.run import checkpoint


def start_ranks(folder: Path, size: int, **changes: object) -> list[subprocess.Popen[str]]:
    """`size` processes with torchrun's environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "nanogpt_fast.train", *flags(folder, **changes)]
    shared = {**ENV, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def test_two_ranks_train_as_one(folder: Path):
    """Two micro-batches an iteration, four from the 20th on."""
    settings = dict(gradient_accumulation_steps=4, batch_ramp="2:20", dropout=0.1)
    settings |= dict(max_iters=30, eval_interval=30, eval_iters=4)
    train(folder, **settings)
    alone, alone_eval = metrics(folder, "train", "loss"), metrics(folder, "eval", "val_loss")
    (folder / "out/metrics.jsonl").unlink()
    ranks = start_ranks(folder, 2, **settings)
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    together = metrics(folder, "train", "loss")
    assert max(abs(alone[i] - together[i]) for i in alone) < 1e-4
    assert metrics(folder, "eval", "val_loss")[30] == pytest.approx(alone_eval[30], abs=0.1)  # other random batches
    assert "iter 30" in outputs[0][0] and "iter" not in outputs[1][0]  # rank 0 alone talks
    assert list(checkpoint.list_steps(folder / "out")) == [30]


def test_a_signal_to_one_rank_stops_both_and_saves_once(folder: Path):
    ranks = start_ranks(folder, 2, gradient_accumulation_steps=2, max_iters=100_000, eval_interval=100_000)
    out = folder / "out/metrics.jsonl"
    for _ in range(600):
        if out.exists() and sum(json.loads(line)["kind"] == "train" for line in out.read_text().splitlines()) > 20:
            break
        try:
            ranks[0].wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        break
    ranks[1].send_signal(signal.SIGTERM)
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [143, 143], outputs
    assert len(checkpoint.list_steps(folder / "out")) == 1 and "--init_from=resume" in outputs[0][0]


def test_accumulation_must_divide_among_the_ranks(folder: Path):
    ranks = start_ranks(folder, 2, gradient_accumulation_steps=3)
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2] and "--gradient_accumulation_steps=4" in outputs[0][1]
