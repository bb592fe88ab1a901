"""The residual stream's sum without the norm: r' = r + dropout(delta + delta_bias).

Backward: dr = dr', ddelta = dropout'(dr') in delta's dtype (dr' itself where that changes nothing), and d_delta_bias
is its sum over rows. A program owns BLOCK_C columns and strides over tiles of ROWS rows; its piece of delta_bias, or of
that sum, stays in registers, and sums are written once a program and added by column_sums.py. Only the seed is saved:
the mask is made again. Numerics: float32, rounded once at the store; nothing is atomic, so repeated runs agree bit for
bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import require_addends, require_dropout, require_same_device
from ..launch import Row, cdiv, launch, persistent, pick
from ..primitives import dropout_args, keep_mask, piece
from ..registry import differentiating, number, once, register
from .column_sums import vector_grad_of, vector_grads


@triton.jit(do_not_specialize=["M", "threshold", "site"])
def _dropout_add_fwd_kernel(
    r_ptr,  # [M, C]
    delta_ptr,  # [M, C]
    delta_bias_ptr,  # [C], or None
    seed_ptr,  # [1] int64, or None: no dropout
    r_out_ptr,  # [M, C]
    M,
    keep_scale,
    threshold,
    site,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i = tl.program_id(1)
    c = i * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    if delta_bias_ptr is not None:
        delta_bias = tl.load(delta_bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start in range(tl.program_id(0).to(tl.int64) * ROWS, M, tl.num_programs(0) * ROWS):
        m = start + tl.arange(0, ROWS).to(tl.int64)
        at, inside = piece(m, M, i, C, BLOCK_C)
        r = tl.load(r_ptr + at, mask=inside, other=0.0).to(tl.float32)
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if delta_bias_ptr is not None:
            delta += delta_bias
        if seed_ptr is not None:
            keep = keep_mask(seed, site, threshold, m, i * BLOCK_C, tl.cdiv(C, 4), ROWS, BLOCK_C)
            delta = tl.where(keep, delta * keep_scale, 0.0)
        tl.store(r_out_ptr + at, (r + delta).to(r_out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "threshold", "site"])
def _dropout_add_bwd_kernel(
    dr_ptr,  # [M, C] gradient arriving at r'
    seed_ptr,  # [1] int64, or None: no dropout
    ddelta_ptr,  # [M, C], or None: not wanted, or dr serves
    d_delta_bias_ptr,  # [programs, C] float32, or None: not wanted
    M,
    keep_scale,
    threshold,
    site,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i = tl.program_id(1)
    d_delta_bias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start in range(tl.program_id(0).to(tl.int64) * ROWS, M, tl.num_programs(0) * ROWS):
        m = start + tl.arange(0, ROWS).to(tl.int64)
        at, inside = piece(m, M, i, C, BLOCK_C)
        ddelta = tl.load(dr_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            keep = keep_mask(seed, site, threshold, m, i * BLOCK_C, tl.cdiv(C, 4), ROWS, BLOCK_C)
            ddelta = tl.where(keep, ddelta * keep_scale, 0.0)
        if ddelta_ptr is not None:
            tl.store(ddelta_ptr + at, ddelta.to(ddelta_ptr.dtype.element_ty), mask=inside)
        d_delta_bias += ddelta
    if d_delta_bias_ptr is not None:
        c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        sums = d_delta_bias_ptr + tl.program_id(0).to(tl.int64) * C + c
        tl.store(sums, tl.sum(d_delta_bias, axis=0), mask=c < C)


def _grid(row: Row, M: int, C: int, device: torch.device) -> tuple[int, int]:
    """(programs that stride over rows, programs over columns): as many together as the GPU runs at once."""
    over_columns = max(1, cdiv(C, row.blocks["BLOCK_C"]))
    tiles = cdiv(M, row.blocks["ROWS"])
    return persistent(tiles, row.choices["programs_per_sm"], device, grid_columns=over_columns), over_columns


@register("dropout_add_fwd(Tensor r, Tensor delta, Tensor? delta_bias, float p, Tensor? seed, int site) -> Tensor")
def dropout_add_fwd(
    r: Tensor, delta: Tensor, delta_bias: Tensor | None, p: float, seed: Tensor | None, site: int
) -> Tensor:
    require_addends("dropout_add", r, delta, delta_bias)
    require_dropout("dropout_add", p, seed)
    require_same_device("dropout_add", r=r, delta=delta, delta_bias=delta_bias, seed=seed)
    r, delta = r.contiguous(), delta.contiguous()
    delta_bias = None if delta_bias is None else delta_bias.contiguous()
    C = r.size(-1)
    M = r.numel() // max(C, 1)
    r_out = torch.empty(r.shape, dtype=r.dtype, device=r.device)
    seed, threshold, keep_scale = dropout_args(p, seed)
    row = pick("dropout_add", r, C)
    launch(
        "dropout_add_fwd", _dropout_add_fwd_kernel, _grid(row, M, C, r.device),
        r, delta, delta_bias, seed, r_out, M, keep_scale, threshold, site, row=row, C=C,
    )  # fmt: skip
    return r_out


@register("dropout_add_bwd(Tensor dr, float p, Tensor? seed, int site, ScalarType? ddelta_dtype, bool wants_bias) -> "
          "(Tensor, Tensor)")  # fmt: skip
def dropout_add_bwd(
    dr: Tensor, p: float, seed: Tensor | None, site: int, ddelta_dtype: torch.dtype | None, wants_bias: bool
) -> tuple[Tensor, Tensor]:
    """(ddelta, d_delta_bias's partial sums [P, C] float32), empty what is not wanted; ddelta has ddelta_dtype."""
    dr = dr.contiguous()
    C = dr.size(-1)
    M = dr.numel() // max(C, 1)
    ddelta = torch.empty(0 if ddelta_dtype is None else dr.shape, dtype=ddelta_dtype or dr.dtype, device=dr.device)
    seed, threshold, keep_scale = dropout_args(p, seed)
    row = pick("dropout_add", dr, C)
    grid = _grid(row, M, C, dr.device)
    partials = torch.empty(grid[0] if wants_bias else 0, C, dtype=torch.float32, device=dr.device)
    launch(
        "dropout_add_bwd", _dropout_add_bwd_kernel, grid,
        dr, seed, None if ddelta_dtype is None else ddelta, partials if wants_bias else None,
        M, keep_scale, threshold, site, row=row, C=C,
    )  # fmt: skip
    return ddelta, partials


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, delta, delta_bias, p, seed, site):
        ctx.save_for_backward(seed)
        ctx.delta_bias = vector_grad_of("dropout_add", delta_bias)
        ctx.p, ctx.site, ctx.delta_dtype = p, site, delta.dtype
        return dropout_add_fwd(r, delta, delta_bias, p, seed, site)

    @staticmethod
    @once
    def backward(ctx, *grads: Tensor):
        (dr,) = grads
        (seed,) = ctx.saved_tensors
        wants_r, wants_delta, wants_bias = ctx.needs_input_grad[:3]
        separate_ddelta = ctx.p > 0.0 or ctx.delta_dtype != dr.dtype  # else ddelta is dr
        ddelta, d_delta_bias = dr, None
        if wants_bias or (wants_delta and separate_ddelta):
            dtype = ctx.delta_dtype if wants_delta and separate_ddelta else None
            made, partials = dropout_add_bwd(dr, ctx.p, seed, ctx.site, dtype, wants_bias)
            ddelta = made if separate_ddelta else dr
            (d_delta_bias,) = vector_grads([partials], [wants_bias], [ctx.delta_bias])
        return dr if wants_r else None, ddelta if wants_delta else None, d_delta_bias, None, None, None


def dropout_add(
    r: Tensor, delta: Tensor, delta_bias: Tensor | None, p: float, seed: Tensor | None, site: int
) -> Tensor:
    """r + dropout(delta + delta_bias) in r's dtype; r, delta [..., C], delta_bias [C] or None.

    delta has r's dtype, or r is float32. Dropout with probability p takes its mask from (seed, site), seed int64 [1].
    """
    if differentiating("dropout_add", r, delta, delta_bias):
        return _DropoutAdd.apply(r, delta, delta_bias, number(p), seed, site)
    return dropout_add_fwd(r, delta, delta_bias, p, seed, site)
