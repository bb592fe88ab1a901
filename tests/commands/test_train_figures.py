"""What each iteration of a run is given and counts: its rate, its batches, its time; what a checkpoint says of it."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_run import metrics, train

from nanogpt_fast import trainer
from nanogpt_fast.distributed import World
from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.keeper import Keeper, Position
from nanogpt_fast.ops import LR
from nanogpt_fast.run import checkpoint
from nanogpt_fast.schedule import learning_rate
from nanogpt_fast.settings.config import OptimConfig
from nanogpt_fast.step import TrainStep
from nanogpt_fast.trainer import Trainer


def wrap(monkeypatch: pytest.MonkeyPatch, of: Any, name: str, before: Any) -> None:
    """Let before(call's number from 0, *args, **kwargs) run ahead of each call of a function or method."""
    real, calls = getattr(of, name), iter(range(10**6))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(next(calls), *args, **kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(of, name, wrapped)


def test_every_update_has_its_iterations_rate(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """In the warm-up, after it, and after a resume; and the logged rate is the one that was applied."""
    optim = OptimConfig(learning_rate=1e-2, min_lr=1e-3, warmup_iters=5, lr_decay_iters=200, max_iters=12)
    applied: list[float] = []
    wrap(monkeypatch, TrainStep, "__call__", lambda n, step, *_: applied.append(float(step.optimizer.scalars[LR])))
    train(folder, max_iters=7)
    train(folder, max_iters=12, init_from="resume")
    assert applied == [learning_rate(i, optim) for i in range(13)]
    assert metrics(folder, "train", "lr") == dict(enumerate(applied))


def test_each_evaluation_draws_its_own_batches(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """By the iteration: a resumed run's evaluation is the one that the whole run would have made."""
    seeds: list[int] = []
    wrap(monkeypatch, trainer, "estimate_loss", lambda n, *_, generator, **__: seeds.append(generator.initial_seed()))
    train(folder)
    train(folder, init_from="resume", max_iters=30)
    assert len(seeds) == 5 and len(set(seeds)) == 4 and seeds[2] == seeds[3], "at 0, 10, 20; 21 has none, 30"


def test_an_evaluation_is_no_training_time(folder: Path, monkeypatch: pytest.MonkeyPatch):
    wrap(monkeypatch, Trainer, "_estimate", lambda *_: time.sleep(0.5))
    train(folder)
    assert max(metrics(folder, "train", "time_ms").values()) < 500


def test_weights_that_are_not_finite_are_not_saved(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the losses before them were."""

    def spoil(n: int, step: TrainStep, *_: Any) -> None:
        if n == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            monkeypatch.setattr(step.guard, "add", lambda *_: step.optimizer.flat.master[:1].fill_(float("nan")))

    wrap(monkeypatch, TrainStep, "__call__", spoil)
    assert train(folder, eval_interval=1000) == 143
    assert not checkpoint.list_steps(folder / "out")


def test_a_resume_with_another_batch_goes_on_after_the_samples_seen(folder: Path, monkeypatch: pytest.MonkeyPatch):
    first: list[int] = []
    wrap(monkeypatch, Trainer, "run", lambda n, self: first.append(self.loader.samples_seen))
    train(folder, max_iters=10, batch_size=4)
    train(folder, max_iters=12, batch_size=2, init_from="resume")
    assert first == [0, 10 * 4]


def test_a_resume_goes_on_with_the_number_of_updates(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Of those that were applied: a skipped one is none, and AdamW's bias correction counts by them."""
    monkeypatch.setattr(trainer, "learning_rate", lambda *_: 1e-3)
    wrap(
        monkeypatch, TrainStep, "__call__",
        lambda n, step, *_: step.optimizer.flat.grad.fill_(float("nan") if n in (2, 3) else 0.0),
    )  # fmt: skip
    train(folder, max_iters=10)
    (path,) = checkpoint.list_steps(folder / "out").values()
    assert checkpoint.load(path).state["optimizer_step"] == 8
    counts: list[int] = []
    wrap(monkeypatch, Trainer, "run", lambda n, self: counts.append(self.optimizer.state_dict()[1]["optimizer_step"]))
    train(folder, max_iters=12, init_from="resume")
    assert counts == [8]


def test_two_saves_may_fail_and_the_third_ends_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    """A save in between that succeeds begins the count anew."""
    fails = iter([True, True, False, True, True, True])
    real = checkpoint.save

    def save(*args: Any, **kwargs: Any) -> Path:
        if next(fails):
            raise CheckpointError("no room")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", save)
    kept: list[Keeper] = []
    wrap(monkeypatch, Trainer, "run", lambda n, self: kept.append(self.keeper))
    with pytest.raises(CheckpointError, match="no room"):
        train(folder, max_iters=100, eval_interval=10)
    assert kept[0].position == Position(60, 240, None) and list(checkpoint.list_steps(folder / "out")) == [30]
    assert caplog.text.count("the next evaluation tries again") == 4


def test_the_end_is_saved_where_the_last_evaluation_was_one_step_before(folder: Path):
    train(folder, max_iters=20, eval_interval=19)
    assert list(checkpoint.list_steps(folder / "out")) == [19, 21]


def test_the_first_rank_is_the_main_one():
    assert [World(rank, 3).is_main for rank in range(3)] == [True, False, False]
