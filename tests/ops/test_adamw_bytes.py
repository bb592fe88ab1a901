"""Bytes that the optimizer's kernels move, counted in the interpreter, against the fewest possible."""

import kernel_case
import pytest
import torch
from interpreter import counting_bytes
from nanogpt_kernels.contract import GRAD_NORM, LOSS_SCALE, LR
from nanogpt_kernels.ops.adamw import adamw_, grad_norm

pytestmark = pytest.mark.skipif(kernel_case.DEVICE.type != "cpu", reason="the interpreter counts")
N = 9 * 2048


def count(dtype: torch.dtype | None, segments: list[tuple[int, int, float]], norm: float = 1.0) -> dict[str, int]:
    master, m, v, g = (torch.zeros(N) for _ in range(4))
    scalars = torch.zeros(5, dtype=torch.float64)
    scalars[LR], scalars[LOSS_SCALE], scalars[GRAD_NORM] = 1e-3, 1.0, norm
    with counting_bytes() as counted:
        adamw_(None if dtype is None else master.to(dtype), master, m, v, g, scalars, segments, 0.9, 0.95)
    return counted


@pytest.mark.parametrize(("dtype", "fewest"), [(torch.bfloat16, 30), (torch.float32, 32), (None, 28)], ids=str)
def test_update(dtype: torch.dtype | None, fewest: int):
    """Read g, m, v, master, 16 bytes; write m, v, master, 12, and p."""
    counted = count(dtype, [(0, 2048 * 4, 0.1), (2048 * 4, 2048 * 5 + 768, 0.0), (2048 * 5 + 768, N, 0.1)])
    ratio = (counted["load"] + counted["store"]) / (fewest * N)
    assert 1.0 <= ratio <= 1.02, ratio


def test_refused_update_moves_nothing():
    counted = count(torch.bfloat16, [(0, N, 0.1)], norm=float("inf"))
    assert (
        counted["store"] == 5 * 4 and counted["load"] < 0.01 * 16 * N
    )  # the factors, and what each tile reads of them


def test_norm():
    with counting_bytes() as counted:
        grad_norm(torch.zeros(N))
    assert 1.0 <= (counted["load"] + counted["store"]) / (4 * N) <= 1.02
