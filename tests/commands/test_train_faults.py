"""Runs that something ends or disturbs: what is saved, what is said."""

import errno
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import metrics, steps_of, train, train_process

from nanogpt_fast.data.loader import Loader
from nanogpt_fast.errors import CheckpointError, DataError, DeviceError, DivergedError
from nanogpt_fast.run import checkpoint
from nanogpt_fast.scoring import Forward
from nanogpt_fast.step import Report, TrainStep
from nanogpt_fast.trainer import Trainer


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, error: Exception, of: type, name: str) -> None:
    """Let the call-th call of a method raise."""
    real, calls = getattr(of, name), iter(range(1, 10**6))

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(of, name, method)


# ---- whatever ends a run, its healthy weights are saved first ----

GLOO = RuntimeError("[pair.cc:537] Read error [127.0.0.1]:16537: Connection reset by peer.")


@pytest.mark.parametrize(
    ("place", "error", "raised"),
    [
        ((Loader, "__next__"), DataError("a token file was replaced"), DataError),
        ((TrainStep, "__call__"), MemoryError("no 3 TB"), DeviceError),
        ((TrainStep, "__call__"), GLOO, RuntimeError),
        ((Trainer, "_take_in"), OSError(errno.EIO, "Input/output error"), OSError),
    ],
    ids=["data", "memory", "a lost rank", "a figure's sink"],
)
def test_an_error_in_mid_run_saves_the_steps_before_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[type, str], error: Exception, raised: type, capsys
):
    with monkeypatch.context() as patch, pytest.raises(raised):
        fail_at(patch, 8, error, *place)
        train(folder, eval_interval=100)
    (step,) = steps_of(folder)
    assert step in (7, 8)  # 8 where the step itself had been done
    assert f"stopped after iteration {step - 1}. To continue:" in capsys.readouterr().out
    train(folder, init_from="resume", eval_interval=100)
    resumed = metrics(folder, "train", "loss")
    train(folder, eval_interval=100, out_dir=folder / "out")
    whole = metrics(folder, "train", "loss")
    assert {iteration: whole[iteration] for iteration in resumed} == resumed and len(resumed) >= 20


def test_memory_that_ran_out_in_an_evaluation_saves_too(folder: Path, monkeypatch: pytest.MonkeyPatch):
    fail_at(monkeypatch, 2, torch.OutOfMemoryError("CUDA out of memory"), Trainer, "_estimate")
    with pytest.raises(DeviceError, match="ran out of memory"):
        train(folder)
    assert steps_of(folder) == [10]


def test_an_update_that_was_broken_off_is_not_saved(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Moments and master may then belong to two steps."""
    real, calls = torch.Tensor.zero_, iter(range(1, 10**6))

    def zero(self: torch.Tensor) -> torch.Tensor:
        if self.numel() > 5000 and next(calls) == 8:  # the gradient, after the update has written
            raise MemoryError
        return real(self)

    monkeypatch.setattr(torch.Tensor, "zero_", zero)
    with pytest.raises(DeviceError):
        train(folder, eval_interval=100)
    assert steps_of(folder) == []


def test_an_error_that_cannot_be_saved_is_still_the_error(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    fail_at(monkeypatch, 8, DataError("gone"), Loader, "__next__")
    monkeypatch.setattr(checkpoint, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(DataError, match="gone"):
        train(folder, eval_interval=100)
    assert "the last 7 steps could not be saved" in caplog.text


# ---- what is not finite ----


def test_a_run_whose_losses_are_not_finite_ends_in_6_whatever_is_logged(folder: Path, capsys):
    """Ten updates in a row are refused, or the run is over before; neither is a success, nor is anything saved."""
    for iters, every in ((100, 5), (8, 5), (8, 100)):  # the last without an evaluation that would tell
        with pytest.raises(DivergedError) as error:
            train(folder, learning_rate=1e9, log_interval=1000, max_iters=iters, eval_interval=every)
        assert steps_of(folder) == [] and "next:" not in capsys.readouterr().out
        assert "--learning_rate=3.3e+08" in error.value.hint


def test_an_evaluation_that_is_not_finite_replaces_no_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    losses = iter([3.0, 2.0, math.nan, math.inf])
    monkeypatch.setattr(Trainer, "_estimate", lambda *_: {"train": 1.0, "val": next(losses)})
    with pytest.raises(DivergedError, match="not finite") as error:
        train(folder, max_iters=31)
    assert steps_of(folder) == [10] and caplog.text.count("not saved") == 2
    assert "--init_from=resume" in error.value.hint and "--resume_step" not in error.value.hint


def test_the_way_back_leads_to_before_the_loss_went_up(folder: Path, monkeypatch: pytest.MonkeyPatch):
    losses = iter([3.0, 2.0, 9.0, math.nan])
    monkeypatch.setattr(Trainer, "_estimate", lambda *_: {"train": 1.0, "val": next(losses)})
    with pytest.raises(DivergedError) as error:
        train(folder, max_iters=30)
    assert steps_of(folder) == [10, 20] and "--resume_step=10 --learning_rate=0.0033" in error.value.hint
    monkeypatch.undo()
    train(folder, max_iters=30, init_from="resume", resume_step=10)
    assert steps_of(folder) == [10, 20, 30]
    assert [p.name for p in (folder / "out/checkpoints.abandoned-1").iterdir()] == ["step_00000020"]
    with pytest.raises(CheckpointError, match="no checkpoint of step 11") as missing:
        train(folder, max_iters=30, init_from="resume", resume_step=11)
    assert missing.value.found == "10, 20, 30"


def test_one_bad_loss_or_an_old_evaluation_costs_no_save(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    """The update of a NaN step was refused, and an evaluation says nothing of later steps: what is held is healthy."""
    losses = iter([3.0, math.nan, 2.0])
    monkeypatch.setattr(Trainer, "_estimate", lambda *_: {"train": 1.0, "val": next(losses)})
    real = Trainer._take_in

    def take_in(self: Trainer, launched: Any, report: Report) -> None:
        if launched.iteration == 14:
            os.kill(os.getpid(), signal.SIGTERM)
            report = report._replace(loss=math.nan, refused=1.0, bad_steps=1.0)
        real(self, launched, report)

    monkeypatch.setattr(Trainer, "_take_in", take_in)
    assert train(folder) == 143 and steps_of(folder) == [15]
    assert caplog.text.count("not saved") == 1


# ---- signals ----


def signalled(folder: Path, after: str, number: int, **changes: Any) -> tuple[int, float, str]:
    """(exit code, seconds from the signal to the end, stdout) of a run that gets a signal once it printed `after`."""
    run = train_process(folder, **changes)
    assert run.stdout and run.stderr
    lines = []
    for line in run.stdout:
        lines.append(line)
        if after in line:
            break
    time.sleep(0.3)
    began = time.perf_counter()
    run.send_signal(number)
    out, _ = run.communicate(timeout=60)
    return run.returncode, time.perf_counter() - began, "".join(lines) + out


@pytest.mark.parametrize("mode", ["random", "full"])
def test_a_signal_within_an_evaluation_ends_it(folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch, capsys):
    """No forward follows the one that the signal met; the run stands where the evaluation found it."""
    real, calls = Forward.add, []

    def add(self: Forward, *batch: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == before + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, *batch)

    monkeypatch.setattr(Forward, "add", add)
    before = 10**6
    changes = dict(eval_iters=500, eval_mode=mode, eval_interval=5)
    train(folder, max_iters=1, **changes)
    before, calls[:] = len(calls), []
    assert before > 5
    assert train(folder, max_iters=100, **changes) == 143
    assert len(calls) == before + 3 and steps_of(folder) == [5]
    out = capsys.readouterr().out
    assert "step 5:" not in out and "stopped after iteration 4. To continue:" in out


@pytest.mark.usefixtures("signals_heeded")
@pytest.mark.parametrize(("name", "code"), [("SIGHUP", 129), ("SIGINT", 130)])
def test_a_run_is_saved_at(folder: Path, name: str, code: int):
    number = getattr(signal, name)
    returned, _, out = signalled(folder, "iter 20:", number, max_iters=10**6, eval_interval=10**6, log_interval=20)
    (step,) = steps_of(folder)
    assert returned == code and step > 20 and f"stopped after iteration {step - 1}. To continue:" in out


def test_sigusr1_saves_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    real, calls = TrainStep.__call__, iter(range(1, 10**6))

    def step(self: TrainStep, *args: Any) -> Any:
        if next(calls) == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, *args)

    monkeypatch.setattr(TrainStep, "__call__", step)
    assert train(folder, eval_interval=100) == 0
    assert steps_of(folder) == [5, 20] or steps_of(folder) == [5, 21]
    assert len(metrics(folder, "train", "loss")) == 21


def test_a_stop_is_heeded_between_logged_iterations(folder: Path, monkeypatch: pytest.MonkeyPatch):
    real, calls = TrainStep.__call__, iter(range(1, 10**6))

    def step(self: TrainStep, *args: Any) -> Any:
        if next(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    monkeypatch.setattr(TrainStep, "__call__", step)
    assert train(folder, eval_interval=1000, log_interval=1000, max_iters=900) == 143
    assert steps_of(folder) == [5]


def test_an_evaluation_alone_is_left_too(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    train(folder, max_iters=1)
    real = Trainer._estimate

    def estimate(self: Trainer, iteration: int, stop: Callable[[], bool]) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, iteration, stop)

    monkeypatch.setattr(Trainer, "_estimate", estimate)
    before = (folder / "out/metrics.jsonl").read_text()
    assert train(folder, init_from="resume", eval_only=True) == 130
    assert "leaving the evaluation" in capfd.readouterr().err and (folder / "out/metrics.jsonl").read_text() == before


def test_a_run_whose_tokenizer_is_not_the_models_ends_well(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Headerless tokens without a meta file are taken for GPT-2's; the sample's IndexError was exit 70 after a run."""
    assert train(folder, max_iters=2, sample_at_end=5) == 0
    out = capsys.readouterr().out
    assert "no sample: the tokenizer has more ids than the model has embeddings" in out and "next:\n" in out
