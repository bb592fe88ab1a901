"""Set before torch is imported: test tensors are small, and OpenMP threads of several workers would fight for cores.

Without a GPU the Triton ops run in Triton's interpreter, which must be said before Triton is imported; with one their
tests (tests/ops) run compiled on it and carry the marker `gpu`.
"""

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from helpers.ranks import Ranks

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def ranks() -> Iterator["Ranks"]:
    """The process that ranks are forked from."""
    from helpers.ranks import Ranks

    with Ranks() as forking:
        yield forking


@pytest.fixture
def signals_heeded() -> Iterator[None]:
    """SIGINT and SIGHUP as a terminal leaves them. A test run under nohup, or in the background, ignores them, and so
    do its children: whoever sends one asks for this."""
    heeded: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
    if hasattr(signal, "SIGHUP"):
        heeded[signal.SIGHUP] = signal.SIG_DFL
    before = {number: signal.signal(number, handler) for number, handler in heeded.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
