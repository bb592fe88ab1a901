"""docs/faults.md promises nothing without a test: every one that it names is there."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = (TESTS.parent / "docs/faults.md").read_text()


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"\b((?:\w+/)*test_\w+\.py)(?:::(\w+))?", PAGE)
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (TESTS / path).is_file() or (name and f"\ndef {name}(" not in (TESTS / path).read_text())
    ]
    assert len(named) > 60 and not missing


def test_every_promise_names_one():
    promises = PAGE.partition("\n## 10.")[0].splitlines()  # what follows is about others
    rows = [line for line in promises if line.startswith("| ") and "what is promised" not in line]
    assert len(rows) > 40 and not [row for row in rows if "test_" not in row.rsplit("|", 2)[1]]
