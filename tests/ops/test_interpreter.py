"""The interpreter's bfloat16, bit for bit torch's."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter import counting_bytes
from kernel_case import DEVICE
from nanogpt_kernels.launch import launch


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, out_ptr, wide_ptr, dot_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(out_ptr + at, tl.where(a < b, a + b, a * b))
    tl.store(out_ptr + N * N + at, (a.to(tl.float32) / 3.0).to(tl.bfloat16))
    tl.store(wide_ptr + at, a.to(tl.float32))
    tl.store(dot_ptr + at, tl.dot(a, b, input_precision="ieee"))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="about the interpreter")
def test_bfloat16_is_exact():
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    a[0, :4] = torch.tensor([float("inf"), float("nan"), 3.3895e38, 1e-40])
    out, wide, dot = torch.empty(2, 32, 32, dtype=torch.bfloat16), torch.empty(32, 32), torch.empty(32, 32)
    launch("test", _arithmetic_kernel, (1,), a, b, out, wide, dot, N=32)
    torch.testing.assert_close(out[0], torch.where(a < b, a + b, a * b), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(out[1], (a.float() / 3.0).bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, a.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dot[1:], (a[1:].float() @ b.float()), rtol=1e-6, atol=1e-6)


@triton.jit
def _sum_kernel(a_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(a_ptr + at, mask=at < 10, other=0.0), axis=0))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="about the interpreter")
def test_what_would_be_wrong_raises():
    with pytest.raises(Exception, match="not exact in the interpreter"):
        launch("test", _sum_kernel, (1,), torch.ones(16).bfloat16(), torch.empty(1).bfloat16(), BLOCK=16)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="about the interpreter")
def test_bytes_are_counted_where_the_mask_is_on():
    with counting_bytes() as counted:
        launch("test", _sum_kernel, (3,), torch.ones(16), torch.empty(1), BLOCK=16)
    assert counted == {"load": 3 * 10 * 4, "store": 3 * 4}
