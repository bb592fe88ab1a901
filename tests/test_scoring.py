"""scoring.py: each mode against a brute-force float64 computation, nanoGPT's estimate, bits per byte by hand."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_weights import random_weights
from separate_documents import separately
from torch import Tensor
from twin import Twin

from nanogpt_fast import scoring
from nanogpt_fast.data.tokens import TokenSource
from nanogpt_fast.model import GPT

T = 16
WEIGHTS = random_weights(bias=True)
VOCAB = WEIGHTS.model_args.vocab_size


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(WEIGHTS.model_args)
    model.load_state_dict(WEIGHTS.model)
    return model.train()


def write(path: Path, count: int, seed: int = 0) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, count).astype("<u2")
    tokens.tofile(path)
    return tokens.astype(np.int64)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, TokenSource]:
    write(tmp_path / "train.bin", 500, 1)
    write(tmp_path / "val.bin", 301, 2)
    return {split: TokenSource([str(tmp_path / f"{split}.bin")]) for split in ("train", "val")}


@pytest.fixture(scope="module")
def twin() -> Twin:
    """The same weights in float64, in another implementation."""
    twin = Twin(WEIGHTS.model_args).double()
    for name, parameter in twin.named().items():
        parameter.data.copy_(WEIGHTS.model[name])
    return twin.eval()


@torch.no_grad()
def nll64(twin: Twin, context: np.ndarray, target: int) -> float:
    """Loss of one target after one context, by a forward of its own."""
    targets = torch.full((1, len(context)), -1)
    targets[0, -1] = target
    return twin(torch.from_numpy(context)[None], targets).item()


def contexts(n: int, stride: int) -> list[tuple[int, int]]:
    """(first token of its window, target) of every target of n tokens, window by window."""
    pairs, begin, done = [], 0, 0
    while done < n - 1:
        end = min(begin + T, n - 1)
        if end < begin + T:
            begin = max(0, end - T)  # the last window is moved back, not cut
        pairs += [(begin, target) for target in range(done + 1, end + 1)]
        done, begin = end, begin + stride
    return pairs


def test_the_whole_split_equals_brute_force_in_float64(model: GPT, twin: Twin, tmp_path: Path):
    parts = [write(tmp_path / f"{i}.bin", n, seed=i) for i, n in enumerate((40, 2, 17, 1, 33))]
    source = TokenSource([str(tmp_path / f"{i}.bin") for i in range(len(parts))])
    losses = [nll64(twin, part[(i - 1) // T * T : i], int(part[i])) for part in parts for i in range(1, len(part))]
    found = scoring.score(model, scoring.all_targets(source, VOCAB, batch_size=3, block_size=T))
    assert found.tokens == len(losses) == sum(len(part) - 1 for part in parts)
    assert found.nll == pytest.approx(math.fsum(losses), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-5)


@pytest.mark.parametrize("n", [2, 10, 16, 17, 18, 50])
@pytest.mark.parametrize("stride", [1, 5, 15])
def test_overlapping_windows_equal_brute_force(model: GPT, twin: Twin, tmp_path: Path, n: int, stride: int):
    tokens = write(tmp_path / "x.bin", n)
    batches = scoring.strided_targets(
        TokenSource([str(tmp_path / "x.bin")]), VOCAB, batch_size=4, block_size=T, stride=stride
    )
    found = scoring.score(model, batches)
    losses = [nll64(twin, tokens[begin:i], int(tokens[i])) for begin, i in contexts(n, stride)]
    assert found.tokens == len(losses) == n - 1
    assert found.nll == pytest.approx(math.fsum(losses), rel=1e-6)


@torch.no_grad()
def nanogpt_estimate(twin: Twin, tokens: dict[str, np.ndarray], iters: int, rows: int, generator: torch.Generator):
    """nanoGPT's estimate_loss and get_batch, written again: one draw a batch, the mean of the batches' means."""
    means = {}
    for split in ("train", "val"):
        data, losses = torch.from_numpy(tokens[split]), []
        for _ in range(iters):
            starts = torch.randint(len(data) - T, (rows,), generator=generator)
            x, y = (torch.stack([data[i + shift : i + shift + T] for i in starts]) for shift in (0, 1))
            losses.append(twin(x, y).item())
        means[split] = sum(losses) / iters
    return means


@pytest.mark.parametrize("stack", [0, 1, 3, 7, 100])
def test_random_mode_is_nanogpts_estimate(
    model: GPT, twin: Twin, sources: dict[str, TokenSource], stack: int, monkeypatch
):
    if stack:  # how many batches share a forward changes rounding alone
        monkeypatch.setattr(scoring, "stack_for", lambda *_: stack)
    ours, theirs = (torch.Generator().manual_seed(5) for _ in range(2))
    tokens = {split: np.fromfile(source.files[0].path, "<u2").astype(np.int64) for split, source in sources.items()}
    expected = nanogpt_estimate(twin, tokens, 7, 4, theirs)
    found = scoring.estimate_loss(model, sources, eval_iters=7, batch_size=4, block_size=T, generator=ours)
    assert list(found) == ["train", "val"]
    for split in found:
        assert found[split] == pytest.approx(expected[split], rel=1e-6)
    assert torch.equal(ours.get_state(), theirs.get_state()), "later draws go on where nanoGPT's do"


def test_full_mode_reads_all_of_val_and_samples_train(model: GPT, sources: dict[str, TokenSource]):
    full, random = (torch.Generator().manual_seed(5) for _ in range(2))
    settings: dict[str, Any] = {"eval_iters": 3, "batch_size": 4, "block_size": T}
    found = scoring.estimate_loss(model, sources, mode="full", generator=full, **settings)
    whole = scoring.score(model, scoring.all_targets(sources["val"], VOCAB, batch_size=1, block_size=T))
    assert found["val"] == pytest.approx(whole.loss, rel=1e-6) and whole.tokens == sources["val"].n_tokens - 1
    sampled = scoring.estimate_loss(model, {"train": sources["train"]}, generator=random, **settings)
    assert found["train"] == sampled["train"]
    assert torch.equal(full.get_state(), random.get_state()), "val draws nothing"


@torch.no_grad()
def test_with_a_mask_documents_are_scored_apart(model: GPT, sources: dict[str, TokenSource]):
    """In both modes, and the windows that a file's end leaves short."""
    eot = int(np.bincount(np.fromfile(sources["val"].files[0].path, "<u2")).argmax())  # a token that comes often
    settings: dict[str, Any] = {"eval_iters": 3, "batch_size": 4, "block_size": T}
    ours, theirs = (torch.Generator().manual_seed(5) for _ in range(2))
    found = scoring.estimate_loss(
        model, sources, mode="full", generator=ours, forward=scoring.Forward(model, eot), **settings
    )
    batches = {
        "train": scoring.random_targets(sources["train"], VOCAB, generator=theirs, stack=1, **settings),
        "val": scoring.all_targets(sources["val"], VOCAB, batch_size=7, block_size=T),
    }
    for split, rows in batches.items():
        nll, targets = zip(*((separately(model, *batch, eot)[1], batch[1]) for batch in rows))
        count = int((torch.cat(targets) >= 0).sum())
        assert found[split] == pytest.approx(float(torch.cat(nll).sum()) / count, rel=1e-6)
    unmasked = scoring.estimate_loss(model, sources, mode="full", generator=ours, **settings)
    assert abs(found["val"] - unmasked["val"]) > 1e-4


def test_the_mode_is_put_back_and_dropout_is_off(sources: dict[str, TokenSource]):
    model = GPT(dataclasses.replace(WEIGHTS.model_args, dropout=0.5))
    model.load_state_dict(WEIGHTS.model)

    def loss() -> float:
        return scoring.score(model, scoring.all_targets(sources["val"], VOCAB, batch_size=4, block_size=T)).loss

    evaluating = (model.eval(), loss())[1]
    assert not model.training
    assert (model.train(), loss())[1] == evaluating and model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_mode_is_put_back_after_an_error(model: GPT):
    def broken():
        raise OSError("disk gone")
        yield

    with pytest.raises(OSError):
        scoring.score(model.train(), broken())
    assert model.training


class Uniform(torch.nn.Module):
    """A model that gives every id the same probability."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.transformer = torch.nn.ModuleDict({"wte": torch.nn.Embedding(vocab_size, 1)})

    def forward(self, idx: Tensor, targets: Tensor, doc_ids: Tensor | None) -> tuple[None, Tensor]:
        return None, torch.where(targets >= 0, math.log(self.vocab_size), 0.0).flatten()


def test_bits_per_byte_by_hand():
    """Ids 0..3 with 1, 2, 3 and 0 bytes behind them, each costing ln 4 nats = 2 bits."""
    targets = torch.tensor([[0, 1, -1], [2, 3, 3]])
    batches = [(torch.zeros(2, 3, dtype=torch.int64), targets)]
    found = scoring.score(Uniform(4), batches, np.array([1, 2, 3, 0]))  # type: ignore[arg-type]
    assert (found.tokens, found.text_bytes) == (5, 6)
    assert found.loss == pytest.approx(math.log(4)) and found.perplexity == pytest.approx(4.0)
    assert found.bits_per_byte == pytest.approx(5 * 2 / 6)
    assert scoring.score(Uniform(4), batches).bits_per_byte is None  # type: ignore[arg-type]


def test_a_hopeless_loss_has_a_finite_perplexity():
    assert math.isfinite(scoring.Score(nll=1e6, tokens=1).perplexity)


def test_stacks_stay_within_their_limits(model: GPT):
    cap = scoring.FORWARD_TOKENS["cpu"]
    assert scoring.stack_for(model, 12, 64) == cap // 768 > 1
    assert scoring.stack_for(model, 64, 1024) == 1
    big = GPT(dataclasses.replace(WEIGHTS.model_args, vocab_size=2**16, n_embd=4, n_head=1))
    stack = scoring.stack_for(big, 1, 64)
    assert stack > 1 and stack * 64 * 2**16 <= scoring.FORWARD_LOGITS["cpu"]
    assert scoring.stack_for(big, 1, 64, head=False) == cap // 64
