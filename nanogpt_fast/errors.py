"""Errors a user can act on: what, where, expected against found, the next command; one exit code a kind.

Every command's main() runs inside `run_command`, which prints such an error without a traceback
(with one under --debug) and exits with the code of its kind. What is worth a warning goes to the module's logger,
which `run_command` shows on stderr.
"""

import difflib
import logging
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress


class NanogptError(Exception):
    """Base of the errors we raise on purpose.

    what: one sentence; where: file, key, rank or step; expected, found: the two sides of the
    mismatch; hint: what to do next, a command where there is one.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", expected: str = "", found: str = "", hint: str = ""):
        self.what, self.where, self.expected, self.found, self.hint = what, where, expected, found, hint
        rows = [("where", where), ("expected", expected), ("found", found), ("next", hint)]
        super().__init__("\n".join([what] + [f"  {label + ':':<10}{text}" for label, text in rows if text]))


class ConfigError(NanogptError):
    """A flag, a preset or a config file is wrong."""

    exit_code = 2


class DataError(NanogptError):
    """Text, tokens or shards are missing, damaged or do not fit the model."""

    exit_code = 3


class CheckpointError(NanogptError):
    """A checkpoint is missing, damaged, locked or does not fit the run."""

    exit_code = 4


class DeviceError(NanogptError):
    """The device, or a kernel on it, cannot do what was asked."""

    exit_code = 5


class DivergedError(NanogptError):
    """Training diverged: the loss or the gradient stayed non-finite."""

    exit_code = 6


class WarningLines(logging.Handler):
    """WARNING: and the text, on whatever sys.stderr is by then: a live progress bar takes its place for a while.

    With `2>&1 | tee`, Ctrl-C has closed the pipe: then nobody reads, and that is no error.
    """

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            print(f"{record.levelname}: {record.getMessage()}", file=sys.stderr, flush=True)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """', did you mean "x"?' for the closest known names, or '' when none is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f", did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run main(argv) and exit: its return value, or the code of the error it raised."""
    argv = sys.argv[1:]
    logging.getLogger("nanogpt_fast").addHandler(WarningLines())
    try:
        code = main(argv)
    except NanogptError as error:
        debug = any(a == "--debug" or (a.startswith("--debug=") and a != "--debug=False") for a in argv)
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # stdout closed early, as by `| head`
        sys.stderr.close()
        code = 141
    sys.exit(code or 0)
