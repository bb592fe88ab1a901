"""Set before torch is imported: test tensors are small, and OpenMP threads of several workers would fight for cores.

Without a GPU the Triton ops run in Triton's interpreter, which must be said before Triton is imported; with one their
tests run compiled on it and carry the marker `gpu`.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of files that import kernel_case are GPU tests where there is a GPU."""
    if torch.cuda.is_available():
        for item in items:
            if hasattr(getattr(item, "module", None), "kernel_case"):
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def few_multiprocessors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a GPU, op tests see eight multiprocessors, as in the interpreter: else no small shape makes a persistent
    program take a second tile."""
    if torch.cuda.is_available() and hasattr(request.module, "kernel_case"):
        from nanogpt_kernels import launch

        major, minor = torch.cuda.get_device_capability()
        monkeypatch.setattr(launch, "_cuda_properties", lambda index: (10 * major + minor, launch.INTERPRETER_SMS))
    yield
