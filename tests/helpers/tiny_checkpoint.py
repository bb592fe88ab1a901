"""A checkpoint of a few hundred numbers, all derived from its step, for the tests of saving, crashing and damage."""

import dataclasses
from pathlib import Path

import torch

from nanogpt_fast.run.checkpoint import Checkpoint, save
from nanogpt_fast.settings.config import GPTConfig

CONFIG = GPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=2, n_embd=4, bias=True)


def tiny_checkpoint(step: int, val_loss: float | None = None) -> Checkpoint:
    """Every tensor is filled with `step`, so that a mixture of two checkpoints shows."""
    shapes = CONFIG.parameter_shapes()
    return Checkpoint(
        step=step,
        model_args=dataclasses.asdict(CONFIG),
        model={name: torch.full(shape, float(step)) for name, shape in shapes.items()},
        optimizer={
            f"{moment}.{name}": torch.full(shape, float(step))
            for moment in ("exp_avg", "exp_avg_sq")
            for name, shape in shapes.items()
        },
        state={"val_loss": val_loss, "optimizer_step": step},
    )


def save_steps(out_dir: Path, *steps: int) -> list[Path]:
    """Save a tiny checkpoint for each step, pruning none; their directories."""
    return [save(out_dir, tiny_checkpoint(step), keep_last=len(steps)) for step in steps]


def assert_whole(checkpoint: Checkpoint) -> None:
    """All parts are there and belong to one step."""
    tensors = {**checkpoint.model, **checkpoint.optimizer}
    assert len(tensors) == 3 * len(CONFIG.parameter_shapes())
    assert all((tensor == checkpoint.step).all() for tensor in tensors.values())
    assert checkpoint.state["optimizer_step"] == checkpoint.step
