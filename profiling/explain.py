"""Where a step went, how far each part is above its floor, and the first thing to do about it.

    python profiling/explain.py WHERE [--out chart.png] [--tflops N --gbps N]

WHERE: a summary.json, or a folder that holds some: the out_dir of `train --profile=10:15`, step_trace.py's --out, a
folder of bench/run.py. A part's floor is the larger of its products at the machine's rate and its fewest bytes at the
machine's bandwidth (roofline.py's step_work), in the fused forms of nanogpt_kernels: GELU inside a product, no casts.
The rates are the data sheet's of a listed GPU; of a CPU they are measured now, so explain a trace where it was made.
"""

import argparse
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advice import first_thing
from measured_roof import Roof, roof_of
from roofline import compute_and_memory, step_work
from work import Work

from nanogpt_fast.command import run_command
from nanogpt_fast.errors import DataError
from nanogpt_fast.run import step_parts
from nanogpt_fast.run.step_parts import Summary
from nanogpt_fast.settings.config import GPTConfig

SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
WORK_OF = {  # step_work's ops that are no matrix product
    "attention": step_parts.ATTENTION,
    "cross-entropy in place": step_parts.LOSS,
    "residual + LayerNorm": step_parts.NORM,
    "residual + LayerNorm, backward": step_parts.NORM,
    "embedding, both ways": step_parts.EMBEDDING,
    "gradient norm, AdamW, zeroing": step_parts.OPTIMIZER,
}
FUSED: tuple[str, ...] = (  # the best form of a step has none of these: their floor is 0
    step_parts.GELU, step_parts.COPIES, step_parts.ELEMENTWISE, step_parts.DISPATCH, step_parts.GAPS,
    step_parts.DATA_WAIT,
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A kind of work: milliseconds a step, their share of it, the floor in ms, and floor over ms (1 is the best)."""

    name: str
    ms: float
    share: float
    floor_ms: float | None = None
    of_floor: float | None = None


@dataclass(frozen=True)
class Explanation:
    """Parts, dearest first, and the same in words."""

    config: str
    parts: list[Part]
    step_ms: float
    text: str
    advice: str
    roof: str

    def rows(self) -> list[dict[str, Any]]:
        """A row a part and one of the whole step, as bench's results have them."""
        whole = {"part": "step", "ms": self.step_ms, "text": self.text, "advice": self.advice, "roof": self.roof}
        fields = ("ms", "share", "floor_ms", "of_floor")
        rows = [{"part": p.name, **{f: v for f in fields if (v := getattr(p, f)) is not None}} for p in self.parts]
        return [{"bench": "profile", "config": self.config, "status": "ok", **row} for row in [*rows, whole]]


def floors(summary: Summary, roof: Roof) -> dict[str, float]:
    """{part: milliseconds a step it takes at least}; {} where the roof or the run's shape is unknown."""
    facts, found = summary.facts, dict.fromkeys(FUSED, 0.0)
    if "shape" not in facts or roof.flops is None or roof.bandwidth is None:
        return {}
    size = SIZE.get(facts["dtype"], 4)
    works = step_work(GPTConfig(**facts["shape"]), facts["batch_size"], facts["micro_steps"], size=size)
    for op, work in works.items():
        part = WORK_OF.get("attention" if op.startswith("attention backward") else op, step_parts.PRODUCTS)
        found[part] = found.get(part, 0.0) + _floor_ms(work, roof)
    return found


def _floor_ms(work: Work, roof: Roof) -> float:
    assert roof.flops and roof.bandwidth
    return max(compute_and_memory(work, roof.flops, roof.bandwidth, roof.exp_rate)) * 1e3


def explanation(summary: Summary, roof: Roof, config: str = "") -> Explanation:
    """The summary's parts against the roof. config: what the rows call the run; by default its shape."""
    total, least = summary.traced_ms, floors(summary, roof)
    parts = []
    for name, ms in sorted(summary.parts.items(), key=lambda row: -row[1]):
        floor = least.get(name)
        parts.append(Part(name, ms, ms / total, floor, None if floor is None else floor / ms))
    facts = summary.facts
    label = config or facts.get("config") or _label(facts)
    above = {p.name: p.ms - (p.floor_ms or 0.0) for p in parts}
    if summary.untraced_ms and step_parts.DISPATCH in above:  # what the profiler itself takes is nobody's to save
        above[step_parts.DISPATCH] -= max(0.0, total - summary.untraced_ms)
    advice = first_thing(summary, above, {p.name: p.of_floor for p in parts})
    return Explanation(label, parts, total, _paragraph(label, summary, parts, sum(least.values())), advice, roof.source)


def _label(facts: dict[str, Any]) -> str:
    if "shape" not in facts:
        return "a run"
    shape, rounds = facts["shape"], facts["micro_steps"]
    batch = f"{facts['batch_size']} x {shape['block_size']} tokens"
    return f"{shape['n_layer']} layers of {shape['n_embd']}, {f'{rounds} x ' if rounds > 1 else ''}{batch}"


def _paragraph(label: str, summary: Summary, parts: Sequence[Part], least: float) -> str:
    total, facts = summary.traced_ms, summary.facts
    where = f" on {facts['device_name']} in {facts['dtype']}" if "device_name" in facts else ""
    text = f"A step of {label}{where} took {total:.4g} ms while traced"
    text += f" and {summary.untraced_ms:.4g} ms otherwise. " if summary.untraced_ms else ". "
    text += "It went to " + ", ".join(f"{p.name} ({p.share:.0%})" for p in parts[:3]) + ". "
    if least:
        text += f"The floor of all parts together is {least:.4g} ms: the step takes {total / least:.2f} times that. "
    bound = [p for p in parts if p.floor_ms]
    if bound:
        told = [f"{p.name} {1 / p.of_floor:.2f}" for p in bound[:4] if p.of_floor]
        text += "Times over their own floors: " + ", ".join(told) + ". "
        if any(p.of_floor and p.of_floor > 1 for p in bound):
            text += "Below 1 is what a cache serves faster than the memory that the floor counts with. "
    if hidden := summary.streams.get("overlap_ms"):
        text += f"Two streams ran at once for {hidden:.3g} ms. "
    return text.strip()


def bars(explained: Explanation, width: int = 40) -> str:
    """The chart in text: # measured, and | where the floor is."""
    longest = max([p.ms for p in explained.parts] + [p.floor_ms or 0.0 for p in explained.parts])
    rows = []
    for part in explained.parts:
        bar = list(("#" * max(1, round(part.ms / longest * width))).ljust(width + 1))
        if part.floor_ms:
            bar[min(width, round(part.floor_ms / longest * width))] = "|"
        floor = "" if part.floor_ms is None else f"  floor {part.floor_ms:.3g}"
        rows.append(f"{part.name:<27}{''.join(bar)}{part.ms:>9.3g} ms {part.share:>6.1%}{floor}")
    return "\n".join(rows)


def plot(explained: Explanation, path: Path) -> None:
    """The chart as a picture. ImportError without matplotlib."""
    from matplotlib.figure import Figure

    parts = explained.parts
    figure = Figure(figsize=(10, 1.9 + 0.46 * len(parts)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr]
    axes = figure.subplots()
    rows = range(len(parts))
    axes.barh([y - 0.19 for y in rows], [p.ms for p in parts], 0.38, color="#3b6ea5", label="measured")
    if any(p.floor_ms is not None for p in parts):
        axes.barh([y + 0.19 for y in rows], [p.floor_ms or 0.0 for p in parts], 0.38, color="#e08a3c", label="floor")
    for y, part in zip(rows, parts):
        label = f" {part.ms:.3g} ms, {part.share:.1%}"
        axes.text(part.ms, y - 0.19, label, va="center", fontsize=9)
        if part.floor_ms:
            axes.text(part.floor_ms, y + 0.19, f" {part.floor_ms:.3g}", va="center", fontsize=8, color="#8a4b10")
        elif part.floor_ms == 0.0:
            axes.text(0, y + 0.19, " 0: fused or hidden", va="center", fontsize=8, color="#8a4b10")
    axes.set_yticks(list(rows), [p.name for p in parts])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(max(p.ms, p.floor_ms or 0.0) for p in parts))
    axes.set_xlabel("ms a step, traced")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    axes.set_title(
        f"Where a step went: {explained.config}, {explained.step_ms:.4g} ms", loc="left", fontsize=11, pad=12
    )
    note = textwrap.fill(f"First: {explained.advice}", 150) + "\n" + textwrap.fill(f"Roof: {explained.roof}", 150)
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8.5, color="#444444")
    figure.savefig(path, dpi=130)


# ---- files ----


def find(where: Path) -> list[Path]:
    """The summaries that WHERE names, newest last. DataError where there is none."""
    if where.is_file():
        return [where]
    found = sorted(where.rglob("summary.json"), key=lambda p: p.stat().st_mtime) if where.is_dir() else []
    if not found:
        raise DataError(
            "no summary of traced steps is there",
            where=str(where),
            expected="a summary.json, or a folder that holds one",
            found="an empty folder" if where.is_dir() else "nothing",
            hint="python -m nanogpt_fast.train ... --profile=10:15, or python profiling/step_trace.py --out DIR",
        )
    return found


def load(path: Path) -> Summary:
    """A summary.json. DataError for anything else."""
    try:
        return step_parts.from_json(json.loads(path.read_text()))
    except (ValueError, DataError) as error:
        raise DataError("this is no summary of traced steps", where=str(path), found=str(error)) from None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", type=Path)
    parser.add_argument("--out", type=Path, help="the picture (default: profile.png beside the summary)")
    parser.add_argument("--tflops", type=float, help="rate of matrix products to count with")
    parser.add_argument("--gbps", type=float, help="memory bandwidth to count with, 10^9 bytes/s")
    args = parser.parse_args(argv)
    if (args.tflops is None) != (args.gbps is None):
        parser.error("--tflops and --gbps go together")
    for path in find(args.where):
        summary = load(path)
        roof = Roof(args.tflops * 1e12, args.gbps * 1e9, "given") if args.tflops else roof_of(summary.facts)
        explained = explanation(summary, roof)
        print(f"{explained.text}\n\n{bars(explained)}\n\nroof: {explained.roof}\nfirst: {explained.advice}")
        picture = args.out or path.with_name("profile.png")
        try:
            plot(explained, picture)
        except ImportError:
            print("no picture: pip install 'nanogpt-fast[plot]'")
        else:
            print(f"picture: {picture}")


if __name__ == "__main__":
    run_command(main)
