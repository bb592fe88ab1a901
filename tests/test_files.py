"""Durable writes: the old bytes or the new ones at any instant, on the disk before the name says so."""

import errno
import os
from pathlib import Path

import pytest

from nanogpt_fast.files import cpu_name, cpuinfo, sha256_of, sync, write_atomic


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, call, full)
        write_atomic(path, b"new and longer")
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append("fsync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append("replace") or replace(a, b))
    write_atomic(tmp_path / "file", b"x")
    assert events == ["fsync", "replace", "fsync"]  # the file, the name, the folder


def test_the_cpu_is_named_by_the_first_line_of_it(monkeypatch: pytest.MonkeyPatch):
    told = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz \nflags\t\t: fpu avx2\n\nmodel name\t: Another\nempty\t:"
    monkeypatch.setattr(Path, "read_text", lambda path: told)
    assert (cpu_name(), cpuinfo("flags"), cpuinfo("empty")) == ("Some CPU @ 2 GHz", "fpu avx2", "")

    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert (cpu_name(), cpuinfo("flags")) == ("arm64", "")


def test_sha256_is_the_files(tmp_path: Path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_directory_that_cannot_be_fsynced_is_tolerated_a_file_is_not(tmp_path, monkeypatch):
    def unsupported(_fd):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unsupported)
    sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "file")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_small_write_that_is_cut_off_leaves_nothing_beside(tmp_path: Path, monkeypatch, error: BaseException):
    """A SIGTERM within prepare's last write left meta.json.tmp."""

    def fail(fd: int) -> None:
        raise error

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        write_atomic(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"
