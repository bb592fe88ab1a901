"""The output directory: one writer, a probe at the start, and leftovers cleaned only when nobody owns them."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.run.rundir import RunLock, aside, clean_stale, probe_writable, publish

HOST = socket.gethostname()
HOLD = "import sys; from pathlib import Path; from nanogpt_fast.run.rundir import RunLock\n\
with RunLock(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    paths = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leftover(folder: Path, kind: str, pid: int, host: str = HOST, step: int = 10) -> Path:
    path = folder / f".{kind}-step_{step:08d}-{pid}@{host}-0123abcd"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text("half")
    return path


def test_the_second_writer_is_told_who_the_first_is(tmp_path, holder):
    with pytest.raises(CheckpointError) as caught, RunLock(tmp_path):
        pytest.fail("two writers at once")
    text = str(caught.value)
    assert "another run is writing" in text
    assert f"process {holder.pid} on {HOST}" in text
    assert "gone" not in text
    assert caught.value.exit_code == 4


def test_the_lock_is_one_and_the_same_through_a_symlink(tmp_path, holder):
    (tmp_path.parent / f"{tmp_path.name}-link").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="another run"):
        RunLock(tmp_path.parent / f"{tmp_path.name}-link").__enter__()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert json.loads((tmp_path / ".run.lock.owner").read_text())["pid"] == holder.pid, "it left its name behind"
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".run.lock.owner").read_text())["pid"] == os.getpid()


def test_the_lock_is_free_again_after_use_and_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), RunLock(tmp_path):
            raise KeyError
    assert not (tmp_path / ".run.lock.owner").exists()


def test_a_losing_contender_does_not_disturb_the_holder(tmp_path):
    with RunLock(tmp_path):
        for _ in range(2):
            with pytest.raises(CheckpointError, match=f"process {os.getpid()} on {HOST}"):
                RunLock(tmp_path).__enter__()


def test_an_unnamed_holder(tmp_path, holder):
    (tmp_path / ".run.lock.owner").write_text("{")
    with pytest.raises(CheckpointError, match="has not written its name yet"):
        RunLock(tmp_path).__enter__()


def test_a_child_that_outlives_its_run_is_suspected(tmp_path, holder):
    (tmp_path / ".run.lock.owner").write_text(json.dumps({"pid": dead_pid(), "host": HOST}))
    with pytest.raises(CheckpointError, match="which is gone: a child of it is still alive"):
        RunLock(tmp_path).__enter__()


def test_a_filesystem_without_locks_warns_and_goes_on(tmp_path, monkeypatch, caplog):
    def no_locks(*_args, **_kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    with RunLock(tmp_path):
        pass
    assert "has no locks" in caplog.text


def test_probe_creates_the_folder_and_leaves_nothing(tmp_path):
    probe_writable(tmp_path / "a" / "out")
    assert list((tmp_path / "a" / "out").iterdir()) == [tmp_path / "a" / "out" / "checkpoints"]
    assert list((tmp_path / "a" / "out" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("blocker", ["out", "out/checkpoints", "."])
def test_a_file_in_the_way_is_found_at_the_start(tmp_path, blocker):
    file = tmp_path / "runs" / blocker
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("not a directory")
    with pytest.raises(CheckpointError, match="a file is in the way") as caught:
        probe_writable(tmp_path / "runs" / "out")
    assert caught.value.where == str(file)
    if blocker != "out/checkpoints":
        with pytest.raises(CheckpointError, match="a file is in the way"):
            RunLock(tmp_path / "runs" / "out").__enter__()


def test_a_directory_that_cannot_be_written_is_found_at_the_start(tmp_path, monkeypatch):
    def read_only(*_args, **_kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", read_only)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        probe_writable(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_disk_without_room_for_one_checkpoint_is_found_at_the_start(tmp_path):
    with pytest.raises(CheckpointError, match="no room for a single checkpoint"):
        probe_writable(tmp_path, need_bytes=10**18)


def test_little_room_for_the_checkpoints_to_come_is_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_600))
    probe_writable(tmp_path, 1_000, 4)
    assert "up to 4 more checkpoints" in caplog.text
    caplog.clear()
    for step in (1, 2):
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir()
    probe_writable(tmp_path, 1_000, 4)
    assert not caplog.text, "two are there: two more fit"


def test_leftovers_of_dead_processes_go(tmp_path):
    for kind in ("tmp", "trash"):
        leftover(tmp_path, kind, dead_pid())
    lines = clean_stale(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert [line.split("-")[0] for line in lines] == ["removed .tmp", "removed .trash"]


def test_leftovers_under_our_own_pid_are_an_earlier_process_of_that_number(tmp_path):
    """In a container the trainer has the same pid at each start."""
    leftover(tmp_path, "tmp", os.getpid())
    clean_stale(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_living_process_or_another_host_writes_stays(tmp_path):
    kept = {leftover(tmp_path, "tmp", os.getppid()), leftover(tmp_path, "tmp", dead_pid(), host="other-host.local")}
    lines = clean_stale(tmp_path)
    assert set(tmp_path.iterdir()) == kept
    assert any("is alive" in line for line in lines)
    assert any("written on other-host.local" in line for line in lines)


@pytest.mark.parametrize(
    "name", [".tmp", ".tmp-1", "tmp-step_00000010-1@h-0123abcd", ".tmp-step_00000010-1@h-xyz", ".git", "step_00000010"]
)
def test_only_our_own_pattern_is_touched(tmp_path, name):
    (tmp_path / name.replace("@h", f"@{HOST}")).mkdir()
    assert clean_stale(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupted_replacement_is_undone(tmp_path):
    leftover(tmp_path, "replaced", dead_pid(), step=10)
    leftover(tmp_path, "replaced", dead_pid(), step=20)
    (tmp_path / "step_00000020").mkdir()
    lines = clean_stale(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000010", "step_00000020"]
    assert (tmp_path / "step_00000010" / "model.safetensors").exists()
    assert not (tmp_path / "step_00000020" / "model.safetensors").exists()
    assert lines[0] == "restored step_00000010: its replacement was never finished"


def test_a_leftover_that_cannot_be_removed_is_reported_not_fatal(tmp_path, monkeypatch):
    leftover(tmp_path, "trash", dead_pid())

    def busy(*_args, **_kwargs):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr("shutil.rmtree", busy)
    (line,) = clean_stale(tmp_path)
    assert line.startswith("could not clean up .trash-step_00000010")
    assert line.endswith("Device or resource busy")


def test_a_link_left_aside_is_removed_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.mkdir()
    aside(tmp_path / "step_00000010", "trash").symlink_to(target)
    clean_stale(tmp_path)
    assert list(tmp_path.iterdir()) == [target]


def test_names_aside_are_unique_and_ours(tmp_path):
    names = {aside(tmp_path / "step_00000010", "tmp") for _ in range(50)}
    assert len(names) == 50
    for name in names:
        name.mkdir()
    assert len(clean_stale(tmp_path)) == 50


def test_publish_moves_what_was_there_aside(tmp_path):
    final, tmp = tmp_path / "step_00000010", tmp_path / "new"
    for path in (final, tmp):
        path.mkdir()
        (path / path.name).touch()
    publish(tmp, final)
    assert [p.name for p in final.iterdir()] == ["new"]
    assert [p.name.split("-")[0] for p in tmp_path.iterdir() if p != final] == [".replaced"]
