"""RunLog: lines, metrics.jsonl, TensorBoard; what fails is said once and never ends the training."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.run.log import MetricsFile, RunLog
from nanogpt_fast.settings.config import LogConfig

ROOT = Path(__file__).resolve().parents[2]
FULL = Path("/dev/full")
needs_dev_full = pytest.mark.skipif(not FULL.exists(), reason="/dev/full, a disk without space, exists on Linux only")


def open_log(folder: Path, *, enabled: bool = True, **config: Any) -> RunLog:
    log = RunLog(folder, LogConfig(**config), {"learning_rate": 1e-3}, total=10, enabled=enabled)
    log.open_rows()
    return log


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl by the letter of JSON: Python's NaN and Infinity are refused."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_some(log: RunLog) -> None:
    log.run(version="1", start=0)
    log.evaluation(
        0, {"train_loss": 4.2, "val_loss": 4.3, "lr": 0.1, "mfu": 40.0, "tokens": 0.0}, "step 0: train loss 4.2"
    )
    log.train(0, {"loss": 4.1, "grad_norm": 1.5, "mfu": None}, "iter 0: loss 4.1")
    log.train(1, {"loss": math.nan, "grad_norm": math.inf, "mfu": None}, "iter 1: loss nan")


def test_lines_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = open_log(tmp_path)
    write_some(log)
    log.close()
    out = capsys.readouterr()
    assert out.out == "step 0: train loss 4.2\niter 0: loss 4.1\niter 1: loss nan\n" and out.err == ""
    run, evaluation, first, second = rows(tmp_path)
    assert run == {"kind": "run", "version": "1", "start": 0}
    assert evaluation["kind"] == "eval" and evaluation["val_loss"] == 4.3
    assert first == {"kind": "train", "iter": 0, "loss": 4.1, "grad_norm": 1.5, "mfu": None}
    assert second == {"kind": "train", "iter": 1, "loss": None, "grad_norm": None, "mfu": None}


def test_a_row_is_on_disk_before_the_next(tmp_path: Path):
    """A killed run keeps every line it printed."""
    log = open_log(tmp_path)
    log.train(0, {"loss": 1.0}, "iter 0")
    assert len(rows(tmp_path)) == 1
    log.close()


def test_a_second_process_appends(tmp_path: Path):
    for _ in range(2):
        log = open_log(tmp_path)
        log.run(start=0)
        log.close()
    assert [row["kind"] for row in rows(tmp_path)] == ["run", "run"]
    assert "\n\n" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_line_cut_off_by_a_kill_does_not_swallow_the_next(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run"}\n{"kind": "train", "it')
    log = open_log(tmp_path)
    log.run(start=3)
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[1] == '{"kind": "train", "it' and json.loads(lines[2]) == {"kind": "run", "start": 3}


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = open_log(tmp_path, enabled=False, tensorboard=True)
    log.start(0)
    write_some(log)
    log.progress(1, "loss")
    log.close()
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


# ---- what fails ----


@needs_dev_full
def test_a_full_disk_is_said_once(tmp_path: Path, capsys, caplog: pytest.LogCaptureFixture):
    """The real error, from the kernel."""
    log, path = open_log(tmp_path), tmp_path / "metrics.jsonl"
    assert log._file is not None
    with FULL.open("w") as full:
        os.dup2(full.fileno(), log._file._file.fileno())
    for _ in range(3):
        write_some(log)
    rows = log._file._waiting.count(b"\n")
    log.close()
    assert rows > 3 and caplog.messages == [
        f"{path}: No space left on device; training goes on, its rows wait for room",
        f"{path}: {rows} rows are lost",
    ]
    assert capsys.readouterr().out.count("iter 0") == 3


def test_rows_that_found_no_room_are_written_when_there_is_some(tmp_path: Path, caplog, monkeypatch):
    """Half a row went to the disk before it was full: the rest follows, and nothing stands twice."""
    metrics, room = MetricsFile(tmp_path / "metrics.jsonl"), [7]
    raw = metrics._file

    class Disk:
        def write(self, data: bytes) -> int:
            if not room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            return raw.write(data[: room[0]]) or 0

    monkeypatch.setattr(metrics, "_file", Disk())
    metrics.write('{"iter": 0}\n')
    room[0] = 0
    metrics.write('{"iter": 1}\n')
    metrics.write('{"iter": 2}\n')
    assert (tmp_path / "metrics.jsonl").read_text() == '{"iter": 0}\n' and "wait for room" in caplog.text
    room[0] = 5
    metrics.write('{"iter": 3}\n')
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(f'{{"iter": {i}}}\n' for i in range(4))
    assert "no row is lost" in caplog.text and len(caplog.messages) == 2


CONSOLE = """
import logging, sys
from pathlib import Path
from nanogpt_fast.errors import WarningLines
from nanogpt_fast.settings.config import LogConfig
from nanogpt_fast.run.log import RunLog
logging.getLogger("nanogpt_fast").addHandler(WarningLines())
log = RunLog(Path(sys.argv[1]), LogConfig(), {}, total=3)
log.open_rows()
sys.stdin.readline()  # the reader of our pipe is gone by now
for i in range(5):
    log.train(i, {"loss": 1.0}, f"iter {i}: loss 1.0")
log.close()
sys.stderr.write("done")
"""


def run_console(folder: Path, stdout: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", CONSOLE, str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=stdout, stderr=pipe, text=True)


def test_a_closed_pipe_does_not_end_the_run(tmp_path: Path):
    """`train | tee log`: Ctrl-C ends tee first, and the run must still come to save."""
    process = run_console(tmp_path, subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate("\n", timeout=60)
    assert errors.startswith("WARNING: console: Broken pipe; training goes on without it\ndone"), errors
    assert len(rows(tmp_path)) == 5


@needs_dev_full
def test_a_redirect_to_a_full_disk_does_not_end_the_run(tmp_path: Path):
    with FULL.open("w") as full:
        _, errors = run_console(tmp_path, full).communicate("\n", timeout=60)
    assert errors.startswith("WARNING: console: No space left on device; training goes on without it\ndone"), errors
    assert len(rows(tmp_path)) == 5


# ---- extras ----


def test_tensorboard_gets_the_figures(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="the extra `log` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_log(tmp_path, tensorboard=True)
    write_some(log)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "lr", "mfu", "eval/tokens", "iter/grad_norm"} <= tags and "iter/mfu" not in tags
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(0, pytest.approx(4.3))]


def test_a_tensorboard_that_cannot_write_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    class Broken:
        def add_scalar(self, *_: Any) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    log = open_log(tmp_path)
    log._tensorboard = Broken()
    write_some(log)
    log.close()
    assert caplog.messages == ["tensorboard: No space left on device; training goes on without it"]
    assert len(rows(tmp_path)) == 4


@pytest.mark.parametrize(
    ("module", "flag"),
    [("wandb", "wandb_log"), ("torch.utils.tensorboard", "tensorboard")],
    ids=["wandb", "tensorboard"],
)
def test_a_missing_extra_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, flag: str):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="is not installed") as error:
        open_log(tmp_path, **{flag: True})
    assert error.value.where == f"--{flag}=True" and "nanogpt-fast[log]" in error.value.hint


def test_wandb_gets_nanogpts_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, Any]] = []

    class Run:
        def log(self, figures: dict[str, Any], step: int) -> None:
            calls.append((f"log {step}", figures))

        def finish(self) -> None:
            calls.append(("finish", None))

    class Wandb:
        @staticmethod
        def init(**arguments: Any) -> Run:
            calls.append(("init", arguments))
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    log = open_log(tmp_path, wandb_log=True, wandb_project="p", wandb_run_name="r")
    write_some(log)
    log.close()
    assert calls[0] == ("init", {"project": "p", "name": "r", "config": {"learning_rate": 1e-3}})
    assert calls[1][1].items() >= {"iter": 0, "train/loss": 4.2, "val/loss": 4.3, "lr": 0.1, "mfu": 40.0}.items()
    assert [name for name, _ in calls] == ["init", "log 0", "log 0", "log 1", "finish"]


# ---- a terminal ----


def test_a_terminal_gets_a_live_line_and_the_same_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Brackets in a line are text, not rich's markup, and long lines are not wrapped."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    log = open_log(tmp_path)
    log.start(4)
    line = "iter 4: loss 1.0 [bold] " + "x" * 300
    log.train(4, {"loss": 1.0}, line)
    log.progress(5, "loss 1.000")
    log.close()
    out = capsys.readouterr().out
    assert line in out and "5/10" in out and "loss 1.000" in out


def test_rows_beyond_what_may_wait_are_counted(tmp_path: Path, caplog, monkeypatch):
    metrics, full = MetricsFile(tmp_path / "metrics.jsonl"), [True]
    raw = metrics._file

    class Disk:
        def write(self, data: bytes) -> int:
            if full[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            return raw.write(data) or 0

    monkeypatch.setattr(metrics, "_file", Disk())
    monkeypatch.setattr(metrics, "MOST", 20)
    for iteration in range(5):
        metrics.write(f'{{"iter": {iteration}}}\n')
    full[0] = False
    metrics.write('{"iter": 5}\n')
    assert caplog.messages[-1].endswith("can be written again, 4 rows are lost")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
