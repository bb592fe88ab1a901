"""Durable writes and hashes, what every room that puts files on a disk needs; and the file that names the CPU."""

import errno
import hashlib
import json
import os
import platform
import re
from pathlib import Path
from typing import Any


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write path so that it holds the old bytes or the new ones at any instant."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
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
