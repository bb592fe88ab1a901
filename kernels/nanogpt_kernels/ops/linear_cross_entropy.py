"""Cross-entropy of a linear head's logits, x w^T, which never exist whole: loss = grad_scale * sum(nll).

Rows go in chunks: logits = x_c w^T into one buffer reused by all, the softmax's gradient written over them, then
dx_c = dlogits w and dw += dlogits^T x_c. So both gradients are made in forward, and backward has nothing to compute.
A chunk of R rows holds 2 R V bytes of logits (16 bit), and dw moves 8 V C (M / R) bytes: R = 8192 makes 0.8 GB and, at
64K tokens of GPT-2 124M, 2.5 GB. Products by cuBLAS; float32 statistics, nll, loss and sum of dw; the numerics of
cross_entropy.py.
"""

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..contract import (
    ContractError,
    checking_values,
    main_grad_of,
    require,
    require_float,
    require_one_dtype,
    require_same_device,
)
from ..launch import cdiv, pick
from ..registry import differentiating, once, register
from .cross_entropy import check, cross_entropy_in_place, scale_on_device
from .linear import accumulate_weight_grad_

LANES = 64  # logits' rows start at multiples of so many elements: 128-byte lines, whatever V is


@register(
    "linear_cross_entropy_fwd(Tensor x, Tensor w, Tensor targets, Tensor grad_scale, Tensor(a!)? main_grad, "
    "int ignore_index, int valid_vocab, bool wants_dx, bool wants_dw) -> (Tensor, Tensor, Tensor, Tensor)"
)
def linear_cross_entropy_fwd(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    grad_scale: Tensor,
    main_grad: Tensor | None,
    ignore_index: int,
    valid_vocab: int,
    wants_dx: bool,
    wants_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], nll [M], dx, dw: empty where not wanted; dw is empty too where main_grad received it."""
    _check(x, w, targets, grad_scale, main_grad, ignore_index, valid_vocab)
    V, C = w.shape
    x_rows, targets = x.flatten(0, -2), targets.flatten().contiguous()
    M = x_rows.size(0)
    nll = torch.empty(M, dtype=torch.float32, device=x.device)
    dx = torch.empty(x.shape if wants_dx else (0,), dtype=x.dtype, device=x.device)
    sums_to = main_grad if main_grad is not None else torch.zeros(
        (V, C) if wants_dw else (0,), dtype=torch.float32, device=x.device
    )  # fmt: skip
    if not isinstance(x, FakeTensor):  # whose M may be a symbol, and cannot be counted to
        scale = grad_scale if wants_dx or wants_dw else None
        chunk = min(pick("cross_entropy", x, V).choices["chunk_rows"], M)
        width = cdiv(V, LANES) * LANES
        buffer = torch.empty(chunk, width, dtype=x.dtype, device=x.device)
        for part in (slice(start, start + chunk) for start in range(0, M, max(chunk, 1))):
            x_c = x_rows[part]
            logits = buffer[: x_c.size(0), :V]
            torch.mm(x_c, w.t(), out=logits)
            cross_entropy_in_place(logits, width, targets[part], scale, nll[part], ignore_index, valid_vocab)
            if wants_dx:
                torch.mm(logits, w, out=dx.view(M, C)[part])
            if wants_dw:
                accumulate_weight_grad_(sums_to, logits, x_c)
    dw = sums_to.to(w.dtype) if main_grad is None else torch.empty(0, dtype=w.dtype, device=w.device)
    return nll.sum() * grad_scale.reshape(()), nll, dx, dw


def _check(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    grad_scale: Tensor,
    main_grad: Tensor | None,
    ignore_index: int,
    valid_vocab: int,
) -> None:
    op = "linear_cross_entropy"
    require_float(op, x=x, w=w)
    require_one_dtype(op, x=x, w=w)
    require(x.dim() >= 2 and w.dim() == 2 and x.size(-1) == w.size(1), op, "x is [..., C] and w [V, C]", x=x, w=w)
    require_same_device(op, x=x, w=w, targets=targets, grad_scale=grad_scale, main_grad=main_grad)
    check(op, targets, math.prod(x.shape[:-1]), grad_scale, ignore_index, w.size(0), valid_vocab)
    if main_grad is not None:
        require(
            main_grad.dtype == torch.float32 and main_grad.shape == w.shape,
            op, "main_grad must be float32 of w's shape", main_grad=main_grad, w=w,
        )  # fmt: skip


def _may_run_twice() -> bool:
    """Whether hooks receive what is saved for backward. Those of torch.utils.checkpoint without reentry call forward
    again, which would add to main_grad once more: so w's gradient is kept, in float32, and added in backward."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # type: ignore[attr-defined]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, targets, grad_scale, main_grad, ignore_index, valid_vocab):
        kept = _may_run_twice()
        into = torch.zeros_like(main_grad) if main_grad is not None and kept else main_grad
        loss, nll, dx, dw = linear_cross_entropy_fwd(
            x, w, targets, grad_scale, into, ignore_index, valid_vocab, *ctx.needs_input_grad[:2]
        )
        ctx.save_for_backward(dx, dw if into is main_grad else into)
        ctx.main_grad, ctx.in_main_grad = None if into is main_grad else main_grad, main_grad is not None
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once
    def backward(ctx, *grads):
        dloss = grads[0]
        dx, dw = ctx.saved_tensors
        if ctx.main_grad is not None:
            dx = dx * dloss
            ctx.main_grad.addcmul_(dw, dloss)
        elif ctx.in_main_grad:
            if checking_values() and not bool((dloss == 1).all()):
                raise ContractError(
                    f"linear_cross_entropy: the loss's gradient must be 1 where w has main_grad, not {dloss.item()}: "
                    "w's gradient was added there in forward; scale by grad_scale instead"
                )
        else:
            dx, dw = dx * dloss, dw * dloss
        wants_dx, wants_dw = ctx.needs_input_grad[:2]
        return dx if wants_dx else None, dw if wants_dw and not ctx.in_main_grad else None, None, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    grad_scale: Tensor | float = 1.0,
    ignore_index: int = -1,
    valid_vocab: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss [], nll [M] float32, detached) of logits x w^T; x [..., C], w [V, C], targets [...] int64.

    nll is 0 where the target is ignore_index; loss = grad_scale * sum(nll). Columns from valid_vocab on take no part.
    Where w carries main_grad, its gradient is added there now, if gradients are on; the gradient that backward hands to
    loss must then be 1. Under hooks of saved tensors, as non-reentrant checkpointing has, backward adds it.
    """
    valid_vocab = w.size(0) if valid_vocab is None else min(valid_vocab, w.size(0))
    scale = scale_on_device(grad_scale, x.device)
    if not differentiating("linear_cross_entropy", x, w):
        return linear_cross_entropy_fwd(x, w, targets, scale, None, ignore_index, valid_vocab, False, False)[:2]
    main_grad = main_grad_of(w) if w.requires_grad else None
    return _LinearCrossEntropy.apply(x, w, targets, scale, main_grad, ignore_index, valid_vocab)
