"""Set before torch is imported: test tensors are small, and OpenMP threads of several workers would fight for cores.

Without a GPU the Triton ops run in Triton's interpreter, which must be said before Triton is imported; with one their
tests (tests/ops) run compiled on it and carry the marker `gpu`.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
