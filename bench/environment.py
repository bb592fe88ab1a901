"""The machine as it is: GPU, driver, toolchain, and the two ceilings that everything else is held against.

    python bench/environment.py [--out DIR]

Ceilings are measured: bytes a second of a device-to-device copy (read and written bytes counted), and FLOP/s of one
8192^3 bfloat16 product, on random data (zeros run faster).
"""

import argparse
import importlib.metadata
import shutil
import sys
from pathlib import Path
from typing import Any

import harness
import machine
import torch

from nanogpt_fast.errors import run_command

PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "safetensors", "tyro",
            "liger-kernel", "quack-kernels", "apex", "flash-attn", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
            "nvidia-cublas-cu12", "nvidia-cublas", "nvidia-cuda-nvcc")  # fmt: skip
TOOLS = ("nvcc", "compute-sanitizer", "ncu", "nsys", "cuda-gdb")
SMI = ("name", "driver_version", "vbios_version", "pci.bus_id", "memory.total", "memory.used", "clocks.max.sm",
       "clocks.max.mem", "clocks.sm", "clocks.mem", "power.limit", "power.draw", "temperature.gpu", "mig.mode.current",
       "ecc.mode.current", "compute_mode", "persistence_mode")  # fmt: skip


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
        "ptxas_extra": machine.extra_ptxas() or "not installed",
        "tools": {tool: shutil.which(tool) or "not found" for tool in TOOLS},
    }


def hardware(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "shared_bytes_a_block": properties.shared_memory_per_block_optin,
        "nvidia_smi": {name: machine.smi(name).get(name) for name in SMI},  # one by one: an unknown field fails a query
    }


def ceilings(device: torch.device) -> dict[str, dict[str, float]]:
    """Copy (GB/s) and product (TFLOP/s): median and quartiles of interleaved graph replays."""
    source = torch.randn(1 << 29, device=device)  # 2 GiB
    sink = torch.empty_like(source)
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    pool = torch.cuda.graph_pool_handle()
    calls = {"copy": lambda: sink.copy_(source), "gemm": lambda: torch.mm(a, b, out=c)}
    arms = {name: harness.make_arm([call], pool) for name, call in calls.items()}
    times = {name: harness.summary(ms) for name, ms in harness.interleaved(arms, rounds=15).items()}
    moved, flops = 2 * source.numel() * source.element_size(), 2.0 * n**3
    return {
        "copy_gbps": {"median": moved / times["copy"]["ms"] / 1e6, **times["copy"]},
        "gemm_8192_bfloat16_tflops": {"median": flops / times["gemm"]["ms"] / 1e9, **times["gemm"]},
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="what can be known without a GPU")
    parser.add_argument("--out", type=Path, help="append to DIR/environment.jsonl")
    args = parser.parse_args(argv)
    facts = software()
    if not args.dry_run:
        device = machine.require_cuda("bench/environment.py")
        facts |= hardware(device) | ceilings(device) | machine.gpu_state()
    lines = machine.Lines(args.out and args.out / "environment.jsonl", bench="environment", **machine.machine_facts())
    lines.write(**facts)
    for name, value in (machine.machine_facts() | facts).items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
