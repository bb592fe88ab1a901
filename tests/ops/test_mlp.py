"""The MLP by both its paths: GELU in a persistent GEMM's epilogue, and beside cuBLAS."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import DEVICE, DTYPES, assert_op, gradients, guarded, randn
from nanogpt_kernels import launch, reference
from nanogpt_kernels.contract import ContractError
from nanogpt_kernels.ops.mlp import ACTIVATIONS, mlp, mlp_fwd
from nanogpt_kernels.registry import OPS

# Several tiles of small operands; wgmma wants 64 rows, an epilogue quarter 16 columns.
GEMM = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=2)
ELEMENTWISE = dict(BLOCK_M=4, BLOCK_N=32)
PATHS = pytest.mark.parametrize("fused", [True, False], ids=["fused", "cublas"])


@contextmanager
def path(fused: bool) -> Iterator[None]:
    with ExitStack() as stack:
        for op in ("mlp_fwd", "mlp_bwd"):
            stack.enter_context(launch.override(op, blocks=GEMM, num_stages=2, choices=dict(fused=fused, least_rows=0)))
        for op in ("bias_gelu_fwd", "bias_gelu_bwd"):
            stack.enter_context(launch.override(op, blocks=ELEMENTWISE))
        yield


def operands(M: int, C: int, dtype: torch.dtype, *, F: int | None = None, biased: bool = True) -> tuple[Any, ...]:
    """y [M, C], w_fc [F, C], b_fc [F], w_proj [C, F], F = 4C, all leaves, with products of about unit size."""
    F = F or 4 * C
    w_fc, w_proj = (randn(F, C, dtype=dtype, seed=1, scale=C**-0.5), randn(C, F, dtype=dtype, seed=2, scale=F**-0.5))
    return randn(M, C, dtype=dtype), w_fc, randn(F, seed=3) if biased else None, w_proj


@PATHS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation, biased, recompute", [("gelu", True, False), ("gelu_tanh", False, True)])
def test_value_and_gradients(fused: bool, dtype: torch.dtype, activation: str, biased: bool, recompute: bool):
    inputs = [*operands(70, 24, dtype, biased=biased), activation, recompute]
    with path(fused):
        assert_op(mlp, reference.mlp, inputs, [randn(70, 24, seed=5).detach()], what=f"mlp {dtype}")


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    M=st.integers(1, 70), C=st.integers(1, 40), F=st.integers(1, 80), dtype=st.sampled_from(DTYPES),
    fused=st.booleans(), recompute=st.booleans(), activation=st.sampled_from(ACTIVATIONS),
)  # fmt: skip
def test_any_shape(M: int, C: int, F: int, dtype: torch.dtype, fused: bool, recompute: bool, activation: str):
    inputs = [*operands(M, C, dtype, F=F), activation, recompute]
    with path(fused):
        assert_op(mlp, reference.mlp, inputs, [randn(M, C, seed=5).detach()], what=f"{M}x{C}x{F} {dtype} {fused}")


def test_the_paths_agree():
    """Both apply gelu to the pre that is stored: what is left is the order of sums in pre, one rounding of it."""
    inputs = operands(70, 24, torch.bfloat16)
    dout = randn(70, 24, seed=5).detach()
    with path(True):
        fused = gradients(mlp, inputs, [dout])
    with path(False):
        beside = gradients(mlp, inputs, [dout])
    for ours, theirs in zip(fused, beside):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=2**-7 * float(theirs.abs().max()))


@PATHS
def test_recompute_changes_no_bit(fused: bool):
    inputs = operands(70, 24, torch.bfloat16)
    with path(fused):
        kept = gradients(mlp, (*inputs, "gelu", False), None)
        rebuilt = gradients(mlp, (*inputs, "gelu", True), None)
    assert all(torch.equal(a, b) for a, b in zip(kept, rebuilt))


def saved_elements(recompute: bool, y: Any, w_fc: Any, b_fc: Any, w_proj: Any) -> list[int]:
    """Sizes of the tensors that backward keeps."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        mlp(y, w_fc, b_fc, w_proj, "gelu", recompute)
    return sizes


@PATHS
def test_what_is_saved(fused: bool):
    y, w_fc, b_fc, w_proj = operands(6, 8, torch.bfloat16)
    weights = [y.numel(), w_fc.numel(), w_proj.numel()]
    with path(fused):
        assert saved_elements(False, y, w_fc, b_fc, w_proj) == [*weights, 6 * 32, 6 * 32]
        assert saved_elements(True, y, w_fc, b_fc, w_proj) == [*weights, 6 * 32, 0]
        with torch.no_grad():
            assert saved_elements(False, y, w_fc, b_fc, w_proj) == []
            nothing_kept = mlp_fwd(y, w_fc, b_fc, w_proj, "gelu", False, False)
        assert [t.numel() for t in nothing_kept] == [6 * 8, 0, 0]
        frozen = [t.detach() for t in (y, w_fc, w_proj)]
        assert not mlp(frozen[0], frozen[1], None, frozen[2]).requires_grad


@PATHS
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3)], ids=str)
def test_each_gradient_alone(wanted: tuple[int, ...], recompute: bool, fused: bool):
    inputs = operands(10, 8, torch.bfloat16)
    with path(fused):
        every = gradients(mlp, inputs, None)[1:]
        some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs) if t is not None]
        got = gradients(mlp, [*some, "gelu", recompute], None)[1:]
    assert len(got) == len(wanted) and all(torch.equal(every[i], g) for i, g in zip(wanted, got))


@PATHS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_main_grad(dtype: torch.dtype, fused: bool):
    """The parameters' gradients are added to main_grad, and autograd gets none; y's is as ever."""
    inputs = operands(10, 8, dtype)
    y, w_fc, b_fc, w_proj = inputs
    with path(fused):
        want = gradients(mlp, inputs, None)[1:]
        for t in (w_fc, b_fc, w_proj):
            t.main_grad = torch.ones(t.shape, device=DEVICE)
        mlp(*inputs).sum().backward()
    assert w_fc.grad is None and b_fc.grad is None and w_proj.grad is None
    assert y.grad is not None and torch.equal(y.grad, want[0]) and torch.equal(b_fc.main_grad, 1.0 + want[2])
    for w, dw in ((w_fc, want[1]), (w_proj, want[3])):
        close = 1e-6 if DEVICE.type == "cpu" else 2e-2  # on CUDA the sum is not rounded to dw's dtype on its way
        torch.testing.assert_close(w.main_grad, 1.0 + dw.float(), rtol=close, atol=close)


@PATHS
def test_two_runs_give_the_same_bits(fused: bool):
    inputs = operands(70, 24, torch.bfloat16)
    with path(fused):
        first, second = (gradients(mlp, inputs, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@PATHS
def test_any_leading_dimensions_and_strides(fused: bool):
    y, w_fc, b_fc, w_proj = operands(12, 8, torch.bfloat16)
    with path(fused):
        want = gradients(mlp, (y, w_fc, b_fc, w_proj), None)
        weights = [w.detach().t().contiguous().t().requires_grad_() for w in (w_fc, w_proj)]
        for view in (y.detach().view(2, 6, 8), torch.stack([y.detach()] * 2, -1)[..., 0].view(3, 2, 2, 8)):
            got = gradients(mlp, (view.requires_grad_(), weights[0], b_fc, weights[1]), None)
            assert got[0].shape == got[1].shape == view.shape
            for ours, other in zip(got, want):
                torch.testing.assert_close(ours.reshape(other.shape), other, rtol=2**-7, atol=2**-7)
        one = mlp(y[0], w_fc, b_fc, w_proj)
        torch.testing.assert_close(one, want[0][0], rtol=2**-7, atol=2**-7)


@PATHS
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape: tuple[int, ...], fused: bool):
    _, *weights = operands(1, 8, torch.bfloat16)
    y = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    with path(fused):
        for recompute in (False, True):
            delta, *grads = gradients(mlp, (y, *weights, "gelu", recompute), None)
            assert delta.shape == grads[0].shape == shape
            assert all(g.shape == w.shape and not g.any() for g, w in zip(grads[1:], weights) if w is not None)


@PATHS
def test_nan_reaches_its_row_alone(fused: bool):
    y, *weights = operands(70, 24, torch.bfloat16)
    with torch.no_grad():
        y[66, 3] = float("nan")
        with path(fused), guarded():
            delta = mlp(y, *weights)
    assert bool(delta[66].isnan().all()) and bool(delta[:66].isfinite().all() and delta[67:].isfinite().all())


def bad(case: str) -> tuple:
    y, w_fc, b_fc, w_proj = (torch.ones(s, device=DEVICE) for s in ((3, 4), (16, 4), (16,), (4, 16)))
    half = torch.bfloat16
    return {
        "y": (y[:, :3], w_fc, b_fc, w_proj), "w_fc": (y, w_fc.t(), b_fc, w_proj), "w_proj": (y, w_fc, b_fc, w_proj.t()),
        "matrix": (y, w_fc[0], b_fc, w_proj), "nothing": (y[:, :0], w_fc[:, :0], b_fc, w_proj),
        "bias": (y, w_fc, b_fc[:4], w_proj), "mixed": (y.to(half), w_fc, b_fc, w_proj),
        "mixed_proj": (y, w_fc, b_fc, w_proj.to(half)), "float64": (y.double(), w_fc.double(), b_fc, w_proj.double()),
        "bias_dtype": (y.to(half), w_fc.to(half), b_fc.half(), w_proj.to(half)),
        "device": (y, w_fc.to("meta"), b_fc, w_proj), "activation": (y, w_fc, b_fc, w_proj, "relu"),
    }[case]  # fmt: skip


SHAPE_RULE, DTYPE_RULE, BIAS_RULE = "none of them 0", "must have one dtype", "bias must be float32 \\[16\\]"
RULES = dict(
    y=SHAPE_RULE, w_fc=SHAPE_RULE, w_proj=SHAPE_RULE, nothing=SHAPE_RULE, matrix="must be matrices", bias=BIAS_RULE,
    mixed=DTYPE_RULE, mixed_proj=DTYPE_RULE, float64="must be float32, bfloat16 or float16", bias_dtype=BIAS_RULE,
    device="different devices", activation="activation must be one of",
)  # fmt: skip


@pytest.mark.parametrize("case, rule", RULES.items())
def test_contract(case: str, rule: str):
    with pytest.raises(ContractError, match=rule):
        mlp(*bad(case))


def test_no_second_derivative():
    y, *weights = operands(3, 8, torch.float32)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(mlp(y, *weights).sum(), y, create_graph=True)


@PATHS
def test_registration(fused: bool):
    y, w_fc, b_fc, w_proj = operands(5, 8, torch.bfloat16)
    assert b_fc is not None
    with path(fused), torch.no_grad():
        _, pre, _ = mlp_fwd(y, w_fc, b_fc, w_proj, "gelu", True, True)
        plain = [t.detach() for t in (y, w_fc, b_fc, w_proj)]
        torch.library.opcheck(OPS.mlp_fwd, (*plain, "gelu", True, False))
        for db, add in ((None, False), (torch.zeros(b_fc.shape, device=DEVICE), True)):
            arguments = (y.detach(), w_proj.detach(), pre, "gelu", db, add, True)
            torch.library.opcheck(OPS.mlp_bwd, arguments)


@PATHS
def test_compiles_whole(fused: bool):
    inputs = operands(5, 8, torch.bfloat16)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    with path(fused):
        got, want = gradients(compiled, inputs, None), gradients(mlp, inputs, None)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize(
    "dtype, C, F",
    [(torch.float32, 64, 256), (torch.bfloat16, 60, 256), (torch.bfloat16, 64, 252)],
    ids=["float32", "C no multiple of 8", "F no multiple of 8"],
)
def test_beside_cublas_whatever_the_table_says(dtype: torch.dtype, C: int, F: int):
    """float32 goes through TF32 or not as torch is told, which cuBLAS knows; rows must be whole 16-byte vectors."""
    inputs: Any = [t.detach().to("meta").requires_grad_() for t in operands(5, C, dtype, F=F)]
    with path(True), launch.recording(90) as calls:
        mlp(*inputs).sum().backward()
    assert [call.op for call in calls] == ["bias_gelu_fwd", "bias_gelu_bwd", "column_sums"]


@pytest.mark.parametrize(
    "rows, fused, names", [(4096, False, "bias_gelu"), (4096, True, "mlp"), (8, True, "bias_gelu")]
)
def test_the_table_chooses_the_path(rows: int, fused: bool, names: str):
    """A row of launch_rows.py does, and few rows never go to the persistent GEMM, which they would leave idle."""
    shapes = (rows, 768), (3072, 768), (768, 3072)
    y, w_fc, w_proj = (torch.empty(s, dtype=torch.bfloat16, device="meta", requires_grad=True) for s in shapes)
    with ExitStack() as stack:
        for op in ("mlp_fwd", "mlp_bwd"):
            stack.enter_context(launch.override(op, choices=dict(fused=fused)))
        calls = stack.enter_context(launch.recording(90))
        mlp(y, w_fc, None, w_proj).sum().backward()
    assert [call.op for call in calls] == [f"{names}_fwd", f"{names}_bwd"]
