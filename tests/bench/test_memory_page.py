"""docs/memory.md is what its script writes."""

from pathlib import Path

import memory_page
import page_blocks
import pytest

from nanogpt_fast.errors import ConfigError


@pytest.mark.parametrize("only", ["state", "cost", "head", pytest.param(None, marks=pytest.mark.slow)])
def test_the_page_is_up_to_date(only: str | None, capsys: pytest.CaptureFixture):
    found = memory_page.main(["--check", *(["--only", only] if only else [])])
    assert found == 0, "run: python profiling/memory_page.py"
    names = {match[1].split()[0] for match in page_blocks.BLOCK.findall(memory_page.PAGE.read_text())}
    assert names == set(memory_page.MAKERS), "a maker without a block, or the reverse"


def test_a_changed_figure_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    text = memory_page.PAGE.read_text()
    changed = tmp_path / "memory.md"
    changed.write_text(text.replace("| bfloat16 | 6 | 4 | 8 | 18 |", "| bfloat16 | 6 | 4 | 8 | 17 |"))
    assert changed.read_text() != text
    monkeypatch.setattr(memory_page, "PAGE", changed)
    assert memory_page.main(["--check", "--only", "state"]) == 1
    assert memory_page.main(["--only", "state"]) == 0 and changed.read_text() == text
    changed.write_text("<!-- figures: speed -->\n<!-- end -->")
    with pytest.raises(ConfigError, match="unknown figures 'speed'"):
        memory_page.main([])


def test_a_step_that_fits_is_the_largest_power_of_two(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory_page, "parts", lambda of: {"all": 10 * of.batch_size})
    of = memory_page.plan(memory_page.MODELS["124m"])
    assert [memory_page.largest(of, budget) for budget in (9, 10, 79, 80, 1e9)] == [0, 1, 4, 8, 512]


def test_rebuilding_costs_a_third_of_the_blocks(capsys: pytest.CaptureFixture):
    """A forward is a third of forward and backward; the head's share is not run again."""
    shares = [int(row.split("|")[4].strip(" %")) for row in memory_page.cost("124m", "1558m").splitlines()[2:]]
    assert 20 < shares[0] < shares[1] <= 33
