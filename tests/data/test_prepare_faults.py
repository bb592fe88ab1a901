"""Interrupted from outside: kill -9, Ctrl-C and a disk that is really full."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanogpt_fast.data import encode, preparation, token_writer
from nanogpt_fast.data.dataset import read_meta, verify
from nanogpt_fast.data.preparation import PrepareConfig, prepare

pytestmark = pytest.mark.usefixtures("signals_heeded")
posix = pytest.mark.skipif(os.name == "nt", reason="process groups are POSIX")

# The command itself, with small steps that take long enough to be hit.
DRIVER = """
import sys, time
from nanogpt_fast import prepare
from nanogpt_fast.data import encode, preparation, token_writer
from nanogpt_fast.command import run_command
encode.BATCH_CHARS, preparation.COMMIT_TOKENS = 2000, 5000
commit = token_writer.TokenWriter.commit
def slow_commit(self):
    commit(self)
    print(self._mark[0], flush=True)
    time.sleep(float(sys.argv.pop()))
token_writer.TokenWriter.commit = slow_commit
sys.argv += ["0.05"] * 1000
if __name__ == "__main__":
    run_command(lambda argv: prepare.main(argv[:5]), again="the same command goes on where it stopped")
"""
STOPPED = "interrupted (SIGINT): the same command goes on where it stopped"
ARGV = ["mine", "--source=corpus.jsonl", "--tokenizer=char", "--out=made/mine"]  # and --num_proc


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("driver.py").write_text(DRIVER)
    rows = ({"text": f"Document {i}. " + "Some words. " * (i % 17)} for i in range(3000))
    Path("corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
@pytest.mark.parametrize("commits", [1, 4])
def test_an_interrupted_run_looks_unfinished_and_resumes(corpus: Path, sign: int, code: int, commits: int) -> None:
    command = [sys.executable, "driver.py", *ARGV, "--num_proc=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), text=True) as run:
        assert run.stdout
        documents = [int(run.stdout.readline()) for _ in range(commits)][-1]
        time.sleep(0.02)
        run.send_signal(sign)
        assert run.wait(30) == code
    folder = Path("made/mine")
    assert read_meta(folder) is None and not list(folder.glob("*.bin"))
    journal = json.loads((folder / ".partial/journal.json").read_text())
    assert 0 < documents <= journal["documents"] < 3000
    resumed = prepare(PrepareConfig(name="mine", source="corpus.jsonl", tokenizer="char", out="made/mine"))
    straight = prepare(PrepareConfig(name="mine", source="corpus.jsonl", tokenizer="char", out="made/straight"))
    assert resumed.splits == straight.splits and not (folder / ".partial").exists()


@contextmanager
def two_workers(lines: int) -> Iterator[subprocess.Popen[str]]:
    """A run of them in a session of their own, which has said so many lines; by 20, a second, both have started."""
    command, pipe = [sys.executable, "driver.py", *ARGV, "--num_proc=2"], subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, env=environment(), text=True, start_new_session=True
    ) as run:
        assert run.stdout
        for _ in range(lines):
            run.stdout.readline()
        yield run


def stopped_by(run: subprocess.Popen[str], sign: signal.Signals) -> bool:
    """Whether it says so, and nothing else."""
    assert run.stderr
    told = run.stderr.read().splitlines()
    return run.wait(30) == 128 + sign and told == [STOPPED.replace("SIGINT", sign.name)]


@posix
@pytest.mark.parametrize(("sign", "lines"), [(signal.SIGINT, 20), (signal.SIGTERM, 1), (signal.SIGHUP, 1)])
def test_a_signal_with_several_processes_prints_one_line(corpus: Path, sign: signal.Signals, lines: int) -> None:
    """A terminal sends it to the whole group: the workers, starting or started, must leave it to the parent."""
    with two_workers(lines) as run:
        began = time.monotonic()
        os.killpg(run.pid, sign)
        assert stopped_by(run, sign)
        assert time.monotonic() - began < 5  # 0.3 to 0.8 s on 2 cores
    assert json.loads(Path("made/mine/.partial/journal.json").read_text())["documents"] > 0


@posix
def test_slurms_warning_harms_no_process_of_several(corpus: Path) -> None:
    """SIGUSR1 goes to all of them; a worker, or multiprocessing's tracker, that it killed would end the run."""
    with two_workers(20) as run:
        assert run.stdout
        os.killpg(run.pid, signal.SIGUSR1)
        assert all(run.stdout.readline() for _ in range(10))
        run.terminate()
        assert stopped_by(run, signal.SIGTERM)


@pytest.mark.parametrize("where", ["characters", "tokens", "hashing"])
def test_stopped_at_any_stage_it_goes_on_from_there(corpus: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    config = PrepareConfig(name="mine", source="corpus.jsonl", tokenizer="char", out="made/mine", num_proc=1)
    straight = prepare(replace(config, out="made/straight"))
    monkeypatch.setattr(encode, "BATCH_CHARS", 2000)
    real, calls = preparation.Meter.at, 0

    def at(self: preparation.Meter, *args: Any) -> None:
        nonlocal calls
        calls += self.name == where
        if self.name == where and calls == (1 if where == "hashing" else 20):
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(preparation.Meter, "at", at)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    folder = Path("made/mine")
    assert not folder.exists() if where == "characters" else not list(folder.glob("*.*n"))
    read: list[int] = []
    resume = token_writer.TokenWriter._resume
    monkeypatch.setattr(
        token_writer.TokenWriter, "_resume", lambda self: (resume(self), read.append(self.documents))[0]
    )
    assert prepare(config).splits == straight.splits
    assert {"characters": read == [0], "tokens": 0 < read[0] < 3000, "hashing": read == [3000]}[where]


def test_without_semaphores_this_process_encodes(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A container's read-only /dev/shm."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(encode, "ProcessPoolExecutor", refuse)
    config = PrepareConfig(name="mine", source="corpus.jsonl", tokenizer="char", num_proc=2)
    with caplog.at_level(logging.WARNING):
        assert prepare(config).splits["val"].tokens > 0
    assert "Read-only file system" in caplog.text and "encodes alone" in caplog.text


def test_a_full_disk_is_an_error_and_leaves_nothing(corpus: Path) -> None:
    """A real ENOSPC, on a small file system of its own in a user namespace."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("user namespaces (unshare -rm) are not permitted here")
    script = (
        "mkdir small && mount -t tmpfs -o size=256k tmpfs small || exit 77;"
        f"'{sys.executable}' -m nanogpt_fast.prepare mine --source=corpus.jsonl --tokenizer=char --out=small/mine;"
        "code=$?; ls -A small; exit $code"
    )
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, env=environment())
    if done.returncode == 77:
        pytest.skip("a tmpfs cannot be mounted here")
    assert done.returncode == 3 and done.stdout == "", done.stdout + done.stderr
    assert "the disk is full" in done.stderr and "--out" in done.stderr and "Traceback" not in done.stderr


def test_ranks_that_ensure_at_once_all_find_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "from nanogpt_fast.data.preparation import ensure; print(ensure('stdlib', 'made'))"
    command = [sys.executable, "-c", code]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) for _ in range(3)]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == [f"{Path('made/stdlib')}\n"] * 3
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    verify(Path("made/stdlib"))
