"""What bench/report.py shows: sections of text, tables and plots, made from the rows of a run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import charts
import harness
import machine
from compare_rows import Row
from explain import Explanation, Part, plot
from row_cells import (
    LOADER,
    PROFILE,
    SAMPLE,
    latest,
    loader_cells,
    ok,
    paired,
    percent,
    profile_cells,
    quartile_range,
    sample_cells,
    spread,
)

Rows = dict[str, list[Row]]  # by kind: their field "bench"
Table = tuple[str, list[str], list[list[Any]]]  # (caption, header, cells)
MACHINE = ("gpu", "cpu", "driver", "power_limit_w", "cores", "threads", "flags", "load", "cuda", "torch", "triton",
           "python", "commit", "dirty")  # fmt: skip
ABSENT = ("missing", "not installed")  # how the status of a row begins whose program is not here


@dataclass
class Section:
    """text: paragraphs; charts: (what draws a PNG there, its caption)."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[tuple[Callable[[Path], None], str]] = field(default_factory=list)


def read(folder: Path) -> Rows:
    """All complete rows of a folder, in the order in which they were written, without the results file made of them."""
    found: Rows = {}
    for path in sorted(folder.glob("[a-z]*.jsonl")):
        for row in machine.read_lines(path):
            if "bench" in row:
                found.setdefault(row["bench"], []).append(row)
    return found


def every_section(rows: Rows, cannot: list[str]) -> list[Section]:
    parts = [the_machine(rows), *the_steps(rows), the_explanation(rows), the_samples(rows), the_ops(rows),
             the_loader(rows), the_runs(rows), not_shown(rows, cannot)]  # fmt: skip
    return [part for part in parts if part is not None]


# ---- rows ----


def flops_of(row: Row) -> tuple[float, str]:
    """(rate, unit): a CPU's in GFLOP/s."""
    return (row["tflops"] * 1e3, "GFLOP/s") if row.get("device") == "cpu" else (row["tflops"], "TFLOP/s")


# ---- sections ----


def the_machine(rows: Rows) -> Section:
    section = Section("Machine")
    facts = (rows.get("environment") or next(iter(rows.values())))[-1]
    words = lambda value: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    shown = [[name, words(facts[name])] for name in MACHINE if facts.get(name) not in (None, "", [])]
    section.tables.append(("what it ran on", ["", "value"], shown))
    cells = []
    for row in latest(list(filter(ok, rows.get("roof", []))), "what", "dtype", "shape", "of", "name"):
        shape = "x".join(map(str, row["shape"])) if row.get("shape") else f"{row.get('bytes', 0) / 1e9:.3g} GB"
        name = row.get("name", "") if row.get("of") == "model" else ""
        what = " ".join(word for word in (row["what"], row.get("dtype"), name, shape) if word)
        rate, unit = flops_of(row) if "tflops" in row else (row["gbps"], "GB/s")
        cells.append([what, rate, unit, row.get("sheet"), percent(row.get("of_sheet"))])
    if cells:
        width = 5 if any(row[3] for row in cells) else 3  # a CPU has no data sheet
        header = ["", "rate", "unit", "data sheet", "of it"][:width]
        section.tables.append(("the roof, measured", header, [row[:width] for row in cells]))
    return section


def the_steps(rows: Rows) -> list[Section]:
    """A section for each configuration that was timed."""
    every, best = rows.get("step", []), best_gemm(rows)
    return [
        _steps_of([row for row in every if row["config"] == c], best) for c in dict.fromkeys(r["config"] for r in every)
    ]


def best_gemm(rows: Rows) -> dict[str, float]:
    """{dtype: TFLOP/s of the best product}"""
    best: dict[str, float] = {}
    for row in rows.get("roof", []):
        if row.get("what") == "gemm" and "tflops" in row:
            best[row["dtype"]] = max(best.get(row["dtype"], 0.0), row["tflops"])
    return best


def _steps_of(rows: list[Row], best: dict[str, float]) -> Section:
    """A table for each run: only within one were arms timed in turn."""
    config, last = rows[-1]["config"], rows[-1]
    section = Section(f"Training step, {config}")
    section.text.append(
        f"{last['tokens']:,} tokens a step, {last.get('params', 0) / 1e6:.4g}M parameters; MFU by nanoGPT's count "
        f"against {last.get('peak')}. reference is our step on plain PyTorch ops, triton on our kernels."
    )
    bars = []
    for run in dict.fromkeys(row.get("run") for row in rows):
        mine = [row for row in rows if row.get("run") == run]
        in_turn = latest([row for row in mine if row["how"] == "in turn"], "arm")
        turned = {row["arm"] for row in in_turn}
        listed = in_turn + [row for row in latest(mine, "arm") if row["arm"] not in turned]
        first = next(filter(ok, in_turn), None)
        rounds = f"{first['rounds']} rounds, each begun by another" if first and "rounds" in first else "in turn"
        header = ["arm", "ms a step", "quartiles", "tokens/s", "MFU", "of best GEMM"]
        header += ["times the first's speed", "peak GB", "note"]
        section.tables.append((f"arms: {rounds}", header, [_step_cells(row, first, best) for row in listed]))
        done = list(filter(ok, listed))
        bars += [
            (row["arm"], row["tokens_per_s"], row["tokens"] / row["q3"], row["tokens"] / row["q1"]) for row in done
        ]
    if bars:
        draw = lambda path: charts.bars(path, bars, f"{config}: tokens a second", "tokens/s")
        section.charts.append((draw, f"Tokens a second of each arm of {config}; the black lines are quartiles."))
    return section


def _step_cells(row: Row, first: Row | None, best: dict[str, float]) -> list[Any]:
    if not ok(row):
        return [row["arm"], *[None] * 7, row["status"]]
    share = row["tflops"] / best[row["dtype"]] if row.get("dtype") in best and "tflops" in row else None
    notes = ["" if row["how"] == "in turn" else "alone, not in turn", row.get("note", "")]
    return [row["arm"], row["ms_s"] * 1e3, quartile_range(row, 1e3), row["tokens_per_s"],
            percent(row.get("mfu_nanogpt")), percent(share), paired(first, row), row.get("peak_gb"),
            "; ".join(filter(None, notes))]  # fmt: skip


def the_ops(rows: Rows) -> Section | None:
    timed = [row for row in rows.get("ops", []) if "contestant" in row and row.get("mode") != "check"]
    timed = latest(timed, "op", "size", "contestant", "mode")
    if not timed:
        return None
    section = Section("Ops, one at a time")
    section.text.append(
        "Milliseconds a call; backward is the paired difference of both and forward. The floor is the op's work at the "
        "machine's rates; above 100% is what a cache serves. The ratio is to ours, or to plain PyTorch without it."
    )
    cells = []
    for row in timed:
        label = f"{row['op']} {row['size']}"
        if row["status"].startswith(ABSENT):
            continue  # the last section lists them
        if not ok(row):
            cells.append([label, row["contestant"], row.get("mode", ""), *[None] * 5, row["status"]])
            continue
        base = next((name for name in ("x_ours", "x_eager") if name in row), "")
        ratio = f"{row[base]:.3f}" if base else None
        if base and f"{base}_q1" in row:
            ratio = f"{row[base]:.3f} ({row[f'{base}_q1']:.3f} to {row[f'{base}_q3']:.3f})"
        cells.append([label, row["contestant"], row["mode"], row["ms"], quartile_range(row), flops_of(row)[0] or None,
                      percent(row.get("of_floor")), ratio, ""])  # fmt: skip
    header = [
        "op",
        "contestant",
        "mode",
        "ms",
        "quartiles",
        flops_of({**timed[-1], "tflops": 0.0})[1],
        "of its floor",
        "ratio",
        "note",
    ]
    section.tables.append(("ops", header, cells))
    mine = [row for row in timed if ok(row) and "of_floor" in row and row["mode"] != "both"]
    who = "ours" if any(row["contestant"] == "ours" for row in mine) else "eager"
    bars = [
        (f"{row['op']} {row['mode']}", row["of_floor"] * 100, None, None) for row in mine if row["contestant"] == who
    ]
    if bars:
        draw = lambda path: charts.bars(path, bars, f"{who}: the floor's time over the measured", "%")
        section.charts.append((draw, "How near each op is to its floor: 100% could not be faster on this machine."))
    return section


def the_samples(rows: Rows) -> Section | None:
    every = latest(rows.get("sample", []), "arm", "run")
    if not every:
        return None
    first = next(filter(ok, every), None)
    section, last = Section("Sampling"), every[-1]
    section.text.append(
        f"{last.get('new_tokens')} tokens after a prompt of {last.get('prompt')}, greedy, {last.get('config')}."
    )
    section.tables.append(("arms in turn", SAMPLE, [sample_cells(row, first) for row in every]))
    bars = [(row["arm"], row["tokens_per_s"], None, None) for row in every if ok(row)]
    if bars:
        draw = lambda path: charts.bars(path, bars, "sampling: tokens a second", "tokens/s")
        section.charts.append((draw, "Tokens a second of one sequence."))
    return section


def the_loader(rows: Rows) -> Section | None:
    every = latest(rows.get("loader", []), "table", "format", "order", "worker", "batch_size", "block_size")
    if not every:
        return None
    section = Section("Loader")
    cells: dict[str, list[list[Any]]] = {}
    for row in every:
        cells.setdefault(row["table"], []).append(loader_cells(row))
    if worker := cells.pop("worker", []):
        section.tables.append(("by who reads, beside a step on the CPU", LOADER[:5], [row[:5] for row in worker]))
    fed = [row for some in cells.values() for row in some]
    if fed:
        rate = next(row["consumer_tokens_per_s"] for row in every if "consumer_tokens_per_s" in row)
        section.tables.append((f"by format and order, a thread beside a consumer of {rate:,.0f} tokens/s", LOADER, fed))
    return section


def the_runs(rows: Rows) -> Section | None:
    every = latest(rows.get("train", []), "config", "arm", "round")
    section = Section("Whole training runs")
    header = ["arm", "wall s", "ms an iteration", "val loss", "of nanoGPT's wall time", "note"]
    for job in dict.fromkeys(row.get("config") for row in every):
        last = [row for row in every if row.get("config") == job]
        stock = {row["round"]: row["wall_s"] for row in last if row["arm"] == "nanogpt" and ok(row)}
        cells = []
        for arm in dict.fromkeys(row["arm"] for row in last):
            mine = [row for row in last if row["arm"] == arm]
            done = list(filter(ok, mine))
            if not done:
                cells.append([arm, *[None] * 4, mine[-1]["status"]])
                continue
            ratios = [row["wall_s"] / stock[row["round"]] for row in done if row["round"] in stock and arm != "nanogpt"]
            middle = [harness.summary([row[key] for row in done])["ms"] for key in ("wall_s", "iter_ms", "val_loss")]
            cells.append([arm, *middle, spread(ratios) if ratios else "", f"{len(done)} run(s)"])
        named = (
            f"{job or 'cpu'}, {last[-1].get('iterations')} iterations, each run a process from start to end, in turn"
        )
        section.tables.append((named, header, cells))
    return section if every else None


def the_explanation(rows: Rows) -> Section | None:
    every = rows.get("profile", [])
    if not every:
        return None
    every = [row for row in every if row.get("run") == every[-1].get("run")]
    section = Section("Where the step goes")
    parts = [row for row in every if ok(row) and row["part"] != "step"]
    if not parts:
        section.text.append(f"Not profiled: {every[-1]['status']}.")
        return section
    whole = next((row for row in every if row.get("part") == "step"), {})
    section.text += [text for text in (whole.get("text"), whole.get("advice")) if text]
    section.tables.append((f"{whole.get('ms', 0):.4g} ms a step", PROFILE, [profile_cells(row) for row in parts]))
    told = [Part(row["part"], row["ms"], row["share"], row.get("floor_ms"), row.get("of_floor")) for row in parts]
    words = (str(whole.get(key, "")) for key in ("text", "advice", "roof"))
    explained = Explanation(str(parts[0].get("config", "")), told, whole.get("ms", 0.0), *words)
    draw = lambda path: plot(explained, path)
    section.charts.append((draw, "Milliseconds a step of each part, beside the least that this machine could take."))
    return section


def not_shown(rows: Rows, cannot: list[str]) -> Section | None:
    """What is missing from the page, and why: a line for each reason, with all that it keeps away."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for row in (row for kind in rows.values() for row in kind if not ok(row)):
        who = next((str(row[key]) for key in ("contestant", "arm", "part", "name") if row.get(key)), "")
        of = " ".join(str(row[key]) for key in ("op", "size", "config") if row.get(key))
        places = grouped.setdefault((row["bench"], who, row["status"]), [])
        if of not in places:
            places.append(of)
    if not grouped and not cannot:
        return None
    section = Section("What this does not show", [f"Not on this machine: {line}." for line in cannot])
    cells = [[kind, who, ", ".join(places), why] for (kind, who, why), places in grouped.items()]
    if cells:
        section.tables.append(("without a time, and why", ["of", "who", "where", "reason"], cells))
    return section
