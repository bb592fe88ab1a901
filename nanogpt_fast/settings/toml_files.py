"""TOML in and out: a user's file or a preset as a dict, a configuration as text that loads back equal."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import Any

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.files import read_small

MAX_FILE = 1 << 20  # bytes; a whole configuration has about 2,000
MAX_DOTS = 200  # a line; what tomllib takes grows with the square of a key's parts: 1 GB for 16,000, 32 s for 50,000


def read_toml(path: Path) -> dict[str, Any]:
    """Its keys and tables. Raises ConfigError with file and line, OSError if it cannot be read."""
    source = read_small(path, MAX_FILE)
    for number, line in enumerate(source.splitlines(), 1):
        if (dots := line.count(b".")) > MAX_DOTS:
            what = f"a line with {dots:,} dots; {MAX_DOTS} at most are read"
            raise ConfigError(what, where=f"{path}:{number}", expected="KEY = VALUE")
    try:
        return tomllib.loads(source.decode())
    except UnicodeDecodeError as error:
        line = source.count(b"\n", 0, error.start) + 1
        raise ConfigError("the file is not UTF-8 text", where=f"{path}:{line}", expected="TOML") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one, and what int() says of 5000 digits
        place = re.search(r"line (\d+)", str(error))
        line = int(place[1]) if place else source.count(b"\n") + 1  # "(at end of document)"
        what = str(error).partition(";")[0][:200]
        raise ConfigError(f"not valid TOML: {what}", where=f"{path}:{line}", expected="KEY = VALUE") from None


def to_toml(config: Any) -> str:
    """A Config, or a flat dataclass of scalars, as TOML that loads back equal. None is left out: TOML has no null."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    sections = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    rows = [f"{k} = {_value(v)}" for k, v in values.items() if k not in sections and v is not None]
    blocks = ["\n".join(rows)] + [f"[{name}]\n{to_toml(section).rstrip()}" for name, section in sections.items()]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but DEL
