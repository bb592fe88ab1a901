"""Device functions that ops share, against torch."""

import kernel_case
import pytest
import torch
import triton
import triton.language as tl
from kernel_case import DEVICE
from nanogpt_kernels import primitives, reference
from nanogpt_kernels.launch import launch
from parity import assert_parity
from torch import Tensor


@triton.jit
def _keep_mask_kernel(
    seed_ptr, out_ptr, site, threshold, M, N, row0,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = row0 + tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N
    keep = primitives.keep_mask(tl.load(seed_ptr), site, threshold, m, n, tl.cdiv(N, 4), BLOCK_M, BLOCK_N)
    columns = n + tl.arange(0, BLOCK_N)
    inside = (m < row0 + M)[:, None] & (columns < N)[None, :]
    tl.store(out_ptr + (m - row0)[:, None] * N + columns[None, :], keep, mask=inside)


@pytest.mark.parametrize("N", [1, 3, 64, 99])
@pytest.mark.parametrize("seed", [0, 7, (5 << 32) + 123, -3])
def test_keep_mask_is_the_reference_s(N: int, seed: int):
    M, p = 5, 0.3
    seed_tensor = torch.tensor([seed], device=DEVICE)
    out = torch.empty(M, N, dtype=torch.bool, device=DEVICE)
    grid = (triton.cdiv(M, 2), triton.cdiv(N, 16))
    launch("test", _keep_mask_kernel, grid, seed_tensor, out, 11, int(p * 2**32), M, N, 0, BLOCK_M=2, BLOCK_N=16)
    assert torch.equal(out, reference.dropout_mask((M, N), p, seed_tensor, 11))


def test_keep_mask_counts_groups_in_64_bits():
    """Rows past 2^32 groups use the counter's second word; the expected words come from reference.philox."""
    M, N, row0 = 2, 8, 2**31 + 5
    seed_tensor, out = torch.tensor([9], device=DEVICE), torch.empty(2, 8, dtype=torch.bool, device=DEVICE)
    launch("test", _keep_mask_kernel, (1, 1), seed_tensor, out, 3, 2**31, M, N, row0, BLOCK_M=2, BLOCK_N=8)
    groups = torch.arange(2 * row0, 2 * row0 + 4, device=DEVICE)
    words = torch.stack(reference.philox(seed_tensor, groups, 3), -1).view(2, 8)
    assert torch.equal(out, words >= 2**31)
    assert groups[0] > 2**32


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, dy_ptr, TANH: tl.constexpr, SHORT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at).to(tl.float32)
    tl.store(y_ptr + at, primitives.gelu(x, TANH, SHORT).to(y_ptr.dtype.element_ty))
    tl.store(dy_ptr + at, primitives.gelu_derivative(x, TANH, SHORT).to(y_ptr.dtype.element_ty))


def gelu_of(x: Tensor, tanh: bool, short: bool) -> tuple[Tensor, Tensor]:
    y, dy = torch.empty_like(x), torch.empty_like(x)
    launch("test", _gelu_kernel, (x.numel() // 1024,), x, y, dy, TANH=tanh, SHORT=short, BLOCK=1024)
    return y, dy


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_and_its_derivative(approximate: str):
    x = torch.cat([torch.linspace(-12, 12, 1020), torch.tensor([0.0, 1e4, -1e4, 1e-30])]).to(DEVICE).requires_grad_()
    y, dy = gelu_of(x.detach(), approximate == "tanh", False)
    x64 = x.detach().double().requires_grad_()
    want, want64 = (torch.nn.functional.gelu(t, approximate=approximate) for t in (x, x64))
    (grad,), (grad64,) = torch.autograd.grad(want.sum(), x), torch.autograd.grad(want64.sum(), x64)
    assert_parity(y, want.detach(), want64.detach(), tiny=1e-9, what="gelu")
    assert_parity(dy, grad, grad64, tiny=1e-7, what="its derivative")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_gelu_of_every_number(dtype: torch.dtype):
    """All 65,536: the rounding to 16 bits is the error, the fit adds what primitives.py says of Q(|x|)."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(DEVICE)
    y, dy = gelu_of(x, False, True)
    x, y, dy = (t.cpu().double() for t in (x, y, dy))
    assert torch.equal(y.isnan(), x.isnan()) and torch.equal(dy.isnan(), x.isnan())
    limits = {float("inf"): (float("inf"), 1.0), -float("inf"): (0.0, 0.0), 0.0: (0.0, 0.5)}
    for at, (value, slope) in limits.items():
        assert bool((y[x == at] == value).all() and (dy[x == at] == slope).all())
    finite = x.isfinite()
    x, y, dy = x[finite], y[finite], dy[finite]
    z = x.abs()
    tail, phi = torch.special.erfc(z / 2**0.5) / 2, torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
    fit = torch.where(z <= 5.8, 1.6e-5, torch.where(z <= 8.0, 2e-4, 5e-3)) + 1e-6  # and float32's own
    want, slope = torch.where(x > 0, x - x * tail, x * tail), torch.where(x < 0, tail + x * phi, 1 - tail + x * phi)
    half, least = torch.finfo(dtype).eps / 2, max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 2e-38)
    for what, got, exact, off in (("gelu", y, want, z * tail * fit), ("slope", dy, slope, tail * fit + z * phi * 1e-5)):
        over = (got - exact).abs() / ((exact.abs() + off) * half + off + least)
        assert float(over.max()) <= 1, f"{what}({float(x[over.argmax()])}): {float(over.max())} of its bound"


def test_a_store_out_of_bounds_is_seen():
    """The guards themselves: a kernel that writes one element too far fails the test that runs it."""
    with pytest.raises(AssertionError, match="outside a tensor"), kernel_case.guarded():
        y = torch.empty(1023, device=DEVICE)
        launch("test", _gelu_kernel, (1,), torch.zeros(1024, device=DEVICE), y, torch.empty(1024, device=DEVICE),
               TANH=True, SHORT=False, BLOCK=1024)  # fmt: skip


@triton.jit
def _piece_kernel(
    at_ptr, inside_ptr, row0, M, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, I: tl.constexpr
):  # fmt: skip
    m = row0 + tl.arange(0, ROWS).to(tl.int64)
    at, inside = primitives.piece(m, M, I, C, BLOCK_C)
    lane = tl.arange(0, ROWS)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tl.store(at_ptr + lane, at)
    tl.store(inside_ptr + lane, inside)


def test_a_piece_s_offsets_are_64_bits():
    """Rows of a tensor of more than 2^31 elements, of which the last lanes do not exist."""
    rows, block, C, i, row0 = 4, 8, 12, 1, 2**31 // 12 - 2
    at = torch.zeros(rows, block, dtype=torch.int64, device=DEVICE)
    inside = torch.zeros(rows, block, dtype=torch.bool, device=DEVICE)
    M = row0 + 3
    launch("test", _piece_kernel, (1,), at, inside, row0, M, C=C, ROWS=rows, BLOCK_C=block, I=i)
    m, c = row0 + torch.arange(rows, device=DEVICE)[:, None], i * block + torch.arange(block, device=DEVICE)[None, :]
    assert torch.equal(at, m * C + c) and bool((at > 2**31).any())
    assert torch.equal(inside, (m < M) & (c < C))
