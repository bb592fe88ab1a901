"""What ranks do in tests (ranks.py): each function is called on every rank, with its World."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from nanogpt_fast.distributed import World
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import REFERENCE
from nanogpt_fast.optim import AdamW, FlatParameters
from nanogpt_fast.run import ranges
from nanogpt_fast.settings.config import GPTConfig, OptimConfig
from nanogpt_fast.step import TrainStep

SHAPE = GPTConfig(block_size=16, vocab_size=65, n_layer=4, n_head=2, n_embd=32, dropout=0.2, bias=False)
COLLECTIVES = (
    "all_reduce",
    "reduce_scatter_single",
    "all_gather_single",
    "reduce_scatter_tensor",
    "all_gather_into_tensor",
)


def build(
    world: World,
    dtype: str = "float32",
    sharded: bool = False,
    reduce_dtype: str = "float32",
    bucket_mb: float = 0.02,  # four buckets of a block, and the embeddings'
    lr: float = 1e-3,
    recompute: str = "none",
    bias: bool = False,
    tied: bool = True,
) -> TrainStep:
    """No biases unless asked: a key's bias has gradient 0 but for rounding, which Adam scales up to a whole step."""
    shape = GPTConfig(**{**vars(SHAPE), "bias": bias, "tie_word_embeddings": tied})
    model = GPT(shape, recompute=recompute).train()
    model.init_weights(torch.Generator().manual_seed(world.rank))  # ranks differ until they join
    kind = getattr(torch, dtype)
    flat = FlatParameters(model, kind, world.device, world, sharded=sharded, bucket_mb=bucket_mb)
    optimizer = AdamW(flat, OptimConfig(), REFERENCE, scale_loss=kind == torch.float16)
    optimizer.set_lr(lr)
    return TrainStep(model, optimizer, world, seed=3, reduce_dtype=getattr(torch, reduce_dtype))


def tokens(world: World, accumulation: int, iteration: int) -> torch.Tensor:
    """This rank's part of an iteration's micro-batches, [A, 2, T + 1]."""
    generator = torch.Generator().manual_seed(iteration % 5)
    batch = torch.randint(SHAPE.vocab_size, (accumulation, 2, SHAPE.block_size + 1), generator=generator)
    share = accumulation // world.size
    return batch[world.rank * share :][:share]


def train(world: World, accumulation: int = 2, iterations: int = 3, **settings: Any) -> dict[str, Any]:
    """Losses, norms, and rank 0's whole master and moments after so many steps."""
    step = build(world, **settings)
    losses, norms = [], []
    for iteration in range(iterations):
        result = step(tokens(world, accumulation, iteration), iteration, stop=world.rank == 0, save=world.rank > 0)
        losses.append(result.loss.item())
        norms.append(result.grad_norm.item())
    optimizer, flat = step.optimizer, step.optimizer.flat
    held = {"master": flat.master, "m": optimizer.m, "v": optimizer.v}
    step.exchange.complete()
    whole = {kind: step.exchange.whole(buffer) for kind, buffer in held.items()}
    return {
        "losses": losses,
        "norms": norms,
        "params": {name: p.detach().float() for name, p in step.model.named_parameters()},
        "whole": {kind: flat.named(buffer) if len(buffer) else {} for kind, buffer in whole.items()},
        "held": len(flat.master),
        "votes": [world.any(False), world.any(world.rank == world.size - 1), world.main_says(world.rank > 0)],
        "report": step.read().get()._asdict(),
        "steps": float(optimizer.scalars[1]),
    }


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """(name, bytes of the longest tensor) of every collective that is started within."""
    calls: list[tuple[str, int]] = []
    real = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def noting(name: str) -> Any:
        def call(*tensors: torch.Tensor, **kwargs: Any) -> Any:
            calls.append((name, max(t.nbytes for t in tensors)))
            return real[name](*tensors, **kwargs)

        return call

    for name in real:
        setattr(dist, name, noting(name))
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def sent(world: World, accumulation: int = 2, **settings: Any) -> dict[str, Any]:
    """The collectives of one step, the second, and the bytes of what they are about."""
    step = build(world, **settings)
    step(tokens(world, accumulation, 0), 0)
    with counted() as calls:
        step(tokens(world, accumulation, 1), 1)
    flat = step.optimizer.flat
    vectors = 4 * (flat.vectors.stop - flat.vectors.start)
    return {
        "calls": calls,
        "gradient": 4 * len(flat.grad) - vectors,
        "parameters": flat.params.nbytes - vectors // 4 * flat.params.element_size(),
        "vectors": vectors,
        "report": 8 * 4,
    }


def traced(world: World, accumulation: int = 2, **settings: Any) -> list[tuple[str, float, float]]:
    """(name, begin, end) in microseconds of the ranges, and of the collectives' starts, in the fourth step."""
    step = build(world, **settings)
    for iteration in range(3):
        step(tokens(world, accumulation, iteration), iteration)
    with profile(activities=[ProfilerActivity.CPU]) as recorded, ranges.on():
        step(tokens(world, accumulation, 3), 3)
    names = ("forward", "backward", "all-reduce")
    events = [e for e in recorded.events() or () if e.name in names or e.name.startswith("c10d::")]
    events.sort(key=lambda e: e.time_range.start)
    return [(e.name, e.time_range.start, e.time_range.end) for e in events]
