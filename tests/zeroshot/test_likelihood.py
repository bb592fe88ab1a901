"""Losses of windows and log-probabilities of continuations, against sums written out token by token."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from known_model import known_model, repeat_probability
from random_weights import random_weights

from nanogpt_fast.errors import DataError
from nanogpt_fast.model import GPT
from nanogpt_fast.scoring import strided_windows
from nanogpt_fast.zeroshot import likelihood
from nanogpt_fast.zeroshot.likelihood import Request, answers, window_losses

T = 16  # random_weights' block_size


@pytest.fixture(scope="module")
def model() -> GPT:
    weights = random_weights(optimizer=False)
    model = GPT(weights.model_args)
    model.load_state_dict(weights.model)
    return model.eval()


@torch.no_grad()
def log_softmax(model: GPT, ids: Sequence[int]) -> torch.Tensor:
    """[t, V] of the tokens after each of ids, alone in a batch."""
    return model.logits(torch.tensor([list(ids)])).double().log_softmax(-1)[0]


def document(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, length)


def by_hand(model: GPT, tokens: np.ndarray, stride: int) -> float:
    """Nats of all targets: each from the longest context that its window allows."""
    nll, done = 0.0, 0
    while done < len(tokens) - 1:
        end = min(done + (stride if done else T), len(tokens) - 1)
        start = max(0, end - T)
        log_p = log_softmax(model, tokens[start:end].tolist())
        nll -= sum(float(log_p[at - start, tokens[at + 1]]) for at in range(done, end))
        done = end
    return nll


@pytest.mark.parametrize("stride", [1, 5, T])
def test_windows_score_each_token_once(model: GPT, stride: int):
    documents = [document(n, n) for n in (2, 3, T, T + 1, T + 2, 3 * T + 5, 1)]
    losses = window_losses(model, documents, block_size=T, stride=stride)
    for index, tokens in enumerate(documents):
        part = [loss for loss in losses if loss.document == index]
        assert sum(loss.tokens for loss in part) == len(tokens) - 1
        assert sum(loss.nll for loss in part) == pytest.approx(by_hand(model, tokens, stride), abs=1e-4)


def test_a_stride_of_one_is_one_long_window_where_the_text_fits(model: GPT):
    tokens = document(T + 1)
    one, strided = (sum(x.nll for x in window_losses(model, [tokens], block_size=T, stride=s)) for s in (T, 1))
    assert strided == pytest.approx(one, abs=1e-4)
    more_context = sum(x.nll for x in window_losses(model, [document(80)], block_size=T, stride=1))
    assert more_context == pytest.approx(by_hand(model, document(80), 1), abs=1e-4)


def test_every_window_but_a_documents_first_has_all_the_context_there_is():
    for stride in (1, 4, T):
        for w in strided_windows([50], T, stride):
            assert w.end == T or w.start == 0
            assert w.first == 0 if w.start == 0 else w.end - w.first <= stride


def test_known_probabilities():
    tokens = np.array([3, 3, 3, 7, 7, 3])
    for strength in (0.0, 2.0):
        p = repeat_probability(32, strength) if strength else 1 / 32
        losses = window_losses(known_model(strength=strength), [tokens], block_size=4, stride=4)
        expected = -3 * math.log(p) - 2 * math.log((1 - p) / 31)
        assert sum(loss.nll for loss in losses) == pytest.approx(expected, rel=1e-5)


def expected(model: GPT, request: Request) -> tuple[list[float], list[int]]:
    """A continuation's log-probabilities and the likeliest ids, from one forward of its own."""
    row = [*request.prefix, *request.continuation][-T - 1 :]
    log_p = log_softmax(model, row[:-1])[-len(request.continuation) :]
    return [float(log_p[i, t]) for i, t in enumerate(request.continuation)], log_p.argmax(-1).tolist()


@pytest.mark.parametrize("rows", [2, 1000])
def test_continuations_alone_and_with_one_prefix(model: GPT, rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(likelihood, "stack_for", lambda *_, **__: rows)
    draw = np.random.default_rng(1)

    def ids(count: int) -> list[int]:
        return draw.integers(0, 100, count).tolist()

    prefixes = [ids(n) for n in (1, 5, 5, 9, 13)]
    requests = [Request(prefix, ids(int(draw.integers(1, 4)))) for prefix in prefixes for _ in range(4)]
    requests += [Request(ids(n), ids(k)) for n, k in ((1, 1), (1, T), (T, 1), (40, 3), (5, 2))]  # alone; two are cut
    requests = [requests[i] for i in draw.permutation(len(requests))]
    told: list[tuple[int, int]] = []
    for request, answer in zip(requests, answers(model, requests, told=lambda *x: told.append(x))):
        log_p, likeliest = expected(model, request)
        np.testing.assert_allclose(answer.logprobs, log_p, atol=1e-5)
        assert answer.likeliest.tolist() == likeliest
        assert answer.logprob == pytest.approx(sum(log_p), abs=1e-5)
        assert answer.likeliest_of.tolist() == likeliest[:1]
    assert sum(done for done, _ in told) == len(requests) and {of for _, of in told} == {len(requests)}


def test_a_shared_prefix_is_computed_once(model: GPT, monkeypatch: pytest.MonkeyPatch):
    fed = []
    cached = model.cached_hidden
    monkeypatch.setattr(model, "cached_hidden", lambda idx, *a, **k: fed.append(idx.numel()) or cached(idx, *a, **k))
    answers(model, [Request([1, 2, 3, 4, 5, 6], [choice, 9]) for choice in range(10)])
    assert fed == [6, 10]


def test_barred_ids_are_left_out_of_the_first_choice(model: GPT):
    request = Request([1, 2, 3], [4, 5])
    log_p = log_softmax(model, [1, 2, 3])[-1]
    barred = torch.zeros(100, dtype=torch.bool)
    barred[log_p.argmax()] = True
    (answer,) = answers(model, [request], barred=barred)
    assert answer.likeliest[0] == log_p.argmax()
    assert answer.likeliest_of[0] == log_p.argsort(descending=True)[1]


@pytest.mark.parametrize("request_", [Request([], [1]), Request([1], []), Request([1], [2] * (T + 1))])
def test_what_cannot_be_scored_is_refused(model: GPT, request_: Request):
    with pytest.raises(DataError, match="cannot be scored"):
        answers(model, [request_])
