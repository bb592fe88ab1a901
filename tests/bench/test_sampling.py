"""bench/sampling.py and bench/profile_stage.py on something tiny: rows, and what becomes of an arm that differs."""

from pathlib import Path
from typing import Any

import machine
import profile_stage
import pytest
import sample_arms
import sampling
import torch
import turns

from nanogpt_fast.errors import ConfigError

TINY = ["--device=cpu", "--tiny", "--dtype=float32", "--kernels=reference", "--rounds=3"]


def test_arms_take_turns_and_continue_alike(tmp_path: Path):
    argv = [
        *TINY,
        "--arms",
        "ours",
        "ours, no cache",
        "nobody",
        "nanogpt",
        "--nanogpt",
        "nowhere",
        "--out",
        str(tmp_path),
    ]
    assert sampling.main(argv) == 0
    nobody, stock, ours, plain = machine.read_lines(tmp_path / "sample.jsonl")
    assert nobody["status"].startswith("failed: ConfigError: unknown arm 'nobody'")
    assert stock["status"].startswith("missing: stock nanoGPT") and stock["cache"] is False
    assert (ours["arm"], ours["cache"], plain["cache"]) == ("ours", True, False)
    assert ours["x_first"] == 1.0 and len(plain["seconds"]) == 3 and (ours["new_tokens"], plain["same_ids"]) == (8, 16)
    assert ours["ms_token"] == pytest.approx(1e3 / ours["tokens_per_s"])


def test_an_arm_that_continues_otherwise_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stock = sample_arms.make_sampler

    def odd(name: str, *rest: Any) -> sample_arms.Sampler:
        made = stock("ours", *rest)

        def sample(ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
            found = made(ids, new_tokens)
            found[0, -2] += name == "odd"
            return found

        return sample

    monkeypatch.setattr(sample_arms, "make_sampler", odd)
    assert sampling.main([*TINY, "--arms", "ours", "odd", "--out", str(tmp_path)]) == 0
    wrong, ours = machine.read_lines(tmp_path / "sample.jsonl")
    assert (
        wrong["status"] == "WRONG: continues otherwise than the first arm from token 14 on" and ours["status"] == "ok"
    )
    assert sampling.main([*TINY, "--arms", "odd", "--out", str(tmp_path)]) == 0  # alone it is the measure


def test_an_arm_in_a_process_of_its_own():
    args = sampling.parsed([*TINY, "--new_tokens=5", "--prompt=4"])
    here = sampling.Here("ours", sampling.setup_of(args), args)
    there = turns.Apart(
        [sampling.sys.executable, sampling.__file__, *TINY, "--new_tokens=5", "--prompt=4", "--serve", "ours"]
    )
    try:
        assert there.facts == here.facts and len(here.facts["ids"]) == 9
        assert len(there.turn(2)["seconds"]) == 2
    finally:
        there.end()


def test_the_profile_stage_leaves_parts_that_sum_to_the_step(tmp_path: Path):
    assert profile_stage.main(["--device=cpu", "--tiny", "--steps=2", "--out", str(tmp_path)]) == 0
    rows = machine.read_lines(tmp_path / "profile.jsonl")
    (whole,) = [row for row in rows if row["part"] == "step"]
    parts = [row for row in rows if row["part"] != "step"]
    assert {row["bench"] for row in rows} == {"profile"} and whole["text"] and whole["advice"]
    assert sum(row["ms"] for row in parts) == pytest.approx(whole["ms"], rel=0.05)
    assert sum(row["share"] for row in parts) == pytest.approx(1.0, abs=0.05)
    assert (tmp_path / "profile/trace.json.gz").is_file() and (tmp_path / "profile/summary.json").is_file()


def test_a_preset_on_characters_asks_for_its_vocabulary():
    with pytest.raises(ConfigError, match="how many characters has the dataset shakespeare_char"):
        profile_stage.main(["--device=cpu", "--config=shakespeare_char_cpu"])
