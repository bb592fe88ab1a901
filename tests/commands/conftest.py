"""What the tests of training have in common."""

from pathlib import Path

import pytest
from tiny_run import write_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with data/toy in it, tiny_run's dataset."""
    write_dataset(tmp_path)
    return tmp_path
