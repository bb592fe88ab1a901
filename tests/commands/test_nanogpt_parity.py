"""--data_order=nanogpt trains as nanoGPT does: same weights, same batches, same losses.

The always-run cases compare with tests/helpers/twin.py, nanoGPT's algorithm written again on torch.nn. With
NANOGPT_DIR set to a checkout of karpathy/nanoGPT, its own train.py is run and compared with too.
"""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import ENV, VOCAB, flags, metrics, train
from twin import Twin, train_twin

from nanogpt_fast.convert import main as convert
from nanogpt_fast.run import checkpoint
from nanogpt_fast.schedule import learning_rate
from nanogpt_fast.settings.config import GPTConfig, OptimConfig

NANOGPT = os.environ.get("NANOGPT_DIR")
needs_nanogpt = pytest.mark.skipif(not NANOGPT, reason="set NANOGPT_DIR to a checkout of karpathy/nanoGPT")
SETTINGS = dict(data_order="nanogpt", max_iters=100, eval_interval=50, eval_iters=3, warmup_iters=10, lr_decay_iters=90)
OPTIM = OptimConfig(learning_rate=1e-2, min_lr=1e-3, warmup_iters=10, lr_decay_iters=90)


@pytest.mark.parametrize("changes", [dict(), dict(bias=True), dict(gradient_accumulation_steps=3)], ids=str)
def test_100_iterations_agree_with_nanogpts_algorithm(folder: Path, changes: dict):
    train(folder, **SETTINGS, **changes)
    shape = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=VOCAB, bias=changes.get("bias", False))
    splits = {s: np.fromfile(folder / f"data/toy/{s}.bin", np.uint16) for s in ("train", "val")}
    model, losses, evals = train_twin(
        shape, splits, batch_size=4, iterations=101, accumulation=changes.get("gradient_accumulation_steps", 1),
        lr=lambda it: learning_rate(it, OPTIM), eval_interval=50, eval_iters=3,
    )  # fmt: skip
    ours = metrics(folder, "train", "loss")
    assert max(abs(ours[i] - np.mean(losses[i])) for i in range(101)) < 1e-4
    for split in ("train", "val"):
        ours = metrics(folder, "eval", f"{split}_loss")
        assert max(abs(ours[i] - evals[i][split]) for i in (0, 50, 100)) < 1e-4
    assert set(model.named()) == set(shape.parameter_shapes())


def test_initial_weights_are_nanogpts(folder: Path):
    train(folder, **{**SETTINGS, "max_iters": 1, "eval_interval": 1, "learning_rate": 0.0, "min_lr": 0.0})
    ours = checkpoint.load(folder / "out/checkpoints/step_00000001").model
    torch.manual_seed(1337)
    shape = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=VOCAB, bias=False)
    theirs = Twin(shape).named()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def run_nanogpt(folder: Path, **changes: object) -> tuple[dict[int, float], dict[int, float]]:
    """Stock train.py with the small run's flags; ({iteration: loss}, {iteration: val loss}) of its console."""
    ours_only = {"data_dir", "data_order", "vocab_size"}
    args = [flag for flag in flags(folder, **changes) if flag[2:].split("=")[0] not in ours_only]
    args = [re.sub(r"^(--dropout=|--grad_clip=)0$", r"\g<1>0.0", flag) for flag in args]
    env = {**ENV, "PYTHONPATH": str(NANOGPT)}
    command = [sys.executable, "-c", NANOGPT_MAIN, *args]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    losses = {int(i): float(x) for i, x in re.findall(r"^iter (\d+): loss ([\d.]+)", run.stdout, re.MULTILINE)}
    evals = {int(i): float(x) for i, x in re.findall(r"^step (\d+): .* val loss ([\d.]+)", run.stdout, re.MULTILINE)}
    return losses, evals


# train.py opens configurator.py in its working directory, and its data below it; a meta.pkl gives the vocabulary
NANOGPT_MAIN = """
import builtins, os, sys
root, real = os.environ["PYTHONPATH"], builtins.open
builtins.open = lambda p, *a, **k: real(os.path.join(root, p) if p == "configurator.py" else p, *a, **k)
sys.argv[0] = "train.py"
exec(compile(real(os.path.join(root, "train.py")).read(), "train.py", "exec"))
"""


def write_meta(folder: Path) -> None:
    (folder / "data/toy/meta.pkl").write_bytes(pickle.dumps({"vocab_size": VOCAB, "itos": {}, "stoi": {}}))


@needs_nanogpt
def test_stock_nanogpt_agrees_and_each_resumes_the_others_checkpoint(folder: Path):
    """100 iterations side by side; then both go on from nanoGPT's ckpt.pt, and from ours, with the same losses."""
    write_meta(folder)
    changes = {**SETTINGS, "max_iters": 60, "eval_interval": 50}
    losses, evals = run_nanogpt(folder, **changes)
    stock = (folder / "out/ckpt.pt").read_bytes()
    (folder / "out/ckpt.pt").unlink()
    train(folder, **changes)
    assert largest(losses, metrics(folder, "train", "loss")) <= 1.5e-4  # its console prints four digits
    assert largest(evals, metrics(folder, "eval", "val_loss")) <= 1.5e-4

    ours = folder / "ours.pt"
    convert([str(folder / "out/checkpoints/step_00000050"), str(ours), "--to", "nanogpt"])  # nanoGPT's is of 50 too
    more = {**changes, "max_iters": 120, "init_from": "resume"}
    for blob in (stock, ours.read_bytes()):
        for path in sorted((folder / "out").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (folder / "out/ckpt.pt").write_bytes(blob)
        theirs, their_evals = run_nanogpt(folder, **more)
        (folder / "out/ckpt.pt").write_bytes(blob)
        train(folder, **more)
        assert set(theirs) == set(range(50, 121))
        assert largest(theirs, metrics(folder, "train", "loss")) <= 1.5e-4
        assert largest(their_evals, metrics(folder, "eval", "val_loss")) <= 1.5e-4


def largest(theirs: dict[int, float], ours: dict[int, float]) -> float:
    assert set(theirs) <= set(ours)
    return max(abs(value - ours[i]) for i, value in theirs.items())
