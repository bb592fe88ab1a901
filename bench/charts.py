"""Bar charts of results, drawn to be read: sorted as given, the figure at the bar's end, its unit on the axis.

matplotlib draws them (extra `plot`); ImportError where it is missing.
"""

from collections.abc import Sequence
from pathlib import Path

INK, BAR = "#1c2024", "#3b7dd8"


def bars(path: Path, rows: Sequence[tuple[str, float, float | None, float | None]], title: str, unit: str) -> None:
    """A horizontal bar for each (label, value, lower quartile or None, upper), the first on top."""
    figure, axes = _empty(len(rows), title, unit)
    values = [value for _, value, _, _ in rows]
    places = range(len(rows))
    axes.barh(places, values, color=BAR, height=0.62)
    ends = list(values)
    for i, (_, value, low, high) in enumerate(rows):
        if low is not None and high is not None and high > low:
            axes.plot([low, high], [i, i], color=INK, linewidth=1.4, solid_capstyle="butt")
            ends[i] = max(value, high)
    texts = [f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values]
    _label(axes, [label for label, *_ in rows], texts, ends)
    _save(figure, path)


def _empty(count: int, title: str, unit: str):  # -> (Figure, Axes), which are not imported up here
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9.0, 1.1 + 0.36 * max(2, count)), dpi=120)
    axes.set_title(title, loc="left", color=INK)
    axes.set_xlabel(unit, color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    return figure, axes


def _label(axes, labels: Sequence[str], texts: Sequence[str], ends: Sequence[float]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    furthest = max([*ends, 1e-12])
    axes.set_xlim(0, furthest * 1.22)
    for i, (text, end) in enumerate(zip(texts, ends)):
        axes.text(end + furthest * 0.012, i, text, va="center", ha="left", fontsize=9, color=INK)


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
