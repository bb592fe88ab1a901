"""Where a task's text is: files that the user has (--source), else the Hugging Face hub. Each with its SHA-256."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nanogpt_fast.data.hub import load
from nanogpt_fast.data.text_files import has_rows, read_chunks, read_rows
from nanogpt_fast.errors import ConfigError, DataError, did_you_mean
from nanogpt_fast.files import open_regular, sha256_of


@dataclass(frozen=True)
class Hub:
    """Rows of a dataset on the Hugging Face hub."""

    repository: str
    subset: str = ""
    split: str = "test"
    revision: str = ""

    def __str__(self) -> str:
        return f"hf:{self.repository} {self.subset}".strip() + f", {self.split}"


@dataclass(frozen=True)
class Wanted:
    """What a task reads."""

    task: str
    files: tuple[str, ...]  # names that its file is known by, the preferred one first
    bring: str  # where people get it
    hub: Hub | None = None
    field: str = "text"  # of the rows


@dataclass(frozen=True)
class Found:
    """A task's file, or the hub's rows of it."""

    wanted: Wanted
    path: Path | None

    def __str__(self) -> str:
        return str(self.path or self.wanted.hub)

    def lines(self) -> list[str]:
        """The lines of a text, or the field of every row. Raises DataError."""
        if self.path is None:
            return [str(row[self.wanted.field]) for row in self.rows]
        if has_rows(self.path):
            return list(read_rows(self.path, self.wanted.field))
        return "".join(read_chunks(self.path)).removesuffix("\n").split("\n")

    def last_bytes(self, count: int) -> bytes:
        """As they are, at most so many."""
        assert self.path, "only files are read by bytes"
        with open_regular(self.path) as file:
            file.seek(max(0, file.seek(0, 2) - count))
            return file.read()

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The hub's rows. Raises DataError where it cannot be reached."""
        hub = self.wanted.hub
        assert hub and self.path is None
        try:
            rows = load(hub.repository, hub.subset, hub.revision, hub.split, streaming=False)
            return [dict(row) for row in rows]
        except DataError as error:
            raise _not_there(self.wanted, f"{error.what}: {error.hint}") from error
        except Exception as error:  # of HTTP, file systems, Arrow: no common base
            first = next(iter(str(error).splitlines()), "")
            raise _not_there(self.wanted, f"{type(error).__name__}: {first}"[:300]) from error

    def sha256(self) -> str:
        if self.path is not None:
            return sha256_of(self.path)
        return hashlib.sha256(json.dumps(self.rows, sort_keys=True).encode()).hexdigest()


class Sources:
    """--source: folders that are searched two levels deep for names that tasks know, and NAME=FILE, with commas."""

    def __init__(self, given: str, tasks: list[str]):
        self.folders: list[Path] = []
        self.named: dict[str, Path] = {}
        for item in filter(None, map(str.strip, given.split(","))):
            name, equals, path = item.partition("=")
            if equals and name not in tasks:
                raise ConfigError(
                    f"--source names a task that --tasks does not{did_you_mean(name, tasks)}",
                    where=f"--source={given}",
                    expected=f"one of {', '.join(tasks)}, or a folder",
                    found=name,
                )
            place = Path(path if equals else item).expanduser()
            if not (place.is_file() if equals else place.is_dir()):
                raise ConfigError(
                    f"--source: there is no such {'file' if equals else 'folder'}",
                    where=f"--source={given}",
                    expected="NAME=FILE for a task's file, or a folder of files, with commas",
                    found=str(place),
                )
            if equals:
                self.named[name] = place
            else:
                self.folders.append(place)

    def find(self, wanted: Wanted) -> Found:
        """The file that was named, one that a folder has, else the hub's. Raises DataError: which file to bring."""
        if path := self.named.get(wanted.task):
            return Found(wanted, path)
        path = next((found for folder in self.folders for name in wanted.files for found in _at(folder, name)), None)
        if path is None and (self.folders or wanted.hub is None):  # a folder was given: nothing is downloaded unasked
            looked = ", ".join(map(str, self.folders))
            raise _not_there(wanted, f"none of them in {looked}" if looked else "no --source")
        return Found(wanted, path)


def _at(folder: Path, name: str) -> Iterator[Path]:
    for pattern in ("", "*/", "*/*/"):
        yield from sorted(path for path in folder.glob(pattern + name) if path.is_file())


def _not_there(wanted: Wanted, found: str) -> DataError:
    return DataError(
        f"the text of task {wanted.task} is not there",
        where=f"--tasks={wanted.task}",
        expected=f"{' or '.join(wanted.files)} ({wanted.bring})",
        found=found,
        hint=f"--source=FOLDER that holds it, or --source={wanted.task}=FILE",
    )
