"""The second stage of a vector's gradient: into[c] = (into[c] +) the sum of partials[:, c], [P, C] float32.

An op's backward writes a row of partial sums for each program or tile; one launch adds up those of up to three vectors.
Programs own BLOCK_C columns of one vector and stride over tiles of ROWS rows. Latency bounds such a launch: STAGES - 1
tiles are copied ahead to shared memory. The loop says num_stages: by default the compiler pipelines only loops with
a tl.dot, and of loads to registers ptxas keeps one or two in flight. Numerics: float32, rounded once at the store, in
an order that depends on P and the launch row alone; nothing is atomic, so repeated runs agree bit for bit.

Where a vector carries `main_grad` (a view of the flat gradient buffer), its gradient is added there and autograd gets
None, as linear.weight_grad does for matrices; otherwise autograd gets it, in the vector's dtype.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import require, require_float, require_same_device
from ..launch import cdiv, launch, pick
from ..registry import register
from .linear import GradientOf, gradient_of


@triton.jit
def _add_up(
    into_ptr,  # [C]
    partials_ptr,  # [P, C] float32
    P,
    C,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if ACCUMULATE:
        before = tl.load(into_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    sums = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in tl.range(0, P, ROWS, num_stages=STAGES):
        p = start + tl.arange(0, ROWS)
        at = p.to(tl.int64)[:, None] * C + c[None, :]
        sums += tl.load(partials_ptr + at, mask=(p < P)[:, None] & (c < C)[None, :], other=0.0)
    total = tl.sum(sums, axis=0)
    if ACCUMULATE:
        total += before
    tl.store(into_ptr + c, total.to(into_ptr.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["P0", "P1", "P2"])
def _column_sums_kernel(
    into0_ptr,  # [C0]
    partials0_ptr,  # [P0, C0] float32
    into1_ptr,  # [C1], or None with partials1
    partials1_ptr,  # [P1, C1] float32
    into2_ptr,  # [C2], or None with partials2
    partials2_ptr,  # [P2, C2] float32
    P0,
    P1,
    P2,
    C0,
    C1,
    C2,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    slot = tl.program_id(1)
    if slot == 0:
        _add_up(into0_ptr, partials0_ptr, P0, C0, ROWS, BLOCK_C, STAGES, ACCUMULATE)
    if into1_ptr is not None and slot == 1:
        _add_up(into1_ptr, partials1_ptr, P1, C1, ROWS, BLOCK_C, STAGES, ACCUMULATE)
    if into2_ptr is not None and slot == 2:
        _add_up(into2_ptr, partials2_ptr, P2, C2, ROWS, BLOCK_C, STAGES, ACCUMULATE)


@register("column_sums_(Tensor(a!) into0, Tensor[] partials0, Tensor(b!)? into1, Tensor[] partials1, "
          "Tensor(c!)? into2, Tensor[] partials2, bool accumulate) -> ()")  # fmt: skip
def column_sums_(
    into0: Tensor,
    partials0: list[Tensor],
    into1: Tensor | None,
    partials1: list[Tensor],
    into2: Tensor | None,
    partials2: list[Tensor],
    accumulate: bool,
) -> None:
    """Each into [C] receives (or is increased by) the column sums of its partials, [P, C] float32, or several such
    whose columns lie side by side in it; three in all at most. What has no into has no partials.

    Side by side, and not as so many views of into: functionalizing a mutated view of a view, torch.compile loses the
    inner one's offset (2.13: the slice came out empty).
    """
    op = "column_sums"
    slots: list[tuple[Tensor, Tensor]] = []
    for into, partials in ((into0, partials0), (into1, partials1), (into2, partials2)):
        if into is None:
            require(not partials, op, "partials need a vector to be added up into", partials=partials)
            continue
        for part in partials:
            ok = part.dim() == 2 and part.dtype == torch.float32
            require(ok, op, "partials must be [P, C] float32", partials=part)
            require_same_device(op, into=into, partials=part, into0=into0)
        require_float(op, into=into)
        columns = [part.size(1) for part in partials]
        ok = into.dim() == 1 and into.numel() == sum(columns) and into.is_contiguous()
        require(ok, op, "into (a vector's main_grad) must be a contiguous [C]", into=into, columns=columns)
        pieces = [into] if len(partials) == 1 else into.split(columns)
        slots += zip(pieces, (part.contiguous() for part in partials))
    require(0 < len(slots) <= 3, op, "one to three matrices are added up in one launch", given=len(slots))
    widest = max(part.size(1) for _, part in slots)
    row, absent = pick(op, slots[0][1], widest), 3 - len(slots)
    P, C = ([part.size(i) for _, part in slots] + [0] * absent for i in (0, 1))
    launch(
        op, _column_sums_kernel, (cdiv(widest, row.blocks["BLOCK_C"]), len(slots)),
        *(t for slot in slots for t in slot), *[None] * (2 * absent), *P, *C,
        row=row, STAGES=row.num_stages, ACCUMULATE=accumulate,
    )  # fmt: skip


def vector_grad_of(op: str, vector: Tensor | None) -> GradientOf | None:
    """gradient_of a vector, whose main_grad must be one that sums can be added to."""
    if vector is None:
        return None
    grad = gradient_of(vector)
    into = grad.main_grad
    if into is not None:
        ok = into.dtype == torch.float32 and into.shape == vector.shape and into.is_contiguous()
        require(ok, op, "a vector's main_grad must be contiguous float32 of its shape", main_grad=into, of=vector)
        require_same_device(op, main_grad=into, of=vector)
    return grad


def vector_grads(
    partials: Iterable[Tensor | Sequence[Tensor]], wanted: Sequence[bool], vectors: Sequence[GradientOf | None]
) -> list[Tensor | None]:
    """What autograd gets for each vector: its gradient, or None after adding that into main_grad; None if not wanted.

    partials: for each wanted vector in turn [P, C] float32, or several such whose columns lie side by side in it.
    """
    grads: list[Tensor | None] = []
    launches: dict[tuple[bool, int], list[Any]] = {}  # of those to add to, and those to write
    given = iter(partials)
    for i, (vector, want) in enumerate(zip(vectors, wanted)):
        if vector is None or not want:
            grads.append(None)
            continue
        parts = next(given)
        parts = [parts] if isinstance(parts, Tensor) else list(parts)
        into, grad, add = vector.destination(parts[0])
        # one main_grad twice: one after the other, or one launch's programs would overwrite each other's sums
        before = sum(add and v is not None and v.main_grad is into for v in vectors[:i])
        launches.setdefault((add, before), []).extend((into, parts))
        grads.append(grad)
    for (add, _), pairs in launches.items():
        column_sums_(*pairs, *[None, []] * (3 - len(pairs) // 2), add)
    return grads
