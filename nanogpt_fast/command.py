"""The boundary of every command: main() inside it ends in an exit code and words, never in a traceback.

What is ours (errors.NanogptError) speaks for itself; memory that ran out, a disk or a permission that refused, and
what nobody foresaw are put into the same form here. SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that what
is half done is cleared away; `train` takes them into its own hands (run/stopping.py).
"""

import atexit
import errno
import gc
import logging
import os
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import NoReturn, TextIO

from nanogpt_fast.errors import DeviceError, HostError, NanogptError, UnforeseenError, WarningLines

HOME = os.path.dirname(__file__) + os.sep
# How torch's allocators, its tensor constructors and numpy's say that there is not so much memory; all were provoked.
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc",
              "size calculation overflowed", "multiplication overflow", "array is too big",
              "maximum allowed dimension exceeded")  # fmt: skip
_HINTS = {  # by what the system says
    errno.ENOSPC: "make room on that disk (df -h), then run it again",
    errno.EDQUOT: "make room in your quota (quota -s), then run it again",
    errno.EMFILE: "let a process open more files (ulimit -n), then run it again",
    errno.ENAMETOOLONG: "a name has at most 255 bytes: choose a shorter one",
}
_HINT = "check the path and its permissions (ls -ld), then run it again"
_came: list[int] = []  # signals that unwound the stack: what a library made of their exception is not what happened
_importing = False  # then they wait
_FALSE = ("False", "false", "0", "no", "off")


class Stopped(BaseException):
    """SIGTERM or SIGHUP came; as KeyboardInterrupt, no `except Exception` keeps it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run_command(main: Callable[[list[str]], int | None], *, again: str = "nothing was left half done") -> NoReturn:
    """Run main(argv) and exit: its return value, or the code of what it ended in. again: said when interrupted."""
    _give_descriptors()
    atexit.register(gc.freeze)  # else the last collections look through all of torch: 0.19 s of 1.11 for importing it
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a stream of somebody's own
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    argv, warnings = sys.argv[1:], WarningLines()
    loggers = [logging.getLogger(name) for name in ("nanogpt_fast", "__main__")]  # a command's own file is __main__
    if any(isinstance(handler, WarningLines) for handler in loggers[0].handlers):
        loggers = []  # `python -m nanogpt_fast` has run us, and says them
    for logger in loggers:
        logger.addHandler(warnings)
    try:
        code = _guarded(main, argv, again)
    finally:
        for logger in loggers:
            logger.removeHandler(warnings)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            _flush(stream)
    sys.exit(code)


@contextmanager
def importing() -> Iterator[None]:
    """Around a command's import of torch: nothing is collected within. An import makes no garbage to speak of, and to
    look for it again and again among all that was made takes 0.13 of torch's 0.78 s (measured). A signal waits for its
    end: within torch's C++ an exception of its handler aborts the process, elsewhere the import may swallow it."""
    global _importing
    on, before = gc.isenabled(), len(_came)
    gc.disable()
    _importing = True
    try:
        yield
    finally:
        _importing = False
        if on:
            gc.enable()
    if len(_came) > before:
        raise KeyboardInterrupt if _came[-1] == signal.SIGINT else Stopped(_came[-1])


def _guarded(main: Callable[[list[str]], int | None], argv: list[str], again: str) -> int:
    """The exit code of main(argv), what it raised put into words on stderr."""
    if _came:  # while `python -m nanogpt_fast` imported the command: an import of torch's may swallow it
        return _interrupted(_came[-1], again)
    try:
        with _unwinding(last=True):  # in here: a signal between its handlers and main() must be caught too
            return _code_of(main, argv)
    except (KeyboardInterrupt, Stopped) as stop:
        return _interrupted(stop.number if isinstance(stop, Stopped) else signal.SIGINT, again)
    except Exception as error:
        if _came:
            return _interrupted(_came[-1], again)
        if isinstance(error, BrokenPipeError) and _nobody_reads():  # stdout closed early, as by `| head`
            return 141
        ours = explained(error)
        _say("".join(traceback.format_exception(error)).rstrip() if _debug(argv) else f"error: {ours}")
        return ours.exit_code


def _interrupted(number: int, again: str) -> int:
    _came.clear()  # it is answered
    _say(f"interrupted ({signal.Signals(number).name}): {again}")
    return 128 + number


def _code_of(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    try:
        code = main(argv) or 0
    except SystemExit as stop:  # --help
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    sys.stdout.flush()
    return code


def _debug(argv: list[str]) -> bool:
    """Whether --debug is among the flags, in any of its forms; the last one counts."""
    found = False
    for word, after in zip(argv, [*argv[1:], ""]):
        name, _, value = word.partition("=")
        if name in ("--debug", "--no-debug"):
            found = name == "--debug" and (value or after) not in _FALSE
    return found


def explained(error: BaseException) -> NanogptError:
    """The error itself where it is ours; else what, where and next of it."""
    if isinstance(error, NanogptError):
        return error
    text = next(iter(str(error).splitlines()), "")[:300]
    if out_of_memory(error):
        return DeviceError(
            "memory ran out",
            where=place_of(error.__traceback__),
            found=text or type(error).__name__,
            hint="ask for less at once (--batch_size, --block_size, a smaller model or file), or free some memory",
        )
    if isinstance(error, OSError):
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        network = error.errno is None or isinstance(error, ConnectionError | TimeoutError)
        hint = "check the network, then run it again" if network and not names else _HINTS.get(error.errno or 0, _HINT)
        what = error.strerror or text or type(error).__name__
        return HostError(str(what), where=names or place_of(error.__traceback__), hint=hint)
    return UnforeseenError(
        f"not foreseen: {type(error).__name__}: {text}",
        where=place_of(error.__traceback__),
        hint=f"{_kept_traceback(error)}; the same command with --debug shows it too",
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out: torch has one class for GPUs, a plain RuntimeError for all else, numpy a
    ValueError for what no machine has, the system ENOMEM (a map, a fork)."""
    said = isinstance(error, RuntimeError | ValueError) and any(words in str(error).lower() for words in _NO_MEMORY)
    return said or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def place_of(trace: TracebackType | None) -> str:
    """file:line of the innermost frame of ours, as in nanogpt_fast/sample.py:70."""
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(trace)]
    ours = [(name, line) for name, line in places if name.startswith(HOME) and name != __file__]
    return f"nanogpt_fast/{ours[-1][0].removeprefix(HOME)}:{ours[-1][1]}" if ours else ""


def _kept_traceback(error: BaseException) -> str:
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="nanogpt_fast-", suffix=".traceback", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write("".join(traceback.format_exception(error)))
        return f"please report it with the traceback, which is in {file.name}"
    except OSError:
        return "please report it"


@contextmanager
def _unwinding(last: bool = False) -> Iterator[None]:
    """SIGTERM and SIGHUP raise Stopped, Ctrl-C KeyboardInterrupt, once; another one ends the process. SIGUSR1, Slurm's
    warning, does no harm. last: the process ends next, which torch makes half a second of; Ctrl-C then ends it at
    once, without a traceback."""
    owner, before = os.getpid(), {}

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:  # a forked worker, which is told to end
            os.kill(os.getpid(), number)
            return
        _came.append(number)
        if _importing:
            return
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    handlers = dict.fromkeys(("SIGINT", "SIGTERM", "SIGHUP"), on_signal) | {"SIGUSR1": lambda *_: None}
    with suppress(ValueError):  # not the main thread
        for name, handler in handlers.items():
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is None:
                continue
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # nohup's SIG_IGN stays
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            if last:
                handler = signal.SIG_IGN if number == getattr(signal, "SIGUSR1", None) else signal.SIG_DFL
            signal.signal(number, handler)


def _give_descriptors() -> None:
    """Open the null device on those of 0, 1, 2 that are closed: the next file opened would get what is printed, here
    or in a child."""
    streams = dict(enumerate(("stdin", "stdout", "stderr")))
    for number, name in streams.items():
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest number that is free
            setattr(sys, name, None)
    for number, name in streams.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader is gone, and empties its buffer; another pipe may have broken."""
    try:
        poll = select.poll()  # not on Windows
        poll.register(sys.stdout.fileno(), 0)
        gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):
        gone = True
    if gone:
        _drop_output(sys.stdout)
    return gone


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # nobody listens
        print(text, file=sys.stderr, flush=True)


def _flush(stream: TextIO) -> None:
    try:
        stream.flush()
    except (OSError, ValueError):
        _drop_output(stream)


def _drop_output(stream: TextIO) -> None:
    """What is still buffered can go nowhere; without this Python tries once more when it ends, and complains."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
