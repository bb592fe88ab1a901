"""Rows of sampling, loader and profile, and rows in general, as cells of a table: what bench/report.py's page of one
run and bench/compare.py's of many show alike. Needs no torch."""

from typing import Any

from compare_rows import Row, number, quartiles, seconds_of

SAMPLE = ["arm", "ms a token", "quartiles", "tokens/s", "times the first's speed", "note"]
LOADER = ["", "batch", "M tokens/s", "us a batch", "us in next()", "data wait"]
PROFILE = ["part", "ms a step", "share", "floor ms", "floor / measured"]


def latest(rows: list[Row], *keys: str) -> list[Row]:
    """The last row of each combination of these fields, where it was written last."""
    last: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(str(row.get(name)) for name in keys)
        last.pop(key, None)
        last[key] = row
    return list(last.values())


def ok(row: Row) -> bool:
    return row.get("status", "ok") == "ok"


def spread(values: list[float]) -> str:
    """Median (quartiles) of ratios."""
    q1, median, q3 = quartiles(values)
    return f"{median:.3f} ({q1:.3f} to {q3:.3f})"


def paired(mine: Row | None, theirs: Row) -> str:
    """What mine takes of theirs, round by round; "" where the two did not take turns."""
    if mine is None or mine is theirs or mine.get("run") != theirs.get("run"):
        return ""
    pairs = list(zip(seconds_of(mine), seconds_of(theirs)))
    return spread([a / b for a, b in pairs]) if pairs else ""


def quartile_range(row: Row, scale: float = 1.0) -> str:
    """As in "1.2 to 1.4"; "" where the row has no quartiles."""
    q1, q3 = number(row, "q1"), number(row, "q3")
    return "" if q1 is None or q3 is None else f"{q1 * scale:.4g} to {q3 * scale:.4g}"


def percent(value: float | None, digits: int = 1) -> str | None:
    return None if value is None else f"{value:.{digits}%}"


def sample_cells(row: Row, first: Row | None) -> list[Any]:
    """SAMPLE's, the speed beside that of `first`."""
    if not ok(row):
        return [row.get("arm"), *[None] * 4, row["status"]]
    return [row.get("arm"), number(row, "ms_token"), quartile_range(row), number(row, "tokens_per_s"),
            paired(first, row), ""]  # fmt: skip


def loader_cells(row: Row) -> list[Any]:
    """LOADER's; there is no data wait where nobody reads at a rate of its own."""
    name = row.get("worker") if row.get("table") == "worker" else f"{row.get('format')}, {row.get('order')}"
    rate = number(row, "tokens_per_s")
    return [name, f"{row.get('batch_size')}x{row.get('block_size')}", None if rate is None else rate / 1e6,
            number(row, "us_batch"), number(row, "wait_us"), percent(number(row, "data_wait"), 3)]  # fmt: skip


def profile_cells(row: Row) -> list[Any]:
    """PROFILE's."""
    return [row.get("part"), number(row, "ms"), percent(number(row, "share")), number(row, "floor_ms"),
            percent(number(row, "of_floor"))]  # fmt: skip
