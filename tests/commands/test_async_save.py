"""Checkpoints that are written beside the training: the same bits, one at a time, none lost."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import metrics, steps_of, train

from nanogpt_fast import saver
from nanogpt_fast.files import sha256_of
from nanogpt_fast.keeper import Keeper
from nanogpt_fast.run import checkpoint
from nanogpt_fast.run.checkpoint import SaveFailed
from nanogpt_fast.step import TrainStep

SETTINGS: dict[str, Any] = dict(max_iters=30, eval_interval=5, dropout=0.1, keep_last=20, async_save=True)


class Held:
    """checkpoint.save, which from the second call on waits for `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.go, self.began, self.threads, self.pointers = threading.Event(), 0, set[str](), list[int]()
        self.under_way, self.most, self._real = 0, 0, checkpoint.save
        monkeypatch.setattr(saver.checkpoint, "save", self)

    def __call__(self, out_dir: Path, content: checkpoint.Checkpoint, **settings: Any) -> Path:
        self.began += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.threads.add(threading.current_thread().name)
        self.pointers.append(next(iter(content.model.values())).untyped_storage().data_ptr())
        if self.began > 1:
            assert self.go.wait(60)
        path = self._real(out_dir, content, **settings)
        self.under_way -= 1
        return path


def test_they_are_those_of_a_run_that_waits(folder: Path):
    train(folder, out_dir=folder / "waits", **{**SETTINGS, "async_save": False})
    train(folder, **SETTINGS)
    ours, theirs = (checkpoint.list_steps(folder / name) for name in ("out", "waits"))
    assert list(ours) == list(theirs) == [5, 10, 15, 20, 25, 30]
    for step in ours:
        for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
            assert sha256_of(ours[step] / name) == sha256_of(theirs[step] / name), (step, name)


def test_training_goes_on_meanwhile_and_the_next_save_waits(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The second save is held up until iteration 14 is logged; the third, at 15, would wait for it."""
    held, rows = Held(monkeypatch), folder / "out/metrics.jsonl"

    def watch() -> None:
        while not rows.exists() or '"iter": 14' not in rows.read_text():
            held.go.wait(0.01)
        held.go.set()

    watching = threading.Thread(target=watch)
    watching.start()
    train(folder, **SETTINGS)
    watching.join()
    assert steps_of(folder) == [5, 10, 15, 20, 25, 30] and len(metrics(folder, "train", "loss")) == 31
    assert held.threads == {"save_0"} and held.most == 1
    assert len(set(held.pointers)) == 1, "one copy, whose memory is kept"


def test_what_the_next_steps_change_is_not_in_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The copy is written after three more steps."""
    train(folder, out_dir=folder / "waits", **{**SETTINGS, "max_iters": 10, "async_save": False})
    held, step = Held(monkeypatch), saver.Saver.settle
    held.began = 1
    calls = []

    def settle(self: saver.Saver, wait: bool = False) -> Any:
        calls.append(wait)
        if len(calls) > 5 or wait:
            held.go.set()
        return step(self, wait)

    monkeypatch.setattr(saver.Saver, "settle", settle)
    train(folder, **{**SETTINGS, "max_iters": 10})
    found, expected = (checkpoint.load(folder / f"{out}/checkpoints/step_00000005") for out in ("out", "waits"))
    for name, tensor in expected.model.items():
        assert torch.equal(found.model[name], tensor), name


def test_the_copy_stays_until_it_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The second save is still being written when the third begins: its memory is not taken."""
    train(folder, out_dir=folder / "waits", **{**SETTINGS, "async_save": False})
    held, real, calls = Held(monkeypatch), Keeper._save, []

    def save(self: Keeper, *args: Any) -> None:
        calls.append(self.position.step)
        if len(calls) == 3:
            threading.Timer(0.3, held.go.set).start()
        real(self, *args)

    monkeypatch.setattr(Keeper, "_save", save)
    train(folder, **SETTINGS)
    ours, theirs = (checkpoint.list_steps(folder / name)[10] for name in ("out", "waits"))
    assert sha256_of(ours / checkpoint.MODEL) == sha256_of(theirs / checkpoint.MODEL)


def test_one_that_fails_is_warned_of_and_the_run_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    real, calls = checkpoint.save, []

    def fails_at_first(*args: Any, **settings: Any) -> Path:
        calls.append(args[1].step)
        if len(calls) == 1:
            raise SaveFailed("could not save the checkpoint of step 5; older ones are untouched", found="no space")
        return real(*args, **settings)

    monkeypatch.setattr(saver.checkpoint, "save", fails_at_first)
    assert train(folder, **SETTINGS) == 0
    assert "could not save the checkpoint of step 5" in caplog.text and "training goes on" in caplog.text
    assert steps_of(folder) == [10, 15, 20, 25, 30]


def test_three_failures_end_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*args: Any, **settings: Any) -> Path:
        raise SaveFailed("no space")

    monkeypatch.setattr(saver.checkpoint, "save", fails)
    with pytest.raises(SaveFailed, match="no space"):
        train(folder, **SETTINGS)
    assert max(metrics(folder, "train", "loss")) < 30


def test_whoever_leaves_waits_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """An error while a save is under way: that is finished, then the steps since are saved."""
    held = Held(monkeypatch)
    held.began = 1
    threading.Timer(0.5, held.go.set).start()
    step = TrainStep.__call__

    def breaks(self: TrainStep, batch: torch.Tensor, iteration: int, *votes: bool) -> Any:
        if iteration == 8:
            raise OSError(5, "the data are gone")
        return step(self, batch, iteration, *votes)

    monkeypatch.setattr(TrainStep, "__call__", breaks)
    with pytest.raises(OSError, match="the data are gone"):
        train(folder, **SETTINGS)
    assert steps_of(folder) == [5, 8] and "stopped after iteration 7" in capsys.readouterr().out
