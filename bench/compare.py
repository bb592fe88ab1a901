"""Results of several GPUs, dates and commits side by side: one Markdown file and one HTML page.

    python bench/compare.py [FILE_OR_FOLDER ...] [--out DIR]       all of bench/results by default
    python bench/compare.py --check FILE                           is this file ready to be sent? (bench/README.md)

A ratio to stock nanoGPT is taken round by round inside one run; arms of different runs are not divided by one another.
Figures that others published stand in a table of their own. What failed, ran out of memory or lacks its peer stays,
with its reason. Plots need matplotlib; without it the page says so. DIR gets compare.html, compare.md and the plots.
"""

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

import compare_check
import compare_kinds
import compare_plots
import compare_rows
import compare_tables as tables
import page
from compare_rows import ROOT, Results

from nanogpt_fast.command import run_command
from nanogpt_fast.errors import ConfigError

RESULTS = ROOT / "bench/results"
NO_STEPS = "No row of a training step (bench step) is in these results: python bench/run.py --suite step --out DIR"


def sections(results: Results, plots: list[compare_plots.Plot], no_plots: str) -> list[tuple[str, list[Any]]]:
    """(heading, blocks) of the page; a block is Html, a paragraph's text, a Plot, or (header, rows, notes)."""
    steps = compare_rows.step_results(results.rows)
    found: list[tuple[str, list[Any]]] = []
    formulas = (["column", "how it is counted", "source"], [list(row) for row in tables.FORMULAS], [tables.SYMBOLS])
    if steps:
        (header, rows), left_out = tables.main_table(steps)
        notes = [
            "n/a: not measured, or its peak or peer is unknown. Hover over an underlined figure for what it is of."
        ]
        notes += [f"Left out, since no row has them: {', '.join(left_out)}."] if left_out else []
        found.append(("How each column is counted", [formulas]))
        found.append(("Training steps", [(header, rows, notes)]))
    else:
        found.append(("Training steps", [NO_STEPS]))
    found.append(("Plots", [*plots, *([no_plots] if no_plots else [])]))
    pairs = tables.same_machine(steps)
    if pairs:
        about = (
            "The newest result of each commit and dtype of an arm against an older one, on machines that nothing "
            "recorded tells apart. Where the two were not interleaved, the machine may have been faster or slower at "
            "one time: the range in brackets is then quartile over quartile, no confidence interval. How far the "
            "machine drifted shows in the arms that no commit of ours changes; free of it is the change of times "
            "stock, each from within its own run."
        )
    else:
        about = "No machine here has one arm and model at two commits or in two dtypes."
    found.append(("Two versions on one machine", [about, *([(*tables.pairs_table(pairs), [])] if pairs else [])]))
    if runs := compare_rows.whole_runs(results.rows):
        about = (
            "Whole trainings from start to end, evaluations and checkpoints inside: median (quartiles), and the wall "
            "time over stock nanoGPT's of the same round (below 1 is faster)."
        )
        found.append(("Whole runs", [about, (*tables.whole_runs_table(runs), [])]))
    found += compare_kinds.sections(results.rows)
    about = (
        "Figures that others published, for orientation: other machines, versions and often models, mostly inside runs "
        "of 8 GPUs. They are no rows of the tables above and nothing is divided by them."
    )
    found.append(("Published by others", [about, (*tables.published_table(), [])]))
    read = (*tables.inputs_table(results.rows, results.files), results.notes)
    found.append(("What was read", [read]))
    return found


def html_of(parts: list[tuple[str, list[Any]]], lead: str) -> str:
    def block(name: str, part: Any) -> Any:
        if isinstance(part, tuple):
            header, rows, notes = part
            return page.table(header, rows, label=name, notes=notes)
        return page.figure(part.png, part.caption) if isinstance(part, compare_plots.Plot) else part

    built = [(name, [block(name, part) for part in blocks]) for name, blocks in parts]
    return page.document("Training speed across GPUs, dates and commits", built, lead=lead)


def markdown_of(parts: list[tuple[str, list[Any]]], lead: str) -> str:
    lines = ["# Training speed across GPUs, dates and commits", "", lead, ""]
    for name, blocks in parts:
        lines += [f"## {name}", ""]
        for part in blocks:
            if isinstance(part, tuple):
                header, rows, notes = part
                lines += [page.markdown_table(header, rows), *(f"- {page.markdown_text(note)}" for note in notes)]
            elif isinstance(part, compare_plots.Plot):
                lines += [f"![{page.markdown_text(part.caption)}]({part.name})", "", page.markdown_text(part.caption)]
            else:
                lines += [page.markdown_text(part)]
            lines += [""]
    return "\n".join(lines)


def write(out: Path, name: str, data: str | bytes) -> Path:
    """ConfigError where that cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", errors="replace"))
    except OSError as error:
        raise ConfigError("the comparison cannot be written", where=f"--out {out}", found=str(error)) from None
    return out / name


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="JSON lines, or folders of them (bench/results)")
    parser.add_argument("--out", type=Path, default=Path("out-compare"), help="folder for the page (out-compare)")
    parser.add_argument("--check", type=Path, metavar="FILE", help="only say what a file lacks before it is sent")
    args = parser.parse_args(argv)
    if args.check and args.results:
        raise ConfigError("--check takes one file and no others", found=" ".join(map(str, args.results)))
    return args


def main(argv: list[str]) -> int:
    args = parsed(argv)
    if args.check:
        return compare_check.main(args.check)
    results = compare_rows.read(args.results or [RESULTS])
    steps = compare_rows.step_results(results.rows)
    plots, no_plots = compare_plots.draw_all(steps, tables.same_machine(steps))
    names = {compare_rows.machine_name(row) for row in results.rows}
    lead = (
        f"{len(results.rows):,} rows, {len(results.files)} files, machines by name: {len(names)}. Written "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC by bench/compare.py. Measured rows only, but "
        "for the table of published ones."
    )
    parts = sections(results, plots, no_plots)
    for plot in plots:
        write(args.out, plot.name, plot.png)
    for name, data in (("compare.md", markdown_of(parts, lead)), ("compare.html", html_of(parts, lead))):
        print(f"wrote {write(args.out, name, data)}")
    for note in results.notes:
        print(f"note: {note}", file=sys.stderr)
    if no_plots:
        print(f"note: {no_plots}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
