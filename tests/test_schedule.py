"""schedule.py: rates against closed forms and torch's schedulers, batches against a sum over the iterations."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.schedule import BatchSchedule, learning_rate
from nanogpt_fast.settings.config import Config, DataConfig, OptimConfig

# ---- learning rates ----


def nanogpt_lr(it: int, peak: float, floor: float, warmup: int, end: int) -> float:
    """nanoGPT's schedule from its description: a line up, half a cosine down, then flat."""
    if it < warmup:
        return peak * (it + 1) / (warmup + 1)
    if it > end:
        return floor
    angle = math.pi * (it - warmup) / (end - warmup)
    return floor + (peak - floor) * (1 + math.cos(angle)) / 2


@pytest.mark.parametrize(("warmup", "end"), [(10, 100), (0, 50), (99, 100), (2000, 600_000)])
def test_learning_rate_is_nanogpts(warmup: int, end: int):
    config = OptimConfig(learning_rate=6e-4, min_lr=6e-5, warmup_iters=warmup, lr_decay_iters=end)
    its = [0, 1, warmup - 1, warmup, warmup + 1, (warmup + end) // 2, end - 1, end, end + 1, 10 * end]
    for it in (i for i in its if i >= 0):
        assert learning_rate(it, config) == pytest.approx(nanogpt_lr(it, 6e-4, 6e-5, warmup, end), rel=1e-12), it
    assert learning_rate(warmup, config) == 6e-4 and learning_rate(end + 1, config) == 6e-5


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_decay_without_iterations_is_a_step(schedule: str):
    """Where nanoGPT divides by zero."""
    config = OptimConfig(learning_rate=6e-4, min_lr=6e-5, warmup_iters=10, lr_decay_iters=10, schedule=schedule)  # type: ignore[arg-type]
    assert [learning_rate(it, config) for it in (9, 10, 11)] == [6e-4 * 10 / 11, 6e-4, 6e-5]


def test_constant_learning_rate_has_no_warm_up():
    config = OptimConfig(learning_rate=3e-4, decay_lr=False, warmup_iters=100)
    assert {learning_rate(it, config) for it in (0, 50, 10**7)} == {3e-4}


WARMUP, BEGIN, END, PEAK, FLOOR = 10, 60, 100, 1e-2, 1e-3


def settings(schedule: str, **changes: float) -> OptimConfig:
    """10 iterations of warm-up; wsd's decay from 60 to 100."""
    numbers = dict(warmup_iters=WARMUP, lr_decay_iters=END, learning_rate=PEAK, min_lr=FLOOR, decay_ratio=0.4)
    return OptimConfig(schedule=schedule, **numbers | changes)  # type: ignore[arg-type]


def torch_rates(schedule: str, iterations: int) -> list[float]:
    """The same by torch's schedulers, one after another."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=PEAK)

    def line(start: float, end: float, iterations: int) -> LRScheduler:
        return LinearLR(optimizer, start, end, iterations)

    flat = ConstantLR(optimizer, 1.0, END)
    warmup, floor = line(1 / (WARMUP + 1), 1.0, WARMUP), FLOOR / PEAK
    parts: dict[str, tuple[list[LRScheduler], list[int]]] = {
        "cosine": ([warmup, CosineAnnealingLR(optimizer, END - WARMUP, FLOOR)], [WARMUP]),
        "linear": ([warmup, line(1.0, floor, END - WARMUP)], [WARMUP]),
        "wsd": ([warmup, flat, line(1.0, floor, END - BEGIN)], [WARMUP, BEGIN]),
        "constant": ([warmup, flat], [WARMUP]),
    }
    scheduler, rates = SequentialLR(optimizer, *parts[schedule]), []
    for _ in range(iterations):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_rates_are_those_of_torchs_schedulers(schedule: str):
    ours = [learning_rate(it, settings(schedule)) for it in range(END + 1)]
    assert ours == pytest.approx(torch_rates(schedule, END + 1), rel=1e-9)


@pytest.mark.parametrize(
    "schedule, rates",
    [
        ("linear", {9: PEAK * 10 / 11, 10: PEAK, 55: (PEAK + FLOOR) / 2, 99: 0.0011, 100: FLOOR, 101: FLOOR}),
        ("wsd", {9: PEAK * 10 / 11, 10: PEAK, 60: PEAK, 61: 0.009775, 80: (PEAK + FLOOR) / 2, 100: FLOOR, 101: FLOOR}),
        ("constant", {0: PEAK / 11, 9: PEAK * 10 / 11, 10: PEAK, 100: PEAK, 10**7: PEAK}),
    ],
)
def test_rates_at_the_boundaries(schedule: str, rates: dict[int, float]):
    assert {it: learning_rate(it, settings(schedule)) for it in rates} == pytest.approx(rates, rel=1e-12)


def test_wsd_decays_over_the_last_part_of_all_iterations():
    assert OptimConfig(schedule="wsd").decay_begins == 480_000
    assert settings("wsd", decay_ratio=0.9).decay_begins == WARMUP  # just possible
    with pytest.raises(ConfigError, match="before the warm-up ends") as caught:
        settings("wsd", decay_ratio=0.91)
    assert caught.value.expected == "warmup_iters <= 9"


@pytest.mark.parametrize("schedule", ["linear", "wsd", "constant"])
def test_a_schedule_without_decay_is_a_contradiction(schedule: str):
    with pytest.raises(ConfigError, match="contradicts --decay_lr=False") as caught:
        settings(schedule, decay_lr=False)
    assert "--schedule=constant" in caught.value.hint


# ---- batches ----


def batches(ramp: str, full: int) -> BatchSchedule:
    return BatchSchedule.of(DataConfig(batch_ramp=ramp, gradient_accumulation_steps=full, batch_size=3, block_size=5))


def test_without_a_ramp_every_iteration_is_full():
    found = batches("", 40)
    assert {found.accumulation_at(it) for it in (0, 1, 10**6)} == {40}
    assert [found.micro_batches_before(it) for it in (0, 1, 600_000)] == [0, 40, 24_000_000]
    assert found.tokens_before(2) == 2 * 40 * 3 * 5


def test_the_ramp_of_the_help_text():
    """8:2000 up to 40: five sizes, 500 iterations each of the first four."""
    found = batches("8:2000", 40)
    stages = [(size, len(list(its))) for size, its in itertools.groupby(map(found.accumulation_at, range(2300)))]
    assert stages == [(8, 500), (16, 500), (24, 500), (32, 500), (40, 300)]
    assert found.micro_batches_before(2000) == 500 * (8 + 16 + 24 + 32)
    assert found.tokens_before(600_000) == (40_000 + 598_000 * 40) * 15


@pytest.mark.parametrize(
    "ramp, full", [("1:7", 12), ("8:100", 12), ("5:1", 40), ("16:999", 40), ("7:13", 7), ("1:3", 1000), ("9:10", 11)]
)
def test_a_ramp_is_a_line_in_steps_that_all_ranks_can_share(ramp: str, full: int):
    found, (start, iterations) = batches(ramp, full), map(int, ramp.split(":"))
    step, total = math.gcd(start, full), 0
    for it in range(2 * iterations + 2):
        size = found.accumulation_at(it)
        line = min(Fraction(full), start + Fraction(full - start, iterations) * it)
        assert size % step == 0 and line - step < size <= line, "the last whole step under the line"
        assert found.micro_batches_before(it) == total
        total += size
    assert found.accumulation_at(0) == start and found.accumulation_at(iterations) == full


def test_a_long_ramp_is_summed_at_once():
    """The sum of k n // m over k < m is ((n-1)(m-1) + gcd(n, m) - 1) / 2: the points below a rectangle's diagonal."""
    n, m = 10**9, 10**11
    found = batches(f"1:{m}", n + 1)
    assert found.micro_batches_before(m) == m + ((n - 1) * (m - 1) + math.gcd(n, m) - 1) // 2
    assert found.micro_batches_before(m + 2) - found.micro_batches_before(m) == 2 * (n + 1)


@pytest.mark.parametrize("ramp", ["8", "8:", ":2000", "0:10", "41:10", "8:0", "-8:10", "8:2e3", "8:10:2"])
def test_anything_but_start_and_iterations_is_refused(ramp: str):
    with pytest.raises(ConfigError, match="--batch_ramp is out of range") as caught:
        Config().replace(batch_ramp=ramp)
    assert "START:ITERS" in caught.value.expected and "gradient_accumulation_steps = 40" in caught.value.expected
