"""command.py: what every command ends in: exit codes, words, descriptors, signals; mostly a process a case."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import ENV

from nanogpt_fast import command
from nanogpt_fast.command import explained, out_of_memory, place_of
from nanogpt_fast.errors import DeviceError, HostError, UnforeseenError, printable

posix = pytest.mark.skipif(os.name == "nt", reason="descriptors and signals of POSIX")


def script(body: str, again: str = "") -> list[str]:
    """A command whose main(argv) is `body`."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    told = f", again={again!r}" if again else ""
    return [
        sys.executable,
        "-c",
        "import os, signal, sys, time\nfrom nanogpt_fast.command import run_command\n"
        f"from nanogpt_fast.errors import *\ndef main(argv):\n{lines}\nrun_command(main{told})",
    ]


def ended(body: str, *argv: str, **env: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    done = subprocess.run([*script(body), *argv], env={**ENV, **env}, capture_output=True, timeout=60, encoding="utf-8")
    return done.returncode, done.stdout, done.stderr


def in_shell(body: str, redirect: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """The same with a shell's redirections behind it."""
    words = ["bash", "-c", f'"$@" {redirect}', "bash", *script(body)]
    done = subprocess.run(words, env={**ENV, **(env or {})}, capture_output=True, timeout=60)
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


# ---- exit codes and words ----


def test_the_return_value_is_the_exit_code():
    assert ended("return None")[0] == 0 and ended("return 5")[0] == 5
    assert ended("sys.exit(2)")[0] == 2 and ended("sys.exit()")[0] == 0


def test_an_error_of_ours_is_printed_without_a_traceback():
    code, out, told = ended("print('begun'); raise DataError('wrong \\x1b[2J', where='a')")
    assert (code, out) == (3, "begun\n")
    assert told == "error: wrong \\x1b[2J\n  where:    a\n"


@pytest.mark.parametrize(
    "argv, shown",
    [(["--debug"], True), (["--debug=True"], True), (["--debug", "1"], True), (["--debug=False"], False),
     (["--debug", "false"], False), (["--debug", "--no-debug"], False), ([], False)],
)  # fmt: skip
def test_debug_shows_the_traceback_and_keeps_the_code(argv: list[str], shown: bool):
    code, _, told = ended("raise DataError('wrong')", *argv)
    assert code == 3 and ("Traceback" in told) == shown and "wrong" in told


def test_what_nobody_foresaw_ends_in_70_and_a_kept_traceback(tmp_path: Path):
    code, _, told = ended("return {}['x\\ud800']", TMPDIR=str(tmp_path))
    (kept,) = tmp_path.glob("nanogpt_fast-*.traceback")
    assert code == 70 and "Traceback" not in told and str(kept) in told and "KeyError" in told
    assert "Traceback" in kept.read_text() and kept.stat().st_mode & 0o077 == 0


def test_no_temporary_folder_is_no_second_error(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(command.tempfile, "NamedTemporaryFile", refuse)
    assert explained(KeyError("x")).hint.startswith("please report it; ")


def test_a_system_error_names_the_files(tmp_path: Path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(OSError) as caught:
        os.replace(tmp_path / "a", tmp_path / "none/b")
    ours = explained(caught.value)
    assert isinstance(ours, HostError) and ours.exit_code == 7
    assert ours.where == f"{tmp_path / 'a'} -> {tmp_path / 'none/b'}" and ours.what == "No such file or directory"


@pytest.mark.parametrize(
    "error, hint",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "df -h"),
        (OSError(errno.EMFILE, "Too many open files", "x"), "ulimit -n"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "255 bytes"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "network"),
        (TimeoutError("timed out"), "network"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "ls -ld"),
    ],
)
def test_the_hint_of_a_system_error_is_about_what_it_says(error: OSError, hint: str):
    assert hint in explained(error).hint


# ---- memory: real errors of the libraries, no made-up ones ----

HUGE = 10**14  # bytes and more: no machine has them, and none overcommits them


@pytest.mark.parametrize(
    "provoke",
    [
        lambda: torch.empty(HUGE),
        lambda: torch.empty(2**62),
        lambda: torch.empty(2**40, 2**40),
        lambda: torch.ones(1).expand(HUGE).contiguous(),
        lambda: torch.UntypedStorage(HUGE),
        lambda: torch.randint(5, (HUGE,)),
        lambda: np.zeros(HUGE),
        lambda: np.zeros((2**40, 2**40)),
        lambda: bytes(HUGE),
        lambda: [0] * 2**62,
        lambda: torch.from_numpy(np.ones(1)).repeat(HUGE),
    ],
    ids=["empty", "overflow", "product", "contiguous", "storage", "randint", "numpy", "numpy product", "bytes", "list",
         "repeat"],
)  # fmt: skip
def test_memory_that_runs_out_is_exit_5_with_a_hint(provoke: Callable[[], Any]):
    with pytest.raises(Exception) as caught:
        provoke()
    assert out_of_memory(caught.value)
    ours = explained(caught.value)
    assert isinstance(ours, DeviceError) and ours.exit_code == 5 and "--batch_size" in ours.hint and ours.found


@posix
def test_memory_that_the_system_refuses_is_memory_too():
    import mmap

    with pytest.raises(OSError) as caught:
        mmap.mmap(-1, HUGE)
    assert isinstance(explained(caught.value), DeviceError)


def test_other_runtime_errors_are_no_lack_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.mv(torch.ones(2, 2), torch.ones(3))
    assert not out_of_memory(caught.value) and isinstance(explained(caught.value), UnforeseenError)


def test_the_place_is_the_innermost_line_of_ours(tmp_path: Path):
    from nanogpt_fast.files import load_json

    (tmp_path / "x").write_text("{")
    try:
        load_json(tmp_path / "x")
    except ValueError as error:
        assert place_of(error.__traceback__).startswith("nanogpt_fast/files.py:")
    assert place_of(None) == ""


# ---- descriptors ----


@posix
@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_are_never_a_file_of_ours(tmp_path: Path, redirect: str):
    """Nor of a child, which inherits them."""
    body = (
        f"with open({str(tmp_path / 'file')!r}, 'w') as file:\n"
        "    import subprocess\n"
        "    assert file.fileno() > 2\n"
        '    child = \'import os; [os.fstat(n) for n in range(3)]; os.write(1, b"x"); os.write(2, b"x")\'\n'
        "    done = subprocess.run([sys.executable, '-c', child])\n"
        "    print('out'); print('err', file=sys.stderr); os.write(1, b'raw'); os.write(2, b'raw')\n"
        "assert sys.stdin.read(0) == ''\nreturn 40 + done.returncode"
    )
    code, _, _ = in_shell(body, redirect + (" </dev/null" if redirect.startswith((">", "2")) else ""))
    assert code == 40 and (tmp_path / "file").read_text() == ""


@posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("body", ["print('x' * 100_000)", "print('x')", "print('x'); sys.exit(0)"])
def test_a_full_disk_behind_stdout_is_said(body: str):
    code, _, told = in_shell(body, ">/dev/full")
    assert code == 7 and told.startswith("error: No space left on device") and "Exception ignored" not in told
    assert in_shell(body, ">/dev/full 2>/dev/full")[0] == 7
    assert in_shell("print('out'); print('x', file=sys.stderr); return 3", "2>/dev/full")[:2] in ((7, "out\n"), (3, ""))


@posix
def test_a_reader_that_leaves_is_no_error():
    code, out, told = in_shell("for i in range(100_000): print(i)", "| head -n 1; exit ${PIPESTATUS[0]}")
    assert (code, out, told) == (141, "0\n", "")


@posix
def test_another_pipe_that_breaks_is_not_silent():
    code, _, told = ended("r, w = os.pipe()\nos.close(r)\nos.write(w, b'x')")
    assert code == 7 and "Broken pipe" in told


@posix
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8", "utf-16"])
def test_a_console_is_given_what_it_can_show(encoding: str):
    body = "print('\\u00fc \\u2028 \\ud800 \\U0001f600')\nraise DataError('\\u00fc \\U0001f600 \\udc80')"
    code, out, told = in_shell(body, "", {"PYTHONIOENCODING": encoding})
    assert code == 3 and "Traceback" not in told and "UnicodeEncodeError" not in told
    if encoding == "cp1252":
        assert out == "\xfc \\u2028 \\ud800 \\U0001f600\n"


# ---- signals ----


def interrupted(body: str, *signals: int, before: Callable[[], Any] | None = None) -> tuple[int, str, str]:
    """The same for a process that is sent signals, half a second apart, once it has said something."""
    with subprocess.Popen(
        script(body, "run it again"), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=before,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        first = process.stdout.readline()
        for number in signals:
            process.send_signal(number)
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
        out, told = process.communicate(timeout=30)
        return process.returncode, first + out, told


WAIT = "try:\n    print('begun', flush=True); time.sleep(20)\nfinally:\n    print('cleared', flush=True)"


@posix
@pytest.mark.usefixtures("signals_heeded")
@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_signals_unwind_and_say_how_to_go_on(name: str, code: int):
    found = interrupted(WAIT, getattr(signal, name))
    assert found == (code, "begun\ncleared\n", f"interrupted ({name}): run it again\n")


@posix
@pytest.mark.usefixtures("signals_heeded")
def test_a_second_signal_ends_a_clean_up_that_hangs():
    for number in (signal.SIGINT, signal.SIGTERM):
        body = "try:\n    print('begun', flush=True); time.sleep(20)\nfinally:\n    time.sleep(20)"
        code, _, told = interrupted(body, number, number)
        assert code == -number and "Traceback" not in told


@posix
def test_the_warning_of_a_scheduler_does_no_harm():
    body = "print('begun', flush=True); time.sleep(0.2); print('done')"
    assert interrupted(body, signal.SIGUSR1) == (0, "begun\ndone\n", "")


@posix
def test_a_signal_that_nohup_ignores_stays_ignored():
    body = "print('begun', flush=True); time.sleep(0.2); print('done')"
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert interrupted(body, signal.SIGHUP, before=ignore) == (0, "begun\ndone\n", "")


@posix
def test_a_forked_worker_that_is_told_to_end_only_ends():
    """It would unwind the parent's stack: remove its files, print its words."""
    body = (
        "pid = os.fork()\n"
        "if not pid:\n"
        "    try:\n        time.sleep(20)\n    finally:\n        print('the parent is cleared away')\n"
        "time.sleep(0.2); os.kill(pid, signal.SIGTERM)\n"
        "print('worker ended by', os.WTERMSIG(os.waitpid(pid, 0)[1]))"
    )
    assert ended(body) == (0, "worker ended by 15\n", "")


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with command._unwinding():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@posix
@pytest.mark.usefixtures("signals_heeded")
def test_what_a_library_makes_of_an_interruption_is_one():
    """torch.tensor() turns a Ctrl-C within it into a ValueError: it was exit 70."""
    body = "try:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(20)\n"
    body += "except KeyboardInterrupt:\n    raise ValueError('not ours') from None"
    assert ended(body)[::2] == (130, "interrupted (SIGINT): nothing was left half done\n")


EACH_LINE = """
import os, signal, sys
from nanogpt_fast import command

def trace(frame, event, arg):
    global lines
    if event == "call":
        return trace if frame.f_code.co_filename == command.__file__ else None
    lines += signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL or ended
    if event == "line" and lines == line:
        os.kill(os.getpid(), signal.NAME)

def main(argv):
    global ended
    ended = True

for line in range(1, 100):
    lines, ended = 0, False
    if not (pid := os.fork()):
        sys.settrace(trace)
        command.run_command(main, again="run it again")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 128 + signal.NAME, -signal.NAME), (line, code)
    print(code)
"""


@posix
@pytest.mark.usefixtures("signals_heeded")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_at_any_line_around_main_ends_quietly(name: str):
    """From the handlers on until the process is gone: before main() it was a traceback and exit 1."""
    body = EACH_LINE.replace("NAME", name)
    done = subprocess.run([sys.executable, "-c", body], env=ENV, capture_output=True, timeout=60, text=True)
    assert done.returncode == 0 and set(done.stderr.splitlines()) == {f"interrupted ({name}): run it again"}
    assert set(map(int, done.stdout.split())) == {0, 128 + getattr(signal, name), -getattr(signal, name)}


def test_what_could_drive_a_terminal_is_escaped():
    """C0 and C1 controls, separators, overrides of the direction of writing, lone surrogates; text stays as it is."""
    others = (0x2028, 0x202A, 0x202E, 0x2066, 0x2069, 0xD800, 0xDFFF)
    for code in (*range(9), *range(11, 32), *range(0x7F, 0xA0), *others):
        assert printable(f"a{chr(code)}b") == f"a{ascii(chr(code))[1:-1]}b" != f"a{chr(code)}b", hex(code)
    assert printable("tab\tand\nline, \xa0é語🙂") == "tab\tand\nline, \xa0é語🙂"
