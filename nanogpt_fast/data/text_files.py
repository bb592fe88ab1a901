"""Text out of files, a piece at a time: plain UTF-8, rows of .jsonl, .json, .csv and .parquet; .gz and .zst of these.

Nothing here holds a whole text: 150 MB with one emoji in it are 600 MB as a Python string. A row is held whole.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import re
import reprlib
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nanogpt_fast.errors import DataError
from nanogpt_fast.files import open_regular

PLAIN = (".txt", ".md", ".py")
LINES = (".jsonl", ".ndjson")
SUFFIXES = (*PLAIN, *LINES, ".parquet")  # what is text wherever it lies, in any case, packed or not
BY_NAME = (".json", ".csv", ".tsv")  # in a folder they are settings and tables as a rule: read where they are named
PACKED = (".gz", ".zst")
CHUNK = 1 << 20  # bytes read at once
LONGEST = 256 << 20  # bytes, or characters, of one row
BOM = codecs.BOM_UTF8
_FOREIGN = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\x1f\x8b": "gzip data without the suffix .gz",
    b"\x28\xb5\x2f\xfd": "zstd data without the suffix .zst",
    b"PK\x03\x04": "a zip archive, as .docx, .epub and .xlsx are",
    b"%PDF-": "a PDF",
    b"PAR1": "Parquet without the suffix .parquet",
}


def kind_of(path: Path) -> str:
    """The suffix that says what is inside, in lower case: .txt of NOTES.TXT and of notes.txt.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def has_rows(path: Path) -> bool:
    """Whether the file holds a document a row; else it is one."""
    return kind_of(path) in (*LINES, ".parquet", *BY_NAME)


def read_chunks(path: Path) -> Iterator[str]:
    """A UTF-8 file's text in pieces, see decoded. Raises DataError for what cannot be read."""
    with _errors(path), _open(path) as file:
        yield from decoded(file, str(path))


def decoded(file: BinaryIO, where: str) -> Iterator[str]:
    """UTF-8 bytes as text in pieces, none empty: line ends as \\n (as Python's text mode, and so nanoGPT's prepare.py,
    reads it), without a byte-order mark. Raises DataError for bytes that are no UTF-8, by their place."""
    decoder, newlines = codecs.getincrementaldecoder("utf-8")(), io.IncrementalNewlineDecoder(None, translate=True)
    at, begun = 0, False
    while True:
        data = file.read(CHUNK)
        if not at:
            refuse_foreign(data[:4096], where)
        ahead = len(decoder.getstate()[0])  # bytes of a character that the last piece ended within
        try:
            text = newlines.decode(decoder.decode(data, final=not data), final=not data)
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{where}, byte {at - ahead + error.start}", error) from error
        if text and not begun:
            begun, text = True, text.removeprefix("\ufeff")
        if text:
            yield text
        at += len(data)
        if not data:
            return


def read_rows(path: Path, field: str) -> Iterator[str]:
    """The field of every row of a file that has rows."""
    kind = kind_of(path)
    with _errors(path):
        if kind == ".parquet":
            yield from _read_parquet(path, field)
            return
        with _open(path) as file:
            refuse_foreign(file.read(4096), str(path))
        readers = {".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv}
        yield from readers.get(kind, _read_lines)(path, field)


def write_text(path: Path, texts: Iterable[str]) -> None:
    """A text file that appears whole, written piece by piece."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            for text in texts:
                file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_foreign(head: bytes, where: str) -> None:
    """DataError where a file's first bytes are of something else than UTF-8 text."""
    found = next((name for magic, name in _FOREIGN.items() if head.startswith(magic)), "")
    zeros = head.count(0)
    if not found and len(head) >= 8 and zeros * 4 > len(head):
        odd = head[1::2].count(0) > zeros // 2
        found = "only zeros" if zeros == len(head) else f"UTF-16{'LE' if odd else 'BE'}"
    if not found:
        return
    hint = "give the text itself, as UTF-8 (.txt, .md, .jsonl, .csv, .parquet; .gz and .zst of these)"
    if found.startswith("UTF-"):
        hint = f"convert it: iconv -f {found} -t UTF-8 IN > OUT"
    raise DataError("the text is not UTF-8", where=where, expected="UTF-8", found=found, hint=hint)


def field_of(row: Any, field: str, where: str) -> str:
    """row[field]. Raises DataError where there is none, or it is no text."""
    if not isinstance(row, dict) or field not in row:
        names = ", ".join(map(str, row))[:300] if isinstance(row, dict) else type(row).__name__
        hint = "name the field that holds the text: --field=NAME"
        raise DataError(f"no field {field!r}", where=where, expected=field, found=names, hint=hint)
    if not isinstance(row[field], str):
        found = reprlib.repr(row[field])
        raise DataError(f"field {field!r} is not text", where=where, expected="a string", found=found)
    return row[field]


def _read_lines(path: Path, field: str) -> Iterator[str]:
    with _open(path) as file:
        number = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > LONGEST:
                raise DataError("the line is too long", where=where, expected=f"at most {LONGEST:,} bytes")
            if number == 1:
                line = line.removeprefix(BOM)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise _not_utf8(f"{where}, byte {error.start}", error) from error
            except (ValueError, RecursionError) as error:
                raise _not_json("the line is not JSON", where, error, f"sed -n {number}p {path}") from error
            yield field_of(row, field, where)


def _read_json(path: Path, field: str) -> Iterator[str]:
    """The rows of one array; a file of another form is read by lines."""
    chunks, decoder, blank = read_chunks(path), json.JSONDecoder(), re.compile(r"[\s,]*")
    text, at, row = next(chunks, "").lstrip(), 1, 0
    if not text.startswith("["):
        yield from _read_lines(path, field)
        return
    while True:
        at = blank.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            # A row that the piece ends within fails at the piece's end, or is a string without one.
            cut = isinstance(error, json.JSONDecodeError) and (
                error.msg.startswith("Unterminated") or error.pos > len(text) - 16
            )
            more = next(chunks, "") if cut and len(text) - at < LONGEST else ""
            if not more:
                hint = "give an array of objects, or one object a line"
                raise _not_json("the row is not JSON", f"{path}, row {row}", error, hint) from error
            text, at = text[at:] + more, 0
            continue
        yield field_of(value, field, f"{path}, row {row}")
        row += 1


def _read_csv(path: Path, field: str) -> Iterator[str]:
    csv.field_size_limit(LONGEST)
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, delimiter="\t" if kind_of(path) == ".tsv" else ",")
        try:
            for row in rows:
                yield field_of(row, field, f"{path}, line {rows.line_num}")
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{path}, after line {rows.line_num}", error) from error
        except csv.Error as error:
            raise DataError("the file is not CSV", where=f"{path}, line {rows.line_num}", found=str(error)) from error


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    pyarrow, parquet = _pyarrow(path)
    try:
        with open_regular(path) as opened, parquet.ParquetFile(opened) as file:
            field_of(dict.fromkeys(file.schema_arrow.names, ""), field, str(path))
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield field_of({field: value}, field, f"{path}, row {row}")
                    row += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        found = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        raise DataError("the file is not parquet, or damaged", where=str(path), found=found) from error


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        hint = "pip install 'nanogpt-fast[data]'"
        raise DataError(f"pyarrow is needed to read {path.suffix}", where=str(path), hint=hint) from error
    return pyarrow, parquet


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The bytes of a regular file, unpacked."""
    with open_regular(path) as file:
        packed = path.suffix.lower()
        if packed == ".gz":
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield unpacked
        elif packed == ".zst":
            pyarrow, _ = _pyarrow(path)
            with pyarrow.CompressedInputStream(file, "zstd") as unpacked:
                yield io.BufferedReader(unpacked, CHUNK)
        else:
            yield file


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    """What opening, reading and unpacking raise, as a DataError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise DataError("the source cannot be read", where=str(path), found=found, hint=f"ls -l {path}") from error


def _not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(
        "the text is not UTF-8",
        where=where,
        found=f"0x{error.object[error.start]:02x} ({error.reason})",
        hint="convert it: iconv -f ISO-8859-1 -t UTF-8 IN > OUT (with the encoding it has)",
    )


def _not_json(what: str, where: str, error: Exception, hint: str) -> DataError:
    found = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    if isinstance(error, json.JSONDecodeError):
        found = f"column {error.colno}: {error.msg}"
    return DataError(what, where=where, found=found, hint=hint)
