"""The sections of bench/compare.py about rows that are no training step: sampling, the loader, where a step goes.

The cells are those of a run's own report (row_cells.py), beside the machine, date and commit of their run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import row_cells
from compare_rows import Row, commit, day, machine_name, number, on_gpu, text
from page import Cell

Section = tuple[str, list[Any]]  # as bench/compare.py's: heading, blocks


def sections(rows: Sequence[Row]) -> list[Section]:
    """A section for each kind that has rows."""
    made = [(kind, make([row for row in rows if row.get("bench") == kind])) for kind, make in MAKERS.items()]
    return [(TITLES[kind], blocks) for kind, blocks in made if blocks]


def runs_of(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each run of each file, by machine (GPUs first), the newest run first."""
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        runs.setdefault((row["file"], text(row, "run"), machine_name(row)), []).append(row)
    newest = sorted(runs.values(), key=lambda run: max(text(row, "time") for row in run), reverse=True)
    return sorted(newest, key=lambda run: (not on_gpu(run[0]), machine_name(run[0])))


def _where(row: Row) -> list[Any]:
    """Which run a row is of: WHERE's cells."""
    return [machine_name(row), text(row, "config") or None, text(row, "dtype") or None, day(row) or None, commit(row)]


WHERE = ["GPU or CPU", "model", "dtype", "date", "commit"]


def _bad(cells: list[Any], row: Row) -> list[Any]:
    """The cells; of a row that failed its reason is marked."""
    return cells if row_cells.ok(row) else [*cells[:-1], Cell(text(row, "status"), bad=True)]


def _blocks(about: str, header: list[Any], cells: list[list[Any]], notes: Sequence[str] = ()) -> list[Any]:
    """A section's: without cells none, and without the columns that no row has a value in."""
    kept = [i for i in range(len(header)) if any(row[i] not in (None, "") for row in cells)]
    return [about, ([header[i] for i in kept], [[row[i] for i in kept] for row in cells], list(notes))] if kept else []


def samples(rows: list[Row]) -> list[Any]:
    cells = []
    for run in runs_of(rows):
        arms = row_cells.latest(run, "arm", "config", "dtype")
        first = next(filter(row_cells.ok, arms), None)
        for row in arms:
            asked = f"{text(row, 'prompt') or '?'} + {text(row, 'new_tokens') or '?'}"
            cells.append([*_bad(row_cells.sample_cells(row, first), row), asked, *_where(row)])
    about = (
        "Generating text, greedy. Speeds stand beside the first arm's of the same run, round by round; above 1 is "
        "faster. Runs are not divided by one another."
    )
    return _blocks(about, [*row_cells.SAMPLE, "prompt + new tokens", *WHERE], cells)


def loaders(rows: list[Row]) -> list[Any]:
    cells = []
    for run in runs_of(rows):
        for row in row_cells.latest(run, "table", "format", "order", "worker", "batch_size", "block_size"):
            machine, _, _, *when = _where(row)
            reads = number(row, "consumer_tokens_per_s")
            beside = f"{reads:,.0f} tokens/s" if reads else "a step on the CPU"
            cells.append([*row_cells.loader_cells(row), beside, machine, *when])
    about = "Reading batches; data wait is the share of its time that a consumer of the given rate waits for them."
    header = ["by whom, or format and order", *row_cells.LOADER[1:], "beside", "GPU or CPU", "date", "commit"]
    return _blocks(about, header, cells)


def profiles(rows: list[Row]) -> list[Any]:
    cells, notes = [], []
    for run in runs_of(rows):
        for row in run:
            if not row_cells.ok(row):
                cells.append([Cell(text(row, "status"), bad=True), *[None] * 4, *_where(row)])
            elif row.get("part") == "step":
                notes.append(f"{day(row)}, {commit(row)}: {text(row, 'text')} First: {text(row, 'advice')}")
            else:
                cells.append([*row_cells.profile_cells(row), *_where(row)])
    about = (
        "A traced step by kind of work, dearest first, beside the least that its machine could take: its data sheet's "
        "rates, or of a CPU those measured beside the trace. Tracing slows a step down."
    )
    return _blocks(about, [*row_cells.PROFILE, *WHERE], cells, notes)


MAKERS: dict[str, Callable[[list[Row]], list[Any]]] = {"profile": profiles, "sample": samples, "loader": loaders}
TITLES = {"profile": "Where the step goes", "sample": "Sampling", "loader": "Loader"}
