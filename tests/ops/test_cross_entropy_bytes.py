"""The bytes that cross-entropy moves, against its plan: counted, not estimated.

The plan of the head's pass over a chunk of logits is two reads (the second from L2) and one write.
"""

from typing import Any

import numpy as np
import pytest
import torch
from interpreter import InterpreterBuilder, counting_bytes
from kernel_case import DEVICE, randn
from nanogpt_kernels import launch
from nanogpt_kernels.ops.cross_entropy import cross_entropy, cross_entropy_in_place

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="bytes are counted by the interpreter")

V, TILE, TARGET, NLL = 320, 256, 8, 4  # one whole tile and a quarter; bytes of a target and of an nll


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("M", [128, pytest.param(4096, marks=pytest.mark.slow)])  # a row is 5 ms of interpreter
def test_a_chunk_moves_two_reads_and_a_write(M: int, gradient: bool):
    """Without a gradient, one read. Beyond the plan: the target's logit, twice written, and the scale."""
    logits, targets = randn(M, V, dtype=torch.bfloat16).detach(), torch.arange(M) % V
    nll, scale = torch.empty(M), torch.ones(1) if gradient else None
    with launch.override("cross_entropy", blocks=dict(BLOCK_V=TILE)), counting_bytes() as moved:
        cross_entropy_in_place(logits, V, targets, scale, nll, -1, V)
    row = V * logits.element_size()
    assert moved["load"] >= M * (row + TARGET)  # the count counts
    assert moved["load"] <= 1.05 * M * ((2 if gradient else 1) * row + TARGET)
    assert moved["store"] == M * ((row + logits.element_size() if gradient else 0) + NLL)


def test_ignored_rows_cost_their_write_alone():
    M = 64
    logits, targets, nll = randn(M, V).detach(), torch.full((M,), -1), torch.empty(M)
    with launch.override("cross_entropy", blocks=dict(BLOCK_V=TILE)), counting_bytes() as moved:
        cross_entropy_in_place(logits, V, targets, torch.ones(1), nll, -1, V)
    assert moved == {"load": M * TARGET, "store": M * (V * 4 + NLL)}


def test_plain_backward_moves_a_read_and_a_write():
    M = 64
    logits, targets = randn(M, V, dtype=torch.bfloat16), torch.arange(M) % V
    with launch.override("cross_entropy", blocks=dict(BLOCK_V=TILE)):
        loss, _ = cross_entropy(logits, targets)
        with counting_bytes() as moved:
            loss.backward()
    row, statistics = V * logits.element_size(), 8
    assert moved["load"] <= 1.05 * M * (row + TARGET + statistics)
    assert moved["store"] == M * (row + logits.element_size())  # the target's column once more


@pytest.mark.parametrize("V", [TILE // 4 + 1, TILE + 3])
def test_nothing_is_read_outside_the_operands(V: int, monkeypatch: pytest.MonkeyPatch):
    """Past the last row's end another tensor may lie, or no memory at all: -inf in its place is not enough."""
    M, outside, load = 3, [], InterpreterBuilder.create_masked_load
    logits, targets, nll, scale = randn(M, V).detach(), torch.tensor([0, -1, V - 1]), torch.empty(M), torch.ones(1)
    operands = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (logits, targets, nll, scale)]

    def watched(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        at = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
        outside.extend(at[~np.logical_or.reduce([(first <= at) & (at < end) for first, end in operands])].tolist())
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    with launch.override("cross_entropy", blocks=dict(BLOCK_V=TILE)):
        cross_entropy_in_place(logits, V, targets, scale, nll, -1, V)
    assert not outside, f"{len(outside)} elements were read outside"
    assert bool((nll[[0, 2]] > 0).all()) and nll[1] == 0
