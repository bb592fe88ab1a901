"""--profile of a real run: the window's files, a run left unharmed, and what is refused."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny_run import flags, metrics, train

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.run import checkpoint, trace_events
from nanogpt_fast.settings.cli import load_config
from nanogpt_fast.step import StepResult, TrainStep
from nanogpt_fast.train import main


def summary(folder: Path) -> dict:
    return json.loads((folder / "out/profile/summary.json").read_text())


def test_a_window_is_traced_and_the_run_goes_on_the_same(folder: Path, capsys: pytest.CaptureFixture[str]):
    train(folder, max_iters=12, out_dir=folder / "plain")
    capsys.readouterr()
    assert train(folder, max_iters=12, profile="6:9", eval_interval=8) == 0
    out = capsys.readouterr().out
    found = summary(folder)
    assert found["steps"] == 3 and found["facts"]["shape"]["vocab_size"] == 29 and found["facts"]["micro_steps"] == 1
    assert sum(found["parts"].values()) == pytest.approx(found["wall_ms"], rel=0.2)  # 0.05: tests/run/test_tracing.py
    assert found["parts"]["evaluation"] > 0 and found["parts"]["checkpoint"] > 0  # of iteration 8
    names = [event.name for event in trace_events.read(folder / "out/profile/trace.json.gz")]
    expected = {"iteration": 3, "data": 3, "step": 3, "backward": 3, "update": 3, "evaluation": 1, "checkpoint": 1}
    assert {name: names.count(name) for name in expected} == expected
    assert "3 traced steps took" in out and "profiling/explain.py" in out
    plain = checkpoint.load(folder / "plain/checkpoints/step_00000013").model
    traced = checkpoint.load(folder / "out/checkpoints/step_00000013").model
    assert all(torch.equal(plain[name], traced[name]) for name in plain)


def test_traced_iterations_are_marked_and_have_no_mfu(folder: Path, capsys: pytest.CaptureFixture[str]):
    train(folder, max_iters=12, profile="7:9", eval_interval=100)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("iter ")]
    assert [i for i, line in enumerate(lines) if "(tracing)" in line] == [7, 8]
    assert [i for i, mfu in metrics(folder, "train", "mfu").items() if mfu is None] == [7, 8]
    smoothed = [line.split("mfu ")[1].split("%")[0] for line in lines]
    assert smoothed[6] == smoothed[7] == smoothed[8]


def test_the_window_is_not_kept_in_config_toml(folder: Path, capsys: pytest.CaptureFixture[str]):
    train(folder, max_iters=10, profile="2:4")
    config = str(folder / "out/config.toml")
    assert load_config(["--config", config]).system.profile == ""
    capsys.readouterr()
    assert main(["--config", config, "--init_from=resume", "--max_iters=14", "--profile=12:15"]) == 0
    assert summary(folder)["steps"] == 3
    changed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("changed since"))
    assert "profile" not in changed


def test_ctrl_c_inside_the_window_saves_and_writes_what_was_traced(folder: Path, monkeypatch: pytest.MonkeyPatch):
    real = TrainStep.__call__

    def step_and_interrupt(self: TrainStep, batch: torch.Tensor, iteration: int, *votes: bool) -> StepResult:
        if iteration == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, batch, iteration, *votes)

    monkeypatch.setattr(TrainStep, "__call__", step_and_interrupt)
    assert train(folder, max_iters=100, eval_interval=100, profile="6:50") == 130
    assert list(checkpoint.list_steps(folder / "out")) == [8]
    assert summary(folder)["steps"] == 2 and summary(folder)["parts"]["checkpoint"] > 0


def test_a_folder_that_cannot_be_written_does_not_end_the_run(folder: Path, caplog: pytest.LogCaptureFixture):
    (folder / "out").mkdir()
    (folder / "out/profile").write_text("in the way")
    assert train(folder, max_iters=10, profile="2:4") == 0
    assert "no trace was written" in caplog.text and max(metrics(folder, "train", "loss")) == 10


@pytest.mark.parametrize("value", ["10", "15:10", "5:5", "-3:5", "a:b", "1:", ":4", "1:2:3", "1.5:3", "9" * 20 + ":3"])
def test_what_is_no_window_is_refused(folder: Path, value: str):
    with pytest.raises(ConfigError, match="two whole numbers") as caught:
        load_config(flags(folder, profile=value))
    assert caught.value.exit_code == 2 and "command line" in str(caught.value)


def test_a_window_that_the_run_never_reaches_is_refused(folder: Path):
    assert load_config(flags(folder, profile="18:21")).system.window == range(18, 21)  # 0 to 20 are trained
    with pytest.raises(ConfigError, match="STOP <= 21"):
        load_config(flags(folder, profile="18:22"))
    with pytest.raises(ConfigError, match="none with eval_only"):
        load_config(flags(folder, profile="5:6", eval_only=True))
    train(folder, max_iters=10)
    with pytest.raises(ConfigError, match="START >= 10"):
        train(folder, max_iters=40, init_from="resume", profile="9:12")
    assert "did you mean" in str(pytest.raises(ConfigError, load_config, flags(folder, profiler="nsyss")).value)
