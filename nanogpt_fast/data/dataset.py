"""A dataset folder's description: meta.json, written last and never by halves, or nanoGPT's meta.pkl.

meta.pkl is read without unpickling: unpickling runs whatever code the file asks for. `read_pickle` walks the
opcodes and knows only those that build dicts of strings and numbers.
"""

import dataclasses
import json
import pickle
import pickletools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogpt_fast.errors import DataError
from nanogpt_fast.files import sha256_of

FORMAT = 1
_STORE = {"MEMOIZE", "BINPUT", "LONG_BINPUT"}
_LOAD = {"BINGET", "LONG_BINGET"}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of tokens in the dataset folder."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """train or val: its tokens and the files that hold them, in order."""

    tokens: int
    files: tuple[FileEntry, ...]


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What meta.json says; from a meta.pkl only vocab_size and tokenizer are known."""

    vocab_size: int
    tokenizer: dict[str, Any]  # Tokenizer.to_json()
    splits: dict[str, Split] = field(default_factory=dict)
    source: str = ""
    created_by: str = ""
    settings: dict[str, Any] = field(default_factory=dict)  # how prepare made it; a rerun compares

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}


def check_name(name: str) -> str:
    """The dataset's name itself. Raises DataError when it is not a plain folder name (a path, '..', hidden)."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise DataError(
            f"{name!r} is not a dataset name",
            expected="letters, digits, '.', '_' and '-' (a name inside the data folder, not a path)",
            hint="give the folder by --out: python -m nanogpt_fast.prepare text --source FILE --out FOLDER",
        )
    return name


def nanogpt_pickle(itos: list[str]) -> bytes:
    """The meta.pkl that nanoGPT's train.py and sample.py read for a character dataset."""
    stoi = {char: i for i, char in enumerate(itos)}
    return pickle.dumps({"vocab_size": len(itos), "itos": dict(enumerate(itos)), "stoi": stoi}, protocol=4)


def read_meta(folder: Path) -> Meta | None:
    """meta.json of a dataset folder, else its meta.pkl, else None. Raises DataError on a damaged one."""
    if (path := folder / "meta.json").exists():
        return _from_json(path)
    if (path := folder / "meta.pkl").exists():
        return _from_pickle(path)
    return None


def is_complete(folder: Path) -> bool:
    """Whether meta.json is there with every file it lists, in its size. Raises DataError on a damaged meta.json."""
    meta = read_meta(folder)
    files = [file for split in meta.splits.values() for file in split.files] if meta else []
    paths = {folder / file.name: file.bytes for file in files}
    return bool(paths) and all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def verify(folder: Path) -> Meta:
    """Compare the token files with the sizes and SHA-256 in meta.json. DataError names the first that differs."""
    meta = read_meta(folder)
    if meta is None or not meta.splits:
        found = "no meta.json" if meta is None else "nanoGPT's meta.pkl, which lists no files"
        raise DataError("there is nothing to verify", where=str(folder), expected="meta.json", found=found)
    for file in (file for split in meta.splits.values() for file in split.files):
        path = folder / file.name
        size = path.stat().st_size if path.is_file() else None
        sides = (f"{file.bytes} bytes", f"{size} bytes" if size is not None else "no such file")
        if size == file.bytes:
            sides = (f"SHA-256 {file.sha256}", f"SHA-256 {sha256_of(path)}")
        if sides[0] != sides[1]:
            raise DataError(
                "a token file is not as it was prepared",
                where=str(path),
                expected=sides[0],
                found=sides[1],
                hint="prepare it again with --force",
            )
    return meta


def _damaged(path: Path, found: str, expected: str = "") -> DataError:
    hint = f"delete {path} and prepare the dataset again"
    return DataError(f"{path.name} cannot be used", where=str(path), expected=expected, found=found, hint=hint)


def _from_json(path: Path) -> Meta:
    try:
        value = json.loads(path.read_bytes())
        written = value["format"]
        if written != FORMAT:
            raise _damaged(path, f"format {written!r} (made by {value.get('created_by', '?')})", f"format {FORMAT}")
        splits = {
            split: Split(tokens=int(row["tokens"]), files=tuple(FileEntry(**file) for file in row["files"]))
            for split, row in value["splits"].items()
        }
        meta = Meta(
            vocab_size=int(value["vocab_size"]),
            tokenizer=dict(value["tokenizer"]),
            splits=splits,
            source=value.get("source", ""),
            created_by=value.get("created_by", ""),
            settings=value.get("settings", {}),
        )
    except KeyError as error:
        raise _damaged(path, f"no key {error}") from error
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise _damaged(path, str(error), "JSON as `prepare` writes it") from error
    for file in (file for split in splits.values() for file in split.files):
        if Path(file.name).name != file.name:  # meta.json may come from elsewhere: never read outside its folder
            raise _damaged(path, f"file name {file.name!r}", "names inside the dataset folder")
    return meta


def _from_pickle(path: Path) -> Meta:
    try:
        value = read_pickle(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, str(error), "nanoGPT's dict of vocab_size, itos, stoi") from error
    if not isinstance(value, dict) or not isinstance(value.get("vocab_size"), int):
        raise _damaged(path, "no vocab_size in it", "nanoGPT's dict of vocab_size, itos, stoi")
    size, itos = value["vocab_size"], value.get("itos")
    tokenizer: dict[str, Any] = {"kind": "unknown"}  # training needs vocab_size alone, as nanoGPT's does
    if isinstance(itos, dict) and list(itos) == list(range(size)):
        tokenizer = {"kind": "char", "itos": list(itos.values())}
    return Meta(vocab_size=size, tokenizer=tokenizer, source="nanoGPT meta.pkl")


def read_pickle(data: bytes) -> Any:
    """The value of a pickle (protocols 2 to 5) of dicts, strings and ints; ValueError names any other opcode."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    try:
        for opcode, argument, position in pickletools.genops(data):
            name = opcode.name
            if name in ("PROTO", "FRAME"):
                continue
            if name in _VALUES:
                stack.append(argument)
            elif name in _STORE:
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif name in _LOAD:
                stack.append(memo[argument])
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "MARK":
                marks.append(len(stack))
            elif name in ("SETITEM", "SETITEMS"):
                start = marks.pop() if name == "SETITEMS" else len(stack) - 2
                items = stack[start:]
                del stack[start:]
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            elif name == "STOP":
                return stack.pop()
            else:
                raise ValueError(f"opcode {name} at byte {position}: only dicts of strings and ints are read")
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a well-formed pickle ({error})") from error
    raise ValueError("the pickle has no end")
