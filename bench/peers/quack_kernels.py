"""QuACK (PyPI: quack-kernels), CuTe DSL, Hopper and later: LayerNorm forward and backward, the MLP with GELU in the
GEMMs' epilogues, the chunked linear cross-entropy. The first call compiles and, where it tunes, times its choices.

norm: two functions without autograd, joined here; float32 weight and bias, as ours. mlp: its only GELU is the tanh
form, which is less work than our erf; dGELU in the epilogue of dgrad, the bias gradient a pass of its own.
linear_cross_entropy: mean over the rows, which is ours with grad_scale = 1 / rows; gradients are computed in forward,
as ours are, and scaled in backward; dw in float32 over the chunks.
"""

from functools import partial
from typing import Any

import torch
from harness import Contestant, plain
from quack.linear_cross_entropy import chunked_linear_cross_entropy
from quack.mlp import mlp_func
from quack.rmsnorm import layernorm_bwd, layernorm_fwd
from torch import Tensor

REQUIRES = "pip install 'quack-kernels[cu13]==0.6.5' (without [cu13] beside CUDA 12)"
OPS = ("norm", "mlp", "linear_cross_entropy")


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, r: Tensor, w: Tensor, b: Tensor | None, eps: float) -> Tensor:
        rows = r.flatten(0, -2)
        found: Any = layernorm_fwd(rows, w, b, eps, return_rstd=True, return_mean=True)
        y, rstd, mean = found
        ctx.save_for_backward(rows, w, rstd, mean)
        ctx.has_bias = b is not None
        return y.view_as(r)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, w, rstd, mean = ctx.saved_tensors
        dr, dw, db = layernorm_bwd(rows, w, grads[0].flatten(0, -2), rstd, mean, has_bias=ctx.has_bias)
        return dr.view_as(grads[0]), dw, db, None


def _norm(r: Tensor, w: Tensor, b: Tensor | None, eps: float = 1e-5) -> Any:
    return _LayerNorm.apply(r, w, b, eps)


def _mlp(tuned: bool, y: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, activation: str) -> Tensor:
    return mlp_func(y, w_fc, w_proj, activation="gelu_tanh_approx", bias1=b_fc, tuned=tuned)


def _linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor, grad_scale: Tensor) -> Tensor:
    return chunked_linear_cross_entropy(x.flatten(0, -2), w, targets.flatten(), ignore_index=-1, reduction="mean")


def contestants(op: str) -> dict[str, Contestant]:
    if op == "norm":
        return {"QuACK": plain(_norm)}
    if op == "mlp":
        return {
            "QuACK, tanh GELU": plain(partial(_mlp, True)),
            "QuACK, tanh GELU, untuned": plain(partial(_mlp, False)),
        }
    if op == "linear_cross_entropy":
        return {"QuACK": plain(_linear_cross_entropy)}
    return {}
