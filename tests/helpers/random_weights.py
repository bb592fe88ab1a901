"""Small random models for the tests of the formats."""

from typing import Any

import torch

from nanogpt_fast.settings.config import GPTConfig
from nanogpt_fast.weights.canonical import Weights


def random_weights(*, seed: int = 0, optimizer: bool = True, **changes: Any) -> Weights:
    """Two layers of width 64, every tensor random (biases and LayerNorm too: a swapped pair must show)."""
    tokenizer = changes.pop("tokenizer", None)
    shape: dict[str, Any] = {"block_size": 16, "vocab_size": 100, "n_layer": 2, "n_head": 4, "n_embd": 64}
    config = GPTConfig(**(shape | changes))
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float, size: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(size, generator=generator) * scale

    shapes = config.parameter_shapes()
    model = {n: draw(0.1 if len(s) > 1 else 0.5, s) for n, s in shapes.items()}
    moments = {f"exp_avg.{n}": draw(1e-3, s) for n, s in shapes.items()}
    moments |= {f"exp_avg_sq.{n}": draw(1e-3, s).square() for n, s in shapes.items()}
    return Weights(
        model_args=config,
        model=model,
        optimizer=moments if optimizer else None,
        optimizer_step=12 if optimizer else 0,
        step=12,
        best_val_loss=2.5,
        config={"dataset": "tiny", "learning_rate": 1e-3, "beta1": 0.8, "beta2": 0.97, "weight_decay": 0.2},
        tokenizer=tokenizer,
    )


def same_tensors(a: dict[str, torch.Tensor] | None, b: dict[str, torch.Tensor] | None) -> bool:
    """Same names in the same order, same dtype, same bits."""
    if a is None or b is None:
        return a is b
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
