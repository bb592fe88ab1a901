"""Where a run's figures go: console lines with nanoGPT's prefixes, metrics.jsonl, TensorBoard, wandb.

A terminal gets a live line below the scrolling ones (progress, ETA); a pipe gets plain lines. A disk that fills up
stops no training: rows of metrics.jsonl wait until there is room again, and are counted if there is none to the end. A
pipe whose reader is gone (Ctrl-C ends `| tee` too) stops that sink, once said.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nanogpt_fast.errors import ConfigError, printable
from nanogpt_fast.files import parse_json, write_atomic
from nanogpt_fast.settings.config import LogConfig

log = logging.getLogger(__name__)


class RunLog:
    """All sinks of one run; every method is a no-op on ranks other than the main one."""

    def __init__(
        self,
        out_dir: Path,
        config: LogConfig,
        flat: dict[str, Any],
        *,
        total: int,
        enabled: bool = True,
        elapsed: float = 0.0,
    ):
        """elapsed: seconds that the run has behind it. Rows are kept from open_rows() on."""
        self.enabled, self.total, self._out_dir = enabled, total, out_dir
        self._began = time.perf_counter() - elapsed
        self._lost: set[str] = set()  # sinks that failed and are no longer written to
        self._file = self._wandb = self._tensorboard = self._progress = None
        if not enabled:
            return
        if config.tensorboard:
            self._tensorboard = _summary_writer(out_dir / "tensorboard")
        if config.wandb_log:
            self._wandb = _wandb_run(config, flat)
        console = Console()
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=console,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task("iter", total=total, figures="")

    def open_rows(self, must: bool = True) -> None:
        """Begin to append to metrics.jsonl. Where it cannot be opened: OSError if it must, else a warning."""
        if not self.enabled:
            return
        try:
            self._out_dir.mkdir(parents=True, exist_ok=True)
            self._file = MetricsFile(self._out_dir / "metrics.jsonl")
        except OSError as error:
            if must:
                raise
            log.warning("%s: %s; its figures are not kept", self._out_dir / "metrics.jsonl", error.strerror)

    def start(self, iteration: int) -> None:
        """Begin the live line, at this iteration."""
        if self._progress:
            self._progress.update(self._task, completed=iteration)
            self._progress.start()

    @property
    def elapsed(self) -> float:
        """Seconds since the run began: its earlier processes', and this one's since the log was opened."""
        return time.perf_counter() - self._began

    def line(self, text: str) -> None:
        """One console line."""
        if not self.enabled:
            return
        text = printable(text)
        if self._progress:
            console = self._progress.console
            self._attempt("console", lambda: console.print(text, markup=False, highlight=False, soft_wrap=True))
        else:
            self._attempt("console", lambda: print(text, flush=True))

    def run(self, **facts: Any) -> None:
        """The header line of metrics.jsonl: what this process is about to do."""
        self._write({"kind": "run", **facts})

    def train(self, iteration: int, figures: dict[str, float | None], console: str) -> None:
        """One logged iteration: its figures by their metrics.jsonl names, and its console line."""
        self.line(console)
        self._write({"kind": "train", "iter": iteration, **figures})
        self._send(iteration, {f"iter/{k}": v for k, v in figures.items()})  # train/loss is nanoGPT's evaluation

    def refused(self, iteration: int, figures: dict[str, float | None], console: str) -> None:
        """An iteration whose update was not applied."""
        self.line(console)
        self._write({"kind": "refused", "iter": iteration, **figures})

    def evaluation(self, iteration: int, figures: dict[str, float | None], console: str) -> None:
        """One evaluation; wandb and TensorBoard get nanoGPT's keys."""
        self.line(console)
        self._write({"kind": "eval", "iter": iteration, **figures})
        names = {"train_loss": "train/loss", "val_loss": "val/loss", "lr": "lr", "mfu": "mfu"}
        self._send(iteration, {names.get(k, f"eval/{k}"): v for k, v in figures.items()})

    def progress(self, iteration: int, figures: str) -> None:
        """Move the live line."""
        if self._progress:
            self._progress.update(self._task, completed=iteration, figures=figures)

    def close(self) -> None:
        """Flush and close every sink."""
        if self._progress:
            self._progress.stop()
        for sink in (self._file, self._tensorboard):
            if sink:
                with suppress(OSError):  # what could not be written was said when it failed
                    sink.close()
        if self._wandb:
            self._wandb.finish()

    def _attempt(self, sink: str, write: Callable[[], object]) -> None:
        """One write; the first that fails drops its sink."""
        if sink in self._lost:
            return
        try:
            write()
        except OSError as error:
            self._lost.add(sink)
            log.warning("%s: %s; training goes on without it", sink, error.strerror)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps({k: None if _not_finite(v) else v for k, v in record.items()}) + "\n")

    def _send(self, iteration: int, figures: dict[str, float | None]) -> None:
        if board := self._tensorboard:
            for name, value in figures.items():
                if value is not None:
                    self._attempt("tensorboard", lambda n=name, v=value: board.add_scalar(n, v, iteration))
        if self._wandb:
            self._wandb.log({"iter": iteration, **figures}, step=iteration)


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)  # JSON has no word for it; null is what readers expect


class MetricsFile:
    """metrics.jsonl, appended to. Rows that the disk refuses wait for the next one's turn."""

    MOST = 64 << 20  # bytes that may wait

    def __init__(self, path: Path):
        """Open at its end, on a line of its own: a process killed in mid-write leaves half a line."""
        self._path, self._waiting, self._refused, self._dropped = path, b"", False, 0
        with path.open("ab+") as file:
            file.seek(max(0, file.tell() - 1))
            if file.read(1) not in (b"", b"\n"):
                file.write(b"\n")
        self._file = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        """One row, its line feed included."""
        if len(self._waiting) < self.MOST:
            self._waiting += line.encode()
        else:
            self._dropped += 1
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._refused:
                log.warning("%s: %s; training goes on, its rows wait for room", self._path, error.strerror)
            self._refused = True
        else:
            if self._refused:
                log.warning("%s: can be written again, %s", self._path, self._lost(0))
            self._refused = False

    def close(self) -> None:
        if self._waiting:
            self.write("")
        if self._waiting:
            log.warning("%s: %s", self._path, self._lost(self._waiting.count(b"\n")))
        self._file.close()

    def _lost(self, waiting: int) -> str:
        rows = waiting + self._dropped
        return f"{rows} rows are lost" if rows else "no row is lost"


def set_rows_aside(path: Path, step: int, evaluates: bool = True) -> Path | None:
    """Move the rows of metrics.jsonl that a run from `step` on does not continue to the end of metrics.abandoned.jsonl
    beside it; that file, None if there are none. step -1: a run that starts anew, all rows are another's. evaluates:
    whether it evaluates at `step`, so that an evaluation there will be done again.

    A run that was killed has rows of steps it will do again; kept in place, they would stand twice. Raises OSError.
    """
    if not path.is_file():
        return None
    path = path.resolve()  # of a link the file, not the link
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [step >= 0 and _stands(line, step, evaluates) for line in lines]
    if all(kept):
        return None
    aside = path.with_name("metrics.abandoned.jsonl")
    with aside.open("ab") as file:  # before they are gone from the other: a crash here leaves them twice, not never
        file.write(b"".join(line for line, stays in zip(lines, kept) if not stays))
        file.flush()
        os.fsync(file.fileno())
    write_atomic(path, b"".join(line for line, stays in zip(lines, kept) if stays))
    return aside


def _stands(line: bytes, step: int, evaluates: bool) -> bool:
    """Whether a row is of what a run from `step` on has behind it; headers are, and what is no row."""
    try:
        row = parse_json(line)
        iteration, kind = row.get("iter", -1), row.get("kind")
    except (ValueError, AttributeError):
        return True
    if not isinstance(iteration, int) or iteration < step:
        return True
    return iteration == step and kind == "eval" and not evaluates


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing("tensorboard", "--tensorboard") from None
    return SummaryWriter(str(folder))


def _wandb_run(config: LogConfig, flat: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise _missing("wandb", "--wandb_log") from None
    return wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=flat)


def _missing(package: str, flag: str) -> ConfigError:
    return ConfigError(
        f"{package} is not installed", where=f"{flag}=True", hint=f"pip install 'nanogpt-fast[log]', or {flag}=False"
    )
