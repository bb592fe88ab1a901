"""All tests of this folder run the Triton ops: on a GPU where there is one, and then they are GPU tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        for item in items:  # of every folder: a conftest's hook sees the whole session
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a GPU they see eight multiprocessors, as in the interpreter: else no small shape makes a persistent program
    take a second tile."""
    if torch.cuda.is_available():
        from nanogpt_kernels import launch

        major, minor = torch.cuda.get_device_capability()
        monkeypatch.setattr(launch, "_cuda_properties", lambda index: (10 * major + minor, launch.INTERPRETER_SMS))
    yield
