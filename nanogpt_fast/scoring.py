"""The loss of a model on tokens: whole splits in order, overlapping windows, or nanoGPT's random batches."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanogpt_fast.data.loader import full_split, random_batches, read_windows
from nanogpt_fast.data.tokens import TokenSource
from nanogpt_fast.distributed import World
from nanogpt_fast.graphs import Graphs
from nanogpt_fast.model import GPT, document_ids
from nanogpt_fast.ops import exact_device

Mode = Literal["random", "full"]
Batch = tuple[Tensor, Tensor]  # idx and targets, int64 [rows, T] on the CPU; -1 where nothing is to be predicted

# Tokens a forward. On 2 CPU cores (4 layers of 128, 12 x 64 tokens a batch, float32) a batch takes 10.6 ms alone, 10.2
# in a stack of 2, 10.4 of 4 and 14 to 15 of 8 and more, which fall out of the cache; in bfloat16 5.0, 4.6, 4.4, 5.2 to
# 5.6. A GPU has launches to hide; its figure is not measured.
FORWARD_TOKENS = {"cpu": 3072, "cuda": 16384, "mps": 16384}
# Elements of logits at once: GPT-2's vocabulary allows 5341 tokens in 1 GiB of float32. A CPU's are what malloc keeps
# and hands out again (distributed.keep_freed_memory): 2 layers of 64, windows of 128, PTB's test set in 7.4 s for 17.9,
# most of which the kernel spent on fresh pages; a width of 768 and windows of 1024, 2.2 s for 2.1.
FORWARD_LOGITS = {"cpu": 2**23, "cuda": 2**28, "mps": 2**28}


class Window(NamedTuple):
    """Targets of a text that one forward scores: those that tokens[start + first + 1 : start + end + 1] are."""

    text: int
    start: int
    first: int
    end: int


class BrokenOff(Exception):
    """The loss of a split is not known: somebody asked to stop before all of it was scored."""


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


def stack_for(model: GPT, batch_size: int, block_size: int, *, head: bool = True, on: str = "") -> int:
    """Batches to put in one forward, at least 1; without a head it has no logits. on: a type of device, for the
    model's."""
    on = on or model.transformer.wte.weight.device.type
    tokens = min(FORWARD_TOKENS[on], head_rows(model, on) if head else 2**63)
    return max(1, tokens // (batch_size * block_size))


def head_rows(model: GPT, on: str = "") -> int:
    """Tokens whose logits are computed at once, at least 1."""
    return max(1, FORWARD_LOGITS[on or model.transformer.wte.weight.device.type] // model.config.vocab_size)


class Forward:
    """Sums the model's losses on the device, where forwards over batches of one shape are replayed (graphs.py).

    eot: the token that ends a document; with it attention stays inside documents.
    """

    def __init__(self, model: GPT, eot: int | None = None, graphs: Graphs | None = None):
        self.model, self.eot = model, eot
        self._device = model.transformer.wte.weight.device
        self._graphs = graphs or Graphs(self._device)
        self._batches: dict[torch.Size, tuple[Tensor, Tensor, Callable[[], None]]] = {}
        self.total = torch.zeros((), dtype=torch.float64, device=exact_device(self._device))  # read once, not a batch

    def add(self, idx: Tensor, targets: Tensor) -> None:
        """Add a batch's nll, in nats, to total."""
        if idx.shape not in self._batches:
            ours, theirs = (torch.empty(idx.shape, dtype=torch.int64, device=self._device) for _ in range(2))
            work = self._graphs.replayed("an evaluation's forward", lambda: self._forward(ours, theirs))
            self._batches[idx.shape] = ours, theirs, work
        ours, theirs, work = self._batches[idx.shape]
        ours.copy_(idx)
        theirs.copy_(targets)
        work()

    def _forward(self, idx: Tensor, targets: Tensor) -> None:
        doc_ids = None if self.eot is None else document_ids(idx, self.eot)
        _, nll = self.model(idx, targets, doc_ids=doc_ids)
        self.total += nll.to(self.total.device).sum(dtype=torch.float64)


@torch.no_grad()
def score(
    model: GPT, batches: Iterable[Batch], token_bytes: np.ndarray | None = None, forward: Forward | None = None
) -> Score:
    """Sum over all targets, in evaluation mode; the model's mode is put back after. forward: kept from call to call."""
    was_training, forward = model.training, forward or Forward(model)
    forward.total.zero_()
    tokens = text_bytes = 0
    model.eval()
    try:
        for idx, targets in batches:
            forward.add(idx, targets)
            valid = targets[targets >= 0]
            tokens += len(valid)
            if token_bytes is not None:
                text_bytes += int(token_bytes[valid.numpy()].sum())
    finally:
        model.train(was_training)
    return Score(forward.total.item(), tokens, text_bytes)


def estimate_loss(
    model: GPT,
    sources: dict[str, TokenSource],
    *,
    eval_iters: int,
    batch_size: int,
    block_size: int,
    generator: torch.Generator,
    mode: Mode = "random",
    forward: Forward | None = None,
    stop: Callable[[], bool] = lambda: False,
    world: World | None = None,
) -> dict[str, float]:
    """{split: mean loss}, split after split in the order of sources. BrokenOff once stop(), asked before each forward,
    says so.

    random: nanoGPT's estimate, eval_iters batches a split drawn from generator. full: every token of val once, and the
    estimate for train, whose whole is too long for an evaluation (9 billion tokens of OpenWebText). forward: see score.
    world: ranks that share the work: each draws eval_iters batches and takes its part of the windows, and all get the
    losses over the targets of all, or BrokenOff where one of them was asked to stop.
    """
    world = world or World()
    stack = stack_for(model, batch_size, block_size)
    settings = {"eval_iters": eval_iters, "batch_size": batch_size, "block_size": block_size, "stack": stack}
    losses = {}
    for split, source in sources.items():
        if mode == "random" or split == "train":
            batches = random_targets(source, model.config.vocab_size, generator=generator, **settings)
        else:
            batches = all_targets(
                source,
                model.config.vocab_size,
                batch_size=stack * batch_size,
                block_size=block_size,
                rank=world.rank,
                ranks=world.size,
            )
        result = score(model, itertools.takewhile(lambda _: not stop(), batches), forward=forward)
        sums = [result.nll, float(result.tokens), float(stop())]
        if world.size > 1:
            shared = torch.tensor(sums, dtype=torch.float64, device=world.device)
            world.all_reduce_(shared)
            sums = shared.tolist()
        nll, tokens, broken_off = sums
        if broken_off:
            raise BrokenOff
        losses[split] = nll / tokens
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


def all_targets(
    source: TokenSource, vocab_size: int, *, batch_size: int, block_size: int, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """Every target of the source once, in order; of several ranks, this one's part of them."""
    position, sizes = torch.arange(block_size), {"batch_size": batch_size, "block_size": block_size}
    for tokens, valid in full_split(source, vocab_size=vocab_size, rank=rank, ranks=ranks, **sizes):
        tokens = tokens.to(torch.int64)
        yield tokens[:, :-1], tokens[:, 1:].masked_fill(position >= valid[:, None], -1)


def strided_targets(
    source: TokenSource, vocab_size: int, *, batch_size: int, block_size: int, stride: int
) -> Iterator[Batch]:
    """Every target once, in order, past a file's first window from block_size - stride tokens of context or more."""
    rows = strided_windows((file.n_tokens for file in source.files), block_size, stride)
    while part := list(itertools.islice(rows, batch_size)):
        tokens = np.zeros((len(part), block_size + 1), source.dtype)
        targets = torch.full((len(part), block_size), -1)
        for row, (file, start, first, end) in enumerate(part):
            read_windows(source, np.array([file]), np.array([start]), tokens[row : row + 1, : end + 1], vocab_size)
            targets[row, first:end] = torch.from_numpy(tokens[row, first + 1 : end + 1].astype(np.int64))
        yield torch.from_numpy(tokens[:, :-1].astype(np.int64)), targets


def strided_windows(lengths: Iterable[int], block_size: int, stride: int) -> Iterator[Window]:
    """Windows over texts of so many tokens, in order. A text's first one holds block_size targets, each later one the
    next `stride`, behind as many tokens before them as fit into block_size."""
    for text, length in enumerate(lengths):
        done, last = 0, length - 1  # targets scored, targets there are
        while done < last:
            end = min(done + stride if done else block_size, last)
            start = max(0, end - block_size)
            yield Window(text, start, done - start, end - start)
            done = end
