"""How far a pass over the text has come, for whoever waits."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

TOLD_SECONDS = 10.0  # between lines of progress where there is no terminal


class Meter:
    """What a pass over the text has come to: a bar on a terminal, else a line every TOLD_SECONDS.

    total: about so many bytes or characters, None when not known.
    """

    def __init__(self, name: str, total: int | None):
        self.name = name
        self.began = self.told = time.perf_counter()
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.bar.add_task(name, total=total)

    def __enter__(self) -> "Meter":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self.began, 1e-9)

    def advance(self, count: int, text: str) -> None:
        self.at(self.bar.tasks[self.task].completed + count, self.bar.tasks[self.task].total, text)

    def at(self, done: float, total: float | None, text: str) -> None:
        self.bar.update(
            self.task, completed=done, total=total, description=f"{self.name}: {text}" if text else self.name
        )
        now = time.perf_counter()
        if not self.console.is_terminal and now - self.told >= TOLD_SECONDS:
            self.told = now
            share = f" {min(done / total, 1):.0%}" if total else ""
            print(f"{self.name}{share}: {text}" if text else f"{self.name}{share}", file=self.console.file, flush=True)
