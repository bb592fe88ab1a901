"""Set before torch is imported: test tensors are small, and OpenMP threads of several workers would fight for cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
