"""FLOPs, peaks and MFU: pure arithmetic, shared by the trainer, bench and profiling.

MFU is (model FLOPs a second) / peak. Two counts of model FLOPs are in use, and both are reported:
  nanogpt  6 N + 12 L H Q T   a token, N without the position embedding, full attention (PaLM, arXiv 2204.02311, app. B)
  llmc     6 N + 6 L C T      a token, all N, causal attention (karpathy/llm.c, train_gpt2.cu)
Of an embedding and a head that are two weights, N holds one: looking up a row multiplies nothing.
"""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nanogpt_fast.gpus import GPUS
from nanogpt_fast.settings.config import GPTConfig

log = logging.getLogger(__name__)
GEMM_SIZE = {"cuda": 8192, "mps": 4096, "cpu": 1024}  # edge of the matrices of measure_gemm
# For how long it repeats at least: an idle GPU takes a while to raise its clocks.
LEAST_PEAK = 1e8  # FLOP/s: a core that emulates bfloat16 gives 8e8 (2.6 s for 1024^3); less is no peak of anything
SETTLE_S = {"cuda": 0.5, "mps": 0.5, "cpu": 0.0}
# The instructions that multiply a dtype, as /proc/cpuinfo names them. Without one of them torch multiplies one by one.
CPU_INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


def flops_per_token(config: GPTConfig) -> dict[str, float]:
    """Model FLOPs of forward and backward a token, by both counts."""
    L, T, C = config.n_layer, config.block_size, config.n_embd
    return {
        "nanogpt": 6.0 * (config.num_params() - config.head_params) + 12.0 * L * C * T,
        "llmc": 6.0 * (config.num_params(non_embedding=False) - config.head_params) + 6.0 * L * C * T,
    }


def cpu_multiplies(dtype: torch.dtype) -> bool | None:
    """Whether this CPU has instructions that multiply the dtype; None where nothing tells (not Linux, not x86)."""
    if dtype not in CPU_INSTRUCTIONS:
        return True
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return None
    return not flags.isdisjoint(CPU_INSTRUCTIONS[dtype]) if "sse2" in flags else None


def peak_flops(device_name: str, dtype: str) -> tuple[float, str] | None:
    """(dense peak FLOP/s, its source) of a GPU by exact name; None for one not listed, for float32, and for bfloat16
    where the chip has none."""
    gpu = GPUS.get(device_name)
    if gpu is None or dtype not in ("bfloat16", "float16") or (dtype == "bfloat16" and not gpu.bfloat16):
        return None
    return gpu.tflops * 1e12, f"{gpu.tflops:g} TFLOP/s dense {dtype} of {device_name} ({gpu.source})"


def gemm(device: torch.device, dtype: torch.dtype) -> Callable[[], float]:
    """A square matrix product; each call runs it and gives its FLOP/s."""
    n = GEMM_SIZE[device.type]
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)

    def run() -> float:
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return 2.0 * n**3 / (time.perf_counter() - began)

    return run


def measure_gemm(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one square matrix product, the best of five and more: what this machine really gives."""
    run, start = gemm(device, dtype), time.perf_counter()
    rates = [run() for _ in range(5)]
    while time.perf_counter() - start < SETTLE_S[device.type]:
        rates.append(run())
    return max(rates)


def resolve_peak(device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """(peak FLOP/s, what it is) that MFU divides by: a CUDA GPU's data sheet; where that says nothing, and on other
    devices, the machine's own measured product, named so; None where nothing can be measured."""
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu" and not cpu_multiplies(dtype):
        return None, f"n/a, this CPU is not known to multiply {name}"  # a product takes seconds: 2.6 s here, AVX2
    if device.type != "cuda":
        flops = measure_gemm(device, dtype)
        if flops < LEAST_PEAK:
            return None, f"n/a, a {name} product gave {flops / 1e9:.2g} GFLOP/s, which is no peak"
        return flops, f"{flops / 1e9:.3g} GFLOP/s, measured {GEMM_SIZE[device.type]}^3 {name} product on {device.type}"
    gpu = torch.cuda.get_device_name(device)
    if known := peak_flops(gpu, name):
        return known
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    product = f"{GEMM_SIZE['cuda']}^3 {name} product{' by TF32' if tf32 else ''} on {gpu}"
    why = f"its row in gpus.py has no {name} peak" if gpu in GPUS else "it is not in gpus.py"
    try:
        flops = measure_gemm(device, dtype)
    except torch.OutOfMemoryError:
        return None, f"unknown: no memory left to measure a {product} ({why}); MFU is n/a"
    return flops, f"{flops / 1e12:.1f} TFLOP/s, measured {product} ({why}): MFU against it"


class Peak:
    """FLOP/s that a run's MFU divides by; None where unknown. With a product, the best that it gives over the run's
    first seconds: one measurement beside other work is too low (27 GFLOP/s, on two cores that gave 146 alone)."""

    SPAN_S, EVERY_S = 5.0, 0.5

    def __init__(
        self,
        flops: float | None,
        source: str,
        product: Callable[[], float] | None = None,
        clock: Callable[[], float] | None = None,
    ):
        self.flops, self.source, self._product = flops, source, product
        self._clock = clock or time.perf_counter
        self._began: float | None = None  # when the first product ran
        self._last = 0.0

    def refine(self) -> float:
        """Run the product once more where that is due; the seconds it took, which are no training."""
        if self._product is None:
            return 0.0
        now = self._clock()
        if self._began is None:
            self._began = now
        elif now - self._last < self.EVERY_S:
            return 0.0
        self.flops, self._last = max(self.flops or 0.0, self._product()), now
        if now - self._began >= self.SPAN_S:
            self._product = None
        return self._clock() - now

    def mfu(self, flops_per_s: float) -> float | None:
        """The share of the peak; None where it is unknown. One above 1 proves the peak wrong: from then on, once no
        product can mend it, it is unknown, and the log says so."""
        if self.flops is None:
            return None
        if flops_per_s <= self.flops:
            return flops_per_s / self.flops
        if self._product is None:
            share = flops_per_s / self.flops
            log.warning("MFU is n/a from here: it would be %.0f%% of %s", share * 100, self.source)
            self.flops = None
        return None


def training_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """resolve_peak for a run: a CPU's is measured while it trains."""
    if device.type != "cpu" or not cpu_multiplies(dtype):
        return Peak(*resolve_peak(device, dtype))
    product = f"{GEMM_SIZE['cpu']}^3 {str(dtype).removeprefix('torch.')} product"
    return Peak(None, f"the best {product} of the first {Peak.SPAN_S:.0f} s", gemm(device, dtype))


def capability_of(device: torch.device) -> int | None:
    """A CUDA device's compute capability, as in sm_90: 90; None for others."""
    if device.type != "cuda" or torch.version.hip:  # AMD's numbers mean something else
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process's tensors may take: free ones and those its allocator holds; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    if found is None:
        return None
    of_machine, of_container = int(found[1]) * 1024, _container_memory()
    return of_machine if of_container is None else min(of_machine, of_container)


def _container_memory() -> int | None:
    """Bytes that the control group of this process may still take (Linux, version 2); None without a limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used
