"""bias_gelu: GELU of a biased tensor in one elementwise pass, and the pass that the MLP takes beside cuBLAS."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import counting_bytes
from kernel_case import DEVICE, DTYPES, assert_op, gradients, guarded, randn
from nanogpt_kernels import launch
from nanogpt_kernels.contract import ContractError
from nanogpt_kernels.ops.mlp import ACTIVATIONS, bias_gelu, bias_gelu_bwd, bias_gelu_fwd, mlp_bwd
from nanogpt_kernels.registry import OPS
from torch import Tensor

# So that a handful of rows make several tiles and several strides of one program; 16 columns are not all of 23 or 40.
SMALL = dict(BLOCK_M=2, BLOCK_N=16)


# The interpreter computes in numpy, which warns of what a GPU passes over: inf - inf, and overflows
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def small_tiles():
    with launch.override("bias_gelu_fwd", blocks=SMALL), launch.override("bias_gelu_bwd", blocks=SMALL, num_warps=1):
        yield


def reference(x: Tensor, b: Tensor | None, activation: str) -> Tensor:
    biased = x if b is None else x + b.to(x.dtype)
    return F.gelu(biased, approximate="tanh" if activation == "gelu_tanh" else "none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [True, False])
def test_value_and_gradients(biased: bool, activation: str, dtype: torch.dtype):
    x, b = randn(3, 7, 40, dtype=dtype, scale=2.0), randn(40, seed=1) if biased else None
    assert_op(bias_gelu, reference, [x, b, activation], [randn(3, 7, 40, seed=2).detach()], what="bias_gelu")


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40), N=st.integers(1, 50), dtype=st.sampled_from(DTYPES), transposed=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
)  # fmt: skip
def test_any_shape(rows: int, N: int, dtype: torch.dtype, transposed: bool, activation: str):
    x = randn(N, rows, dtype=dtype).detach().t() if transposed else randn(rows, N, dtype=dtype).detach()
    inputs = [x.requires_grad_(), randn(N, seed=1), activation]
    if rows:
        assert_op(bias_gelu, reference, inputs, [randn(rows, N, seed=2).detach()], what=f"{rows}x{N} {dtype}")
    else:
        y = bias_gelu(*inputs)
        dx, db = torch.autograd.grad(y.sum(), inputs[:2])
        assert y.shape == dx.shape == (0, N) and torch.equal(db, torch.zeros_like(db))


def test_more_rows_than_programs():
    """41 row tiles for 2 programs a strip: each strides, and the last stride is ragged."""
    with launch.override("bias_gelu_bwd", blocks=SMALL, choices=dict(summing_per_sm=1)):
        inputs = [randn(81, 50), randn(50, seed=1), "gelu"]
        assert launch.sm_count(DEVICE) // 4 < 41 or DEVICE.type == "cuda"
        assert_op(bias_gelu, reference, inputs, [randn(81, 50, seed=2).detach()], what="strided")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_non_finite_and_huge_values(activation: str):
    """What torch gives, but for erf at inf and 3e38: there torch's CPU says nan and inf, the formula inf and 3e38.
    At 3e38 the tanh form's derivative is 0 times an overflowed square: torch's is NaN too."""
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, 3e38, -3e38, 1e13, -1e13, 0.0, 1e-45], device=DEVICE).requires_grad_()
    y = bias_gelu(x, None, activation)
    (dx,) = torch.autograd.grad(y.sum(), x)
    huge = [nan, nan] if activation == "gelu_tanh" else [1.0, 0.0]
    for got, want in (
        (y, [nan, inf, nan, 3e38, 0.0, 1e13, 0.0, 0.0, 0.0]),
        (dx, [nan, nan, nan, *huge, 1, 0, 0.5, 0.5]),
    ):
        torch.testing.assert_close(got.detach().cpu(), torch.tensor(want), equal_nan=True)


def test_an_infinite_bias_stays_in_its_column():
    """Three rows in tiles of two: the row past the end sees the bias too, and must not reach its gradient."""
    x, b = randn(3, 20), randn(20, seed=1).detach()
    b[3] = float("inf")
    b.requires_grad_()
    inputs = (x, b, "gelu")
    got, want = (torch.autograd.grad(f(*inputs).sum(), (x, b)) for f in (bias_gelu, reference))
    for ours, torchs in zip(got, want):
        torch.testing.assert_close(ours, torchs, equal_nan=True)


def test_strided_and_misaligned_inputs_give_the_same():
    x, b, dy = randn(6, 24).detach(), randn(24, seed=1).detach(), randn(6, 24, seed=2).detach()
    want, (dx, db) = bias_gelu(x, b), bias_gelu_bwd(dy, x, b, "gelu", True)
    buffer = torch.empty(6 * 24 + 1, device=DEVICE)
    misaligned = buffer[1:].view(6, 24).copy_(x)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    for view in (misaligned, strided, x.t().contiguous().t()):
        assert torch.equal(bias_gelu(view, b), want)
        again = bias_gelu_bwd(dy.t().contiguous().t(), view, torch.stack([b, b], dim=1)[:, 0], "gelu", True)
        assert torch.equal(again[0], dx) and torch.equal(again[1], db)
    expanded = torch.ones(1, device=DEVICE).expand(6, 24)
    assert torch.equal(
        bias_gelu_bwd(expanded, x, b, "gelu", True)[1], bias_gelu_bwd(expanded.clone(), x, b, "gelu", True)[1]
    )


def test_rows_do_not_depend_on_the_others():
    x, dy = randn(9, 40, dtype=torch.bfloat16).detach(), randn(9, 40, dtype=torch.bfloat16, seed=2).detach()
    b = randn(40, seed=1).detach()
    y, dx = bias_gelu_fwd(x, b, "gelu"), bias_gelu_bwd(dy, x, b, "gelu", True)[0]
    for rows in (slice(0, 1), slice(3, 8)):
        assert torch.equal(bias_gelu_fwd(x[rows], b, "gelu"), y[rows])
        assert torch.equal(bias_gelu_bwd(dy[rows], x[rows], b, "gelu", True)[0], dx[rows])


def test_two_runs_give_the_same_bits():
    x, b, dy = randn(33, 40).detach(), randn(40, seed=1).detach(), randn(33, 40, seed=2).detach()
    first, second = (bias_gelu_bwd(dy, x, b, "gelu", True) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="counts bytes in the interpreter")
def test_bytes():
    """Two passes over [M, N] forward and three backward; a fourth where the activation is rebuilt."""
    M, N, programs = 32, 64, 4
    x, dy = (randn(M, N, dtype=torch.bfloat16, seed=s).detach() for s in (0, 1))
    passed = 2 * M * N
    with counting_bytes() as forward:
        bias_gelu_fwd(x, None, "gelu")
    assert forward == dict(load=passed, store=passed)
    choices = dict(summing_per_sm=programs * (N // 16) // launch.sm_count(DEVICE))
    with launch.override("bias_gelu_bwd", blocks=SMALL, choices=choices), counting_bytes() as backward:
        bias_gelu_bwd(dy, x, None, "gelu", True)
    assert backward == dict(load=2 * passed, store=passed + 4 * programs * N)
    w_proj = torch.eye(N, device=DEVICE).bfloat16()
    with launch.override("mlp_bwd", choices=dict(fused=False)), counting_bytes() as rebuilding:
        mlp_bwd(dy, w_proj, x, "gelu", None, False, True)
    assert rebuilding == dict(load=2 * passed, store=2 * passed)


def test_only_what_is_asked_for():
    x, b = randn(4, 20).detach(), randn(20, seed=1).detach()
    assert not bias_gelu(x, b).requires_grad
    with torch.no_grad():
        assert bias_gelu(randn(4, 20), b).grad_fn is None
    db = torch.autograd.grad(bias_gelu(x, b.requires_grad_()).sum(), b)[0]
    x.requires_grad_()
    both = torch.autograd.grad(bias_gelu(x, b).sum(), (x, b))
    assert torch.equal(db, both[1])
    assert torch.equal(torch.autograd.grad(bias_gelu(x, b.detach()).sum(), x)[0], both[0])


def test_the_bias_s_gradient_has_its_dtype():
    x = randn(4, 20, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        b = randn(20, seed=1, dtype=dtype)
        assert torch.autograd.grad(bias_gelu(x, b).sum(), b)[0].dtype == dtype


def test_main_grad():
    x, b, dy = randn(9, 20), randn(20, seed=1), randn(9, 20, seed=2).detach()
    dx, db = torch.autograd.grad(bias_gelu(x, b), (x, b), dy)
    b.main_grad = torch.ones(20, device=DEVICE)  # type: ignore[attr-defined]
    bias_gelu(x, b).backward(dy)
    assert b.grad is None and torch.equal(b.main_grad, 1.0 + db)  # type: ignore[attr-defined]
    assert x.grad is not None and torch.equal(x.grad, dx)


@pytest.mark.parametrize(
    "x, b, activation, rule",
    [
        (torch.ones(2, 4), torch.ones(3), "gelu", "bias must be float32 \\[4\\]"),
        (torch.ones(2, 4), torch.ones(4, dtype=torch.float64), "gelu", "bias must be float32"),
        (torch.ones(2, 4), torch.ones(4), "relu", "activation must be one of"),
        (torch.ones(2, 4, dtype=torch.float64), None, "gelu", "x must be float32, bfloat16 or float16"),
        (torch.ones(()), None, "gelu", "x must have a dimension"),
        (torch.ones(2, 4), torch.ones(4, device="meta"), "gelu", "different devices"),
    ],
)
def test_contract(x: Tensor, b: Tensor | None, activation: str, rule: str):
    b = b if b is None or b.is_meta else b.to(DEVICE)
    with pytest.raises(ContractError, match=rule):
        bias_gelu(x.to(DEVICE), b, activation)


def test_no_second_derivative():
    x = randn(2, 4)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(bias_gelu(x, None).sum(), x, create_graph=True)


@pytest.mark.parametrize("biased", [True, False])
def test_registration(biased: bool):
    x, dy, b = randn(5, 20), randn(5, 20, seed=2).detach(), randn(20, seed=1) if biased else None
    plain = None if b is None else b.detach()
    torch.library.opcheck(OPS.bias_gelu_fwd, (x.detach(), plain, "gelu"))
    torch.library.opcheck(OPS.bias_gelu_bwd, (dy, x.detach(), plain, "gelu", biased))


def test_compiles_whole():
    inputs, dy = [randn(5, 20), randn(20, seed=1), "gelu_tanh"], [randn(5, 20, seed=2).detach()]
    compiled = torch.compile(bias_gelu, fullgraph=True, backend="aot_eager")
    got, want = gradients(compiled, inputs, dy), gradients(bias_gelu, inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_guards_cover_the_partials():
    """One row, one program: the partial sums lie in guarded, poisoned memory like everything else."""
    with guarded():
        dx, partials = bias_gelu_bwd(randn(1, 17).detach(), randn(1, 17, seed=1).detach(), None, "gelu", True)
    assert torch.equal(dx, partials)
