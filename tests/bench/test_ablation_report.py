"""bench/ablate.py's report: the arithmetic, which runs are compared, and docs/ablations.md."""

import json
import math
from pathlib import Path
from typing import Any

import ablation_page
import ablation_report
import ablation_study
import pytest
from ablation_report import Outcome, holm, outcomes, t_quantile, t_two_sided
from ablation_study import Arm, Study

STUDY = Study("toy", "Is b better?", "", "a", (Arm("a", {}), Arm("b", {"grad_clip": 0.5}), Arm("c", {"bias": True})))


def test_student_s_t():
    """Quantiles of any statistics table."""
    for share, freedom, t in ((0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 4, 2.77645), (0.995, 9, 3.24984)):
        assert t_quantile(share, freedom) == pytest.approx(t, abs=1e-4)
        assert t_two_sided(t, freedom) == pytest.approx(2 * (1 - share), abs=1e-5)
    assert t_two_sided(0.0, 4) == 1.0


def row(arm: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    flags = {"max_iters": 10, **next((one.flags for one in STUDY.arms if one.name == arm), {})}
    return {
        "arm": arm,
        "seed": seed,
        "val_loss": loss,
        "status": "ok",
        "data": "d",
        "config": "c",
        "flags": flags,
        **more,
    }


def test_differences_are_paired_by_seed():
    found = outcomes(STUDY, [row("a", s, x) for s, x in enumerate((1.0, 2.0, 3.0))]
                     + [row("b", s, x) for s, x in enumerate((0.9, 1.8, 2.9))] + [row("b", 7, 99.0)])  # fmt: skip
    a, b = found
    assert (a.arm, a.mean, a.spread, a.differences) == ("a", 2.0, 1.0, [])
    assert b.differences == pytest.approx([-0.1, -0.2, -0.1]) and b.better == 3
    sd = math.sqrt(2 * (0.1 / 3) ** 2 + (0.2 / 3) ** 2) / math.sqrt(2)
    assert b.difference == pytest.approx(-0.4 / 3) and b.effect == pytest.approx(-0.4 / 3 / 1.0)
    assert b.half_width == pytest.approx(4.30265 * sd / math.sqrt(3), rel=1e-4)
    assert b.p == pytest.approx(t_two_sided(0.4 / 3 / (sd / math.sqrt(3)), 2))


def test_other_data_and_lengths_are_not_mixed_in():
    old = [row("a", 1, 5.0, data="old"), row("b", 1, 4.0, flags={"max_iters": 99, "grad_clip": 0.5})]
    (a,) = outcomes(STUDY, [*old, row("a", 1, 2.0), row("a", 1, 1.0)])
    assert a.losses == {1: 1.0}, "and of one run the last"


def test_an_arm_s_older_flags_and_other_arithmetic_are_not_mixed_in():
    old = [row("b", 1, 4.0, flags={"max_iters": 10, "grad_clip": 0.9}), row("a", 2, 4.0, dtype="float32")]
    found = outcomes(STUDY, [*old, row("b", 2, 3.0, dtype="bfloat16"), row("a", 1, 1.0, dtype="bfloat16")])
    assert {one.arm: one.losses for one in found} == {"a": {1: 1.0}, "b": {2: 3.0}}


def test_an_arm_that_changes_nothing_counts_among_the_compared():
    same = Outcome("same", {}, 0, [0.0, 0.0, 0.0], 1.0, None, None)
    other = Outcome("other", {}, 0, [-1.0, -1.1, -1.2], 1.0, None, None)
    assert same.p == 1.0 and 0.0025 < other.p < 0.0035
    assert holm([same, other]) == {"other"} and holm([other, *[same] * 20]) == set()


def test_holm_stops_at_the_first_that_fails():
    class Fixed(Outcome):
        @property
        def p(self) -> float:
            return float(self.arm)

    def arms(*values: str) -> list[Outcome]:
        return [Fixed(value, {}, 0, [], 1.0, None, None) for value in values]

    assert holm(arms("0.001", "0.02", "0.03", "nan")) == {"0.001", "0.02", "0.03"}
    assert holm(arms("0.001", "0.03", "0.04")) == {"0.001"}
    assert holm(arms("0.02", "0.9", "0.9")) == set()


def test_the_report_and_the_picture(tmp_path: Path):
    curve = [[0, 4.0], [5, 3.0], [10, 2.0]]
    found = [
        row(arm, s, x + s / 10, clipped=12.0, grad_norm=0.5, curve=curve)
        for s in range(3)
        for arm, x in (("a", 2.0), ("b", 1.5))
    ]
    lines = ablation_report.text(STUDY, [*found, {**row("c", 0, 0.0), "status": "diverged"}])
    table = {line.split()[0]: line for line in lines[2:-1]}
    assert "-0.5000" in table["b"] and "3 of 3" in table["b"] and "12%" in table["a"]
    assert "1 failed" in table["c"]
    pytest.importorskip("matplotlib")
    ablation_page.draw([("toy", outcomes(STUDY, found))], tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000
    ablation_page.draw_curves([("toy", outcomes(STUDY, found)), ("none", [])], tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 5000


def test_what_may_be_chance_is_counted_over_all_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And a run that two studies have in common is looked at for its bits."""
    for name in ("one", "two"):
        lines = [row("a", s, 2.0, key=f"a{s}") for s in range(3)]
        lines += [row("b", s, 2.0 - x, key=f"{name}{s}") for s, x in enumerate((0.10, 0.06, 0.08))]
        lines += [row("b", 0, 1.9 if name == "one" else 1.8, key="b0")]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(ablation_page, "RESULTS", tmp_path)
    monkeypatch.setattr(ablation_study, "names", lambda: ["one", "two"])
    monkeypatch.setattr(ablation_study, "load", lambda name: STUDY)
    said = ablation_page.chance()
    assert said.startswith("2 arms were compared") and "4 runs were made more than once" in said
    assert said.endswith("the same to the last bit in 3 of them.\n")


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]):
    assert ablation_page.main(["--check"]) == 0, "run: python bench/ablation_page.py"
    assert ablation_page.PICTURE.is_file()
