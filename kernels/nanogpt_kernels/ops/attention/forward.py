"""Causal attention, forward: o = softmax(q k^T / sqrt(D)) v on packed qkv [B, T, 3, H, D], no transposes, no copies.

One program computes BLOCK_M queries of one head, with their q tile loaded once and a loop over BLOCK_N keys at a time.
A branch masks the tiles on the diagonal: a second loop for them would drain the first one's loads and wait for its own
(beside dropout there are two loops, beside dropout or documents no branch: ptxas would serialise wgmma). From sm_90 on
keys and values may come by TMA (the row's choice `tma`). Online softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao,
arXiv 2307.08691): maximum m and sum l are float32, in powers of two (log2(e) is folded into the scale), and
lse = m + log2(l) is kept for backward. Probabilities are rounded to v's dtype for the second product; dropout acts on
them after the row sum. Each query's result depends on its own row of qkv alone: the same bits at any B.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...contract import require, require_dropout, require_float, require_same_device
from ...launch import Row, architecture, cdiv, describable, launch, pick
from ...primitives import dropout_args, keep_mask
from ...registry import register
from .documents import document_spans
from .tile_access import causal, load_where, query_tile

INTEGERS = (torch.int32, torch.int64)
MAX_D = 128  # the widest head that launch_rows.py has rows for


@triton.jit
def load_keys(
    k_ptr, v_ptr, at, left, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """k, v [BLOCK_N, BLOCK_D] at k_ptr + at and v_ptr + at. RAGGED: only `left` of them may exist; zeros elsewhere."""
    keys, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = (d < D)[None, :]
    if RAGGED:
        inside = (keys < left)[:, None] & (d < D)[None, :] if D < BLOCK_D else (keys < left)[:, None]
    k = load_where(k_ptr + at, inside, RAGGED or D < BLOCK_D)
    return k, load_where(v_ptr + at, inside, RAGGED or D < BLOCK_D)


@triton.jit
def attend(
    acc, l, m, q, k, v, first, j, end, log2_scale, doc_i, doc_ids_ptr, seed, site, threshold, first_row, T,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Running (acc, l, m) of queries `first`... after keys j..., k and v [BLOCK_N, BLOCK_D].

    MASK: keys may come after queries ("causal"), or lie at `end` or beyond ("end"), or none does (""). Such keys weigh
    nothing. first_row is the first query's row of the probabilities seen as [B*H*T, T].
    """
    rows, keys, left = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), end - j
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASK == "causal":
        s = causal(s, j, first, float("-inf"), BLOCK_M, BLOCK_N, False, BRANCH=not (DROPOUT or DOCUMENTS))
    elif MASK == "end":
        s = tl.where((keys < left)[None, :], s, float("-inf"))
    if DOCUMENTS:
        doc_j = tl.load(doc_ids_ptr + j + keys, mask=keys < left, other=0)
        s = tl.where(doc_i[:, None] == doc_j[None, :], s, float("-inf"))
    # m is never -inf (see its start), so -inf - m is no NaN; max ignores a NaN in s, the sum does not
    m_next = tl.maximum(m, tl.max(s, 1) * log2_scale)
    p = tl.math.exp2(s * log2_scale - m_next[:, None])
    shrink = tl.math.exp2(m - m_next)
    l = l * shrink + tl.sum(p, 1)
    if DROPOUT:
        keep = keep_mask(seed, site, threshold, first_row + rows, j, tl.cdiv(T, 4), BLOCK_M, BLOCK_N)
        p = tl.where(keep, p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, l, m_next


@triton.jit(do_not_specialize=["site", "threshold"])
def _attention_fwd_kernel(
    qkv_ptr,  # [B, T, 3, H, D]
    tiles,  # TMA: a descriptor of qkv as [B*T, 3*H*D], in tiles [BLOCK_N, D]; else None
    doc_ids_ptr,  # [B, T] int32 or int64, or None
    first_ptr,  # [B, tiles] int32, the first key of each query tile's documents, or None
    seed_ptr,  # [1] int64, or None
    o_ptr,  # [B, T, H, D]
    lse_ptr,  # [B, H, T] float32
    heads,
    T,
    H,
    log2_scale,
    site,
    threshold,
    keep_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, tile = query_tile(tl.program_id(0), heads, T, D, BLOCK_M, ITEMSIZE)
    # 64-bit offsets are scalars, added to pointers; a tile's own offsets stay 32-bit. Both save registers.
    b, h, first = (head // H).to(tl.int64), head % H, tile * BLOCK_M
    rows, d, left = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), T - first
    inside = (rows < left)[:, None] & (d < D)[None, :] if D < BLOCK_D else (rows < left)[:, None]
    qkv_ptr += b * T * (3 * H * D) + h * D
    q_ptr = qkv_ptr + first.to(tl.int64) * (3 * H * D)
    q = tl.load(q_ptr + rows[:, None] * (3 * H * D) + d[None, :], mask=inside, other=0.0)
    k_ptr = qkv_ptr + H * D
    v_ptr = k_ptr + H * D
    at = tl.arange(0, BLOCK_N)[:, None] * (3 * H * D) + d[None, :]
    token, column = head // H * T, h * D  # of tiles, whose coordinates are 32-bit
    doc_i, start = rows, 0
    if DOCUMENTS:
        start = tl.load(first_ptr + b * tl.cdiv(T, BLOCK_M) + tile) // BLOCK_N * BLOCK_N
        doc_ids_ptr += b * T
        doc_i = tl.load(doc_ids_ptr + first + rows, mask=rows < left, other=0)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    first_row = head.to(tl.int64) * T + first  # of the probabilities seen as [B*H*T, T]

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], -3.4028234663852886e38, tl.float32)  # lowest: below every score but -inf
    end = tl.minimum(first + BLOCK_M, T) if RAGGED else first + BLOCK_M
    # beside dropout ptxas serialises every wgmma of a single loop
    LOOPS: tl.constexpr = 2 if DROPOUT else 1
    diagonal = first // BLOCK_N * BLOCK_N
    for loop in tl.static_range(LOOPS):
        for j in range(start if loop == 0 else diagonal, diagonal if loop < LOOPS - 1 else end, BLOCK_N):
            if TMA:
                k = tiles.load([token + j, H * D + column])
                v = tiles.load([token + j, 2 * H * D + column])
            else:
                # not pointers carried from tile to tile: with three stages ptxas serialised every wgmma (its C7515)
                to = tl.cast(j, tl.int64) * (3 * H * D)
                k, v = load_keys(k_ptr + to, v_ptr + to, at, T - j, D, BLOCK_D, BLOCK_N, RAGGED)
            acc, l, m = attend(
                acc, l, m, q, k, v, first, j, T, log2_scale, doc_i, doc_ids_ptr, seed, site, threshold, first_row, T,
                BLOCK_M, BLOCK_N, DROPOUT, DOCUMENTS, PRECISION, MASK="causal" if loop == LOOPS - 1 else "",
            )  # fmt: skip

    o = acc * (keep_scale / l)[:, None]
    o_ptr += (b * T + first) * (H * D) + h * D
    tl.store(o_ptr + rows[:, None] * (H * D) + d[None, :], o.to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + first_row + rows, m + tl.math.log2(l), mask=rows < left)


def dot_precision(x: Tensor) -> str:
    """input_precision of products of x's dtype: exact float32 unless TF32 is allowed, as torch.matmul decides."""
    # not allow_tf32: reading that raises once the newer setting has been used
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def block_d(D: int) -> int:
    """Columns of a tile: tl.dot wants a power of two from 16 on."""
    return max(16, int(triton.next_power_of_2(D)))


def log2_scale(D: int) -> float:
    """log2(e) / sqrt(D): scores times this are exponents of two."""
    return math.log2(math.e) / math.sqrt(D)


def launch_op(name: str, p: float, doc_ids: Tensor | None) -> str:
    """Dropout and documents take registers, so with either of them a kernel has launch rows of its own."""
    return name if p == 0.0 and doc_ids is None else f"{name}_dropout_or_docs"


def ragged(T: int, row: Row) -> bool:
    """Whether some tile of queries or keys is not full."""
    # not of a symbolic T (a fake run, which launches nothing): torch.compile would compile again for each answer
    return isinstance(T, torch.SymInt) or T % row.blocks["BLOCK_M"] != 0 or T % row.blocks["BLOCK_N"] != 0


def key_tiles(qkv: Tensor, row: Row) -> TensorDescriptor | None:
    """A descriptor for the row's tiles of keys and values, where the row asks for TMA and it can address them.

    No tile may go past T: the next sequence follows, not zeros."""
    B, T, _, H, D = qkv.shape
    tokens = qkv.view(B * T, 3 * H * D)
    if not row.choices.get("tma") or block_d(D) > D or architecture(qkv.device) < 90 or not describable(tokens):
        return None
    return TensorDescriptor.from_tensor(tokens, [row.blocks["BLOCK_N"], D])


def check_attention(
    op: str, qkv: Tensor, p: float, seed: Tensor | None, doc_ids: Tensor | None
) -> tuple[int, int, int, int]:
    """(B, T, H, D) of operands that fulfil the contract."""
    require(qkv.dim() == 5 and qkv.size(2) == 3, op, "qkv must be [B, T, 3, H, D]", qkv=qkv)
    require(1 <= qkv.size(4) <= MAX_D, op, f"head size D must be in 1...{MAX_D}", qkv=qkv)
    require_float(op, qkv=qkv)
    require_dropout(op, p, seed)
    require_same_device(op, qkv=qkv, seed=seed, doc_ids=doc_ids)
    if doc_ids is not None:
        ok = doc_ids.shape == qkv.shape[:2] and doc_ids.dtype in INTEGERS
        require(ok, op, "doc_ids must be int32 or int64 [B, T]", doc_ids=doc_ids, qkv=qkv)
    B, T, _, H, D = qkv.shape
    return B, T, H, D


@register("attention_fwd(Tensor qkv, float p, Tensor? seed, int site, Tensor? doc_ids) -> (Tensor, Tensor)")
def attention_fwd(
    qkv: Tensor, p: float, seed: Tensor | None, site: int, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """qkv [B, T, 3, H, D] -> (o [B, T, H, D], lse [B, H, T] float32: log2 of the sum of the rows' exponentials)."""
    B, T, H, D = check_attention("attention", qkv, p, seed, doc_ids)
    qkv = qkv.contiguous()
    o = torch.empty(B, T, H, D, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=qkv.device)
    op = launch_op("attention_fwd", p, doc_ids)
    row = pick(op, qkv, D)
    seed, threshold, keep_scale = dropout_args(p, seed)
    doc_ids = None if doc_ids is None else doc_ids.contiguous()
    first, _ = document_spans(doc_ids, row.blocks["BLOCK_M"])
    uneven = ragged(T, row)
    tiles = None if uneven else key_tiles(qkv, row)
    launch(
        op, _attention_fwd_kernel, (cdiv(T, row.blocks["BLOCK_M"]) * B * H,),
        qkv, tiles, doc_ids, first, seed, o, lse, B * H, T, H, log2_scale(D), site, threshold, keep_scale,
        row=row, D=D, BLOCK_D=block_d(D), ITEMSIZE=qkv.element_size(), RAGGED=uneven, TMA=tiles is not None,
        DROPOUT=p > 0.0, DOCUMENTS=doc_ids is not None, PRECISION=dot_precision(qkv),
    )  # fmt: skip
    return o, lse
