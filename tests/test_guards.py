"""LossGuard: which losses it refuses, against numpy; what a checkpoint keeps of it; a whole step that it refuses."""

import math

import numpy as np
import pytest
import torch
from test_step import batch, make, master

from nanogpt_fast.guards import MIN_SPREAD, LossGuard
from nanogpt_fast.optim import STEP

CPU = torch.device("cpu")


def losses(count: int, spikes: dict[int, float], seed: int = 0) -> list[float]:
    """A slowly falling curve with noise; at some places other values."""
    rng = np.random.default_rng(seed)
    return [spikes.get(i, 3.0 - 0.002 * i + 0.05 * rng.standard_normal()) for i in range(count)]


def refused(guard: LossGuard, curve: list[float]) -> list[int]:
    """Where it refused, feeding the curve as a run would."""
    found = []
    for i, value in enumerate(curve):
        loss = torch.tensor(value, dtype=torch.float64)
        verdict = guard.refuses(loss)
        guard.add(loss, verdict)
        if verdict:
            found.append(i)
    return found


def by_numpy(curve: list[float], sigma: float, window: int) -> list[int]:
    found, kept = [], []
    for i, value in enumerate(curve):
        last = np.array(kept[-window:])
        spike = len(last) == window and value - last.mean() > sigma * max(last.std(), MIN_SPREAD)
        if spike or not math.isfinite(value):
            found.append(i)
        else:
            kept.append(value)
    return found


@pytest.mark.parametrize("sigma", [3.0, 6.0])
@pytest.mark.parametrize("window", [2, 7, 32])
def test_refuses_what_numpy_finds(sigma: float, window: int):
    curve = losses(200, {5: 9.0, 60: 3.4, 90: 50.0, 91: 40.0, 120: math.nan, 121: math.inf, 150: -3.0})
    want = by_numpy(curve, sigma, window)
    assert {90, 91, 120, 121} <= set(want) and 150 not in want and (5 in want) == (window == 2)
    assert refused(LossGuard(sigma, window, CPU), curve) == want


def test_without_a_sigma_only_what_is_not_finite():
    guard = LossGuard(0.0, 128, CPU)
    assert refused(guard, losses(50, {20: 1e9, 30: math.inf, 31: math.nan})) == [30, 31]
    assert guard.state_dict() == {}


def test_losses_that_hardly_differ_are_no_spikes():
    guard = LossGuard(6.0, 4, CPU)
    assert refused(guard, [1.0, 1.0, 1.0, 1.0, 1.0 + 5 * MIN_SPREAD, 1.0 + 60 * MIN_SPREAD]) == [5]


@pytest.mark.parametrize("cut", [3, 8, 95])
def test_a_resumed_guard_goes_on(cut: int):
    """Before the ring is full, when it just is, and after it has turned."""
    curve = losses(200, {90: 9.0, 100: 9.0})
    whole, first, second = (LossGuard(6.0, 8, CPU) for _ in range(3))
    before = refused(first, curve[:cut])
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert before + [cut + i for i in refused(second, curve[cut:])] == refused(whole, curve)


def test_a_checkpoint_of_another_window_gives_its_newest_losses():
    longer, shorter, none = LossGuard(6.0, 8, CPU), LossGuard(6.0, 3, CPU), LossGuard(0.0, 8, CPU)
    refused(longer, [float(i) for i in range(10)])
    shorter.load_state_dict(longer.state_dict())
    none.load_state_dict(longer.state_dict())
    assert shorter.state_dict() == {"recent_losses": [7.0, 8.0, 9.0]} and none.state_dict() == {}
    longer.load_state_dict({})
    assert longer.state_dict() == {"recent_losses": []}


# ---- in a step ----


def test_a_refused_step_leaves_every_bit():
    """A spike: the gradient is finite, and still nothing of it reaches a parameter, a moment or the step count."""
    step = make()
    step.guard = LossGuard(6.0, 3, CPU)
    for iteration in range(3):
        step(batch(1, 2), iteration)
    optimizer = step.optimizer
    kept = (master(step), optimizer.m, optimizer.v, optimizer.scalars[STEP])
    before = [t.clone() for t in kept]
    step.guard.losses.sub_(2.0)  # as if the losses so far had been far lower
    result = step(batch(1, 2, seed=9), 3)
    report = step.read().get()
    assert report.refused and report.bad_steps == 1 and math.isfinite(report.grad_norm)
    assert (report.loss, report.grad_norm) == (result.loss.item(), result.grad_norm.item())
    assert all(torch.equal(a, b) for a, b in zip(before, kept)) and (optimizer.flat.grad == 0).all()
    step.guard.losses.add_(2.0)
    step(batch(1, 2, seed=9), 3)
    assert not step.read().get().refused and not torch.equal(before[0], master(step))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_loss_that_is_not_finite_leaves_every_bit(dtype: torch.dtype):
    """An infinite loss beside a finite gradient: refused too; float16's scale, which did not overflow, stays."""
    step = make(dtype)
    step(batch(1, 2), 0)
    before, scale = master(step).clone(), float(step.optimizer.loss_scale)
    step.optimizer.flat.grad.zero_()
    forward = step.model.forward
    step.model.forward = lambda *args: (forward(*args)[0], torch.full((2,), math.inf))  # type: ignore[method-assign]
    result = step(batch(1, 2, seed=1), 1)
    assert torch.isinf(result.loss) and torch.isfinite(result.grad_norm)
    assert torch.equal(before, master(step)) and step.read().get().bad_steps == 1
    assert float(step.optimizer.loss_scale) == scale
