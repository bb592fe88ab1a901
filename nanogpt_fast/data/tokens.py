"""Reading tokens: an ordered list of token files as one source.

Positioned reads, never np.memmap: a file cut short under a memmap kills Python with SIGBUS, a short read is an error
that names the file. Files are opened on first use and at most MAX_OPEN_FILES stay open (100B tokens are 1030 shards,
the usual limit is 1024 descriptors). A TokenSource may be read from several threads.
"""

import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from nanogpt_fast.data.token_format import identity_of, inspect, unreadable
from nanogpt_fast.errors import DataError

MAX_OPEN_FILES = 256
READ_TRIES = 4  # on EIO and ESTALE, as network file systems give while a server restarts
RETRY_SECONDS = 0.5  # before the second try; doubles with each further one
FINGERPRINT_BYTES = 1 << 20  # hashed at either end of a file
RESUME_HINT = "put the file back as it was, then continue from the last checkpoint with --init_from=resume"

log = logging.getLogger(__name__)
T = TypeVar("T")


class TokenSource:
    """An ordered list of token files of one dtype.

    `dtype` is what reads return: uint16, or int32 for four-byte files (torch has no arithmetic on uint32; an id
    past 2^31 turns negative and is caught by the loader's vocabulary check).
    """

    def __init__(self, paths: Sequence[str]):
        self.files = [inspect(path) for path in paths]
        self.n_tokens = sum(file.n_tokens for file in self.files)
        self.dtype = np.dtype(np.uint16 if self.files[0].dtype == "<u2" else np.int32)
        self._lock = threading.Lock()
        self._descriptors: dict[int, int] = {}  # file index: descriptor, oldest first
        self._digests: list[str] | None = None
        self._checked = time.monotonic()
        odd = next((f for f in self.files if np.dtype(f.dtype).itemsize != self.dtype.itemsize), None)
        if odd:
            raise DataError(
                "the shards mix two-byte and four-byte tokens",
                where=odd.path,
                expected=f"{self.files[0].dtype}, as {self.files[0].path} has",
                found=odd.dtype,
                hint="tokenize all shards with the same tokenizer",
            )
        seen: dict[tuple[int, int], str] = {}
        for path in paths:
            stat = os.stat(path)
            twin = seen.setdefault((stat.st_dev, stat.st_ino), path)
            if twin is not path:
                log.warning("%s and %s are the same file: each epoch reads it twice", twin, path)

    def __repr__(self) -> str:
        return f"{len(self.files)} file(s), {self.n_tokens:,} tokens, {os.path.dirname(self.files[0].path) or '.'}"

    def __enter__(self) -> "TokenSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def largest_of(self, tokens: int) -> int:
        """The largest id among the first `tokens` of the first file."""
        out = np.empty((1, min(tokens, self.files[0].n_tokens)), self.dtype)
        self.read_rows([0], [0], out)
        return int(out.max(initial=0))

    def read_rows(self, file_index: Iterable[int], start: Iterable[int], out: np.ndarray) -> None:
        """Fill row i of out [rows, width] (C-contiguous, self.dtype) with file_index[i]'s tokens from start[i] on.

        DataError where a file was written to since it was opened: looked at after the read (a microsecond a file), so
        no batch of an overwritten file is handed out.
        """
        file_index = list(file_index)
        size, row_bytes = self.dtype.itemsize, out.shape[1] * self.dtype.itemsize
        view = out.reshape(-1).view(np.uint8).data
        with self._lock:
            for row, (index, first) in enumerate(zip(file_index, start)):
                offset = self.files[index].offset + first * size
                self._read(index, offset, view[row * row_bytes : (row + 1) * row_bytes])
            for index in set(file_index):
                self._hold(index, _retry(self.files[index].path, self._identity, index))

    def _read(self, index: int, offset: int, view: memoryview) -> None:
        path, count = self.files[index].path, 0
        while count < len(view):  # a network file system may stop early; past the end of the file 0 bytes come back
            got = _retry(path, self._pread, index, view[count:] if count else view, offset + count)
            if got == 0:
                raise DataError(
                    "a token file became shorter while it was read",
                    where=f"{path}, byte {offset + count}",
                    expected=f"{self.files[index].identity[0]} bytes, as when it was opened",
                    found=f"{_size_now(path)} bytes",
                    hint=RESUME_HINT,
                )
            count += got

    def _pread(self, index: int, view: memoryview, offset: int) -> int:
        try:
            return _pread(self._descriptor(index), view, offset)
        except OSError:
            self._forget(index)  # after ESTALE only a fresh open can help
            raise

    def _identity(self, index: int) -> tuple[int, int, int]:
        try:
            return identity_of(os.fstat(self._descriptor(index)))
        except OSError:
            self._forget(index)
            raise

    def _descriptor(self, index: int) -> int:
        if index not in self._descriptors:
            if len(self._descriptors) >= MAX_OPEN_FILES:
                self._forget(next(iter(self._descriptors)))
            self._descriptors[index] = os.open(self.files[index].path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        return self._descriptors[index]

    def _forget(self, index: int) -> None:
        if index in self._descriptors:
            os.close(self._descriptors.pop(index))

    def _digest(self, index: int) -> str:
        """SHA-256 of the first and the last MiB, of all bytes where the file has less than two."""
        total = self.files[index].identity[0]
        head = bytearray(min(total, FINGERPRINT_BYTES))
        tail = bytearray(min(total - len(head), FINGERPRINT_BYTES))
        self._read(index, 0, memoryview(head))
        self._read(index, total - len(tail), memoryview(tail))
        return hashlib.sha256(head + tail).hexdigest()

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint records of the data, JSON-ready; computed once (2 MiB a file are read)."""
        with self._lock:
            if self._digests is None:
                self._digests = [self._digest(i) for i in range(len(self.files))]
        rows = [
            {
                "name": os.path.basename(file.path),
                "bytes": file.identity[0],
                "tokens": file.n_tokens,
                "layout": f"{file.layout} {file.dtype}",
                "sha256_ends": digest,
            }
            for file, digest in zip(self.files, self._digests)
        ]
        return {"tokens": self.n_tokens, "files": rows}

    def check_unchanged(self, every_seconds: float = 5.0) -> None:
        """DataError if a file was deleted or replaced since it was opened (what is written into one, read_rows sees);
        looks at most so often.

        A new time stamp alone (touch, a remount) is forgiven where fingerprint() was taken and still agrees.
        """
        if time.monotonic() - self._checked < every_seconds:
            return
        with self._lock:
            for index, file in enumerate(self.files):
                self._hold(index, identity_of(_retry(file.path, os.stat, file.path)))
        self._checked = time.monotonic()

    def _hold(self, index: int, identity: tuple[int, int, int]) -> None:
        """Compare what a file is now with what it was when it was opened."""
        file = self.files[index]
        if identity == file.identity:
            return
        self._forget(index)  # it may point at a file that no longer has this name
        known = self._digests[index] if self._digests else None
        if identity[0] != file.identity[0] or known is None or self._digest(index) != known:
            raise DataError(
                "a token file was replaced while the run was reading it",
                where=file.path,
                expected=f"{file.identity[0]} bytes, written {_when(file.identity)}",
                found=f"{identity[0]} bytes, written {_when(identity)}",
                hint=RESUME_HINT,
            )
        self.files[index] = replace(file, identity=identity)


CHANGED = "the data changed since the checkpoint was written"
ACCEPT = "restore the data, or accept the change with --ignore_fingerprint=True"


def check_fingerprint(
    saved: dict[str, Any], current: dict[str, Any], what: str = CHANGED, where: str = "", hint: str = ACCEPT
) -> None:
    """DataError where the data are not those that the checkpoint was trained on; or as `what` says."""
    if saved == current:
        return
    ours, theirs = ({row["name"]: row for row in side["files"]} for side in (saved, current))
    changed = [name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name)]

    def show(side: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
        row = rows.get(changed[0], {}) if changed else {}
        detail = (
            f"{row['bytes']} bytes, {row['layout']}, sha256 {row['sha256_ends'][:16]}..." if row else "no such file"
        )
        return f"{side['tokens']:,} tokens in {len(side['files'])} file(s); {detail if changed else list(rows)}"

    raise DataError(
        what,
        where=where + (changed[0] if changed else "the order of the files"),
        expected=show(saved, ours),
        found=show(current, theirs),
        hint=hint,
    )


# ---- Reading and reporting ----


def _pread(descriptor: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows; the source's lock keeps the pair together
    data = os.read(descriptor, len(view))
    view[: len(data)] = data
    return len(data)


def _retry(path: str, call: Callable[..., T], *args: Any) -> T:
    """call(*args), again where a network file system says EIO or ESTALE; any other failure is a DataError."""
    for attempt in range(1, READ_TRIES + 1):
        try:
            return call(*args)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ESTALE) or attempt == READ_TRIES:
                raise unreadable(path, error, RESUME_HINT) from error
            log.warning("%s: %s, try %d of %d", path, error.strerror, attempt, READ_TRIES)
        time.sleep(RETRY_SECONDS * 2 ** (attempt - 1))
    raise AssertionError("unreachable: the last attempt returns or raises")


def _size_now(path: str) -> int | str:
    try:
        return os.stat(path).st_size
    except OSError as error:
        return error.strerror or "unknown"


def _when(identity: tuple[int, int, int]) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(identity[1] / 1e9))
