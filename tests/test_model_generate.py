"""stream and generate: the cache changes nothing; draws follow temperature, top_k, generator and vocabulary."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanogpt_fast.draw import Draw
from nanogpt_fast.model import GPT
from nanogpt_fast.settings.config import GPTConfig

TINY = GPTConfig(block_size=8, vocab_size=37, n_layer=2, n_head=2, n_embd=16, bias=True)


@pytest.fixture(scope="module")
def model() -> GPT:
    """Weights large enough for peaked, position-dependent predictions."""
    made, generator = GPT(TINY), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return made.double().eval()


def recomputed(model: GPT, idx: Tensor, count: int, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """nanoGPT's way: for every token a whole forward over the last block_size. draw: logits [B, V] -> [B, 1]."""
    for _ in range(count):
        logits = model.logits(idx[:, -model.config.block_size :])[:, -1].float()
        idx = torch.cat((idx, draw(logits)), dim=1)
    return idx


LENGTHS = [
    (1, 7, "to the end of the block"),
    (3, 12, "past it"),
    (8, 3, "from a full block"),
    (13, 4, "from more than one"),
]


@pytest.mark.parametrize(("prompt", "count"), [c[:2] for c in LENGTHS], ids=[c[2] for c in LENGTHS])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_with_the_cache_equals_without(model: GPT, prompt: int, count: int, batch: int):
    idx = torch.randint(37, (batch, prompt), generator=torch.Generator().manual_seed(2))
    want = recomputed(model, idx, count, lambda logits: logits.argmax(-1, keepdim=True))
    assert torch.equal(model.generate(idx, count, temperature=0.0), want)
    assert want.shape == (batch, prompt + count)


def test_every_token_sees_a_whole_block(model: GPT, monkeypatch: pytest.MonkeyPatch):
    """The logits, since the likeliest token may well be the same without the block's first one."""
    seen: list[Tensor] = []

    def likeliest(logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits.argmax(-1, keepdim=True)

    monkeypatch.setattr(Draw, "ids", lambda draw, logits, *_: likeliest(logits))
    idx = torch.tensor([[1, 2, 3]])
    model.generate(idx, 12)
    recomputed(model, idx, 12, likeliest)
    torch.testing.assert_close(torch.cat(seen[:12]), torch.cat(seen[12:]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 5, 1000], ids=["all", "top 5", "more than there are"])
def test_sampling_with_the_cache_equals_without(model: GPT, top_k: int | None):
    """One generator, nanoGPT's rule for top_k, temperature 0.8; past the block."""
    generator = torch.Generator().manual_seed(7)

    def draw(logits: Tensor) -> Tensor:
        logits = logits / 0.8
        if top_k is not None:
            least = logits.sort(-1, descending=True).values[:, min(top_k, 37) - 1, None]
            logits = torch.where(logits < least, -torch.inf, logits)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)

    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    want = recomputed(model, idx, 12, draw)
    got = model.generate(idx, 12, temperature=0.8, top_k=top_k, generator=torch.Generator().manual_seed(7))
    assert torch.equal(got, want)


def test_another_seed_gives_another_text(model: GPT):
    texts = [model.generate(torch.tensor([[1]]), 30, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_top_k_1_is_greedy(model: GPT):
    idx = torch.tensor([[1, 2]])
    assert torch.equal(model.generate(idx, 10, top_k=1), model.generate(idx, 10, temperature=0.0))


def test_frequencies_follow_the_probabilities(model: GPT):
    """2000 draws of one token in one batch, within 5 sigma of the softmax at temperature 2."""
    n, probs = 2000, (model.logits(torch.tensor([[3]]))[0, -1] / 2.0).softmax(-1)
    idx = torch.full((n, 1), 3)
    drawn = model.generate(idx, 1, temperature=2.0, generator=torch.Generator().manual_seed(0))[:, 1]
    counts = torch.bincount(drawn, minlength=37)
    assert ((counts - n * probs).abs() <= 5 * (n * probs * (1 - probs)).sqrt() + 1).all()


@pytest.mark.parametrize("temperature", [0.0, 5.0], ids=["greedy", "nearly uniform"])
def test_padded_vocabulary_is_never_drawn(model: GPT, temperature: float):
    idx = torch.tensor([[1], [2], [3], [4]])
    free = model.generate(idx, 20, temperature, generator=torch.Generator().manual_seed(0))[:, 1:]
    held = model.generate(idx, 20, temperature, generator=torch.Generator().manual_seed(0), valid_vocab=9)[:, 1:]
    assert (free >= 9).any() and (held < 9).all()


def test_top_k_counts_valid_ids_only(model: GPT):
    """The best ids may all be padding: top_k must choose among the others."""
    logits = model.logits(torch.tensor([[3]]))[0, -1]
    want = logits[:9].argmax()
    assert logits.argmax() >= 9, "this model must prefer padding for the test to mean anything"
    assert model.generate(torch.tensor([[3]]), 1, top_k=1, valid_vocab=9)[0, 1] == want


def test_stream_yields_one_token_at_a_time(model: GPT):
    idx = torch.tensor([[1, 2], [3, 4]])
    pieces = list(model.stream(idx, 11, temperature=0.0))
    assert [tuple(p.shape) for p in pieces] == [(2, 1)] * 11
    assert torch.equal(torch.cat([idx, *pieces], 1), model.generate(idx, 11, temperature=0.0))
    assert torch.equal(model.generate(idx, 0), idx)


def test_generation_ignores_dropout(model: GPT):
    noisy = GPT(dataclasses.replace(TINY, dropout=0.5)).double().train()
    noisy.load_state_dict(model.state_dict())
    idx = torch.tensor([[1, 2]])
    assert torch.equal(noisy.generate(idx, 10, temperature=0.0), model.generate(idx, 10, temperature=0.0))


def test_grad_mode_is_the_callers_between_tokens(model: GPT):
    """stream is a generator under no_grad: what its caller does with a token must not run under it."""
    for token in model.stream(torch.tensor([[1]]), 3):
        assert torch.is_grad_enabled() and not token.requires_grad
