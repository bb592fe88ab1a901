"""stream with prompts of unequal length: each row is what it is alone. In float64, so that no rounding decides."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nanogpt_fast.model import GPT
from nanogpt_fast.settings.config import GPTConfig

TINY = GPTConfig(block_size=12, vocab_size=37, n_layer=2, n_head=2, n_embd=16, bias=True)
LENGTHS = [3, 11, 1, 7, 12, 3]
PROMPTS = torch.randint(37, (len(LENGTHS), 12), generator=torch.Generator().manual_seed(2))
NEW = 15  # past the block for every one


@pytest.fixture(scope="module")
def model() -> GPT:
    """Weights large enough for texts that neither repeat one token nor each other."""
    made, generator = GPT(TINY), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            scale = 0.2 if parameter.dim() < 2 or "wte" in name else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + ("ln" in name and "w" in name))
    return made.double().eval()


def seeded(row: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + row)


def together(model: GPT, rows: list[int], **settings: Any) -> list[list[int]]:
    """The NEW tokens of each of these rows, decoded together."""
    lengths = [LENGTHS[row] for row in rows]
    padded = PROMPTS[rows].clone()
    for row, length in zip(padded, lengths):
        row[length:] = 36  # what padding is does not matter
    longest = max(lengths)
    stream = model.stream(
        padded[:, :longest], NEW, generator=[seeded(row) for row in rows], lengths=lengths, **settings
    )
    tokens = torch.cat(list(stream), 1)
    assert tokens.size(1) == longest - min(lengths) + NEW
    starts = [length - min(lengths) for length in lengths]
    return [row[start : start + NEW].tolist() for row, start in zip(tokens, starts)]


def alone(model: GPT, row: int, **settings: Any) -> list[int]:
    prompt = PROMPTS[row : row + 1, : LENGTHS[row]]
    return model.generate(prompt, NEW, generator=seeded(row), **settings)[0, LENGTHS[row] :].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_k": 9},
        {"temperature": 1.5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.4},
    ],
    ids=["greedy", "top_k", "all"],
)
def test_a_row_is_what_it_is_alone(model: GPT, settings: dict[str, Any]):
    want = [alone(model, row, **settings) for row in range(len(LENGTHS))]
    assert len({tuple(ids) for ids in want}) == len(want), "rows must differ for the test to mean anything"
    assert together(model, [0, 1, 2, 3, 4, 5], **settings) == want
    assert together(model, [4, 1], **settings) == [want[4], want[1]], "nor do its neighbours matter"
    assert together(model, [0, 5], **settings) == [want[0], want[5]], "equal lengths are a case of it"


def test_the_penalty_does_not_count_padding(model: GPT):
    """Id 36 stands behind every prompt in `together`; a penalty that makes seen ids likelier would draw it."""
    settings = {"temperature": 0.0, "repetition_penalty": 0.05}
    assert together(model, [2, 1], **settings) == [alone(model, row, **settings) for row in (2, 1)]


def test_log_probabilities_are_the_models(model: GPT):
    """Of the ids drawn, before temperature and filters, past the block too."""
    told: list[Tensor] = []
    prompt = PROMPTS[:1, :3]
    ids = model.generate(prompt, NEW, 2.0, 5, seeded(0), 30, repetition_penalty=1.5, logprobs=told)
    for at, found in enumerate(told):
        seen = ids[:, : 3 + at][:, -TINY.block_size :]
        want = model.logits(seen)[0, -1, :30].float().log_softmax(-1)[ids[0, 3 + at]]
        torch.testing.assert_close(found[0, 0], want, rtol=1e-5, atol=1e-5)
    assert len(told) == NEW


def test_the_last_position_alone_goes_through_the_last_mlp(model: GPT):
    """A prompt of 7: both blocks attend over all of it, the first one's MLP sees 7 positions, the last one's 1."""
    seen: list[tuple[int, ...]] = []
    hooks = [
        block.mlp.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape))) for block in model.blocks
    ]
    try:
        model.generate(PROMPTS[:2, :7], 1)
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == [(2, 7, 16), (2, 1, 16)]
