"""The picture of roofline.py's --world: tokens/s of all GPUs, and the speed of one, against their number."""

import io
from collections.abc import Sequence

from scaling_table import BEND, Table

from nanogpt_fast.errors import ConfigError


def draw(tables: Sequence[tuple[str, Table]]) -> bytes:
    """A PNG of (name, table)s. ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import ScalarFormatter
    except ImportError:
        raise ConfigError(
            "matplotlib is not installed", where="--plot", hint="pip install 'nanogpt-fast[plot]'"
        ) from None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    speed, share = figure.subplots(1, 2)
    for number, (name, table) in enumerate(tables):
        worlds, first = [row.ranks for row in table.rows], table.rows[0]
        style = {"marker": "os^vD"[number % 5], "color": f"C{number}", "linestyle": "-"}
        speed.plot(worlds, [row.speed / 1e6 for row in table.rows], label=name, **style)
        share.plot(worlds, [100 * row.efficiency(first) for row in table.rows], label=name, **style)
        if (bend := table.bend) is not None:
            share.annotate(bend.binds(first), (bend.ranks, 100 * bend.efficiency(first)), xytext=(-12, -4),
                           textcoords="offset points", ha="right", fontsize=8, color=f"C{number}")  # fmt: skip
    widest = max(tables, key=lambda pair: pair[1].rows[-1].ranks)[1]
    first, last = widest.rows[0], widest.rows[-1].ranks
    ideal = [first.speed / first.ranks * n / 1e6 for n in (first.ranks, last)]
    speed.plot([first.ranks, last], ideal, ":", color="0.5", label="as fast each as the first")
    share.axhline(100 * BEND, linestyle=":", color="0.5")
    for axes, label in ((speed, "million tokens/s of all GPUs"), (share, "speed a GPU, % of the first")):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel("GPUs")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    speed.set_yscale("log")
    share.set_ylim(0, 108)
    speed.legend(fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()
