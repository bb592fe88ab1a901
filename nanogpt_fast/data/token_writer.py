"""Writes a dataset's token files so that they appear all at once, complete, or not at all.

Everything grows in FOLDER/.partial/. `commit` makes what is there durable and notes in journal.json how far it
goes, so an interrupted preparation resumes from that point; `publish` hashes, renames, and writes meta.json last.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np

from nanogpt_fast.data.dataset import FileEntry, Meta, Split, nanogpt_pickle
from nanogpt_fast.data.token_format import HEADER_BYTES, LLMC_LAYOUTS, LLMC_UINT16
from nanogpt_fast.errors import DataError
from nanogpt_fast.files import sha256_of, sync, write_atomic, write_json

Format = Literal["bin", "llmc"]
SPLITS = ("train", "val")
PARTIAL = ".partial"
TOKEN_BYTES = 2


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing under path into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DataError(
            "the disk is full" if full else "the token files cannot be written",
            where=str(error.filename or path),
            expected="about 2 bytes a token free" if full else "a folder that can be written",
            found=error.strerror or str(error),
            hint="free some space and run the command again, or write elsewhere: --out FOLDER",
        ) from error


@contextlib.contextmanager
def locked(folder: Path, wait: float) -> Iterator[None]:
    """One process at a time prepares a folder; the kernel frees the lock of a killed one."""
    lock = filelock.FileLock(str(folder / ".prepare.lock"))
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=wait)
        except filelock.Timeout:
            hint = "wait until it is done, or give another --out"
            raise DataError("another process is preparing this folder", where=str(folder), hint=hint) from None
        except (OSError, NotImplementedError) as error:  # a file system without locks: go on without
            if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                raise
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # leave no empty folder behind a failure
            if os.listdir(folder) == [".prepare.lock"]:
                os.unlink(folder / ".prepare.lock")
            folder.rmdir()


class _SplitFiles:
    """One split's files in .partial: headerless and single (bin), or shards of shard_tokens with a header (llmc)."""

    def __init__(self, folder: Path, stem: str, format: Format, shard_tokens: int):
        self.folder, self.stem, self.format = folder, stem, format
        self.shard_tokens = shard_tokens if format == "llmc" else None
        self.header_bytes = HEADER_BYTES if format == "llmc" else 0
        self.tokens = 0
        self._file: Any = None

    def path(self, shard: int) -> Path:
        return self.folder / (f"{self.stem}_{shard:06d}.bin" if self.shard_tokens else f"{self.stem}.bin")

    def _place(self, tokens: int) -> tuple[int, int]:
        """(shard, tokens before it in that shard) of the token number `tokens`."""
        return divmod(tokens, self.shard_tokens) if self.shard_tokens else (0, tokens)

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            shard, at = self._place(self.tokens)
            if self._file is None:
                self._open(shard, at)
            room = self.shard_tokens - at if self.shard_tokens else len(tokens)
            _write_all(self._file, tokens[:room].astype("<u2").tobytes())
            self.tokens += len(tokens[:room])
            if len(tokens) >= room and self.shard_tokens:
                self.close()
            tokens = tokens[room:]

    def _open(self, shard: int, at: int) -> None:
        self._file = open(self.path(shard), "r+b" if at else "wb", buffering=0)  # noqa: SIM115
        self._file.seek(self.header_bytes + at * TOKEN_BYTES)  # an unfinished shard's header is zeros

    def sync(self) -> None:
        if self._file:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish the open file: its header, if the format has one, then fsync."""
        if self._file:
            if self.header_bytes:
                header = np.zeros(256, dtype="<i4")
                header[:3] = (
                    LLMC_UINT16,
                    LLMC_LAYOUTS[LLMC_UINT16][0],
                    (self._file.tell() - HEADER_BYTES) // TOKEN_BYTES,
                )
                self._file.seek(0)
                _write_all(self._file, header.tobytes())
            self.sync()
            self.abandon()

    def abandon(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def rewind(self, tokens: int) -> bool:
        """Go back to the first `tokens` tokens; False when the files do not hold so many."""
        last, at = self._place(tokens)
        for shard in range(last + (at > 0)):
            held = at if shard == last else self.shard_tokens or 0
            size = self.header_bytes + held * TOKEN_BYTES
            path = self.path(shard)
            if not path.is_file() or path.stat().st_size < size:
                return False
            os.truncate(path, size)
        if at:  # even if no token follows, it has to be closed with its header
            self._open(last, at)
        self.tokens = tokens
        return True

    def files(self) -> list[Path]:
        last, at = self._place(self.tokens)
        return [self.path(shard) for shard in range(last + (at > 0))]


class TokenWriter:
    """The train and val files of one dataset folder.

    settings: what the tokens depend on; an interrupted preparation resumes only under the same ones.
    After construction `documents` and `state` say where to go on reading (0 and None at a fresh start).
    """

    def __init__(self, folder: Path, format: Format, shard_tokens: int, settings: dict[str, Any]):
        self.folder, self.partial, self.settings = folder, folder / PARTIAL, settings
        self.documents, self.state = 0, None
        self.committed = 0  # tokens that a rerun would keep
        prefix = f"{folder.resolve().name}_" if format == "llmc" else ""
        self.splits = {s: _SplitFiles(self.partial, prefix + s, format, shard_tokens) for s in SPLITS}
        with disk_errors(folder):
            if not self._resume():
                shutil.rmtree(self.partial, ignore_errors=True)
                self.partial.mkdir(parents=True)

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.splits.values())

    def _resume(self) -> bool:
        try:
            journal = json.loads((self.partial / "journal.json").read_bytes())
            if journal["settings"] != self.settings:
                return False
            self.documents, self.state = journal["documents"], journal["state"]
            held = [self.splits[split].rewind(journal["tokens"][split]) for split in SPLITS]
        except (OSError, ValueError, KeyError, TypeError):  # no journal, or one that cannot be used: start over
            held = [False]
        if not all(held):
            self.documents, self.state = 0, None
            for split in self.splits.values():
                split.abandon()
                split.tokens = 0
            return False
        self.committed = self.tokens
        return True

    def write(self, split: str, tokens: np.ndarray) -> None:
        """Append tokens (any integer dtype, ids below 65,536)."""
        with disk_errors(self.partial):
            self.splits[split].write(tokens)

    def commit(self, documents: int, state: Any) -> None:
        """Make everything written so far durable; a rerun goes on after `documents` documents, at `state`."""
        with disk_errors(self.partial):
            for split in self.splits.values():
                split.sync()
            tokens = {name: split.tokens for name, split in self.splits.items()}
            journal = {"settings": self.settings, "documents": documents, "state": state, "tokens": tokens}
            write_json(self.partial / "journal.json", journal)
        self.committed = self.tokens

    def abandon(self) -> None:
        """After a failure: keep what was committed, leave nothing otherwise."""
        for split in self.splits.values():
            split.abandon()
        if not self.committed:
            shutil.rmtree(self.partial, ignore_errors=True)

    def publish(self, vocab_size: int, tokenizer: dict[str, Any], source: str, created_by: str) -> Meta:
        """Move the files into the folder and write meta.json. Raises DataError when a split is empty."""
        for name, split in self.splits.items():
            if not split.tokens:
                self.committed = 0
                raise DataError(
                    f"the {name} split got no tokens",
                    where=source,
                    expected="text for both splits",
                    found=", ".join(f"{n}: {s.tokens:,} tokens" for n, s in self.splits.items()),
                    hint="give more text, or another share: --val_fraction=0.3, or another --seed",
                )
        with disk_errors(self.folder):
            rows = {}
            for name, split in self.splits.items():
                split.close()
                files = tuple(
                    FileEntry(name=p.name, bytes=p.stat().st_size, sha256=sha256_of(p)) for p in split.files()
                )
                rows[name] = Split(tokens=split.tokens, files=files)
            meta = Meta(
                vocab_size=vocab_size,
                tokenizer=tokenizer,
                splits=rows,
                source=source,
                created_by=created_by,
                settings=self.settings,
            )
            for old in stale_files(self.folder):
                old.unlink()
            if tokenizer["kind"] == "char":
                write_atomic(self.folder / "meta.pkl", nanogpt_pickle(tokenizer["itos"]))
            # The first training file comes last: without it nothing takes the folder for a dataset.
            for path in (p for split in reversed(self.splits.values()) for p in reversed(split.files())):
                os.replace(path, self.folder / path.name)
            sync(self.folder)
            write_json(self.folder / "meta.json", meta.to_json())
        shutil.rmtree(self.partial, ignore_errors=True)
        return meta


def stale_files(folder: Path) -> list[Path]:
    """The files of an earlier preparation, meta.json first: from its removal on the folder is not a dataset."""
    token_file = re.compile(rf"({re.escape(folder.resolve().name)}_)?(train|val)(_\d{{6}})?\.bin")
    names = ["meta.json", "meta.pkl", *sorted(p.name for p in folder.iterdir() if token_file.fullmatch(p.name))]
    return [folder / name for name in names if (folder / name).exists()]


def _write_all(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:  # an unbuffered write may stop early, as on a disk that is just full
        view = view[file.write(view) :]
