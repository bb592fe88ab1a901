"""The specification: every op of the model in plain PyTorch, differentiable, on any device and dtype.

Letters: B batch, T time, C channels, H heads, D = C / H, V vocabulary, M = B*T rows, F = 4C. Linear weights are
(out, in). One-dimensional parameters are float32 whatever the activations' dtype; statistics and losses are float32
(float64 for float64 inputs).

Where a weight carries `main_grad` (a float32 view of the flat gradient buffer), its gradient is added there in
backward and autograd gets None; otherwise autograd gets it as usual.

Dropout at `site` keeps element (m, n) of a tensor seen as [M, N] when word n % 4 of Philox4x32-10 is at least
floor(p * 2^32), with key = seed (64 bit), counter = (g mod 2^32, g div 2^32, site, 0), g = m * ceil(N / 4) + n // 4.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import GRAD_NORM, LOSS_SCALE, LR, MAX_NORM, STEP, device_type_of, main_grad_of

_MASK32 = 0xFFFFFFFF


def exact_device(device: torch.device) -> torch.device:
    """Where float64 and 64-bit integer arithmetic are computed: the device itself, for Apple's MPS the CPU.

    MPS has no float64 (pytorch/pytorch#122602), its integer shifts were silently wrong in torch 2.5 to 2.7 (#144190,
    #147889), its multinomial crashes on large inputs (#178579), uint16 failed (#159076). So Philox, adamw_'s scalars,
    sums in float64, token ids before they are int64, and drawing stay on the CPU.
    """
    return torch.device("cpu") if device.type == "mps" else device


# ---- dropout ----


def philox(seed: Tensor, group: Tensor, site: int) -> list[Tensor]:
    """Four 32-bit words (int64 tensors shaped like `group`) of Philox4x32-10. seed: int64 [1] or []."""
    counter = [group & _MASK32, (group >> 32) & _MASK32, torch.full_like(group, site), torch.zeros_like(group)]
    key = [seed & _MASK32, (seed >> 32) & _MASK32]
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57  # exact modulo 2^64
        counter = [
            ((second >> 32) & _MASK32) ^ counter[1] ^ key[0],
            second & _MASK32,
            ((first >> 32) & _MASK32) ^ counter[3] ^ key[1],
            first & _MASK32,
        ]
        key = [(key[0] + 0x9E3779B9) & _MASK32, (key[1] + 0xBB67AE85) & _MASK32]
    return counter


def dropout_mask(shape: torch.Size | tuple[int, ...], p: float, seed: Tensor, site: int) -> Tensor:
    """The keep-mask, bool, of a tensor of this shape (last dimension = N, all others together = M)."""
    N = shape[-1]
    groups_a_row = (N + 3) // 4
    M = torch.Size(shape[:-1]).numel()
    group = torch.arange(M * groups_a_row, device=seed.device)
    words = torch.stack(philox(seed, group, site), dim=-1).view(M, 4 * groups_a_row)
    return (words[:, :N] >= int(p * 2**32)).view(shape)


def dropout(x: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
    """x where kept, scaled by 1 / (1 - p), else 0; the mask is a function of (seed, site) alone. p = 0 needs none."""
    if p == 0.0:
        return x
    if seed is None:
        raise ValueError("dropout needs a seed, one int64")
    mask = dropout_mask(x.shape, p, seed.to(exact_device(x.device)), site).to(x.device)
    return torch.where(mask, x * (1.0 / (1.0 - p)), 0.0)


# ---- linear ----


class _Linear(torch.autograd.Function):
    """x w^T, adding dw into w.main_grad, which is set; or gelu(x) w^T, of which x alone is kept (gelu: its variant)."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, b: Tensor | None, gelu: str | None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.main_grad = main_grad_of(w)
        ctx.has_bias, ctx.gelu = b is not None, gelu
        return F.linear(x if gelu is None else F.gelu(x, approximate=gelu), w, None if b is None else b.to(x.dtype))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, w = ctx.saved_tensors
        dy = grads[0].flatten(0, -2)
        x_rows = (x if ctx.gelu is None else F.gelu(x, approximate=ctx.gelu)).flatten(0, -2)
        if dy.dtype == torch.float32:
            ctx.main_grad.addmm_(dy.t(), x_rows)
        elif device_type_of(dy) == "cuda" and not torch.compiler.is_compiling():  # inductor has no addmm with out_dtype
            if not dy.is_meta:  # which addmm's out_dtype refuses before pytorch/pytorch#179634
                torch.addmm(ctx.main_grad, dy.t(), x_rows, out_dtype=torch.float32, out=ctx.main_grad)
        else:
            ctx.main_grad.add_(dy.t() @ x_rows)
        dx = (dy @ w).view_as(x) if ctx.needs_input_grad[0] else None
        if dx is not None and ctx.gelu is not None:
            dx = torch.ops.aten.gelu_backward(dx, x, approximate=ctx.gelu)
        return dx, None, dy.sum(0, dtype=torch.float32) if ctx.has_bias else None, None


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x [..., C_in] times w [C_out, C_in] transposed, plus b [C_out] -> [..., C_out]."""
    if main_grad_of(w) is not None and torch.is_grad_enabled():
        return _Linear.apply(x, w, b, None)
    return F.linear(x, w, None if b is None else b.to(x.dtype))


# ---- the model's ops ----


class _Lookup(torch.autograd.Function):
    """table[idx], adding the gradient into table.main_grad."""

    @staticmethod
    def forward(ctx, idx: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(idx)
        ctx.main_grad = main_grad_of(table)
        return F.embedding(idx, table)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (dr,), (idx,) = grads, ctx.saved_tensors
        ctx.main_grad.index_add_(0, idx.flatten(), dr.flatten(0, -2).to(ctx.main_grad.dtype))
        return None, None


def _lookup(idx: Tensor, table: Tensor) -> Tensor:
    if main_grad_of(table) is not None and torch.is_grad_enabled():
        return _Lookup.apply(idx, table)
    return F.embedding(idx, table)


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
    """dropout(wte[idx] + wpe[start : start + T]); idx [B, T] int64 -> r [B, T, C] in out_dtype (default: wte's).
    start: an int, or int64 [1] on the device."""
    first = 0 if isinstance(start, Tensor) else start
    positions = torch.arange(first, first + idx.size(1), device=idx.device)
    positions = positions + start if isinstance(start, Tensor) else positions
    dtype = out_dtype or wte.dtype
    return dropout(_lookup(idx, wte).to(dtype) + _lookup(positions, wpe).to(dtype), p, seed, site)


def norm(r: Tensor, w: Tensor, b: Tensor | None, eps: float = 1e-5, out_dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm over the last dimension: (r - mean) / sqrt(var + eps) * w + b; w, b [C] float32.

    The result is in out_dtype, by default r's.
    """
    # In w's dtype: given a bfloat16 r, torch's CPU kernel sums dw in bfloat16 (13% off after 16K rows, measured on
    # 2.13), and its CUDA kernel refuses (pytorch/pytorch#138128).
    return F.layer_norm(r.to(w.dtype), w.shape, w, b, eps).to(out_dtype or r.dtype)


def add_norm(
    r: Tensor,
    delta: Tensor,
    delta_bias: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    """r' = r + dropout(delta + delta_bias), y = norm(r'); all [..., C]; returns (r', y).

    r may be wider than delta (a float32 residual stream): r' keeps its dtype, y has delta's.
    """
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype)
    r = r + dropout(delta, p, seed, site)
    return r, norm(r, w, b, eps, delta.dtype)


def attention(qkv: Tensor, p: float, seed: Tensor | None, site: int, doc_ids: Tensor | None = None) -> Tensor:
    """Causal softmax(q k^T / sqrt(D)) v on packed qkv [B, T, 3, H, D] -> [B, T, H, D].

    With doc_ids [B, T] a token attends only to tokens with its own id. Dropout acts on the probabilities [B, H, T, T].
    """
    if device_type_of(qkv) == "cpu" and qkv.dtype in (torch.bfloat16, torch.float16):
        # In float32: scores rounded to bfloat16 are 3.5 times as wrong as torch's own attention, whose bfloat16
        # backward is 7 times as slow (one core, B=12 T=64 H=4 D=32: 2.0 ms here, 15 ms there; float16 products 44 ms).
        return attention(qkv.float(), p, seed, site, doc_ids).to(qkv.dtype)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, T, D] each, no copy; backward packs in one
    if p == 0.0 and device_type_of(qkv) != "mps":
        mask = None if doc_ids is None else _allowed(qkv, doc_ids)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)
    return _written_out(q, k, v, _allowed(qkv, doc_ids), p, seed, site).transpose(1, 2)


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, p: float = 0.0, seed: Tensor | None = None, site: int = 0
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v where allowed: for dropout, and for MPS: its scaled_dot_product_attention was wrong,
    silently, on permuted q, k, v (pytorch/pytorch#163597, #181133) and under 16-bit causal masks (#195910)."""
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)
    scores = scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))
    probs = scores.softmax(-1, dtype=_statistics_dtype(q))
    return dropout(probs, p, seed, site).to(v.dtype) @ v


def _allowed(qkv: Tensor, doc_ids: Tensor | None) -> Tensor:
    """Which keys a query may see: bool [T, T], or [B, 1, T, T] with documents."""
    causal = torch.ones(qkv.size(1), qkv.size(1), dtype=torch.bool, device=qkv.device).tril()
    return causal if doc_ids is None else causal & (doc_ids[:, None, :, None] == doc_ids[:, None, None, :])


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
    """attention(y w_qkv^T + b_qkv); y [B, T, C], w_qkv [3C, C] -> o [B, T, C]."""
    B, T, C = y.shape
    qkv = linear(y, w_qkv, b_qkv).view(B, T, 3, n_head, C // n_head)
    return attention(qkv, p, seed, site, doc_ids).reshape(B, T, C)


def cached_attention(
    y: Tensor, w_qkv: Tensor, b_qkv: Tensor | None, n_head: int, cache: Tensor, start: int | Tensor
) -> Tensor:
    """qkv_attention of T new tokens at positions start... against a cache [2, B, H, T_max, D] of keys and values,
    which receives theirs; no dropout, no gradient. y [B, T, C] -> o [B, T, C]. start as embedding's; one on the device
    masks the whole cache, which must be finite."""
    B, T, C = y.shape
    q, *kv = linear(y, w_qkv, b_qkv).view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)
    if isinstance(start, Tensor):
        at = start + torch.arange(T, device=y.device)
        keys, values = (part.index_copy_(2, at, new) for part, new in zip(cache, kv))
        allowed = torch.arange(cache.size(3), device=y.device) <= at[:, None]
    else:
        cache[0, :, :, start : start + T], cache[1, :, :, start : start + T] = kv
        keys, values = cache[0, :, :, : start + T], cache[1, :, :, : start + T]
        if start == 0 and y.device.type != "mps":  # reads no mask, skips masked keys: 0.6 of the time at T = 1024
            return F.scaled_dot_product_attention(q, keys, values, is_causal=True).transpose(1, 2).reshape(B, T, C)
        allowed = None if T == 1 else torch.ones(T, start + T, dtype=torch.bool, device=y.device).tril(start)
    attend = _written_out if y.device.type == "mps" else F.scaled_dot_product_attention
    return attend(q, keys, values, allowed).transpose(1, 2).reshape(B, T, C)


def mlp(
    y: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, activation: str = "gelu", recompute: bool = False
) -> Tensor:
    """gelu(y w_fc^T + b_fc) w_proj^T; w_fc [F, C], w_proj [C, F]; the projection's bias belongs to the next add_norm.

    activation: "gelu" is x Phi(x) by erf, "gelu_tanh" GPT-2's tanh approximation of it. recompute asks to rebuild the
    activations in backward rather than keep them; it changes memory, never results (here where w_proj has main_grad).
    """
    pre, variant = linear(y, w_fc, b_fc), "tanh" if activation == "gelu_tanh" else "none"
    if recompute and main_grad_of(w_proj) is not None and torch.is_grad_enabled():
        return _Linear.apply(pre, w_proj, None, variant)
    return linear(F.gelu(pre, approximate=variant), w_proj)


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    grad_scale: Tensor | float = 1.0,
    ignore_index: int = -1,
    valid_vocab: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits x w^T against targets; x [..., C], w [V, C], targets [...] int64.

    Returns (loss, nll): nll [M] is each row's negative log-likelihood, 0 where the target is ignore_index, detached;
    loss = grad_scale * sum(nll), the only differentiable output, and backward must be called on it with gradient 1.
    Logit columns from valid_vocab on take no part.
    """
    logits = linear(x.flatten(0, -2), w)
    logits = logits.to(_statistics_dtype(logits))
    if valid_vocab is not None and valid_vocab < w.size(0):
        logits = logits[:, :valid_vocab]
    nll = F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction="none")
    return (nll * grad_scale).sum(), nll.detach()


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- the optimizer's ops ----


def grad_norm(g: Tensor) -> Tensor:
    """The 2-norm of the flat gradient g [N] float32, as a float32 scalar on its device."""
    return torch.linalg.vector_norm(g)


def adamw_(
    p: Tensor | None,
    master: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    scalars: Tensor,
    segments: list[tuple[int, int, float]],
    beta1: float,
    beta2: float,
    eps: float = 1e-8,
) -> None:
    """One AdamW update, in place, of flat float32 buffers [N]; p, when given, receives master in its own dtype.

    scalars, by contract.py's slots: LR, STEP (updates applied so far; this call adds 1), MAX_NORM (0 switches clipping
    off), LOSS_SCALE (g is multiplied by it), GRAD_NORM (norm of g as it stands, LOSS_SCALE included). segments: (start,
    end, weight decay).
    A non-finite GRAD_NORM writes nothing at all. g is left in any state: the step zeroes it.
    Source: Loshchilov and Hutter, arXiv 1711.05101; clipping as torch.nn.utils.clip_grad_norm_.
    """
    norm, loss_scale = scalars[GRAD_NORM], scalars[LOSS_SCALE]
    refused = ~torch.isfinite(norm)
    clip = (scalars[MAX_NORM] / (norm / loss_scale + 1e-6)).clamp(max=1.0).masked_fill(scalars[MAX_NORM] == 0.0, 1.0)
    divisor = (loss_scale / clip).float().to(g.device)
    scalars[STEP].add_(~refused)
    lr = scalars[LR].float() if g.is_cuda else scalars[LR]  # as torch's kernels read it
    guards: dict[str, Tensor] = {"grad_scale": divisor, "found_inf": refused.float()}
    if g.device.type == "mps":  # its kernel ignores both (FusedAdamWKernelImpl.mm); the scalars lie on the CPU
        if refused:
            return
        g.div_(divisor)
        lr, guards = lr.item(), {}
    applied = scalars[STEP].float().to(g.device)
    for decay in {decay for _, _, decay in segments}:
        spans = [slice(a, b) for a, b, d in segments if d == decay]
        torch._fused_adamw_(  # one pass; 0.14 ms at N = 0.8M on two cores, seven separate ops 0.39 ms
            [master[span] for span in spans],
            [g[span] for span in spans],
            [m[span] for span in spans],
            [v[span] for span in spans],
            [],
            [applied] * len(spans),
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False, maximize=False, **guards,
        )  # fmt: skip
    if p is not None:
        p.copy_(master)
