"""nanogpt_fast.timing, with a made-up clock and made-up graphs. No time is asserted that a machine took."""

import contextlib
from typing import Any

import harness
import pytest
import torch

from nanogpt_fast import timing
from nanogpt_fast.timing import Arm


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[FakeEvent]:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return FakeEvent


class FakeGraph:
    """Calls what it captured, at 4 ms a call."""

    captured: list[Any] = []

    def replay(self) -> None:
        FakeEvent.now += 4.0 * len(self.captured)


ERRORS = [None, RuntimeError("not permitted when stream is capturing"), RuntimeError("shape"), torch.OutOfMemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_an_arm_is_a_graph_or_events(error: Exception | None, clock: type[FakeEvent], monkeypatch: pytest.MonkeyPatch):
    capturing, counted = [], []

    def call() -> None:
        clock.now += 1.0
        if capturing:
            counted.append(1)
            if error:
                raise error

    @contextlib.contextmanager
    def graph(graph: FakeGraph, pool: Any, stream: Any):
        assert pool == "pool"
        graph.captured = counted
        capturing.append(1)
        try:
            yield
        finally:
            capturing.clear()

    class Stream:
        def wait_stream(self, other: Any) -> None: ...

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    if error is not None and "captur" not in str(error):
        with pytest.raises(type(error)):
            timing.make_arm([call, call], "pool")
        return
    arm = timing.make_arm([call, call], "pool")
    if error:
        assert (arm.how, arm.calls, arm.replays) == ("events", 2, 4)
    else:  # 1 ms a call: 8 calls fill REPLAY_MS, and their replay takes 32 ms
        assert (arm.how, arm.calls, arm.replays) == ("graph", 8, 1) and len(counted) == 8
    assert timing.make_arm([call], "pool", capturable=False).how == "events"


def test_arms_run_in_turn_and_the_first_round_is_dropped(clock: type[FakeEvent]):
    ran: list[str] = []

    def replay(name: str, ms: float):
        def run() -> None:
            ran.append(name)
            clock.now += ms if len(ran) > 3 else 1000.0

        return run

    arms = {"a": Arm(replay("a", 6.0), calls=2, how="graph", replays=1), "b": Arm(replay("b", 5.0), 1, "graph", 2)}
    busy: list[int] = []
    times = timing.interleaved(arms, 3, lambda: busy.append(len(ran)))
    assert "".join(ran) == "abb" + "bba" + "abb" + "bba" and busy == [len(ran)]
    assert times == {"a": [3.0] * 3, "b": [5.0] * 3}
    assert timing.interleaved({}, 3) == {}


def test_summary_is_median_and_quartiles():
    assert harness.summary([1.0, 2.0, 3.0, 4.0, 100.0]) == {"ms": 3.0, "q1": 2.0, "q3": 4.0}
    assert harness.summary([2.0]) == {"ms": 2.0, "q1": 2.0, "q3": 2.0}
