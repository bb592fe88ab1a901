"""A profiler's trace as plain records: what ran, when, on which thread or stream, inside what.

torch.profiler writes Chrome's Trace Event Format (JSON, gzipped or not): complete events (`"ph": "X"`), microseconds.
Operators and ranges are on CPU threads, kernels and copies on a GPU's streams. Nothing here needs torch or a GPU.
"""

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogpt_fast.errors import DataError
from nanogpt_fast.run import ranges

CPU_CATEGORIES = ("cpu_op", "user_annotation")
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCH_CATEGORIES = ("cuda_runtime", "cuda_driver")
OPS = {"embedding", "norm", "add_norm", "qkv_attention", "cached_attention", "linear", "mlp", "linear_cross_entropy"}
OUR_RANGES = {
    *OPS, ranges.WINDOW, ranges.ITERATION, ranges.DATA, ranges.STEP, ranges.FORWARD, ranges.BACKWARD, ranges.ALL_REDUCE,
    ranges.GRAD_NORM, ranges.UPDATE, ranges.EVALUATION, ranges.CHECKPOINT, ranges.LOG,
}  # fmt: skip


@dataclass(slots=True, eq=False)
class Event:
    """One complete event; times in microseconds."""

    name: str
    category: str
    start: float
    duration: float
    track: str = "main"  # a CPU thread, or a GPU's stream
    external: int = 0  # a kernel's is that of the operator that launched it
    correlation: int = 0  # a kernel's is that of its launch
    sequence: int = -1  # an operator's in autograd's order; its backward's is the same
    backward: bool = False  # run by autograd's engine
    parent: "Event | None" = field(default=None, repr=False)
    self_time: float = 0.0  # without the events inside it; nest() sets both

    @property
    def end(self) -> float:
        return self.start + self.duration

    def around(self) -> Iterator["Event"]:
        """This event and those it is inside of, the innermost first."""
        event: Event | None = self
        while event is not None:
            yield event
            event = event.parent


def read(path: Path) -> list[Event]:
    """The events of a trace file. DataError where it is none."""
    try:
        data = path.read_bytes()
        trace = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        return parse(trace["traceEvents"])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "this is no trace of torch.profiler",
            where=str(path),
            expected="Chrome's trace JSON, gzipped or not",
            found=f"{type(error).__name__}: {error}",
        ) from None


def parse(records: Iterable[dict[str, Any]]) -> list[Event]:
    """The complete events among the records of `traceEvents`."""
    events = []
    for record in records:
        if record.get("ph") != "X":
            continue
        args, category = record.get("args", {}), record.get("cat", "")
        on_gpu = category in GPU_CATEGORIES
        track = f"stream {args.get('stream', record.get('tid'))}" if on_gpu else f"{record['pid']}/{record['tid']}"
        name = str(record["name"])
        events.append(
            Event(
                name,
                category,
                float(record["ts"]),
                float(record.get("dur", 0.0)),
                track,
                external=int(args.get("External id", 0)),
                correlation=int(args.get("correlation", 0)),
                sequence=int(args.get("Sequence number", -1)),
                backward=name.startswith("autograd::engine::evaluate_function"),
            )
        )
    return events


def nest(events: Iterable[Event]) -> list[Event]:
    """CPU events with `parent` and `self_time` set, track by track, in order of their starts.

    On a thread events nest: the self times of those inside a range add up to it.
    """
    chosen = sorted((e for e in events if e.category in CPU_CATEGORIES), key=lambda e: (e.track, e.start, -e.duration))
    stack: list[Event] = []
    for event in chosen:
        while stack and (stack[-1].track != event.track or stack[-1].end <= event.start):
            stack.pop()
        event.parent, event.self_time = (stack[-1] if stack else None), event.duration
        if event.parent is not None:
            event.parent.self_time -= min(event.end, event.parent.end) - event.start
        stack.append(event)
    return chosen


@dataclass(frozen=True)
class Piece:
    """A stretch of a GPU's time in which the same things ran; none: it was idle."""

    start: float
    end: float
    running: tuple[Event, ...]


def pieces(events: Iterable[Event], start: float, end: float) -> Iterator[Piece]:
    """[start, end] cut wherever something on a GPU begins or ends."""
    marks: list[tuple[float, bool, int]] = []
    running: dict[int, Event] = {}
    known: list[Event] = []
    for event in events:
        if event.category in GPU_CATEGORIES and event.end > start and event.start < end and event.duration > 0:
            marks += [(max(event.start, start), True, len(known)), (min(event.end, end), False, len(known))]
            known.append(event)
    at = start
    for time, begins, which in sorted(marks):
        if time > at:
            yield Piece(at, time, tuple(running.values()))
            at = time
        if begins:
            running[which] = known[which]
        else:
            del running[which]
    if end > at:
        yield Piece(at, end, ())


# ---- our ranges among the events ----


def split_name(name: str) -> tuple[str, str]:
    """("h3", "mlp") of h3.mlp, ("", name) of any other."""
    found = re.fullmatch(r"(h\d+)\.(\w+)", name)
    return (found[1], found[2]) if found else ("", name)


def is_ours(event: Event) -> bool:
    return split_name(event.name)[1] in OUR_RANGES


class Places:
    """Which range of ours an event of nest()'s belongs to; a backward event to that of what it differentiates."""

    def __init__(self, tree: Iterable[Event]):
        # By autograd's number, which operators without a gradient show before the one that takes it: the last counts.
        forward = [e for e in tree if e.sequence >= 0 and not any(a.backward for a in e.around())]
        self._forward = {e.sequence: e for e in forward}

    def place(self, event: Event | None) -> tuple[str, bool]:
        """(the innermost range of ours, whether this is its backward)."""
        if event is None:
            return ranges.WINDOW, False
        engine = next((e for e in event.around() if e.backward), None)
        if engine is None:
            found = _range(event)
            return found, found == ranges.BACKWARD
        source = self._forward.get(engine.sequence)
        return (_range(source) if source is not None else ranges.BACKWARD), True


def _range(event: Event) -> str:
    return next((e.name for e in event.around() if is_ours(e)), ranges.WINDOW)
