"""Signals that ask a run to stop: it finishes the step, saves, and exits 143 (SIGTERM) or 130 (Ctrl-C)."""

import os
import signal
from contextlib import suppress
from types import FrameType


class StopSignals:
    """Context manager; `.received` is the signal number once one came. A second Ctrl-C leaves at once, unsaved."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def exit_code(self) -> int:
        return 128 + self.received if self.received else 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            _say("stopped at once; the last checkpoint stands")
            os._exit(130)
        self.received = number
        what = "finishing the step and saving; Ctrl-C again leaves at once" if number == signal.SIGINT else "saving"
        _say(f"{signal.Signals(number).name}: {what}")


def _say(text: str) -> None:
    """Straight to the descriptor: a handler may interrupt a print; with `2>&1 | tee`, Ctrl-C has closed the pipe."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
