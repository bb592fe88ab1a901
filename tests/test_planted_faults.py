"""Would the suite notice? Each fault of a table is planted alone in a copy of the tree, and its tests must fail there.

A row whose old text stands there no more, or twice, fails too: mend it, or drop it with what it was about.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What the tests need.
TREE = ("nanogpt_fast", "kernels", "bench", "profiling", "tests", "configs", "docs", "pyproject.toml", "setup.py")
TABLE = ROOT / "tests/helpers/planted_faults.toml"
FAILED = 1  # pytest's exit code for tests that failed; 2 to 5 say that they did not run

pytestmark = pytest.mark.slow


class Fault(NamedTuple):
    """old, which stands once in the file, becomes new; then one of `tests`, pytest's arguments, must fail."""

    what: str
    old: str
    new: str
    tests: str


ROWS = [(file, Fault(**row)) for file, rows in tomllib.loads(TABLE.read_text()).items() for row in rows]


def copy_tree(to: Path) -> None:
    """Files of its own, with their times, so that what Python compiled of them holds too."""
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("*.egg-info", "*.json.tmp"))
        else:
            shutil.copy2(ROOT / name, to / name)


def plant(file: Path, old: str, new: str) -> None:
    """Replace old, which must stand there once."""
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file.name} has {text.count(old)} times: {old}"
    file.write_text(text.replace(old, new), encoding="utf-8")
    Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)


def run(tests: list[str], tree: Path) -> subprocess.CompletedProcess[str]:
    """pytest of these tests in the tree, with the tree's packages before all installed ones."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, (tree, tree / "kernels"))), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    return subprocess.run(command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(("file", "fault"), ROWS, ids=[f"{Path(file).stem}: {fault.what}" for file, fault in ROWS])
def test_a_planted_fault_is_found(file: str, fault: Fault, tmp_path: Path):
    copy_tree(tmp_path)
    plant(tmp_path / file, fault.old, fault.new)
    done = run(shlex.split(fault.tests), tmp_path)
    assert done.returncode == FAILED, done.stdout[-2000:]


@pytest.mark.timeout(3600)
def test_without_a_fault_the_same_tests_pass(tmp_path: Path):
    """Else the rows would prove nothing. One process a file, for all that rows want of it."""
    copy_tree(tmp_path)
    wanted: dict[str, set[str]] = {}
    for _, fault in ROWS:
        files, _, names = fault.tests.partition(" -k ")
        wanted.setdefault(files, set()).add(names.strip("'"))
    for files, names in wanted.items():
        chosen = [] if "" in names else ["-k", " or ".join(f"({name})" for name in sorted(names))]
        done = run([*files.split(), *chosen], tmp_path)
        assert done.returncode == 0, f"{files}\n{done.stdout[-2000:]}"
