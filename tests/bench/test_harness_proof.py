"""That nanogpt_fast.timing finds what is there and nothing else, shown on a clock that only the timed calls advance."""

import random
import statistics
import time
from collections.abc import Callable, Iterator

import harness
import pytest
import torch

from nanogpt_fast import timing
from nanogpt_fast.timing import Arm


class Clock:
    """A perf_counter. A call takes its own seconds times what the machine is like by then: it drifts, and has noise of
    that relative size."""

    def __init__(self, drift_a_second: float = 0.0, noise: float = 0.0):
        self.now, self.drift, self.noise, self.random = 0.0, drift_a_second, noise, random.Random(3)
        self.called: list[str] = []

    def call(self, seconds: float, name: str = "") -> Callable[[], None]:
        def run() -> None:
            slower = (1.0 + self.drift * self.now) * (1.0 + self.random.uniform(-self.noise, self.noise))
            self.called.append(name)
            self.now += seconds * slower

        return run


@pytest.fixture
def with_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Clock], Clock]]:
    def install(clock: Clock) -> Clock:
        monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
        return clock

    yield install


def ratio(times: dict[str, list[float]]) -> tuple[float, float, float]:
    found = harness.paired(times["b"], times["a"], "x")
    return found["x_q1"], found["x"], found["x_q3"]


def arms(clock: Clock, slower: float = 1.0) -> dict[str, Arm]:
    return {"a": timing.make_cpu_arm([clock.call(1e-3)]), "b": timing.make_cpu_arm([clock.call(1e-3 * slower)])}


def test_identical_variants_differ_by_less_than_the_spread(with_clock: Callable):
    clock = with_clock(Clock(noise=0.2))
    q1, middle, q3 = ratio(timing.interleaved(arms(clock), 31))
    assert q1 < 1.0 < q3 and abs(middle - 1.0) < q3 - q1


def test_a_planted_slowdown_of_a_tenth_is_found(with_clock: Callable):
    clock = with_clock(Clock(noise=0.2))
    q1, middle, _ = ratio(timing.interleaved(arms(clock, slower=1.1), 31))
    assert q1 > 1.0 and middle == pytest.approx(1.1, abs=0.03)


def test_a_machine_that_drifts_does_not_bias_the_ratio(with_clock: Callable):
    """From round to round it gets slower, to twice the time: one arm after the other would see a third."""
    clock = with_clock(Clock(drift_a_second=0.6))
    lined_up, rounds = arms(clock), 30
    times = timing.interleaved(lined_up, rounds)
    assert times["a"][-1] > 1.9 * times["a"][0]
    q1, middle, q3 = ratio(times)
    assert q1 < 1.0 < q3 and middle == pytest.approx(1.0, abs=0.005)
    clock.now = 0.0
    apart = {name: timing.interleaved({name: arm}, rounds)[name] for name, arm in lined_up.items()}
    assert statistics.median(apart["b"]) / statistics.median(apart["a"]) > 1.3


def test_the_order_rotates_and_the_first_round_is_dropped(with_clock: Callable):
    clock = with_clock(Clock())
    lined_up = {name: Arm(clock.call(5e-3, name), 2, "cpu") for name in "abc"}
    lined_up["b"].replays = 2
    times = timing.interleaved(lined_up, 3)
    assert "".join(clock.called) == "abbc" + "bbca" + "cabb" + "abbc"
    assert times == {name: pytest.approx([2.5] * 3) for name in "abc"}
    with pytest.raises(ValueError, match="together"):
        timing.interleaved({"a": Arm(lambda: None, 1, "cpu"), "b": Arm(lambda: None, 1, "graph")}, 3)


def test_a_cpu_s_span_is_long_enough(with_clock: Callable):
    clock = with_clock(Clock())
    quick, slow = timing.make_cpu_arm([clock.call(4e-4)] * 2), timing.make_arm([clock.call(0.5)], None, True, "cpu")
    assert (quick.how, quick.calls, quick.replays) == ("cpu", 2, 32)  # 16 turns of 0.8 ms are 12.8 ms, 32 are 25.6
    assert (slow.calls, slow.replays) == (1, 1)
    with pytest.raises(RuntimeError, match="5.0 s a call"):
        timing.make_cpu_arm([clock.call(5.0)])


def test_inputs_overflow_the_cache_of_the_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(harness.machine, "cache_bytes", lambda: 32 << 20)
    assert harness.input_sets(50 << 20, "cpu") == 2 and harness.input_sets(1, "cpu") == harness.MOST_CPU_SETS
    assert harness.input_sets(200 << 20, "cpu") == 1


def test_paired_is_by_round_and_refuses_what_noise_ate():
    assert harness.paired([2.0, 6.0, 20.0], [1.0, 2.0, 5.0], "x") == {"x": 3.0, "x_q1": 2.5, "x_q3": 3.5}
    assert harness.paired([1.0, 2.0], [1.0, -0.5], "x") == {}
    with pytest.raises(ValueError):
        harness.paired([1.0, 2.0], [1.0], "x")


def test_memory_is_collected_for_a_gpu_only(monkeypatch: pytest.MonkeyPatch):
    collected: list[int] = []
    monkeypatch.setattr(harness.gc, "collect", lambda: collected.append(1))
    harness.release(torch.device("cpu"))
    assert not collected
    harness.release(torch.device("cuda"))
    assert collected
