"""Attention with the rows of launch.TABLE as they are; other files make tiles small, so that small T has several."""

import kernel_case
import pytest
import torch
from attention_case import attention_same_dtype, seed_tensor
from kernel_case import assert_op, randn
from nanogpt_kernels import launch
from nanogpt_kernels.ops.attention import attention

MASKED = pytest.mark.parametrize("masked", [False, True], ids=["plain", "documents and dropout"])


def assert_attention(T: int, D: int, dtype: torch.dtype, masked: bool) -> None:
    """Value and gradient of one head; documents of a fifth of T each, so that tiles are skipped."""
    doc_ids = (torch.arange(T, device=kernel_case.DEVICE) * 5 // T)[None]
    masks = (0.1, seed_tensor(), 1, doc_ids) if masked else (0.0, None, 1)
    inputs = [randn(1, T, 3, 1, D, dtype=dtype), *masks]
    assert_op(attention, attention_same_dtype, inputs, [randn(1, T, 1, D, seed=1).detach()], what=str(dtype))


@MASKED
@pytest.mark.parametrize("atomic", [False, True], ids=["deterministic", "atomic"])
@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("T", [300, 384])  # of 384 every tile is full
def test_bfloat16(T: int, D: int, atomic: bool, masked: bool):
    with launch.override("attention_bwd", choices=dict(atomic=atomic)):
        assert_attention(T, D, torch.bfloat16, masked)


@MASKED
@pytest.mark.parametrize("D", [32, 64, 128])
def test_float32(D: int, masked: bool):
    assert_attention(100, D, torch.float32, masked)


@MASKED
def test_float16(masked: bool):
    assert_attention(140, 64, torch.float16, masked)
