"""Where an export goes: written beside, published by renames, and never over what is not an export's.

The workshop beside DST is called `.tmp-NAME-PID@HOST-RANDOM` (rundir.aside) and holds `new`, and for an instant `old`.
The next convert to the same DST puts back, then removes, what a process that is gone has left there.
"""

import os
import re
import shutil
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from safetensors import SafetensorError

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.files import read_small, sync
from nanogpt_fast.run.rundir import RunLock, _alive, aside

KEPT = (".git", ".gitattributes")  # of a folder that is replaced: an export may live in a repository
CARD = "README.md"  # every Hugging Face folder of ours has one, with this line in it
CARD_MARK = "Trained or converted with nanogpt_fast"
EXPORTED = (
    "config.json", "generation_config.json", "model.safetensors", CARD, "meta.json",
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
SHOW_AFTER_S, TELL_EVERY_S = 2.0, 10.0  # a bar on a terminal; lines elsewhere


def foreign_in(folder: Path) -> str:
    """What in a folder no Hugging Face export of ours put there: a name with what is wrong, or ""."""
    names = sorted(path.name for path in folder.iterdir() if path.name not in KEPT)
    for name in names:
        if name not in EXPORTED:
            return name
        if not stat.S_ISREG((folder / name).lstat().st_mode):
            return f"{name}, which is no regular file"
    if not names:
        return ""
    card = read_small(folder / CARD) if CARD in names else b""
    return "" if CARD_MARK.encode() in card else f"{names[0]}, and no {CARD} as convert writes it"


def lock_of(out_dir: Path) -> RunLock | nullcontext[None]:
    """The lock of a run, where out_dir is one's: what it resumes from must not change under it."""
    return RunLock(out_dir) if (out_dir / ".run.lock").exists() else nullcontext()


@contextmanager
def written_beside(dst: Path, force: bool = False, expected_bytes: int = 0) -> Iterator[Path]:
    """A path beside dst to write the file or folder to; when the block succeeds it is fsynced and renamed to dst.

    Raises CheckpointError when dst exists and force is not set. What dst held is gone only after the new is in place;
    its .git and .gitattributes stay. A folder is replaced by two renames: killed between them, both are whole in the
    workshop, and the next call puts the old one back. expected_bytes: shown against what is there, once it takes long.
    """
    try:
        empty = dst.is_dir() and not any(dst.iterdir())
        if os.path.lexists(dst) and not (force or empty):
            raise CheckpointError(
                "the destination exists", where=str(dst), hint="choose another name, or add --force to replace it"
            )
        dst = Path(os.path.realpath(dst))  # a link stays one, and what it leads to is replaced
        dst.parent.mkdir(parents=True, exist_ok=True)
        sweep(dst)
        workshop = aside(dst, "tmp")
        workshop.mkdir()
    except OSError as error:
        raise CheckpointError("cannot write there", where=str(dst), found=error.strerror or str(error)) from error
    new, old = workshop / "new", workshop / "old"
    try:
        with _shown(new, expected_bytes):
            yield new
            for path in [*new.rglob("*"), new]:
                _sync(path)
        if dst.is_dir():  # a rename replaces a file, but no folder that holds something
            dst.rename(old)
        new.replace(dst)
        _bring_back(workshop, dst)
        sync(dst.parent)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # the last two: torch's, safetensors' words for "disk full"
        raise CheckpointError("could not be written", where=str(dst), found=str(error).split("\n")[0]) from error
    finally:
        _bring_back(workshop, dst)
        shutil.rmtree(workshop, ignore_errors=True)


def _sync(path: Path) -> None:
    """fsync, where Ctrl-C is heard: the system call hears none, and takes long where memory holds most of a file."""
    failed: list[OSError] = []

    def work() -> None:
        try:
            sync(path)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        with suppress(OSError):
            os.truncate(path, 0)  # what is not on the disk yet need not go there: the thread ends soon
        raise
    if failed:
        raise failed[0]


def sweep(dst: Path) -> None:
    """Clear away the workshops of this dst whose processes are gone; what they had moved out of dst returns."""
    workshop = re.compile(rf"\.tmp-{re.escape(dst.name)}-(\d+)@{re.escape(socket.gethostname())}-[0-9a-f]{{8}}")
    for path in sorted(dst.parent.iterdir()):
        found = workshop.fullmatch(path.name)
        if found and (int(found[1]) == os.getpid() or not _alive(int(found[1]))):  # this one is writing nothing yet
            _bring_back(path, dst)
            shutil.rmtree(path, ignore_errors=True)


def _bring_back(workshop: Path, dst: Path) -> None:
    """From the workshop's `old`: dst itself where that is missing, else what stays in a replaced folder."""
    old = workshop / "old"
    if old.is_dir() and not os.path.lexists(dst):
        old.rename(dst)
    for name in KEPT if old.is_dir() and dst.is_dir() else ():
        if os.path.lexists(old / name) and not os.path.lexists(dst / name):
            (old / name).rename(dst / name)


@contextmanager
def _shown(path: Path, total: int) -> Iterator[None]:
    """On stderr, how many of `total` bytes lie under path, while the block takes long."""
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(path, total, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show(path: Path, total: int, done: threading.Event) -> None:
    if done.wait(SHOW_AFTER_S):
        return
    from rich.console import Console  # only here: who reads weights writes none, and rich is 18 ms
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console, told = Console(stderr=True), -TELL_EVERY_S
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total or None)
        while True:
            there = _bytes_under(path)
            bar.update(task, completed=there)
            if not console.is_terminal and time.monotonic() - told >= TELL_EVERY_S:
                told = time.monotonic()
                print(f"written {there / 1e9:,.2f} of {total / 1e9:,.2f} GB", file=console.file, flush=True)
            if done.wait(0.25):
                return


def _bytes_under(path: Path) -> int:
    try:
        return sum(p.stat().st_size for p in (path.iterdir() if path.is_dir() else [path]))
    except OSError:  # not there yet
        return 0
