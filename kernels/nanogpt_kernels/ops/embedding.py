"""Token and position embedding with dropout: r = dropout(wte[idx] + wpe[start : start + T]).

start is an int, or lies on the device, where a replayed CUDA graph reads it anew.
Forward: a program takes one position of several sequences and a block of columns, so wpe's row is read once for them.
Backward, without atomics: token ids are sorted (stable), and a program sums each segment of equal ids within a run of
RUN sorted rows, by a segmented scan. Segments inside a run go to their row of dwte; pieces of segments that cross runs
go to a buffer, from which a second launch adds each segment's pieces in a fixed order. dwpe is a sum over the batch.
Numerics: sums in float32, rounded once at the store; the same additions in the same order on every run. An id outside
[0, V) reads nothing and gives a row of NaN; in backward its row counts nowhere. Elements of wte and wpe that no token
or position of the call uses keep the gradient they had.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import (
    position_args,
    require,
    require_dropout,
    require_float,
    require_in_range,
    require_position,
    require_same_device,
)
from ..launch import cdiv, launch, pick
from ..primitives import dropout_args, keep_mask, position_at
from ..registry import differentiating, number, once, refuse_tangents, register
from .linear import gradient_of

OP = "embedding"


@triton.jit
def _dropout(
    x,
    seed_ptr,  # [1] int64
    m, c0, C, site, threshold, keep_scale,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Dropout of x [ROWS, BLOCK_C], rows m and columns from c0 of [M, C]."""
    keep = keep_mask(tl.load(seed_ptr), site, threshold, m, c0, tl.cdiv(C, 4), ROWS, BLOCK_C)
    return tl.where(keep, x * keep_scale, 0.0)


@triton.jit(do_not_specialize=["start", "last", "site", "threshold"])
def _embedding_fwd_kernel(
    idx_ptr,  # [B, T], any strides
    wte_ptr,  # [V, C]
    wpe_ptr,  # [positions, C]
    r_ptr,  # [B, T, C]
    seed_ptr,  # [1] int64, or None
    start_ptr,  # [1] int64, at most `last`, or None: then `start` counts
    B, T, V, C, stride_b, stride_t, start, last, site, threshold, keep_scale,
    SEQUENCES: tl.constexpr, BLOCK_C: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    t, b = program % T, program // T * SEQUENCES + tl.arange(0, SEQUENCES)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    ids = tl.load(idx_ptr + b * stride_b + t * stride_t, mask=b < B, other=-1).to(tl.int64)
    known = (ids >= 0) & (ids < V)
    if start_ptr is not None:
        start, in_range = position_at(start_ptr, last)
        known &= in_range
    inside = known[:, None] & (c < C)[None, :]
    token = tl.load(wte_ptr + ids[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    position = tl.load(wpe_ptr + (start + t) * C + c, mask=c < C, other=0.0).to(tl.float32)
    r, m = token + position[None, :], b * T + t
    if DROPOUT:
        r = _dropout(r, seed_ptr, m, c0, C, site, threshold, keep_scale, SEQUENCES, BLOCK_C)
    r = tl.where(known[:, None], r, float("nan"))
    mask = (b < B)[:, None] & (c < C)[None, :]
    tl.store(r_ptr + m[:, None] * C + c[None, :], r.to(r_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_if_same(x, x_id, y, y_id):
    return tl.where(x_id == y_id, x + y, y), y_id


@triton.jit(do_not_specialize=["site", "threshold"])
def _embedding_bwd_kernel(
    ids_ptr,  # [M] sorted token ids
    order_ptr,  # [M] int64, the row of dr that each belongs to
    dr_ptr,  # [M, C]
    dwte_ptr,  # [V, C]
    pieces_ptr,  # [2, runs, C] float32: of the segment that began before the run, of the one that continues after it
    seed_ptr,  # [1] int64, or None
    M, V, C, site, threshold, keep_scale,
    RUN: tl.constexpr, BLOCK_C: tl.constexpr, DROPOUT: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    row = tl.arange(0, RUN)
    at = run * RUN + row
    ids = tl.load(ids_ptr + at, mask=at < M, other=V).to(tl.int64)
    next_ids = tl.load(ids_ptr + at + 1, mask=at + 1 < M, other=V).to(tl.int64)
    id_before = tl.load(ids_ptr + run * RUN - 1, mask=run > 0, other=-1).to(tl.int64)
    m = tl.load(order_ptr + at, mask=at < M, other=0)
    known = (ids >= 0) & (ids < V)
    inside = known[:, None] & (c < C)[None, :]
    dr = tl.load(dr_ptr + m[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        dr = _dropout(dr, seed_ptr, m, c0, C, site, threshold, keep_scale, RUN, BLOCK_C)
    keys = tl.broadcast_to(tl.where(known, ids, -1).to(tl.int32)[:, None], [RUN, BLOCK_C])
    sums, _ = tl.associative_scan((dr, keys), 0, _add_if_same)

    ends, began_before = ids != next_ids, ids == id_before
    whole = inside & (ends & ~began_before)[:, None]
    dwte_ptrs = dwte_ptr + ids[:, None] * C + c[None, :]
    total = sums
    if ACCUMULATE:
        total += tl.load(dwte_ptrs, mask=whole, other=0.0).to(tl.float32)
    tl.store(dwte_ptrs, total.to(dwte_ptr.dtype.element_ty), mask=whole)
    piece = tl.where(began_before, run, tl.num_programs(0) + run)
    is_piece = (ends & began_before) | (~ends & (row == RUN - 1))
    tl.store(pieces_ptr + piece[:, None] * C + c[None, :], sums, mask=inside & is_piece[:, None])


@triton.jit
def _embedding_bwd_pieces_kernel(
    ids_ptr,  # [M] sorted token ids
    pieces_ptr,  # [2, runs, C] float32
    dwte_ptr,  # [V, C]
    M, V, C, runs,
    RUN: tl.constexpr, PIECES: tl.constexpr, BLOCK_C: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Program `run` finishes the segment that begins in that run and continues after it, if there is one."""
    run = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.load(ids_ptr + (run + 1) * RUN - 1).to(tl.int64)
    next_token = tl.load(ids_ptr + (run + 1) * RUN).to(tl.int64)
    token_before = tl.load(ids_ptr + run * RUN - 1, mask=run > 0, other=-1).to(tl.int64)
    if (token == next_token) & (token != token_before) & (token >= 0) & (token < V):
        total = tl.load(pieces_ptr + (runs + run) * C + c, mask=c < C, other=0.0)
        first, continues = run + 1, True
        while continues:
            later = first + tl.arange(0, PIECES)
            same = tl.load(ids_ptr + later * RUN, mask=later * RUN < M, other=-1).to(tl.int64) == token
            mask = same[:, None] & (c < C)[None, :]
            total += tl.sum(tl.load(pieces_ptr + later[:, None] * C + c[None, :], mask=mask, other=0.0), axis=0)
            first += PIECES
            continues = tl.sum(same.to(tl.int32)) == PIECES
        if ACCUMULATE:
            total += tl.load(dwte_ptr + token * C + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(dwte_ptr + token * C + c, total.to(dwte_ptr.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["start", "site", "threshold"])
def _embedding_bwd_positions_kernel(
    idx_ptr,  # [B, T], any strides
    dr_ptr,  # [B, T, C]
    dwpe_ptr,  # [positions, C]
    seed_ptr,  # [1] int64, or None
    B, T, V, C, stride_b, stride_t, start, site, threshold, keep_scale,
    SEQUENCES: tl.constexpr, BLOCK_C: tl.constexpr, DROPOUT: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    sums = tl.zeros([SEQUENCES, BLOCK_C], tl.float32)
    for b0 in range(0, B, SEQUENCES):
        b = b0 + tl.arange(0, SEQUENCES).to(tl.int64)
        ids = tl.load(idx_ptr + b * stride_b + t * stride_t, mask=b < B, other=-1)
        m = b * T + t
        inside = ((ids >= 0) & (ids < V))[:, None] & (c < C)[None, :]
        dr = tl.load(dr_ptr + m[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            dr = _dropout(dr, seed_ptr, m, c0, C, site, threshold, keep_scale, SEQUENCES, BLOCK_C)
        sums += dr
    total = tl.sum(sums, axis=0)
    at = (start + t) * C + c
    if ACCUMULATE:
        total += tl.load(dwpe_ptr + at, mask=c < C, other=0.0).to(tl.float32)
    tl.store(dwpe_ptr + at, total.to(dwpe_ptr.dtype.element_ty), mask=c < C)


def _require_grad_buffer(name: str, dw: Tensor, C: int) -> None:
    ok = dw.dim() == 2 and dw.size(1) == C and dw.is_contiguous()
    require(ok, OP, f"{name} must be a contiguous [rows, {C}]", **{name: dw})


@register(
    "embedding_fwd(Tensor idx, Tensor wte, Tensor wpe, float p, Tensor? seed, int site, SymInt start, "
    "ScalarType? out_dtype, Tensor? start_at=None) -> Tensor"
)
def embedding_fwd(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    p: float,
    seed: Tensor | None,
    site: int,
    start: int,
    out_dtype: torch.dtype | None,
    start_at: Tensor | None = None,
) -> Tensor:
    """r [B, T, C] in out_dtype, by default wte's. start_at: int64 [1], instead of start."""
    ok = idx.dim() == 2 and idx.dtype in (torch.int64, torch.int32)
    require(ok, OP, "idx must be [B, T] of int64 or int32", idx=idx)
    ok = wte.dim() == wpe.dim() == 2 and wte.size(1) == wpe.size(1) and wte.dtype == wpe.dtype
    require(ok, OP, "wte and wpe must be [V, C] and [positions, C] of one dtype", wte=wte, wpe=wpe)
    require(wte.size(0) < 2**31, OP, "V must be below 2^31", wte=wte)
    require_float(OP, wte=wte)
    require_same_device(OP, idx=idx, wte=wte, wpe=wpe, seed=seed, start=start_at)
    require_dropout(OP, p, seed)
    (B, T), (V, C) = idx.shape, wte.shape
    rule, last = "positions start : start + T must be rows of wpe", wpe.size(0) - T
    require_position(OP, rule, start, start_at, last, idx=idx, wpe=wpe)
    require_in_range(OP, "idx", idx, V)
    r = torch.empty(B, T, C, dtype=out_dtype or wte.dtype, device=wte.device)
    require_float(OP, r=r)
    seed, threshold, keep_scale = dropout_args(p, seed)
    row = pick("embedding_fwd", r, C)
    launch(
        "embedding_fwd", _embedding_fwd_kernel,
        (T * cdiv(B, row.blocks["SEQUENCES"]), cdiv(C, row.blocks["BLOCK_C"])),
        idx, wte.contiguous(), wpe.contiguous(), r, seed, start_at, B, T, V, C, *idx.stride(), start, last, site,
        threshold, keep_scale, row=row, DROPOUT=p > 0.0,
    )  # fmt: skip
    return r


@register(
    "embedding_bwd_tokens_(Tensor(a!) dwte, Tensor dr, Tensor idx, float p, Tensor? seed, int site, bool accumulate) "
    "-> ()"
)
def embedding_bwd_tokens_(
    dwte: Tensor, dr: Tensor, idx: Tensor, p: float, seed: Tensor | None, site: int, accumulate: bool
) -> None:
    """The rows of dwte [V, C] that idx [B, T] names receive (or are increased by) their sums of dr [B, T, C]."""
    V, C, M = dwte.size(0), dr.size(2), idx.numel()
    _require_grad_buffer("dwte", dwte, C)
    ids, order = torch.sort(idx.reshape(-1), stable=True)
    dr = dr.contiguous()
    seed, threshold, keep_scale = dropout_args(p, seed)
    row = pick("embedding_bwd", dr, C)
    run, columns = row.blocks["RUN"], cdiv(C, row.blocks["BLOCK_C"])
    runs = cdiv(M, run)
    pieces = torch.empty(2, runs, C, dtype=torch.float32, device=dr.device)
    launch(
        "embedding_bwd", _embedding_bwd_kernel, (runs, columns),
        ids, order, dr, dwte, pieces, seed, M, V, C, site, threshold, keep_scale,
        row=row, DROPOUT=p > 0.0, ACCUMULATE=accumulate,
    )  # fmt: skip
    row = pick("embedding_bwd_pieces", pieces, C)
    launch(
        "embedding_bwd_pieces", _embedding_bwd_pieces_kernel,
        (max(runs - 1, 0), cdiv(C, row.blocks["BLOCK_C"])),
        ids, pieces, dwte, M, V, C, runs, row=row, RUN=run, ACCUMULATE=accumulate,
    )  # fmt: skip


@register(
    "embedding_bwd_positions_(Tensor(a!) dwpe, Tensor dr, Tensor idx, SymInt V, float p, Tensor? seed, int site, "
    "SymInt start, bool accumulate) -> ()"
)
def embedding_bwd_positions_(
    dwpe: Tensor, dr: Tensor, idx: Tensor, V: int, p: float, seed: Tensor | None, site: int, start: int,
    accumulate: bool,
) -> None:  # fmt: skip
    """Rows start : start + T of dwpe [positions, C] receive (or are increased by) dr [B, T, C] summed over B."""
    B, T, C = dr.shape
    _require_grad_buffer("dwpe", dwpe, C)
    dr = dr.contiguous()
    seed, threshold, keep_scale = dropout_args(p, seed)
    row = pick("embedding_bwd_positions", dr, C)
    launch(
        "embedding_bwd_positions", _embedding_bwd_positions_kernel, (T, cdiv(C, row.blocks["BLOCK_C"])),
        idx, dr, dwpe, seed, B, T, V, C, *idx.stride(), start, site, threshold, keep_scale,
        row=row, DROPOUT=p > 0.0, ACCUMULATE=accumulate,
    )  # fmt: skip


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, idx: Tensor, wte: Tensor, wpe: Tensor, p: float, seed: Tensor | None, site: int, start: int,
        out_dtype: torch.dtype | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(idx, seed)
        ctx.wte, ctx.wpe = gradient_of(wte), gradient_of(wpe)
        ctx.p, ctx.site, ctx.start = p, site, start
        return embedding_fwd(idx, wte, wpe, p, seed, site, start, out_dtype)

    @staticmethod
    @once
    def backward(ctx, *grads: Tensor):
        (dr,) = grads
        idx, seed = ctx.saved_tensors
        dropout = (ctx.p, seed, ctx.site)
        dwte = dwpe = None
        if ctx.needs_input_grad[1]:
            into, dwte, add = ctx.wte.destination(dr, zero=True)
            embedding_bwd_tokens_(into, dr, idx, *dropout, add)
        if ctx.needs_input_grad[2]:
            into, dwpe, add = ctx.wpe.destination(dr, zero=True)
            embedding_bwd_positions_(into, dr, idx, ctx.wte.shape[0], *dropout, ctx.start, add)
        return None, dwte, dwpe, None, None, None, None, None


def embedding(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    p: float,
    seed: Tensor | None,
    site: int,
    start: int | Tensor = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """dropout(wte[idx] + wpe[start : start + T]); idx [B, T] int64 or int32 -> r [B, T, C] in out_dtype or wte's.

    start: an int, or int64 [1] on the device, without gradients; out of range there, r is NaN. Gradients are added
    into wte.main_grad and wpe.main_grad (float32) where those exist.
    """
    start, start_at = position_args(start)
    if start_at is not None:
        require(not differentiating(OP, wte, wpe), OP, "a start on the device has no gradient", start=start_at)
        return embedding_fwd(idx, wte, wpe, p, seed, site, start, out_dtype, start_at)
    refuse_tangents(OP, wte, wpe)
    return _Embedding.apply(idx, wte, wpe, number(p), seed, site, start, out_dtype)
