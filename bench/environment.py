"""The machine as it is: device, driver, toolchain, and its measured roof, which everything else is held against.

    python bench/environment.py [--device cuda|cpu] [--seconds 12] [--out DIR]
    python bench/environment.py --dry_run          what can be known without a device

One line in DIR/environment.jsonl; roof.py's, of a copy and of matrix products, in DIR/roof.jsonl.
"""

import argparse
import importlib.metadata
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import machine
import roof
import torch

from nanogpt_fast import assembler
from nanogpt_fast.command import run_command

PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "safetensors", "tyro",
            "liger-kernel", "quack-kernels", "apex", "flash-attn", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
            "nvidia-cublas-cu12", "nvidia-cublas", "nvidia-cuda-nvcc", "nvidia-ml-py")  # fmt: skip
TOOLS = ("nvcc", "compute-sanitizer", "ncu", "nsys", "cuda-gdb")


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def software() -> dict[str, Any]:
    """What can be known without a GPU."""
    return {
        "versions": versions(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "ptxas": machine.ptxas(10 * torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 90),
        "ptxas_extra": assembler.extra() or "not installed",
        "tools": {tool: shutil.which(tool) or "not found" for tool in TOOLS},
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """Of the device that computes; a GPU's limits and settings by its driver (nvml.py)."""
    if device.type == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
        return {"cache_bytes": machine.cache_bytes(), "memory_bytes": memory}
    properties = torch.cuda.get_device_properties(device)
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "shared_bytes_a_block": properties.shared_memory_per_block_optin,
        "driver_says": machine.gpu_facts(),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=12.0, help="for the roof; 0 leaves it out")
    parser.add_argument("--config", help="whose products are timed; none leaves them out")
    parser.add_argument("--dry_run", action="store_true", help="what can be known without a device")
    parser.add_argument("--out", type=Path, help="append to DIR/environment.jsonl and DIR/roof.jsonl")
    args = parser.parse_args(argv)
    device = torch.device("cpu")
    if args.device == "cuda" and not args.dry_run:
        device = machine.require_cuda("bench/environment.py")
    ours = machine.machine_facts("" if args.dry_run else args.device)
    facts = {**software(), "load": machine.load_average()}
    if not args.dry_run:
        facts |= {**hardware(device), "state_before": machine.gpu_state()}
    lines = machine.Lines(args.out and args.out / "environment.jsonl", bench="environment", status="ok", **ours)
    lines.write(**facts)
    for name, value in (ours | facts).items():
        print(f"{name}: {value}", flush=True)
    if not args.dry_run and args.seconds > 0.0:
        lines = machine.Lines(args.out and args.out / "roof.jsonl", bench="roof", **ours)
        config = None if args.config == "none" else args.config or roof.CONFIG[args.device]
        print(roof.shown(roof.roof_of(device, None, config, args.seconds, lines)))
        print(f"state after: {machine.gpu_state()}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
