"""Where text comes from: Python's own library, files, a checked download, a Hugging Face dataset streamed.

Everything is read as documents: `read(documents, state)` goes on after that many of them, so an interrupted
preparation can resume. Empty documents are left out.
"""

import glob
import hashlib
import http.client
import itertools
import json
import os
import platform
import sys
import sysconfig
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from nanogpt_fast.errors import DataError, did_you_mean
from nanogpt_fast.files import write_atomic

PLAIN = (".txt", ".md", ".py")
SUFFIXES = (*PLAIN, ".jsonl", ".parquet")
DOWNLOAD_TIMEOUT = 20.0  # seconds without a byte
# Installed code, tests and caches are not the library; _sysconfigdata* holds the paths of the machine that built it.
STDLIB_SKIP = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
STDLIB_CAP = 16 * 2**20  # bytes; Python 3.11 has 9.8 MB, prepared in a second
PRINTABLE = b"\n" + bytes(range(32, 127))


class Documents(Protocol):
    """A stream of documents that can be read more than once."""

    description: str  # for meta.json

    @property
    def nbytes(self) -> int | None: ...  # about so many bytes in all, None when not known
    @property
    def fingerprint(self) -> str: ...  # changes with the content; resuming compares it
    def read(self, documents: int = 0, state: Any = None) -> Iterator[str]: ...
    def state(self) -> Any: ...  # JSON, where the stream stands; None when the number of documents is enough


class TextDocuments:
    """Documents already in memory."""

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

    def read(self, documents: int = 0, state: Any = None) -> Iterator[str]:
        return itertools.islice(filter(None, self.texts), documents, None)

    def state(self) -> None:
        return None


class FileDocuments:
    """Files: a plain text file is one document, .jsonl and .parquet hold one in each row's `field`."""

    def __init__(self, paths: list[Path], description: str, field: str = "text"):
        self.paths, self.description, self.field = paths, description, field

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    @property
    def fingerprint(self) -> str:
        rows = [(path.name, (s := path.stat()).st_size, s.st_mtime_ns) for path in self.paths]
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    def read(self, documents: int = 0, state: Any = None) -> Iterator[str]:
        return itertools.islice(filter(None, self._all()), documents, None)

    def _all(self) -> Iterator[str]:
        for path in self.paths:
            try:
                if path.suffix == ".jsonl":
                    yield from _read_jsonl(path, self.field)
                elif path.suffix == ".parquet":
                    yield from _read_parquet(path, self.field)
                else:
                    yield read_text(path)
            except OSError as error:
                raise _unreadable(path, error) from error

    def state(self) -> None:
        return None


class HubDocuments:
    """A dataset of the datasets library, streamed: one document in each row's `field`.

    `open_stream` returns the datasets.IterableDataset; it is called when reading starts.
    """

    nbytes = None

    def __init__(self, open_stream: Callable[[], Any], description: str, field: str = "text"):
        self.open_stream, self.description, self.field = open_stream, description, field
        self.fingerprint = description
        self._stream: Any = None

    def read(self, documents: int = 0, state: Any = None) -> Iterator[str]:
        # A stream raises what its HTTP, file system and Arrow layers raise: no common base but Exception.
        try:
            self._stream = self.open_stream()
            if state is not None:
                self._stream.load_state_dict(state)  # skips whole files, where counting would download them again
            for row, example in enumerate(self._stream, documents):
                if text := _field_of(example, self.field, f"{self.description}, document {row}"):
                    yield text
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                "the dataset could not be read from the Hugging Face hub",
                where=self.description,
                found=": ".join([type(error).__name__, *str(error).splitlines()[:1]]),
                hint="check the network and run the same command again (it goes on where it stopped), or give a copy: "
                "--source FOLDER_OF_PARQUET_OR_JSONL",
            ) from error

    def state(self) -> Any:
        return self._stream.state_dict()


def hub_documents(repository: str, subset: str, field: str = "text") -> HubDocuments:
    """The train split of a dataset on the Hugging Face hub, streamed (extra `data`)."""

    def open_stream() -> Any:
        try:
            import datasets
        except ImportError as error:
            raise DataError("the datasets library is missing", hint="pip install 'nanogpt-fast[data]'") from error
        return datasets.load_dataset(repository, name=subset or None, split="train", streaming=True)

    return HubDocuments(open_stream, f"hf:{repository} {subset}".strip(), field)


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
    """The files a --source means: a file, every text file under a folder, or a glob's matches; sorted."""
    path = Path(source).expanduser()
    if path.is_dir():
        inside = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        found = sorted(p for p in inside if p.suffix in SUFFIXES and p.is_file())
        expected = f"files ending in {', '.join(SUFFIXES)}"
    elif path.exists():
        return [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        expected = "a file, a folder or a glob"
    if not found:
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"--source matches no file{did_you_mean(path.name, near)}",
            where=f"{source!r} in {Path.cwd()}",
            expected=expected,
            hint=f"ls {path.parent}",
        )
    return found


def read_text(path: Path) -> str:
    """A UTF-8 file's text, line ends as \\n (as Python's text mode, and so nanoGPT's prepare.py, reads it)."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    return _decode(data, str(path)).replace("\r\n", "\n").replace("\r", "\n")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            "the text is not UTF-8",
            where=f"{where}, byte {error.start}",
            found=f"0x{data[error.start]:02x} ({error.reason})",
            hint="convert it: iconv -f ISO-8859-1 -t UTF-8 IN > OUT (with the encoding it has)",
        ) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    hint = f"ls -l {path}"
    return DataError("the source cannot be read", where=str(path), found=error.strerror or str(error), hint=hint)


def _field_of(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or field not in row:
        names = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        hint = "name the field that holds the text: --field=NAME"
        raise DataError(f"no field {field!r}", where=where, expected=field, found=names, hint=hint)
    if not isinstance(row[field], str):
        raise DataError(f"field {field!r} is not text", where=where, expected="a string", found=repr(row[field])[:80])
    return row[field]


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(_decode(line, where))
            except json.JSONDecodeError as error:
                found = f"column {error.colno}: {error.msg}"
                hint = f"sed -n {number}p {path}"
                raise DataError("the line is not JSON", where=where, found=found, hint=hint) from error
            yield _field_of(row, field, where)


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        hint = "pip install 'nanogpt-fast[data]'"
        raise DataError("pyarrow is needed to read .parquet", where=str(path), hint=hint) from error
    try:
        file = parquet.ParquetFile(path)
        _field_of(dict.fromkeys(file.schema_arrow.names, ""), field, str(path))
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0).to_pylist():
                yield _field_of({field: value}, field, f"{path}, row {row}")
                row += 1
    except pyarrow.ArrowInvalid as error:
        found = str(error).splitlines()[0]
        raise DataError("the file is not parquet, or damaged", where=str(path), found=found) from error


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
