"""Where the steps of a trace went: milliseconds a step by kind of work, by layer and op, by kernel.

On a CPU every instant of the window belongs to the innermost event of the thread that trains: the parts are self times.
On a GPU an instant belongs to the kernels that run (to a product or attention before a collective, to that before a
copy, for what is hidden costs nothing), and one in which nothing runs is data wait, or a launch gap. Either way the
parts partition the window, whose length the caller has measured by another clock.
"""

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from nanogpt_fast.errors import DataError
from nanogpt_fast.run import ranges
from nanogpt_fast.run.trace_events import (
    GPU_CATEGORIES,
    LAUNCH_CATEGORIES,
    Event,
    Places,
    is_ours,
    nest,
    pieces,
    split_name,
)

PRODUCTS, ATTENTION, GELU, NORM = "matrix products", "attention", "GELU", "LayerNorm and residual"
LOSS, EMBEDDING, OPTIMIZER = "cross-entropy", "embedding", "AdamW, norm, zeroing"
COPIES, ELEMENTWISE = "casts and copies", "other elementwise"
DISPATCH, GAPS = "Python, autograd, dispatch", "launch gaps"
DATA_WAIT, COMMUNICATION = "data wait", "communication"
EVALUATION, CHECKPOINT = "evaluation", "checkpoint"
PARTS = (PRODUCTS, ATTENTION, GELU, NORM, LOSS, EMBEDDING, OPTIMIZER, COPIES, ELEMENTWISE,
         DISPATCH, GAPS, DATA_WAIT, COMMUNICATION, EVALUATION, CHECKPOINT)  # fmt: skip

# The first pattern that is found in the name, without case, of an operator or a kernel. Ours come first (`_norm_fwd`),
# then libraries'. A kernel that torch.compile fused is named by all it does: the first kind that occurs counts.
KINDS = [(part, re.compile(pattern, re.IGNORECASE)) for part, pattern in (
    (COMMUNICATION, r"nccl|all_?reduce|reduce_?scatter|all_?gather|broadcast_|c10d::"),
    (ATTENTION, r"attention|flash_|fmha|sdpa|_document_spans|_merge_splits"),
    (PRODUCTS, r"_gemm_gelu"),
    (OPTIMIZER, r"_adamw|adam|vector_norm|_grad_norm|multi_tensor_apply"),
    (NORM, r"layer_?norm|_norm_(fwd|bwd)|norm_kernel|gamma_?beta|_dropout_add"),
    (LOSS, r"cross_entropy|log_?softmax|nll_loss|cunn_softmax"),
    (GELU, r"gelu"),
    (EMBEDDING, r"embedding|index_(select|add)|scatter_add|indexSelect|index_?put"),
    (PRODUCTS, r"gemm|\bmm\b|::(mm|bmm|addmm|addmm_|baddbmm|mv|addmv_?|dot)$|nvjet|cutlass|cublas|wgmma|splitk|"
               r"triton_tem"),
    (COPIES, r"memcpy|copy|::cat$|CatArray|::stack$"),
    (ELEMENTWISE, r"memset|fill|zero"),
)]  # fmt: skip
# Operators that compute nothing: views, allocation, and wrappers around those that work.
NO_WORK = re.compile(
    r"aten::(as_strided|_?(unsafe_)?view(_as)?|_reshape_alias|reshape|flatten|unflatten|transpose|t|permute|slice|select|"
    r"narrow|unbind|chunk|split\w*|expand(_as)?|(un)?squeeze|alias|detach_?|lift_fresh|empty\w*|new_empty\w*|resize_|"
    r"to|_to_copy|clone|contiguous|resolve_\w+|item|_local_scalar_dense|result_type|linear|matmul|zeros|zeros_like|"
    r"ones|full|new_zeros|set_|data|is_nonzero|numpy_T|unfold|movedim|set_data|record_stream|random_)$"
)
CONTEXT = {  # what elementwise work belongs to, by the range of ours that it is in
    "add_norm": NORM, "norm": NORM, "mlp": GELU, "embedding": EMBEDDING, "linear_cross_entropy": LOSS,
    "qkv_attention": ATTENTION, ranges.GRAD_NORM: OPTIMIZER, ranges.UPDATE: OPTIMIZER,
}  # fmt: skip
ASIDE = {ranges.EVALUATION: EVALUATION, ranges.CHECKPOINT: CHECKPOINT}  # counted whole: they are no part of a step
TOP = 20


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Where `steps` traced steps went. All times are milliseconds a step; parts add up to traced_ms."""

    device: str  # "cpu", "cuda": whose time the parts are
    steps: int
    wall_ms: float  # by perf_counter, around the same steps
    parts: dict[str, float]
    ranges: list[dict[str, Any]]  # name, layers, forward_ms, backward_ms: our ranges, layers added up
    layers: dict[str, dict[str, float]]  # {h0: {op: ms, both ways}}
    top: list[dict[str, Any]]  # name, part, calls (a step), ms: operators or kernels, dearest first
    gaps: dict[str, Any]  # GPU only: count, median_us, longest [{us, after, in}]
    streams: dict[str, Any]  # GPU only: busy_ms of each stream, overlap_ms, communication_ms, communication_exposed_ms
    untraced_ms: float | None = None  # a step while nothing traced, where the caller knows it
    facts: dict[str, Any]  # the run's shape and machine

    @property
    def traced_ms(self) -> float:
        return sum(self.parts.values())

    def as_json(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}


def from_json(value: dict[str, Any]) -> Summary:
    """The inverse of as_json. DataError for anything else."""
    try:
        return Summary(**{key: item for key, item in value.items() if key != "format"})
    except (TypeError, AttributeError) as error:
        raise DataError("this is no summary of traced steps", found=str(error)) from None


def summarise(
    events: Iterable[Event], *, wall_ms: float, facts: dict[str, Any], untraced_ms: float | None = None
) -> Summary:
    """events with one range named `window` that holds `iteration` ranges; wall_ms: of the window, by another clock.

    DataError without such ranges.
    """
    events = list(events)
    tree = nest(events)
    window = next((e for e in tree if e.name == ranges.WINDOW), None)
    steps = sum(e.name == ranges.ITERATION for e in tree)
    if window is None or not steps:
        raise DataError(
            "the trace holds no traced iterations",
            expected=f"a range {ranges.WINDOW!r} around ranges {ranges.ITERATION!r}",
            found=f"{len(events)} events",
        )
    reading = _Reading(tree, window, alone=facts.get("ranks", 1) == 1)
    on_gpu = any(e.category in GPU_CATEGORIES for e in events)
    spent = reading.gpu(events) if on_gpu else reading.cpu()
    scale = 1e-3 / steps
    rows: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    layers: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (place, backward), us in reading.places.items():
        layer, op = split_name(place)
        rows[op][backward] += us * scale
        if layer:
            layers[layer][op] += us * scale
    return Summary(
        device="cuda" if on_gpu else "cpu",
        steps=steps,
        wall_ms=wall_ms / steps,
        parts={part: spent[part] * scale for part in PARTS if spent[part] > 0.0},
        ranges=[
            {"name": op, "forward_ms": ms[0], "backward_ms": ms[1]}
            for op, ms in sorted(rows.items(), key=lambda row: -sum(row[1]))
        ],
        layers={layer: dict(ops) for layer, ops in layers.items()},
        top=[
            {"name": name, "part": part, "calls": reading.calls[name, part] / steps, "ms": us * scale}
            for (name, part), us in sorted(reading.names.items(), key=lambda row: -row[1])[:TOP]
        ],
        gaps=reading.gaps,
        streams={key: _scaled(value, scale) for key, value in reading.streams.items()},
        untraced_ms=untraced_ms,
        facts=facts,
    )


class _Reading:
    """One pass over a trace: microseconds by part, by place (a range of ours, which way), by name."""

    def __init__(self, tree: list[Event], window: Event, alone: bool):
        self.window, self.alone = window, alone
        self.tree = [e for e in tree if e.start >= window.start and e.end <= window.end + 1.0]
        self.places: dict[tuple[str, bool], float] = defaultdict(float)
        self.names: dict[tuple[str, str], float] = defaultdict(float)
        self.calls: Counter[tuple[str, str]] = Counter()
        self.gaps: dict[str, Any] = {}
        self.streams: dict[str, Any] = {}
        self.where = Places(self.tree)
        self.turns = _turns([e for e in self.tree if e.track == window.track and is_ours(e)])

    def count(self, name: str, part: str, event: Event | None, us: float) -> None:
        self.names[name, part] += us
        self.places[self.where.place(event)] += us

    # ---- the CPU's own time ----

    def cpu(self) -> dict[str, float]:
        spent: dict[str, float] = defaultdict(float)
        for event in self.tree:
            if event.track == self.window.track:
                part = _aside(event) or self.cpu_part(event)
                spent[part] += event.self_time
                self.calls[event.name, part] += 1
                self.count(event.name, part, event, event.self_time)
        return spent

    def cpu_part(self, event: Event) -> str:
        names = {e.name for e in event.around()}
        if ranges.DATA in names:
            return DATA_WAIT
        if ranges.ALL_REDUCE in names and not self.alone:
            return COMMUNICATION
        works = event.name.startswith("aten::") and not NO_WORK.match(event.name)
        return self.kind(event.name, event) if works else DISPATCH

    def kind(self, name: str, event: Event | None) -> str:
        """The part of something that computes: by its name, else by the range it is in."""
        named = next((part for part, words in KINDS if words.search(name)), None)
        context = CONTEXT.get(split_name(self.where.place(event)[0])[1])
        if context == OPTIMIZER and named in (None, COPIES, ELEMENTWISE):
            return OPTIMIZER
        if context == ATTENTION and name in ("aten::bmm", "aten::baddbmm"):
            return ATTENTION  # where its scores are a matrix in memory
        return named or context or ELEMENTWISE

    # ---- the GPU's ----

    def gpu(self, events: list[Event]) -> dict[str, float]:
        start, end = self.window.start, self.window.end
        work = [e for e in events if e.category in GPU_CATEGORIES and e.end > start and e.start < end]
        launches = {e.correlation: e.start for e in events if e.category in LAUNCH_CATEGORIES and e.correlation}
        operators = {e.external: e for e in self.tree if e.external}
        known: dict[int, tuple[str, Event | None]] = {}
        for event in work:  # a graph's kernels know no operator, but when they were launched
            source = operators.get(event.external) or self.range_at(launches.get(event.correlation, start))
            part = _aside(source) or self.kind(event.name, source)
            known[id(event)] = part, source
            self.calls[event.name, part] += 1
        spent: dict[str, float] = defaultdict(float)
        busy: dict[str, float] = defaultdict(float)
        idle: list[tuple[float, str, str]] = []
        overlap, last = 0.0, ""
        for piece in pieces(work, start, end):
            if not piece.running:
                for us, within in self.ranges_in(piece.start, piece.end):
                    place = within.name if within else ranges.WINDOW
                    spent[_aside(within) or (DATA_WAIT if place == ranges.DATA else GAPS)] += us
                    self.places[place, False] += us
                within = self.range_at(piece.start)
                idle.append((piece.end - piece.start, last, within.name if within else ranges.WINDOW))
                continue
            us, last = piece.end - piece.start, piece.running[-1].name
            streams = {e.track for e in piece.running}
            overlap += us if len(streams) > 1 else 0.0
            for stream in streams:
                busy[stream] += us
            first = min(_rank(e, known[id(e)][0]) for e in piece.running)
            shown = [e for e in piece.running if _rank(e, known[id(e)][0]) == first]
            for event in shown:
                part, source = known[id(event)]
                spent[part] += us / len(shown)
                self.count(event.name, part, source, us / len(shown))
        idle.sort(key=lambda gap: -gap[0])
        self.gaps = {
            "count": len(idle),
            "median_us": idle[len(idle) // 2][0] if idle else 0.0,
            "longest": [{"us": us, "after": after, "in": place} for us, after, place in idle[:5]],
        }
        collectives = sum(e.duration for e in work if known[id(e)][0] == COMMUNICATION)
        self.streams = {"busy_ms": dict(busy), "overlap_ms": overlap, "communication_ms": collectives}
        return spent

    def range_at(self, time: float) -> Event | None:
        """The innermost range of ours that the thread which trains was in."""
        at = bisect_right(self.turns, time, key=lambda turn: turn[0]) - 1
        return self.turns[at][1] if at >= 0 else None

    def ranges_in(self, start: float, end: float) -> Iterator[tuple[float, Event | None]]:
        """[start, end] as (microseconds, what range_at says in them)."""
        first = bisect_right(self.turns, start, key=lambda turn: turn[0])
        last = bisect_right(self.turns, end, key=lambda turn: turn[0])
        times = [start, *(time for time, _ in self.turns[first:last]), end]
        for begins, ends in zip(times, times[1:]):
            if ends > begins:
                yield ends - begins, self.range_at(begins)


def _turns(events: list[Event]) -> list[tuple[float, Event | None]]:
    """(time, innermost event from then on) of nested events of one track, in order."""
    turns: list[tuple[float, Event | None]] = []
    stack: list[Event] = []
    for event in events:
        while stack and stack[-1].end <= event.start:
            ended = stack.pop()
            turns.append((ended.end, stack[-1] if stack else None))
        stack.append(event)
        turns.append((event.start, event))
    while stack:
        ended = stack.pop()
        turns.append((ended.end, stack[-1] if stack else None))
    return turns


def _aside(event: Event | None) -> str | None:
    """EVALUATION or CHECKPOINT for what is inside one."""
    return next((ASIDE[e.name] for e in event.around() if e.name in ASIDE), None) if event is not None else None


def _rank(event: Event, part: str) -> int:
    return 1 if part == COMMUNICATION else 2 if event.category != "kernel" else 0


def _scaled(value: Any, scale: float) -> Any:
    return {key: item * scale for key, item in value.items()} if isinstance(value, dict) else value * scale
