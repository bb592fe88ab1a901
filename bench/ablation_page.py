"""Fill docs/ablations.md with its tables, and draw its pictures, all of bench/results/ablations/.

    python bench/ablation_page.py [--check] [--only NAME]

The page is written by hand but for its blocks, `<!-- figures: NAME ARGUMENTS -->` to `<!-- end -->`, made here:

  study NAME     the study's question and table
  chance         what of all studies together may be chance
  runs           how many runs, of what, and the CPU hours they took

--check changes nothing; exit code 1 where the page is not what this would write (a test runs it). The pictures are
drawn again whenever the page is written (extra `plot`).
"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ablation_report
import ablation_study
import machine
import page
import page_blocks
from ablation_report import HEADER, Outcome, deviation, holm

from nanogpt_fast.command import run_command
from nanogpt_fast.errors import DataError

PAGE = machine.ROOT / "docs/ablations.md"
PICTURE, CURVES = PAGE.with_suffix(".png"), PAGE.with_name("ablations_curves.png")
RESULTS = machine.ROOT / "bench/results/ablations"


def rows_of(name: str) -> list[dict[str, Any]]:
    rows = machine.read_lines(RESULTS / f"{name}.jsonl")
    if not rows:
        raise DataError("the study has no results", where=str(RESULTS / f"{name}.jsonl"),
                        hint=f"python bench/ablate.py {name}")  # fmt: skip
    return rows


def study(name: str) -> str:
    loaded = ablation_study.load(name)
    table = page.markdown_table(HEADER, ablation_report.cells(loaded, rows_of(name)))
    return f"**{loaded.question}** Others: {loaded.said}\n\n{table}\n"


def runs() -> str:
    found = [row for path in sorted(RESULTS.glob("*.jsonl")) for row in machine.read_lines(path)]
    machines = sorted(
        {f"{row.get('gpu') or row.get('cpu')}, torch {row['torch']}, Python {row['python']}" for row in found}
    )
    measured = [row["cpu_s"] + row.get("before_cpu_s", 0.0) for row in found if row.get("cpu_s") is not None]
    # What other programs took, and what it stood still, is in a run's seconds: the first rows have no others.
    typical = sorted(measured)[len(measured) // 2] if measured else 0.0
    hours = (sum(measured) + typical * (len(found) - len(measured))) / 3600
    guessed = len(found) - len(measured)
    tokens = sorted({f"{row['tokens']:,.0f}" for row in found if row.get("tokens")})
    data = sorted({row["data"] for row in found})
    return (
        f"{len(found)} runs, {hours:.1f} CPU hours"
        + (f" ({guessed} of them, of which no CPU time was kept, as long as the median of the others)" * bool(guessed))
        + f", on {'; '.join(machines)}; "
        f"{' or '.join(tokens)} tokens a run, data {', '.join(data)}.\n"
    )


def chance() -> str:
    """What of all studies together may be chance, and whether what was run twice came out twice."""
    found = [one for _, arms in outcomes_of_all() for one in arms]
    compared = [one for one in found if not math.isnan(one.p)]
    stars = sum(len(holm(arms)) for _, arms in outcomes_of_all())
    # Names are an arm's only within its study.
    together = len(holm([replace(one, arm=str(at)) for at, one in enumerate(found)]))
    same: dict[str, list[float]] = {}
    for row in (row for path in sorted(RESULTS.glob("*.jsonl")) for row in machine.read_lines(path)):
        if row["status"] == "ok":
            same.setdefault(row["key"], []).append(row["val_loss"])
    twice = [losses for losses in same.values() if len(losses) > 1]
    alike = sum(len(set(losses)) == 1 for losses in twice)
    return (
        f"{len(compared)} arms were compared with a baseline in two seeds or more. {stars} differences survive Holm's "
        f"correction for their own study, {together} that for all studies together. {len(twice)} runs were made more "
        f"than once, for several studies; the loss was the same to the last bit in {alike} of them.\n"
    )


def outcomes_of_all() -> list[tuple[str, list[Outcome]]]:
    names = [name for name in ablation_study.names() if (RESULTS / f"{name}.jsonl").is_file()]
    return [(name, ablation_report.outcomes(ablation_study.load(name), rows_of(name))) for name in names]


Studies = list[tuple[str, list[Outcome]]]


def draw(studies: Studies, path: Path) -> None:
    """A panel a study: each arm's difference to the baseline, its interval, a dot a seed."""

    def panel(axis: Any, found: list[Outcome]) -> None:
        compared = [one for one in found if one.differences]
        noise = compared[0].noise if compared else 0.0
        axis.axvspan(-noise, noise, color="0.92")
        axis.axvline(0, color="0.6", lw=0.8)
        for at, one in enumerate(reversed(compared)):
            axis.plot(one.differences, [at] * len(one.differences), "o", ms=3, color="C0", alpha=0.45)
            half = one.half_width
            axis.errorbar(one.difference, at, xerr=half if half == half else None, fmt="D", ms=4, color="C3", capsize=3)
        axis.set_yticks(range(len(compared)), [one.arm for one in reversed(compared)], fontsize=8)
        axis.set_ylim(-0.7, len(compared) - 0.3)
        reach = max([2 * noise, *(abs(v) for one in compared for v in one.differences)], default=1.0)
        if reach > 10 * LINEAR:
            axis.set_xscale("symlog", linthresh=LINEAR)
            ticks = [sign * LINEAR * 10**power for sign in (-1, 1) for power in range(4) if LINEAR * 10**power < reach]
            axis.set_xticks(sorted([0.0, *ticks]), [f"{tick:g}" for tick in sorted([0.0, *ticks])])
            axis.minorticks_off()

    label = (
        "validation loss less the baseline's of the same seed (nats a character): left is better; grey is seed noise"
    )
    _panels(studies, path, panel, label, lambda found: 0.33 * (len(found) + 2.2))


LINEAR = 0.01  # of a panel with large differences too: linear up to here, then logarithmic


def draw_curves(studies: Studies, path: Path) -> None:
    """A panel a study: each arm's validation loss along the run, mean and deviation over seeds, without its start."""

    def panel(axis: Any, found: list[Outcome]) -> None:
        for at, one in enumerate(found):
            points = [[loss for _, loss in points] for points in zip(*one.curves, strict=True)][1:]
            share = [i / len(points) for i in range(1, len(points) + 1)]
            mean = [sum(losses) / len(losses) for losses in points]
            around = [0.0 if len(losses) < 2 else deviation(losses) for losses in points]
            color = "black" if at == 0 else f"C{at - 1}"
            axis.plot(share, mean, color=color, lw=1.8 if at == 0 else 1.1, label=one.arm)
            low, high = ([m + sign * sd for m, sd in zip(mean, around)] for sign in (-1, 1))
            axis.fill_between(share, low, high, color=color, alpha=0.15, lw=0)
        if found:
            axis.legend(fontsize=6.5, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    label = "share of the run; validation loss, mean over seeds and one standard deviation"
    _panels(
        [(name, [one for one in found if one.curves]) for name, found in studies], path, panel, label, lambda _: 2.5
    )


def _panels(studies: Studies, path: Path, panel: Callable[..., None], label: str, height: Callable[..., float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 2
    pairs = [studies[i : i + columns] for i in range(0, len(studies), columns)]
    heights = [max(height(found) for _, found in pair) for pair in pairs]
    figure, axes = pyplot.subplots(
        len(pairs),
        columns,
        figsize=(11, sum(heights) + 0.3),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for axis in axes.flat[len(studies) :]:
        axis.set_visible(False)
    for axis, (name, found) in zip(axes.flat, studies):
        panel(axis, found)
        axis.tick_params(labelsize=8)
        axis.set_title(f"{name}: against {found[0].arm}" if found else name, fontsize=9, loc="left")
    figure.supxlabel(label, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


MAKERS: dict[str, Callable[..., str]] = {"study": study, "runs": runs, "chance": chance}


def main(argv: list[str]) -> int:
    code = page_blocks.main(argv, __doc__, PAGE, MAKERS, "bench/ablation_page.py")
    if "--check" not in argv:
        draw(outcomes_of_all(), PICTURE)
        draw_curves(outcomes_of_all(), CURVES)
    return code


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
