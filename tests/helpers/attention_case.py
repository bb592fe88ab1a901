"""What tests of attention share: torch's own attention in the inputs' dtype, and inputs.

reference.attention computes 16-bit inputs on the CPU in float32, which rounds once, and so does torch's MATH backend;
the fused attention that torch takes by default rounds probabilities too, and that is what the two-reference rule asks
about.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import kernel_case
import torch
import torch.nn.functional as F
from nanogpt_kernels import launch, reference
from torch import Tensor


def allowed_keys(T: int, doc_ids: Tensor | None) -> Tensor:
    """Which keys a query may see: bool [T, T], or [B, 1, T, T] with documents."""
    causal = torch.ones(T, T, dtype=torch.bool, device=kernel_case.DEVICE).tril()
    return causal if doc_ids is None else causal & (doc_ids[:, None, :, None] == doc_ids[:, None, None, :])


def attention_same_dtype(
    qkv: Tensor, p: float, seed: Tensor | None, site: int, doc_ids: Tensor | None = None
) -> Tensor:
    """attention by torch in qkv's dtype throughout; the specification itself for float64. [B, T, H, D]"""
    if qkv.dtype == torch.float64:
        return reference.attention(qkv, p, seed, site, doc_ids)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, T, D] each
    mask = allowed_keys(qkv.size(1), doc_ids)
    if p == 0.0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)
    probs = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (reference.dropout(probs, p, seed, site) @ v).transpose(1, 2)


def log_sums(qkv: Tensor, doc_ids: Tensor | None) -> Tensor:
    """lse: log2 of the sum of the exponentials of each row of scores, [B, H, T], in qkv's dtype."""
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5
    scores = scores.masked_fill(~allowed_keys(qkv.size(1), doc_ids), -math.inf)
    return scores.logsumexp(-1) / math.log(2)


def qkv_attention_same_dtype(
    y: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    n_head: int,
    p: float,
    seed: Tensor | None,
    site: int,
    doc_ids: Tensor | None = None,
) -> Tensor:
    """attention_same_dtype(y w_qkv^T + b_qkv); [B, T, C]"""
    B, T, C = y.shape
    qkv = reference.linear(y, w_qkv, b_qkv).view(B, T, 3, n_head, C // n_head)
    return attention_same_dtype(qkv, p, seed, site, doc_ids).reshape(B, T, C)


def seed_tensor(seed: int = 1234) -> Tensor:
    return torch.tensor([seed], dtype=torch.int64, device=kernel_case.DEVICE)


def documents(B: int, T: int, *, ordered: bool, seed: int = 0) -> Tensor:
    """Document ids [B, T]: runs of one id each, or ids strewn over the row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, max(2, T // 8), (B, T), generator=generator)
    return (ids.sort(dim=1).values if ordered else ids).to(kernel_case.DEVICE)


@contextmanager
def tiles(BLOCK_M: int = 16, BLOCK_N: int = 16) -> Iterator[None]:
    """Within it every attention launch has tiles so small that small T spans several."""
    with ExitStack() as stack:
        for op, rows in launch.TABLE.items():
            if "attention" in op:
                small = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "ROWS": 16}
                stack.enter_context(launch.override(op, blocks={name: small[name] for name in rows[0].blocks}))
        yield
