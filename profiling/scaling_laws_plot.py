"""The picture of docs/scaling_laws.md: loss against size at one budget, and the best size against the budget."""

import io

import numpy as np

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.scaling_laws import REFIT, ROUNDED, ROWS, TABLE_A3, UNROUNDED, along, on_a_grid


def draw(budget: float) -> bytes:
    """A PNG. ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("matplotlib is not installed", hint="pip install 'nanogpt-fast[plot]'") from None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    loss, size = figure.subplots(1, 2)
    params, budgets = np.geomspace(6e7, 2.5e9, 200), np.geomspace(1e17, 1e25, 50)
    for number, law in enumerate((ROUNDED, UNROUNDED, REFIT)):
        best = law.optimum(budget)[0]
        least = law.loss(best, budget / 6 / best)
        loss.plot(params, law.loss(params, budget / 6 / params) - least, color=f"C{number}", label=law.name)
        loss.plot(best, 0, "o", color=f"C{number}")
        size.plot(budgets, [law.optimum(c)[0] for c in budgets], color=f"C{number}", label=law.name)
    grid = on_a_grid(ROUNDED, budget, 16)[0]
    least = ROUNDED.loss(*ROUNDED.optimum(budget))
    above = ROUNDED.loss(grid, budget / 6 / grid) - least
    loss.plot(grid, above, "x", color="C0", markersize=9, label="the notebook's grid")
    loss.axvline(TABLE_A3[0], color="0.4", linestyle=":", label="the paper's table A3")
    for name, marker in zip(ROWS, "s^"):
        points = np.array(ROWS[name])
        size.plot(6 * points[:, 0] * points[:, 1], points[:, 0], marker, markersize=4, color="0.3", label=name)
        size.plot(budgets, [along(ROWS[name], c)[0] for c in budgets], color="0.7", linewidth=0.7)
    size.plot(5.88e23, 70e9, "*", color="C3", markersize=11, label="Chinchilla, 70B")
    loss.set(xscale="log", ylim=(-0.005, 0.12), xlabel=f"parameters, {budget:.3g} FLOPs", ylabel="nats above the least")
    size.set(
        xscale="log",
        yscale="log",
        xlabel="FLOPs",
        ylabel="best number of parameters",
        ylim=(1e7, 1e12),
        xlim=(1e17, 1e25),
    )
    for axes in (loss, size):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
    return png.getvalue()
