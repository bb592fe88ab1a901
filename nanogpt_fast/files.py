"""Durable writes and hashes, what every room that puts files on a disk needs; and the file that names the CPU."""

import errno
import hashlib
import json
import os
import platform
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

SMALL = 64 << 20  # bytes: more than any description of a model, a dataset or a run


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: str | Path) -> BinaryIO:
    """The file, opened to be read. OSError as open() gives, and for what could hang or never end: a pipe, a device."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return open(fd, "rb")
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_small(path: str | Path, limit: int = SMALL) -> bytes:
    """The bytes of a small file that somebody may have made up: a regular file of at most `limit` bytes.

    Raises OSError, for a pipe or a device too (which could hang, or never end) and for a larger file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size:,} bytes, where at most {limit:,} are read", str(path))
        return file.read(limit)


def load_json(path: str | Path, limit: int = SMALL) -> Any:
    """The JSON value in a small file. Raises OSError as read_small, ValueError for what is no JSON (NaN and Infinity
    are none) or is nested too deeply."""
    return parse_json(read_small(path, limit))


def parse_json(data: bytes | str) -> Any:
    """The JSON value; ValueError for what is none, NaN and Infinity included, or is nested too deeply."""
    try:
        return json.loads(data, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def write_atomic(path: Path, data: bytes) -> None:
    """Write path so that it holds the old bytes or the new ones at any instant."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # a signal, a full disk: nothing stays that nobody reads
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode())


def user_cache(name: str) -> Path:
    """The user's folder for what of this name is found out once a machine. RuntimeError where there is no home."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "nanogpt_fast" / name


def sync(path: Path) -> None:
    """fsync a file, or a directory's entries."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a directory
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems
            raise
    finally:
        os.close(fd)


def cpuinfo(key: str) -> str:
    """What /proc/cpuinfo says of its first CPU, as in cpuinfo("flags"); "" where there is no such file or line."""
    try:
        found = re.search(rf"^{key}\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else ""


def cpu_name() -> str:
    """The CPU's model as /proc/cpuinfo has it, else what Python knows."""
    return cpuinfo("model name") or platform.processor() or platform.machine()
