"""The persistent GEMMs with GELU or its derivative in the epilogue: tiles, descriptors, partial sums."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import DEVICE, guarded, randn
from nanogpt_kernels import launch
from nanogpt_kernels.launch import Row
from nanogpt_kernels.ops import gemm_gelu
from nanogpt_kernels.ops.gemm_gelu import gemm_gelu_bwd, gemm_gelu_fwd
from nanogpt_kernels.ops.mlp import bias_gelu_fwd
from parity import assert_parity
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# The interpreter computes in numpy, which warns of 0 times inf; a GPU passes over it
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

HALVES = [torch.bfloat16, torch.float16]
# Small enough for the interpreter, large enough for a GPU: wgmma wants 64 rows, an epilogue quarter 16 columns.
TILE = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=2, PARTS=4, FLATTEN=True, TMA_STORE=True)
ROW = Row(80, TILE, num_warps=4, num_stages=2, itemsize=2, choices=dict(programs_per_sm=1))
PAIR = replace(ROW, blocks=TILE | dict(PARTS=2, FLATTEN=False))
FORMS = pytest.mark.parametrize(
    "row", [ROW, PAIR, replace(PAIR, blocks=PAIR.blocks | dict(TMA_STORE=False))], ids=["flat", "pair", "no TMA store"]
)
# (M, N, K): all tiles whole; every edge ragged, rows aligned for descriptors; nothing aligned; one row
SHAPES = [(128, 128, 64), (150, 200, 40), (70, 75, 33), (1, 64, 8)]


def operands(M: int, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [M, K], w [N, K], b [N], ddelta [M, K] without gradients; products of about unit size."""
    y, w = randn(M, K, dtype=dtype), randn(N, K, dtype=dtype, seed=1, scale=K**-0.5)
    return y.detach(), w.detach(), randn(N, seed=2).detach(), randn(M, K, dtype=dtype, seed=3).detach()


def torch_fwd(y: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    pre = F.linear(y, w, None if b is None else b.to(y.dtype))
    return pre, F.gelu(pre)


def torch_bwd(ddelta: Tensor, w: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    leaf = pre.clone().requires_grad_()
    (dpre,) = torch.autograd.grad(F.gelu(leaf), leaf, ddelta @ w)
    return dpre, dpre.sum(0, dtype=dpre.dtype if dpre.dtype == torch.float64 else torch.float32)


@FORMS
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape: tuple[int, int, int], dtype: torch.dtype, row: Row):
    y, w, b, _ = operands(*shape, dtype)
    for bias in (b, None):
        with guarded():
            pre, act = gemm_gelu_fwd(row, y, w, bias, False, True)
        assert pre is not None
        same = torch_fwd(y, w, bias)
        exact = torch_fwd(y.double(), w.double(), None if bias is None else bias.double())
        for ours, torchs, truth, what in zip((pre, act), same, exact, ("pre", "act")):
            assert_parity(ours, torchs, truth, tiny=1e-6, what=what)
        assert torch.equal(act, bias_gelu_fwd(pre, None, "gelu"))  # of the rounded pre, as beside cuBLAS
        assert gemm_gelu_fwd(row, y, w, bias, False, False)[0] is None


@FORMS
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(shape: tuple[int, int, int], dtype: torch.dtype, row: Row):
    y, w, b, ddelta = operands(*shape, dtype)
    pre, act = gemm_gelu_fwd(row, y, w, b, False, True)
    assert pre is not None
    w_proj = w.t().contiguous()
    with guarded():
        dpre, partials, rebuilt = gemm_gelu_bwd(row, ddelta, w_proj, pre, False, True, True)
    assert rebuilt is not None and torch.equal(rebuilt, act)
    db = partials.sum(0)
    same, exact = torch_bwd(ddelta, w_proj, pre), torch_bwd(ddelta.double(), w_proj.double(), pre.double())
    assert_parity(dpre, same[0], exact[0], tiny=1e-6, what="dpre")
    assert_parity(db, same[1], exact[1], tiny=1e-6, what="db")
    torch.testing.assert_close(db, dpre.float().sum(0), rtol=1e-5, atol=1e-5)  # of dpre as stored
    again, no_partials, no_act = gemm_gelu_bwd(row, ddelta, w_proj, pre, False, False, False)
    assert torch.equal(again, dpre) and no_partials.shape == (0, dpre.size(1)) and no_act is None


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    M=st.integers(1, 100), N=st.integers(1, 100), K=st.integers(1, 70), dtype=st.sampled_from(HALVES),
    row=st.sampled_from([ROW, PAIR]),
)  # fmt: skip
def test_any_shape(M: int, N: int, K: int, dtype: torch.dtype, row: Row):
    test_forward((M, N, K), dtype, row)
    test_backward((M, N, K), dtype, row)


def shifted(t: Tensor) -> Tensor:
    """The same values one element further, so that no descriptor can address them."""
    return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)


def test_pointers_and_descriptors_give_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    y, w, b, ddelta = operands(150, 200, 40, torch.bfloat16)
    seen, stock = [], gemm_gelu.launch

    def watching(op, kernel, grid, *args, **options):
        seen.append((options["TMA"], [isinstance(a, TensorDescriptor) for a in args[:5]]))
        stock(op, kernel, grid, *args, **options)

    monkeypatch.setattr(gemm_gelu, "launch", watching)
    pre, act = gemm_gelu_fwd(ROW, y, w, b, True, True)
    pre_, act_ = gemm_gelu_fwd(ROW, shifted(y), w, b, True, True)
    assert pre is not None and pre_ is not None and torch.equal(pre, pre_) and torch.equal(act, act_)
    dpre, db, _ = gemm_gelu_bwd(ROW, ddelta, w.t(), pre, True, True, False)
    dpre_, db_, _ = gemm_gelu_bwd(ROW, ddelta, w.t(), shifted(pre), True, True, False)
    assert torch.equal(dpre, dpre_) and torch.equal(db, db_)
    described = launch.architecture(DEVICE) >= 90
    assert [tma for tma, _ in seen] == [described, False, described, False]
    assert not any(seen[1][1] + seen[3][1])


@pytest.mark.parametrize("arch, described", [(80, False), (86, False), (89, False), (90, True), (100, True)])
def test_descriptors_from_sm_90_on(arch: int, described: bool):
    empty = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="meta")
    with launch.recording(arch) as calls:
        gemm_gelu_fwd(ROW, empty(256, 64), empty(128, 64), None, False, True)
        gemm_gelu_bwd(ROW, empty(256, 64), empty(64, 128), empty(256, 128), False, True, True)
        gemm_gelu_fwd(ROW, empty(256, 33), empty(128, 33), None, False, True)  # rows of 66 bytes
    assert [call.options["TMA"] for call in calls] == [described, described, False]
    blocks = [[a.block_shape for a in call.args if isinstance(a, TensorDescriptor)] for call in calls]
    if described:
        assert blocks[0] == [[64, 32], [64, 32], [64, 16], [64, 16]]
        assert blocks[1] == [[64, 32], [32, 64], [64, 16], [64, 16], [64, 16]]


def test_what_is_described_without_flattening():
    """Backward then reads pre by a pointer; where it rebuilds act, it is flattened all the same."""
    empty = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="meta")
    by_pointers = replace(PAIR, blocks=PAIR.blocks | dict(TMA_STORE=False))
    with launch.recording(90) as calls:
        for row, rebuild in ((PAIR, False), (PAIR, True), (by_pointers, False)):
            gemm_gelu_bwd(row, empty(256, 64), empty(64, 128), empty(256, 128), False, True, rebuild)
    described = [[isinstance(a, TensorDescriptor) for a in call.args[:5]] for call in calls]
    assert described == [[True, True, False, True, False], [True] * 5, [True, True, False, False, False]]
    assert [call.options["FLATTEN"] for call in calls] == [False, True, False]


def test_a_row_does_not_depend_on_the_others():
    y, w, b, ddelta = operands(150, 72, 40, torch.bfloat16)
    pre, act = gemm_gelu_fwd(ROW, y, w, b, False, True)
    assert pre is not None
    dpre, _, _ = gemm_gelu_bwd(ROW, ddelta, w.t(), pre, False, True, False)
    for rows in (slice(0, 1), slice(70, 140)):
        fewer, fewer_act = gemm_gelu_fwd(ROW, y[rows], w, b, False, True)
        assert fewer is not None and torch.equal(fewer, pre[rows]) and torch.equal(fewer_act, act[rows])
        assert torch.equal(gemm_gelu_bwd(ROW, ddelta[rows], w.t(), pre[rows], False, True, False)[0], dpre[rows])


@pytest.mark.parametrize("M", [64, 65])
def test_an_infinite_weight_stays_in_its_column(M: int):
    """Rows past M are zeros, and 0 times inf is NaN: it must not reach the bias's gradient, ragged tile or not."""
    _, w, _, ddelta = operands(M, 70, 32, torch.bfloat16)
    w[5, 3], ddelta[:, 3] = float("inf"), 1.0
    pre = torch.ones(M, 70, dtype=torch.bfloat16, device=DEVICE)
    db = gemm_gelu_bwd(ROW, ddelta, w.t(), pre, False, True, False)[1].sum(0)
    assert db[5] == float("inf") and bool(db[:5].isfinite().all() and db[6:].isfinite().all())


@triton.jit
def _order_kernel(order_ptr, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    tile_m, tile_n = gemm_gelu._tile_at(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    tl.store(order_ptr + tl.program_id(0), tile_m * tiles_n + tile_n)


@pytest.mark.parametrize("tiles", [(1, 1), (5, 3), (8, 4), (3, 7)])
def test_every_tile_once_in_bands(tiles: tuple[int, int]):
    tiles_m, tiles_n = tiles
    order = torch.empty(tiles_m * tiles_n, dtype=torch.int32, device=DEVICE)
    launch.launch("test", _order_kernel, (tiles_m * tiles_n,), order, tiles_m, tiles_n, GROUP_M=2)
    bands = [range(first, min(first + 2, tiles_m)) for first in range(0, tiles_m, 2)]
    assert order.tolist() == [m * tiles_n + n for band in bands for n in range(tiles_n) for m in band]


@triton.jit
def _far_tile_kernel(x_ptr, y_ptr, i, rows, columns, I: tl.constexpr, J: tl.constexpr):
    start = i.to(tl.int64) * columns
    tile = gemm_gelu._load(x_ptr - start, i, 0, rows, columns, I, J, False)
    gemm_gelu._store(y_ptr - start, tile, i, 0, rows, columns, I, J, False)


def test_rows_beyond_two_to_the_31_elements():
    """Row 2^27 of 64 columns begins at element 2^33; the bases stand that much before their tensors."""
    x, y = torch.randn(16, 64, device=DEVICE), torch.zeros(16, 64, device=DEVICE)
    launch.launch("test", _far_tile_kernel, (1,), x, y, 2**27, 2**27 + 16, 64, I=16, J=64)
    assert torch.equal(x, y)
