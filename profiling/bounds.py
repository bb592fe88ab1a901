"""What bounds a compiled kernel: the clocks that an SM's tensor cores, shared memory, special functions, FP32 lanes and
issue slots would each need for what its machine code asks of them (sass.py), how often a launch passes each loop, and
the seconds that follow, beside those of memory and L2.

Each of these is a floor. What an H100 was seen to take is close to a sum (`serial`): the products, and after them a
warp's other instructions one by one, each `warp_clocks` after the one before; other warps of its scheduler fill those
as far as there are any. A loop that only multiplies (a GEMM's over K) hides its instructions under its products.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aot_compile import SYSTEM_SHARED, Compiled
from nanogpt_kernels.launch import Call, cdiv
from nanogpt_kernels.launch_rows import ARCHITECTURES
from sass import LANES, Counts, Sass
from step_launches import triton_launch
from work import EXPONENTIALS_A_CLOCK

from nanogpt_fast.gpus import GPUS

# The card of each architecture of launch_rows.py whose rates the columns of resources.py take.
CARDS = {
    80: "NVIDIA A100-SXM4-80GB",
    86: "NVIDIA A40",
    89: "NVIDIA GeForce RTX 4090",
    90: "NVIDIA H100 80GB HBM3",
    100: "NVIDIA B200",
    120: "NVIDIA GeForce RTX 5090",
}
# Of one SM and clock. CUDA C++ Programming Guide: four schedulers issue one warp's instruction each (compute
# capability 8.x and 9.0); shared memory has 32 banks of 4 bytes; "Throughput of Native Arithmetic Instructions":
# float32 64 on 8.0 and 128 later, special functions 16, shuffles 32. Tensor cores: gpus.py, of the white papers.
SCHEDULERS, SHARED_BYTES, SHUFFLED_LANES = 4, 128, 32
FP32 = {80: 64}  # else 128
# Bytes a clock that L2 gives all SMs together: the A100 white paper's. None is published of an H100; our fused MLP
# reads its operands' tiles at 7.3 TB/s there, 4,500 bytes at 1.6 GHz.
L2_BYTES = {80: 5120, 90: 5120}
BOUNDS = ("tensor", "shared", "special", "float", "issue")


@dataclass(frozen=True)
class Measured:
    """What a GPU was seen to do where its data sheet says more. Of other GPUs nothing is supposed."""

    clock: float  # of its SMs through a training step, Hz
    products: float  # FLOP/s of a step's products by cuBLAS
    bandwidth: float  # bytes/s of a copy
    warp_clocks: float  # from one instruction of a warp to its next, where they do not wait for products


# bench/README.md, 2026-11-27: 1530 to 1680 MHz through a step at the power limit; 685 TFLOP/s; 2.95 TB/s. warp_clocks:
# of 25 tile shapes of attention's three kernels that bench/tune.py timed at c04db68, before the rows that ship were
# chosen, the sum is 17% too fast to 24% too slow at 1.7 GHz (rms 11%), the largest bound 18 to 70% too fast.
MEASURED = {"NVIDIA H100 80GB HBM3": Measured(1.605e9, 685e12, 2.95e12, 5.0)}


def clocks(counts: Counts, warps: float, name: str, copied: float = 0.0) -> dict[str, float]:
    """{bound: clocks of one SM} for `warps` warps, each of which issues `counts`; `copied` bytes come into shared
    memory besides, by TMA. "tensor" is NaN where tensor cores work and the code or gpus.py does not say how much."""
    gpu = GPUS[name]
    multiplies = gpu.flops_a_clock / 2 if gpu.flops_a_clock else math.nan
    known = counts["fma"] > 0 or counts["tensor"] == 0
    lanes = warps * LANES
    return {
        "tensor": warps * counts["fma"] / multiplies if known else math.nan,
        "shared": (warps * counts["shared_bytes"] + copied) / SHARED_BYTES + lanes * counts["shuffle"] / SHUFFLED_LANES,
        "special": lanes * counts["special"] / EXPONENTIALS_A_CLOCK,
        "float": lanes * (counts["float"] + counts["multiply"]) / FP32.get(gpu.capability or 0, 128),
        "issue": warps * counts["instructions"] / SCHEDULERS,
    }


def scaled(counts: Counts, times: float) -> Counts:
    return Counts({name: n * times for name, n in counts.items()})  # fractions too


def blocks_held(c: Compiled, arch: int) -> int:
    """How many blocks of a kernel run on an SM at once. Registers are given out by 256 a warp, shared memory by 128
    bytes (CUDA occupancy calculator)."""
    on = ARCHITECTURES[arch]
    warps = on.registers // (-(-c.registers * 32 // 256) * 256) // 4 * 4
    by_shared = on.shared_kb * 1024 // (-(-c.shared // 128) * 128 + SYSTEM_SHARED)
    return min(on.blocks, on.warps // c.num_warps, warps // c.num_warps, by_shared)


# ---- how often a launch passes each loop ----


@dataclass(frozen=True)
class Trips:
    """Of one loop, in all programs of a launch: iterations; how often what only some iterations pass; bytes that TMA
    brings into shared memory in an iteration."""

    always: float
    sometimes: float = 0.0
    copied: float = 0.0


def _rows(of: Any) -> list[Trips]:
    return [Trips(cdiv(of.M, of.ROWS))]


def _queries(of: Any) -> list[Trips]:
    """Keys up to the diagonal; the tiles on it are masked."""
    tiles = cdiv(of.T, of.BLOCK_M)
    last = [min(of.T, (i + 1) * of.BLOCK_M) for i in range(tiles)]
    on_it = [cdiv(end, of.BLOCK_N) - i * of.BLOCK_M // of.BLOCK_N for i, end in enumerate(last)]
    copied = 2 * of.BLOCK_N * of.D * of.ITEMSIZE if getattr(of, "TMA", False) else 0
    return [Trips(of.heads * sum(cdiv(end, of.BLOCK_N) for end in last), of.heads * sum(on_it), copied)]


def _keys(of: Any) -> list[Trips]:
    """Queries from the diagonal on."""
    all_tiles, tiles = cdiv(of.T, of.BLOCK_M), range(cdiv(of.T, of.BLOCK_N))
    first = [j * of.BLOCK_N // of.BLOCK_M for j in tiles]
    on_it = [min(all_tiles, cdiv((j + 1) * of.BLOCK_N, of.BLOCK_M)) - first[j] for j in tiles]
    return [Trips(of.heads * sum(all_tiles - f for f in first), of.heads * sum(on_it))]


def _gemm(of: Any) -> list[Trips]:
    """Flattened, the epilogue is what only the last step of a tile passes."""
    tiles, steps = cdiv(of.M, of.BLOCK_M) * cdiv(of.N, of.BLOCK_N), cdiv(of.K, of.BLOCK_K)
    copied = (of.BLOCK_M + of.BLOCK_N) * of.BLOCK_K * 2 if of.TMA else 0
    if of.FLATTEN:
        return [Trips(tiles * steps, tiles, copied)]
    return [Trips(tiles, tiles), Trips(tiles * steps, 0, copied)]


def _rows_of_logits(of: Any) -> list[Trips]:
    """Each row: whole tiles and the ragged end for its sum; zeros of ignored rows; the end and whole tiles again for
    its gradient."""
    whole, step = of.valid_vocab // of.BLOCK_V, of.LANES * of.VEC
    ends = [cdiv(width - whole * of.BLOCK_V, step) for width in (of.valid_vocab, of.width)]
    return [Trips(of.M, of.M), *(Trips(of.M * n) for n in (whole, ends[0], 0, ends[1], whole))]


# What is left out here (a few microseconds a step, or as long as the data decides) has only its floor.
TRIPS: dict[str, Callable[[Any], list[Trips]]] = {
    "_norm_fwd_kernel": _rows,
    "_norm_bwd_kernel": _rows,
    "_attention_fwd_kernel": _queries,
    "_attention_bwd_dq_kernel": _queries,
    "_attention_bwd_dkdv_kernel": _keys,
    "_gemm_gelu_fwd_kernel": _gemm,
    "_gemm_gelu_bwd_kernel": _gemm,
    "_bias_gelu_fwd_kernel": lambda of: [],
    "_bias_gelu_bwd_kernel": lambda of: [Trips(cdiv(of.M, of.BLOCK_M) * cdiv(of.N, of.BLOCK_N))],
    "_cross_entropy_fwd_kernel": _rows_of_logits,
    "_adamw_kernel": lambda of: [],
    "_grad_norm_partial_kernel": lambda of: [Trips(cdiv(of.N, of.BLOCK))],
    "_embedding_fwd_kernel": lambda of: [],
    "_embedding_bwd_kernel": lambda of: [],
    "_embedding_bwd_positions_kernel": lambda of: [Trips(of.programs * cdiv(of.B, of.SEQUENCES))],
}


class _Arguments:
    """A call's, by name; `programs` of its grid."""

    def __init__(self, call: Call):
        names = [p.name for p in call.kernel.params]
        vars(self).update(zip(names, call.args))
        vars(self).update(call.options)
        self.programs = math.prod(call.grid)


def trips_of(call: Call, sass: Sass) -> list[Trips] | None:
    """Of each of the kernel's loops; None where nobody knows: documents skip tiles, dropout has two loops."""
    of, known = _Arguments(call), TRIPS.get(call.kernel.__name__)
    if known is None or getattr(of, "DROPOUT", False) or getattr(of, "DOCUMENTS", False):
        return None
    found = known(of)
    return found if len(found) == len(sass.loops) else None


# ---- a launch ----


@dataclass(frozen=True)
class Executed:
    """All that the warps of a launch issue together, how many of the instructions wait for products or have none, and
    the bytes that TMA copies."""

    counts: Counts
    dependent: float
    copied: float


def executed(call: Call, sass: Sass, warps: int) -> Executed | None:
    """None where the trips are not known."""
    trips = trips_of(call, sass)
    if trips is None:
        return None
    parts = [(sass.straight, math.prod(call.grid))]
    for loop, n in zip(sass.loops, trips):
        parts += [(loop.always, n.always), (loop.sometimes, n.sometimes)]
    counts = sum((scaled(part, warps * n) for part, n in parts), Counts())
    dependent = sum(part["instructions"] * warps * n for part, n in parts if not only_multiplies(part))
    return Executed(counts, dependent, sum(n.always * n.copied for n in trips))


def only_multiplies(counts: Counts) -> bool:
    return counts["tensor"] > 0 and counts["float"] + counts["special"] == 0


def resident_warps(c: Compiled, programs: int, arch: int) -> float:
    """Of one scheduler: programs that fit, or fewer where the launch has no more."""
    return min(blocks_held(c, arch), math.ceil(programs / ARCHITECTURES[arch].sms)) * c.num_warps / SCHEDULERS


def sheet_clock(name: str) -> float:
    """Hz at which a data sheet's peak is reached."""
    gpu = GPUS[name]
    assert gpu.flops_a_clock, name
    return gpu.tflops * 1e12 / (gpu.sms * gpu.flops_a_clock)


def seconds(done: Executed, resident: float, name: str, bytes_moved: float) -> dict[str, float]:
    """{bound: seconds of a launch on the whole GPU}. Where it has been measured, at its clock, with `serial`."""
    gpu, measured = GPUS[name], MEASURED.get(name)
    clock = measured.clock if measured else sheet_clock(name)
    a_clock = gpu.sms * clock
    found = {bound: n / a_clock for bound, n in clocks(done.counts, 1, name, done.copied).items()}
    found["memory"] = bytes_moved / (measured.bandwidth if measured else gpu.gbps * 1e9)
    if gpu.capability in L2_BYTES:
        found["L2"] = (done.counts["asked_bytes"] + done.copied) / L2_BYTES[gpu.capability] / clock
    if measured:
        waits = max(1.0, measured.warp_clocks / resident)
        found["serial"] = found["tensor"] + done.dependent / SCHEDULERS * waits / a_clock
    return found


def largest(bounds: dict[str, float]) -> tuple[str, float]:
    """The bound, and how much; NaN never is."""
    return max(((name, n) for name, n in bounds.items() if not math.isnan(n)), key=lambda pair: pair[1])


# ---- a kernel ----


def an_iteration(call: Call, c: Compiled, sass: Sass, name: str) -> dict[str, float]:
    """{bound: clocks of one SM} that one program needs for an iteration of its hot loop, or for all of itself where it
    has none. "memory": its share of the bytes that the launch must move, where the number of iterations is known."""
    hot, trips = sass.hot, trips_of(call, sass)
    number, copied = math.prod(call.grid) if hot is None else math.nan, 0.0
    if hot and trips:
        at = trips[sass.loops.index(hot)]
        number, copied = at.always, at.copied
    found = clocks(hot.always if hot else sass.total, c.num_warps, name, copied)
    gpu = GPUS[name]
    an_sm = gpu.gbps * 1e9 / gpu.sms / sheet_clock(name)
    return found | {"memory": triton_launch(call).work.bytes / number / an_sm if number else math.nan}
