"""Where a run's figures go: console lines with nanoGPT's prefixes, metrics.jsonl, TensorBoard, wandb.

A terminal gets a live line below the scrolling ones (progress, ETA); a pipe gets plain lines. A disk that fills up,
or a pipe whose reader is gone (Ctrl-C ends `| tee` too), stops that sink, once said, never the training.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.settings.config import LogConfig

log = logging.getLogger(__name__)


class RunLog:
    """All sinks of one run; every method is a no-op on ranks other than the main one."""

    def __init__(self, out_dir: Path, config: LogConfig, flat: dict[str, Any], *, total: int, enabled: bool = True):
        self.enabled, self.total = enabled, total
        self._began = time.perf_counter()
        self._lost: set[str] = set()  # sinks that failed and are no longer written to
        self._file = self._wandb = self._tensorboard = self._progress = None
        if not enabled:
            return
        out_dir.mkdir(parents=True, exist_ok=True)
        self._file = _append_to(out_dir / "metrics.jsonl")
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
        """Seconds since the log was opened."""
        return time.perf_counter() - self._began

    def line(self, text: str) -> None:
        """One console line."""
        if not self.enabled:
            return
        if self._progress:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
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
        if file := self._file:
            line = json.dumps({k: None if _not_finite(v) else v for k, v in record.items()}) + "\n"
            self._attempt("metrics.jsonl", lambda: file.write(line))

    def _send(self, iteration: int, figures: dict[str, float | None]) -> None:
        if board := self._tensorboard:
            for name, value in figures.items():
                if value is not None:
                    self._attempt("tensorboard", lambda n=name, v=value: board.add_scalar(n, v, iteration))
        if self._wandb:
            self._wandb.log({"iter": iteration, **figures}, step=iteration)


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)  # JSON has no word for it; null is what readers expect


def _append_to(path: Path) -> TextIO:
    """The file, open at its end, on a line of its own: a process killed in mid-write leaves half a line."""
    with path.open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        if file.read(1) not in (b"", b"\n"):
            file.write(b"\n")
    return path.open("a", buffering=1)


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
