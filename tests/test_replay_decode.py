"""The decoding step, a captured piece: two successive tokens make the same calls, and the text is the eager one.

Tensors without data stand for the GPU's (device "meta"), as in test_replay.py.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.replay_ledger import Ledger, Pieces, record, record_launches
from torch import Tensor

from nanogpt_fast.model import GPT, _decoding_step
from nanogpt_fast.ops import REFERENCE, TRITON, Ops
from nanogpt_fast.settings.config import GPTConfig

META = torch.device("meta")
SMALL = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32, bias=True)
OPS = {"reference": lambda: REFERENCE, "triton": lambda: TRITON}


def meta_model(ops: Ops, dtype: torch.dtype = torch.bfloat16, shape: GPTConfig = SMALL) -> GPT:
    with META:
        model = GPT(shape, ops).eval().to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.float()
    return model


def decoded(model: GPT, tell: Callable[[Callable[[], None]], Any], batch_size: int = 3) -> list[Any]:
    """What `tell` says of the steps of four tokens after a prompt's own."""
    told: list[Any] = []

    def call(name: str, work: Callable[[], None]) -> None:
        assert name == "the decoding step"
        told.append(tell(work))

    model.generate(torch.zeros((batch_size, 5), dtype=torch.int64, device=META), 5, graphs=Pieces(call))
    return told


def assert_replayable(ledgers: list[Ledger]) -> None:
    assert len(ledgers) == 4
    for ledger in ledgers:
        assert ledger.lines and not ledger.faults, ledger.faults
        for ours, theirs in zip(ledgers[0].lines, ledger.lines, strict=True):
            assert ours == theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_two_tokens_are_one_list_of_calls(ops: Callable[[], Ops], dtype: torch.dtype):
    assert_replayable(decoded(meta_model(ops(), dtype), record))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_two_tokens_launch_the_same_kernels(batch_size: int):
    """At GPT-2's widths and context (two of its layers): the launches below the dispatcher's calls, on an H100."""
    shape = GPTConfig(block_size=1024, vocab_size=50304, n_layer=2, n_head=12, n_embd=768)
    first, *others = decoded(meta_model(TRITON, shape=shape), record_launches, batch_size)
    attention = [line for line in first if line[0] == "cached_attention"]
    assert len(attention) == 2 and attention[0][2] == (12 * batch_size, 8, 1)  # 8 splits of 128 keys reach T_max
    assert all(other == first for other in others)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_a_position_on_the_host_is_found(ops: Callable[[], Ops]):
    model, positions = meta_model(ops()), iter(range(5, 9))
    step = model._next_logits

    def planted(idx: Tensor, cache: Tensor, start: int | Tensor) -> Tensor:
        return step(idx, cache, next(positions) if isinstance(start, Tensor) else start)

    model._next_logits = planted
    with pytest.raises(AssertionError, match="'5' != '6'"):
        assert_replayable(decoded(model, record))


# ---- on the CPU, with data ----


@pytest.fixture(scope="module")
def model() -> GPT:
    """Weights large enough for peaked, position-dependent predictions, in float64."""
    made, generator = GPT(SMALL), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return made.double().eval()


def prompt(batch_size: int, length: int) -> Tensor:
    return torch.randint(65, (batch_size, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("length", "count"), [(1, 15), (3, 20), (16, 3)], ids=["to the block's end", "past it", "full"]
)
def test_the_tokens_are_the_eager_ones(model: GPT, length: int, count: int, batch_size: int):
    """Greedily, and drawn from one generator."""
    idx, pieces = prompt(batch_size, length), []
    graphs = Pieces(lambda name, work: (pieces.append(name), work())[1])
    assert torch.equal(
        model.generate(idx, count, temperature=0.0, graphs=graphs), model.generate(idx, count, temperature=0.0)
    )
    assert len(pieces) == min(count - 1, SMALL.block_size - length), "past the block a forward is as it was"
    drawn = (
        model.generate(idx, count, 0.8, generator=torch.Generator().manual_seed(7), graphs=g) for g in (graphs, None)
    )
    assert torch.equal(*drawn)


def test_prompts_of_unequal_length_are_one_replayed_step(model: GPT):
    """The tokens are the eager ones, and every step after the shortest prompt is the piece."""
    idx, lengths, pieces = prompt(3, 9), [4, 9, 6], []
    graphs = Pieces(lambda name, work: (pieces.append(name), work())[1])
    texts = []
    for given in (graphs, None):
        own = [torch.Generator().manual_seed(seed) for seed in range(3)]
        texts.append(torch.cat([*model.stream(idx, 20, 0.8, generator=own, graphs=given, lengths=lengths)], 1))
    assert torch.equal(*texts) and texts[0].shape == (3, 25) and len(pieces) == SMALL.block_size - 4


@torch.no_grad()
def test_the_logits_are_the_eager_ones_to_rounding(model: GPT):
    tokens = prompt(2, 16)
    eager, static = torch.full((2, 2, 2, 2, 16, 16), torch.nan).double(), torch.zeros(2, 2, 2, 2, 16, 16).double()
    decode = _decoding_step(model, static, Pieces())
    for position in range(16):
        token = tokens[:, position : position + 1]
        want = model._next_logits(token, eager, position)
        torch.testing.assert_close(decode(token, position), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(static, eager, rtol=1e-12, atol=1e-12)


def test_graphs_that_are_off_change_nothing(model: GPT):
    """No masked pass over the whole cache where nothing is captured."""
    graphs = Pieces(lambda name, work: pytest.fail("captured"))
    graphs.active = False
    starts, step = [], model._next_logits
    model._next_logits = lambda idx, cache, start: (starts.append(start), step(idx, cache, start))[1]
    try:
        model.generate(prompt(1, 3), 4, graphs=graphs)
    finally:
        del model._next_logits
    assert starts == [0, 3, 4, 5]


def test_what_stays_goes_with_the_stream(model: GPT):
    """At once, not when Python next looks for cycles: a cache is large, and samples come one after the other."""
    held: list[Any] = []
    graphs = Pieces(lambda name, work: (held.append(weakref.ref(work)), work())[1])
    gc.disable()
    try:
        list(model.stream(prompt(1, 3), 4, graphs=graphs))
        assert len(held) == 3 and not any(work() for work in held)
    finally:
        gc.enable()
