"""Contestants, their check against each other, and their time.

Times are nanogpt_fast.timing's, over several sets of inputs in turn (so that they come from memory, not from the
cache), contestants interleaved. A ratio is of two times of the same round: `paired`.
"""

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import machine  # first: it makes the packages importable
import torch
from torch import Tensor

from nanogpt_fast import timing

MOST_CPU_SETS = 4  # of inputs: they are made anew for every contestant


# ---- contestants ----


@dataclass(frozen=True)
class Bound:
    """A contestant over one set of inputs. forward() -> outputs; leaves: what backward differentiates; canonical: its
    gradients in the order and shapes of the op's own."""

    forward: Callable[[], Any]
    leaves: list[Tensor]
    canonical: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda grads: grads


@dataclass(frozen=True)
class Contestant:
    """bind(*the op's arguments) -> Bound. Not capturable: it waits for the device, so no graph can hold it. within:
    what its calls run inside of (a launch override)."""

    bind: Callable[..., Bound]
    capturable: bool = True
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


def plain(function: Callable[..., Any], capturable: bool = True) -> Contestant:
    """A function with the op's own signature."""

    def bind(*args: Any) -> Bound:
        return Bound(lambda: function(*args), [a for a in args if isinstance(a, Tensor) and a.requires_grad])

    return Contestant(bind, capturable)


def outputs_of(result: Any) -> list[Tensor]:
    return [] if result is None else list(result) if isinstance(result, tuple | list) else [result]


def both(bound: Bound, douts: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
    """(outputs, gradients of the leaves) of one forward and backward; douts: incoming gradients, one an output."""
    outs = outputs_of(bound.forward())
    wanted = [(o, d) for o, d in zip(outs, douts) if o is not None and o.requires_grad]
    if not bound.leaves or not wanted:
        return outs, []
    grads = torch.autograd.grad([o for o, _ in wanted], bound.leaves, [d.to(o.dtype).view_as(o) for o, d in wanted])
    return outs, grads


def release(device: torch.device) -> None:
    """Give back a GPU's memory that garbage in cycles holds. Not on a CPU: collecting takes longer than timing."""
    if device.type == "cuda":
        gc.collect()


def poison(device: torch.device, megabytes: int) -> None:
    """Leave NaN in the memory that is handed out next, so that an element nobody writes shows."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    small = [torch.full((1 << 18,), math.nan, device=device) for _ in range(32)]
    large = torch.full((megabytes << 18,), math.nan, device=device)
    del small, large


# ---- time ----


def input_sets(bytes_of_one: int, device_type: str = "cuda") -> int:
    """How many sets of inputs overflow the last cache three times; 64 at most, on a CPU 4."""
    if device_type == "cuda":
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        return timing.input_sets(bytes_of_one, cache)
    return timing.input_sets(bytes_of_one, machine.cache_bytes(), MOST_CPU_SETS)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"ms": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"ms": median, "q1": q1, "q3": q3}


def paired(values: Sequence[float], base: Sequence[float], name: str) -> dict[str, float]:
    """{name, name_q1, name_q3}: median and quartiles of the ratios to `base`, round by round; {} where base has a time
    that is not positive (a difference that the noise ate)."""
    if min(base) <= 0.0:
        return {}
    found = summary([value / other for value, other in zip(values, base, strict=True)])
    return {name: found["ms"], f"{name}_q1": found["q1"], f"{name}_q3": found["q3"]}
