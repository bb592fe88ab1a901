"""r' = r + dropout(delta + delta_bias) alone, against the reference's parts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import kernel_case
import pytest
import torch
from byte_counter import counting_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import DEVICE, DTYPES, assert_op, gradients, randn
from nanogpt_kernels import launch, reference
from nanogpt_kernels.contract import ContractError
from nanogpt_kernels.ops.norm import add_norm
from nanogpt_kernels.ops.residual import dropout_add
from nanogpt_kernels.registry import OPS
from torch import Tensor

SEED, SITE = torch.tensor([(5 << 32) + 9], device=DEVICE), 1
MIXED = [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
SMALL = dict(blocks=dict(ROWS=2, BLOCK_C=16), choices=dict(programs_per_sm=1))


def expected(r: Tensor, delta: Tensor, delta_bias: Tensor | None, p: float) -> Tensor:
    delta = delta if delta_bias is None else delta + delta_bias.to(delta.dtype)
    return r + reference.dropout(delta, p, SEED, SITE)


def ours(p: float) -> Callable[..., Any]:
    return partial(dropout_add, p=p, seed=SEED, site=SITE)


def operands(M: int, C: int, r_dtype: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(M, C, dtype=r_dtype), randn(M, C, dtype=dtype, seed=1), randn(C, seed=2)]


def check(inputs: list, p: float) -> None:
    dr = randn(*inputs[0].shape, seed=3).detach()
    assert_op(ours(p), partial(expected, p=p), inputs, [dr], what="dropout_add")


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    M=st.integers(1, 19),
    C=st.integers(1, 40),
    dtypes=st.sampled_from(MIXED),
    p=st.sampled_from([0.0, 0.1, 0.9]),
    bias=st.booleans(),
)
def test_any_shape(M: int, C: int, dtypes: tuple[torch.dtype, torch.dtype], p: float, bias: bool):
    """Several programs over rows and over columns, each of several tiles."""
    with launch.override("dropout_add", **SMALL):
        r, delta, delta_bias = operands(M, C, *dtypes)
        check([r, delta, delta_bias if bias else None], p)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("r_dtype, dtype", MIXED, ids=str)
def test_dtypes(r_dtype: torch.dtype, dtype: torch.dtype, p: float):
    check(operands(9, 300, r_dtype, dtype), p)


def test_main_grad():
    inputs, dr = operands(9, 40), randn(9, 40, seed=3).detach()
    want = gradients(ours(0.3), inputs, [dr])[3]
    inputs[2].main_grad = torch.ones(40, device=DEVICE)  # type: ignore[attr-defined]
    ours(0.3)(*inputs).backward(dr)
    assert inputs[2].grad is None and torch.equal(inputs[2].main_grad, 1.0 + want)  # type: ignore[attr-defined]


def test_is_the_first_half_of_add_norm():
    r, delta, delta_bias = operands(9, 40, torch.bfloat16, torch.bfloat16)
    r_out, _ = add_norm(r, delta, delta_bias, torch.ones(40, device=DEVICE), None, 1e-5, 0.3, SEED, SITE)
    assert torch.equal(dropout_add(r, delta, delta_bias, 0.3, SEED, SITE), r_out)


def test_gradients_only_where_asked():
    """With nothing dropped or rounded, r's and delta's gradient is the incoming one itself."""
    inputs, dr = operands(9, 40), randn(9, 40, seed=3).detach()
    want = gradients(ours(0.3), inputs, [dr])
    for i in range(3):
        some = [x if i == j else x.detach() for j, x in enumerate(inputs)]
        got = gradients(ours(0.3), some, [dr])
        torch.testing.assert_close(got[1], want[1 + i])
    r, delta, _ = inputs
    grads = torch.autograd.grad(dropout_add(r, delta, None, 0.0, None, 0), [r, delta], dr)
    assert all(g.data_ptr() == dr.data_ptr() for g in grads)
    with torch.no_grad():
        assert not ours(0.3)(*inputs).requires_grad


@pytest.mark.skipif(kernel_case.DEVICE.type != "cpu", reason="the interpreter counts")
def test_bytes():
    """r, delta and r' once, delta_bias once a program over rows; backward reads dr once and writes ddelta, a row of
    sums a program, which are read again, and d_delta_bias."""
    M, C, programs = 1024, 64, 16
    inputs = operands(M, C, torch.bfloat16, torch.bfloat16)
    tile = dict(blocks=dict(ROWS=32, BLOCK_C=64), choices=dict(programs_per_sm=2))
    with launch.override("dropout_add", **tile):
        with counting_bytes() as fwd:
            r_out = ours(0.3)(*inputs)
        with counting_bytes() as bwd:
            r_out.backward(torch.ones_like(r_out))
    row, vectors, seeds = M * C * 2, programs * C * 4, programs * 8
    assert fwd == {"load": 2 * row + vectors + seeds, "store": row}
    assert bwd == {"load": row + seeds + vectors, "store": row + vectors + C * 4}


def test_layouts_and_repeats():
    r, delta, delta_bias = (x.detach() for x in operands(6, 40))
    r, delta, dr = r.view(2, 3, 40), delta.view(2, 3, 40), randn(2, 3, 40, seed=3).detach()

    def odd(x: Tensor) -> Tensor:
        return torch.zeros(x.numel() + 1, device=DEVICE)[1:].view(x.shape).copy_(x)

    def turned(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else odd(x)

    results = []
    for change in (torch.clone, torch.clone, odd, turned):
        inputs = [change(x).requires_grad_() for x in (r, delta, delta_bias)]
        results.append(gradients(ours(0.3), inputs, [change(dr)]))
    for got in results[1:]:
        torch.testing.assert_close(got, results[0])
    assert all(torch.equal(x, y) for x, y in zip(results[1], results[0], strict=True))


@pytest.mark.parametrize("shape", [(0, 40), (2, 0)])
def test_empty(shape: tuple[int, int]):
    r, delta = (torch.empty(shape, device=DEVICE, requires_grad=True) for _ in range(2))
    delta_bias = torch.ones(shape[1], device=DEVICE, requires_grad=True)
    r_out, dr, ddelta, d_delta_bias = gradients(ours(0.3), [r, delta, delta_bias], None)
    assert r_out.shape == dr.shape == ddelta.shape == shape and (d_delta_bias == 0).all()


def test_second_derivative_is_refused():
    r, delta, _ = operands(3, 8)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(dropout_add(r, delta, None, 0.0, None, 0).sum(), r, create_graph=True)


def test_contract():
    r, delta, delta_bias = (x.detach() for x in operands(3, 8))
    for arguments, message in (
        ((r, delta[:2], None, 0.0, None, 0), "delta must have r's shape"),
        ((r.bfloat16(), delta, None, 0.0, None, 0), "delta must have r's dtype, or r be float32"),
        ((r, delta, delta_bias[:1], 0.0, None, 0), r"delta_bias must be \[C\]"),
        ((r, delta, None, 0.1, None, 0), "needs a seed"),
        ((r, delta.to("meta"), None, 0.0, None, 0), "different devices"),
    ):
        with pytest.raises(ContractError, match=f"^dropout_add.*{message}"):
            dropout_add(*arguments)


def test_registration_and_compilation():
    r, delta, delta_bias = operands(5, 24, torch.float32, torch.bfloat16)
    torch.library.opcheck(
        OPS.dropout_add_fwd.default, (r.detach(), delta.detach(), delta_bias.detach(), 0.3, SEED, SITE)
    )
    for dtype in (None, torch.bfloat16):
        torch.library.opcheck(OPS.dropout_add_bwd.default, (r.detach(), 0.3, SEED, SITE, dtype, dtype is None))

    def op(*inputs: Tensor) -> Tensor:
        return ours(0.3)(*inputs)

    compiled, dr = torch.compile(op, fullgraph=True, backend="aot_eager"), randn(5, 24, seed=3).detach()
    want, got = (gradients(f, [r, delta, delta_bias], [dr]) for f in (op, compiled))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
