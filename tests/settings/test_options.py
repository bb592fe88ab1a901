"""Fields as options: sections, marks and types found, and raw values converted by one set of rules."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from tyro.conf import Positional, arg

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.settings.config import SECTION_OF, Config
from nanogpt_fast.settings.options import Option, options_of


@dataclass(frozen=True, kw_only=True)
class Command:
    name: Positional[Annotated[str, arg(metavar="NAME")]]
    more: Positional[tuple[Path, ...]] = ()
    limit: int | None = None
    label: str | None = None
    where: Path = Path("x")


def option(kind: Any) -> Option:
    return Option("key", kind, "", positional=False, required=False, metavar="KEY")


def test_options_of_the_configuration_are_its_flat_names_and_sections():
    assert {name: found.section for name, found in options_of(Config).items()} == SECTION_OF
    assert not any(found.positional or found.required for found in options_of(Config).values())


def test_marks_are_taken_off_the_types():
    found = options_of(Command)
    assert {name: (o.kind, o.positional, o.required, o.repeats) for name, o in found.items()} == {
        "name": (str, True, True, False),
        "more": (tuple[Path, ...], True, False, True),
        "limit": (int | None, False, False, False),
        "label": (str | None, False, False, False),
        "where": (Path, False, False, False),
    }


@pytest.mark.parametrize(
    "kind, raw, value",
    [
        (int | None, "None", None), (int | None, "1e3", 1000), (str | None, "None", None), (str | None, "x", "x"),
        (Literal["a", "b"], "b", "b"), (Literal[1, 2], "2", 2), (Path, "a/b", "a/b"), (float, " 3 ", 3.0),
        (int, "12345678901234567890", 12345678901234567890), (bool, "'True'", True),
    ],
)  # fmt: skip
def test_text_becomes_the_type(kind, raw, value):
    assert option(kind).value(raw, "here", from_text=True) == value


@pytest.mark.parametrize(
    "kind, raw, value",
    [(int | None, None, None), (float, 3, 3.0), (int, 3.0, 3), (bool, 0, False), (bool, True, True), (str, "1", "1")],
)
def test_a_typed_value_becomes_the_type(kind, raw, value):
    got = option(kind).value(raw, "here", from_text=False)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "kind, raw, from_text, expected",
    [
        (int | None, "few", True, "a whole number, as 12 or 1e5 or None"), (int, "1e999", True, "a whole number"),
        (int, "9" * 5000, True, "a whole number"), (int, "", True, "a whole number"), (float, "1,5", True, "a number"),
        (bool, "2", True, "True or False"), (bool, 0.5, False, "True or False"), (bool, "True", False, "True or False"),
        (float, True, False, "a number"), (float, "3", False, "a number"), (float, 10**400, False, "a number"),
        (str, None, False, "text"), (str, 3, False, "text"), (int | None, "None", False, "or None"),
        (Literal["a", "b"], "c", True, "one of a, b"), (Literal[1, 2], "3", True, "one of 1, 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_what_would(kind, raw, from_text, expected):
    with pytest.raises(ConfigError, match="wrong value for --key") as caught:
        option(kind).value(raw, "x.toml", from_text=from_text)
    assert expected in caught.value.expected and caught.value.where == "x.toml"
    assert len(caught.value.found) <= 200
