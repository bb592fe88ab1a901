"""A scaling law fitted to runs: (parameters, tokens, final loss) to E, A, B, alpha, beta, and how far to trust them.

    found = fit(params, tokens, losses)                 found.law.loss(N, D), found.law.optimum(C)
    laws = bootstrap(params, tokens, losses, found)     interval(laws, lambda law: law.optimum(1e18)[0])

As Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3) did it: the Huber loss of log L, delta = 1e-3, by L-BFGS from a
grid of starts. Not as there, where by arXiv 2404.10102 a poor scale of the loss stopped the optimizer before it
converged: residuals are counted in deltas, and the variables are centred, since A and alpha, B and beta trade off
against each other almost freely. Fit.gradient says that it is a minimum.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanogpt_fast.scaling_laws import Law

Numbers = Sequence[float] | np.ndarray
DELTA = 1e-3  # of log L: residuals beyond it count by their size, not its square
# The grid of starts of Hoffmann et al., appendix D.3: 4,500 of log A, log B, log E, alpha, beta.
STARTS = ((0, 5, 10, 15, 20, 25), (0, 5, 10, 15, 20, 25), (-1, -0.5, 0, 0.5, 1), (0, 0.5, 1, 1.5, 2),
          (0, 0.5, 1, 1.5, 2))  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """A law, and how well it fits."""

    law: Law
    objective: float  # the sum of Huber losses, in deltas
    gradient: float  # its largest component there: 0 at a minimum
    residuals: np.ndarray  # log of the measured loss over the law's, a run

    @property
    def theta(self) -> list[float]:
        return [math.log(self.law.A), math.log(self.law.B), math.log(self.law.E), self.law.alpha, self.law.beta]


class _Problem:
    """The objective in centred variables: log A - alpha mean(log N), log B - beta mean(log D), log E, alpha, beta."""

    def __init__(self, params: Numbers, tokens: Numbers, losses: Numbers, delta: float):
        n, d, l = (torch.as_tensor(np.asarray(values, dtype=float)).log() for values in (params, tokens, losses))
        if not n.shape == d.shape == l.shape or n.dim() != 1:
            raise ValueError(f"params, tokens and losses are as many: {n.shape}, {d.shape}, {l.shape}")
        if not all(bool(values.isfinite().all()) for values in (n, d, l)):
            raise ValueError("params, tokens and losses are positive and finite")
        if len(l) < 6 or len(n.unique()) < 3 or len(d.unique()) < 3:
            raise ValueError(f"five numbers cannot be told from {len(l)} runs of {len(n.unique())} sizes")
        self.n, self.d, self.l, self.delta = n - n.mean(), d - d.mean(), l, delta
        self.means = float(n.mean()), float(d.mean())

    def centred(self, theta: Tensor) -> Tensor:
        """Of log A, log B, log E, alpha, beta in the last dimension."""
        a, b, e, alpha, beta = theta.unbind(-1)
        return torch.stack([a - alpha * self.means[0], b - beta * self.means[1], e, alpha, beta], -1)

    def residuals(self, theta: Tensor) -> Tensor:
        a, b, e, alpha, beta = (one[..., None] for one in theta.unbind(-1))
        parts = torch.stack(torch.broadcast_tensors(a - alpha * self.n, b - beta * self.d, e))
        return self.l - parts.logsumexp(0)

    def objective(self, theta: Tensor, weights: Tensor | None = None) -> Tensor:
        size = (self.residuals(theta) / self.delta).abs()
        huber = torch.where(size <= 1, 0.5 * size.square(), size - 0.5)
        return (huber if weights is None else huber * weights).sum(-1)

    def minimum(self, start: Tensor, weights: Tensor | None = None) -> tuple[Tensor, float, float]:
        """(theta, objective, largest component of its gradient) by L-BFGS from a start."""
        theta = start.clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS([theta], max_iter=500, history_size=20, tolerance_grad=1e-6,
                                      tolerance_change=1e-12, line_search_fn="strong_wolfe")  # fmt: skip

        def closure() -> Tensor:
            optimizer.zero_grad()
            objective = self.objective(theta, weights)
            objective.backward()
            return objective

        optimizer.step(closure)
        objective = closure()
        assert theta.grad is not None
        return theta.detach(), float(objective.detach()), float(theta.grad.abs().max())

    def law(self, theta: Tensor, name: str) -> Law:
        a, b, e, alpha, beta = theta.tolist()
        n, d = self.means
        return Law(name, math.exp(e), math.exp(a + alpha * n), math.exp(b + beta * d), alpha, beta)


def fit(
    params: Numbers,
    tokens: Numbers,
    losses: Numbers,
    *,
    delta: float = DELTA,
    tries: int = 8,
    name: str = "fit",
) -> Fit:
    """The law of least Huber loss; L-BFGS runs from the best `tries` of the grid of starts. ValueError for runs that
    cannot tell five numbers."""
    problem = _Problem(params, tokens, losses, delta)
    grid = torch.cartesian_prod(*(torch.tensor(values, dtype=torch.float64) for values in STARTS))
    starts = problem.centred(grid)
    order = problem.objective(starts).nan_to_num(nan=math.inf).argsort()
    found = [problem.minimum(starts[i]) for i in order[:tries]]
    theta, objective, gradient = min((one for one in found if math.isfinite(one[1])), key=lambda one: one[1])
    return Fit(problem.law(theta, name), objective, gradient, problem.residuals(theta).numpy())


def bootstrap(
    params: Numbers,
    tokens: Numbers,
    losses: Numbers,
    found: Fit,
    *,
    samples: int = 400,
    seed: int = 0,
    delta: float = DELTA,
) -> list[Law]:
    """Laws of the runs drawn anew with replacement, each fitted from where all of them led."""
    problem, draw = _Problem(params, tokens, losses, delta), np.random.default_rng(seed)
    start, runs = problem.centred(torch.tensor(found.theta, dtype=torch.float64)), len(problem.l)
    laws = []
    for _ in range(samples):
        counts = np.bincount(draw.integers(runs, size=runs), minlength=runs)
        theta, *_ = problem.minimum(start, torch.as_tensor(counts, dtype=torch.float64))
        laws.append(problem.law(theta, f"{found.law.name}, resampled"))
    return laws


def parabola(params: Numbers, losses: Numbers) -> tuple[float, float]:
    """(N, loss) at the lowest point of a parabola in log N through final losses of one budget: Hoffmann's approach 2.
    It is off where the sizes reach far, or to one side, for a law is no parabola. ValueError where there is none."""
    n = np.log(np.asarray(params, dtype=float))
    if len(n) < 3 or len(np.unique(n)) < 3:
        raise ValueError(f"a parabola takes three sizes, of {len(np.unique(n))}")
    middle = n.mean()
    second, first, at_middle = np.polyfit(n - middle, np.asarray(losses, dtype=float), 2)
    if second <= 0:
        raise ValueError("these losses have no lowest point between them")
    return float(np.exp(middle - first / (2 * second))), float(at_middle - first**2 / (4 * second))


def interval(laws: Sequence[Law], of: Callable[[Law], float], level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of a figure over bootstrapped laws."""
    low, high = np.quantile([of(law) for law in laws], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
