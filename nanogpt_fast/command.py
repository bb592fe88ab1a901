"""The boundary of every command: main() inside it ends in an exit code and words, never in a traceback.

What is ours (errors.NanogptError) speaks for itself; memory that ran out, a disk or a permission that refused, and
what nobody foresaw are put into the same form here. SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that what
is half done is cleared away; `train` takes them into its own hands (run/stopping.py).
"""

import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import NoReturn

from nanogpt_fast.errors import DeviceError, HostError, NanogptError, UnforeseenError, WarningLines

HOME = os.path.dirname(__file__)
# How torch's allocators and tensor constructors say that there is not so much memory.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "size calculation overflowed",
              "multiplication overflow", "bad_alloc", "cannot allocate memory")  # fmt: skip


class Stopped(BaseException):
    """SIGTERM or SIGHUP came; as KeyboardInterrupt, no `except Exception` keeps it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run_command(main: Callable[[list[str]], int | None], *, again: str = "nothing was left half done") -> NoReturn:
    """Run main(argv) and exit: its return value, or the code of what it ended in. again: said when interrupted."""
    _give_descriptors()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a stream of somebody's own
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    argv = sys.argv[1:]
    logging.getLogger("nanogpt_fast").addHandler(WarningLines())
    with _unwinding():
        code = _guarded(main, argv, again)
    _flush()
    sys.exit(code)


def _guarded(main: Callable[[list[str]], int | None], argv: list[str], again: str) -> int:
    """The exit code of main(argv), what it raised put into words on stderr."""
    try:
        code = main(argv) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # stdout closed early, as by `| head`
        _drop_output()
        return 141
    except (KeyboardInterrupt, Stopped) as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        _say(f"interrupted ({signal.Signals(number).name}): {again}")
        return 128 + number
    except Exception as error:
        if any(a == "--debug" or (a.startswith("--debug=") and a != "--debug=False") for a in argv):
            raise
        ours = explained(error)
        _say(f"error: {ours}")
        return ours.exit_code


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
        return HostError(
            error.strerror or text or type(error).__name__,
            where=" -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
            or place_of(error.__traceback__),
            hint="check the path, its permissions and the room on its disk (ls -ld, df -h), then run it again",
        )
    return UnforeseenError(
        f"not foreseen: {type(error).__name__}: {text}",
        where=place_of(error.__traceback__),
        hint=f"{_kept_traceback(error)}; the same command with --debug shows it too",
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out: torch has one class for GPUs, a plain RuntimeError for all else."""
    said = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)
    return said or isinstance(error, MemoryError)


def place_of(trace: TracebackType | None) -> str:
    """file:line of the innermost frame of ours, as in nanogpt_fast/sample.py:70."""
    frames = [f for f in traceback.extract_tb(trace) if f.filename.startswith(HOME) and f.filename != __file__]
    return f"nanogpt_fast{frames[-1].filename[len(HOME) :]}:{frames[-1].lineno}" if frames else ""


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
def _unwinding() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Stopped, once; a second one ends the process. SIGUSR1, Slurm's warning, does no harm."""
    owner, before = os.getpid(), {}

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() == owner:
            raise Stopped(number)
        os.kill(os.getpid(), number)  # a forked worker, which is told to end

    handlers = {"SIGTERM": on_signal, "SIGHUP": on_signal, "SIGUSR1": lambda *_: None}
    with suppress(ValueError):  # not the main thread
        for name, handler in handlers.items():
            number = getattr(signal, name, None)  # Windows has SIGTERM alone
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup's SIG_IGN stays
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _give_descriptors() -> None:
    """Open the null device on those of 0, 1, 2 that are closed: the next file opened would get what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        with suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # nobody listens
        print(text, file=sys.stderr, flush=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _drop_output()


def _drop_output() -> None:
    """What is still buffered can go nowhere; without this Python tries once more when it ends, and complains."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
