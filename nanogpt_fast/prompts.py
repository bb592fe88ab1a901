"""What a model is to continue: the text of --start, or the prompts of a file, each with its place for an error."""

import errno
import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from nanogpt_fast.data.text_files import decoded, has_rows, read_chunks, read_rows
from nanogpt_fast.errors import ConfigError, DataError, did_you_mean
from nanogpt_fast.files import read_small

PROMPT_BYTES = 16 << 20  # of a prompt's file; it is held whole


class Prompt(NamedTuple):
    text: str
    where: str  # file and line; "" for --start, which needs no telling


def read_prompt(start: str) -> str:
    """--start, or the text of the file it names: UTF-8, at most PROMPT_BYTES. Raises ConfigError, DataError."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:")).expanduser()
    try:
        return "".join(decoded(io.BytesIO(read_small(path, PROMPT_BYTES)), str(path)))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unreadable(path, error, f"--start={start}") from None


def read_prompts(file: str, field: str) -> list[Prompt]:
    """A file's prompts: its lines, without blank ones and line ends; or `field` of its rows. Raises ConfigError where
    there is no such file, DataError for what is in it."""
    path = Path(file)
    try:
        path.stat()
    except OSError as error:
        raise _unreadable(path, error, f"--prompts={file}") from None
    if has_rows(path):
        found = [Prompt(text, f"{path}, prompt {number}") for number, text in enumerate(read_rows(path, field), 1)]
    else:
        found = [Prompt(text, f"{path}, line {number}") for number, text in enumerate(_lines(path), 1) if text.strip()]
    if not found:
        raise DataError(
            "the file has no prompts",
            where=f"--prompts={file}",
            expected="a prompt a line, or rows with a field that holds one",
            found=f"{path.stat().st_size:,} bytes, no prompt among them",
        )
    return found


def _lines(path: Path) -> Iterator[str]:
    rest = ""
    for chunk in read_chunks(path):
        *whole, rest = (rest + chunk).split("\n")
        yield from whole
    yield rest


def _unreadable(path: Path, error: Exception, where: str) -> ConfigError:
    near = []
    with suppress(OSError, ValueError):
        near = [p.name for p in path.parent.iterdir() if p.name != path.name]
    long = getattr(error, "errno", None) == errno.EFBIG
    return ConfigError(
        f"the prompt file cannot be read{did_you_mean(path.name, near)}",
        where=where,
        found=getattr(error, "strerror", None) or str(error),
        hint="a model sees its last block_size tokens alone: tail -c 100000 FILE > PROMPT" if long else "",
    )
