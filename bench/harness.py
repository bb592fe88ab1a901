"""Contestants, their check against each other, and their time on a GPU.

Times are of CUDA graph replays (many calls a replay, so launch gaps do not count), over several sets of inputs in turn
(so that they come from memory, not from the cache), contestants interleaved A B C, B C A, ... (machines drift).
"""

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import machine  # noqa: F401  (first: it makes the packages importable)
import torch
from torch import Tensor

REPLAY_MS = 8.0  # a timed span lasts about so long: events resolve 0.5 us
MOST_CALLS = 64  # in one graph
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-3}  # relative; float32 products may be TF32


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


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, by the 2-norm; NaN where either has one. Zeros on both sides prove nothing."""
    if ours.shape != theirs.shape:
        return math.nan
    norm = float(torch.linalg.vector_norm(theirs.detach(), dtype=torch.float32))
    if norm == 0.0:
        raise ValueError("a result that is all zeros proves nothing: choose other inputs")
    return float(torch.linalg.vector_norm(ours.detach().float() - theirs.detach().float())) / norm


def poison(device: torch.device, megabytes: int) -> None:
    """Leave NaN in the memory that is handed out next, so that an element nobody writes shows."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    small = [torch.full((1 << 18,), math.nan, device=device) for _ in range(32)]
    large = torch.full((megabytes << 18,), math.nan, device=device)
    del small, large


# ---- time ----


@dataclass
class Arm:
    """Something to time: `replay` makes `calls` calls; a timed span has `replays` of them."""

    replay: Callable[[], Any]
    calls: int
    how: str  # "graph", or "events" around eager calls, which then include launch gaps
    replays: int = 1
    held: Any = field(default=None, repr=False)  # what must outlive the graph


def input_sets(bytes_of_one: int) -> int:
    """How many sets of inputs overflow the L2 cache three times, 64 at most."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(MOST_CALLS, math.ceil(3 * cache / max(1, bytes_of_one))))


def _span_ms(run: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def make_arm(calls: Sequence[Callable[[], Any]], pool: Any, capturable: bool = True) -> Arm:
    """Warm the calls up, then capture them in turn into one graph; events where that fails (they wait for the device).

    pool: of graphs that never run at once, and share their memory.
    """

    def all_calls() -> None:
        for call in calls:
            call()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, makes handles, fills caches
            all_calls()
        one_ms = _span_ms(all_calls) / len(calls)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    turns = max(1, min(MOST_CALLS // len(calls), math.ceil(REPLAY_MS / max(one_ms * len(calls), 1e-3))))
    eager = Arm(all_calls, len(calls), "events", replays=turns)
    if not capturable:
        return eager
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            for _ in range(turns):
                all_calls()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as problem:
        if "captur" not in str(problem):  # "operation not permitted when stream is capturing", "... during capture"
            raise
        torch.cuda.synchronize()
        return eager
    graph.replay()
    ms = _span_ms(graph.replay)
    return Arm(graph.replay, turns * len(calls), "graph", max(1, math.ceil(REPLAY_MS / max(ms, 1e-3))), held=calls)


def interleaved(
    arms: dict[str, Arm], rounds: int, while_busy: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """{name: milliseconds a call, one figure a round}; each round runs all arms, starting with another one each.

    while_busy is called when all is enqueued: clocks read later would be an idle GPU's.
    """
    names, events = list(arms), {name: [] for name in arms}
    for turn in range(rounds + 1 if arms else 0):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(arms[name].replays):
                arms[name].replay()
            end.record()
            events[name].append((begin, end))
    while_busy()
    torch.cuda.synchronize()
    spans = {name: [b.elapsed_time(e) for b, e in pairs[1:]] for name, pairs in events.items()}  # the first warms up
    return {name: [ms / (arms[name].calls * arms[name].replays) for ms in spans[name]] for name in names}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"ms": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"ms": median, "q1": q1, "q3": q3}
