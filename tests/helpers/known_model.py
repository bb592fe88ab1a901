"""GPTs whose probabilities are known in closed form."""

import math

import torch

from nanogpt_fast.model import EPS, GPT
from nanogpt_fast.settings.config import GPTConfig


def known_model(vocab_size: int = 32, block_size: int = 16, strength: float = 0.0) -> GPT:
    """A model whose every next token is the present one with probability `repeat_probability`, else any other, all
    alike. strength 0: uniform.

    No block adds to the residual stream, positions are 0, and token i's embedding is strength times the unit vector i.
    """
    config = GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=vocab_size, bias=False)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float(parameter.dim() < 2))
        model.transformer.wte.weight.copy_(strength * torch.eye(vocab_size))
    return model.eval()


def repeat_probability(vocab_size: int, strength: float) -> float:
    """Of the present token as the next: a softmax of LayerNorm's (strength e_i) times strength."""
    mean = strength / vocab_size
    deviation = math.sqrt(mean * strength * (1 - 1 / vocab_size) + EPS)
    same, other = (strength * (value - mean) / deviation for value in (strength, 0.0))
    return math.exp(same) / (math.exp(same) + (vocab_size - 1) * math.exp(other))
