"""Products with a weight by cuBLAS, and where the weight's gradient goes.

linear(x, w, b) = x w^T + b. A weight that carries `main_grad` (a float32 view of the flat gradient buffer) has its
gradient added there, in one product with float32 output, and autograd gets None; otherwise autograd gets it as usual.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..contract import device_type_of, main_grad_of, require_one_dtype
from ..registry import once, refuse_tangents, register, without_autocast


@register("accumulate_weight_grad_(Tensor(a!) main_grad, Tensor dy, Tensor x) -> ()")
def accumulate_weight_grad_(main_grad: Tensor, dy: Tensor, x: Tensor) -> None:
    """main_grad [N, K] float32 += dy^T x; dy [M, N], x [M, K] of one dtype."""
    # without data there is no output to describe; before pytorch/pytorch#179634 addmm's out_dtype refuses both
    if dy.is_meta or isinstance(dy, FakeTensor):
        return
    if dy.dtype == torch.float32:
        main_grad.addmm_(dy.t(), x)
    elif device_type_of(dy) == "cuda":
        torch.addmm(main_grad, dy.t(), x, out_dtype=torch.float32, out=main_grad)
    else:
        main_grad.add_(dy.t() @ x)


class GradientOf(NamedTuple):
    """Where a parameter's gradient goes: into main_grad, or, where that is None, to autograd as a tensor of its own."""

    main_grad: Tensor | None
    shape: torch.Size
    dtype: torch.dtype

    def destination(self, like: Tensor, zero: bool = False) -> tuple[Tensor, Tensor | None, bool]:
        """(the tensor to write to, what autograd gets, whether to add); a new one on `like`'s device."""
        if self.main_grad is not None:
            return self.main_grad, None, True
        make = like.new_zeros if zero else like.new_empty
        grad = make(self.shape, dtype=self.dtype)
        return grad, grad, False


def gradient_of(w: Tensor) -> GradientOf:
    """Call it in forward: in backward torch.compile does not see attributes of parameters."""
    return GradientOf(main_grad_of(w), w.shape, w.dtype)


def weight_grad(dy: Tensor, x: Tensor, main_grad: Tensor | None) -> Tensor | None:
    """dy^T x for autograd, or None after adding it into main_grad; leading dimensions of dy and x are rows."""
    dy_rows, x_rows = dy.flatten(0, -2), x.flatten(0, -2)
    if main_grad is None:
        return dy_rows.t() @ x_rows
    accumulate_weight_grad_(main_grad, dy_rows, x_rows)
    return None


class _Linear(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.main_grad = main_grad_of(w)
        ctx.bias_dtype = None if b is None else b.dtype
        return F.linear(x, w, None if b is None else b.to(x.dtype))

    @staticmethod
    @once
    def backward(ctx, *grads: Tensor):
        (dy,) = grads
        x, w = ctx.saved_tensors
        dx = dy @ w if ctx.needs_input_grad[0] else None
        dw = weight_grad(dy, x, ctx.main_grad) if ctx.needs_input_grad[1] else None
        db = dy.flatten(0, -2).sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dw, db


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x [..., C_in] times w [C_out, C_in] transposed, plus b [C_out] -> [..., C_out]."""
    refuse_tangents("linear", x, w, b)
    require_one_dtype("linear", x=x, w=w)
    return _Linear.apply(x, w, b)
