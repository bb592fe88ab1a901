"""Errors a user can act on: what, where, expected against found, the next command; one exit code a kind.

Every command's main() runs inside `command.run_command`, which prints such an error without a traceback
(with one under --debug) and exits with the code of its kind. What is worth a warning goes to the module's logger,
which `run_command` shows on stderr.
"""

import difflib
import logging
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Self

# Control characters but line feed and tab, separators that some terminals break at, overrides of the direction of
# writing, lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Foreign text (of a model, a file, a name) for a terminal: what could drive one is escaped, as \\x1b."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


class NanogptError(Exception):
    """Base of the errors we raise on purpose.

    what: one sentence; where: file, key, rank or step; expected, found: the two sides of the
    mismatch; hint: what to do next, a command where there is one.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", expected: str = "", found: str = "", hint: str = ""):
        self.what, self.where, self.expected, self.found, self.hint = what, where, expected, found, hint
        rows = [("where", where), ("expected", expected), ("found", found), ("next", hint)]
        super().__init__(printable("\n".join([what] + [f"  {label + ':':<10}{text}" for label, text in rows if text])))

    def at(self, where: str) -> Self:
        """The same, with another `where`: of a part that does not know what it was part of."""
        return type(self)(self.what, where=where, expected=self.expected, found=self.found, hint=self.hint)


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


class HostError(NanogptError):
    """This machine refuses: a permission, a disk, a file in the way."""

    exit_code = 7


class UnforeseenError(NanogptError):
    """A mistake of ours, or of a library below us."""

    exit_code = 70  # EX_SOFTWARE of sysexits.h


class WarningLines(logging.Handler):
    """WARNING: and the text, on whatever sys.stderr is by then: a live progress bar takes its place for a while.

    With `2>&1 | tee`, Ctrl-C has closed the pipe: then nobody reads, and that is no error.
    """

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            print(f"{record.levelname}: {printable(record.getMessage())}", file=sys.stderr, flush=True)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """', did you mean "x"?' for the closest known names, or '' when none is close."""
    close = difflib.get_close_matches(name[:200], list(known), n=3, cutoff=0.6)  # it takes a time a letter
    return f", did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
