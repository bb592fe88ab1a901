"""Where kernels are launched from, and with which shapes.

A launch shape (tile sizes, warps, stages) is a frozen row of TABLE, chosen by op, architecture, element size and
problem size; its `source` says what measured it. Nothing is tuned while training: autotuning breaks graph capture, and
picks differently on each rank. `python bench/tune.py OP` searches offline and prints rows to paste here.

On tensors without data (device "meta", or fake ones under torch.compile) nothing is launched: `recording` collects such
launches instead, so that every kernel can be compiled where there is no GPU, exactly as it would be called.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanogpt_kernels.contract import require

UNMEASURED = "from resources, unmeasured"
INTERPRETER_ARCH = 90  # whose rows the interpreter takes
INTERPRETER_SMS = 8
SMS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}  # A100, A10/3090 class, 4090, H100 SXM, B200, 5090


@dataclass(frozen=True)
class Row:
    """One launch shape. It serves `arch` and later ones up to the next listed, elements up to `itemsize` bytes and
    problems up to `up_to` (each op's docstring says what it counts)."""

    arch: int
    blocks: dict[str, int]
    num_warps: int
    num_stages: int = 1
    itemsize: int = 4
    up_to: int = 2**62
    choices: dict[str, Any] = field(default_factory=dict)  # of the host: which path, how many programs an SM
    source: str = UNMEASURED


_GEMM_128 = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8)
_GEMM_256 = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8)
_STRIP = dict(BLOCK_M=8, BLOCK_N=256)
_CUBLAS = dict(fused=False, programs_per_sm=1, least_rows=2048)
_SPLIT = dict(keys_a_split=128)  # one token of GPT-2 124M at position 1023 has 12 heads: 96 programs

TABLE: dict[str, tuple[Row, ...]] = {
    # the optimizer: up_to is the number of parameters; BLOCK elements a tile
    "grad_norm": (Row(80, dict(BLOCK=4096), num_warps=8, choices=dict(programs_per_sm=4)),),
    "adamw": (Row(80, dict(BLOCK=2048), num_warps=8),),
    # embedding: up_to is C; SEQUENCES of the batch, RUN sorted rows or PIECES of them a tile
    "embedding_fwd": (Row(80, dict(SEQUENCES=8, BLOCK_C=256), num_warps=4),),
    "embedding_bwd": (Row(80, dict(RUN=64, BLOCK_C=64), num_warps=8),),
    "embedding_bwd_pieces": (Row(80, dict(PIECES=16, BLOCK_C=128), num_warps=4),),
    "embedding_bwd_positions": (Row(80, dict(SEQUENCES=8, BLOCK_C=256), num_warps=4),),
    # norm and add_norm: up_to is C; a row in pieces of BLOCK_C columns, ROWS rows a tile (more where C < BLOCK_C).
    # Pieces, not a power of two: at C = 768 on sm_90 add_norm takes 398 warp instructions a row (884 with 1024 lanes),
    # backward 484 (960); with dropout 887 (1604) and 1008 (1696). At 3.35 TB/s an H100 has time for about 1,700.
    "norm_fwd": (
        Row(80, dict(ROWS=1, BLOCK_C=256), num_warps=1, itemsize=2, up_to=768, choices=dict(programs_per_sm=12)),
        Row(80, dict(ROWS=1, BLOCK_C=256), num_warps=1, up_to=768, choices=dict(programs_per_sm=12)),
        Row(80, dict(ROWS=1, BLOCK_C=512), num_warps=2, itemsize=2, up_to=1024, choices=dict(programs_per_sm=10)),
        Row(80, dict(ROWS=1, BLOCK_C=256), num_warps=2, up_to=1280, choices=dict(programs_per_sm=8)),
        Row(80, dict(ROWS=1, BLOCK_C=256), num_warps=2, up_to=2048, choices=dict(programs_per_sm=6)),
        Row(80, dict(ROWS=1, BLOCK_C=2048), num_warps=16, up_to=8192, choices=dict(programs_per_sm=1)),
    ),
    "norm_bwd": (
        Row(80, dict(ROWS=4, BLOCK_C=256), num_warps=4, up_to=768, choices=dict(programs_per_sm=2)),
        Row(80, dict(ROWS=2, BLOCK_C=256), num_warps=4, up_to=1280, choices=dict(programs_per_sm=2)),
        Row(80, dict(ROWS=1, BLOCK_C=512), num_warps=4, up_to=2048, choices=dict(programs_per_sm=3)),
        Row(80, dict(ROWS=1, BLOCK_C=2048), num_warps=8, up_to=8192, choices=dict(programs_per_sm=1)),
    ),
    # column_sums: up_to is the longest vector's C. About a program an SM (144 for the norm's three of GPT-2 124M), its
    # first 384 or 192 rows in flight at once: latency bounds such a launch, not its 2.4 MB from L2
    "column_sums": (
        Row(80, dict(ROWS=128, BLOCK_C=16), num_warps=8, num_stages=4, up_to=2048),
        Row(80, dict(ROWS=64, BLOCK_C=32), num_warps=4, num_stages=4),
    ),
    # dropout_add: up_to is C
    "dropout_add": (Row(80, dict(ROWS=8, BLOCK_C=256), num_warps=4, choices=dict(programs_per_sm=8)),),
    # bias_gelu: up_to is N
    "bias_gelu_fwd": (Row(80, dict(BLOCK_M=16, BLOCK_N=256), num_warps=4),),
    # as many programs as their registers leave resident at once (72 and 96; where act is rebuilt 95 and 122)
    "bias_gelu_bwd": (
        Row(80, _STRIP, num_warps=4, itemsize=2, choices=dict(programs_per_sm=7, rebuilding_per_sm=5)),
        Row(80, _STRIP, num_warps=4, itemsize=4, choices=dict(programs_per_sm=5, rebuilding_per_sm=4)),
    ),
    # mlp: up_to is C. fused: the GEMM with GELU in its epilogue, from least_rows rows on, not cuBLAS and an elementwise
    # pass. It saves one pass over [M, F] forward and two backward: by 3.0 TB/s and the H100 GEMM rates of 640 to 740
    # TFLOP/s expected at C = 768 to 1600, it pays from 78 to 87% of cuBLAS's rate on, backward from 64 to 76%. Counting
    # sm_90's instructions, 128x256 tiles by 8 warps reach at best 55 to 72% of the peak forward and 47 to 65% backward,
    # as nothing covers their epilogue; of 128x128 by 4 warps two programs share an SM. So cuBLAS, until it is timed.
    "mlp_fwd": (
        Row(80, _GEMM_128, num_warps=8, num_stages=3, itemsize=2, choices=_CUBLAS),
        Row(90, _GEMM_128, num_warps=4, num_stages=3, itemsize=2, choices=_CUBLAS | dict(programs_per_sm=2)),
        Row(100, _GEMM_256, num_warps=8, num_stages=3, itemsize=2, choices=_CUBLAS),
        Row(120, _GEMM_128, num_warps=8, num_stages=2, itemsize=2, choices=_CUBLAS),
    ),
    "mlp_bwd": (
        Row(80, _GEMM_128, num_warps=8, num_stages=3, itemsize=2, choices=_CUBLAS),
        Row(90, _GEMM_128, num_warps=4, num_stages=3, itemsize=2, choices=_CUBLAS | dict(programs_per_sm=2)),
        Row(100, _GEMM_256, num_warps=8, num_stages=3, itemsize=2, choices=_CUBLAS),
        Row(120, _GEMM_128, num_warps=8, num_stages=2, itemsize=2, choices=_CUBLAS),
    ),
    # cross_entropy: up_to is V; a program takes a row in tiles of BLOCK_V; chunk_rows rows of logits exist at a time.
    # 64 registers leave room for two programs an SM, whose rows of 100 KB L2 holds until they are read again
    "cross_entropy": (
        Row(80, dict(BLOCK_V=1024), num_warps=4, itemsize=2, up_to=4096, choices=dict(chunk_rows=8192)),
        Row(80, dict(BLOCK_V=8192), num_warps=16, itemsize=2, choices=dict(chunk_rows=8192)),
        Row(80, dict(BLOCK_V=1024), num_warps=4, up_to=4096, choices=dict(chunk_rows=8192)),
        Row(80, dict(BLOCK_V=4096), num_warps=16, choices=dict(chunk_rows=8192)),
    ),
    # attention: up_to is D; dropout and documents need registers, hence rows of their own. On sm_90 4 warps have 64
    # rows of their own (in dK, dV: keys): sharing them they make QK^T and dP twice, 1.4 to 2 times the products
    "attention_fwd": (
        Row(80, dict(BLOCK_M=64, BLOCK_N=32), num_warps=8, num_stages=2, up_to=64),
        Row(80, dict(BLOCK_M=32, BLOCK_N=16), num_warps=8, num_stages=2, up_to=128),
        Row(80, dict(BLOCK_M=128, BLOCK_N=64), num_warps=4, num_stages=3, itemsize=2, up_to=64),
        Row(80, dict(BLOCK_M=128, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(86, dict(BLOCK_M=64, BLOCK_N=64), num_warps=4, num_stages=3, itemsize=2, up_to=64),
        Row(86, dict(BLOCK_M=128, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        # 8 warps within 128 registers: two programs an SM, so that exponentials of one run under products of the other
        Row(90, dict(BLOCK_M=128, BLOCK_N=64), num_warps=8, num_stages=3, itemsize=2, up_to=64),
        Row(90, dict(BLOCK_M=128, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(100, dict(BLOCK_M=128, BLOCK_N=64), num_warps=4, num_stages=3, itemsize=2, up_to=64),
        Row(100, dict(BLOCK_M=128, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(120, dict(BLOCK_M=64, BLOCK_N=64), num_warps=4, num_stages=3, itemsize=2, up_to=64),
        Row(120, dict(BLOCK_M=128, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
    ),
    "attention_fwd_masked": (
        Row(80, dict(BLOCK_M=32, BLOCK_N=32), num_warps=4, num_stages=2, up_to=64),
        Row(80, dict(BLOCK_M=32, BLOCK_N=16), num_warps=8, up_to=128),
        Row(80, dict(BLOCK_M=64, BLOCK_N=64), num_warps=4, num_stages=3, itemsize=2, up_to=64),
        Row(80, dict(BLOCK_M=64, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(90, dict(BLOCK_M=64, BLOCK_N=64), num_warps=4, num_stages=3, itemsize=2, up_to=64),
        Row(90, dict(BLOCK_M=128, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(100, dict(BLOCK_M=64, BLOCK_N=32), num_warps=4, num_stages=3, itemsize=2, up_to=64),
        Row(100, dict(BLOCK_M=64, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
    ),
    # attention_bwd: up_to is D. Its form is a choice of the first row: atomic has 5 products, not 7, but clears, adds
    # to and reads a float32 dQ [B, H, T, D]. Deterministic until a GPU has timed both.
    "attention_bwd": (Row(80, {}, num_warps=4, choices=dict(atomic=False)),),
    "attention_bwd_rows": (Row(80, dict(ROWS=64), num_warps=4),),
    "attention_bwd_dq": (
        Row(80, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, up_to=64),
        Row(80, dict(BLOCK_M=16, BLOCK_N=16), num_warps=8, up_to=128),
        Row(80, dict(BLOCK_M=128, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(80, dict(BLOCK_M=64, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(90, dict(BLOCK_M=64, BLOCK_N=64), num_warps=4, num_stages=3, itemsize=2, up_to=64),  # three an SM, not one
        Row(90, dict(BLOCK_M=64, BLOCK_N=64), num_warps=4, num_stages=2, itemsize=2, up_to=128),
        Row(100, dict(BLOCK_M=128, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(100, dict(BLOCK_M=64, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
    ),
    "attention_bwd_dq_masked": (
        Row(80, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, up_to=64),
        Row(80, dict(BLOCK_M=16, BLOCK_N=16), num_warps=8, up_to=128),
        Row(80, dict(BLOCK_M=128, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(80, dict(BLOCK_M=64, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(90, dict(BLOCK_M=128, BLOCK_N=32), num_warps=8, num_stages=3, itemsize=2, up_to=64),
        Row(90, dict(BLOCK_M=128, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(120, dict(BLOCK_M=128, BLOCK_N=32), num_warps=8, itemsize=2, up_to=64),
        Row(120, dict(BLOCK_M=64, BLOCK_N=32), num_warps=8, itemsize=2, up_to=128),
    ),
    "attention_bwd_dkdv": (
        Row(80, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, up_to=64),
        Row(80, dict(BLOCK_M=16, BLOCK_N=32), num_warps=8, up_to=128),
        Row(80, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(80, dict(BLOCK_M=32, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(90, dict(BLOCK_M=64, BLOCK_N=128), num_warps=8, num_stages=3, itemsize=2, up_to=64),
        Row(90, dict(BLOCK_M=16, BLOCK_N=128), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(120, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(120, dict(BLOCK_M=32, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
    ),
    "attention_bwd_dkdv_masked": (
        Row(80, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, up_to=64),
        Row(80, dict(BLOCK_M=32, BLOCK_N=16), num_warps=4, up_to=128),
        Row(80, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, itemsize=2, up_to=64),
        Row(80, dict(BLOCK_M=32, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(90, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, num_stages=3, itemsize=2, up_to=64),
        Row(90, dict(BLOCK_M=16, BLOCK_N=128), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(100, dict(BLOCK_M=64, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(100, dict(BLOCK_M=16, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(120, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, itemsize=2, up_to=64),
        Row(120, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
    ),
    "attention_bwd_atomic": (
        Row(80, dict(BLOCK_M=32, BLOCK_N=32), num_warps=4, up_to=32),
        Row(80, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, up_to=64),
        Row(80, dict(BLOCK_M=16, BLOCK_N=32), num_warps=8, up_to=128),
        Row(80, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(80, dict(BLOCK_M=32, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(90, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, num_stages=3, itemsize=2, up_to=64),
        Row(90, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(120, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(120, dict(BLOCK_M=32, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
    ),
    "attention_bwd_atomic_masked": (
        Row(80, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, up_to=64),
        Row(80, dict(BLOCK_M=16, BLOCK_N=32), num_warps=8, up_to=128),
        Row(80, dict(BLOCK_M=32, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(80, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(90, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, num_stages=3, itemsize=2, up_to=64),
        Row(90, dict(BLOCK_M=16, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),  # twice: others spill
        Row(120, dict(BLOCK_M=32, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(120, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
    ),
    # cached_attention: up_to is T, the new tokens; a program takes keys_a_split of the cached keys
    "cached_attention": (
        Row(80, dict(BLOCK_M=16, BLOCK_N=16), num_warps=8, choices=_SPLIT),
        Row(80, dict(BLOCK_M=16, BLOCK_N=32), num_warps=4, num_stages=4, itemsize=2, up_to=16, choices=_SPLIT),
        Row(80, dict(BLOCK_M=64, BLOCK_N=32), num_warps=4, num_stages=2, itemsize=2, choices=_SPLIT),
    ),
}


@dataclass(frozen=True)
class Call:
    """A launch that was recorded instead of made."""

    op: str
    kernel: Any
    grid: tuple[Any, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


class Recording(list[Call]):
    """The launches recorded so far; `rows` are those of TABLE that they took: (op, row as it stands there)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, Row]] = []


_overrides: dict[str, dict[str, Any]] = {}
_recorded: Recording | None = None
_recorded_arch = INTERPRETER_ARCH


def pick(op: str, x: Tensor, size: int) -> Row:
    """The row for an op on x's device: nearest architecture from below, then the smallest itemsize and up_to that
    suffice."""
    row, fields = _fitting(op, x, size), _overrides.get(op)
    if _recorded is not None:
        _recorded.rows.append((op, row))
    if fields is None:
        return row
    merged = {name: getattr(row, name) | fields[name] for name in ("blocks", "choices") if name in fields}
    return replace(row, **(fields | merged))


def _fitting(op: str, x: Tensor, size: int) -> Row:
    arch = architecture(x.device)
    rows = [row for row in TABLE[op] if row.itemsize >= x.element_size() and row.up_to >= size]
    require(bool(rows), op, f"no launch shape for size {size} with elements of {x.element_size()} bytes", x=x)
    known = [row.arch for row in rows if row.arch <= arch]
    require(bool(known), op, f"needs compute capability {min(r.arch for r in rows) / 10} or later", x=x)
    if arch not in SMS:
        _say_unlisted(arch, max(known))
    return min((row for row in rows if row.arch == max(known)), key=lambda row: (row.itemsize, row.up_to))


@cache
def _say_unlisted(arch: int, borrowed: int) -> None:
    warnings.warn(f"sm_{arch} is not listed in nanogpt_kernels/launch.py: taking sm_{borrowed}'s shapes", stacklevel=3)


@cache
def _cuda_properties(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def architecture(device: torch.device) -> int:
    """Compute capability as in sm_90: 90. Without a GPU, the recorded architecture or the interpreter's."""
    return _cuda_properties(device.index or 0)[0] if device.type == "cuda" else _recorded_arch


def sm_count(device: torch.device) -> int:
    """Multiprocessors of the device: the number of programs that run at once is a multiple of it."""
    if device.type == "cuda":
        return _cuda_properties(device.index or 0)[1]
    return SMS[_recorded_arch] if _recorded is not None else INTERPRETER_SMS


def launch(op: str, kernel: Any, grid: tuple[Any, ...], *args: Any, row: Row | None = None, **constexprs: Any) -> None:
    """kernel[grid](*args, **row.blocks, **constexprs), on the device of the first tensor or descriptor of one in args.

    An empty grid launches nothing. FP fusion is said explicitly: its default changes in Triton 3.10.
    """
    x = next(a.base if isinstance(a, TensorDescriptor) else a for a in args if isinstance(a, Tensor | TensorDescriptor))
    options = dict(constexprs)
    if row is not None:
        options = {**row.blocks, **constexprs, "num_warps": row.num_warps, "num_stages": row.num_stages}
    options["enable_fp_fusion"] = True
    if x.device.type == "meta" or isinstance(x, FakeTensor):
        if _recorded is not None:
            _recorded.append(Call(op, kernel, grid, args, options))
        return
    if 0 in grid:
        return
    if x.device.type == "cuda":
        with torch.cuda.device(x.device):
            kernel[grid](*args, **options)
        return
    require(
        not isinstance(kernel, triton.JITFunction),
        op,
        "Triton ops need a CUDA device; elsewhere use nanogpt_kernels.reference (--kernels=reference), or set "
        "TRITON_INTERPRET=1 before Python starts, for tests",
        x=x,
    )
    kernel[grid](*args, **options)


@contextmanager
def override(op: str, **fields: Any) -> Iterator[None]:
    """Within it, `op` takes its row with these fields replaced: for tuning and for tests.

    `blocks` and `choices` replace single entries of the row's; an inner override adds to an outer one.
    """
    before = _overrides.get(op)
    outer = before or {}
    merged = {name: outer[name] | fields[name] for name in ("blocks", "choices") if name in outer and name in fields}
    _overrides[op] = outer | fields | merged
    try:
        yield
    finally:
        if before is None:
            del _overrides[op]
        else:
            _overrides[op] = before


@contextmanager
def recording(arch: int) -> Iterator[Recording]:
    """Within it, launches on meta tensors are collected, with the shapes that sm_`arch` would take."""
    global _recorded, _recorded_arch
    before = _recorded, _recorded_arch
    _recorded, _recorded_arch = Recording(), arch
    try:
        yield _recorded
    finally:
        _recorded, _recorded_arch = before
