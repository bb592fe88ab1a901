"""Times of calls to compare: on a GPU of CUDA graph replays (many calls a replay, so launch gaps do not count), on a
CPU of enough calls to last CPU_SPAN_MS; arms interleaved A B C, B C A, ... (machines drift), so that a ratio can be of
two times of one round.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

REPLAY_MS = 8.0  # a timed span lasts about so long: events resolve 0.5 us
CPU_SPAN_MS = 20.0  # and so long on a CPU, where the clock is exact and the other processes are not
MOST_CALLS = 64  # in one graph
MOST_CPU_S = 3.0  # for a turn of an arm's calls: one that takes longer would be most of a run


@dataclass
class Arm:
    """Something to time: `replay` makes `calls` calls; a timed span has `replays` of them."""

    replay: Callable[[], Any]
    calls: int
    how: str  # "graph", or "events" around eager calls, which then include launch gaps; "cpu": perf_counter
    replays: int = 1
    held: Any = field(default=None, repr=False)  # what must outlive the graph


def input_sets(bytes_of_one: int, cache: int, most: int = MOST_CALLS) -> int:
    """How many sets of inputs overflow a cache of so many bytes three times, so that they come from memory."""
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
