"""Cross-entropy of logits: nll[m] = log(sum_v exp(z[m, v])) - z[m, targets[m]], loss = grad_scale * sum(nll).

A program takes one row after another, beginning with the last, which what wrote the logits may have left in L2. Pass 1
keeps a maximum and a sum in every thread (one exp an element, no exchange between warps until the row's end); pass 2
reads the row again, from L2 as few rows are in flight, and writes dz = (softmax(z) - onehot) * grad_scale, which may
overwrite z.

Float32 throughout, rounded once at the store; sums in a fixed order, so results repeat bitwise and a row's do not
depend on the other rows. A row with NaN, +inf or -inf alone gives NaN, as torch does; a target out of range too, and
nothing is read for it. An ignored row is not read: its nll and gradient are 0.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import require, require_float, require_in_range, require_same_device
from ..launch import launch, persistent, pick
from ..registry import once, refuse_tangents, register

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32: unlike -inf, its difference to -inf is not NaN


@triton.jit
def _multiple(x, ALIGN: tl.constexpr):
    """x itself, which ALIGN divides (the launcher saw to that), in a form by which the compiler knows it."""
    return x // ALIGN * ALIGN


@triton.jit
def _load_ragged(row_ptr, v, width, valid_vocab):
    """Logits z[v] of a row in float32, -inf from column `valid_vocab` on."""
    # The load's own mask ends at `width`, a multiple of ALIGN: at `valid_vocab` it would split vectors.
    z = tl.load(row_ptr + v, mask=v < width).to(tl.float32)
    return tl.where(v < valid_vocab, z, float("-inf"))


@triton.jit
def _load_target(row_ptr, target, ignore_index, valid_vocab):
    """z[target] in float32; of an ignored row or a target out of range nothing is read, and it is NaN."""
    read = (target != ignore_index) & (target >= 0) & (target < valid_vocab)
    return tl.load(row_ptr + target, mask=read, other=float("nan")).to(tl.float32)


@triton.jit
def _exp(x):
    return tl.math.exp2(x * 1.4426950408889634)  # log2(e); tl.exp adds three instructions for results below 2^-126


@triton.jit
def _add_tile(peak, total, z, LANES: tl.constexpr, VEC: tl.constexpr):
    """Each lane's maximum, and sum of exp(z - maximum), with those of a tile."""
    # Axis 1 is the threads: they exchange nothing for maxima and sums over the others. Loaded so shaped, by Triton 3.6
    # two threads share an entry of it.
    z = z.reshape([z.shape[0] // (LANES * VEC), LANES, VEC])
    higher = tl.maximum(peak, tl.max(tl.max(z, 2), 0))
    e = _exp(z - higher[None, :, None])
    return higher, total * _exp(peak - higher) + tl.sum(tl.sum(e, 2), 0)


@triton.jit
def _peak_and_total(row_ptr, width, valid_vocab, BLOCK_V: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """max z and sum exp(z - max z) over the row; the sum is NaN where torch's log_softmax is, 0 if all z are -inf."""
    peak = tl.full([LANES], _LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    whole = valid_vocab // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        peak, total = _add_tile(peak, total, tl.load(row_ptr + v).to(tl.float32), LANES, VEC)
    for start in range(whole, valid_vocab, LANES * VEC):
        v = start + tl.arange(0, LANES * VEC)
        peak, total = _add_tile(peak, total, _load_ragged(row_ptr, v, width, valid_vocab), LANES, VEC)
    row_peak = tl.max(peak, axis=0)
    return row_peak, tl.sum(total * _exp(peak - row_peak), axis=0)


@triton.jit
def _write_gradient(
    row_ptr, out_ptr, width, valid_vocab, target, ignore_index, z_target, peak, total, grad_scale_ptr,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, BACKWARDS: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """out[v] = (exp(z[v] - peak) / total - (v == target)) * grad_scale for v < width; 0 from `valid_vocab` on and in an
    ignored row."""
    dtype = out_ptr.dtype.element_ty
    if target == ignore_index:
        for start in range(0, width, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            tl.store(out_ptr + v, tl.zeros(v.shape, dtype), mask=v < width)
    else:
        in_range = (target >= 0) & (target < valid_vocab)
        grad_scale = tl.where(in_range, tl.load(grad_scale_ptr), float("nan"))
        factor = grad_scale / total
        whole = valid_vocab // BLOCK_V * BLOCK_V
        for start in range(whole, width, LANES * VEC):
            v = start + tl.arange(0, LANES * VEC)
            p = _exp(_load_ragged(row_ptr, v, width, valid_vocab) - peak) * factor
            tl.store(out_ptr + v, tl.where(v < valid_vocab, p, 0.0).to(dtype), mask=v < width)
        for start in range(0, whole, BLOCK_V):
            v = (whole - BLOCK_V - start if BACKWARDS else start) + tl.arange(0, BLOCK_V)
            z = tl.load(row_ptr + v, eviction_policy=EVICTION).to(tl.float32)  # type: ignore[arg-type]
            p = _exp(z - peak) * factor
            tl.store(out_ptr + v, p.to(dtype), eviction_policy=EVICTION)  # type: ignore[arg-type]
        # its tile wrote the target's column as any other's: once that is done, it is overwritten
        tl.debug_barrier()
        dz_target = _exp(z_target - peak) * factor - grad_scale
        tl.store(out_ptr + target, dz_target.to(dtype), mask=in_range)


@triton.jit(do_not_specialize=["M"])
def _cross_entropy_fwd_kernel(
    logits_ptr,  # [M, V], rows `stride` apart
    targets_ptr,  # [M] int64
    grad_scale_ptr,  # [1] float32, or None: no gradient is written
    nll_ptr,  # [M] float32
    peak_ptr,  # [M] float32, or None
    total_ptr,  # [M] float32, or None
    M,
    stride,
    width,  # columns of a row that are read and written: V, or more of a padded row
    valid_vocab,
    ignore_index,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    BACKWARDS: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """nll of each row; its statistics into peak and total if given; its gradient over the logits if grad_scale is."""
    width = _multiple(width, ALIGN)
    last = M - 1 - tl.program_id(0).to(tl.int64)
    for before in range(0, last + 1, tl.num_programs(0)):
        m = last - before
        row_ptr = logits_ptr + m * _multiple(stride, ALIGN)
        target = tl.load(targets_ptr + m)
        # Here, before the gradient overwrites it: the reductions below are barriers.
        z_target = _load_target(row_ptr, target, ignore_index, valid_vocab)
        peak = 0.0
        total = 0.0
        nll = 0.0
        if target != ignore_index:
            peak, total = _peak_and_total(row_ptr, width, valid_vocab, BLOCK_V, LANES, VEC)
            nll = tl.log(total) - (z_target - peak)
        tl.store(nll_ptr + m, nll)
        if peak_ptr is not None:
            tl.store(peak_ptr + m, peak)
            tl.store(total_ptr + m, total)
        if grad_scale_ptr is not None:
            _write_gradient(
                row_ptr, row_ptr, width, valid_vocab, target, ignore_index, z_target, peak, total, grad_scale_ptr,
                BLOCK_V, LANES, VEC, BACKWARDS, EVICTION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _cross_entropy_bwd_kernel(
    logits_ptr,  # [M, V], rows `stride` apart
    targets_ptr,  # [M] int64
    grad_scale_ptr,  # [1] float32
    peak_ptr,  # [M] float32
    total_ptr,  # [M] float32
    dlogits_ptr,  # [M, width]
    M,
    stride,
    width,  # columns of a row that are read and written: V, or more of a padded row
    valid_vocab,
    ignore_index,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    BACKWARDS: tl.constexpr,
    EVICTION: tl.constexpr,
):
    width = _multiple(width, ALIGN)
    last = M - 1 - tl.program_id(0).to(tl.int64)
    for before in range(0, last + 1, tl.num_programs(0)):
        m = last - before
        row_ptr, target = logits_ptr + m * _multiple(stride, ALIGN), tl.load(targets_ptr + m)
        z_target = _load_target(row_ptr, target, ignore_index, valid_vocab)
        _write_gradient(
            row_ptr, dlogits_ptr + m * width, width, valid_vocab, target, ignore_index,
            z_target, tl.load(peak_ptr + m), tl.load(total_ptr + m), grad_scale_ptr,
            BLOCK_V, LANES, VEC, BACKWARDS, EVICTION,
        )  # fmt: skip


def _launch(kernel: Any, logits: Tensor, width: int, valid_vocab: int, ignore_index: int, *pointers: Any) -> None:
    """kernel over the rows of logits, `width` columns each."""
    row, M, stride = pick("cross_entropy", logits, width), logits.size(0), logits.stride(0)
    # how wide a vector every row start allows, and one load; so many of them are a program's step
    align = next(a for a in (16, 8, 4, 2, 1) if stride % a == 0 and width % a == 0)
    vec = min(align, 16 // logits.element_size())
    lanes = min(32 * row.num_warps, row.blocks["BLOCK_V"] // vec)
    launch(
        "cross_entropy", kernel, (persistent(M, row.choices["programs_per_sm"], logits.device),), logits, *pointers,
        M, stride, width, valid_vocab, ignore_index, row=row, ALIGN=align, LANES=lanes, VEC=vec,
        BACKWARDS=row.choices["backwards"], EVICTION="evict_first" if row.choices["evict_first"] else "",
    )  # fmt: skip


def cross_entropy_in_place(
    logits: Tensor,
    width: int,
    targets: Tensor,
    grad_scale: Tensor | None,
    nll: Tensor,
    ignore_index: int,
    valid_vocab: int,
) -> None:
    """nll [M] of logits [M, V], which their gradient replaces if grad_scale is given.

    width >= V: columns of a row in the caller's buffer; those from V on are set to 0. Where V is odd, a width that 16
    divides still allows vectors.
    """
    pointers = targets, grad_scale, nll, None, None
    _launch(_cross_entropy_fwd_kernel, logits, width, valid_vocab, ignore_index, *pointers)


def check(op: str, targets: Tensor, rows: int, grad_scale: Tensor, ignore_index: int, V: int, valid_vocab: int) -> None:
    """The contract of targets, grad_scale and valid_vocab."""
    require(targets.dtype == torch.int64, op, "targets must be int64", targets=targets)
    require(targets.numel() == rows, op, f"there must be one target for each of {rows} rows", targets=targets)
    require(
        grad_scale.numel() == 1 and grad_scale.dtype == torch.float32 and not grad_scale.requires_grad,
        op, "grad_scale must be one number without a gradient", grad_scale=grad_scale,
    )  # fmt: skip
    require(1 <= valid_vocab <= V, op, f"valid_vocab must be in [1, {V}]", valid_vocab=valid_vocab)
    require_in_range(op, "targets", targets, valid_vocab, ignore=ignore_index)


def scale_on_device(grad_scale: Tensor | float, device: torch.device) -> Tensor:
    """grad_scale as a float32 tensor, without waiting for the device."""
    if isinstance(grad_scale, Tensor):
        return grad_scale.to(torch.float32)
    return torch.full((), grad_scale, dtype=torch.float32, device=device)


@register(
    "cross_entropy_fwd(Tensor logits, Tensor targets, Tensor grad_scale, int ignore_index, int valid_vocab)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def cross_entropy_fwd(logits: Tensor, targets: Tensor, grad_scale: Tensor, ignore_index: int, valid_vocab: int):
    """loss [], nll [M], and each row's maximum and sum of exponentials, [M] float32."""
    require(logits.dim() == 2, "cross_entropy", "logits must be [M, V]", logits=logits)
    require_float("cross_entropy", logits=logits)
    require_same_device("cross_entropy", logits=logits, targets=targets, grad_scale=grad_scale)
    M, V = logits.shape
    check("cross_entropy", targets, M, grad_scale, ignore_index, V, valid_vocab)
    logits, targets = _with_rows(logits), targets.flatten().contiguous()
    nll, peak, total = (torch.empty(M, dtype=torch.float32, device=logits.device) for _ in range(3))
    _launch(_cross_entropy_fwd_kernel, logits, V, valid_vocab, ignore_index, targets, None, nll, peak, total)
    return nll.sum() * grad_scale.reshape(()), nll, peak, total


@register(
    "cross_entropy_bwd(Tensor logits, Tensor targets, Tensor grad_scale, Tensor peak, Tensor total, int ignore_index, "
    "int valid_vocab) -> Tensor"
)
def cross_entropy_bwd(
    logits: Tensor,
    targets: Tensor,
    grad_scale: Tensor,
    peak: Tensor,
    total: Tensor,
    ignore_index: int,
    valid_vocab: int,
) -> Tensor:
    """dlogits [M, V] of loss, from the saved statistics; grad_scale is the loss's own times its incoming gradient."""
    logits, targets = _with_rows(logits), targets.flatten().contiguous()
    M, V = logits.shape
    dlogits = torch.empty(M, V, dtype=logits.dtype, device=logits.device)
    pointers = targets, grad_scale, peak, total, dlogits
    _launch(_cross_entropy_bwd_kernel, logits, V, valid_vocab, ignore_index, *pointers)
    return dlogits


def _with_rows(logits: Tensor) -> Tensor:
    """Itself if the elements of a row lie side by side, in rows of any distance (a padded vocabulary's slice)."""
    return logits if logits.stride(1) == 1 and logits.stride(0) >= 0 else logits.contiguous()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, grad_scale, ignore_index, valid_vocab):
        loss, nll, peak, total = cross_entropy_fwd(logits, targets, grad_scale, ignore_index, valid_vocab)
        ctx.save_for_backward(logits, targets, grad_scale, peak, total)
        ctx.ignore_index, ctx.valid_vocab = ignore_index, valid_vocab
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once
    def backward(ctx, *grads):
        logits, targets, grad_scale, peak, total = ctx.saved_tensors
        scale = grad_scale * grads[0]
        dlogits = cross_entropy_bwd(logits, targets, scale, peak, total, ctx.ignore_index, ctx.valid_vocab)
        return dlogits, None, None, None, None


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    grad_scale: Tensor | float = 1.0,
    ignore_index: int = -1,
    valid_vocab: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss [], nll [M] float32, detached) of logits [M, V], which stay as they are, against targets [M] int64.

    nll is 0 where the target is ignore_index; loss = grad_scale * sum(nll). Columns from valid_vocab on take no part.
    """
    valid_vocab = logits.size(-1) if valid_vocab is None else min(valid_vocab, logits.size(-1))
    scale = scale_on_device(grad_scale, logits.device)
    refuse_tangents("cross_entropy", logits)
    return _CrossEntropy.apply(logits, targets, scale, ignore_index, valid_vocab)
