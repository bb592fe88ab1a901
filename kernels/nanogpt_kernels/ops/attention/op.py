"""The attention ops: attention on packed qkv, qkv_attention with the projection before it, cached_attention.

qkv_attention is one autograd node. It keeps y, the projection's output qkv, o and lse; the bias's gradient comes from
sums that the backward launches write, which column_sums.py adds up, without another pass over dqkv.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...contract import main_grad_of, position_args, require, require_float, require_one_dtype
from ...registry import differentiating, number, once, without_autocast
from ..column_sums import vector_grad_of, vector_grads
from ..linear import weight_grad
from .backward import attention_bwd
from .decode import cached_attention_
from .forward import attention_fwd


@without_autocast
def _project(op: str, y: Tensor, w_qkv: Tensor, b_qkv: Tensor | None, n_head: int) -> Tensor:
    """y w_qkv^T + b_qkv as [B, T, 3, H, D], by cuBLAS."""
    require(y.dim() == 3, op, "y must be [B, T, C]", y=y)
    B, T, C = y.shape
    require(w_qkv.shape == (3 * C, C), op, "w_qkv must be [3C, C]", w_qkv=w_qkv, y=y)
    require_one_dtype(op, y=y, w_qkv=w_qkv)
    require(n_head > 0 and C % n_head == 0, op, "n_head must divide C", n_head=n_head, y=y)
    require(b_qkv is None or b_qkv.shape == (3 * C,), op, "b_qkv must be [3C]", b_qkv=b_qkv, y=y)
    require_float(op, b_qkv=b_qkv)
    qkv = F.linear(y, w_qkv, None if b_qkv is None else b_qkv.to(y.dtype))
    return qkv.view(B, T, 3, n_head, C // n_head)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, p: float, seed: Tensor | None, site: int, doc_ids: Tensor | None) -> Tensor:
        qkv = qkv.contiguous()
        o, lse = attention_fwd(qkv, p, seed, site, doc_ids)
        ctx.save_for_backward(qkv, o, lse, seed, doc_ids)
        ctx.p, ctx.site = p, site
        return o

    @staticmethod
    @once
    def backward(ctx, *grads: Tensor):
        qkv, o, lse, seed, doc_ids = ctx.saved_tensors
        dqkv, _, _ = attention_bwd(grads[0], qkv, o, lse, ctx.p, seed, ctx.site, doc_ids, False)
        return dqkv, None, None, None, None


def attention(qkv: Tensor, p: float, seed: Tensor | None, site: int, doc_ids: Tensor | None = None) -> Tensor:
    """Causal softmax(q k^T / sqrt(D)) v on packed qkv [B, T, 3, H, D] -> [B, T, H, D]; D up to 128.

    p: dropout of the probabilities [B, H, T, T], drawn from seed (int64 [1]) at `site`. With doc_ids [B, T] (int32 or
    int64) a token attends only to tokens with its own id.
    """
    if differentiating("attention", qkv):
        return _Attention.apply(qkv, number(p), seed, site, doc_ids)
    return attention_fwd(qkv, p, seed, site, doc_ids)[0]


class _QKVAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, w_qkv, b_qkv, n_head: int, p: float, seed, site: int, doc_ids) -> Tensor:
        qkv = _project("qkv_attention", y, w_qkv, b_qkv, n_head)
        o, lse = attention_fwd(qkv, p, seed, site, doc_ids)
        ctx.save_for_backward(y, w_qkv, qkv, o, lse, seed, doc_ids)
        ctx.main_grad, ctx.b_qkv = main_grad_of(w_qkv), vector_grad_of("qkv_attention", b_qkv)
        ctx.p, ctx.site = p, site
        return o.view(y.shape)

    @staticmethod
    @once
    def backward(ctx, *grads: Tensor):
        y, w_qkv, qkv, o, lse, seed, doc_ids = ctx.saved_tensors
        needs_y, needs_w, needs_b = ctx.needs_input_grad[:3]
        do = grads[0].reshape(o.shape)
        dqkv, *partials = attention_bwd(do, qkv, o, lse, ctx.p, seed, ctx.site, doc_ids, needs_b)
        dqkv = dqkv.view(*y.shape[:2], w_qkv.size(0))
        dw = weight_grad(dqkv, y, ctx.main_grad) if needs_w else None
        dy = dqkv @ w_qkv if needs_y else None
        (db,) = vector_grads([partials], [needs_b], [ctx.b_qkv])
        return dy, dw, db, None, None, None, None, None


def qkv_attention(
    y: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    n_head: int,
    p: float,
    seed: Tensor | None,
    site: int,
    doc_ids: Tensor | None = None,
) -> Tensor:
    """attention(y w_qkv^T + b_qkv); y [B, T, C], w_qkv [3C, C], b_qkv [3C] float32 -> o [B, T, C]."""
    if differentiating("qkv_attention", y, w_qkv, b_qkv):
        return _QKVAttention.apply(y, w_qkv, b_qkv, n_head, number(p), seed, site, doc_ids)
    return attention_fwd(_project("qkv_attention", y, w_qkv, b_qkv, n_head), p, seed, site, doc_ids)[0].view(y.shape)


@torch.no_grad()
def cached_attention(
    y: Tensor, w_qkv: Tensor, b_qkv: Tensor | None, n_head: int, cache: Tensor, start: int | Tensor
) -> Tensor:
    """qkv_attention of T new tokens at positions start... against a cache [2, B, H, T_max, D] of keys and values,
    which receives theirs; no dropout, no gradient. y [B, T, C] -> o [B, T, C].

    start: an int, or int64 [1] on the device, which gives the same bits; out of range there, o is NaN, and nothing is
    written."""
    start, start_at = position_args(start)
    qkv = _project("cached_attention", y, w_qkv, b_qkv, n_head)
    return cached_attention_(qkv, cache, start, start_at).view(y.shape)
