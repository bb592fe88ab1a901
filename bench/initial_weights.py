"""Initialisations beside GPT-2's, as weights that `train --init_from=PATH` takes: the trainer itself has GPT-2's alone.

All start from the draws that a run of that seed makes, so `gpt2` here and --init_from=scratch are the same run, bit for
bit, and the others differ from it by scale where they can.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.model import GPT
from nanogpt_fast.settings.config import GPTConfig
from nanogpt_fast.weights import formats
from nanogpt_fast.weights.canonical import Weights

EMBEDDINGS = ("wte.weight", "wpe.weight")
OUTSIDE = (*EMBEDDINGS, "lm_head.weight")  # of the blocks


def _is_residual(name: str) -> bool:
    return name.endswith("c_proj.weight")


def _unscaled(model: GPT, generator: torch.Generator) -> None:
    """Residual projections as wide as all others: 0.02, not 0.02 / sqrt(2 n_layer)."""
    for name, parameter in model.named_parameters():
        if _is_residual(name):
            parameter.mul_(math.sqrt(2 * model.config.n_layer))


def _zero_projections(model: GPT, generator: torch.Generator) -> None:
    """Residual projections 0: every block begins as the identity."""
    for name, parameter in model.named_parameters():
        if _is_residual(name):
            parameter.zero_()


def _times(factor: float, embeddings: bool = True, matrices: bool = True) -> Callable[[GPT, torch.Generator], None]:
    """GPT-2's, so many times as wide; or only its two embeddings and the head, or all but them."""

    def scaled(model: GPT, generator: torch.Generator) -> None:
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and (embeddings if name.endswith(OUTSIDE) else matrices):
                parameter.mul_(factor)

    return scaled


def _head(factor: float) -> Callable[[GPT, torch.Generator], None]:
    """GPT-2's, but for a head of its own, so many times as wide."""

    def scaled(model: GPT, generator: torch.Generator) -> None:
        if model.config.tie_word_embeddings:
            expected = "tie_word_embeddings = false beside it"
            raise ConfigError("weights of a head that is the token embedding", expected=expected)
        model.head.mul_(factor)

    return scaled


def _pytorch(model: GPT, generator: torch.Generator) -> None:
    """What nn.Linear and nn.Embedding draw by themselves: U(-1/sqrt(fan_in), ...) and N(0, 1); the head is tied, so it
    is the embedding's."""
    for name, parameter in model.named_parameters():
        if name.endswith(EMBEDDINGS):
            parameter.copy_(torch.normal(0.0, 1.0, parameter.shape, generator=generator))
        elif parameter.dim() > 1:
            bound = 1 / math.sqrt(parameter.size(1))
            parameter.uniform_(-bound, bound, generator=generator)


def _pytorch_small_embedding(model: GPT, generator: torch.Generator) -> None:
    """PyTorch's for the blocks, GPT-2's 0.02 for the two embeddings."""
    kept = {name: p.clone() for name, p in model.named_parameters() if name.endswith(OUTSIDE)}
    _pytorch(model, generator)
    named = dict(model.named_parameters())
    for name, value in kept.items():
        named[name].copy_(value)


KINDS: dict[str, Callable[[GPT, torch.Generator], None]] = {
    "gpt2": lambda model, generator: None,
    "unscaled": _unscaled,
    "zero projections": _zero_projections,
    "half": _times(0.5),
    "double": _times(2.0),
    "quadruple": _times(4.0),
    "quadruple embeddings": _times(4.0, matrices=False),
    "quadruple matrices": _times(4.0, embeddings=False),
    "head 0": _head(0.0),
    "head 0.001": _head(0.05),
    "head 0.08": _head(4.0),
    "pytorch": _pytorch,
    "pytorch, embeddings 0.02": _pytorch_small_embedding,
}


@torch.no_grad()
def initial(kind: str, shape: GPTConfig, seed: int) -> dict[str, Tensor]:
    """{name: tensor} of one of KINDS."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(shape)
    model.init_weights(generator)
    KINDS[kind](model, generator)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def write(kind: str, shape: GPTConfig, seed: int, folder: Path) -> Path:
    """A run of ours at step 0 in `folder`, for --init_from."""
    formats.write(Weights(model_args=shape, model=initial(kind, shape, seed)), folder, "native")
    return folder
