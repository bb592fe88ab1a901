"""Writes a dataset's token files so that they appear all at once, complete, or not at all.

Everything grows in FOLDER/.partial/. `commit` makes what is there durable and notes in journal.json how far it
goes, so an interrupted preparation resumes from that point; `publish` hashes, notes the meta.json to be in the journal,
renames, and writes meta.json last: from that note on a rerun has only the renames to finish.
"""

import contextlib
import errno
import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np

from nanogpt_fast.data.dataset import PARTIAL, FileEntry, Meta, Split, meta_from_json
from nanogpt_fast.data.encode import draw
from nanogpt_fast.data.meta_pickle import nanogpt_pickle
from nanogpt_fast.data.token_format import HEADER_BYTES, LLMC_LAYOUTS, LLMC_UINT16
from nanogpt_fast.errors import DataError
from nanogpt_fast.files import load_json, sync, write_atomic, write_json

Format = Literal["bin", "llmc"]
SPLITS = ("train", "val")
TOKEN_BYTES = 2
HASH_BYTES = 1 << 20  # read at once


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


class FolderBusy(DataError):
    """Another process holds the folder's lock."""


@contextlib.contextmanager
def locked(folder: Path, wait: float) -> Iterator[bool]:
    """One process at a time prepares a folder; the kernel frees the lock of a killed one. Gives whether it is held:
    some network file systems have no locks. wait: seconds, below 0 for as long as it takes."""
    lock = filelock.FileLock(str(folder / ".prepare.lock"))
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=wait)
        except filelock.Timeout:
            hint = "wait until it is done, or give another --out"
            raise FolderBusy("another process is preparing this folder", where=str(folder), hint=hint) from None
        except (OSError, NotImplementedError) as error:  # a file system without locks: go on without
            if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                raise
    try:
        yield lock.is_locked
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
    """The train and val files of one dataset folder, or the one file of a part (data/nodes.py), which may be empty.

    settings: what the tokens depend on; an interrupted preparation resumes only under the same ones.
    After construction `documents` and `state` say where to go on reading (0 and None at a fresh start); `ready` is the
    meta.json to be where an earlier publish was cut off: then only `finish` is left to do.
    """

    def __init__(
        self, folder: Path, format: Format, shard_tokens: int, settings: dict[str, Any], splits: Sequence[str] = SPLITS
    ):
        self.folder, self.partial, self.settings = folder, folder / PARTIAL, settings
        self.documents, self.state = 0, None
        self.committed = 0  # tokens that a rerun would keep
        self.ready: Meta | None = None
        prefix = f"{folder.resolve().name}_" if format == "llmc" else ""
        self.splits = {s: _SplitFiles(self.partial, prefix + s, format, shard_tokens) for s in splits}
        with disk_errors(folder):
            if not self._resume():
                shutil.rmtree(self.partial, ignore_errors=True)
                self.partial.mkdir(parents=True, exist_ok=True)
        self._mark = (self.documents, self.state, self._counts())

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.splits.values())

    def _counts(self) -> dict[str, int]:
        return {name: split.tokens for name, split in self.splits.items()}

    def _resume(self) -> bool:
        try:
            journal = load_json(self.partial / "journal.json")
            if journal["settings"] != self.settings:
                return False
            if "publish" in journal:
                self.ready = meta_from_json(journal["publish"])
                held = [self._holds(file) for split in self.ready.splits.values() for file in split.files]
            else:
                self.documents, self.state = journal["documents"], journal["state"]
                held = [files.rewind(journal["tokens"][split]) for split, files in self.splits.items()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no journal, or one that cannot be used
            held = [False]
        if not all(held):
            self.documents, self.state, self.ready = 0, None, None
            for split in self.splits.values():
                split.abandon()
                split.tokens = 0
            return False
        self.committed = sum(split.tokens for split in (self.ready or self).splits.values())
        return True

    def _holds(self, file: FileEntry) -> bool:
        """Whether it waits in .partial, or has been moved from there."""
        places = (self.partial / file.name, self.folder / file.name)
        return any(place.is_file() and place.stat().st_size == file.bytes for place in places)

    def write(self, split: str, tokens: np.ndarray) -> None:
        """Append tokens (any integer dtype, ids below 65,536)."""
        with disk_errors(self.partial):
            self.splits[split].write(tokens)

    def mark(self, documents: int, state: Any) -> None:
        """What is written so far is whole: reading would go on after `documents` documents, at `state`."""
        self._mark = (documents, state, self._counts())

    def commit(self) -> None:
        """Make everything up to the last mark durable; a rerun goes on there."""
        with disk_errors(self.partial):
            for split in self.splits.values():
                split.sync()
            documents, state, tokens = self._mark
            journal = {"settings": self.settings, "documents": documents, "state": state, "tokens": tokens}
            write_json(self.partial / "journal.json", journal)
        self.committed = sum(tokens.values())

    def abandon(self) -> None:
        """After a failure or a signal: keep what is whole, leave nothing where that is nothing."""
        if not self.ready and sum(self._mark[2].values()) > self.committed:
            with contextlib.suppress(DataError):  # the disk may be what failed
                self.commit()
        for split in self.splits.values():
            split.abandon()
        if not self.committed:
            shutil.rmtree(self.partial, ignore_errors=True)

    def publish(
        self,
        vocab_size: int,
        tokenizer: dict[str, Any],
        source: str,
        created_by: str,
        hashed: Callable[[int, int], None] = lambda done, total: None,
    ) -> Meta:
        """Move the files into the folder and write meta.json; hashed is told bytes done, of how many.

        Raises DataError when a split is empty.
        """
        for name, split in self.splits.items():
            if not split.tokens and name in SPLITS:
                hint = self._more_text()
                self.committed, self._mark = 0, (0, None, dict.fromkeys(self.splits, 0))  # not worth resuming
                raise DataError(
                    f"the {name} split got no tokens",
                    where=source,
                    expected="text for both splits",
                    found=", ".join(f"{n}: {s.tokens:,} tokens" for n, s in self.splits.items()),
                    hint=hint,
                )
        with disk_errors(self.folder):
            for split in self.splits.values():
                split.close()
            sizes = {path: path.stat().st_size for split in self.splits.values() for path in split.files()}
            digests = _sha256(sizes, hashed)
            rows = {
                name: Split(
                    tokens=split.tokens,
                    files=tuple(FileEntry(name=p.name, bytes=sizes[p], sha256=digests[p]) for p in split.files()),
                )
                for name, split in self.splits.items()
            }
            meta = Meta(
                vocab_size=vocab_size,
                tokenizer=tokenizer,
                splits=rows,
                source=source,
                created_by=created_by,
                settings=self.settings,
            )
            write_json(self.partial / "journal.json", {"settings": self.settings, "publish": meta.to_json()})
            self.ready, self.committed = meta, self.tokens
        return self.finish()

    def finish(self) -> Meta:
        """The renames, from wherever they were cut off; meta.json last."""
        meta, partial = self.ready, self.partial
        assert meta is not None
        names = [file.name for split in meta.splits.values() for file in split.files]
        with disk_errors(self.folder):
            for old in stale_files(self.folder):
                if old.name not in names or (partial / old.name).exists():  # else it is the new one, moved before
                    old.unlink()
            if meta.tokenizer["kind"] == "char":
                write_atomic(self.folder / "meta.pkl", nanogpt_pickle(meta.tokenizer["itos"]))
            for name in reversed(names):  # the first training file last: without it this is no dataset to nanoGPT
                if (partial / name).exists():
                    os.replace(partial / name, self.folder / name)
            sync(self.folder)
            write_json(self.folder / "meta.json", meta.to_json())
        shutil.rmtree(partial, ignore_errors=True)
        return meta

    def _more_text(self) -> str:
        """What gives both splits something: of few documents, the share that the one nearest to val is in."""
        documents, _, tokens = self._mark
        if tokens["val"] or self.settings.get("split") != "document" or documents < 2:
            return "give more text, or a larger --max_tokens"
        needed = min(draw(number, self.settings["seed"]) for number in range(min(documents, 100_000))) / 2**64
        unit = 10.0 ** (math.floor(math.log10(needed)) - 1)
        share = f"--val_fraction={math.ceil(needed / unit) * unit:.2g}"
        return (
            f"give more text, a larger --max_tokens, or {share}, which the draw of these {documents:,} documents needs"
        )


def stale_files(folder: Path) -> list[Path]:
    """The files of an earlier preparation, meta.json first: from its removal on the folder is not a dataset."""
    token_file = re.compile(rf"({re.escape(folder.resolve().name)}_)?(train|val)(_\d{{6}})?\.bin")
    names = ["meta.json", "meta.pkl", *sorted(p.name for p in folder.iterdir() if token_file.fullmatch(p.name))]
    return [folder / name for name in names if (folder / name).exists()]


def _write_all(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:  # an unbuffered write may stop early, as on a disk that is just full
        view = view[file.write(view) :]


def _sha256(sizes: dict[Path, int], hashed: Callable[[int, int], None]) -> dict[Path, str]:
    digests, done, total = {}, 0, sum(sizes.values())
    for path in sizes:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while data := file.read(HASH_BYTES):
                digest.update(data)
                hashed(done := done + len(data), total)
        digests[path] = digest.hexdigest()
    return digests
