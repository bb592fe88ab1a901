"""A run's output directory: one writer at a time, proof at the start that it can be written, renames that
publish whole directories or nothing, and a broom for what a killed process left behind.

A directory being written or deleted is called `.KIND-step_00000250-PID@HOST-RANDOM`, so nobody takes it for
a checkpoint and the next start knows whose it was. KIND is `tmp` (being written), `trash` (being deleted) or
`replaced` (moved away for a newer one of the same step).
"""

import errno
import json
import logging
import os
import re
import secrets
import shutil
import socket
from pathlib import Path
from typing import Literal

import filelock

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.files import sync

log = logging.getLogger(__name__)
_ASIDE = re.compile(r"\.(tmp|trash|replaced)-(step_\d{8,})-(\d+)@(.+)-[0-9a-f]{8}")


class RunLock:
    """Context manager: this process alone writes `out_dir`. CheckpointError names the holder when there is one.

    The kernel drops a flock with its process, so a killed run leaves nothing to clear by hand. Only one rank
    of a run takes it. A forked child inherits it and keeps it as long as it lives.
    """

    def __init__(self, out_dir: Path):
        self.out_dir = out_dir
        self._lock = filelock.FileLock(str(out_dir / ".run.lock"))
        self._owner = out_dir / ".run.lock.owner"  # a file of its own: older filelocks truncate theirs on each try

    def __enter__(self) -> "RunLock":
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self._owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        except filelock.Timeout:
            raise CheckpointError(
                "another run is writing to this directory",
                where=str(self.out_dir),
                found=self._holder(),
                hint="wait for it, stop it, or give this run its own --out_dir",
            ) from None
        except (OSError, NotImplementedError) as error:  # the latter is how older filelocks report ENOSYS
            self._lock.release()
            if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                raise _unwritable(self.out_dir, error) from error
            log.warning("%s: this filesystem has no locks, two runs could mix here", self.out_dir)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock.is_locked:
            self._owner.unlink(missing_ok=True)
            self._lock.release()

    def _holder(self) -> str:
        try:
            owner = json.loads(self._owner.read_text())
            pid, host = int(owner["pid"]), str(owner["host"])
        except (OSError, ValueError, KeyError, TypeError):
            return "a process that has not written its name yet"
        if host == socket.gethostname() and not _alive(pid):
            return f"process {pid} on {host}, which is gone: a child of it is still alive and holds the lock"
        return f"process {pid} on {host}"


def probe_writable(out_dir: Path, need_bytes: int = 0, count: int = 1) -> None:
    """Create `out_dir/checkpoints` and write there now, instead of failing at the first save an hour from now.

    need_bytes: size of one checkpoint; less free space than that is an error too. count: so many will be there at a
    time, the one being written among them; less room for them than that is a warning. Raises CheckpointError.
    """
    folder = out_dir / "checkpoints"
    probe = aside(folder / "step_00000000", "tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
        (probe / "probe").write_bytes(b"x" * 4096)
        sync(probe / "probe")
        shutil.rmtree(probe)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        shutil.rmtree(probe, ignore_errors=True)
        raise _unwritable(folder, error) from error
    if free < need_bytes:
        raise CheckpointError(
            "the disk has no room for a single checkpoint",
            where=str(folder),
            expected=f"{need_bytes / 1e9:.1f} GB",
            found=f"{free / 1e9:.1f} GB free",
            hint="free some space or put --out_dir on another disk",
        )
    there = sum(1 for path in folder.iterdir() if path.name.startswith("step_"))
    if free < (missing := max(1, count - there) * need_bytes):
        log.warning(
            "%s: %.1f GB free, where up to %d more checkpoints take %.1f GB: later saves may fail; free some space, or "
            "lower --keep_last",
            folder, free / 1e9, max(1, count - there), missing / 1e9,
        )  # fmt: skip


def _unwritable(folder: Path, error: OSError) -> CheckpointError:
    blocker = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if blocker:
        return CheckpointError(
            "a file is in the way of the output directory",
            where=str(blocker),
            expected="a directory, or nothing",
            hint="move the file away or choose another --out_dir",
        )
    return CheckpointError(
        "the output directory cannot be written",
        where=str(folder),
        found=error.strerror or str(error),
        hint="check its permissions and mount, or choose another --out_dir",
    )


def aside(path: Path, kind: Literal["tmp", "trash", "replaced"], meeting: str | None = None) -> Path:
    """A fresh name beside `path`, which readers ignore and `clean_stale` knows; or that of several processes."""
    return path.with_name(f".{kind}-{path.name}-{meeting or meeting_point()}")


def meeting_point() -> str:
    """What makes a name aside this process's, and fresh; others may be told it."""
    return f"{os.getpid()}@{socket.gethostname()}-{secrets.token_hex(4)}"


def publish(tmp: Path, final: Path) -> None:
    """Give the finished directory `tmp` its name, durably. What stood at `final` is moved aside first; a crash
    between the two renames loses nothing, because `clean_stale` moves it back."""
    sync(tmp)
    if os.path.lexists(final):
        os.rename(final, aside(final, "replaced"))
    os.rename(tmp, final)
    sync(final.parent)


def replaced(folder: Path) -> dict[str, Path]:
    """{name: directory} of what stands aside for a newer one of its name that never came: a kill between publish's two
    renames. Whole all the same, so readers take it; clean_stale, which may write, gives it its name back."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _ASIDE.fullmatch(path.name)
        if match and match[1] == "replaced" and not os.path.lexists(folder / match[2]):
            found[match[2]] = path
    return found


def clean_stale(folder: Path) -> list[str]:
    """Remove or restore what dead processes of this host left in `folder`; the lines say what was done.

    Touches only names made by `aside`, whose process is gone or is this one (which is never in the middle of a
    save here). Leftovers of another host stay: whether their writer lives cannot be known. Hold the RunLock.
    """
    lines = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := _ASIDE.fullmatch(path.name):
            try:
                lines.append(_clean(path, *match.groups()))
            except OSError as error:
                lines.append(f"could not clean up {path.name}: {error.strerror or error}")
    return lines


def _clean(path: Path, kind: str, name: str, pid: str, host: str) -> str:
    if host != socket.gethostname():
        return f"left {path.name}: written on {host}, delete it if that run is over"
    if int(pid) != os.getpid() and _alive(int(pid)):
        return f"left {path.name}: process {pid} is alive"
    if kind == "replaced" and not os.path.lexists(path.with_name(name)):
        os.rename(path, path.with_name(name))
        return f"restored {name}: its replacement was never finished"
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)
    return f"removed {path.name}: left by process {pid}"


def _alive(pid: int) -> bool:
    if os.name == "nt":  # there os.kill(pid, 0) sends Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
