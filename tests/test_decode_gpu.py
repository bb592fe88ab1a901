"""The captured decoding step on a GPU: the eager one's tokens, and logits within the two-reference rule."""

import copy

import pytest
import torch
from parity import assert_parity
from torch import Tensor

from nanogpt_fast.graphs import Graphs
from nanogpt_fast.model import GPT, _decoding_step
from nanogpt_fast.ops import REFERENCE, Ops
from nanogpt_fast.settings.config import GPTConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SHAPE = GPTConfig(block_size=300, vocab_size=1024, n_layer=2, n_head=4, n_embd=256, bias=True)  # three splits of keys
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def ops_named(name: str) -> Ops:
    from nanogpt_fast.ops import TRITON

    return {"reference": REFERENCE, "triton": TRITON}[name]


def build(ops: Ops, dtype: torch.dtype) -> GPT:
    """Weights large enough for peaked predictions: a greedy choice then survives rounding."""
    model, generator = GPT(SHAPE, ops), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model = model.to("cuda", dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.float()
    return model


def prompt(batch_size: int, length: int) -> Tensor:
    return torch.randint(1024, (batch_size, length), generator=torch.Generator().manual_seed(2)).cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_graph_equals_the_same_step_without(name: str, dtype: torch.dtype):
    """Bit for bit: what is replayed is what was called. Two texts of one Graphs, each captured in its turn.

    Torch's own ops may round otherwise: on an H100 two eager float16 steps on equal caches differed at one of 50
    positions, in 2 of 8 texts."""

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, atol=2e-2, rtol=1e-2) if name == "reference" else torch.equal(a, b)

    model = build(ops_named(name), dtype)
    graphs = Graphs(torch.device("cuda", torch.cuda.current_device()), "on")
    for batch_size in (1, 3):
        tokens, shape = prompt(batch_size, 300), (2, 2, batch_size, 4, 300, 64)
        caches = [torch.zeros(shape, dtype=dtype, device="cuda") for _ in range(2)]
        with torch.no_grad():
            for cache in caches:
                model._next_logits(tokens[:, :250], cache, 0)
            decode = _decoding_step(model, caches[0], graphs)
            for position in range(250, 300):
                token, at = tokens[:, position : position + 1], torch.tensor([position], device="cuda")
                assert same(decode(token, position), model._next_logits(token, caches[1], at)), position
        assert same(*caches) and graphs.active


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_logits_within_the_bound(name: str, dtype: torch.dtype):
    """Against float64, at most twice as wrong as the eager step of the reference in this dtype."""
    model, plain = build(ops_named(name), dtype), build(REFERENCE, dtype)
    exact = copy.deepcopy(plain).double()
    graphs = Graphs(torch.device("cuda", torch.cuda.current_device()), "on")
    tokens, found = prompt(2, 300), []
    with torch.no_grad():
        for which in (model, plain, exact):
            cache = torch.zeros((2, 2, 2, 4, 300, 64), dtype=which.transformer.wte.weight.dtype, device="cuda")
            which._next_logits(tokens[:, :280], cache, 0)
            decode = _decoding_step(which, cache, graphs) if which is model else None
            logits = []
            for position in range(280, 300):
                token = tokens[:, position : position + 1]
                step = decode(token, position) if decode else which._next_logits(token, cache, position)
                logits.append(step.clone())
            found.append(torch.stack(logits))
    assert_parity(*found, tiny=1e-5, what="logits")


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_prompts_of_unequal_length_in_one_graph(name: str):
    """In float32: each row's text is the one it has alone, eagerly; greedily, and drawn by a generator of its own."""
    model = build(ops_named(name), torch.float32)
    graphs = Graphs(torch.device("cuda", torch.cuda.current_device()), "on")
    idx, lengths = prompt(3, 40), [7, 40, 23]
    for temperature in (0.0, 0.8):
        own = [torch.Generator("cuda").manual_seed(seed) for seed in range(3)]
        tokens = torch.cat([*model.stream(idx, 30, temperature, generator=own, graphs=graphs, lengths=lengths)], 1)
        for row, length in enumerate(lengths):
            generator = torch.Generator("cuda").manual_seed(row)
            alone = model.generate(idx[row : row + 1, :length], 30, temperature, generator=generator)[0, length:]
            start = length - min(lengths)
            assert torch.equal(tokens[row, start : start + 30], alone), (row, temperature)
    assert graphs.active


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_greedy_tokens_are_the_eager_ones(name: str):
    """In float32, to the end of the block and past it; several texts from one Graphs."""
    model = build(ops_named(name), torch.float32)
    graphs = Graphs(torch.device("cuda", torch.cuda.current_device()), "on")
    for batch_size, length, count in ((1, 5, 40), (3, 280, 30), (1, 1, 299)):
        idx = prompt(batch_size, length)
        texts = [model.generate(idx, count, temperature=0.0, graphs=g) for g in (graphs, None)]
        assert torch.equal(*texts) and graphs.active
