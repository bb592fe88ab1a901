"""adamw_ against torch.optim.AdamW and torch's clipping, and its promise to write nothing for a non-finite norm."""

import math
from dataclasses import dataclass

import pytest
import torch
from nanogpt_kernels.contract import GRAD_NORM, LOSS_SCALE, LR, MAX_NORM, STEP
from nanogpt_kernels.reference import adamw_, grad_norm
from torch import Tensor

N, BETAS, EPS = 700, (0.9, 0.95), 1e-8
SEGMENTS = [(0, 128, 0.1), (128, 256, 0.0), (256, 512, 0.1), (512, 700, 0.3)]


@dataclass
class Flat:
    """The buffers of one optimizer."""

    master: Tensor
    m: Tensor
    v: Tensor
    scalars: Tensor
    p: Tensor | None = None

    def update(self, g: Tensor) -> None:
        self.scalars[GRAD_NORM] = grad_norm(g).double()
        adamw_(self.p, self.master, self.m, self.v, g, self.scalars, SEGMENTS, *BETAS, EPS)


def flat(dtype: torch.dtype = torch.float32, *, max_norm: float = 0.0, loss_scale: float = 1.0) -> Flat:
    master = gradient(0).to(dtype)
    scalars = torch.zeros(5, dtype=torch.float64)
    scalars[LR], scalars[MAX_NORM], scalars[LOSS_SCALE] = 1e-2, max_norm, loss_scale
    return Flat(master, torch.zeros_like(master), torch.zeros_like(master), scalars)


def gradient(seed: int) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed))


def torch_adamw(master: Tensor) -> tuple[list[torch.nn.Parameter], torch.optim.AdamW]:
    """torch's own loop over one parameter a segment, nothing fused."""
    parts = [torch.nn.Parameter(master[a:b].clone()) for a, b, _ in SEGMENTS]
    groups = [{"params": [part], "weight_decay": decay} for part, (_, _, decay) in zip(parts, SEGMENTS)]
    return parts, torch.optim.AdamW(groups, lr=1e-2, betas=BETAS, eps=EPS, foreach=False, fused=False)


def scatter(g: Tensor, parts: list[torch.nn.Parameter]) -> None:
    for part, (a, b, _) in zip(parts, SEGMENTS):
        part.grad = g[a:b].clone()


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0], ids=lambda s: f"loss scale {s:g}")
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6], ids=["no clipping", "clipped", "never clipped"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-7)], ids=str)
def test_equals_torch(dtype: torch.dtype, tolerance: float, max_norm: float, loss_scale: float):
    """Ten steps with a rate that changes. float64's tolerance is the divisor's, which is float32 as torch's op asks."""
    ours = flat(dtype, max_norm=max_norm, loss_scale=loss_scale)
    parts, theirs = torch_adamw(ours.master)
    for step in range(10):
        g = gradient(100 + step).to(dtype) * (step + 1)
        lr = 1e-2 / (step + 1)
        ours.scalars[LR] = lr
        for group in theirs.param_groups:
            group["lr"] = lr
        scatter(g, parts)
        if max_norm:
            torch.nn.utils.clip_grad_norm_(parts, max_norm)
        theirs.step()
        ours.update(g * loss_scale)
    state = [theirs.state[part] for part in parts]
    torch.testing.assert_close(ours.master, torch.cat([p.detach() for p in parts]), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.m, torch.cat([s["exp_avg"] for s in state]), rtol=1e-5, atol=tolerance)
    torch.testing.assert_close(ours.v, torch.cat([s["exp_avg_sq"] for s in state]), rtol=1e-5, atol=tolerance)
    assert ours.scalars[STEP] == 10


def test_float64_without_a_divisor_is_exact():
    ours = flat(torch.float64)
    parts, theirs = torch_adamw(ours.master)
    for step in range(5):
        g = gradient(step).double()
        scatter(g, parts)
        theirs.step()
        ours.update(g)
    torch.testing.assert_close(ours.master, torch.cat([p.detach() for p in parts]), rtol=1e-13, atol=1e-13)


def test_first_step_by_hand():
    """After one step m / (1 - beta1) = g and v / (1 - beta2) = g^2: every element moves by lr, after its decay."""
    ours = flat()
    before, g = ours.master.clone(), gradient(1)
    ours.update(g.clone())
    decay = torch.cat([torch.full((b - a,), d) for a, b, d in SEGMENTS])
    torch.testing.assert_close(ours.master, before * (1 - 1e-2 * decay) - 1e-2 * g.sign(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_are_the_rounded_master(dtype: torch.dtype):
    """The update happens in the master: steps too small for bfloat16 are not lost."""
    ours, alone = flat(), flat()
    ours.p = ours.master.to(dtype)
    ours.scalars[LR] = alone.scalars[LR] = 1e-5
    for step in range(20):
        ours.update(gradient(step))
        alone.update(gradient(step))
    assert torch.equal(ours.master, alone.master) and torch.equal(ours.p, ours.master.to(dtype))
    assert not torch.equal(ours.p, gradient(0).to(dtype))


@pytest.mark.parametrize("max_norm", [0.0, 1.0], ids=["no clipping", "clipping"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_gradient_writes_nothing(bad: float, max_norm: float):
    """0 * nan is nan: an update scaled by zero would not do. Bit for bit, the step count too."""
    ours = flat(max_norm=max_norm, loss_scale=8.0)
    ours.p = p = ours.master.to(torch.bfloat16)
    ours.update(gradient(1))
    kept = (ours.master, ours.m, ours.v, p, ours.scalars[:GRAD_NORM])
    before = [t.clone() for t in kept]
    g = gradient(2)
    g[N - 1] = bad
    ours.update(g)
    assert all(torch.equal(a, b) for a, b in zip(before, kept))
    ours.update(gradient(3))
    assert ours.scalars[STEP] == 2 and torch.isfinite(ours.master).all()


def test_zero_gradient_of_padding_leaves_it_zero():
    ours = flat()
    ours.master[600:] = 0.0
    for step in range(5):
        g = gradient(step)
        g[600:] = 0.0
        ours.update(g)
    assert (ours.master[600:] == 0).all() and (ours.v[600:] == 0).all() and (ours.master[:600] != 0).all()
