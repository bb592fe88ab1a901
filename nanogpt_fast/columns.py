"""Text in columns, as every table on a terminal is."""

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A line a row, columns as wide as they must be; the first `left` stand to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return ["  ".join(side(text, w) for side, text, w in zip(sides, row, widths)).rstrip() for row in rows]
