"""Of isoFLOP runs: the best size of each budget, the law through all of them, and what it foretold of the largest."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from nanogpt_fast.columns import columns
from nanogpt_fast.scaling_fit import Fit, bootstrap, fit, interval, parabola
from nanogpt_fast.scaling_laws import C4, REFIT, ROWS, UNROUNDED, Law, along, effective_tokens

SAMPLES = 200  # of a bootstrap
Table = tuple[list[str], list[list[str]]]  # header, rows


@dataclass(frozen=True)
class Size:
    """A size at a budget. losses: of each seed, at the rate that was best with the first; by_rate: the first seed's."""

    budget: float
    shape: str
    params: int
    tokens: float
    of_text: float  # passes
    rate: float
    losses: tuple[float, ...]
    by_rate: dict[float, float]

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def inside(self) -> int:
        """Parameters of the blocks' matrices, Kaplan's N."""
        layers, width, *_ = map(int, self.shape.split("x"))
        return 12 * layers * width**2

    @property
    def worth(self) -> float:
        """Tokens seen once that are worth as much."""
        return effective_tokens(self.tokens, self.tokens / self.of_text)


def sizes(rows: Sequence[dict[str, Any]]) -> list[Size]:
    """By budget, then parameters. Of rows that cannot be compared those like the last are taken; of one run the
    last."""
    rows = [row for row in rows if row.get("status") == "ok"]
    alike = [row for row in rows if _kind(row) == _kind(rows[-1])]
    newest = {(row["budget"], row["shape"], row["flags"]["learning_rate"], row["seed"]): row for row in alike}
    found = []
    for budget, shape in sorted({key[:2] for key in newest}):
        mine = [row for key, row in newest.items() if key[:2] == (budget, shape)]
        first = min(row["seed"] for row in mine)
        by_rate = {row["flags"]["learning_rate"]: row["val_loss"] for row in mine if row["seed"] == first}
        rate = min(by_rate, key=lambda rate: by_rate[rate])
        losses = {row["seed"]: row["val_loss"] for row in mine if row["flags"]["learning_rate"] == rate}
        one = mine[0]
        found.append(
            Size(budget, shape, one["params"], one["tokens"], one["of_text"], rate,
                 tuple(losses[seed] for seed in sorted(losses)), dict(sorted(by_rate.items())))
        )  # fmt: skip
    return sorted(found, key=lambda one: (one.budget, one.params))


def _kind(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["data"], row["config"], row.get("dtype")


def budgets(found: Sequence[Size]) -> list[float]:
    return sorted({one.budget for one in found})


def lowest(found: Sequence[Size], budget: float, losses: Sequence[float]) -> tuple[float, float] | None:
    """(N, loss) at the bottom of a budget's parabola; losses: of all sizes. None without one, or beyond the sizes."""
    params, mine = zip(*((one.params, loss) for one, loss in zip(found, losses) if one.budget == budget))
    try:
        size, loss = parabola(params, mine)
    except ValueError:
        return None
    return (size, loss) if min(params) < size < max(params) else None


def slope(found: Sequence[Size], losses: Sequence[float]) -> float:
    """a of N ~ C^a: a line through the parabolas' bottoms; nan where there are not two."""
    bottoms = [(budget, lowest(found, budget, losses)) for budget in budgets(found)]
    points = np.log([(budget, bottom[0]) for budget, bottom in bottoms if bottom])
    return float(np.polyfit(points[:, 0], points[:, 1], 1)[0]) if len(points) > 1 else math.nan


def slope_interval(found: Sequence[Size], seed: int = 0) -> tuple[float, float]:
    """The middle 95% of `slope` where each size draws its seeds anew."""
    draw = np.random.default_rng(seed)
    slopes = [
        slope(found, [float(np.mean(draw.choice(one.losses, len(one.losses)))) for one in found])
        for _ in range(SAMPLES)
    ]
    low, high = np.quantile(slopes, [0.025, 0.975])  # nan with any nan
    return float(low), float(high)


Count = Callable[[Size], float]


def runs_of(found: Sequence[Size], params: Count = lambda one: one.params) -> tuple[np.ndarray, ...]:
    """Parameters, tokens and losses of every seed."""
    return tuple(np.array([(params(one), one.worth, loss) for one in found for loss in one.losses]).T)


def law_of(found: Sequence[Size], params: Count = lambda one: one.params) -> tuple[Fit, list[Law]]:
    """The law through all runs, and those of runs drawn anew."""
    n, d, losses = runs_of(found, params)
    fitted = fit(n, d, losses, name="ours")
    return fitted, bootstrap(n, d, losses, fitted, samples=SAMPLES)


def noise(found: Sequence[Size]) -> float:
    """The standard deviation that another seed alone makes, pooled over sizes."""
    spreads = [float(np.var(one.losses, ddof=1)) for one in found if len(one.losses) > 1]
    return math.sqrt(sum(spreads) / len(spreads)) if spreads else math.nan


# ---- tables ----


def flops(value: float) -> str:
    return f"{value:.3g}".replace("e+", "e")


def grid_table(found: Sequence[Size]) -> Table:
    rows = [
        [flops(one.budget), one.shape, f"{one.params:,}", f"{one.tokens / 1e6:.2f}M", f"{one.of_text:.2f}",
         f"{one.rate:g}" + "*" * (len(one.by_rate) > 1 and one.rate in (min(one.by_rate), max(one.by_rate))),
         f"{one.loss:.4f}", " ".join(f"{loss:.4f}" for loss in one.losses)]
        for one in found
    ]  # fmt: skip
    return ["FLOPs", "shape", "N", "D", "passes", "best rate", "loss", "of each seed"], rows


def budget_table(found: Sequence[Size]) -> Table:
    losses, rows = [one.loss for one in found], []
    for budget in budgets(found):
        best = min((one for one in found if one.budget == budget), key=lambda one: one.loss)
        row = [flops(budget), f"{best.shape}, {best.params:,}", f"{best.loss:.4f}"]
        if bottom := lowest(found, budget, losses):
            tokens = budget / _flops_a_token(found, budget, bottom[0])
            row += [f"{bottom[0]:,.0f}", f"{bottom[1]:.4f}", f"{tokens / 1e6:.2f}M", f"{tokens / bottom[0]:.0f}"]
        rows.append(row + ["-"] * (7 - len(row)))
    return ["FLOPs", "lowest of the runs", "loss", "the parabola's N", "loss", "D", "D / N"], rows


def _flops_a_token(found: Sequence[Size], budget: float, params: float) -> float:
    """Between the sizes of a budget."""
    mine = [one for one in found if one.budget == budget]
    each = np.interp(math.log(params), [math.log(one.params) for one in mine], [budget / one.tokens for one in mine])
    return float(each)


def law_table(fitted: Fit, laws: Sequence[Law]) -> Table:
    rows = []
    for name in ("E", "A", "B", "alpha", "beta"):
        of = attrgetter(name)
        low, high = interval(laws, of)
        rows.append([name, f"{of(fitted.law):.4g}", f"{low:.4g} to {high:.4g}", f"{of(REFIT):g}"])
    return ["constant", "ours", "95%", "Besiroglu's refit"], rows


def exponent_table(found: Sequence[Size], fitted: Fit, laws: Sequence[Law]) -> Table:
    """a of N ~ C^a, ours and published."""
    low, high = slope_interval(found)
    rows = [
        ["ours, parabolas (approach 2), the trainer's FLOPs", _shown(slope(found, [one.loss for one in found])),
         f"{low:.2f} to {high:.2f}, over seeds"]
    ]  # fmt: skip
    low, high = interval(laws, lambda law: law.exponent)
    rows.append(["ours, the law (approach 3), 6 N D", _shown(fitted.law.exponent), f"{low:.2f} to {high:.2f}"])
    inside, drawn = law_of(found, lambda one: one.inside)
    low, high = interval(drawn, lambda law: law.exponent)
    rows.append(["ours, the law, N without embeddings", _shown(inside.law.exponent), f"{low:.2f} to {high:.2f}"])
    for rate in sorted(set.intersection(*(set(one.by_rate) for one in found))):
        fixed = slope(found, [one.by_rate[rate] for one in found])
        rows.append([f"ours, parabolas, every size at a rate of {rate:g}", _shown(fixed), "one seed"])
    rows += [[law.name, _shown(law.exponent), law.source] for law in (UNROUNDED, REFIT, C4)]
    rows += [
        [f"Hoffmann, {name}", _shown(along(of, 1e21)[2]), "arXiv 2203.15556, a line through its table"]
        for name, of in ROWS.items()
    ]
    rows.append(["Kaplan, N without embeddings", "0.73", "arXiv 2001.08361"])
    return ["of", "a", "95%, or source"], rows


def foretold_table(found: Sequence[Size]) -> Table:
    """What the law through all but the largest budget says of that one."""
    largest = budgets(found)[-1]
    law = fit(*runs_of([one for one in found if one.budget < largest])).law
    mine = [one for one in found if one.budget == largest]
    said, seen = [law.loss(one.params, one.worth) for one in mine], [one.loss for one in mine]
    rows = [
        [one.shape, f"{one.params:,}", f"{loss:.4f}", f"{foretold:.4f}", f"{foretold - loss:+.4f}"]
        for one, loss, foretold in zip(mine, seen, said)
    ]
    bottoms = [lowest(mine, largest, losses) for losses in (seen, said)]
    shown = [f"{bottom[0]:,.0f} parameters" if bottom else "beyond the sizes" for bottom in bottoms]
    rows.append(["the parabola's N", "", *shown, ""])
    return [f"{flops(largest)} FLOPs", "N", "loss", "foretold", "off by"], rows


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def summary(found: Sequence[Size], fitted: Fit) -> str:
    rms = float(np.sqrt(np.mean(np.square(fitted.residuals))))
    return (
        f"The law's residuals are {rms:.2%} of the loss in the root mean square, {np.abs(fitted.residuals).max():.2%} "
        f"at most; another seed alone moves a loss by {noise(found):.4f} nats (one standard deviation)."
    )


def text(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For the terminal; the fits as soon as there are runs enough for them."""
    found = sizes(rows)
    if not found:
        return ["no runs yet: python bench/isoflop.py --run"]
    parts = [grid_table(found), budget_table(found)]
    lines = [line for header, body in parts for line in [*columns([header, *body]), ""]]
    try:
        fitted, laws = law_of(found)
    except ValueError as problem:
        return [*lines, f"no law yet: {problem}"]
    for header, body in (law_table(fitted, laws), exponent_table(found, fitted, laws)):
        lines += [*columns([header, *body]), ""]
    return [*lines, summary(found, fitted)]
