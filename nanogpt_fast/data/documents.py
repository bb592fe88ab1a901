"""Where text comes from: Python's own library, files, a checked download, a Hugging Face dataset streamed.

Everything is read as documents: `read(documents, state)` goes on after that many of them, so an interrupted
preparation can resume. Empty documents are left out.
"""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from nanogpt_fast.data.text_files import BY_NAME, PACKED, SUFFIXES, field_of, has_rows, kind_of, read_chunks, read_rows
from nanogpt_fast.errors import DataError, did_you_mean
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
    def read(self, documents: int = 0, state: Any = None) -> Iterator[Part]: ...
    def state(self) -> Any: ...  # JSON, where the stream stands; None when the number of documents is enough


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


class HubDocuments:
    """A dataset of the datasets library, streamed: one document in each row's `field`.

    `open_stream` returns the datasets.IterableDataset; it is called when reading starts.
    """

    one = False
    nbytes = None

    def __init__(self, open_stream: Callable[[], Any], description: str, field: str = "text"):
        self.open_stream, self.description, self.field = open_stream, description, field
        self.fingerprint = description
        self._stream: Any = None

    def read(self, documents: int = 0, state: Any = None) -> Iterator[Part]:
        # A stream raises what its HTTP, file system and Arrow layers raise: no common base but Exception.
        try:
            self._stream = self.open_stream()
            if state is not None:
                self._stream.load_state_dict(state)  # skips whole files, where counting would download them again
            for row, example in enumerate(self._stream, documents):
                if text := field_of(example, self.field, f"{self.description}, document {row}"):
                    yield text, True
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


def hub_documents(repository: str, subset: str, field: str = "text", revision: str = "") -> HubDocuments:
    """The train split of a dataset on the Hugging Face hub, streamed (extra `data`)."""

    def open_stream() -> Any:
        try:
            import datasets
            from huggingface_hub import constants, get_session
        except ImportError as error:
            raise DataError("the datasets library is missing", hint="pip install 'nanogpt-fast[data]'") from error
        if not constants.HF_HUB_OFFLINE:  # one try: the library's own take half a minute to say that nobody is there
            get_session().head(constants.ENDPOINT, timeout=DOWNLOAD_TIMEOUT)
        name, branch = subset or None, revision or None
        return datasets.load_dataset(repository, name=name, revision=branch, split="train", streaming=True)

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
