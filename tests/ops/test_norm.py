"""LayerNorm against the reference: every width, awkward values, and rows that know nothing of each other."""

import math
from typing import Any

import kernel_case
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import DEVICE, DTYPES, assert_op, gradients, guarded, randn
from nanogpt_kernels import launch, reference
from nanogpt_kernels.contract import ContractError
from nanogpt_kernels.ops.norm import layernorm, norm
from nanogpt_kernels.registry import OPS
from parity import assert_parity
from torch import Tensor

WIDTHS = [1, 2, 63, 64, 65, 100, 127, 768, 769, 1600, 8192]


def operands(M: int, C: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    return [randn(M, C, dtype=dtype), randn(C, seed=1), randn(C, seed=2)]


def check(r: Tensor, w: Tensor, b: Tensor | None, eps: float = 1e-5, out_dtype: torch.dtype | None = None) -> None:
    dy = randn(*r.shape, seed=3).detach()
    assert_op(norm, reference.norm, [r, w, b, eps, out_dtype], [dy], what="norm")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", WIDTHS)
def test_widths(C: int, dtype: torch.dtype):
    """Rows of one lane, of less than a piece, of whole pieces and of pieces and a rest; as TABLE launches them."""
    check(*operands(3 if C > 2000 else 9 if C > 700 else 17, C, dtype))


@pytest.mark.parametrize("C", [40, 48])
@pytest.mark.parametrize("M", [1, 31, 64])
def test_programs_stride_over_tiles(M: int, C: int):
    """Eight programs: fewer tiles than programs, a last tile not full, two tiles each; 3 pieces, the last one not full
    or full."""
    blocks = dict(blocks=dict(ROWS=4, BLOCK_C=16), choices=dict(programs_per_sm=1))
    with launch.override("norm_fwd", **blocks), launch.override("norm_bwd", **blocks):
        check(*operands(M, C))


@pytest.mark.parametrize("r_dtype, out_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_out_dtype(r_dtype: torch.dtype, out_dtype: torch.dtype):
    check(*operands(9, 100, r_dtype), out_dtype=out_dtype)


def test_no_bias_and_weights_in_another_dtype():
    r, w, _ = operands(9, 100)
    check(r, w, None)
    r, w, b = randn(9, 100, dtype=torch.bfloat16), *(randn(100, dtype=torch.bfloat16, seed=i) for i in (1, 2))
    inputs, dys = [r, w, b], [randn(9, 100, seed=3).detach()]
    assert_op(layernorm, lambda r, w, b: F.layer_norm(r, w.shape, w, b), inputs, dys, what="all in bfloat16")


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    M=st.integers(1, 25),
    C=st.integers(3, 50),
    rows=st.sampled_from([1, 2, 4]),
    piece=st.sampled_from([4, 16, 64]),
    dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from([1e-5, 1e-12, 0.1]),
    bias=st.booleans(),
)
def test_any_shape_and_tile(M: int, C: int, rows: int, piece: int, dtype: torch.dtype, eps: float, bias: bool):
    blocks = dict(blocks=dict(ROWS=rows, BLOCK_C=piece), choices=dict(programs_per_sm=1))
    r, w, b = operands(M, C, dtype)
    with launch.override("norm_fwd", **blocks), launch.override("norm_bwd", **blocks):
        check(r, w, b if bias else None, eps)


def test_offset_rows_keep_their_variance():
    """At mean 1000 and deviation 1, float32 squares lose what E[x^2] - E[x]^2 subtracts: the two passes do not."""
    r, w, b = operands(9, 769)
    offset = (r.detach() + 1000.0).requires_grad_()
    check(offset, w, b)
    y64 = reference.norm(offset.double(), w.double(), b.double())
    variance = offset.square().mean(1, keepdim=True) - offset.mean(1, keepdim=True).square()
    one_pass = (offset - offset.mean(1, keepdim=True)) * torch.rsqrt(variance + 1e-5) * w + b
    with pytest.raises(AssertionError, match="error"):
        assert_parity(one_pass, reference.norm(offset, w, b), y64, tiny=1e-6, what="one pass")


def test_constant_rows():
    """Variance 0: y is b, gradients are finite."""
    _, w, b = operands(1, 96)
    r = torch.tensor([0.0, -3.0, 2.0**40], device=DEVICE)[:, None].repeat(1, 96).requires_grad_()
    y, *grads = gradients(norm, [r, w, b], [randn(3, 96, seed=3).detach()])
    assert torch.equal(y, b.detach().expand(3, 96)) and all(g.isfinite().all() for g in grads)
    check(r, w, b)


@pytest.mark.parametrize(
    "scale, dtype",
    [(1e16, torch.float32), (1e16, torch.bfloat16), (1.5e4, torch.float16),
     (1e-39, torch.bfloat16), (3e-7, torch.float16), (1e-20, torch.float32)],
)  # fmt: skip
def test_huge_and_subnormal(scale: float, dtype: torch.dtype):
    r = randn(9, 100, dtype=dtype, scale=scale)
    assert r.isfinite().all() and (r != 0).any()
    check(r, *operands(1, 100)[1:])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_touch_only_themselves(bad: float):
    """y and dr differ in the bad row alone, where all is NaN as in torch; dw and db take it in, as in torch."""
    r, w, b = operands(7, 40)
    dy, broken = randn(7, 40, seed=3).detach(), r.detach().clone()
    broken[2, 5] = bad
    with launch.override("norm_fwd", blocks=dict(ROWS=4, BLOCK_C=16)):
        clean, got = (gradients(norm, [x, w, b], [dy]) for x in (r, broken.requires_grad_()))
    want = gradients(reference.norm, [broken, w, b], [dy])
    others = [0, 1, 3, 4, 5, 6]
    for i in range(4):
        assert torch.equal(got[i].isnan(), want[i].isnan())
    for i in range(2):
        assert got[i][2].isnan().all() and torch.equal(got[i][others], clean[i][others])


def test_a_gradient_of_nan_stays_in_its_row_and_column():
    r, w, b = operands(7, 40)
    dy = randn(7, 40, seed=3).detach()
    dy[4, 9] = math.nan
    _, dr, dw, db = gradients(norm, [r, w, b], [dy])
    assert dr.isnan().all(1).nonzero().tolist() == dr.isnan().any(1).nonzero().tolist() == [[4]]
    assert dw.isnan().nonzero().tolist() == db.isnan().nonzero().tolist() == [[9]]


def test_same_bits_twice_and_in_any_batch():
    r, w, b = operands(33, 100, torch.bfloat16)
    dy = randn(33, 100, seed=3).detach()
    first, second = (gradients(norm, [r, w, b], [dy]) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    for rows in (slice(0, 3), slice(30, 33), slice(13, 14)):
        alone = gradients(norm, [r.detach()[rows].clone().requires_grad_(), w, b], [dy[rows].clone()])
        assert torch.equal(alone[0], first[0][rows]) and torch.equal(alone[1], first[1][rows])


def test_layouts():
    """Strided rows and vectors give the bits of plain ones; odd addresses, whose loads are narrower, nearly."""
    r, w, b = operands(6, 40)
    r = r.detach().view(2, 3, 40).requires_grad_()
    dy = randn(2, 3, 40, seed=3).detach()

    def odd(x: Tensor) -> Tensor:
        return torch.zeros(x.numel() + 1, device=DEVICE)[1:].view(x.shape).copy_(x.detach())

    def strided(x: Tensor) -> Tensor:
        return torch.zeros(*x.shape, 2, device=DEVICE)[..., 1].copy_(x.detach())

    def turned(x: Tensor) -> Tensor:
        return x.detach().transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else strided(x)

    want = gradients(norm, [r, w, b], [dy])
    for change in (strided, turned, odd):
        with guarded():
            got = gradients(norm, [change(x).requires_grad_() for x in (r, w, b)], [change(dy)])
        torch.testing.assert_close(got, want)
        assert change is odd or all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    _, _, db = gradients(lambda w, b: norm(r[:1, :1].detach().expand(2, 3, 40), w, b).sum(), [w, b], None)
    assert torch.equal(db, torch.full_like(b, 6.0))  # r's rows are one row, dy one element, expanded


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
def test_empty(shape: tuple[int, ...]):
    r, (_, w, b) = torch.empty(shape, device=DEVICE, requires_grad=True), operands(1, 40)
    y, dr, dw, db = gradients(norm, [r, w, b], None)
    assert y.shape == dr.shape == shape and (dw == 0).all() and (db == 0).all()


def test_gradients_only_where_asked():
    r, w, b = operands(9, 40)
    dy = randn(9, 40, seed=3).detach()
    want = gradients(norm, [r, w, b], [dy])
    for asked in ([0], [1], [2], [0, 2]):
        inputs = [x if i in asked else x.detach() for i, x in enumerate((r, w, b))]
        got = gradients(norm, inputs, [dy])
        torch.testing.assert_close(got[1:], [want[1 + i] for i in asked])
    assert not norm(r.detach(), w.detach(), b.detach()).requires_grad
    with torch.no_grad():
        y = norm(r, w, b)
    torch.testing.assert_close(y, want[0])
    assert not y.requires_grad


def test_second_derivative_is_refused():
    r, w, b = operands(3, 8)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(norm(r, w, b).sum(), r, create_graph=True)


WRONG = {
    "width": (dict(w=torch.ones(7, device=DEVICE)), "last dimension of r must be w's"),
    "scalar": (dict(r=torch.ones((), device=DEVICE)), r"r must be \[..., C\]"),
    "no columns": (
        dict(r=torch.ones(3, 0, device=DEVICE), w=torch.ones(0, device=DEVICE), b=None), "C at least 1"
    ),
    "b": (dict(b=torch.ones(1, device=DEVICE)), "b must have w's shape"),
    "float64": (dict(r=torch.ones(3, 8, dtype=torch.float64, device=DEVICE)), "r must be float32"),
    "integers": (dict(w=torch.ones(8, dtype=torch.int64, device=DEVICE)), "w must be float32"),
    "out_dtype": (dict(out_dtype=torch.float64), "out_dtype must be"),
    "device": (dict(w=torch.ones(8, device="meta")), "different devices"),
    "too wide": (dict(r=torch.ones(1, 8193, device=DEVICE), w=torch.ones(8193, device=DEVICE), b=None), "size 8193"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_contract(case: str):
    changes, message = WRONG[case]
    right = dict(r=torch.ones(3, 8, device=DEVICE), w=torch.ones(8, device=DEVICE), b=torch.ones(8, device=DEVICE))
    with pytest.raises(ContractError, match=f"^norm.*{message}"):
        norm(**(right | changes))


def test_registration():
    r, w, b = (x.detach() for x in operands(5, 24))
    mean, rstd = torch.rand(2, 5, device=DEVICE)
    for statistics in (False, True):
        arguments = (r, None, None, w, b, 1e-5, 0.0, None, 0, torch.bfloat16, statistics)
        torch.library.opcheck(OPS.norm_fwd.default, arguments)
    for wanted in ([True, True, True, False], [False, True, False, False], [True, False, False, False]):
        arguments = (r, None, r, mean, rstd, w, None, 0.0, 0, None, *wanted)
        torch.library.opcheck(OPS.norm_bwd.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool):
    r, w, b = operands(6, 40, torch.bfloat16)
    dy = randn(6, 40, seed=3).detach()
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (kernel_case.gradients(f, [r, w, b], [dy]) for f in (norm, compiled))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert not compiled(r.detach(), w.detach(), None).requires_grad
