"""Draw the curves of one or several runs: `python -m nanogpt_fast.plot RUN [RUN ...] [--out plot.png] [--x iter]`.

A RUN is an out_dir, its metrics.jsonl, or a console log of nanoGPT or of ours.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from tyro.conf import Positional, arg

from nanogpt_fast.command import run_command
from nanogpt_fast.errors import ConfigError, DataError, printable
from nanogpt_fast.files import parse_json, read_small
from nanogpt_fast.settings import cli

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

XAxis = Literal["iter", "tokens", "time"]
Row = dict[str, Any]  # one line of metrics.jsonl

METRICS = "metrics.jsonl"
MAX_LOG = 256 << 20  # bytes; 600,000 iterations, each logged, have 200 MB
_FIGURES = ("loss", "lr", "grad_norm", "tokens_per_s", "tokens", "elapsed_s", "train_loss", "val_loss")
_HEADER = '{"kind": "run"'  # how a process's first line begins
_NUMBER = r"([+-]?\d{1,20}(?:\.\d{0,20})?(?:e[+-]?\d\d?)?|nan|[+-]?inf)"
_ITER = re.compile(rf"^iter (\d{{1,12}}): loss {_NUMBER}, time (\d{{1,12}}(?:\.\d{{0,12}})?)ms")
_STEP = re.compile(rf"^step (\d{{1,12}}): train loss {_NUMBER}, val loss {_NUMBER}")
_TOKENS_PER_ITER = re.compile(r"tokens per iteration will be: ([\d,]{1,20})")


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """What to draw, and where to."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")]
    """an out_dir, its metrics.jsonl, or a console log of nanoGPT or of ours"""
    out: str = "plot.png"  # the picture; .png, .svg or .pdf
    x: XAxis = "iter"  # against iterations, tokens seen, or training time
    title: str = ""  # above the panels; the run's name by default
    debug: bool = False  # tracebacks instead of short errors


# ---- reading ----


@dataclass
class History:
    """A run as logged: rows by iteration, in order."""

    name: str
    train: dict[int, Row] = field(default_factory=dict)
    evals: dict[int, Row] = field(default_factory=dict)

    def column(self, kind: Literal["train", "evals"], y: str, x: str) -> tuple[np.ndarray, np.ndarray]:
        """(x, y) of the rows that have both keys, float64, by iteration."""
        rows: dict[int, Row] = getattr(self, kind)
        points = [(r[x], r[y]) for _, r in sorted(rows.items()) if r.get(x) is not None and r.get(y) is not None]
        xs, ys = np.array(points, dtype=np.float64).reshape(-1, 2).T
        return xs, ys


def read_history(run: Path) -> History:
    """The history of an out_dir, a metrics.jsonl or a console log. Raises DataError."""
    path = run / METRICS if run.is_dir() else run
    try:
        text = read_small(path, MAX_LOG).decode(errors="replace")
    except OSError as error:
        raise DataError(
            "no metrics there",
            where=str(path),
            expected=f"an out_dir with {METRICS}, a {METRICS} or a console log",
            found=error.strerror or str(error),
            hint="a run writes it with its first iteration; name the run's --out_dir",
        ) from None
    history = History(_name(path))
    if path.suffix == ".jsonl" or text.lstrip().startswith("{"):
        _read_metrics(history, text, path)
    else:
        _read_console(history, text)
    if not history.train and not history.evals:
        raise DataError("the log holds no iteration", where=str(path), expected="`iter N: loss ...` lines, or metrics")
    return history


def _name(path: Path) -> str:
    """The run's folder for metrics.jsonl, else the file without its ending."""
    return path.resolve().parent.name if path.name == METRICS else path.stem


def _read_metrics(history: History, text: str, path: Path) -> None:
    """Fill history; of iterations logged twice, as after a resume, the later line counts."""
    before = seconds = 0.0  # of earlier processes, and of this one, which counts from 0 again
    for row in _json_rows(text, path):
        if row["kind"] == "run":
            start = row.get("start", 0)
            _start_over(history, start)
            before, seconds = (before + seconds if start else 0.0), 0.0
        elif row["kind"] in ("train", "eval"):
            if row.get("elapsed_s") is not None:
                seconds = row["elapsed_s"]
                row["elapsed_s"] = before + seconds
            (history.train if row["kind"] == "train" else history.evals)[row["iter"]] = row


def _start_over(history: History, start: int) -> None:
    """A process begins at iteration `start`: what an abandoned one logged beyond is no part of the run."""
    history.train = {i: row for i, row in history.train.items() if i < start}
    history.evals = {i: row for i, row in history.evals.items() if 0 < start >= i}


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    """The JSON objects; a line that a kill cut off is passed over, be it the last or joined to the next process's."""
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        header = line.rfind(_HEADER)
        is_last_of_a_process = number == len(lines) or lines[number].startswith(_HEADER)
        if not line.strip():
            continue
        try:
            yield _row(line[header:] if header > 0 else line)
        except ValueError as error:
            if not is_last_of_a_process:
                where = f"{path}:{number}"
                raise DataError("unreadable line", where=where, expected="a JSON object", found=str(error)) from None


def _row(line: str) -> Row:
    row = parse_json(line)
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        raise ValueError("no object with a kind")
    count, figures = row.get("start", 0) if row["kind"] == "run" else row.get("iter"), map(row.get, _FIGURES)
    if type(count) is not int or not 0 <= count < 2**53:
        raise ValueError("no whole number of iterations")
    if not all(x is None or (isinstance(x, int | float) and abs(x) < 1e30) for x in figures):
        raise ValueError("a figure is no number")
    return row


def _read_console(history: History, text: str) -> None:
    """Fill history from the lines nanoGPT prints; seconds are summed from the iterations' times."""
    tokens_per_iter: int | None = None
    elapsed, previous = 0.0, -1
    for line in text.splitlines():
        if match := _TOKENS_PER_ITER.search(line):
            tokens_per_iter = int(match[1].replace(",", "") or 0) or None
        elif match := _ITER.match(line):
            i, seconds = int(match[1]), float(match[3]) / 1e3
            elapsed, previous = elapsed + seconds * max(1, i - previous), i
            row: Row = {"iter": i, "loss": float(match[2]), "time_ms": 1e3 * seconds, "elapsed_s": elapsed}
            if tokens_per_iter is not None and seconds:
                row |= {"tokens": (i + 1) * tokens_per_iter, "tokens_per_s": tokens_per_iter / seconds}
            history.train[i] = row
        elif match := _STEP.match(line):
            i = int(match[1])
            row = {"iter": i, "train_loss": float(match[2]), "val_loss": float(match[3]), "elapsed_s": elapsed}
            history.evals[i] = row | ({} if tokens_per_iter is None else {"tokens": i * tokens_per_iter})


# ---- drawing ----


def smooth(y: np.ndarray) -> np.ndarray:
    """The mean of the finite values within 1% of the points to either side; a causal average would lag behind."""
    half, n = max(1, len(y) // 100), len(y)
    finite = np.isfinite(y)
    total = np.concatenate(([0.0], np.cumsum(np.where(finite, y, 0.0))))
    count = np.concatenate(([0], np.cumsum(finite)))
    start, end = np.maximum(0, np.arange(n) - half), np.minimum(n, np.arange(n) + half + 1)
    with np.errstate(invalid="ignore"):  # 0 / 0 where nothing near is finite
        return (total[end] - total[start]) / (count[end] - count[start])


def limits(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float] | None:
    """y-limits of (x, y) curves without their first 3% of x, whose drop from ln(vocab_size) would flatten the rest."""
    end = max((x[-1] for x, _ in curves if len(x)), default=0.0)
    late = [y[(x > 0.03 * end) & np.isfinite(y)] for x, y in curves]
    kept = np.concatenate(late) if late else np.empty(0)
    if not len(kept):
        return None
    low, high = float(kept.min()), float(kept.max())
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


class Axis(NamedTuple):
    """What x is: the key of the rows, what to divide it by, and its label."""

    key: str
    unit: float
    label: str


def x_axis(histories: Sequence[History], x: XAxis) -> Axis:
    """The axis for --x; time takes the unit that suits the longest run."""
    if x == "iter":
        return Axis("iter", 1.0, "iteration")
    if x == "tokens":
        return Axis("tokens", 1.0, "tokens")
    end = max((row.get("elapsed_s") or 0.0 for h in histories for row in h.train.values()), default=0.0)
    name, seconds = ("hours", 3600.0) if end > 7200 else ("minutes", 60.0) if end > 120 else ("seconds", 1.0)
    return Axis("elapsed_s", seconds, f"training time, {name}")


def draw(histories: Sequence[History], x: XAxis = "iter", title: str = "") -> "Figure":
    """The figure: loss at the left; learning rate, tokens/s and gradient norm, where logged, at the right."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib", hint="pip install 'nanogpt-fast[plot]'") from None
    axis = x_axis(histories, x)
    side = [y for y in _SIDE_PANELS if any(len(h.column("train", y, axis.key)[0]) for h in histories)]
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    grid = figure.add_gridspec(max(1, len(side)), 2 if side else 1, width_ratios=(1.7, 1) if side else None)
    loss = figure.add_subplot(grid[:, 0])
    _draw_loss(loss, histories, axis)
    panels = [loss]
    for i, y in enumerate(side):
        panels.append(figure.add_subplot(grid[i, 1], sharex=loss))
        _SIDE_PANELS[y](panels[-1], histories, axis)
        panels[-1].tick_params(labelbottom=y == side[-1])
    for ax in panels:
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.01)
    for ax in {loss, panels[-1]}:
        ax.xaxis.set_major_formatter(lambda value, _: _si(value))
        ax.set_xlabel(axis.label)
    figure.suptitle(title or ", ".join(h.name for h in histories[:4]) + (", ..." if len(histories) > 4 else ""))
    return figure


def _points(h: History, kind: Literal["train", "evals"], y: str, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    xs, ys = h.column(kind, y, axis.key)
    return xs / axis.unit, ys


def _draw_loss(ax: "Axes", histories: Sequence[History], axis: Axis) -> None:
    shown = []
    for i, h in enumerate(histories):
        prefix = f"{h.name}: " if len(histories) > 1 else ""
        xs, ys = _points(h, "train", "loss", axis)
        if len(xs):
            mean = smooth(ys)
            ax.plot(xs, ys, color=f"C{i % 10}", alpha=0.18, linewidth=0.8)
            ax.plot(xs, mean, color=f"C{i % 10}", linewidth=1.6, label=f"{prefix}train {mean[-1]:.3f}, smoothed")
            shown.append((xs, mean))
        xs, ys = _points(h, "evals", "val_loss", axis)
        if len(xs):
            best = f"best {np.nanmin(ys):.4f}" if np.isfinite(ys).any() else "not finite"
            style = {"linestyle": "--", "linewidth": 1.0, "marker": "o", "markersize": 5, "markeredgecolor": "white"}
            ax.plot(xs, ys, color=_dark(f"C{i % 10}"), label=f"{prefix}val, {best}", zorder=3, **style)
            shown.append((xs, ys))
    if (bounds := limits(shown)) is not None:
        ax.set_ylim(bounds)
    ax.set_title("loss")
    ax.set_ylabel("nats a token")
    if ax.lines:
        ax.legend(loc="upper right", fontsize=9, framealpha=0.9)


def _dark(color: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(0.6 * channel for channel in to_rgb(color))


def _draw_lr(ax: "Axes", histories: Sequence[History], axis: Axis) -> None:
    for i, h in enumerate(histories):
        ax.plot(*_points(h, "train", "lr", axis), color=f"C{i % 10}")
    ax.set_title("learning rate")
    ax.set_ylim(bottom=0)
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _draw_speed(ax: "Axes", histories: Sequence[History], axis: Axis) -> None:
    top = 0.0
    for i, h in enumerate(histories):
        xs, ys = _points(h, "train", "tokens_per_s", axis)
        if len(xs):
            median = float(np.nanmedian(ys))
            ax.plot(xs, ys, color=f"C{i % 10}", linewidth=0.8, label=f"median {_si(median)}")
            top = max(top, 1.35 * median, float(np.nanpercentile(ys, 98)))
    ax.set_title("tokens/s")
    ax.set_ylim(0, top or None)
    ax.yaxis.set_major_formatter(lambda value, _: _si(value))
    ax.legend(loc="lower right", fontsize=8, framealpha=0.9)


def _draw_grad_norm(ax: "Axes", histories: Sequence[History], axis: Axis) -> None:
    curves = []
    for i, h in enumerate(histories):
        xs, ys = _points(h, "train", "grad_norm", axis)
        if len(xs):
            ax.plot(xs, ys, color=f"C{i % 10}", alpha=0.25, linewidth=0.8)
            ax.plot(xs, smooth(ys), color=f"C{i % 10}", linewidth=1.3)
            curves.append(ys[np.isfinite(ys)])
    finite = np.concatenate(curves) if curves else np.empty(0)
    if len(finite):
        ax.set_ylim(0, 1.15 * float(np.percentile(finite, 98)) or None)  # a few spikes may leave the panel
    ax.set_title("gradient norm, before clipping")


def _si(value: float) -> str:
    for scale, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{letter}"
    return f"{value:.3g}"


_SIDE_PANELS: dict[str, Callable[["Axes", Sequence[History], Axis], None]] = {
    "lr": _draw_lr,
    "tokens_per_s": _draw_speed,
    "grad_norm": _draw_grad_norm,
}


# ---- the command ----


def main(argv: list[str]) -> None:
    """The command: PlotOptions."""
    description = "Draw the curves of one or several runs."
    options = cli.parse(PlotOptions, argv, prog="python -m nanogpt_fast.plot", description=description)
    out = Path(options.out)
    out = out / "plot.png" if out.is_dir() else out if out.suffix else out.with_name(f"{out.name}.png")
    figure = draw(name_apart([read_history(Path(run)) for run in options.runs], options.runs), options.x, options.title)
    try:
        figure.savefig(out, dpi=130)
    except (OSError, ValueError) as error:
        raise ConfigError("the picture cannot be written", where=f"--out={out}", found=str(error)) from None
    print(f"wrote {printable(str(out))}")


def name_apart(histories: list[History], runs: Sequence[str]) -> list[History]:
    """The histories, called by their whole path where two have one name."""
    names = [h.name for h in histories]
    for history, run in zip(histories, runs):
        if names.count(history.name) > 1:
            history.name = run
    return histories


if __name__ == "__main__":
    run_command(main, again="no picture was written")
