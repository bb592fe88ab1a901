"""Set before torch is imported: test tensors are small, and several workers' OpenMP threads would fight over two cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
