"""A profiler's trace as plain records: what ran, when, on which thread or stream, inside what.

torch.profiler writes Chrome's Trace Event Format (JSON, gzipped or not): complete events (`"ph": "X"`), microseconds.
Operators and ranges are on CPU threads, kernels and copies on a GPU's streams. Nothing here needs torch or a GPU.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogpt_fast.errors import DataError

CPU_CATEGORIES = ("cpu_op", "user_annotation")
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCH_CATEGORIES = ("cuda_runtime", "cuda_driver")


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
