"""draw.Draw: transformers' processors in its order, to the bit; by hand where the rule is short; generators a row."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanogpt_fast.draw import Draw, seen_in

B, V = 3, 211
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"temperature": 1.7, "top_k": 50, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 0.3, "top_k": 5, "top_p": 0.99, "min_p": 0.3},
]


def logits_and_ids(seed: int, rounded: bool) -> tuple[Tensor, Tensor]:
    """rounded: many ids of one probability, at every border."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((B, V), generator=generator) * 3
    return (logits.round() if rounded else logits), torch.randint(V, (B, 40), generator=generator)


@pytest.mark.parametrize("rounded", [False, True], ids=["all different", "ties"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(s) or "nothing")
def test_scores_are_transformers(settings: dict[str, Any], rounded: bool):
    """Its processors of these names, as its generate lines them up: bit for bit, what is left out too."""
    theirs = pytest.importorskip("transformers.generation.logits_process", reason="pip install transformers")
    made = {
        "repetition_penalty": theirs.RepetitionPenaltyLogitsProcessor,
        "temperature": theirs.TemperatureLogitsWarper,
        "top_k": theirs.TopKLogitsWarper,
        "top_p": theirs.TopPLogitsWarper,
        "min_p": theirs.MinPLogitsWarper,
    }
    line = [make(settings[name]) for name, make in made.items() if name in settings]
    draw = Draw(**settings)
    for seed in range(8):
        logits, ids = logits_and_ids(seed, rounded)
        ours = draw.kept(draw.penalised(logits, seen_in(list(ids), V, logits.device)) / draw.temperature)
        want = logits
        for processor in line:
            want = processor(ids, want)
        assert torch.equal(ours, want)


def test_the_order_is_that_of_its_generate():
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    settings = transformers.GenerationConfig(
        do_sample=True, temperature=0.5, top_k=5, top_p=0.5, min_p=0.5, repetition_penalty=2.0, num_beams=1
    )
    mixin = transformers.GenerationMixin()  # asks a model for no more than this here
    mixin.config = SimpleNamespace(is_encoder_decoder=False)
    found = mixin._get_logits_processor(settings, input_ids_seq_length=1, device="cpu")
    names = [type(processor).__name__ for processor in found]
    assert names == ["RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper",
                     "TopPLogitsWarper", "MinPLogitsWarper"]  # fmt: skip


def kept(draw: Draw, probs: list[float]) -> list[int]:
    """The ids that may be drawn of these probabilities."""
    return draw.kept(torch.tensor([probs]).log())[0].isfinite().nonzero()[:, 0].tolist()


def test_what_is_kept_of_four():
    probs = [0.1, 0.4, 0.2, 0.3]
    assert kept(Draw(top_k=2), probs) == [1, 3] and kept(Draw(top_k=0), probs) == [0, 1, 2, 3]
    assert kept(Draw(top_p=0.35), probs) == [1], "the first that passes it stays"
    assert kept(Draw(top_p=0.65), probs) == [1, 3] and kept(Draw(top_p=0.75), probs) == [1, 2, 3]
    assert kept(Draw(min_p=0.45), probs) == [1, 2, 3] and kept(Draw(min_p=0.6), probs) == [1, 3]
    assert kept(Draw(top_k=3, top_p=0.7), probs) == [1, 3], "top_p counts what top_k left: 0.4 and 0.3 of 0.9"


def test_the_penalty_lowers_both_signs():
    draw = Draw(temperature=0.0, repetition_penalty=2.0)
    logits, seen = torch.tensor([[1.0, -1.0, 0.6, -3.0]]), seen_in([torch.tensor([0, 1, 1])], 4, torch.device("cpu"))
    assert draw.penalised(logits, seen).tolist() == [[0.5, -2.0, pytest.approx(0.6), -3.0]]
    assert draw.ids(logits, None, seen).tolist() == [[2]] and draw.ids(logits).tolist() == [[0]]


def test_a_generator_a_row_is_a_row_alone():
    """And a row that has none draws nothing, whoever stands beside it."""
    logits, _ = logits_and_ids(1, False)
    draw, generators = Draw(temperature=2.0), [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    together = [draw.ids(logits, [generators[0], None, generators[2]])[:, 0].tolist() for _ in range(20)]
    for row, seed in ((0, 5), (2, 7)):
        alone = torch.Generator().manual_seed(seed)
        assert [ids[row] for ids in together] == [int(draw.ids(logits[row : row + 1], alone)) for _ in range(20)]
    assert torch.equal(generators[1].get_state(), torch.Generator().manual_seed(6).get_state())


def test_frequencies_of_what_is_kept():
    """20,000 draws at top_p 0.7 of 0.4, 0.3, 0.2, 0.1: the first two, in their own proportion, within 5 sigma."""
    n = 20_000
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().expand(n, 4)
    drawn = Draw(top_p=0.69).ids(logits, torch.Generator().manual_seed(0))[:, 0].bincount(minlength=4)
    assert drawn[2:].sum() == 0 and abs(int(drawn[0]) - n * 4 / 7) < 5 * math.sqrt(n * 4 / 7 * 3 / 7)
