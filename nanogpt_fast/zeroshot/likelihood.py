"""What a model makes of given text: losses over windows of documents, log-probabilities of continuations.

Token ids in, float64 numbers in nats out; what the numbers are of is corpora.py's, cloze.py's and harness.py's to say.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanogpt_fast.errors import DataError
from nanogpt_fast.model import GPT
from nanogpt_fast.scoring import head_rows, stack_for, strided_windows

Told = Callable[[int, int], object]  # called with tokens, or requests, done since the last call, and how many there are


class Loss(NamedTuple):
    """Of a window's targets: nats, how many they are, of which document."""

    document: int
    nll: float
    tokens: int


class Request(NamedTuple):
    """How likely is `continuation` after `prefix`, of one token at least?"""

    prefix: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Answer:
    """Of each of a continuation's tokens, [k]: its log-probability, and the ids that were likeliest there."""

    logprobs: np.ndarray  # float64
    likeliest: np.ndarray  # int64, among all ids
    likeliest_of: np.ndarray  # int64, at the first token only [1]: among those that `barred` leaves

    @property
    def logprob(self) -> float:
        return float(self.logprobs.sum())


@torch.no_grad()
def window_losses(
    model: GPT, documents: Sequence[np.ndarray], *, block_size: int, stride: int, told: Told = lambda done, of: None
) -> list[Loss]:
    """The losses of all tokens but each document's first, window by window, in the documents' order. Windows of like
    lengths share a forward, so that short documents cost no padding."""
    windows = list(strided_windows(map(len, documents), block_size, stride))
    order = sorted(range(len(windows)), key=lambda i: -windows[i].end)
    device, losses = model.transformer.wte.weight.device, np.zeros(len(windows))
    at, total = 0, sum(w.end - w.first for w in windows)
    while at < len(order):
        length = windows[order[at]].end
        part = order[at : at + stack_for(model, 1, length)]
        idx, targets = np.zeros((len(part), length), np.int64), np.full((len(part), length), -1)
        for row, (document, start, first, end) in enumerate(windows[i] for i in part):
            tokens = documents[document][start : start + end + 1].astype(np.int64)
            idx[row, :end], targets[row, first:end] = tokens[:-1], tokens[first + 1 :]
        _, nll = model(torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device))
        losses[part] = nll.view(len(part), length).cpu().double().sum(1).numpy()
        told(int((targets >= 0).sum()), total)
        at += len(part)
    return [Loss(w.text, float(nll), w.end - w.first) for w, nll in zip(windows, losses)]


@torch.no_grad()
def answers(
    model: GPT, requests: Sequence[Request], *, barred: Tensor | None = None, told: Told = lambda done, of: None
) -> list[Answer]:
    """One Answer a request. barred: bool [V], ids that `likeliest_of` leaves out.

    Prefix and continuation lose what goes beyond block_size on the left, as lm-eval's do. A prefix that several
    continuations share is computed once, into a key-value cache that they are then fed against: ten choices after 400
    tokens cost little more than one. Raises DataError for a continuation that is longer than block_size or empty.
    """
    shared: dict[tuple[int, ...], list[int]] = {}
    clipped = [_clipped(request, model.config.block_size) for request in requests]
    for i, (prefix, _) in enumerate(clipped):
        shared.setdefault(tuple(prefix), []).append(i)
    alone = [members[0] for members in shared.values() if len(members) == 1]
    found: dict[int, Answer] = {}
    for part in _batches(model, alone, [len(clipped[i].prefix) + len(clipped[i].continuation) - 1 for i in alone]):
        found |= zip(part, _one_forward(model, [clipped[i] for i in part], barred))
        told(len(part), len(requests))
    for groups in _alike(model, [members for members in shared.values() if len(members) > 1], clipped):
        members = [i for group in groups for i in group]
        found |= zip(members, _against_cache(model, [[clipped[i] for i in group] for group in groups], barred))
        told(len(members), len(requests))
    return [found[i] for i in range(len(requests))]


def _clipped(request: Request, block_size: int) -> Request:
    prefix, continuation = list(request.prefix), list(request.continuation)
    if not 0 < len(continuation) <= block_size or not prefix:
        raise DataError(
            "a continuation cannot be scored",
            expected=f"1 ... {block_size} tokens (the model's block_size) after a prefix of 1 at least",
            found=f"{len(continuation)} tokens after {len(prefix)}",
        )
    return Request(prefix[max(0, len(prefix) + len(continuation) - block_size - 1) :], continuation)


def _batches(model: GPT, members: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """The members, the longest first, as many at a time as one forward takes."""
    order = sorted(range(len(members)), key=lambda i: -lengths[i])
    while order:
        rows = stack_for(model, 1, lengths[order[0]], head=False)
        yield [members[i] for i in order[:rows]]
        order = order[rows:]


def _alike(model: GPT, groups: list[list[int]], requests: Sequence[Request]) -> Iterator[list[list[int]]]:
    """The groups, in lots whose prefixes have one length and whose continuations fit into one forward."""
    lots: dict[int, list[list[int]]] = {}
    for group in groups:
        lots.setdefault(len(requests[group[0]].prefix), []).append(group)
    for length, lot in sorted(lots.items(), reverse=True):
        longest = max(len(requests[i].continuation) for group in lot for i in group)
        room, taken = stack_for(model, 1, max(length, longest), head=False), []
        for group in lot:
            if taken and sum(map(len, taken)) + len(group) > room:
                yield taken
                taken = []
            taken.append(group)
        yield taken


def _one_forward(model: GPT, requests: list[Request], barred: Tensor | None) -> list[Answer]:
    """Prefix and continuation in one row a request, padded on the right, which causal attention does not see."""
    rows = [[*r.prefix, *r.continuation] for r in requests]
    idx = np.zeros((len(rows), max(map(len, rows)) - 1), np.int64)
    for i, row in enumerate(rows):
        idx[i, : len(row) - 1] = row[:-1]
    hidden = model.hidden(torch.from_numpy(idx).to(model.transformer.wte.weight.device))
    states = [hidden[i, len(r.prefix) - 1 : len(row) - 1] for i, (r, row) in enumerate(zip(requests, rows))]
    return _read(model, states, requests, barred)


def _against_cache(model: GPT, groups: list[list[Request]], barred: Tensor | None) -> list[Answer]:
    """Groups of one prefix each, all prefixes of one length: fed once, then every continuation against its cache."""
    device, c = model.transformer.wte.weight.device, model.config
    requests, length = [r for group in groups for r in group], len(groups[0][0].prefix)
    longest = max(len(r.continuation) for r in requests)
    prefixes = torch.tensor([list(group[0].prefix) for group in groups], device=device)
    dtype, heads = model.transformer.wte.weight.dtype, (c.n_head, length + longest - 1, c.n_embd // c.n_head)
    cache = torch.zeros((c.n_layer, 2, len(groups), *heads), dtype=dtype, device=device)
    last = model.cached_hidden(prefixes, cache, 0, last_only=True)
    owner = torch.tensor([g for g, group in enumerate(groups) for _ in group], device=device)
    states = last[owner]
    if longest > 1:
        idx = np.zeros((len(requests), longest - 1), np.int64)
        for i, request in enumerate(requests):
            idx[i, : len(request.continuation) - 1] = request.continuation[:-1]
        rest = model.cached_hidden(torch.from_numpy(idx).to(device), cache[:, :, owner], length)
        states = torch.cat((states, rest), dim=1)
    return _read(model, [states[i, : len(r.continuation)] for i, r in enumerate(requests)], requests, barred)


def _read(model: GPT, states: Iterable[Tensor], requests: list[Request], barred: Tensor | None) -> list[Answer]:
    """Answers of the hidden states [k, C] that predict each request's tokens."""
    sizes = [len(r.continuation) for r in requests]
    together = torch.cat(list(states))
    targets = torch.tensor([t for r in requests for t in r.continuation], device=together.device)
    logprobs, likeliest, other = [], [], []
    rows = head_rows(model)
    for part, wanted in zip(together.split(rows), targets.split(rows)):
        logits = model.ops.linear(part[None], model.head)[0].float()
        logprobs.append((logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)).cpu().double())
        likeliest.append(logits.argmax(1).cpu())
        other.append((logits if barred is None else logits.masked_fill(barred, -torch.inf)).argmax(1).cpu())
    pieces = [torch.cat(found).split(sizes) for found in (logprobs, likeliest, other)]
    return [Answer(p.numpy(), best.numpy(), among[:1].numpy()) for p, best, among in zip(*pieces)]
