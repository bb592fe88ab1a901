"""Fill docs/isoflop.md with its tables, and draw docs/isoflop.png, all of bench/results/scaling/isoflop.jsonl.

    python bench/isoflop_page.py [--check] [--only NAME]

The page is written by hand but for its blocks, `<!-- figures: NAME -->` to `<!-- end -->`, made here by
isoflop_report.py: grid, budgets, law, exponents, foretold, and runs, how many of what, with their CPU hours.

--check changes nothing; exit code 1 where the page is not what this would write (a test runs it). The picture is drawn
again whenever the page is written (extra `plot`).
"""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import isoflop_report as report
import machine
import numpy as np
import page
import page_blocks
from isoflop_report import Size

from nanogpt_fast.command import run_command
from nanogpt_fast.errors import DataError
from nanogpt_fast.scaling_fit import Fit
from nanogpt_fast.scaling_laws import REFIT, Law

PAGE = machine.ROOT / "docs/isoflop.md"
RESULTS = machine.ROOT / "bench/results/scaling/isoflop.jsonl"


@cache
def rows() -> list[dict[str, Any]]:
    found = machine.read_lines(RESULTS)
    if not found:
        raise DataError("there are no results", where=str(RESULTS), hint="python bench/isoflop.py --run")
    return found


@cache
def sizes() -> list[Size]:
    return report.sizes(rows())


@cache
def law() -> tuple[Fit, list[Law]]:
    return report.law_of(sizes())


def runs() -> str:
    found, one = rows(), rows()[-1]
    hours = sum(row["cpu_s"] for row in found) / 3600
    largest = max(row["tokens"] for row in found) / 1e6
    return (
        f"{len(found)} runs, {hours:.1f} CPU hours, on {one['cpu']}, torch {one['torch']}, Python {one['python']}; "
        f"up to {largest:.1f}M tokens a run, data {one['data']}. {report.summary(sizes(), law()[0])}\n"
    )


MAKERS: dict[str, Callable[..., str]] = {
    "runs": runs,
    "grid": lambda: page.markdown_table(*report.grid_table(sizes())),
    "budgets": lambda: page.markdown_table(*report.budget_table(sizes())),
    "law": lambda: page.markdown_table(*report.law_table(*law())),
    "exponents": lambda: page.markdown_table(*report.exponent_table(sizes(), *law())),
    "foretold": lambda: page.markdown_table(*report.foretold_table(sizes())),
}


def draw(path: Path) -> None:
    """Left: loss against size, a curve a budget, with its parabola and the law; right: the best size of a budget."""
    from matplotlib.figure import Figure

    found, fitted = sizes(), law()[0].law
    losses = [one.loss for one in found]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    valley, best = figure.subplots(1, 2)
    for at, budget in enumerate(report.budgets(found)):
        mine = [one for one in found if one.budget == budget]
        params = np.array([one.params for one in mine])
        for one in mine:
            valley.plot([one.params] * len(one.losses), one.losses, "o", ms=4, color=f"C{at}", alpha=0.6)
        curve = np.polyfit(np.log(params), [one.loss for one in mine], 2)
        fine = np.geomspace(params[0], params[-1], 100)
        valley.plot(fine, np.polyval(curve, np.log(fine)), color=f"C{at}", lw=1, label=f"{report.flops(budget)} FLOPs")
        valley.plot(params, [fitted.loss(one.params, one.worth) for one in mine], ":", color=f"C{at}", lw=1.2)
        if bottom := report.lowest(found, budget, losses):
            valley.plot(*bottom, "x", color=f"C{at}", ms=9, mew=2)
            best.plot(budget, bottom[0], "x", color=f"C{at}", ms=9, mew=2)
    budgets = np.geomspace(report.budgets(found)[0] / 2, report.budgets(found)[-1] * 2, 50)
    ours, refit = f"our law: a = {fitted.exponent:.2f}", "Besiroglu's refit, far below its runs"
    best.plot(budgets, [fitted.optimum(c)[0] for c in budgets], color="black", label=ours)
    best.plot(budgets, [REFIT.optimum(c)[0] for c in budgets], "--", color="0.5", label=refit)
    valley.set(xscale="log", xlabel="parameters", ylabel="validation loss, nats a character",
               title="a dot a seed; crosses: parabolas' bottoms; dotted: the law")  # fmt: skip
    best.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="best number of parameters",
             title="the best size of a budget")  # fmt: skip
    for axis in (valley, best):
        axis.grid(alpha=0.3)
        axis.title.set_fontsize(9)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(argv: list[str]) -> int:
    code = page_blocks.main(argv, __doc__, PAGE, MAKERS, "bench/isoflop_page.py")
    if "--check" not in argv:
        draw(PAGE.with_suffix(".png"))
    return code


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
