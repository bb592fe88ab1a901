"""linear of the Triton set: cuBLAS products, and where the weight's gradient goes."""

import pytest
import torch
from kernel_case import DEVICE, DTYPES, assert_op, randn
from nanogpt_kernels import reference
from nanogpt_kernels.ops import linear
from nanogpt_kernels.registry import OPS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients(dtype: torch.dtype, bias: bool):
    b = randn(7, seed=2) if bias else None
    inputs = [randn(3, 5, 16, dtype=dtype), randn(7, 16, dtype=dtype, seed=1), b]
    assert_op(linear.linear, reference.linear, inputs, [randn(3, 5, 7, seed=3).detach()], what="linear")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_main_grad_accumulates(dtype: torch.dtype):
    x, w = randn(6, 16, dtype=dtype), randn(7, 16, dtype=dtype, seed=1)
    dy = randn(6, 7, dtype=dtype, seed=2).detach()
    (plain,) = torch.autograd.grad(linear.linear(x, w), w, dy)
    w.main_grad = torch.ones(7, 16, device=DEVICE)  # type: ignore[attr-defined]
    for _ in range(2):
        linear.linear(x, w).backward(dy)
    assert w.grad is None
    tolerance = 4 * torch.finfo(dtype).eps * plain.abs().max().item()
    torch.testing.assert_close(w.main_grad, 1 + 2 * plain.float(), rtol=0, atol=2 * tolerance)  # type: ignore[attr-defined]


def test_frozen_operands_cost_nothing():
    x, w = randn(6, 16).detach(), randn(7, 16, seed=1)
    linear.linear(x, w).sum().backward()
    assert x.grad is None and w.grad is not None
    w = w.detach()
    w.main_grad = torch.zeros(7, 16, device=DEVICE)  # type: ignore[attr-defined]
    x.requires_grad_()
    linear.linear(x, w).sum().backward()
    assert not w.main_grad.any()  # type: ignore[attr-defined]


def test_opcheck():
    main_grad, dy, x = (
        torch.zeros(3, 4, device=DEVICE),
        torch.ones(5, 3, device=DEVICE),
        torch.ones(5, 4, device=DEVICE),
    )
    torch.library.opcheck(OPS.accumulate_weight_grad_.default, (main_grad, dy, x))
