"""What can be set: the fields of a dataclass as flat options, and a raw value's way into a field's type.

Values come as text from the command line and typed from config files; both meet the same rules and errors here.
"""

import ast
import contextlib
import dataclasses
import os
import re
import types
import typing
from dataclasses import dataclass
from typing import Any

import tyro

from nanogpt_fast.errors import ConfigError, did_you_mean

BOOLS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}

PATHS = {"out_dir", "data_dir", "dataset", "init_from", "source", "file", "out", "vocab_bpe", "src", "runs", "prompts"}
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair: no file and no console takes it
_NAMES = {
    bool: "True or False",
    int: "a whole number, as 12 or 1e5",
    float: "a number, as 3e-4",
    str: "text",
    type(None): "None",
}


@dataclass(frozen=True)
class Option:
    """A field that can be set: its type without tyro's marks, its section ('' in a flat dataclass)."""

    name: str
    kind: Any
    section: str
    positional: bool
    required: bool
    metavar: str  # what stands for its value in a usage line

    def value(self, raw: Any, where: str, *, from_text: bool) -> Any:
        """raw as this field's type. ConfigError names the flag, the type and what was found, with near choices."""
        try:
            value = _convert(self.kind, raw, from_text)
        except (ValueError, OverflowError):
            near = did_you_mean(raw, map(str, _choices(self.kind))) if isinstance(raw, str) else ""
            found = shown(raw) if from_text else f"{shown(raw)} ({type(raw).__name__})"
            raise ConfigError(
                f"wrong value for --{self.name}{near}", where=where, expected=self.expected, found=found[:200]
            ) from None
        return at_home(value, where) if self.name in PATHS and isinstance(value, str) else value

    @property
    def repeats(self) -> bool:
        """True for tuple[X, ...] and list[X]: any number of words."""
        return typing.get_origin(self.kind) in (tuple, list)

    @property
    def expected(self) -> str:
        return _expected(self.kind)


def options_of(cls: Any, section: str = "") -> dict[str, Option]:
    """{flat name: option} over the sections of a nested dataclass, or over the fields of a flat one."""
    hints = typing.get_type_hints(cls, include_extras=True)
    options: dict[str, Option] = {}
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            options |= options_of(kind, field.name)
            continue
        marks = getattr(kind, "__metadata__", ())
        plain = typing.get_args(kind)[0] if marks else kind
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        given = [mark.metavar for mark in marks if getattr(mark, "metavar", None)]
        metavar = (given or ["|".join(map(str, _choices(plain))) or field.name.upper()])[0]
        options[field.name] = Option(field.name, plain, section, tyro.conf.Positional in marks, required, metavar)
    return options


def at_home(path: str, where: str) -> str:
    """A path with ~ as the home folder: a shell leaves it alone in --out_dir=~/x. ConfigError where there is none."""
    if "\0" in path:
        raise ConfigError("no path has a NUL in it", where=where, found=shown(path))
    found = os.path.expanduser(path)
    if found == path and re.match(r"~([/\\]|$)", path):
        raise ConfigError("there is no home folder here", where=f"{where}: {path}", expected="$HOME, or a whole path")
    return found


def shown(raw: Any) -> str:
    """A value for an error's text, shortened."""
    try:
        return repr(raw[:200] if isinstance(raw, str) else raw)[:200]
    except (ValueError, RecursionError):  # an int of thousands of digits, nested lists
        return "a value too long to show"


def _choices(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def _members(kind: Any) -> list[Any]:
    """The types of a union (else none), None first: 'None' is a value of `str | None` before it is text."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return sorted(typing.get_args(kind), key=lambda member: member is not type(None)) if is_union else []


def _expected(kind: Any) -> str:
    if members := _members(kind):
        return " or ".join(_expected(member) for member in reversed(members))
    if choices := _choices(kind):
        return f"one of {', '.join(map(str, choices))}"
    return _NAMES.get(kind) or getattr(kind, "__name__", str(kind))


def _convert(kind: Any, raw: Any, from_text: bool) -> Any:
    """raw as `kind`; ValueError or OverflowError where it is none. Types not named here pass: tyro reads them."""
    for member in (members := _members(kind)):
        with contextlib.suppress(ValueError, OverflowError):
            return _convert(member, raw, from_text)
    text = _unquoted(raw) if from_text else raw
    if choices := _choices(kind):
        matches = [choice for choice in choices if text == choice or (from_text and text == str(choice))]
        return _checked(bool(matches), matches and matches[0])
    if kind is bool:
        word = str(text).lower() if from_text or isinstance(raw, int) else ""
        return _checked(word in BOOLS, BOOLS.get(word))
    if kind in (int, float):
        is_number = isinstance(raw, int | float) and not isinstance(raw, bool)
        return _number(kind, _checked(from_text or is_number, raw))
    if kind is str:
        return _checked(isinstance(text, str) and _HALF.search(text) is None, text)
    if kind is type(None):
        return _checked(text is None or (from_text and text == "None"), None)
    return _checked(not members, raw)


def _checked(ok: bool, value: Any) -> Any:
    if not ok:
        raise ValueError
    return value


def _number(kind: type, raw: str | int | float) -> int | float:
    """int or float of a number or its text; 1e5 and 5.0 are whole, 1.5 is not."""
    if kind is float:
        return float(raw)
    if not isinstance(raw, float):
        with contextlib.suppress(ValueError):
            return int(raw)
    return int(_checked(float(raw).is_integer(), float(raw)))


def _unquoted(text: str) -> str:
    """nanoGPT evaluates values as literals, so --out_dir='"x"' is x there and here. Unquoted text stays."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        with contextlib.suppress(SyntaxError, ValueError):
            literal = ast.literal_eval(text)
            return literal if isinstance(literal, str) else text
    return text
