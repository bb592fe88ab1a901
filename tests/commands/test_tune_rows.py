"""tune: what is kept is right and quicker, by interpreted kernels and a made-up clock; children that crash and hang."""

import dataclasses
import functools
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
from nanogpt_kernels import launch
from torch import Tensor

from nanogpt_fast import launch_search, ops, tune, tuned, tuning
from nanogpt_fast.errors import ConfigError, DeviceError
from nanogpt_fast.launch_plan import cases_of, proven
from nanogpt_fast.launch_race import Race, raced
from nanogpt_fast.ops import Ops, kept_rows, row_as_json, row_from_json
from nanogpt_fast.proof import Setup
from nanogpt_fast.settings.config import GPTConfig
from nanogpt_fast.tuning import Died, Kept, Remote, Target, Tuning
from nanogpt_fast.verdict import given_to_child

CPU = torch.device("cpu")
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=48, bias=False)
SETUP = Setup(SHAPE, "float32", rows=16)
FACTS = {"gpu": "A GPU", "driver": "1", "torch": "2", "triton": "3", "ptxas": "13", "kernels": "k"}
OP = "grad_norm"  # the quickest one to interpret; its present row has BLOCK=4096


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "TRIED", 1)
    monkeypatch.setattr(tuning, "REPEATS", 2)
    near = launch_search._near
    monkeypatch.setattr(launch_search, "axes", lambda op, row: {name: near(n) for name, n in row.blocks.items()})
    yield
    launch.keep({})


def block_of(rows: Any) -> int:
    """Of the update's row, 0 for the shipped one."""
    return next((row.blocks["BLOCK"] for key, row in rows.items() if key.op == OP), 0)


def clock(rows: Sequence[Any], calls: Any, rounds: int, began: Callable[[int], None]) -> list[list[float]]:
    """Tiles of 1024 are quickest, 512 are a little slower, and then the larger the slower."""
    for i in range(len(rows)):
        began(i)
    return [[{0: 4.0, 512: 1.1, 1024: 1.0}.get(block_of(kept), block_of(kept) / 1024)] * rounds for kept in rows]


@functools.cache
def one_race() -> Race:
    return Race(SETUP, CPU, ops.TRITON, clock)


class Here(Remote):
    """The child's work in this process, by way of JSON all the same."""

    def __init__(self, ours: Ops):
        self.race, self.asked = one_race(), []
        self.race.ours = ours

    def ask(self, what: str, sets: Sequence[dict[Any, Any]], within_s: float = 0.0, **details: Any) -> Any:
        self.asked.append(what)
        if what == "compile":
            return True
        sent = json.loads(json.dumps([[row_as_json(*pair) for pair in kept.items()] for kept in sets]))
        return raced(self.race, {"ask": what, **details}, [dict(map(row_from_json, s)) for s in sent], lambda i: None)


def tuning_of(ours: Ops, remote: Remote | None = None) -> tuple[Tuning, list[str]]:
    interpreter.install()
    said: list[str] = []
    there = remote or Here(ours)
    return Tuning(SETUP, ours, 90, 1, there, there, said.append), said


def target_of(tuning: Tuning) -> Target:
    costs = {case.known_by: [1.0, 2.0] for case in tuning.cases}
    tuning.costs.update(costs)
    return next(t for t in tuning_targets(tuning) if t.key.op == OP)


def tuning_targets(some: Tuning) -> list[Target]:
    return tuning.targets_of(some.cases, some.costs, some.small)


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


# ---- what is kept ----


def test_the_quickest_right_row_is_kept_and_written():
    found, said = tuning_of(ops.TRITON)
    target, kept = target_of(found), []
    found.run([target], soon(), kept.append)
    assert [(k.target.key, k.row.blocks, k.ratio) for k in kept] == [(target.key, {"BLOCK": 1024}, 0.25)]
    assert kept == [Kept(target, found.kept[target.key], 0.25)] and "BLOCK 4096 -> 1024: kept" in said[0]
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


def test_what_is_wrong_as_it_stands_is_left_alone():
    found, said = tuning_of(dataclasses.replace(ops.TRITON, grad_norm=wrong_at(4096)))
    target = target_of(found)
    found.run([target], soon(), lambda kept: None)
    assert "not right here" in target.lost and not found.kept and "left alone" in said[0]


def test_atomic_sums_and_rows_that_launch_the_same_are_not_tried():
    found, _ = tuning_of(ops.TRITON)
    assert not {"attention_bwd"} & {target.key.op for target in tuning_targets(found)}  # of no tiles: a choice alone
    arena = tuning.RowArena(found, target_of(found))
    present = arena.present
    twin = dataclasses.replace(present, source="the same")
    atomic = dataclasses.replace(present, choices=present.choices | {"atomic": True}, num_warps=16)
    arena.present = dataclasses.replace(present, choices=present.choices | {"atomic": False})
    more = dataclasses.replace(present, num_warps=16)
    assert arena.fitting([twin, atomic, more, more], soon()) == [more]


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
    assert tune.tune(found, FACTS, {}, soon()) == 0
    assert {key: entry.ratio for key, entry in tuned.read(FACTS).items()} == {key: 0.25}
    assert "10.0 ms an iteration with the shipped rows, 8.0 ms with the kept ones (0.800)" in capsys.readouterr().out
    earlier = tuned.read(FACTS)
    monkeypatch.setattr(found, "whole", lambda: (8.0, 8.1, {}))
    assert tune.tune(found, FACTS, {}, soon()) == 0
    assert tuned.read(FACTS) == {} and "none of them is kept" in capsys.readouterr().out
    assert tune.tune(found, FACTS, earlier, soon()) == 0
    assert tuned.read(FACTS) == earlier  # those of before stay


def test_ctrl_c_keeps_what_was_found(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    found, _ = tuning_of(ops.TRITON)
    key = finding(found, monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tune.tune(found, FACTS, {}, soon())
    assert tuned.read(FACTS).keys() == {key} and "1 row kept so far" in capsys.readouterr().out


def test_time_is_shared_by_cost_and_ends():
    found, _ = tuning_of(ops.TRITON)
    few = [dataclasses.replace(target_of(found), cost=cost) for cost in (90.0, 9.0, 1.0)]
    given: list[float] = []

    def visit(target: Target, until: float, keep: Any) -> None:
        given.append(until - time.monotonic())
        target.lost = "seen"

    found._tune = visit  # type: ignore[method-assign]
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


# ---- processes ----

SAYS = """
import json, os, sys, time
say = lambda **event: print(json.dumps(event), flush=True)
say(ready=True)
for line in sys.stdin:
    asked = json.loads(line)
    blocks = [next((row["blocks"]["BLOCK"] for row in rows if row["op"] == "grad_norm"), 0) for rows in asked["sets"]]
    if asked["ask"] == "wrong":
        say(at=1)
        {wrong}
        say(answer="")
    elif asked["ask"] == "times":
        for i, block in enumerate(blocks):
            say(at=i)
            {times}
        say(at=-1)
        say(answer=[[block or 4096.0] * asked["rounds"] for block in blocks])
    else:
        say(answer=[1.0, 2.0] if asked["ask"] == "cost" else True)
"""


def child_that(wrong: str = "pass", times: str = "pass") -> Remote:
    return Remote([sys.executable, "-c", SAYS.format(wrong=wrong, times=times)])


@pytest.mark.parametrize("where", ["wrong", "times"])
def test_a_row_that_ends_the_process_costs_itself_alone(where: str):
    """256 would be quickest, if it did not."""
    block = {"wrong": "blocks[1]", "times": "block"}[where]
    remote = child_that(**{where: f"os._exit(7) if {block} == 256 else 0"})
    found, said = tuning_of(ops.TRITON, remote)
    target = target_of(found)
    try:
        found.run([target], soon(), lambda kept: None)
    finally:
        remote.end()
    assert found.kept[target.key].blocks == {"BLOCK": 512}
    dead = {name: why for name, why in target.refused.items() if "exit code 7" in why}
    assert list(dead) == ["BLOCK 4096 -> 256"] and remote.starts == 2, (target.refused, said)


def test_a_row_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch):
    remote = child_that(wrong="time.sleep(60) if blocks[1] == 2048 else 0")
    found, _ = tuning_of(ops.TRITON, remote)
    arena = tuning.RowArena(found, target_of(found))
    stock = remote.ask
    monkeypatch.setattr(remote, "ask", lambda what, sets, **details: stock(what, sets, 0.3, **details))
    present = arena.present
    try:
        assert arena.right(present) == ""
        slow = dataclasses.replace(present, blocks={"BLOCK": 2048})
        assert "no end within" in arena.right(slow) and arena.right(present) == ""
    finally:
        remote.end()


def test_a_child_that_does_not_start_is_an_error():
    remote = Remote([sys.executable, "-c", "import sys; sys.exit('no such GPU')"])
    with pytest.raises(DeviceError, match="does not start") as caught:
        remote.ask("cost", [{}])
    assert "no such GPU" in caught.value.found
    with pytest.raises(Died, match="exit code 3"):
        Remote([sys.executable, "-c", "print('{\"ready\": 1}', flush=True); input(); exit(3)"]).ask("cost", [{}])


def test_the_real_child_answers(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """In this process: the interpreter needs its numpy shim. A row that no kernel can have does not run."""
    interpreter.install()
    (small,) = (case for case in cases_of(proven(SETUP), ops.TRITON, 90) if case.op == OP)
    (case,) = (case for case in cases_of(SETUP, ops.TRITON, 90) if case.op == OP)
    ((key, present),) = case.forward.items()
    bad = dataclasses.replace(present, blocks={"BLOCK": 3})
    sets = [[row_as_json(key, present)], [row_as_json(key, bad)]]
    asked = [dict(ask="wrong", call=case.known_by, small=[small.known_by], repeats=1, sets=sets[:1] * 2),
             dict(ask="wrong", call=case.known_by, small=[], repeats=1, sets=sets)]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(line) + "\n" for line in asked)))
    given = given_to_child(SETUP, CPU) | {"kernels": "auto", "role": "race"}
    assert tune.main(["--child", json.dumps(given)]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said[:3] == [{"ready": True}, {"at": 1}, {"answer": ""}]
    assert said[3] == {"at": 1} and said[4]["answer"].startswith("does not run: "), said
