"""A process that is given work which may crash or hang it, and says what it does in JSON objects, a line each."""

import ctypes
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

DIED = "the process ended with {how} while it ran"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Of a child's main: where its parent is killed, so is it, whatever it does then (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """It lives in a session of its own, so that Ctrl-C is its parent's alone to answer; it ends when its stdin does."""

    def __init__(self, command: Sequence[str]):
        self.how = "exit code 0"  # it ended: "signal N", "exit code N (its last words)" or "no end within N s"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the process)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True
        )
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, value: dict[str, Any]) -> None:
        """A line to its stdin; to one that has ended nothing."""
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()

    def events(self, limit_s: float) -> Iterator[dict[str, Any]]:
        """What it says, until it has ended; after limit_s it is killed."""
        until = time.monotonic() + limit_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
                late = time.monotonic() > until
            except queue.Empty:
                line, late = b"", True
            if line is None:
                return self._ended()
            with suppress(ValueError):
                if isinstance(value := json.loads(line), dict):
                    yield value
            if late:
                self.end()
                self.how = f"no end within {limit_s:.0f} s"
                return

    def end(self) -> None:
        """End it, whatever it does."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join(timeout=1.0)  # what it has forked may hold the pipe

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _ended(self) -> None:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        self.how = f"signal {-code}" if code < 0 else f"exit code {code}"
        self.how += f" ({said[-1][:200]})" if said and code else ""
