"""A run whose updates are refused: what it says, counts, and when it stops."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import metrics, train

from nanogpt_fast.errors import DivergedError
from nanogpt_fast.step import StepResult, TrainStep


def spoil(monkeypatch: pytest.MonkeyPatch, iterations: set[int], value: float) -> None:
    """The gradient of these iterations holds `value`, as if a micro-batch had overflowed."""
    real = TrainStep.__call__

    def step(self: TrainStep, batch: torch.Tensor, iteration: int, *votes: bool) -> StepResult:
        if iteration in iterations:
            self.optimizer.flat.grad[3] = value
        return real(self, batch, iteration, *votes)

    monkeypatch.setattr(TrainStep, "__call__", step)


def test_a_bad_update_is_said_with_its_samples_and_training_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    spoil(monkeypatch, {4, 5, 8}, math.nan)
    assert train(folder, max_iters=20, log_interval=5, max_bad_steps=3) == 0
    assert metrics(folder, "refused", "bad_steps") == {4: 1, 5: 2, 8: 1}
    assert metrics(folder, "refused", "first_sample") == {4: 16, 5: 20, 8: 32}
    assert "iter 5: no update: not finite: the gradient" in (out := capsys.readouterr().out)
    assert "samples 20 to 23 of the run's order), 2 in a row" in out


def test_too_many_bad_updates_stop_the_run_and_name_the_last_good_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    spoil(monkeypatch, set(range(12, 50)), math.inf)
    with pytest.raises(DivergedError) as caught:
        train(folder, max_iters=40, max_bad_steps=4)
    told = str(caught.value)
    assert caught.value.exit_code == 6 and "4 iterations in a row" in told and "iteration 15" in told
    assert (
        "samples 60 to 63" in told and "step_00000010" in told and "--init_from=resume --learning_rate=0.0033" in told
    )


def test_clipping_is_counted(folder: Path):
    """The share of iterations clipped since the line before, in percent, by the norms that the same lines report."""
    train(folder, max_iters=20, grad_clip=1.5, eval_interval=20)
    norms, clipped = metrics(folder, "train", "grad_norm"), metrics(folder, "train", "clipped")
    assert set(clipped.values()) == {0.0, 100.0} and all((norms[i] > 1.5) == (clipped[i] == 100.0) for i in norms)
    train(folder, max_iters=20, grad_clip=1.5, eval_interval=20, log_interval=4)
    every_fourth = metrics(folder, "train", "clipped")
    assert every_fourth[8] == 25.0 * sum(norms[i] > 1.5 for i in range(5, 9))


def test_a_resumed_run_skips_the_same_spikes(folder: Path):
    """The guard's window is part of the checkpoint: 58 iterations straight are 48 and 10, bit for bit."""
    settings = dict(skip_step_sigma=0.3, skip_step_window=8, max_iters=57, eval_interval=24, dropout=0.1)
    train(folder, **settings)
    whole, skipped = metrics(folder, "train", "loss"), metrics(folder, "refused", "loss")
    assert any(i < 48 for i in skipped) and any(i >= 48 for i in skipped) and len(skipped) < 20
    shutil.rmtree(folder / "out")
    train(folder, **(settings | dict(max_iters=47)))
    train(folder, **settings, init_from="resume")
    assert metrics(folder, "train", "loss") == whole and metrics(folder, "refused", "loss") == skipped
