"""Where text comes from: Python's own library, files, a checked download; data/hub.py has what is streamed.

Everything is read as documents: `read(documents, state)` goes on after that many of them, so an interrupted
preparation can resume. Empty documents are left out. `part(2, 8)` is the second of eight runs of a source's files, for
one of eight machines.
"""

import bisect
import copy
import glob
import hashlib
import http.client
import itertools
import logging
import os
import platform
import sys
import sysconfig
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from nanogpt_fast.data.text_files import BY_NAME, PACKED, SUFFIXES, has_rows, kind_of, read_chunks, read_rows
from nanogpt_fast.errors import ConfigError, DataError, did_you_mean
from nanogpt_fast.files import write_atomic

DOWNLOAD_TIMEOUT = 20.0  # seconds without a byte
# Installed code, tests and caches are not the library; _sysconfigdata* holds the paths of the machine that built it.
STDLIB_SKIP = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
STDLIB_CAP = 16 * 2**20  # bytes; Python 3.11 has 9.8 MB, prepared in a second
PRINTABLE = b"\n" + bytes(range(32, 127))

log = logging.getLogger(__name__)


Part = tuple[str, bool]  # some text of a document, never empty, and whether the document ends with it


class Documents(Protocol):
    """A stream of documents that can be read more than once."""

    description: str  # for meta.json

    @property
    def one(self) -> bool: ...  # a single text, which is no collection of documents
    @property
    def nbytes(self) -> int | None: ...  # about so many bytes in all, None when not known
    @property
    def fingerprint(self) -> str: ...  # changes with the content; resuming compares it
    @property
    def listing(self) -> str: ...  # the same on every machine that has this source; what parts must have in common
    def part(self, number: int, of: int) -> "Documents": ...  # parts 1 to `of`, one behind the other, are the whole
    def read(self, documents: int = 0, state: Any = None) -> Iterator[Part]: ...
    def state(self) -> Any: ...  # JSON, where the stream stands; None when the number of documents is enough


def share(sizes: Sequence[int], number: int, of: int) -> slice:
    """Which of a source's pieces, of so many bytes, are in part `number`: runs in the order of the source, a piece goes
    to whom its middle falls to. Raises ConfigError where there are fewer pieces than parts."""
    if len(sizes) < of:
        raise too_many_parts(len(sizes), number, of)
    ends = list(itertools.accumulate(sizes))
    total = max(1, ends[-1])
    owners = [min(of, 1 + (2 * end - size) * of // (2 * total)) for size, end in zip(sizes, ends)]
    return slice(bisect.bisect_left(owners, number), bisect.bisect_right(owners, number))


def too_many_parts(pieces: int, number: int, of: int) -> ConfigError:
    return ConfigError(
        "there are more parts than files of text, and a part is whole files",
        where=f"--node={number}/{of}",
        expected=f"at most {pieces} parts",
        found=f"{of}",
        hint=f"take fewer nodes, or cut a large file: split -n l/{of} --additional-suffix=.jsonl BIG.jsonl FOLDER/",
    )


class TextDocuments:
    """Documents already in memory."""

    one = False

    def __init__(self, texts: list[str], description: str):
        self.texts, self.description = texts, description

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.texts))

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(f"{len(text)}:".encode() + text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @property
    def listing(self) -> str:
        return self.fingerprint

    def part(self, number: int, of: int) -> "TextDocuments":
        return TextDocuments(self.texts[share([len(text) for text in self.texts], number, of)], self.description)

    def read(self, documents: int = 0, state: Any = None) -> Iterator[Part]:
        return ((text, True) for text in itertools.islice(filter(None, self.texts), documents, None))

    def state(self) -> None:
        return None


class FileDocuments:
    """Files: a plain text file is one document, .jsonl, .json, .csv and .parquet hold one in each row's `field`."""

    def __init__(self, paths: list[Path], description: str, field: str = "text"):
        self.paths, self.description, self.field = paths, description, field
        self.one = len(paths) == 1 and not has_rows(paths[0])

    @property
    def nbytes(self) -> int:
        return sum(_stat(path).st_size for path in self.paths)

    @property
    def fingerprint(self) -> str:
        """Of one text its content, as it is read twice anyway; of many files their names, sizes and times."""
        if not self.one:
            rows = [(path.name, (s := _stat(path)).st_size, s.st_mtime_ns) for path in self.paths]
            return hashlib.sha256(repr(rows).encode("utf-8", "surrogateescape")).hexdigest()
        digest = hashlib.sha256(f"{sum(map(len, read_chunks(self.paths[0])))}:".encode())
        for text in read_chunks(self.paths[0]):
            digest.update(text.encode())
        return digest.hexdigest()

    @property
    def listing(self) -> str:
        """Of names and sizes: copies on other machines have other times."""
        rows = [(path.name, _stat(path).st_size) for path in self.paths]
        return hashlib.sha256(repr(rows).encode("utf-8", "surrogateescape")).hexdigest()

    def part(self, number: int, of: int) -> "FileDocuments":
        part = copy.copy(self)  # with its `one`: a single file of a collection is no single text
        part.paths = self.paths[share([_stat(path).st_size for path in self.paths], number, of)]
        return part

    def read(self, documents: int = 0, state: Any = None) -> Iterator[Part]:
        for path in self.paths:
            rows = ((text, True) for text in read_rows(path, self.field) if text)
            for part in rows if has_rows(path) else _whole(read_chunks(path)):
                if not documents:
                    yield part
                else:
                    documents -= part[1]

    def state(self) -> None:
        return None


def _whole(texts: Iterator[str]) -> Iterator[Part]:
    """One document's pieces; the last one is known when there is none after it."""
    before = next(texts, "")
    for text in texts:
        yield before, False
        before = text
    if before:
        yield before, True


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        found = error.strerror or str(error)
        hint = f"ls -l {path}"
        raise DataError("the source cannot be read", where=str(path), found=found, hint=hint) from error


def stdlib_documents() -> TextDocuments:
    """Python's own library: sorted *.py files that are printable ASCII, so a character vocabulary stays below 100."""
    root, texts, total = Path(sysconfig.get_path("stdlib")), [], 0
    for folder, inside, names in os.walk(root):
        inside[:] = sorted(set(inside) - STDLIB_SKIP)
        for name in sorted(names):
            if not name.endswith(".py") or name.startswith("_sysconfigdata"):
                continue
            data = Path(folder, name).read_bytes().replace(b"\r\n", b"\n")
            if data and not data.translate(None, PRINTABLE) and total + len(data) <= STDLIB_CAP:
                texts.append(data.decode("ascii"))
                total += len(data)
    if not texts:
        raise DataError("this Python has no library sources", where=str(root), hint="prepare text --source FILE")
    return TextDocuments(texts, f"the standard library of Python {platform.python_version()}")


def find_files(source: str) -> list[Path]:
    """The files a --source means: a file, every text file under a folder, or a glob's matches; sorted.

    What a folder has besides is warned of by name, but for hidden files.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            inside = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
            files = sorted(p for p in inside if p.is_file())
            found = [p for p in files if kind_of(p) in SUFFIXES]
            _warn_of_skipped(path, [p for p in files if kind_of(p) not in SUFFIXES])
            expected = f"files ending in {', '.join(SUFFIXES)}, or these with {' or '.join(PACKED)} behind"
        elif path.exists():
            return [path]
        else:
            found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
            expected = "a file, a folder or a glob"
        near = [] if found or not path.parent.is_dir() else [p.name for p in path.parent.iterdir()]
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DataError("--source cannot be read", where=repr(source)[:300], found=why) from error
    if not found:
        raise DataError(
            f"--source matches no file{did_you_mean(path.name, near)}",
            where=f"{source!r} in {Path.cwd()}",
            expected=expected,
            hint=f"ls {path.parent}",
        )
    return found


def _warn_of_skipped(folder: Path, skipped: list[Path]) -> None:
    if not skipped:
        return
    names = ", ".join(str(p.relative_to(folder)) for p in skipped[:5]) + ", ..." * (len(skipped) > 5)
    by_name = next((kind_of(p) for p in skipped if kind_of(p) in BY_NAME), "")
    hint = f"; for those rows: --source '{folder}/**/*{by_name}'" if by_name else ""
    log.warning("%s: %d file(s) are left out, being no text by their names: %s%s", folder, len(skipped), names, hint)


def fetch(url: str, path: Path, sha256: str, *, timeout: float = DOWNLOAD_TIMEOUT, otherwise: str = "") -> None:
    """Download url to path if its SHA-256 is the one expected; `otherwise`: what to do without a network.

    urllib is given a time-out because a network that drops packets would hang the command for ever.
    """
    print(f"downloading {url}", file=sys.stderr)
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            data = answer.read()
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        found = str(getattr(error, "reason", error))
        raise DataError("the download failed", where=url, expected=str(path), found=found, hint=otherwise) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise DataError(
            "the download is not the expected file",
            where=url,
            expected=f"SHA-256 {sha256}",
            found=digest,
            hint=otherwise,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
