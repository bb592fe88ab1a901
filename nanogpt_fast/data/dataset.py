"""A dataset folder's description: meta.json, written last and never by halves, or nanoGPT's meta.pkl.

What meta.json lists is held against the folder by `check_files`, for train, evaluate and prepare alike.
"""

import dataclasses
import logging
import os
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogpt_fast.data.meta_pickle import read_pickle
from nanogpt_fast.data.recipes import prepare_command
from nanogpt_fast.errors import DataError
from nanogpt_fast.files import load_json, read_small, sha256_of

FORMAT = 1
PARTIAL = ".partial"  # where a preparation grows
PARTS = "parts"  # what several machines prepare, until it is joined
MAX_VOCAB = 2**31 - 1  # ids are read as int32
MAX_PICKLE = 32 << 20  # bytes

log = logging.getLogger(__name__)


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


def read_meta(folder: Path, vocab_size: int = 0) -> Meta | None:
    """meta.json of a dataset folder, else its meta.pkl, else None. Raises DataError on a damaged one.

    vocab_size: the user's, who then needs no meta.pkl: one that cannot be used is passed over.
    """
    if os.path.lexists(path := folder / "meta.json"):
        return _from_json(path)
    if os.path.lexists(path := folder / "meta.pkl"):
        try:
            return _from_pickle(path)
        except DataError:
            if not vocab_size:
                raise
            return Meta(vocab_size=vocab_size, tokenizer={"kind": "unknown"}, source="a meta.pkl that cannot be used")
    return None


def check_files(folder: Path, meta: Meta, split: str = "", there: Iterable[str] | None = None) -> None:
    """Hold a folder's token files (of one split only, where named) against what meta.json says of them.

    there: the names that would be read instead of all that are listed. Raises DataError for one that is missing, has
    another size or is not listed.
    """
    listed = {file.name: file for name, rows in meta.splits.items() if split in ("", name) for file in rows.files}
    names = listed if there is None else list(there)
    for name in dict.fromkeys([*names, *listed] if there is None else names):
        path, known = folder / name, listed.get(name)
        if known is None:
            if listed:
                raise DataError(
                    "a token file is not among those that were prepared",
                    where=str(path),
                    expected=f"the {len(listed)} file(s) that {folder / 'meta.json'} lists",
                    hint=f"move it into another folder, or name the files: --dataset='{folder}/..._{{split}}_*.bin'",
                )
            continue
        size = path.stat().st_size if path.is_file() else None
        if size != known.bytes:
            raise DataError(
                "a token file is missing" if size is None else "a token file is not as it was prepared",
                where=str(path),
                expected=f"{known.bytes} bytes, as {folder / 'meta.json'} has it",
                found="no such file" if size is None else f"{size} bytes",
                hint=f"put it back, or make the dataset again: {prepare_command(folder, meta.source)}",
            )


def check_split(folder: Path, split: str, paths: Iterable[str], *, whole: bool) -> None:
    """check_files for the paths that would be read as this split; whole: they must be all that are listed.

    Raises DataError for a folder that a preparation has not finished, too: what lies there is a part, or a mixture.
    """
    if not (folder / "meta.json").exists():
        begun = [path for path in (folder / PARTIAL, *sorted(folder.glob(f"{PARTS}/*of*"))) if path.is_dir()]
        if begun:
            raise DataError(
                "the preparation of this dataset did not finish",
                where=str(folder),
                expected="meta.json, which it writes last",
                found=", ".join(map(str, begun[:4])),
                hint=f"the same command goes on where it stopped, {prepare_command(folder)}",
            )
        return
    meta = _from_json(folder / "meta.json")
    if whole:
        check_files(folder, meta, split)
    check_files(folder, meta, split, [os.path.basename(path) for path in paths])


def is_complete(folder: Path) -> bool:
    """Whether meta.json is there with every file it lists, in its size. Raises DataError on a damaged meta.json."""
    meta = read_meta(folder)
    try:
        return meta is not None and bool(meta.splits) and check_files(folder, meta) is None
    except DataError:
        return False


def verify(folder: Path) -> Meta:
    """Compare the token files with the sizes and SHA-256 in meta.json. DataError names the first that differs."""
    meta = read_meta(folder)
    if meta is None or not meta.splits:
        found = "no meta.json" if meta is None else "nanoGPT's meta.pkl, which lists no files"
        raise DataError("there is nothing to verify", where=str(folder), expected="meta.json", found=found)
    check_files(folder, meta)
    for file in (file for split in meta.splits.values() for file in split.files):
        if (found := sha256_of(folder / file.name)) != file.sha256:
            raise DataError(
                "a token file is not as it was prepared",
                where=str(folder / file.name),
                expected=f"SHA-256 {file.sha256}",
                found=f"SHA-256 {found}",
                hint=f"put it back, or make the dataset again: {prepare_command(folder, meta.source)} --force",
            )
    return meta


def made_otherwise(what: str, paths: list[Path], wanted: dict[str, Any], meta: Meta | None, hint: str) -> DataError:
    """That what is there has other settings than those wanted; meta: None where nothing says which."""
    changed = {key: value for key, value in wanted.items() if meta and meta.settings.get(key) != value}
    return DataError(
        what,
        where=", ".join(str(path) for path in paths[:4]),
        expected=", ".join(f"{key} {value}" for key, value in changed.items()),
        found=", ".join(f"{key} {meta.settings.get(key)}" for key in changed) if meta else "",
        hint=hint,
    )


def _unusable(path: Path, found: str, expected: str = "") -> DataError:
    """No hint to delete it: a meta file may be the only copy of a vocabulary."""
    command = prepare_command(path.parent, suffix="-again")
    hint = f"put the file back as it was, or prepare the text again, beside it: {command}"
    if path.name == "meta.pkl":
        hint = f"--vocab_size=N trains without it, N the number of ids; or prepare the text again, beside it: {command}"
    return DataError(f"{path.name} cannot be used", where=str(path), expected=expected, found=found, hint=hint)


def _from_json(path: Path) -> Meta:
    try:
        return meta_from_json(load_json(path))
    except KeyError as error:
        raise _unusable(path, f"no key {error}", "JSON as `prepare` writes it") from error
    except (ValueError, TypeError, AttributeError, OSError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise _unusable(path, found, "JSON as `prepare` writes it") from error


def meta_from_json(value: Any) -> Meta:
    """The Meta that to_json() gave. Raises ValueError, TypeError, KeyError or AttributeError for anything else."""
    written = _of(value, dict, "the whole")["format"]
    if written != FORMAT:
        made_by = reprlib.repr(value.get("created_by", "?"))
        raise ValueError(f"format {reprlib.repr(written)} (made by {made_by}) where {FORMAT} is known")
    splits = {
        name: Split(
            tokens=_whole(row["tokens"], "tokens"),
            files=tuple(
                FileEntry(
                    name=_file_name(file["name"]),
                    bytes=_whole(file["bytes"], "bytes"),
                    sha256=_of(file["sha256"], str, "sha256"),
                )
                for file in _of(row["files"], list, "files")
            ),
        )
        for name, row in _of(value["splits"], dict, "splits").items()
    }
    vocab_size, tokenizer = _whole(value["vocab_size"], "vocab_size"), _of(value["tokenizer"], dict, "tokenizer")
    if not 1 <= vocab_size <= MAX_VOCAB:
        raise ValueError(f"vocab_size is {vocab_size}, expected 1 .. {MAX_VOCAB}")
    _of(tokenizer.get("kind"), str, "the tokenizer's kind")
    itos = tokenizer.get("itos", [])
    if not all(isinstance(text, str) for text in _of(itos, list, "itos")) or len(itos) > vocab_size:
        raise ValueError(f"itos is not a list of at most {vocab_size} strings")
    return Meta(
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        splits=splits,
        source=_of(value.get("source", ""), str, "source"),
        created_by=_of(value.get("created_by", ""), str, "created_by"),
        settings=_of(value.get("settings", {}), dict, "settings"),
    )


def _of(value: Any, wanted: type, what: str) -> Any:
    if isinstance(value, wanted):
        return value
    raise ValueError(f"{what} is {reprlib.repr(value)}, expected {wanted.__name__}")


def _whole(value: Any, what: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    raise ValueError(f"{what} is {reprlib.repr(value)}, expected a whole number >= 0")


def _file_name(value: Any) -> str:
    """meta.json may come from elsewhere: never read outside its folder."""
    name = _of(value, str, "a file's name")
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name or len(os.fsencode(name)) > 255:
        raise ValueError(f"file name {reprlib.repr(name)}, expected a name inside the dataset folder")
    return name


def _from_pickle(path: Path) -> Meta:
    expected = "nanoGPT's dict of vocab_size, itos, stoi"
    try:
        value = read_pickle(read_small(path, MAX_PICKLE))
    except (ValueError, OSError) as error:
        raise _unusable(path, getattr(error, "strerror", None) or str(error), expected) from error
    size = value.get("vocab_size") if isinstance(value, dict) else None
    if not isinstance(size, int) or isinstance(size, bool):
        raise _unusable(path, "no vocab_size in it", expected)
    if not 1 <= size <= MAX_VOCAB:
        raise _unusable(path, f"vocab_size {reprlib.repr(size)}", f"1 .. {MAX_VOCAB}")
    return Meta(vocab_size=size, tokenizer=_tokenizer(value.get("itos"), size), source="nanoGPT meta.pkl")


def _tokenizer(itos: Any, size: int) -> dict[str, Any]:
    """What from_json reads of an itos that has a string for every id; else unknown: nanoGPT trains without one too."""
    texts: list[Any] = list(itos) if isinstance(itos, list | tuple) else []
    if isinstance(itos, dict) and len(itos) == size:
        texts = [itos.get(i) for i in range(size)]
    strings = [text for text in texts if isinstance(text, str)]
    if len(texts) != size or len(strings) != size:
        return {"kind": "unknown"}
    single = len(set(strings)) == size and all(len(text) == 1 for text in strings)
    return {"kind": "char" if single else "strings", "itos": strings}
