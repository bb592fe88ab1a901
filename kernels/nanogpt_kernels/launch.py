"""Where kernels are launched from: a shape (tile sizes, warps, stages) is picked from launch_rows.py's TABLE.

On tensors without data (device "meta", or fake ones under torch.compile) nothing is launched: `recording` collects such
launches instead, so that every kernel can be compiled where there is no GPU, exactly as it would be called.

`keep` puts measured rows before the TABLE's, each for exactly what it was measured at.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .contract import require
from .launch_rows import ARCHITECTURES, TABLE, Row

INTERPRETER_ARCH = 90  # whose rows the interpreter takes
INTERPRETER_SMS = 8


class Key(NamedTuple):
    """What a launch row is asked for: the element size in bytes; of the problem what its op's rows call up_to."""

    op: str
    arch: int
    itemsize: int
    size: int


@dataclass(frozen=True)
class Call:
    """A launch that was recorded instead of made."""

    op: str
    kernel: Any
    grid: tuple[Any, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


class Recording(list[Call]):
    """The launches recorded so far; `rows` are those that they took, as TABLE or `keep` has them: (op, row); `asked`
    are the same by what each was asked for.

    keep=False drops the launches themselves, which hold their tensors."""

    def __init__(self, keep: bool = True) -> None:
        super().__init__()
        self.rows: list[tuple[str, Row]] = []
        self.asked: dict[Key, Row] = {}
        self.keep = keep


_overrides: dict[str, dict[str, Any]] = {}
_kept: dict[Key, Row] = {}
_recorded: Recording | None = None
_recorded_arch = INTERPRETER_ARCH


def pick(op: str, x: Tensor, size: int) -> Row:
    """The launch row for an op on x's device: a kept one of exactly this architecture, element size and size; else of
    TABLE the nearest architecture from below, then the smallest itemsize and up_to that suffice."""
    key = Key(op, architecture(x.device), x.element_size(), size)
    row = _kept.get(key) if _kept and isinstance(size, int) else None  # a symbol, under torch.compile, has no hash
    row, fields = row or _fitting(op, x, size), _overrides.get(op)
    if _recorded is not None:
        _recorded.rows.append((op, row))
        _recorded.asked[key] = row
    if fields is None:
        return row
    merged = {name: getattr(row, name) | fields[name] for name in ("blocks", "choices") if name in fields}
    return replace(row, **(fields | merged))


def keep(rows: Mapping[Key, Row]) -> None:
    """From here on `pick` takes these rows, in the place of those kept before, where it is asked for exactly their
    keys; {} leaves TABLE alone. ValueError for a row unlike its op's: other blocks or choices, or no launch at all."""
    global _kept
    for key, row in rows.items():
        theirs = [_kinds(listed) for listed in TABLE.get(key.op, ())]
        sizes = (*row.blocks.values(), row.num_stages, 1 if row.max_registers is None else row.max_registers)
        if _kinds(row) not in theirs or row.num_warps not in (1, 2, 4, 8, 16, 32) or any(n < 1 for n in sizes):
            raise ValueError(f"{key.op} is not launched so: {row}")
    _kept = dict(rows)


def _kinds(row: Row) -> dict[str, Any]:
    """What its fields are called and of which type: a row of the same op differs in values alone."""
    return {
        name: type(value) for name, value in (row.blocks | row.choices | vars(row)).items() if name != "max_registers"
    }


def kept() -> dict[Key, Row]:
    """What `keep` was last given."""
    return dict(_kept)


def _fitting(op: str, x: Tensor, size: int) -> Row:
    arch = architecture(x.device)
    rows = [row for row in TABLE[op] if row.itemsize >= x.element_size() and row.up_to >= size]
    require(bool(rows), op, f"no launch shape for size {size} with elements of {x.element_size()} bytes", x=x)
    known = [row.arch for row in rows if row.arch <= arch]
    require(bool(known), op, f"needs compute capability {min(r.arch for r in rows) / 10} or later", x=x)
    if arch not in ARCHITECTURES:
        _say_unlisted(arch, max(known))
    return min((row for row in rows if row.arch == max(known)), key=lambda row: (row.itemsize, row.up_to))


@cache
def _say_unlisted(arch: int, borrowed: int) -> None:
    warnings.warn(
        f"sm_{arch} is not listed in nanogpt_kernels/launch_rows.py: taking sm_{borrowed}'s shapes", stacklevel=3
    )


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
    if _recorded is None:
        return INTERPRETER_SMS
    return ARCHITECTURES[max(arch for arch in ARCHITECTURES if arch <= _recorded_arch)].sms


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Called on the host, triton.cdiv takes 3.9 us (3.7.1, a slow core), this 0.1."""
    return -(-a // b)


def persistent(tiles: int, per_sm: int, device: torch.device, grid_columns: int = 1) -> int:
    """Programs that stride over `tiles`: as many as the GPU runs at once, at most one a tile. A grid of `grid_columns`
    such sets of programs shares the GPU among them."""
    at_once = torch.sym_max(per_sm * sm_count(device) // torch.sym_max(grid_columns, 1), 1)
    return torch.sym_min(tiles, at_once)  # type: ignore[return-value]  # typed for floats too


def describable(t: Tensor) -> bool:
    """Whether TMA and 16-byte loads can address t [rows, columns]: contiguous, base and rows aligned to 16 bytes."""
    if isinstance(t, FakeTensor) or t.numel() == 0:
        return False
    return t.is_contiguous() and t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0


def launch(op: str, kernel: Any, grid: tuple[Any, ...], *args: Any, row: Row | None = None, **constexprs: Any) -> None:
    """kernel[grid](*args, **row.blocks, **constexprs), on the device of the first tensor or descriptor of one in args.

    An empty grid launches nothing. FP fusion is set explicitly: its default changes in Triton 3.10."""
    x = next(a.base if isinstance(a, TensorDescriptor) else a for a in args if isinstance(a, Tensor | TensorDescriptor))
    options = dict(constexprs)
    if row is not None:
        options = {**row.blocks, **constexprs, "num_warps": row.num_warps, "num_stages": row.num_stages}
        if row.max_registers is not None:
            options["maxnreg"] = row.max_registers
    options["enable_fp_fusion"] = True
    if x.device.type == "meta" or isinstance(x, FakeTensor):
        if _recorded is not None and _recorded.keep:
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
def recording(arch: int, keep: bool = True) -> Iterator[Recording]:
    """Within it, launches on meta tensors are collected, with the shapes that sm_`arch` would take."""
    global _recorded, _recorded_arch
    before = _recorded, _recorded_arch
    _recorded, _recorded_arch = Recording(keep), arch
    try:
        yield _recorded
    finally:
        _recorded, _recorded_arch = before
