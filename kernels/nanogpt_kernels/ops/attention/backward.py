"""Causal attention, backward, with P rebuilt from lse (Dao, arXiv 2307.08691); P and dS are [T, T], never stored.

P = exp2(q k^T log2(e) / sqrt(D) - lse), dP = do v^T, dS = P (dP - delta), delta = rowsum(o do); dV = P^T do,
dK = dS^T q / sqrt(D), dQ = dS k / sqrt(D). With dropout's Z = mask / (1 - p): dP = Z (do v^T), dV = (Z P)^T do.
Two forms, by launch_rows.py's "attention_bwd". Deterministic: programs own BLOCK_M queries (delta, dQ), then others own
BLOCK_N keys (dK, dV); 7 products, no atomics, the same bits at any B. Atomic: owners of keys add to a float32 dQ too;
5 products, and dQ's last bits vary from run to run. P and dS are rounded to the operands' dtype, all else is float32.
The bias's gradient is summed over tokens from the float32 tiles before they are rounded: a row a tile, in fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...contract import require, require_same_device
from ...launch import cdiv, launch, pick
from ...primitives import dropout_args, keep_mask
from ...registry import register
from .backward_atomic import delta_and_zeros, write_dq
from .documents import document_spans
from .forward import block_d, check_attention, dot_precision, launch_op, log2_scale, ragged
from .tile_access import (
    causal,
    head_offsets,
    load_row,
    load_tile,
    query_tile,
    store_tile,
    tile_at,
)


@triton.jit(do_not_specialize=["site", "threshold"])
def _attention_bwd_dq_kernel(
    qkv_ptr,  # [B, T, 3, H, D]
    o_ptr,  # [B, T, H, D]
    do_ptr,  # [B, T, H, D]
    lse_ptr,  # [B, H, T] float32
    doc_ids_ptr,  # [B, T] int32 or int64, or None
    first_ptr,  # [B, tiles] int32, the first key of each query tile's documents, or None
    seed_ptr,  # [1] int64, or None
    dqkv_ptr,  # [B, T, 3, H, D]
    delta_ptr,  # [B, H, T] float32
    sums_ptr,  # [B * tiles, H, D] float32, or [0, 0]
    heads,
    T,
    H,
    scale,
    log2_scale,
    site,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    RAGGED: tl.constexpr,
    SUMS: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, tile = query_tile(tl.program_id(0), heads, T, D, BLOCK_M, ITEMSIZE)
    qkv_at, o_at, row_at, doc_at = head_offsets(head, T, H, D)
    m, stride = tile * BLOCK_M, 3 * H * D
    i = m + tl.arange(0, BLOCK_M)
    q_ptr = qkv_ptr + qkv_at
    k_ptr, v_ptr = q_ptr + H * D, q_ptr + 2 * H * D
    q = load_tile(q_ptr, m, stride, T, BLOCK_M, D, BLOCK_D, RAGGED)
    do = load_tile(do_ptr + o_at, m, H * D, T, BLOCK_M, D, BLOCK_D, RAGGED)
    o = load_tile(o_ptr + o_at, m, H * D, T, BLOCK_M, D, BLOCK_D, RAGGED)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(delta_ptr + row_at + i, delta, mask=i < T)
    lse = tl.load(lse_ptr + row_at + i, mask=i < T, other=float("inf"))  # P = 0 beyond T
    seed = tl.load(seed_ptr) if DROPOUT else 0
    start = 0
    if DOCUMENTS:
        start = tl.load(first_ptr + (head // H).to(tl.int64) * tl.cdiv(T, BLOCK_M) + tile) // BLOCK_N * BLOCK_N
        doc_ids_ptr += doc_at
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if DOCUMENTS:
        doc_i = tl.load(doc_ids_ptr + i, mask=i < T, other=0)
    end = tl.minimum(m + BLOCK_M, T) if RAGGED else m + BLOCK_M
    # beside either ptxas serialises every wgmma of a single loop
    LOOPS: tl.constexpr = 2 if DROPOUT or DOCUMENTS else 1
    diagonal = m // BLOCK_N * BLOCK_N
    for loop in tl.static_range(LOOPS):
        for n in range(start if loop == 0 else diagonal, diagonal if loop < LOOPS - 1 else end, BLOCK_N):
            j = n + tl.arange(0, BLOCK_N)
            k = load_tile(k_ptr, n, stride, T, BLOCK_N, D, BLOCK_D, RAGGED)
            v = load_tile(v_ptr, n, stride, T, BLOCK_N, D, BLOCK_D, RAGGED)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = tl.math.exp2(s * log2_scale - lse[:, None])
            if loop == LOOPS - 1:
                p = causal(p, n, m, 0.0, BLOCK_M, BLOCK_N, False, BRANCH=LOOPS == 1)
            if DOCUMENTS:
                doc_j = tl.load(doc_ids_ptr + j, mask=j < T, other=0)
                p = tl.where(doc_i[:, None] == doc_j[None, :], p, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                keep = keep_mask(seed, site, threshold, row_at + i, n, tl.cdiv(T, 4), BLOCK_M, BLOCK_N)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            ds = (p * (dp - delta[:, None])).to(k.dtype)
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    sums_ptr += (((head // H).to(tl.int64) * tl.cdiv(T, BLOCK_M) + tile) * H + head % H) * D
    store_tile(dqkv_ptr + qkv_at, sums_ptr, dq * scale, m, stride, T, BLOCK_M, D, BLOCK_D, SUMS)


@triton.jit(do_not_specialize=["site", "threshold"])
def _attention_bwd_dkdv_kernel(
    qkv_ptr,  # [B, T, 3, H, D]
    do_ptr,  # [B, T, H, D]
    lse_ptr,  # [B, H, T] float32
    delta_ptr,  # [B, H, T] float32
    doc_ids_ptr,  # [B, T] int32 or int64, or None
    end_ptr,  # [B, tiles] int32, one past the last query of each key tile's documents, or None
    seed_ptr,  # [1] int64, or None
    dqkv_ptr,  # [B, T, 3, H, D]
    dq_ptr,  # [B, H, T, D] float32, or None
    sums_ptr,  # [B * tiles, 2, H, D] float32, or [0, 0]
    heads,
    T,
    H,
    scale,
    log2_scale,
    site,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    RAGGED: tl.constexpr,
    SUMS: tl.constexpr,
    ATOMIC: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, from_last = query_tile(tl.program_id(0), heads, T, D, BLOCK_N, ITEMSIZE)
    tile = tl.cdiv(T, BLOCK_N) - 1 - from_last  # the first keys have the most queries
    qkv_at, o_at, row_at, doc_at = head_offsets(head, T, H, D)
    n, stride = tile * BLOCK_N, 3 * H * D
    q_ptr, do_ptr, lse_ptr, delta_ptr = qkv_ptr + qkv_at, do_ptr + o_at, lse_ptr + row_at, delta_ptr + row_at
    k = load_tile(q_ptr + H * D, n, stride, T, BLOCK_N, D, BLOCK_D, RAGGED)
    v = load_tile(q_ptr + 2 * H * D, n, stride, T, BLOCK_N, D, BLOCK_D, RAGGED)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    end = T
    if DOCUMENTS:
        end = tl.minimum(T, tl.load(end_ptr + (head // H).to(tl.int64) * tl.cdiv(T, BLOCK_N) + tile))
        doc_ids_ptr += doc_at
    if ATOMIC:
        dq_ptr += row_at * D
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # Tiles are transposed, [BLOCK_N, BLOCK_M], so that P and dS enter the products for dv and dk from registers. lse
    # and delta are loaded where they are used: earlier, they would hold registers through the products. Not so with
    # dropout, beside which ptxas then serialises every wgmma.
    if DOCUMENTS:
        j = n + tl.arange(0, BLOCK_N)
        doc_j = tl.load(doc_ids_ptr + j, mask=j < T, other=0)
    LOOPS: tl.constexpr = 2 if DROPOUT or DOCUMENTS or ATOMIC else 1  # as for dQ; beside atomics too
    first, below = n // BLOCK_M * BLOCK_M, tl.cdiv(n + BLOCK_N, BLOCK_M) * BLOCK_M
    for loop in tl.static_range(LOOPS):
        for m in range(first if loop == 0 else below, tl.minimum(below, T) if loop < LOOPS - 1 else end, BLOCK_M):
            i = m + tl.arange(0, BLOCK_M)
            q = load_tile(q_ptr, m, stride, T, BLOCK_M, D, BLOCK_D, RAGGED)
            do = load_tile(do_ptr, m, H * D, T, BLOCK_M, D, BLOCK_D, RAGGED)
            if DROPOUT:
                lse = load_row(lse_ptr, i, T, float("inf"), RAGGED)
                delta = load_row(delta_ptr, i, T, 0.0, RAGGED)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            if not DROPOUT:
                lse = load_row(lse_ptr, i, T, float("inf"), RAGGED)  # P = 0 beyond T
            p = tl.math.exp2(s * log2_scale - lse[None, :])
            if loop == 0:
                p = causal(p, n, m, 0.0, BLOCK_M, BLOCK_N, True, BRANCH=LOOPS == 1)
            if DOCUMENTS:
                doc_i = tl.load(doc_ids_ptr + i, mask=i < T, other=0)
                p = tl.where(doc_i[None, :] == doc_j[:, None], p, 0.0)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            if DROPOUT:
                keep = tl.trans(keep_mask(seed, site, threshold, row_at + i, n, tl.cdiv(T, 4), BLOCK_M, BLOCK_N))
                dp = tl.where(keep, dp * keep_scale, 0.0)
                kept = tl.where(keep, p, 0.0)
            else:
                kept = p
            if not DROPOUT:
                delta = load_row(delta_ptr, i, T, 0.0, RAGGED)
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=PRECISION)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
            if ATOMIC:
                dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
                at, inside = tile_at(dq_ptr, m, D, T, BLOCK_M, D, BLOCK_D)
                tl.atomic_add(at, dq, mask=inside, sem="relaxed")
    sums_ptr += (((head // H).to(tl.int64) * tl.cdiv(T, BLOCK_N) + tile) * 2 * H + head % H) * D
    dk_ptr = dqkv_ptr + qkv_at + H * D
    store_tile(dk_ptr, sums_ptr, dk * scale, n, stride, T, BLOCK_N, D, BLOCK_D, SUMS)
    store_tile(dk_ptr + H * D, sums_ptr + H * D, dv * keep_scale, n, stride, T, BLOCK_N, D, BLOCK_D, SUMS)


@register(
    "attention_bwd(Tensor do, Tensor qkv, Tensor o, Tensor lse, float p, Tensor? seed, int site, Tensor? doc_ids, "
    "bool bias_grad) -> (Tensor, Tensor, Tensor)"
)
def attention_bwd(
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    p: float,
    seed: Tensor | None,
    site: int,
    doc_ids: Tensor | None,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dqkv [B, T, 3, H, D], partial sums over tokens, float32, of dq [n, H*D] and of dk, dv [n', 2*H*D]).

    Without bias_grad the sums are [0, 0].

    do, o [B, T, H, D] in qkv's dtype; lse [B, H, T] float32: log2 of the sum of the rows' exponentials.
    """
    op = "attention_bwd"
    B, T, H, D = check_attention(op, qkv, p, seed, doc_ids)
    for name, t in dict(do=do, o=o).items():
        ok = t.shape == (B, T, H, D) and t.dtype == qkv.dtype
        require(ok, op, f"{name} must be [B, T, H, D], in qkv's dtype", **{name: t}, qkv=qkv)
    require(
        lse.shape == (B, H, T) and lse.dtype == torch.float32, op, "lse must be [B, H, T] float32", lse=lse, qkv=qkv
    )
    require_same_device(op, do=do, qkv=qkv, o=o, lse=lse)
    do, qkv, o, lse = do.contiguous(), qkv.contiguous(), o.contiguous(), lse.contiguous()
    BLOCK_D = block_d(D)
    doc_ids = None if doc_ids is None else doc_ids.contiguous()
    seed, threshold, keep_scale = dropout_args(p, seed)
    numbers = (B * H, T, H, D**-0.5, log2_scale(D), site, threshold, keep_scale)
    shape = dict(D=D, BLOCK_D=BLOCK_D, ITEMSIZE=qkv.element_size(), SUMS=bias_grad)
    shape |= dict(DROPOUT=p > 0.0, DOCUMENTS=doc_ids is not None, PRECISION=dot_precision(qkv))

    def sums(tiles: int, parts: int) -> Tensor:
        return torch.empty((B * tiles, parts * H * D) if bias_grad else (0, 0), dtype=torch.float32, device=qkv.device)

    dqkv = torch.empty_like(qkv)
    atomic = pick(op, qkv, D).choices["atomic"]
    if atomic:
        delta, dq = delta_and_zeros(do, o, BLOCK_D)
    else:
        delta, dq = torch.empty_like(lse), None
        name = launch_op("attention_bwd_dq", p, doc_ids)
        row = pick(name, qkv, D)
        tiles = cdiv(T, row.blocks["BLOCK_M"])
        dq_sums = sums(tiles, 1)
        first, _ = document_spans(doc_ids, row.blocks["BLOCK_M"])
        launch(
            name, _attention_bwd_dq_kernel, (tiles * B * H,),
            qkv, o, do, lse, doc_ids, first, seed, dqkv, delta, dq_sums, *numbers,
            row=row, RAGGED=ragged(T, row), **shape,
        )  # fmt: skip
    name = launch_op("attention_bwd_atomic" if atomic else "attention_bwd_dkdv", p, doc_ids)
    row = pick(name, qkv, D)
    tiles = cdiv(T, row.blocks["BLOCK_N"])
    dkdv_sums = sums(tiles, 2)
    _, end = document_spans(doc_ids, row.blocks["BLOCK_N"])
    launch(
        name, _attention_bwd_dkdv_kernel, (tiles * B * H,),
        qkv, do, lse, delta, doc_ids, end, seed, dqkv, dq, dkdv_sums, *numbers,
        row=row, RAGGED=ragged(T, row), ATOMIC=atomic, **shape,
    )  # fmt: skip
    if dq is not None:
        dq_sums = write_dq(dq, dqkv, BLOCK_D, bias_grad)
    return dqkv, dq_sums, dkdv_sums
