"""docs/performance.md is what its script writes, and holds no figure that was typed in."""

import json
import re
from pathlib import Path

import machine
import page_blocks
import performance_page
import pytest
from work import HALF, cross_entropy_bytes

from nanogpt_fast.errors import ConfigError, DataError


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture):
    assert performance_page.main(["--check"]) == 0, "run: python bench/performance_page.py"


def test_a_changed_figure_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    text = performance_page.PAGE.read_text()
    changed = tmp_path / "performance.md"
    changed.write_text(text.replace("73.3%", "74.3%"))
    assert changed.read_text() != text
    monkeypatch.setattr(performance_page, "PAGE", changed)
    assert performance_page.main(["--check"]) == 1
    assert performance_page.main([]) == 0 and changed.read_text() == text


def test_no_figure_stands_outside_of_a_block():
    prose = page_blocks.BLOCK.sub("", performance_page.PAGE.read_text())
    prose = re.sub(r"```.*?```|`[^`]*`", "", prose, flags=re.DOTALL)
    assert not re.findall(r"\d[\d.,]*\s*(?:%|ms|us|s\b|x\b|times|K\b|M\b|GB|TFLOP|tokens)", prose)


def test_the_floor_s_parts_are_the_whole_step():
    """The total of the table's parts, against the sum by hand of one of them."""
    table = performance_page.floor("124m", "h100")
    total = float(re.search(r": ([\d.]+) ms at least", table)[1])  # type: ignore[index]
    parts = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[4:]]
    assert sum(float(part[3]) for part in parts) == pytest.approx(total, abs=0.4)
    logits = next(part for part in parts if part[0] == "cross-entropy in place")
    assert float(logits[2]) == pytest.approx(cross_entropy_bytes(2**19, 50304, passes=2) / 1e9, abs=0.05)
    assert float(logits[3]) == pytest.approx(HALF * 2 * 2**19 * 50304 / 3.35e12 * 1e3, abs=0.05)


def test_results_become_tables_and_what_is_missing_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "bench/results/cpu").mkdir(parents=True)
    row = {"bench": "train", "arm": "ours", "round": 0, "status": "ok", "wall_s": 12.5, "iter_ms": 3.0, "val_loss": 1.5,
           "iterations": 200}  # fmt: skip
    (tmp_path / "bench/results/cpu/day.jsonl").write_text(json.dumps(row) + "\n")
    made = performance_page.results("cpu/day.jsonl", "Whole training runs")
    assert "| ours | 12.5 | 3 | 1.5 |" in made and "bench/results/cpu/day.jsonl" in made
    with pytest.raises(DataError, match="not there"):
        performance_page.results("cpu/night.jsonl", "Sampling")
    with pytest.raises(DataError, match="no section 'Sampling'"):
        performance_page.results("cpu/day.jsonl", "Sampling")
    with pytest.raises(ConfigError, match="unknown figures 'speed'"):
        page_blocks.filled("<!-- figures: speed x -->\n<!-- end -->", performance_page.MAKERS, tmp_path)
