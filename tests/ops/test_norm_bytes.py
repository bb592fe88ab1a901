"""Bytes that norm and add_norm move, counted in the interpreter, against the fewest possible: each input and output
once, the vectors and statistics included. Adding up the programs' partial sums counts too."""

import kernel_case
import pytest
import torch
from byte_counter import counting_bytes
from kernel_case import DEVICE, randn
from nanogpt_kernels import launch
from nanogpt_kernels.ops.norm import add_norm, norm
from torch import Tensor

pytestmark = pytest.mark.skipif(kernel_case.DEVICE.type != "cpu", reason="the interpreter counts")

M, C, PROGRAMS = 4096, 96, 16
SEED = torch.tensor([7], device=DEVICE)


@pytest.fixture(autouse=True)
def sixteen_programs():
    """Of 128 rows a tile: bytes do not depend on the tile, and the interpreter's time does."""
    assert PROGRAMS == 2 * launch.INTERPRETER_SMS
    tile = dict(blocks=dict(ROWS=128, BLOCK_C=128), choices=dict(programs_per_sm=2))
    with launch.override("norm_fwd", **tile), launch.override("norm_bwd", **tile):
        yield


def operands(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """r, delta, delta_bias, w, b."""
    return randn(M, C, dtype=dtype), randn(M, C, dtype=dtype, seed=1), *(randn(C, seed=i) for i in (2, 3, 4))


ROW, VECTOR, STATISTICS = M * C * 2, C * 4, 2 * M * 4  # a 16-bit [M, C], a float32 [C], mean and rstd


def test_norm():
    r, _, _, w, b = operands(torch.bfloat16)
    with counting_bytes() as fwd:
        y = norm(r, w, b)
    with counting_bytes() as bwd:
        y.backward(torch.ones_like(y))
    fewest_fwd, fewest_bwd = 2 * ROW + 2 * VECTOR + STATISTICS, 3 * ROW + 3 * VECTOR + STATISTICS  # dw, db written
    assert fewest_fwd <= sum(fwd.values()) <= 1.05 * fewest_fwd
    assert fewest_bwd <= sum(bwd.values()) <= 1.15 * fewest_bwd
    assert fwd["store"] == ROW + STATISTICS and bwd["store"] == ROW + 2 * (PROGRAMS + 1) * VECTOR


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_add_norm(p: float):
    r, delta, delta_bias, w, b = operands(torch.bfloat16)
    with counting_bytes() as fwd:
        r_out, y = add_norm(r, delta, delta_bias, w, b, 1e-5, p, SEED, 3)
    with counting_bytes() as bwd:
        torch.autograd.backward([r_out, y], [torch.ones_like(r), torch.ones_like(y)])
    gradients = 1 if p == 0.0 else 2  # dr, and ddelta where it differs
    fewest_fwd = 4 * ROW + 3 * VECTOR + STATISTICS
    fewest_bwd = (3 + gradients) * ROW + 4 * VECTOR + STATISTICS
    assert fewest_fwd <= sum(fwd.values()) <= 1.05 * fewest_fwd
    assert fewest_bwd <= sum(bwd.values()) <= 1.15 * fewest_bwd


def test_nothing_is_written_for_a_backward_that_cannot_come():
    r, delta, _, w, b = operands(torch.bfloat16)
    with torch.no_grad(), counting_bytes() as moved:
        norm(r, w, b)
        add_norm(r, delta, None, w, b, 1e-5, 0.0, None, 0)
    assert moved["store"] == 3 * ROW


def test_few_rows_write_few_partial_sums():
    """One tile: one program, whatever the device could run."""
    r, _, _, w, b = operands(torch.bfloat16)
    y = norm(r.detach()[:100].requires_grad_(), w, b)
    with counting_bytes() as bwd:
        y.backward(torch.ones_like(y))
    assert bwd["store"] == 100 * C * 2 + 4 * VECTOR  # two of partial sums, two of the gradients
