"""The loss of a model on tokens: whole splits in order, overlapping windows, or nanoGPT's random batches."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nanogpt_fast.data.loader import full_split, random_batches, read_windows
from nanogpt_fast.data.tokens import TokenSource
from nanogpt_fast.model import GPT, document_ids
from nanogpt_fast.ops import exact_device

Mode = Literal["random", "full"]
Batch = tuple[Tensor, Tensor]  # idx and targets, int64 [rows, T] on the CPU; -1 where nothing is to be predicted

# Tokens a forward. On 2 CPU cores (4 layers of 128, 12 x 64 tokens a batch, float32) a batch takes 10.6 ms alone, 10.2
# in a stack of 2, 10.4 of 4 and 14 to 15 of 8 and more, which fall out of the cache; in bfloat16 5.0, 4.6, 4.4, 5.2 to
# 5.6. A GPU has launches to hide; its figure is not measured.
FORWARD_TOKENS = {"cpu": 3072, "cuda": 16384, "mps": 16384}
FORWARD_LOGITS = 2**28  # elements; GPT-2's vocabulary then allows 5336 tokens, 1 GiB of float32


@dataclass(frozen=True)
class Score:
    """What a model made of some targets."""

    nll: float  # summed negative log-likelihood, nats
    tokens: int
    text_bytes: int = 0  # UTF-8 bytes of the targets' text, 0 when unknown

    @property
    def loss(self) -> float:
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        return self.nll / math.log(2.0) / self.text_bytes if self.text_bytes else None


def stack_for(model: GPT, batch_size: int, block_size: int) -> int:
    """Batches to put in one forward, at least 1."""
    device, vocab_size = model.transformer.wte.weight.device, model.config.vocab_size
    tokens = min(FORWARD_TOKENS[device.type], FORWARD_LOGITS // vocab_size)
    return max(1, tokens // (batch_size * block_size))


@torch.no_grad()
def score(model: GPT, batches: Iterable[Batch], token_bytes: np.ndarray | None = None, eot: int | None = None) -> Score:
    """Sum over all targets, in evaluation mode; the model's mode is put back after.

    eot: the token that ends a document; with it attention stays inside documents.
    """
    device, was_training = model.transformer.wte.weight.device, model.training
    total = torch.zeros((), dtype=torch.float64, device=exact_device(device))  # CUDA waits once, not a batch
    tokens = text_bytes = 0
    model.eval()
    try:
        for idx, targets in batches:
            idx = idx.to(device)
            doc_ids = None if eot is None else document_ids(idx, eot)
            _, nll = model(idx, targets.to(device), doc_ids=doc_ids)
            total += nll.to(total.device).sum(dtype=torch.float64)
            valid = targets[targets >= 0]
            tokens += len(valid)
            if token_bytes is not None:
                text_bytes += int(token_bytes[valid.numpy()].sum())
    finally:
        model.train(was_training)
    return Score(total.item(), tokens, text_bytes)


def estimate_loss(
    model: GPT,
    sources: dict[str, TokenSource],
    *,
    eval_iters: int,
    batch_size: int,
    block_size: int,
    generator: torch.Generator,
    mode: Mode = "random",
    eot: int | None = None,
) -> dict[str, float]:
    """{split: mean loss}, split after split in the order of sources.

    random: nanoGPT's estimate, eval_iters batches a split drawn from generator. full: every token of val once, and the
    estimate for train, whose whole is too long for an evaluation (9 billion tokens of OpenWebText). eot: see score.
    """
    stack = stack_for(model, batch_size, block_size)
    settings = {"eval_iters": eval_iters, "batch_size": batch_size, "block_size": block_size, "stack": stack}
    losses = {}
    for split, source in sources.items():
        if mode == "random" or split == "train":
            batches = random_targets(source, model.config.vocab_size, generator=generator, **settings)
        else:
            batches = all_targets(source, model.config.vocab_size, batch_size=stack * batch_size, block_size=block_size)
        losses[split] = score(model, batches, eot=eot).loss
    return losses


def random_targets(
    source: TokenSource,
    vocab_size: int,
    *,
    eval_iters: int,
    batch_size: int,
    block_size: int,
    generator: torch.Generator,
    stack: int,
) -> Iterator[Batch]:
    """nanoGPT's random batches, `stack` of them at a time. All have as many targets: their mean is the means' mean."""
    for tokens in random_batches(
        source,
        batch_size=batch_size,
        block_size=block_size,
        iters=eval_iters,
        generator=generator,
        vocab_size=vocab_size,
        stack=stack,
    ):
        tokens = tokens.flatten(0, 1).to(torch.int64)
        yield tokens[:, :-1], tokens[:, 1:]


def all_targets(source: TokenSource, vocab_size: int, *, batch_size: int, block_size: int) -> Iterator[Batch]:
    """Every target of the source once, in order."""
    position = torch.arange(block_size)
    for tokens, valid in full_split(source, batch_size=batch_size, block_size=block_size, vocab_size=vocab_size):
        tokens = tokens.to(torch.int64)
        yield tokens[:, :-1], tokens[:, 1:].masked_fill(position >= valid[:, None], -1)


def strided_targets(
    source: TokenSource, vocab_size: int, *, batch_size: int, block_size: int, stride: int
) -> Iterator[Batch]:
    """Every target once, in order, past a file's first window from block_size - stride tokens of context or more."""
    rows = _strided_rows(source, block_size, stride)
    while part := list(itertools.islice(rows, batch_size)):
        tokens = np.zeros((len(part), block_size + 1), source.dtype)
        targets = torch.full((len(part), block_size), -1)
        for row, (file, start, first, end) in enumerate(part):
            read_windows(source, np.array([file]), np.array([start]), tokens[row : row + 1, : end + 1], vocab_size)
            targets[row, first:end] = torch.from_numpy(tokens[row, first + 1 : end + 1].astype(np.int64))
        yield torch.from_numpy(tokens[:, :-1].astype(np.int64)), targets


def _strided_rows(source: TokenSource, block_size: int, stride: int) -> Iterator[tuple[int, int, int, int]]:
    """(file, first token, first and end column of the targets to score) of each window."""
    for index, file in enumerate(source.files):
        done, last = 0, file.n_tokens - 1  # targets scored, targets there are
        while done < last:
            end = min(done + stride if done else block_size, last)
            start = max(0, end - block_size)
            yield index, start, done - start, end - start
            done = end
