"""r' = r + dropout(delta + delta_bias), y = norm(r'): every gradient, whichever outputs are used, and the mask."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import kernel_case
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import DEVICE, DTYPES, assert_op, gradients, guarded, randn
from nanogpt_kernels import launch, reference
from nanogpt_kernels.contract import ContractError
from nanogpt_kernels.ops.norm import add_norm
from nanogpt_kernels.registry import OPS
from torch import Tensor

SEED, SITE, EPS = torch.tensor([(5 << 32) + 9], device=DEVICE), 1, 1e-5  # a site of 1, which Triton would specialise on
MIXED = [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
SMALL = dict(blocks=dict(ROWS=2, BLOCK_C=32), choices=dict(programs_per_sm=1))


def operands(M: int, C: int, r_dtype: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32) -> list[Any]:
    """r, delta, delta_bias, w, b."""
    vectors = (randn(C, seed=i) for i in (2, 3, 4))
    return [randn(M, C, dtype=r_dtype), randn(M, C, dtype=dtype, seed=1), *vectors]


def douts(M: int, C: int) -> list[Tensor]:
    return [randn(M, C, seed=5).detach(), randn(M, C, seed=6).detach()]


def using(op: Callable[..., Any], p: float, outputs: slice = slice(None)) -> Callable[..., Any]:
    """op on r, delta, delta_bias, w, b alone, returning some of (r', y)."""
    return lambda *inputs: op(*inputs, EPS, p, SEED, SITE)[outputs]


def check(inputs: list[Any], p: float, outputs: slice = slice(None)) -> None:
    gradient = douts(*inputs[0].shape)[outputs]
    assert_op(using(add_norm, p, outputs), using(reference.add_norm, p, outputs), inputs, gradient, what="add_norm")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("r_dtype, dtype", MIXED, ids=str)
def test_dtypes(r_dtype: torch.dtype, dtype: torch.dtype, p: float):
    """Eight programs of two tiles, of a piece and a rest; a float32 residual stream under 16-bit branches included."""
    with launch.override("norm_fwd", **SMALL), launch.override("norm_bwd", **SMALL):
        check(operands(19, 50, r_dtype, dtype), p)


@pytest.mark.parametrize("C", [1, 2, 63, 64, 65, 100, 127, 768, 769, 1600, 8192])
def test_widths(C: int):
    """As TABLE launches them."""
    check(operands(3 if C > 700 else 9, C, torch.float32, torch.bfloat16), 0.3)


@pytest.mark.parametrize("outputs", [slice(0, 1), slice(1, 2)], ids=["y unused", "r' unused"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_output_used(dtype: torch.dtype, p: float, outputs: slice):
    """With y unused autograd has no gradient for w and b: they are left out, as in torch."""
    r, delta, delta_bias, w, b = operands(17, 50, torch.float32, dtype)
    if outputs.start == 0:
        w, b = w.detach(), b.detach()
    with launch.override("norm_bwd", **SMALL):
        check([r, delta, delta_bias, w, b], p, outputs)


def test_y_unused_leaves_non_finite_statistics_out():
    """Where only r' is used its gradient passes untouched, even by rows whose statistics are NaN."""
    r, delta, delta_bias, w, b = operands(5, 20)
    with torch.no_grad():
        r[3, 4] = math.inf
    dres = randn(5, 20, seed=7).detach()
    r_out, _ = add_norm(r, delta, delta_bias, w, b, EPS, 0.0, None, 0)
    dr, ddelta, dw = torch.autograd.grad(r_out, [r, delta, w], dres, allow_unused=True)
    assert torch.equal(dr, dres) and torch.equal(ddelta, dres) and dw is None


@pytest.mark.parametrize("delta_bias, b", list(itertools.product([False, True], repeat=2)))
def test_biases(delta_bias: bool, b: bool):
    inputs = operands(9, 24, torch.bfloat16, torch.bfloat16)
    check([*inputs[:2], inputs[2] if delta_bias else None, inputs[3], inputs[4] if b else None], 0.3)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    M=st.integers(1, 19),
    C=st.integers(3, 40),
    rows=st.sampled_from([1, 2, 4]),
    piece=st.sampled_from([4, 16, 64]),
    dtypes=st.sampled_from(MIXED),
    p=st.sampled_from([0.0, 0.1, 0.9]),
)
def test_any_shape_and_tile(M: int, C: int, rows: int, piece: int, dtypes: tuple[torch.dtype, torch.dtype], p: float):
    blocks = dict(blocks=dict(ROWS=rows, BLOCK_C=piece), choices=dict(programs_per_sm=1))
    with launch.override("norm_fwd", **blocks), launch.override("norm_bwd", **blocks):
        check(operands(M, C, *dtypes), p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("C", [3, 50])
def test_the_mask_is_the_reference_s(C: int, p: float):
    """Forward and backward keep exactly the reference's elements, scaled by 1 / (1 - p)."""
    r, delta = torch.zeros(19, C, device=DEVICE), torch.ones(19, C, device=DEVICE, requires_grad=True)
    mask = reference.dropout_mask((19, C), p, SEED, 7)
    assert mask.any() and not mask.all()
    with launch.override("norm_fwd", **SMALL), launch.override("norm_bwd", **SMALL):
        r_out, _ = add_norm(r, delta, None, torch.ones(C, device=DEVICE), None, EPS, p, SEED, 7)
        (ddelta,) = torch.autograd.grad(r_out, delta, torch.ones_like(r_out))
    for kept in (r_out.detach(), ddelta):
        assert torch.equal(kept, mask * torch.tensor(1.0 / (1.0 - p), device=DEVICE))


def test_dropped_elements_pass_no_nan():
    """A NaN that is dropped is gone, in both directions, as in torch."""
    r, delta, delta_bias, w, b = operands(9, 20)
    mask = reference.dropout_mask((9, 20), 0.5, SEED, SITE)
    row, column = (int(i) for i in (~mask).nonzero()[0])
    with torch.no_grad():
        delta[row, column] = math.nan
    outs = add_norm(r, delta, delta_bias, w, b, EPS, 0.5, SEED, SITE)
    grads = torch.autograd.grad(outs, [r, delta, delta_bias, w, b], douts(9, 20))
    assert all(t.isfinite().all() for t in (*outs, *grads)) and grads[1][row, column] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_y_is_the_norm_of_what_is_stored(dtype: torch.dtype):
    """Statistics come from r' as rounded, so that backward, which reads r', sees the same rows: here delta is lost in
    rounding, r' is constant and y is b."""
    scale = 2.0**8 if dtype == torch.bfloat16 else 2.0**11
    r, delta = torch.full((3, 96), scale, dtype=dtype, device=DEVICE), randn(3, 96, dtype=dtype).detach().clamp(-0.4, 1)
    b = randn(96, seed=4).detach()
    r_out, y = add_norm(r, delta, None, randn(96, seed=3), b, EPS, 0.0, None, 0)
    assert (r_out == scale).all() and delta.any() and torch.equal(y, b.to(dtype).expand(3, 96))


def test_one_tensor_is_both_gradients_where_they_are_equal():
    for (r_dtype, dtype), p in itertools.product(MIXED, (0.0, 0.3)):
        r, delta, *vectors = operands(5, 24, r_dtype, dtype)
        dr, ddelta = torch.autograd.grad(using(add_norm, p)(r, delta, *vectors), [r, delta], douts(5, 24))
        assert (dr.data_ptr() == ddelta.data_ptr()) == (p == 0.0 and r_dtype == dtype)


def test_same_bits_twice_and_in_any_batch():
    """The mask is a function of the row's place, so with dropout the rows of a batch's beginning are compared."""
    for p, rows in ((0.3, slice(0, 3)), (0.0, slice(30, 33))):
        inputs = operands(33, 40, torch.bfloat16, torch.bfloat16)
        first, second = (gradients(using(add_norm, p), inputs, douts(33, 40)) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        part = [x.detach()[rows].clone().requires_grad_() for x in inputs[:2]] + inputs[2:]
        alone = gradients(using(add_norm, p), part, [d[rows].clone() for d in douts(33, 40)])
        assert all(torch.equal(x, y[rows]) for x, y in zip(alone[:4], first[:4], strict=True))


def test_layouts():
    """Transposed rows and strided vectors give the bits of plain ones; odd addresses, with narrower loads, nearly."""
    r, delta, *vectors = (x.detach() for x in operands(6, 40))
    r, delta = r.view(2, 3, 40), delta.view(2, 3, 40)
    gradient = [d.view(2, 3, 40) for d in douts(6, 40)]

    def odd(x: Tensor) -> Tensor:
        return torch.zeros(x.numel() + 1, device=DEVICE)[1:].view(x.shape).copy_(x)

    def turned(x: Tensor) -> Tensor:
        strided = torch.stack([x, x], -1)[..., 1]
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else strided

    def run(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        inputs = [change(x).requires_grad_() for x in (r, delta, *vectors)]
        with guarded():
            return gradients(using(add_norm, 0.3), inputs, [change(d) for d in gradient])

    want = run(torch.clone)
    torch.testing.assert_close(run(odd), want)
    assert all(torch.equal(x, y) for x, y in zip(run(turned), want, strict=True))


def test_empty():
    r, delta = (torch.empty(2, 0, 40, device=DEVICE, requires_grad=True) for _ in range(2))
    results = gradients(using(add_norm, 0.3), [r, delta, *operands(1, 40)[2:]], None)
    assert all(t.shape == (2, 0, 40) for t in results[:4]) and all((t == 0).all() for t in results[4:])


def test_gradients_only_where_asked():
    inputs = operands(9, 40)
    want = gradients(using(add_norm, 0.3), inputs, douts(9, 40))
    for asked in ([0], [1], [2], [3], [1, 4]):
        some = [x if i in asked else x.detach() for i, x in enumerate(inputs)]
        outputs = slice(None) if asked[0] < 3 else slice(1, 2)  # r' needs no gradient: w acts on y alone
        got = gradients(using(add_norm, 0.3, outputs), some, douts(9, 40)[outputs])
        torch.testing.assert_close(got[-len(asked) :], [want[2 + i] for i in asked])
    with torch.no_grad():
        r_out, y = using(add_norm, 0.3)(*inputs)
    assert not (r_out.requires_grad or y.requires_grad)
    torch.testing.assert_close([r_out, y], want[:2])


def test_second_derivative_is_refused():
    r, *rest = operands(3, 8)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(using(add_norm, 0.0)(r, *rest)[1].sum(), r, create_graph=True)


WRONG = {
    "shape": (dict(delta=torch.ones(3, 7, device=DEVICE)), "delta must have r's shape"),
    "narrow r": (dict(r=torch.ones(3, 8, device=DEVICE).bfloat16()), "delta must have r's dtype, or r be float32"),
    "delta_bias": (dict(delta_bias=torch.ones(3, 8, device=DEVICE)), r"delta_bias must be \[C\]"),
    "float64": (dict(delta=torch.ones(3, 8, device=DEVICE).double()), "delta must be float32"),
    "p": (dict(p=1.0), r"must be in \[0, 1\)"),
    "no seed": (dict(p=0.1), "needs a seed"),
    "seed dtype": (dict(p=0.1, seed=torch.ones(1, dtype=torch.int32, device=DEVICE)), "one int64"),
    "two seeds": (dict(p=0.1, seed=torch.ones(2, dtype=torch.int64, device=DEVICE)), "one int64"),
    "device": (dict(delta=torch.ones(3, 8, device="meta")), "different devices"),
}


@pytest.mark.parametrize("case", WRONG)
def test_contract(case: str):
    changes, message = WRONG[case]
    r, one = torch.ones(3, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    right = dict(r=r, delta=r, delta_bias=one, w=one, b=one, eps=EPS, p=0.0, seed=None, site=0)
    with pytest.raises(ContractError, match=f"^add_norm.*{message}"):
        add_norm(**(right | changes))


def test_registration():
    r, delta, delta_bias, w, b = (x.detach() for x in operands(5, 24, torch.float32, torch.bfloat16))
    mean, rstd = torch.rand(2, 5, device=DEVICE)
    torch.library.opcheck(
        OPS.norm_fwd.default, (r, delta, delta_bias, w, b, EPS, 0.3, SEED, SITE, torch.bfloat16, True)
    )
    for dy, dtype in ((delta, torch.bfloat16), (None, None)):
        arguments = (dy, r, r, mean, rstd, w, SEED, 0.3, SITE, dtype, True, dy is not None, False, True)
        torch.library.opcheck(OPS.norm_bwd.default, arguments)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("outputs", [slice(None), slice(1, 2)], ids=["both", "r' unused"])
def test_compiled(outputs: slice, p: float):
    inputs = operands(6, 40, torch.bfloat16, torch.bfloat16)
    op = using(add_norm, p, outputs)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    want, got = (kernel_case.gradients(f, inputs, douts(6, 40)[outputs]) for f in (op, compiled))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


class _NoGradient(torch.autograd.Function):
    """Uses its inputs and sends nothing back."""

    @staticmethod
    def forward(ctx, *inputs):
        return inputs[0].sum()

    @staticmethod
    def backward(ctx, *grads):
        return None, None


def test_no_gradient_arrives():
    r, delta, w = randn(3, 8), randn(3, 8, seed=1), randn(8, seed=2)
    _NoGradient.apply(*add_norm(r, delta, None, w, None, 1e-5, 0.0, None, 0)).backward()
    assert r.grad is None and delta.grad is None and w.grad is None
