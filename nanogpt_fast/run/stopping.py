"""The one flag that a run's loops ask: signals that stop it (it saves, and exits 143, 130 or 129), and one that saves.

SIGTERM and Ctrl-C end a run after the step, or the evaluation's batch, that it is in; so does SIGHUP, a terminal that
was closed, unless nohup has it ignored. SIGUSR1, Slurm's `--signal` before a time limit, saves and goes on.
"""

import os
import signal
from contextlib import suppress
from types import FrameType

SAVING = "finishing the step and saving"
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has the first two


class StopSignals:
    """Context manager; `.received` is the signal number once one came. A second Ctrl-C leaves at once, unsaved.

    doing: what a first signal is answered with.
    """

    def __init__(self, doing: str = SAVING) -> None:
        self.received: int | None = None
        self.save_asked = False  # SIGUSR1 came; whoever saves puts it back
        self._doing = doing
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                continue
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def __call__(self) -> bool:
        """Whether a signal asked to stop."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        return 128 + self.received if self.received else 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGUSR1":
            self.save_asked = True
            _say(f"{name}: saving after this step, then going on")
            return
        if self.received == signal.SIGINT == number:
            _say("stopped at once; the last checkpoint stands")
            os._exit(130)
        self.received = number
        _say(f"{name}: {self._doing}" + "; Ctrl-C again leaves at once" * (number == signal.SIGINT))


def _say(text: str) -> None:
    """Straight to the descriptor: a handler may interrupt a print; with `2>&1 | tee`, Ctrl-C has closed the pipe."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
