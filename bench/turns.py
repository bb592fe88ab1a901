"""Arms that are processes: each makes its calls when it is told how many, so that they take turns and share nothing.

On a CPU the allocator, the threads and the caches of a process are part of what is compared, so each arm has its own.
A GPU's arms share a process (bench/step.py): its memory would not hold several.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

MARK = "@ "  # before our lines: libraries print lines of their own


class Failed(Exception):
    """Why an arm's process did not get through, in its own words."""


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The order of a round: each begins with another arm."""
    at = turn % len(names) if names else 0
    return [*names[at:], *names[:at]]


class Apart:
    """A process that answers to `serve`. facts: what it said of itself when it was ready; Failed if it was not."""

    def __init__(self, command: Sequence[str], env: dict[str, str] | None = None):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        try:
            self.facts: dict[str, Any] = self._answer()
        except Failed:
            self.end()
            raise

    def turn(self, calls: int) -> dict[str, Any]:
        """{"seconds": of each of so many calls, "peak_gb": ..., and what the arm adds}. One call more is made first and
        not counted: its caches hold another arm's data."""
        assert self.process.stdin is not None
        try:
            print(calls + 1, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise Failed(f"ended with exit code {self.process.wait()}") from None
        answer = self._answer()
        return {**answer, "seconds": answer["seconds"][1:]}

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                answer = json.loads(line.removeprefix(MARK))
                if "failed" in answer:
                    raise Failed(answer["failed"])
                return answer
            print(line, end="", flush=True)
        raise Failed(f"ended with exit code {self.process.wait()}")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # closing writes what a turn could not
                    stream.close()


def serve(make: Callable[[], tuple[dict[str, Any], Callable[[], Any], Callable[[], dict[str, Any]]]],
          why: Callable[[Exception], str] = str) -> None:  # fmt: skip
    """The process's side: make() -> (facts, the call to time, what an answer adds); `why` words a failure."""
    try:
        facts, call, more = make()
        _say(facts)
        for line in sys.stdin:
            seconds = []
            for _ in range(int(line)):
                began = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - began)
            _say({"seconds": seconds, "peak_gb": peak_rss() / 1e9, **more()})
    except Exception as problem:
        _say({"failed": why(problem)})


def _say(answer: dict[str, Any]) -> None:
    print(f"{MARK}{json.dumps(answer)}", flush=True)


def peak_rss() -> int:
    """Bytes of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
