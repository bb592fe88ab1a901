"""bench/compare_kinds.py: sampling, loader and profile rows of several runs; the cells are those of a run's report."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import compare
import compare_kinds
import compare_rows
import page
import pytest
import report
from made_up_rows import GPU, loader, profile, sample, written

LATER = {"run": "r2", "time": "2026-03-01T00:00:00+00:00", "commit": "fedcba3210"}


def tables(folder: Path, *rows: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """{heading: rows as {column: what is shown}}"""
    read = compare_rows.read([written(folder / "in/rows.jsonl", *rows)])
    found = {}
    for title, (_, (header, cells, notes)) in compare_kinds.sections(read.rows):
        found[title] = [dict(zip(header, map(page.shown, row), strict=True)) for row in cells]
        found[f"{title}, notes"] = notes
    return found


def test_an_arm_stands_beside_the_first_of_its_own_run(tmp_path: Path):
    rows = [sample("ours", [0.2, 0.4]), sample("hf", [0.4, 0.4]), sample("hf", [9.0, 9.0], **LATER),
            sample("ours", [9.0, 18.0], **LATER)]  # fmt: skip
    found = tables(tmp_path, *rows)["Sampling"]
    assert [(r["arm"], r["date"], r["times the first's speed"]) for r in found] == [
        ("hf", "2026-03-01", ""), ("ours", "2026-03-01", "0.750 (0.625 to 0.875)"),
        ("ours", "2026-01-02", ""), ("hf", "2026-01-02", "0.750 (0.625 to 0.875)"),
    ]  # fmt: skip
    assert found[2]["ms a token"] == "30" and found[2]["quartiles"] == "25 to 35"
    assert found[2]["prompt + new tokens"] == "4 + 10" and "note" not in found[2]


def test_what_failed_stays_with_its_reason(tmp_path: Path):
    lost = {**sample("hf", [1.0]), "status": "not installed: <b>transformers</b>", "ms_token": None}
    read = compare_rows.read([written(tmp_path / "a.jsonl", sample("ours", [0.2]), lost)])
    ((_, (_, (header, cells, _))),) = compare_kinds.sections(read.rows)
    cell = cells[1][header.index("note")]
    assert cell.bad and cell.value == lost["status"] and "<b>" not in str(page.table(header, cells))
    failed = {key: value for key, value in profile({})[0].items() if key in ("bench", "run", "cpu", "device")}
    found = tables(tmp_path, {**failed, "status": "failed: no trace"})["Where the step goes"]
    assert found[0]["part"] == "failed: no trace"


def test_parts_of_a_step_and_what_was_said_of_it(tmp_path: Path):
    rows = [*profile({"GELU": 3.0, "LayerNorm": 1.0}), *profile({"GELU": 2.0}, **{**LATER, **GPU})]
    found = tables(tmp_path, *rows)
    shown = [(r["part"], r["share"], r["floor / measured"], r["GPU or CPU"]) for r in found["Where the step goes"]]
    gpu = GPU["gpu"]
    assert shown == [("GELU", "100.0%", "50.0%", gpu), ("GELU", "75.0%", "50.0%", "Made-up CPU"),
                     ("LayerNorm", "25.0%", "50.0%", "Made-up CPU")]  # fmt: skip
    assert found["Where the step goes, notes"][1] == "2026-01-02, abcdef0123: A made-up step. First: make it up faster."


def test_a_loader_s_row_says_what_stood_beside_it(tmp_path: Path):
    fed = {**loader("thread"), "table": "format", "consumer_tokens_per_s": 5000.0, "data_wait": 0.0125}
    again = loader("none", us_batch=65.0)
    found = tables(tmp_path, loader("none"), fed, again)["Loader"]
    shown = [(r["by whom, or format and order"], r["us a batch"], r["data wait"], r["beside"]) for r in found]
    assert shown == [
        ("made-up .bin, shuffle", "64", "1.250%", "5,000 tokens/s"),
        ("none", "65", "n/a", "a step on the CPU"),
    ]
    assert found[0]["M tokens/s"] == "2" and found[0]["batch"] == "8x16"


def test_cells_are_those_of_the_run_s_own_report(tmp_path: Path):
    rows = {"sample": [sample("ours", [0.2, 0.4]), sample("hf", [0.4, 0.4])], "profile": profile({"GELU": 3.0}),
            "loader": [loader("none"), loader("thread")]}  # fmt: skip
    for kind, some in rows.items():
        written(tmp_path / f"{kind}.jsonl", *some)
    read = compare_rows.read([tmp_path])
    several = dict(compare_kinds.sections(read.rows))
    for section in report.sections(tmp_path, []):
        if section.title in several:
            ((_, header, cells),), (_, (theirs, their_cells, _)) = section.tables, several.pop(section.title)
            for row, other in zip(cells, their_cells, strict=True):
                both = {name: value for name, value in zip(header[1:], row[1:]) if name in theirs}
                assert both == {name: value for name, value in zip(theirs, other) if name in both} and both
                assert row[0] == other[0]
    assert not several


@pytest.mark.parametrize("kind", ["sample", "loader", "profile"])
def test_rows_that_others_cut_down_are_no_error(kind: str, tmp_path: Path):
    """As a file may be that somebody sent: without times, names or a date."""
    rows = [{"bench": kind}, {"bench": kind, "status": None}, {"bench": kind, "seconds": "x", "ms": "fast", "q1": None}]
    written(tmp_path / "in/rows.jsonl", *rows)
    assert compare.main([str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert {"sample": "Sampling", "loader": "Loader", "profile": "Where the step goes"}[kind] in (
        tmp_path / "out/compare.md").read_text()  # fmt: skip


def test_it_needs_no_torch():
    bench = Path(compare.__file__).parent
    code = f"import sys; sys.modules['torch'] = None; sys.path.insert(0, {str(bench)!r}); import compare"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
