"""Disks that fill up, go read-only or hit a quota: the save fails cleanly, older checkpoints and the run live on."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import assert_whole, save_steps, tiny_checkpoint

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.run import checkpoint
from nanogpt_fast.run.checkpoint import Checkpoint, SaveFailed, list_steps, newest, save
from nanogpt_fast.run.rundir import RunLock, probe_writable

MIB = 2**20


def names(out_dir: Path) -> list[str]:
    return sorted(path.name for path in (out_dir / "checkpoints").iterdir())


def in_own_mount(folder: Path, options: str, test: str) -> None:
    """Run this file's function `test`(folder) in a process that sees a tmpfs at `folder`: a real full disk."""
    script = f"import test_checkpoint_disk as t; from pathlib import Path; t.{test}(Path({str(folder)!r}))"
    mount = 'mount -t tmpfs -o "$0" tmpfs "$1" && shift && exec "$@"'
    probe = ["unshare", "-rm", "sh", "-c", mount, options, str(folder)]
    if not shutil.which("unshare") or subprocess.run([*probe, "true"], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs in a namespace of its own here (unshare -rm)")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([*probe, sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(folder.iterdir()) == [], "the mount was not seen outside"


def fill_a_real_disk(folder: Path) -> None:
    save_steps(folder, 10, 20)
    before = shutil.disk_usage(folder).free
    for _ in range(2):  # the second shows that the first gave its space back
        with pytest.raises(SaveFailed) as caught:
            save(folder, Checkpoint(30, {}, {"w": torch.zeros(MIB)}), keep_last=2)
        text = str(caught.value)
        assert "could not save the checkpoint of step 30; older ones are untouched" in text
        assert "No space left on device" in text
        assert "room for 4.2 MB" in text
        assert "free some space" in text
        assert names(folder) == ["step_00000010", "step_00000020"]
        assert shutil.disk_usage(folder).free == before
    assert_whole(newest(folder)[0])
    save(folder, tiny_checkpoint(30), keep_last=2)
    assert names(folder) == ["step_00000020", "step_00000030"], "a later save that fits succeeds"
    with pytest.raises(CheckpointError, match="no room for a single checkpoint"):
        probe_writable(folder, need_bytes=4 * MIB)


def go_read_only(folder: Path) -> None:
    save_steps(folder, 10)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    with pytest.raises(CheckpointError, match="Read-only file system") as caught:
        probe_writable(folder)
    assert caught.value.what == "the output directory cannot be written"
    with pytest.raises(CheckpointError, match="Read-only file system"):
        RunLock(folder).__enter__()
    with pytest.raises(SaveFailed, match="Read-only file system") as caught:
        save(folder, tiny_checkpoint(20), keep_last=2)
    assert "check the disk and its mount" in str(caught.value)
    assert_whole(newest(folder)[0])  # reading goes on


def test_a_real_full_disk(tmp_path):
    in_own_mount(tmp_path, "size=1m", "fill_a_real_disk")


def test_a_real_read_only_disk_is_found_at_the_start(tmp_path):
    in_own_mount(tmp_path, "size=1m", "go_read_only")


def failing(function, error: OSError, after: int):
    """`function`, raising from its call number `after` on."""
    calls = iter(range(10**6))

    def wrapper(*args, **kwargs):
        if next(calls) >= after:
            raise error
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("after", range(6), ids=["file", "file", "file", "manifest", "folder", "parent"])
def test_a_failing_fsync_anywhere(tmp_path, monkeypatch, code, after):
    """fsync is where a full disk, a quota or a dying disk shows on network filesystems."""
    save_steps(tmp_path, 10, 20)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync, OSError(code, os.strerror(code)), after))
        with pytest.raises(SaveFailed, match=os.strerror(code)) as caught:
            save(tmp_path, tiny_checkpoint(30), keep_last=2)
    assert caught.value.exit_code == 4
    assert ("free some space" in str(caught.value)) == (code != errno.EIO)
    published = ["step_00000030"] if after == 5 else []  # its name stands, only not yet durably
    assert names(tmp_path) == ["step_00000010", "step_00000020", *published]
    assert_whole(newest(tmp_path)[0])
    save(tmp_path, tiny_checkpoint(30), keep_last=2)
    assert list(list_steps(tmp_path)) == [20, 30]


def test_failing_to_replace_a_step_keeps_the_old_one(tmp_path, monkeypatch):
    save_steps(tmp_path, 10)
    rename = os.rename

    def no_new_names(source, target):
        if Path(source).name.startswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", no_new_names)
        with pytest.raises(SaveFailed, match="Input/output error"):
            save(tmp_path, tiny_checkpoint(10, val_loss=1.0), keep_last=2)
    assert names(tmp_path) == ["step_00000010"]
    assert newest(tmp_path)[0].state.get("val_loss") is None


def test_failing_to_prune_is_a_warning_and_no_failed_save(tmp_path, monkeypatch, caplog):
    save_steps(tmp_path, 10, 20)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_prune", failing(print, OSError(errno.EACCES, "Permission denied"), 0))
        assert save(tmp_path, tiny_checkpoint(30), keep_last=2).name == "step_00000030"
    assert "older checkpoints could not be removed: Permission denied" in caplog.text
    assert names(tmp_path) == ["step_00000010", "step_00000020", "step_00000030"]
    save(tmp_path, tiny_checkpoint(40), keep_last=2)
    assert names(tmp_path) == ["step_00000030", "step_00000040"]


@pytest.mark.parametrize("exception", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch, exception):
    save_steps(tmp_path, 10)
    monkeypatch.setattr(checkpoint, "publish", failing(print, exception(), 0))
    with pytest.raises(exception):
        save(tmp_path, tiny_checkpoint(20), keep_last=2)
    assert names(tmp_path) == ["step_00000010"]


def test_the_output_directory_removed_under_the_run(tmp_path):
    out_dir = tmp_path / "out"
    save_steps(out_dir, 10)
    shutil.rmtree(out_dir)
    out_dir.write_text("now a file")
    with pytest.raises(SaveFailed, match="Not a directory"):
        save(out_dir, tiny_checkpoint(20), keep_last=2)
