"""Attention of T new tokens at positions start... against a cache of the keys and values before them.

Programs own (query tile of one head, keys_a_split cached keys), as in flash-decoding (Dao, Haziza, Massa and Sizov,
2023): one token has too few heads to fill a GPU. The last split also takes the new tokens' own keys, read from qkv, and
copies them into the cache: no program reads what another writes. Several splits leave unnormalised sums, maxima and
row sums in float32, which a second launch merges in order of position. How keys are split depends on `start` alone,
so results are the same bits at any B and from run to run.

`start` is an int, or lies on the device, where a replayed CUDA graph reads it anew. Then there are as many splits as
T_max may need; those past `start` leave empty sums, which change no bit of what is merged before them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...contract import require, require_float, require_position, require_same_device
from ...launch import cdiv, launch, pick
from ...primitives import position_at
from ...registry import register
from .forward import MAX_D, attend, block_d, dot_precision, load_keys, log2_scale


@triton.jit(do_not_specialize=["start", "last"])
def _cached_attention_kernel(
    qkv_ptr,  # [B, T, 3, H, D]
    cache_ptr,  # [2, B, H, T_max, D], strided
    o_ptr,  # [B, T, H, D]; SPLIT: float32 [splits, B, T, H, D], sums not yet divided
    m_ptr,  # SPLIT: float32 [splits, B, T, H], maxima; else None
    l_ptr,  # SPLIT: float32 [splits, B, T, H], sums of exponentials; else None
    start_ptr,  # [1] int64, at most `last`, or None: then `start` counts
    B,
    T,
    H,
    start,
    last,
    log2_scale,
    to_values,
    to_b,
    to_head,
    to_token,
    to_d,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, split, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_M
    b, h = (head // H).to(tl.int64), head % H
    rows, keys, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    if start_ptr is not None:
        start, in_range = position_at(start_ptr, last)
    inside = (rows < T - first)[:, None] & (d < D)[None, :]
    qkv_ptr += b * T * (3 * H * D) + h * D
    new_rows = qkv_ptr + first.to(tl.int64) * (3 * H * D) + rows[:, None] * (3 * H * D) + d[None, :]
    q = tl.load(new_rows, mask=inside, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], -3.4028234663852886e38, tl.float32)  # lowest: below every score but -inf
    cache_ptr += b * to_b + tl.cast(h, tl.int64) * to_head
    k_ptr = cache_ptr + tl.cast(split * KEYS, tl.int64) * to_token
    at = keys.to(tl.int64)[:, None] * to_token + d[None, :] * to_d
    end = tl.minimum(split * KEYS + KEYS, start)
    for j in range(split * KEYS, end, BLOCK_N):
        k, v = load_keys(k_ptr, k_ptr + to_values, at, end - j, D, BLOCK_D, BLOCK_N, RAGGED=True)
        acc, l, m = attend(
            acc, l, m, q, k, v, first, j, end, log2_scale, rows, qkv_ptr, seed=0, site=0, threshold=0, first_row=0, T=T,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, DROPOUT=False, DOCUMENTS=False, PRECISION=PRECISION, MASK="end",
        )  # fmt: skip
        k_ptr += tl.cast(BLOCK_N, tl.int64) * to_token

    if split == tl.maximum(tl.cdiv(start, KEYS), 1) - 1:
        new_k_ptr = qkv_ptr + H * D
        new_at = keys[:, None] * (3 * H * D) + d[None, :]
        for j in range(0, tl.minimum(first + BLOCK_M, T), BLOCK_N):
            k, v = load_keys(new_k_ptr, new_k_ptr + H * D, new_at, T - j, D, BLOCK_D, BLOCK_N, RAGGED=True)
            acc, l, m = attend(
                acc, l, m, q, k, v, first, j, T, log2_scale, rows, qkv_ptr, seed=0, site=0, threshold=0, first_row=0,
                T=T, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, DROPOUT=False, DOCUMENTS=False, PRECISION=PRECISION,
                MASK="causal",
            )  # fmt: skip
            new_k_ptr += BLOCK_N * (3 * H * D)
        into = cache_ptr + (start + first + rows).to(tl.int64)[:, None] * to_token + d[None, :] * to_d
        if start_ptr is not None:
            acc = tl.where(in_range, acc, float("nan"))
            inside_cache = inside & in_range
        else:
            inside_cache = inside
        tl.store(into, tl.load(new_rows + H * D, mask=inside), mask=inside_cache)
        tl.store(into + to_values, tl.load(new_rows + 2 * H * D, mask=inside), mask=inside_cache)

    row = (split.to(tl.int64) * B + b) * T + first + rows
    if SPLIT:
        tl.store(m_ptr + row * H + h, m, mask=rows < T - first)
        tl.store(l_ptr + row * H + h, l, mask=rows < T - first)
    else:
        acc = acc / l[:, None]
    o_ptrs = o_ptr + (row * (H * D) + h * D)[:, None] + d[None, :]
    tl.store(o_ptrs, acc.to(o_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _merge_splits_kernel(
    acc_ptr,  # [splits, B*T*H, D] float32
    m_ptr,  # [splits, B*T*H] float32
    l_ptr,  # [splits, B*T*H] float32
    o_ptr,  # [B*T*H, D]
    rows,
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    m = tl.load(m_ptr + row)
    l = m * 0.0
    for _ in range(splits):
        m_split = tl.load(m_ptr + row)
        m_next = tl.maximum(m, m_split)
        shrink, weight = tl.math.exp2(m - m_next), tl.math.exp2(m_split - m_next)
        acc = acc * shrink + tl.load(acc_ptr + row * D + d, mask=d < D, other=0.0) * weight
        l = l * shrink + tl.load(l_ptr + row) * weight
        m = m_next
        acc_ptr += tl.cast(rows, tl.int64) * D
        m_ptr += rows
        l_ptr += rows
    tl.store(o_ptr + row * D + d, (acc / l).to(o_ptr.dtype.element_ty), mask=d < D)


@register("cached_attention_(Tensor qkv, Tensor(a!) cache, SymInt start, Tensor? start_at=None) -> Tensor")
def cached_attention_(qkv: Tensor, cache: Tensor, start: int, start_at: Tensor | None = None) -> Tensor:
    """Attention of qkv [B, T, 3, H, D] at positions start..., whose keys and values go into cache [2, B, H, T_max, D].

    start_at: int64 [1], instead of start. Returns o [B, T, H, D].
    """
    op = "cached_attention"
    require(qkv.dim() == 5 and qkv.size(2) == 3, op, "qkv must be [B, T, 3, H, D]", qkv=qkv)
    B, T, _, H, D = qkv.shape
    require(1 <= D <= MAX_D, op, f"head size D must be in 1...{MAX_D}", qkv=qkv)
    require_float(op, qkv=qkv)
    require_same_device(op, qkv=qkv, cache=cache, start=start_at)
    ok = cache.dim() == 5 and cache.dtype == qkv.dtype
    ok = ok and (cache.size(0), cache.size(1), cache.size(2), cache.size(4)) == (2, B, H, D)
    require(ok, op, "cache must be [2, B, H, T_max, D] in qkv's dtype", cache=cache, qkv=qkv)
    rule, last = "positions start...start + T must be within T_max", cache.size(3) - T
    require_position(op, rule, start, start_at, last, qkv=qkv, cache=cache)
    qkv = qkv.contiguous()
    row = pick(op, qkv, T)
    keys = row.choices["keys_a_split"]
    splits = max(1, cdiv(start if start_at is None else last, keys))
    o = torch.empty(B, T, H, D, dtype=qkv.dtype, device=qkv.device)
    acc, m, l = o, None, None
    if splits > 1:
        acc = torch.empty((splits, B, T, H, D), dtype=torch.float32, device=qkv.device)
        m = torch.empty((splits, B, T, H), dtype=torch.float32, device=qkv.device)
        l = torch.empty_like(m)
    launch(
        op, _cached_attention_kernel, (B * H, splits, cdiv(T, row.blocks["BLOCK_M"])),
        qkv, cache, acc, m, l, start_at, B, T, H, start, last, log2_scale(D), *cache.stride(),
        row=row, D=D, BLOCK_D=block_d(D), KEYS=keys, SPLIT=splits > 1, PRECISION=dot_precision(qkv),
    )  # fmt: skip
    if splits > 1:
        launch(
            "cached_attention_merge", _merge_splits_kernel, (B * T * H,),
            acc, m, l, o, B * T * H, splits, D=D, BLOCK_D=block_d(D), num_warps=1,
        )  # fmt: skip
    return o
