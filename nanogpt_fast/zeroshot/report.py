"""Figures as a table on the console, Markdown, CSV or JSON lines, the paper's beside them."""

import csv
import io
import json
import math
from typing import Any

from nanogpt_fast.columns import columns
from nanogpt_fast.zeroshot.figures import MEANING, Figure
from nanogpt_fast.zeroshot.published import OTHERS, PAPER, SIZES

FORMS = (".md", ".csv", ".jsonl")


class Report:
    """What has been measured so far of one model."""

    def __init__(self, facts: dict[str, Any]):
        self.facts = facts  # of the model and how it was run
        self.data: dict[str, dict[str, Any]] = {}  # {task: source, sha256, note, seconds}
        self.found: list[tuple[str, Figure]] = []  # a group's figures are of other tasks than the one asked for

    def add(self, task: str, data: dict[str, Any], figures: list[Figure]) -> None:
        self.data[task] = data
        self.found += [(task, figure) for figure in figures]

    def rows(self) -> list[dict[str, Any]]:
        """One row a figure, for machines."""
        rows = []
        for task, figure in self.found:
            key = figure.task, figure.metric
            said, source = OTHERS.get(key, ("", ""))
            paper = dict(zip((f"paper_{size}" for size in SIZES), PAPER.get(key, (None,) * len(SIZES))))
            own = {"task": figure.task, "metric": figure.metric, "value": figure.value}
            own |= {"stderr": None if math.isnan(figure.stderr) else figure.stderr}
            own |= {"better": "higher" if figure.higher else "lower"}
            told = {"count": figure.count or None, "others": said, "others_source": source}
            rows.append({**own, **paper, **told, **self.data[task], **self.facts})
        return rows

    def in_form(self, form: str) -> str:
        """The report as one of FORMS."""
        if form == ".jsonl":
            return "".join(json.dumps(row) + "\n" for row in self.rows())
        if form == ".md":
            return self.markdown()
        out, rows = io.StringIO(), self.rows()
        writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def cells(self) -> list[list[str]]:
        """The table: a header, then a row a figure."""
        cells = [["task", "figure", "this model", "+/-", *SIZES, "over"]]
        for _, figure in self.found:
            paper = PAPER.get((figure.task, figure.metric))
            theirs = [_number(value, figure) for value in paper] if paper else [""] * len(SIZES)
            spread = "" if math.isnan(figure.stderr) else _number(figure.stderr, figure, spread=True)
            over = f"{figure.count:,}" if figure.count else ""
            cells.append([figure.task, figure.metric, _number(figure.value, figure), spread, *theirs, over])
        return cells

    def lines(self) -> list[str]:
        """For the console: facts, data, the table, what stands in it."""
        cells, told = self.cells(), {**self.facts, **{task: _data(data) for task, data in self.data.items()}}
        longest = max(map(len, told))
        notes = [note for title, part in self._notes().items() for note in ("", title, *(f"  {line}" for line in part))]
        return [*(f"{key:{longest}}  {value}" for key, value in told.items()), "", *columns(cells, left=2), *notes]

    def markdown(self) -> str:
        header, *rows = self.cells()
        bars = ["| " + " | ".join(row) + " |" for row in (header, ["---", "---", *["---:"] * (len(header) - 2)], *rows)]
        told = [f"- {key}: {value}" for key, value in self.facts.items()]
        told += [f"- {task}: {_data(data)}" for task, data in self.data.items()]
        notes = [
            note for title, part in self._notes().items() for note in ("", title, "", *(f"- {line}" for line in part))
        ]
        return "\n".join(["# Zero-shot", "", *told, "", *bars, *notes]) + "\n"

    def _notes(self) -> dict[str, list[str]]:
        """{title: lines}: what the columns and figures are, what others measured."""
        metrics = dict.fromkeys(figure.metric for _, figure in self.found)
        notes = {
            "117M ... 1542M are the GPT-2 paper's, +/- one standard error, and the figures:": [
                f"{metric}: {MEANING.get(metric, 'as lm-eval counts it')}" for metric in metrics
            ]
        }
        keys = dict.fromkeys((figure.task, figure.metric) for _, figure in self.found)
        others = ["{} {}: {} ({})".format(*key, *OTHERS[key]) for key in keys if key in OTHERS]
        return {**notes, "Others, of OpenAI's weights:": others} if others else notes


def _data(data: dict[str, Any]) -> str:
    told = [data["source"], f"sha256 {data['sha256'][:16]}" if data["sha256"] else "", data["note"]]
    return "; ".join(filter(None, [*told, f"{data['seconds']:,.1f} s"]))


def _number(value: float, figure: Figure, spread: bool = False) -> str:
    """Shares in percent, as the paper has them."""
    if figure.metric.startswith("acc"):
        return f"{100 * value:.2f}"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2g}" if spread and value < 1 else f"{value:,.{3 if figure.metric.startswith('bits') else 2}f}"
