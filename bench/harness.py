"""Contestants, their check against each other, and their time.

On a GPU times are of CUDA graph replays (many calls a replay, so launch gaps do not count), on a CPU of enough calls to
last CPU_SPAN_MS; over several sets of inputs in turn (so that they come from memory, not from the cache), contestants
interleaved A B C, B C A, ... (machines drift). A ratio is of two times of the same round: `paired`.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import machine  # noqa: F401  (first: it makes the packages importable)
import torch
from torch import Tensor

REPLAY_MS = 8.0  # a timed span lasts about so long: events resolve 0.5 us
CPU_SPAN_MS = 20.0  # and so long on a CPU, where the clock is exact and the other processes are not
MOST_CALLS = 64  # in one graph
MOST_CPU_S = 3.0  # for a turn of an arm's calls: one that takes longer would be most of a run
MOST_CPU_SETS = 4  # of inputs: they are made anew for every contestant
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


@dataclass
class Arm:
    """Something to time: `replay` makes `calls` calls; a timed span has `replays` of them."""

    replay: Callable[[], Any]
    calls: int
    how: str  # "graph", or "events" around eager calls, which then include launch gaps; "cpu": perf_counter
    replays: int = 1
    held: Any = field(default=None, repr=False)  # what must outlive the graph


def input_sets(bytes_of_one: int, device_type: str = "cuda") -> int:
    """How many sets of inputs overflow the last cache three times; 64 at most, on a CPU 4."""
    if device_type == "cuda":
        cache, most = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size, MOST_CALLS
    else:
        cache, most = machine.cache_bytes(), MOST_CPU_SETS
    return max(1, min(most, math.ceil(3 * cache / max(1, bytes_of_one))))


def _span_ms(run: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def make_arm(calls: Sequence[Callable[[], Any]], pool: Any, capturable: bool = True, device_type: str = "cuda") -> Arm:
    """Warm the calls up, then capture them in turn into one graph; events where that fails (they wait for the device).
    On a CPU `make_cpu_arm`.

    pool: of graphs that never run at once, and share their memory.
    """
    if device_type == "cpu":
        return make_cpu_arm(calls)

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


def make_cpu_arm(calls: Sequence[Callable[[], Any]]) -> Arm:
    """Warm the calls up, then find how often to make them in turn so that a span lasts CPU_SPAN_MS. RuntimeError where
    once takes MOST_CPU_S or more."""

    def all_calls() -> None:
        for call in calls:
            call()

    all_calls()  # compiles, fills caches
    arm = Arm(all_calls, len(calls), "cpu")
    span = _cpu_span_ms(arm)
    if span > MOST_CPU_S * 1e3:
        raise RuntimeError(f"too slow to be timed beside the others: {span / 1e3 / len(calls):.1f} s a call")
    while span < CPU_SPAN_MS:
        arm.replays *= 2
        span = _cpu_span_ms(arm)
    return arm


def _cpu_span_ms(arm: Arm) -> float:
    began = time.perf_counter()
    for _ in range(arm.replays):
        arm.replay()
    return (time.perf_counter() - began) * 1e3


def interleaved(
    arms: dict[str, Arm], rounds: int, while_busy: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """{name: milliseconds a call, one figure a round}; each round runs all arms, starting with another one each. One
    round more is run first and dropped: it warms up.

    while_busy is called when all is enqueued: clocks read later would be an idle GPU's. ValueError for arms of both
    kinds: a GPU's are enqueued, a CPU's are waited for.
    """
    on_cpu = {arm.how == "cpu" for arm in arms.values()}
    if len(on_cpu) > 1:
        raise ValueError("arms of a CPU and of a GPU cannot be timed together")
    measure = _cpu_spans if True in on_cpu else _gpu_spans
    spans = measure(arms, _orders(list(arms), rounds + 1), while_busy) if arms else {}
    return {name: [ms / (arm.calls * arm.replays) for ms in spans[name][1:]] for name, arm in arms.items()}


def _orders(names: list[str], rounds: int) -> list[list[str]]:
    """A B C, B C A, C A B, A B C, ..."""
    return [names[turn % len(names) :] + names[: turn % len(names)] for turn in range(rounds)]


def _cpu_spans(arms: dict[str, Arm], orders: list[list[str]], while_busy: Callable[[], Any]) -> dict[str, list[float]]:
    spans: dict[str, list[float]] = {name: [] for name in arms}
    for order in orders:
        for name in order:
            spans[name].append(_cpu_span_ms(arms[name]))
    while_busy()
    return spans


def _gpu_spans(arms: dict[str, Arm], orders: list[list[str]], while_busy: Callable[[], Any]) -> dict[str, list[float]]:
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in arms}
    for order in orders:
        for name in order:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(arms[name].replays):
                arms[name].replay()
            end.record()
            events[name].append((begin, end))
    while_busy()
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) for begin, end in pairs] for name, pairs in events.items()}


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
