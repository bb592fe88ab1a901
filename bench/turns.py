"""Processes that take turns, each told over its standard input how many steps to make: two versions of the code cannot
share one, and a process that another interrupts is not timed."""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence


class Worker:
    """A process that runs `serve`. RuntimeError, with its last words, where it ends instead of answering."""

    def __init__(self, command: Sequence[str], warmup: int = 5, env: dict[str, str] | None = None):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (a pipe that nobody reads would fill)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=env
        )
        try:
            self.turn(warmup)
        except BaseException:
            self.end()
            raise

    def turn(self, steps: int) -> float:
        """Their median time in ms, without the first, whose caches hold another worker's data."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(OSError):  # it has ended: its output says why
            print(steps + 1, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("["):  # a model may print lines of its own
                return statistics.median(json.loads(line)[1:])
        code = self.process.wait()
        self.errors.seek(0)
        words = self.errors.read().strip().splitlines()
        raise RuntimeError(words[-1] if words else f"it ended with exit code {code}")

    def end(self) -> None:
        self.process.kill()
        with contextlib.suppress(OSError):  # what it was to read is flushed into nothing
            self.process.communicate()
        self.errors.close()


def serve(step: Callable[[], object]) -> None:
    """Lines of stdin, a number of steps each, answered by their times in ms."""
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            began = time.perf_counter()
            step()
            times.append((time.perf_counter() - began) * 1e3)
        print(json.dumps(times), flush=True)
