"""tune: what is kept is right and quicker than what was there, by interpreted kernels and a made-up clock."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nanogpt_kernels import launch
from torch import Tensor
from tune_case import FACTS, OP, SETUP, clock, few_rows, one_race, soon, target_of, targets_of, tuning_of

from nanogpt_fast import launch_search, launch_tuning, ops, tune, tuned, tuning
from nanogpt_fast.errors import ConfigError, DeviceError
from nanogpt_fast.launch_plan import cases_of
from nanogpt_fast.launch_race import Race
from nanogpt_fast.launch_search import LAST_ROUNDS
from nanogpt_fast.ops import kept_rows
from nanogpt_fast.tuning import Kept, Target, Tuning

__all__ = ["few_rows"]
pytestmark = pytest.mark.usefixtures("few_rows")


# ---- what is kept ----


def test_the_quickest_right_row_is_kept_and_written():
    found, said = tuning_of(ops.TRITON)
    target, kept = target_of(found), []
    found.run([target], soon(), kept.append)
    assert [(k.target.key, k.row.blocks, k.ratio) for k in kept] == [(target.key, {"BLOCK": 1024}, 0.25)]
    assert kept == [Kept(target, found.kept[target.key], 0.25)] and "BLOCK 4096 -> 1024: kept" in said[2]
    assert said[:2] == [f"    BLOCK 4096 -> {to}: 0.500 of the best so far" for to in (2048, 1024)]
    assert found.whole()[2] == {OP: 0.25}
    assert target.walk and target.walk.done and target.walk.tried >= 3


def test_no_result_that_is_compared_is_all_zeros():
    """It would be that of any row."""
    race = one_race()
    for known_by in [*race.small.calls, *race.block.calls]:
        held = race.small.calls.get(known_by) or race.block.calls[known_by]
        for what, x in held.references[0].items():
            assert x.any() or what in ("g afterwards", "scalars afterwards"), f"{known_by}: {what}"
    assert race.call(next(known_by for known_by in _update_calls() if OP in known_by)).args[0].any()


def _update_calls() -> list[str]:
    return [case.known_by for case in cases_of(SETUP, ops.TRITON, 90) if case.op in (OP, "adamw_")]


def wrong_at(block: int) -> Callable[[Tensor], Tensor]:
    """grad_norm as it is, but for a percent where its tiles are so large."""

    def grad_norm(g: Tensor) -> Tensor:
        return ops.TRITON.grad_norm(g) * (1.01 if launch.pick(OP, g, g.numel()).blocks["BLOCK"] == block else 1.0)

    return grad_norm


def unsteady_at(block: int) -> Callable[[Tensor], Tensor]:
    """Its last bit differs from call to call there."""
    calls = iter(range(10**6))

    def grad_norm(g: Tensor) -> Tensor:
        norm, there = ops.TRITON.grad_norm(g), launch.pick(OP, g, g.numel()).blocks["BLOCK"] == block
        return torch.nextafter(norm, norm + 1) if there and next(calls) % 2 else norm

    return grad_norm


@pytest.mark.parametrize("planted, says", [(wrong_at, "largest error"), (unsteady_at, "other bits")])
def test_a_wrong_row_is_refused_and_named_however_quick(planted: Callable[[int], Any], says: str):
    found, said = tuning_of(dataclasses.replace(ops.TRITON, grad_norm=planted(1024)))
    target = target_of(found)
    found.run([target], soon(), lambda kept: None)
    assert found.kept[target.key].blocks == {"BLOCK": 2048}
    (name,) = target.refused
    assert name == "BLOCK 4096 -> 1024" and says in target.refused[name]
    assert any(line.startswith(f"    refused {name}: grad_norm: ") for line in said), said


def test_a_row_that_is_wrong_on_many_tokens_alone_is_refused():
    """As where a program has several tiles: proven on few, a row is held to the present one's results on many."""
    found, _ = tuning_of(dataclasses.replace(ops.TRITON, grad_norm=wrong_at(1024)))
    target = target_of(found)
    target.small = []
    found.run([target], soon(), lambda kept: None)
    assert "relative error" in target.refused["BLOCK 4096 -> 1024"]


def test_a_row_that_was_quicker_by_chance_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    """In the search, but not in the 25 rounds beside the present row that follow it."""
    found, _ = tuning_of(ops.TRITON)
    target = target_of(found)

    def chance(rows: Any, calls: Any, rounds: int, began: Callable[[int], None]) -> list[list[float]]:
        return [[1.0] * rounds for _ in rows] if rounds == LAST_ROUNDS else clock(rows, calls, rounds, began)

    monkeypatch.setattr(one_race(), "clock", chance)
    found.run([target], soon(), lambda kept: pytest.fail("kept"))
    assert not found.kept and target.walk and target.walk.best == target.present


def test_what_is_wrong_as_it_stands_is_left_alone():
    found, said = tuning_of(dataclasses.replace(ops.TRITON, grad_norm=wrong_at(4096)))
    target = target_of(found)
    found.run([target], soon(), lambda kept: None)
    assert "not right here" in target.lost and not found.kept and "left alone" in said[0]


def test_rows_that_launch_the_same_or_take_more_memory_are_not_tried():
    found, _ = tuning_of(ops.TRITON)
    assert not {"attention_bwd"} & {target.key.op for target in targets_of(found)}  # of no tiles: atomic or not
    arena = tuning.RowArena(found, target_of(found))
    present = arena.present
    twin = dataclasses.replace(present, source="the same")
    arena.present = dataclasses.replace(present, choices=present.choices | {"chunk_rows": 4})
    larger = dataclasses.replace(arena.present, choices=present.choices | {"chunk_rows": 8}, num_warps=16)
    more = dataclasses.replace(present, num_warps=16)
    assert arena.fitting([twin, larger, more, more], soon()) == [more]


def test_what_there_was_no_time_to_check_is_tried_the_next_time(monkeypatch: pytest.MonkeyPatch):
    found, _ = tuning_of(ops.TRITON)
    arena, now = tuning.RowArena(found, target_of(found)), [0.0]
    monkeypatch.setattr(launch_search.time, "monotonic", lambda: now[0])

    def right(row: Any) -> str:
        now[0] += 10.0  # seconds, of nine
        return "wrong"

    monkeypatch.setattr(arena, "right", right)
    walk = launch_search.search(arena, 9.0)
    assert (walk.tried, walk.done) == (1, False)
    walk = launch_search.search(arena, now[0] + 9.0, walk=walk)
    assert (walk.tried, walk.done) == (2, False)


def test_an_update_is_checked_after_it_was_timed():
    """It works on buffers of its own, which a clock that runs it changes."""

    def runs(rows: Any, calls: Any, rounds: int, began: Callable[[int], None]) -> list[list[float]]:
        for works in calls:
            for work in works:
                work()
        return [[1.0] * rounds for _ in rows]

    race = Race(SETUP, torch.device("cpu"), ops.REFERENCE, runs)
    adamw = next(known_by for known_by in _update_calls() if "adamw_" in known_by)
    for _ in range(2):
        assert race.wrong({}, {}, [], adamw, 1) == ""
        race.times(adamw, False, [{}, {}], 1, lambda i: None)
        race.cost(adamw, {})


# ---- the command ----


def finding(found: Tuning, monkeypatch: pytest.MonkeyPatch, then: BaseException | None = None) -> Any:
    """A search that finds one row, of a quarter of the time, and ends so; the row's key."""
    target = target_of(found)
    better = dataclasses.replace(target.present, blocks={"BLOCK": 1024})

    def run(targets: list[Target], until: float, keep: Callable[[Kept], None]) -> None:
        assert targets == [target]
        found.kept[target.key] = better
        keep(Kept(target, better, 0.25))
        if then is not None:
            raise then

    monkeypatch.setattr(found, "targets", lambda: [target])
    monkeypatch.setattr(found, "run", run)
    return target.key


def test_rows_are_kept_as_they_are_found_and_dropped_where_the_whole_is_no_quicker(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    found, _ = tuning_of(ops.TRITON)
    key = finding(found, monkeypatch)
    monkeypatch.setattr(found, "whole", lambda: (10.0, 8.0, {OP: 0.5}))
    assert launch_tuning.tune(found, FACTS, {}, soon()) == 0
    assert {key: entry.ratio for key, entry in tuned.read(FACTS).items()} == {key: 0.25}
    assert "10.0 ms an iteration with the shipped rows, 8.0 ms with the kept ones (0.800)" in capsys.readouterr().out
    earlier = tuned.read(FACTS)
    monkeypatch.setattr(found, "whole", lambda: (8.0, 8.1, {}))
    assert launch_tuning.tune(found, FACTS, {}, soon()) == 0
    assert tuned.read(FACTS) == {} and "none is kept" in capsys.readouterr().out
    tuned.write(FACTS, earlier)  # whose rows these go on from
    monkeypatch.setattr(found, "whole", lambda: (10.0, 8.0, {}))
    assert launch_tuning.tune(found, FACTS, earlier, soon()) == 0
    assert tuned.read(FACTS)[key].ratio == 0.0625


def test_ctrl_c_keeps_what_was_found(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    found, _ = tuning_of(ops.TRITON)
    key = finding(found, monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        launch_tuning.tune(found, FACTS, {}, soon())
    assert tuned.read(FACTS).keys() == {key} and "1 row kept so far" in capsys.readouterr().out


def test_time_is_shared_by_cost_and_ends():
    found, _ = tuning_of(ops.TRITON)
    few = [dataclasses.replace(target_of(found), cost=cost) for cost in (90.0, 9.0, 1.0)]
    given: list[float] = []

    def visit(target: Target, until: float, keep: Any) -> None:
        given.append(until - time.monotonic())
        target.lost = "seen"

    found._tune = visit
    found.run(few, soon(1000.0), lambda kept: None)
    assert given == pytest.approx([900.0, 900.0, 1000.0], rel=0.01)  # of what is left each time
    given.clear()
    found.run([dataclasses.replace(target_of(found))], soon(tuning.LEAST_S - 1), lambda kept: None)
    assert given == []


def test_the_dry_run_lists_rows_without_a_gpu(capsys: pytest.CaptureFixture):
    shape = dict(n_layer=2, n_head=2, n_embd=128, block_size=64, vocab_size=500, batch_size=2, device="cpu")
    flags = [f"--{name}={value}" for name, value in shape.items()]
    assert tune.main([*flags, "--dry_run", "--on=a100-40gb", "--kernels=triton,embedding=reference"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert "A100" in first and first.startswith(f"{len(rows)} rows") and "sm_80" in first
    assert any("adamw (adamw_, size " in row and "BLOCK=2048" in row for row in rows)
    assert not any("embedding" in row for row in rows) and kept_rows() == {}
    with pytest.raises(ConfigError, match="no launch rows"):
        tune.main(["--dry_run", "--kernels=reference"])
    with pytest.raises(ConfigError, match="0.5 to 1440"):
        tune.main(["--minutes=0"])
    with pytest.raises(DeviceError, match="timed on a CUDA GPU"):
        tune.main([*flags, "--minutes=1"])
