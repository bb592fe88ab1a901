"""Evaluate a model: `python -m nanogpt_fast.evaluate --out_dir=out [--split=val | --file=TEXT]`.

Loss in nats a token, perplexity, and bits per byte of the text behind the tokens, which compares models whatever
their tokenizers. Over a whole split in order, or over nanoGPT's random batches (--eval_mode=random).
"""

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanogpt_fast import cli
from nanogpt_fast.config import Config, DataConfig
from nanogpt_fast.data import full_split, random_batches
from nanogpt_fast.distributed import resolve_device, resolve_dtype
from nanogpt_fast.errors import ConfigError, DataError, run_command
from nanogpt_fast.meta import check_name, read_meta
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import select_ops
from nanogpt_fast.restore import Restored, build_model, restore
from nanogpt_fast.tokens import TokenSource, open_split

Mode = Literal["random", "full"]
Batch = tuple[Tensor, Tensor]  # idx and targets, int64 [rows, T] on the CPU; -1 where nothing is to be predicted

FORWARD_TOKENS = 16384
FORWARD_LOGITS = 2**28

# ---- the library part ----


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


def stack_for(batch_size: int, block_size: int, vocab_size: int) -> int:
    """Batches to put in one forward, at least 1."""
    tokens = min(FORWARD_TOKENS, FORWARD_LOGITS // vocab_size)
    return max(1, tokens // (batch_size * block_size))


@torch.no_grad()
def score(model: GPT, batches: Iterable[Batch], token_bytes: np.ndarray | None = None) -> Score:
    """Sum over all targets, in evaluation mode; the model's mode is put back after."""
    device, was_training = model.transformer.wte.weight.device, model.training
    total = torch.zeros((), dtype=torch.float64, device=device)  # stays there: no wait for the device a batch
    tokens = text_bytes = 0
    model.eval()
    try:
        for idx, targets in batches:
            _, nll = model(idx.to(device), targets.to(device))
            total += nll.sum(dtype=torch.float64)
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
    stack: int = 0,
) -> dict[str, float]:
    """{split: mean loss}, split after split in the order of sources.

    random: nanoGPT's estimate, eval_iters batches a split drawn from generator. full: every token once. stack batches
    go through one forward (0 chooses), which changes rounding alone.
    """
    stack = stack or stack_for(batch_size, block_size, model.config.vocab_size)
    settings = {"eval_iters": eval_iters, "batch_size": batch_size, "block_size": block_size, "stack": stack}
    losses = {}
    for split, source in sources.items():
        if mode == "random":
            batches = random_targets(source, model.config.vocab_size, generator=generator, **settings)
        else:
            batches = all_targets(source, model.config.vocab_size, batch_size=stack * batch_size, block_size=block_size)
        losses[split] = score(model, batches).loss
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
