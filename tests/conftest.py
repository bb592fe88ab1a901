"""Set before torch is imported: test tensors are small, and OpenMP threads of several workers would fight for cores.

Without a GPU the Triton ops run in Triton's interpreter, which must be said before Triton is imported; with one their
tests run compiled on it and carry the marker `gpu`.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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
