"""LayerNorm in Triton."""

import pytest
import torch
from kernel_case import DTYPES, assert_op, randn
from nanogpt_kernels import norm, reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [1, 100, 768])
def test_norm(C: int, dtype: torch.dtype):
    inputs = [randn(7, C, dtype=dtype), randn(C, seed=1), randn(C, seed=2), 1e-5]
    assert_op(norm.norm, reference.norm, inputs, [randn(7, C, seed=3).detach()], what="norm")
