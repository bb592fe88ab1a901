"""bench/isoflop.py: which runs it makes, and its report on runs of a law that is known."""

import math
from pathlib import Path
from typing import Any

import ablate
import isoflop
import isoflop_page
import isoflop_report as report
import machine
import pytest
import stub_trainer

from nanogpt_fast.data.preparation import PrepareConfig, prepare
from nanogpt_fast.errors import ConfigError
from nanogpt_fast.hardware import flops_per_token
from nanogpt_fast.scaling_laws import Law

TRUE = Law("true", 1.2, 60.0, 900.0, 0.4, 0.5)
UNIQUE = 1e9
RATES = (0.01, 0.02)


def rows(budgets: tuple[float, ...] = (1e12, 4e12, 1.6e13), wobble: float = 0.0) -> list[dict[str, Any]]:
    """Of sizes around TRUE's best at each budget, the second rate worse by 0.1, the second seed up by wobble."""
    made = []
    for budget in budgets:
        for i, factor in enumerate((0.5, 0.7, 1.0, 1.4, 2.0)):
            params = round(TRUE.optimum(budget)[0] * factor)
            tokens = budget / 6 / params
            for rate, seed in ((0.01, 1), (0.02, 1), (0.01, 2)):
                loss = TRUE.loss(params, tokens) + 0.1 * (rate == 0.02) + wobble * (seed == 2)
                made.append({"budget": budget, "shape": f"2x{4 * (i + 3)}", "params": params, "tokens": tokens,
                             "of_text": tokens / UNIQUE, "seed": seed, "flags": {"learning_rate": rate},
                             "val_loss": loss, "status": "ok", "data": "d", "config": "c"})  # fmt: skip
    return made


def test_a_size_is_worth_its_best_rate_in_every_seed():
    found = report.sizes(rows(wobble=0.02))
    assert len(found) == 15 and {one.rate for one in found} == {0.01}
    assert all(len(one.losses) == 2 and set(one.by_rate) == {0.01, 0.02} for one in found)
    assert found[0].loss == pytest.approx(found[0].losses[0] + 0.01)
    assert report.noise(found) == pytest.approx(0.02 / 2**0.5)
    assert [one.params for one in found[:5]] == sorted(one.params for one in found[:5])


def test_of_runs_that_do_not_compare_the_last_kind_is_taken():
    mixed = [{**row, "data": "older", "val_loss": 0.0} for row in rows()] + rows()
    assert report.sizes(mixed) == report.sizes(rows())
    again = [*rows(), {**rows()[0], "val_loss": 1.0}]
    assert report.sizes(again)[0].losses[0] == 1.0, "of one run the last"


def test_the_fits_find_the_law_that_the_runs_are_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "SAMPLES", 5)
    found = report.sizes(rows())
    true = TRUE.exponent
    assert report.slope(found, [one.loss for one in found]) == pytest.approx(true, abs=0.005)
    fitted, laws = report.law_of(found)
    assert fitted.law.exponent == pytest.approx(true, abs=0.003) and len(laws) == 5
    assert abs(fitted.law.E - TRUE.E) < 0.01
    header, lines = report.foretold_table(found)
    assert header[0] == "1.6e13 FLOPs" and max(abs(float(line[-1])) for line in lines[:-1]) < 0.002
    slopes = dict(line[:2] for line in report.exponent_table(found, fitted, laws)[1])
    assert float(slopes["ours, parabolas, every size at a rate of 0.02"]) == pytest.approx(true, abs=0.01)


def test_a_valley_without_a_bottom_between_its_sizes_has_none():
    found = [one for one in report.sizes(rows()) if one.params < 1.2 * TRUE.optimum(one.budget)[0]]
    falling = [1 / one.params for one in found]
    assert report.lowest(found, 1e12, falling) is None
    assert math.isnan(report.slope(found, falling))
    table = report.budget_table(report.sizes(rows())[:2])
    assert table[1][0][3:] == ["-"] * 4


def test_the_report_says_what_is_missing():
    assert "isoflop.py --run" in report.text([])[0]
    assert "no law yet" in report.text(rows((1e12,))[:6])[-1]


OUTCOME = """
loss = float(flags["n_embd"]) / 100 + abs(float(flags["learning_rate"]) - 0.02)
code = 6 if float(flags["learning_rate"]) > 1 else 0
"""
SHAPES = ["--budgets=1e10", "--shapes", "2x8", "2x16"]


def prepared(tmp_path: Path, tokens: int) -> list[str]:
    """Flags of a text of so many characters."""
    (tmp_path / "text.txt").write_text("".join(chr(32 + i % 90) for i in range(tokens)))
    text = PrepareConfig(name="mine", source=str(tmp_path / "text.txt"), out=str(tmp_path / "mine"), tokenizer="char",
                         val_fraction=0.1, num_proc=1)  # fmt: skip
    prepare(text)
    return ["--dataset=mine", "--data_dir", str(tmp_path), "--out", str(tmp_path / "out")]


def test_other_seeds_are_of_the_best_rate_and_nothing_is_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    stub_trainer.use(monkeypatch, tmp_path, OUTCOME)
    words = [*prepared(tmp_path, 400_000), *SHAPES, "--rates", "0.01", "0.02", "2", "--run", "--jobs=2"]
    assert isoflop.main(words) == 0
    made = machine.read_lines(tmp_path / "out/isoflop.jsonl")
    rates = [(row["shape"], row["flags"]["learning_rate"], row["seed"]) for row in made]
    first = [(shape, rate, 1337) for shape in ("2x8", "2x16") for rate in (0.01, 0.02, 2.0)]
    assert sorted(rates[:6]) == sorted(first) and sorted(rates[6:]) == [("2x16", 0.02, 1338), ("2x8", 0.02, 1338)]
    row, config = made[-1], ablate.config_of(made[-1]["flags"], isoflop.parsed(words))
    tokens = row["flags"]["max_iters"] * config.tokens_per_iter
    assert row["flops"] == tokens * flops_per_token(ablate.shape_of(config))["nanogpt"]
    assert row["flops"] == pytest.approx(1e10, rel=0.03) and row["of_text"] == pytest.approx(tokens / 360_000, rel=0.01)
    capsys.readouterr()
    assert isoflop.main(words) == 0 and len(machine.read_lines(tmp_path / "out/isoflop.jsonl")) == 8
    assert "6 of 6 runs" in capsys.readouterr().out


def test_a_rate_at_the_end_is_followed_by_its_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stub_trainer.use(monkeypatch, tmp_path, OUTCOME)
    words = [*prepared(tmp_path, 400_000), "--budgets=1e10", "--shapes", "2x8", "--rates", "0.08", "0.16", "--seeds=1"]
    assert isoflop.main([*words, "--run"]) == 0
    made = machine.read_lines(tmp_path / "out/isoflop.jsonl")
    assert [row["flags"]["learning_rate"] for row in made[2:]] == [0.04, 0.02, 0.01], "until one is worse"


def test_a_size_that_would_see_the_text_too_often_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert isoflop.main([*prepared(tmp_path, 110_000), *SHAPES]) == 0
    shown = capsys.readouterr().out
    assert "2x16" in shown and "2x8" not in shown, "that would see it more than twice"


def test_rates_go_on_until_the_best_is_between_others():
    assert isoflop.rate_beyond({0.01: 3.0, 0.02: 2.0}) == 0.04
    assert isoflop.rate_beyond({0.01: 2.0, 0.02: 3.0}) == 0.005
    for settled in ({0.01: 3.0, 0.02: 2.0, 0.04: math.inf}, {0.01: 2.0}, {0.01: math.inf, 0.02: math.inf}):
        assert isoflop.rate_beyond(settled) is None
    assert isoflop.rate_beyond({0.01: 2.0, 0.02: math.nan}) is None, "before the run is there"


@pytest.mark.parametrize(
    "words", [["--budgets=1e9"], ["--dataset=mine"], ["--shapes", "2x8", "--seeds=0"], ["--jobs=0"]]
)
def test_a_grid_for_something_else_is_asked_for(words: list[str]):
    with pytest.raises(ConfigError):
        isoflop.parsed(words)


def test_a_shape_that_is_none(tmp_path: Path):
    args = isoflop.parsed(["--budgets=1e9", "--shapes", "wide", "--data_dir", str(tmp_path)])
    with pytest.raises(ConfigError, match="LAYERSxWIDTH"):
        isoflop.grid(args)


def test_a_budget_of_too_few_iterations(tmp_path: Path):
    args = isoflop.parsed([*prepared(tmp_path, 1_000), "--budgets=1e9", "--shapes", "4x256"])
    with pytest.raises(ConfigError, match="no run of that size"):
        isoflop.grid(args)


@pytest.mark.slow  # it fits some thousand laws
def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]):
    assert isoflop_page.main(["--check"]) == 0, "run python bench/isoflop_page.py"
