"""Cross-entropy of logits: nll[m] = log(sum_v exp(z[m, v])) - z[m, targets[m]], loss = grad_scale * sum(nll).

One program a row, which is read in tiles of BLOCK_V columns. Pass 1 keeps a maximum and a sum in every lane (one exp an
element, no exchange between warps until the end); pass 2 reads the row again, from L2 as few rows are in flight, and
writes dz = (softmax(z) - onehot) * grad_scale, which may overwrite z.

Float32 throughout, rounded once at the store; sums in a fixed order, so results repeat bitwise and a row's do not
depend on the other rows. A row with NaN, +inf or -inf alone gives NaN, as torch does; a target out of range too, and
nothing is read for it. An ignored row is not read: its nll and gradient are 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanogpt_kernels.contract import require, require_float, require_in_range, require_same_device
from nanogpt_kernels.launch import launch, pick
from nanogpt_kernels.registry import once, register

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32: unlike -inf, its difference to -inf is not NaN


@triton.jit
def _multiple(x, ALIGN: tl.constexpr):
    """x itself, which ALIGN divides (the launcher saw to that), in a form by which the compiler knows it."""
    return x // ALIGN * ALIGN


@triton.jit
def _load_logits(row_ptr, v, width, valid_vocab):
    """Logits z[v] of a row in float32, -inf from column `valid_vocab` on."""
    # The load's own mask ends at `width`, a multiple of ALIGN: at `valid_vocab` it would split vectors.
    z = tl.load(row_ptr + v, mask=v < width).to(tl.float32)
    return tl.where(v < valid_vocab, z, float("-inf"))


@triton.jit
def _peak_and_total(row_ptr, width, valid_vocab, BLOCK_V: tl.constexpr):
    """max z and sum exp(z - max z) over the row; the sum is NaN where torch's log_softmax is, 0 if all z are -inf."""
    peak = tl.full([BLOCK_V], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, valid_vocab, BLOCK_V):
        z = _load_logits(row_ptr, start + tl.arange(0, BLOCK_V), width, valid_vocab)
        above = z - peak
        smaller, higher = tl.exp(-tl.abs(above)), above > 0.0
        total = total * tl.where(higher, smaller, 1.0) + tl.where(higher, 1.0, smaller)
        peak = tl.where(higher, z, peak)
    row_peak = tl.max(peak, axis=0)
    return row_peak, tl.sum(total * tl.exp(peak - row_peak), axis=0)


@triton.jit
def _write_gradient(
    row_ptr, out_ptr, width, valid_vocab, target, ignore_index, peak, total, grad_scale_ptr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out[v] = (exp(z[v] - peak) / total - (v == target)) * grad_scale for v < width; 0 from `valid_vocab` on and in an
    ignored row."""
    if target == ignore_index:
        for start in range(0, width, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            tl.store(out_ptr + v, tl.zeros([BLOCK_V], out_ptr.dtype.element_ty), mask=v < width)
    else:
        grad_scale = tl.where((target >= 0) & (target < valid_vocab), tl.load(grad_scale_ptr), float("nan"))
        factor = grad_scale / total
        for start in range(0, width, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            p = tl.exp(_load_logits(row_ptr, v, width, valid_vocab) - peak) * factor
            dz = tl.where(v < valid_vocab, tl.where(v == target, p - grad_scale, p), 0.0)
            tl.store(out_ptr + v, dz.to(out_ptr.dtype.element_ty), mask=v < width)


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr,  # [M, V], rows `stride` apart
    targets_ptr,  # [M] int64
    grad_scale_ptr,  # [1] float32, or None: no gradient is written
    nll_ptr,  # [M] float32
    peak_ptr,  # [M] float32, or None
    total_ptr,  # [M] float32, or None
    stride,
    width,  # columns of a row that are read and written: V, or more of a padded row
    valid_vocab,
    ignore_index,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """nll of each row; its statistics into peak and total if given; its gradient over the logits if grad_scale is."""
    m = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + m * _multiple(stride, ALIGN)
    width = _multiple(width, ALIGN)  # type: ignore[misc]
    target = tl.load(targets_ptr + m)
    peak = 0.0
    total = 0.0
    nll = 0.0
    if target != ignore_index:
        # Here, before the gradient overwrites it: the reductions below are barriers.
        in_range = (target >= 0) & (target < valid_vocab)
        z_target = tl.load(row_ptr + target, mask=in_range, other=float("nan")).to(tl.float32)
        peak, total = _peak_and_total(row_ptr, width, valid_vocab, BLOCK_V)  # type: ignore[misc]
        nll = tl.log(total) - (z_target - peak)
    tl.store(nll_ptr + m, nll)
    if peak_ptr is not None:
        tl.store(peak_ptr + m, peak)
        tl.store(total_ptr + m, total)
    if grad_scale_ptr is not None:
        _write_gradient(
            row_ptr, row_ptr, width, valid_vocab, target, ignore_index, peak, total, grad_scale_ptr, BLOCK_V
        )  # fmt: skip


@triton.jit
def _cross_entropy_bwd_kernel(
    logits_ptr,  # [M, V], rows `stride` apart
    targets_ptr,  # [M] int64
    grad_scale_ptr,  # [1] float32
    peak_ptr,  # [M] float32
    total_ptr,  # [M] float32
    dlogits_ptr,  # [M, width]
    stride,
    width,  # columns of a row that are read and written: V, or more of a padded row
    valid_vocab,
    ignore_index,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    width = _multiple(width, ALIGN)
    _write_gradient(
        logits_ptr + m * _multiple(stride, ALIGN), dlogits_ptr + m * width, width, valid_vocab,  # type: ignore[misc]
        tl.load(targets_ptr + m), ignore_index, tl.load(peak_ptr + m), tl.load(total_ptr + m), grad_scale_ptr, BLOCK_V,
    )  # fmt: skip


def _alignment(*sizes: int) -> int:
    """The largest power of two up to 16 that divides all sizes: how wide a vector every row start allows."""
    return next(a for a in (16, 8, 4, 2, 1) if all(size % a == 0 for size in sizes))


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
    row = pick("cross_entropy", logits, width)
    stride = logits.stride(0)
    launch(
        "cross_entropy", _cross_entropy_fwd_kernel, (logits.size(0),), logits, targets, grad_scale, nll, None, None,
        stride, width, valid_vocab, ignore_index, row=row, ALIGN=_alignment(stride, width),
    )  # fmt: skip


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
    logits, targets = _with_rows(logits), targets.flatten()
    nll, peak, total = (torch.empty(M, dtype=torch.float32, device=logits.device) for _ in range(3))
    stride = logits.stride(0)
    launch(
        "cross_entropy", _cross_entropy_fwd_kernel, (M,), logits, targets, None, nll, peak, total,
        stride, V, valid_vocab, ignore_index, row=pick("cross_entropy", logits, V), ALIGN=_alignment(stride, V),
    )  # fmt: skip
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
    logits, targets = _with_rows(logits), targets.flatten()
    M, V = logits.shape
    dlogits = torch.empty(M, V, dtype=logits.dtype, device=logits.device)
    stride = logits.stride(0)
    launch(
        "cross_entropy", _cross_entropy_bwd_kernel, (M,), logits, targets, grad_scale, peak, total, dlogits,
        stride, V, valid_vocab, ignore_index, row=pick("cross_entropy", logits, V), ALIGN=_alignment(stride, V),
    )  # fmt: skip
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
    return _CrossEntropy.apply(logits, targets, scale, ignore_index, valid_vocab)
