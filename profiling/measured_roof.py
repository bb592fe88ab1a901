"""What a machine can give at most: the data sheet of a listed GPU, else a product and a copy measured in this moment.

A CPU's figures hold for the machine that they are measured on, beside whatever else it does just then.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from work import EXPONENTIALS_A_CLOCK

from nanogpt_fast.files import cpu_name
from nanogpt_fast.gpus import GPUS
from nanogpt_fast.hardware import cpu_multiplies, measure_gemm, peak_flops
from nanogpt_fast.run.tracing import settle

COPY_BYTES = {"cpu": 2**28, "cuda": 2**30, "mps": 2**28}  # far more than caches hold


@dataclass(frozen=True)
class Roof:
    """The rates that a floor divides by; None where nobody knows them."""

    flops: float | None  # of matrix products, FLOP/s
    bandwidth: float | None  # of memory, bytes/s
    source: str
    exp_rate: float = math.inf  # exponentials/s; infinite where they are not counted
    measured: bool = True  # on the machine, not from a data sheet


def sheet_roof(name: str, dtype: str) -> Roof | None:
    """The data sheet's; None for a GPU or a dtype that gpus.py has no peak of."""
    gpu, peak = GPUS.get(name), peak_flops(name, dtype)
    if gpu is None or peak is None:
        return None
    clock = gpu.tflops * 1e12 / (gpu.sms * gpu.flops_a_clock) if gpu.flops_a_clock else None
    exps = EXPONENTIALS_A_CLOCK * gpu.sms * clock if clock else math.inf
    return Roof(peak[0], gpu.gbps * 1e9, f"{peak[1]}, {gpu.gbps:g} GB/s", exps, measured=False)


def roof_of(facts: dict[str, Any]) -> Roof:
    """The roof of the machine that a summary's facts name."""
    name, dtype, here = facts["device_name"], facts["dtype"], torch.device(facts["device"])
    if (sheet := sheet_roof(name, dtype)) is not None:
        return sheet
    if here.type == "cuda":
        same = torch.cuda.is_available() and torch.cuda.get_device_name(here) == name
    else:
        same = here.type != "cpu" or cpu_name() == name
    if not same:
        return Roof(None, None, f"unknown: {name} is not this machine, and no data sheet of it is in gpus.py")
    kind = getattr(torch, dtype)
    flops = measure_gemm(here, kind) if here.type != "cpu" or cpu_multiplies(kind) else None
    bandwidth = copy_bandwidth(here)
    product = f"{flops / 1e9:.0f} GFLOP/s of a large {dtype} product" if flops else f"no product rate of {dtype}"
    return Roof(flops, bandwidth, f"measured: {product}, {bandwidth / 1e9:.1f} GB/s of a copy")


def copying(device: torch.device, byte_count: int) -> Callable[[], Any]:
    """A call that copies so many random bytes within the device's memory: they are read and written."""
    source = torch.randn(byte_count // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_bandwidth(device: torch.device, repeats: int = 7) -> float:
    """Bytes/s read and written by the best of some copies of a tensor that no cache holds."""
    byte_count, best = COPY_BYTES[device.type], math.inf
    copy = copying(device, byte_count)
    for _ in range(repeats):
        settle(device)
        began = time.perf_counter()
        copy()
        settle(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * byte_count / best
