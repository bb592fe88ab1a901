"""NVIDIA's Transformer Engine without FP8: LayerNorm, attention (FlashAttention or cuDNN, which it picks), the
cross-entropy of logits, FusedAdam.

norm: it computes in the weight's dtype, so weight and bias are narrowed to the activations' beforehand (ours are
float32). attention: our packed layout is one of its own ("bs3hd"), so nothing is put together. linear_cross_entropy:
the logits are a product by torch, kept whole in the activations' dtype; backward overwrites them with their gradient;
mean over the rows, which is ours with grad_scale = 1 / rows. adamw_: bench/fused_adam.py.
"""

import fused_adam
import torch
from harness import Bound, Contestant, plain
from torch import Tensor
from transformer_engine.pytorch import DotProductAttention, LayerNorm, parallel_cross_entropy
from transformer_engine.pytorch.optimizers import FusedAdam

REQUIRES = "pip install --no-build-isolation 'transformer-engine[pytorch,core-cu13]==2.20.2' (core-cu12 beside CUDA 12)"
OPS = ("norm", "attention", "linear_cross_entropy", "adamw_")


def _bind_norm(r: Tensor, w: Tensor, b: Tensor | None, eps: float = 1e-5) -> Bound:
    if b is None:
        raise ValueError("Transformer Engine's LayerNorm needs a bias")
    norm = LayerNorm(r.size(-1), eps=eps, device=r.device, dtype=r.dtype)
    with torch.no_grad():
        norm.weight.copy_(w)
        norm.bias.copy_(b)
    return Bound(lambda: norm(r), [r, norm.weight, norm.bias])


def _bind_attention(qkv: Tensor, *dropout: object) -> Bound:
    B, T, _, H, D = qkv.shape
    attention = DotProductAttention(H, D, attention_dropout=0.0, qkv_format="bshd", attn_mask_type="causal")
    return Bound(lambda: attention(*qkv.unbind(2)).view(B, T, H, D), [qkv])


def _linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor, grad_scale: Tensor) -> Tensor:
    return parallel_cross_entropy(x @ w.t(), targets, reduce_loss=True, ignore_idx=-1, overwrite_input=True)


def contestants(op: str) -> dict[str, Contestant]:
    found = {
        "norm": {"Transformer Engine": Contestant(_bind_norm)},
        "attention": {"Transformer Engine": Contestant(_bind_attention)},
        "linear_cross_entropy": {"Transformer Engine, logits by torch": plain(_linear_cross_entropy)},
        "adamw_": {"Transformer Engine": fused_adam.contestant(FusedAdam)},
    }
    return found.get(op, {})
