"""bench/sample_arms.py: all arms continue a text alike. nanoGPT's needs NANOGPT_DIR set to a checkout."""

import os
from pathlib import Path
from typing import Any

import pytest
import sample_arms
import step
import step_arms
import torch
import trainers
from step_arms import Missing, Setup

from nanogpt_fast.distributed import World
from nanogpt_fast.errors import ConfigError
from nanogpt_fast.model import GPT

NANOGPT = os.environ.get("NANOGPT_DIR")
SIZES = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=96, batch_size=4, dropout=0.1)
PROMPT = torch.randint(96, (2, 5), generator=torch.Generator().manual_seed(3))


def setup_of(dtype: torch.dtype = torch.float32, **changes: Any) -> Setup:
    """Weights large enough that the text does not repeat one token."""
    config = step.configuration("gpt2_124m").replace(**{**SIZES, **changes})
    weights = step_arms.initial_weights(config)
    for name, weight in weights.items():
        if weight.dim() == 2:
            weight.mul_(1.0 if name.endswith("wte.weight") else 15.0)
    return Setup(config, dtype, World(), weights, Path(NANOGPT) if NANOGPT else None)


def sampler(name: str, setup: Setup) -> Any:
    if name == "nanogpt" and not NANOGPT:
        pytest.skip("set NANOGPT_DIR to a checkout of karpathy/nanoGPT")
    if name.startswith("hf"):
        pytest.importorskip("transformers", reason=f"pip install {trainers.REQUIRES['transformers']}")
    return sample_arms.make_sampler(name, setup)


def greedy(setup: Setup, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """The likeliest next token of the plain model, one at a time."""
    model = GPT(setup.shape).eval()
    model.load_state_dict(setup.weights)
    with torch.no_grad():
        for _ in range(new_tokens):
            ids = torch.cat((ids, model.logits(ids[:, -setup.shape.block_size :])[:, -1:].argmax(-1)), dim=1)
    return ids


@pytest.mark.parametrize("name", sample_arms.ARMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_arms_continue_alike_up_to_the_block(name: str, bias: bool):
    setup = setup_of(bias=bias)
    expected = greedy(setup, PROMPT, 27)
    assert len(set(expected[0, 5:].tolist())) > 5  # a text that wrong arms do not write
    arm = sampler(name, setup)
    assert torch.equal(arm(PROMPT, 27), expected)
    assert torch.equal(arm(PROMPT[:, :1], 3), greedy(setup, PROMPT[:, :1], 3))  # nothing is left of the last call


@pytest.mark.parametrize("name", ["ours", "ours, no cache", "nanogpt"])
def test_past_the_block_the_last_tokens_count(name: str):
    setup = setup_of()
    assert torch.equal(sampler(name, setup)(PROMPT, 40), greedy(setup, PROMPT, 40))


def test_hugging_face_says_where_it_ends():
    with pytest.raises(ConfigError, match="no positions past the block"):
        sampler("hf", setup_of())(PROMPT, 28)


@pytest.mark.parametrize("name", ["ours", "ours, no cache", "hf", "hf, no cache"])
def test_sixteen_bits_are_computed_in(name: str):
    """A bfloat16 run starts with the token of the float32 one, unless rounding decides between two."""
    setup = setup_of(torch.bfloat16)
    first = sampler(name, setup)(PROMPT, 1)[:, -1]
    model = GPT(setup.shape).eval()
    model.load_state_dict(setup.weights)
    logits = model.logits(PROMPT)[:, -1].detach()
    assert (logits.max(-1).values - logits.gather(1, first[:, None])[:, 0] < 0.05 * logits.std()).all()


def test_hugging_face_reads_the_text_once_only_with_a_cache():
    """Tokens that its model is fed for 4 new ones after 5: 5 + 1 + 1 + 1, or 5 + 6 + 7 + 8."""
    pytest.importorskip("transformers", reason=f"pip install {trainers.REQUIRES['transformers']}")
    fed: dict[str, int] = {}
    for name in ("hf", "hf, no cache"):
        with pytest.MonkeyPatch.context() as patch:
            stock, counted = trainers.huggingface_model, []

            def watched(setup: Setup, stock: Any = stock, counted: list = counted) -> Any:
                model, note = stock(setup)
                model.transformer.wte.register_forward_hook(lambda *call: counted.append(call[2].size(1)))
                return model, note

            patch.setattr(trainers, "huggingface_model", watched)
            sample_arms.make_sampler(name, setup_of())(PROMPT, 4)
            fed[name] = sum(counted)
    assert fed == {"hf": 8, "hf, no cache": 26}


def test_what_is_unknown_or_missing_is_said():
    with pytest.raises(ConfigError, match="did you mean"):
        sample_arms.make_sampler("our", setup_of())
    with pytest.raises(Missing, match="--nanogpt DIR"):
        sample_arms.make_sampler("nanogpt", Setup(setup_of().config, torch.float32, World(), {}))
    assert [name for name in sample_arms.ARMS if sample_arms.cached(name)] == ["ours", "hf"]
