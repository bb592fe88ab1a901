"""Where a run's figures go: console lines with nanoGPT's prefixes, metrics.jsonl, TensorBoard, wandb.

A terminal gets a live line below the scrolling ones (progress, ETA); a pipe gets plain lines. A disk that fills up
stops no training: rows of metrics.jsonl wait until there is room again, and are counted if there is none to the end. A
pipe whose reader is gone (Ctrl-C ends `| tee` too) stops that sink, once said.
"""

import json
import logging
import math
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
        must: bool = True,
        elapsed: float = 0.0,
    ):
        """must: OSError where metrics.jsonl cannot be opened, else a warning. elapsed: seconds of the run before."""
        self.enabled, self.total = enabled, total
        self._began = time.perf_counter() - elapsed
        self._lost: set[str] = set()  # sinks that failed and are no longer written to
        self._file = self._wandb = self._tensorboard = self._progress = None
        if not enabled:
            return
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            self._file = MetricsFile(out_dir / "metrics.jsonl")
        except OSError as error:
            if must:
                raise
            log.warning("%s: %s; its figures are not kept", out_dir / "metrics.jsonl", error.strerror)
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
        self._path, self._waiting, self._refused = path, b"", False
        with path.open("ab+") as file:
            file.seek(max(0, file.tell() - 1))
            if file.read(1) not in (b"", b"\n"):
                file.write(b"\n")
        self._file = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        """One row, its line feed included."""
        if len(self._waiting) < self.MOST:
            self._waiting += line.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._refused:
                log.warning("%s: %s; training goes on, its rows wait for room", self._path, error.strerror)
            self._refused = True
        else:
            if self._refused:
                log.warning("%s: can be written again, no row is lost", self._path)
            self._refused = False

    def close(self) -> None:
        if self._waiting:
            self.write("")
        if self._waiting:
            log.warning("%s: %d rows are lost", self._path, self._waiting.count(b"\n"))
        self._file.close()


def set_rows_aside(path: Path, step: int) -> Path | None:
    """Move the rows of metrics.jsonl that a run from `step` on does not continue into metrics.abandoned-N.jsonl beside
    it; that file, None if there are none. step -1: a run that starts anew, all rows are another's.

    A run that was killed has rows of steps it will do again; kept in place, they would stand twice. Raises OSError.
    """
    if not path.is_file():
        return None
    lines = path.read_bytes().splitlines(keepends=True)
    later = [line for line in lines if step < 0 or _iteration_of(line) >= step]
    if not later:
        return None
    number = 1
    while (aside := path.with_name(f"metrics.abandoned-{number}.jsonl")).exists():
        number += 1
    gone = set(map(id, later))
    write_atomic(aside, b"".join(later))
    write_atomic(path, b"".join(line for line in lines if id(line) not in gone))
    return aside


def _iteration_of(line: bytes) -> int:
    """A row's iteration; -1 of a header, or of what is no row."""
    try:
        found = parse_json(line).get("iter", -1)
    except (ValueError, AttributeError):
        return -1
    return found if isinstance(found, int) else -1


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
