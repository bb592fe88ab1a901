"""Liger-Kernel (PyPI: liger-kernel), Triton: LayerNorm and the fused linear cross-entropy. It has no attention of this
kind, no plain GELU MLP (its GEGLU is another function), no optimizer.

norm: it needs a bias; float32 weight and bias, as ours. linear_cross_entropy: the mean, which is ours with grad_scale =
1 / rows; gradients are computed in forward, as ours are; dw is accumulated in the weights' dtype, or ("float32 dw") in
float32, as ours is.
"""

import torch
from harness import Bound, Contestant, plain
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
from liger_kernel.ops.layer_norm import LigerLayerNormFunction
from torch import Tensor

REQUIRES = "pip install liger-kernel==0.8.5"
OPS = ("norm", "linear_cross_entropy")


def _norm(r: Tensor, w: Tensor, b: Tensor | None, eps: float = 1e-5) -> Tensor:
    if b is None:
        raise ValueError("Liger's LayerNorm needs a bias")
    return LigerLayerNormFunction.apply(r, w, b, eps)


def _linear_cross_entropy(accumulate: torch.dtype | None) -> Contestant:
    def bind(x: Tensor, w: Tensor, targets: Tensor, grad_scale: Tensor) -> Bound:
        """grad_scale is 1 / rows in these cases, hence the mean: a sum times grad_scale would scale gradients later."""
        arguments = (None, None, -1, 0.0, 0.0, "mean", None, False, accumulate)  # bias ... accum_dtype, by position

        def forward() -> Tensor:
            return LigerFusedLinearCrossEntropyFunction.apply(x.flatten(0, -2), w, targets.flatten(), *arguments)[0]

        return Bound(forward, [x, w])

    return Contestant(bind, capturable=False)  # its backward compares the incoming gradient with 1 on the host


def contestants(op: str) -> dict[str, Contestant]:
    if op == "norm":
        return {"Liger": plain(_norm)}
    if op == "linear_cross_entropy":
        return {
            "Liger": _linear_cross_entropy(None),
            "Liger, float32 dw": _linear_cross_entropy(torch.float32),
        }
    return {}
