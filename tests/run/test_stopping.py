"""StopSignals: a first signal is noted and said, a second Ctrl-C leaves at once with 130."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt_fast.run.stopping import StopSignals

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_is_noted_and_the_work_goes_on(number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]):
    with StopSignals() as stop:
        assert stop.received is None and stop.exit_code == 0
        os.kill(os.getpid(), number)
        assert stop.received == number and stop.exit_code == code
    assert f"{number.name}: " in capfd.readouterr().err


def test_handlers_are_given_back():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), StopSignals():
        assert signal.getsignal(signal.SIGINT) not in before
        raise ZeroDivisionError
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_ctrl_c_after_sigterm_is_a_first_one(capfd: pytest.CaptureFixture[str]):
    """A scheduler's SIGTERM, then an impatient key: still saved; only Ctrl-C twice gives up."""
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT and stop.exit_code == 130


def send(*signals: signal.Signals, stderr: int = subprocess.PIPE) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a process that sends itself these, prints, and exits with stop.exit_code."""
    code = (
        "import os, sys\nfrom nanogpt_fast.run.stopping import StopSignals\n"
        "with StopSignals() as stop:\n"
        f"    for number in {[int(s) for s in signals]}: os.kill(os.getpid(), number)\n"
        "    print('saved', flush=True)\n"
        "sys.exit(stop.exit_code)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)
    return run.returncode, run.stdout, run.stderr


def test_a_second_ctrl_c_leaves_at_once():
    code, out, errors = send(signal.SIGINT, signal.SIGINT)
    assert code == 130 and out == "" and "stopped at once" in errors and "Traceback" not in errors


def test_two_sigterms_still_save():
    """Schedulers repeat SIGTERM before SIGKILL."""
    code, out, _ = send(signal.SIGTERM, signal.SIGTERM)
    assert code == 143 and out == "saved\n"


def test_a_closed_stderr_does_not_lose_the_state():
    """`2>&1 | tee`: Ctrl-C ends tee too, so the handler writes into a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    code, out, _ = send(signal.SIGINT, stderr=writer)
    os.close(writer)
    assert code == 130 and out == "saved\n"
