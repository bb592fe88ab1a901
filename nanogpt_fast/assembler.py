"""Which ptxas assembles the Triton kernels.

Triton 3.6 to 3.8 bundle ptxas 12.8, and versions before 13.3 can corrupt registers of wgmma on Hopper
(triton-lang/triton#11781). The extra `ptxas` (nvidia-cuda-nvcc, 13.3 or later) is taken where it is installed and the
driver loads what it makes: its cubins are CUDA 13's.
"""

import importlib.metadata
import os
import re
import subprocess
from pathlib import Path

WHEEL, LEAST = "nvidia-cuda-nvcc", (13, 3)
ADVICE = "before 13.3 it can corrupt registers of wgmma on Hopper: pip install 'nanogpt-fast[ptxas]'"
VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")  # Triton's own: what they name is left alone


def extra() -> tuple[str, str] | None:
    """(path, version) of the extra's ptxas; None where it is not installed."""
    try:
        wheel = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [str(file.locate()) for file in wheel.files or [] if file.name == "ptxas"]
    return (paths[0], wheel.version) if paths else None


def prefer_extra() -> None:
    """Name the extra's ptxas to Triton, before it compiles anything."""
    found = extra()
    if found is None or not is_new(found[1]) or 0 < driver_cuda() < 13000:
        return
    for variable in VARIABLES:
        os.environ.setdefault(variable, found[0])


def driver_cuda() -> int:
    """CUDA's version by the driver, as in 13000; 0 where there is none."""
    import torch

    return getattr(torch._C, "_cuda_getDriverVersion", int)() if torch.cuda.is_available() else 0


def version_of(path: str | Path) -> str:
    """As in 12.8.93; "" where it does not run."""
    try:
        said = subprocess.run([str(path), "--version"], capture_output=True, text=True, timeout=20.0, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    match = re.search(r"\bV(\d+(?:\.\d+)+)", said)
    return match[1] if match else ""


def is_new(version: str) -> bool:
    """Whether it is one that keeps wgmma's registers."""
    return tuple(int(n) for n in re.findall(r"\d+", version))[:2] >= LEAST
