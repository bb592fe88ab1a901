"""A run's results for a reader: tables on the terminal, plots, and one HTML page.

    python bench/report.py DIR        of what bench/run.py left in DIR; it calls this itself

Ratios are of medians within a round, over the rounds: median (quartiles). The share of the roof is of what this machine
was measured to do (bench/roof.py), not of a data sheet.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import page
from report_sections import Section, every_section, read

from nanogpt_fast.command import run_command
from nanogpt_fast.errors import DataError

LEFT = (
    "",
    "arm",
    "note",
    "reason",
    "who",
    "value",
    "contestant",
    "mode",
    "of",
    "op",
    "part",
    "unit",
)  # columns of words
BAD = (
    "missing",
    "not installed",
    "failed",
    "WRONG",
    "not timed",
    "out of memory",
    "no time",
    "ended",
    "broken",
)  # a reason begins so


def sections(folder: Path, cannot: Sequence[str]) -> list[Section]:
    """DataError where there are no results."""
    rows = read(folder)
    if not rows:
        raise DataError("there are no results", where=str(folder), expected="*.jsonl of bench/run.py", found="none")
    return every_section(rows, list(cannot))


def print_sections(found: list[Section]) -> None:
    """By rich where it is installed; tables as wide as they are where the output is no terminal."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for section in found:
            print("\n".join([f"\n{section.title}", *section.text]))
            for _, header, rows in section.tables:
                print(machine.table(header, rows))
        return
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for section in found:
        console.print(f"\n[bold]{section.title}[/bold]")
        for text in section.text:
            console.print(Text(text))
        for caption, header, rows in section.tables:
            grid = Table(title=caption, title_justify="left", title_style="dim", box=None, pad_edge=False)
            for i, name in enumerate(header):
                grid.add_column(
                    name,
                    justify="left" if i == 0 or name in ("note", "reason", "who", "value", "contestant") else "right",
                )
            for row in rows:
                grid.add_row(*(Text(page.shown(cell) if cell is not None else "-") for cell in row))
            console.print(grid)


def write(folder: Path, cannot: Sequence[str] = (), quiet: bool = False) -> Path:
    """Print, draw and write the page of a folder's results; its path. DataError where there are none."""
    found = sections(folder, cannot)
    if not quiet:
        print_sections(found)
    parts = []
    for section in found:
        blocks: list[Any] = [page.paragraph(text) for text in section.text]
        for caption, header, rows in section.tables:
            blocks.append(page.table(header, [[_marked(cell) for cell in row] for row in rows], caption=caption))
        for i, (draw, caption) in enumerate(section.charts):
            picture = folder / f"{page.anchor(section.title)}{f'-{i}' if i else ''}.png"
            try:
                draw(picture)
                blocks.append(page.figure(picture, caption))
            except ImportError as problem:
                blocks.append(page.paragraph(f"No plot: {problem}. pip install 'nanogpt-fast[plot]'"))
        parts.append((section.title, blocks))
    target = folder / "report.html"
    facts = found[0].tables[0][2]
    lead = ", ".join(str(value) for name, value in facts if name in ("gpu", "cpu", "torch", "commit"))
    target.write_text(page.document("nanogpt_fast: how fast, beside what, why not faster", parts, lead=lead))
    return target


def _marked(cell: Any) -> Any:
    return page.Cell(cell, bad=True) if isinstance(cell, str) and cell.startswith(BAD) else cell


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    print(f"\n{write(args.folder)}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
