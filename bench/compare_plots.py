"""The plots of bench/compare.py, as PNG: MFU by model size and by GPU, tokens/s by arm, two versions on one machine.

Of an arm, model, dtype and machine only the newest result is drawn; every result is in the table. Where no row has an
MFU (its peak is unknown, as of most CPUs) tokens/s are drawn in its place.
"""

import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compare_rows import NOTHING, Result, machine, machine_name, number, text
from compare_tables import Pair, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_MATPLOTLIB = "No plots: matplotlib is not installed here (pip install 'nanogpt-fast[plot]'); the tables have it all."
PANELS = 24  # of tokens/s by arm
OURS = ("triton", "reference", "ours")  # arms that a commit of ours changes
PAIRS = 16  # of two versions
MARKERS = "osD^vPXph<>8"
WIDTH = 9.0  # inches


@dataclass(frozen=True)
class Plot:
    """A picture: its file's name, what it shows, and its bytes."""

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Measure:
    """What is drawn of a result: (low, median, high)."""

    label: str
    has_mfu: bool

    def of(self, r: Result) -> tuple[float, float, float] | None:
        speed = r.tokens_per_s()
        if speed is None or not self.has_mfu:
            return speed
        share = number(r.row, "mfu_nanogpt")
        low, median, high = speed
        return None if share is None else (100 * share * low / median, 100 * share, 100 * share * high / median)


def draw_all(results: Sequence[Result], pairs: Sequence[Pair]) -> tuple[list[Plot], str]:
    """(the plots, why there are none or ""). Nothing is drawn of results without a figure."""
    kept = newest(results)
    if not kept:
        return [], "No plots: no step in these results has a time."
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        return [], NO_MATPLOTLIB
    has_mfu = any(number(r.row, "mfu_nanogpt") is not None for r in kept)
    measure = Measure("MFU by nanoGPT's count, %" if has_mfu else "tokens/s", has_mfu)
    drawn = [r for r in kept if measure.of(r)]
    what = "MFU (nanoGPT's count)" if has_mfu else "Tokens/s (no row here has an MFU)"
    absent = sorted({machine_name(r.row) for r in kept} - {machine_name(r.row) for r in drawn})
    beside = f" Without an MFU, so not drawn: {', '.join(absent)}." if absent else ""
    spread = "the median of the newest result; the line through it is from its first to its third quartile"
    stem = "mfu" if has_mfu else "speed"
    plots = []
    sized = [r for r in drawn if number(r.row, "params")]
    if len({number(r.row, "params") for r in sized}) > 1:
        plots.append(
            Plot(f"{stem}_by_size.png", f"{what} by model size. A point is {spread}.{beside}", _by_size(sized, measure))
        )
    plots.append(
        Plot(
            f"{stem}_by_gpu.png",
            f"{what} by machine and model. A point is {spread}.{beside}",
            _by_machine(drawn, measure),
        )
    )
    panels = _panels(kept)
    cut = f" The first {PANELS} of {len(panels)} are drawn." if len(panels) > PANELS else ""
    plots.append(Plot("speed_by_arm.png", f"Tokens/s by arm, a panel for each machine, model and dtype. A bar is the "
                      f"median, its line runs from quartile to quartile; arms timed alone are pale.{cut}",
                      _by_arm(panels[:PANELS])))  # fmt: skip
    if pairs:
        ours = [p for p in pairs if text(p.after.row, "arm").startswith(OURS)] or list(pairs)
        cut = f" The first {PAIRS} of {len(ours)} are drawn." if len(ours) > PAIRS else ""
        plots.append(Plot("two_versions.png", "Two versions on one machine, our arms: speed after over speed before. "
                          "Filled: paired by round; hollow: not interleaved, its line is quartile over quartile."
                          f"{cut}", _two_versions(ours[:PAIRS])))  # fmt: skip
    return plots, ""


def newest(results: Sequence[Result]) -> list[Result]:
    """Those with a time, of each arm, work and machine the newest, in the order given."""
    last: dict[tuple[Any, ...], Result] = {}
    for r in (r for r in results if r.ok):
        key = (
            machine(r.row),
            *(text(r.row, k) for k in ("config", "params", "block_size", "dtype", "residual_dtype", "arm")),
        )
        if key not in last or text(r.row, "time") > text(last[key].row, "time"):
            last[key] = r
    return [r for r in results if any(r is other for other in last.values())]


def model(r: Result) -> str:
    return text(r.row, "config") or "model not recorded"


def plain(words: str, most: int = 60) -> str:
    """A foreign text that matplotlib draws as it is: one line, no formula, not endless."""
    words = "".join(c if c.isprintable() else " " for c in words)
    return (words if len(words) <= most else f"{words[: most - 3]}...").replace("$", r"\$")


def short(name: str) -> str:
    """A GPU's name without the maker's."""
    return plain(name.removeprefix("NVIDIA ").removeprefix("GeForce "), 44)


def figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def png(drawn: "Figure") -> bytes:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def styled(ax: "Axes", across: Literal["x", "y", "both"] = "x") -> None:
    ax.grid(axis=across, alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)


def thousands(value: float) -> str:
    for scale, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{letter}"
    return f"{value:.3g}"


def _legend(ax: "Axes") -> None:
    count = len(ax.get_legend_handles_labels()[1])
    if count:
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.14), ncols=min(2, count), fontsize=8, frameon=False)


def _bars(found: tuple[float, float, float]) -> list[list[float]]:
    low, median, high = found
    return [[max(0.0, median - low)], [max(0.0, high - median)]]


def _indices(values: Sequence[str]) -> dict[str, int]:
    return {value: i for i, value in enumerate(dict.fromkeys(values))}


def _by_size(results: Sequence[Result], measure: Measure) -> bytes:
    machines = _indices([machine_name(r.row) for r in results])
    arms = _indices([f"{text(r.row, 'arm')} {text(r.row, 'dtype')}" for r in results])
    series: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        series.setdefault((machine_name(r.row), f"{text(r.row, 'arm')} {text(r.row, 'dtype')}"), []).append(r)
    drawn = figure(4.6 + 0.2 * ((len(series) + 1) // 2))
    ax = drawn.subplots()
    for (name, arm), rows in series.items():
        rows = sorted(rows, key=lambda r: number(r.row, "params") or 0.0)
        xs = [number(r.row, "params") or 1.0 for r in rows]
        found = [measure.of(r) or NOTHING for r in rows]
        color, marker = f"C{machines[name] % 10}", MARKERS[arms[arm] % len(MARKERS)]
        errors = [[f[1] - f[0] for f in found], [f[2] - f[1] for f in found]]
        ax.plot(
            xs,
            [f[1] for f in found],
            color=color,
            marker=marker,
            markersize=7,
            linewidth=1.2,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=f"{short(name)}: {plain(arm, 36)}",
        )
        ax.errorbar(xs, [f[1] for f in found], yerr=errors, color=color, capsize=2, fmt="none")  # fmt: skip
    sizes = sorted({number(r.row, "params") or 1.0 for r in results})
    ax.set_xscale("log")
    ax.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
    ticks = [s for i, s in enumerate(sizes) if i == 0 or s > 1.12 * sizes[i - 1]]
    ax.set_xticks(ticks, [thousands(s) for s in ticks])
    ax.minorticks_off()
    ax.set_xlabel("parameters")
    _limits(ax, [f for r in results if (f := measure.of(r))], measure, "y")
    styled(ax, "both")
    _legend(ax)
    return png(drawn)


def _limits(ax: "Axes", found: Sequence[tuple[float, float, float]], measure: Measure, axis: str) -> None:
    """From 0 to a little above the highest; tokens/s of several sizes span decades, so theirs are logarithmic."""
    limits = ax.set_ylim if axis == "y" else ax.set_xlim
    low, high = min(f[0] for f in found), max(f[2] for f in found)
    if measure.has_mfu or high < 20 * low:
        limits(0, 1.08 * high)
    else:
        (ax.set_yscale if axis == "y" else ax.set_xscale)("log")
        limits(low / 1.5, high * 1.5)
    getattr(ax, f"set_{axis}label")(measure.label)
    if not measure.has_mfu:
        getattr(ax, f"{axis}axis").set_major_formatter(lambda value, _: thousands(value))


def _by_machine(results: Sequence[Result], measure: Measure) -> bytes:
    places = _indices([f"{short(machine_name(r.row))}\n{plain(model(r), 40)}" for r in results])
    arms = _indices([f"{text(r.row, 'arm')} {text(r.row, 'dtype')}" for r in results])
    drawn = figure(1.9 + 0.55 * len(places) + 0.2 * ((len(arms) + 1) // 2))
    ax = drawn.subplots()
    named: set[str] = set()
    for r in results:
        arm = f"{text(r.row, 'arm')} {text(r.row, 'dtype')}"
        y = places[f"{short(machine_name(r.row))}\n{plain(model(r), 40)}"]
        y += 0.5 * ((arms[arm] + 0.5) / len(arms) - 0.5)  # arms of one place stand apart
        found = measure.of(r) or NOTHING
        marker = MARKERS[arms[arm] % len(MARKERS)]
        color = f"C{arms[arm] % 10}"
        ax.errorbar([found[1]], [y], xerr=_bars(found), color=color, capsize=2, fmt="none")
        ax.plot([found[1]], [y], color=color, marker=marker, markersize=7, linestyle="none",
                markeredgecolor="white", markeredgewidth=0.6,
                label=None if arm in named else plain(arm, 50))  # fmt: skip
        named.add(arm)
    ax.set_yticks(range(len(places)), list(places), fontsize=8)
    ax.set_ylim(len(places) - 0.5, -0.5)
    _limits(ax, [f for r in results if (f := measure.of(r))], measure, "x")
    styled(ax)
    for y in range(1, len(places)):
        ax.axhline(y - 0.5, color="0.85", linewidth=0.6)
    handles, labels = ax.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=8, frameon=False)
    return png(drawn)


def _panels(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    panels: dict[tuple[str, ...], list[Result]] = {}
    for r in results:
        key = (short(machine_name(r.row)), plain(model(r), 40), text(r.row, "dtype"), text(r.row, "block_size"))
        panels.setdefault(key, []).append(r)
    return [(f"{name}\n{config}, {dtype}, T={T or '?'}", rows) for (name, config, dtype, T), rows in panels.items()]


def _by_arm(panels: Sequence[tuple[str, list[Result]]]) -> bytes:
    columns = min(2, len(panels))
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [0.9 + 0.3 * max(len(rows) for _, rows in line) for line in lines]
    drawn = figure(sum(heights) + 0.4)
    grid = drawn.add_gridspec(len(lines), columns, height_ratios=heights)
    for i, line in enumerate(lines):
        most = max(len(rows) for _, rows in line)
        for j, (title, rows) in enumerate(line):
            ax = drawn.add_subplot(grid[i, j])
            rows = sorted(rows, key=lambda r: r.tokens_per_s() or NOTHING)
            tops = []
            for y, r in enumerate(rows):
                found = r.tokens_per_s() or NOTHING
                alone = text(r.row, "how") != "in turn"
                ax.barh(y, found[1], xerr=_bars(found), height=0.62, color="C0", alpha=0.35 if alone else 0.85,
                        error_kw={"ecolor": "0.15", "capsize": 3, "elinewidth": 1.2})  # fmt: skip
                ax.annotate(
                    thousands(found[1]),
                    (found[2], y),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
                tops.append(found[2])
            ax.set_yticks(range(len(rows)), [plain(text(r.row, "arm"), 28) for r in rows], fontsize=8)
            ax.set_ylim(len(rows) - 0.4 - most - 0.2, len(rows) - 0.4)  # bars of a line are equally thick
            ax.set_xlim(0, 1.18 * max(tops))
            ax.xaxis.set_major_formatter(lambda value, _: thousands(value))
            ax.locator_params(axis="x", nbins=5)
            ax.tick_params(axis="x", labelsize=8)
            ax.set_title(title, fontsize=9)
            ax.set_xlabel("tokens/s", fontsize=8)
            styled(ax)
    return png(drawn)


def _two_versions(pairs: Sequence[Pair]) -> bytes:
    drawn = figure(1.0 + 0.55 * len(pairs))
    ax = drawn.subplots()
    ax.axvline(1.0, color="0.4", linewidth=1.0)
    for y, p in enumerate(pairs):
        ax.errorbar([p.ratio[1]], [y], xerr=_bars(p.ratio), color="C0" if p.paired else "C1", marker="o", markersize=7,
                    capsize=3, linestyle="none", markerfacecolor="C0" if p.paired else "white")  # fmt: skip
    names = [
        f"{plain(text(p.after.row, 'arm'), 24)}, {plain(model(p.after), 28)}, {short(machine_name(p.after.row))}\n"
        f"{plain(label(p.before), 64)}\nto {plain(label(p.after), 64)}"
        for p in pairs
    ]
    ax.set_yticks(range(len(pairs)), names, fontsize=7)
    ax.set_ylim(len(pairs) - 0.5, -0.5)
    ax.margins(x=0.1)
    ax.set_xlabel("speed, after / before (above 1 is faster)")
    styled(ax)
    return png(drawn)
