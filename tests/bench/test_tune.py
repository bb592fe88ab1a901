"""bench/tune.py and bench/compiled.py: candidates for every launch row, the search with made-up times, compiling."""

import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import compiled
import machine
import pytest
import torch
import tune
from compiled import Resources
from nanogpt_kernels import launch
from nanogpt_kernels.launch import Row

from nanogpt_fast import launch_search
from nanogpt_fast.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ROW = Row(80, dict(ROWS=4, BLOCK=8), 4, num_stages=2, up_to=1024, choices=dict(fused=True, programs_per_sm=2))


@pytest.mark.parametrize("launch_op", launch.TABLE)
def test_every_launch_row_can_be_reached_and_moved(launch_op: str):
    """On meta tensors at GPT-2 shapes: some case asks for the row, and its candidates are launch shapes of that op."""
    target = tune.find(launch_op, "124m", torch.bfloat16, 90, 0.0)
    assert target.present in launch.TABLE[launch_op]
    rows = list(itertools.islice(launch_search.candidates(launch_op, target.present), 40))
    assert rows and target.present not in rows
    for row in rows:
        assert row.blocks.keys() == target.present.blocks.keys() and row.choices.keys() == target.present.choices.keys()
        assert all(v is False or v >= 1 for v in [*row.blocks.values(), row.num_warps, row.num_stages])
        assert row.num_warps in (1, 2, 4, 8, 16, 32)
    with cases.overridden(target.overrides(rows[0])):
        taken = launch.pick(launch_op, torch.empty(1, dtype=torch.bfloat16, device="meta"), 1)
        cases.recorded(target.op, target.at, 90, target.mode == "both")
    assert launch_search.point(taken) == launch_search.point(rows[0])


def test_no_case_asks_for_an_unknown_row():
    with pytest.raises(ConfigError, match="no op of bench/cases.py asks for 'nothing'"):
        tune.find("nothing", "tiny", torch.float32, 90, 0.0)
    with pytest.raises(ConfigError, match="did you mean 'adamw'"):
        tune.main(["adamv", "--dry_run"])


def test_grids_name_axes_of_their_rows():
    for launch_op, axes in launch_search.GRIDS.items():
        row = launch.TABLE[launch_op][0]
        assert axes.keys() <= launch_search.point(row).keys(), launch_op


def test_candidates_are_near_first_and_all_different():
    points = [launch_search.point(row) for row in launch_search.candidates("x", ROW)]
    changed = [sum(p[name] != value for name, value in launch_search.point(ROW).items()) for p in points]
    assert set(changed) == {1, 2} and changed == sorted(changed)
    assert len({tuple(p.items()) for p in points}) == len(points)
    assert {p["fused"] for p in points} == {True, False} and {p["ROWS"] for p in points} == {2, 4, 8}
    assert {p["num_stages"] for p in points} == {1, 2, 3} and {p["programs_per_sm"] for p in points} == {1, 2, 4}


def test_a_row_is_printed_as_it_is_pasted():
    at = cases.setting("norm", "124m")
    target = tune.Target("norm_fwd", "norm", "forward", at, 90, ROW, {})
    moved = launch_search.moved(ROW, {"ROWS": 8, "fused": False, "num_warps": 2, "max_registers": 128})
    text = tune.pasted(moved, target, "0.900 of the row before")
    row = eval(text.rstrip(","), {"Row": Row})
    assert (row.arch, row.blocks, row.num_warps, row.num_stages) == (90, dict(ROWS=8, BLOCK=8), 2, 2)
    assert row.max_registers == 128
    assert (row.itemsize, row.up_to, row.choices) == (2, 1024, dict(fused=False, programs_per_sm=2))
    assert row.source.startswith("measured on ") and "norm forward, B=64 T=1024 C=768 bfloat16: 0.900" in row.source


# ---- the search, with made-up resources and times ----


class FakePool:
    """Spills where ROWS is 16 or more."""

    def compile(self, tasks: list[compiled.Task], until: float) -> Iterator[tuple[int, Resources]]:
        for i, task in enumerate(tasks):
            rows, fused = (
                task.overrides["norm_fwd"][part][name] for part, name in (("blocks", "ROWS"), ("choices", "fused"))
            )
            yield i, Resources(32, shared=64, launches=int(fused), problem="SPILL 8 bytes" if rows >= 16 else "")


class FakeRace:
    """ROWS = 8 with one warp is best, by a step in each; two stages compute something else."""

    timed: list[Any] = []

    def __init__(self, target: tune.Target):
        self.target = target

    def right(self, row: Row) -> str:
        return "WRONG" if row.num_stages == 3 else ""

    def times(self, rows: list[Row], rounds: int) -> list[list[float]]:
        FakeRace.timed += rows
        return [[1.0 + abs(row.blocks["ROWS"] - 8) + row.num_warps] * rounds for row in rows]


def test_the_search_walks_to_the_best_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(tune, "Race", FakeRace)
    start = launch_search.moved(ROW, {"ROWS": 1, "num_warps": 4})
    target = tune.Target("norm_fwd", "norm", "forward", cases.setting("norm", "124m"), 90, start, {})
    monkeypatch.setitem(launch_search.GRIDS, "norm_fwd", {})
    pool: Any = FakePool()
    text = tune.search(target, 60.0, 24, pool, machine.Lines(tmp_path / "tune.jsonl"))
    row = eval(text.rstrip(","), {"Row": Row})
    assert row.blocks["ROWS"] == 8 and row.num_warps == 1 and "0.167 of the row before" in row.source
    assert all(row.num_stages != 3 and row.blocks["ROWS"] < 16 for row in FakeRace.timed)
    status = [line["status"] for line in machine.read_lines(tmp_path / "tune.jsonl")]
    assert status[-1] == "best" and {"WRONG", "SPILL 8 bytes", "timed"} <= set(status)


def test_the_present_row_stays_where_nothing_is_better(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "Race", FakeRace)
    best = launch_search.moved(ROW, {"ROWS": 8, "num_warps": 1})
    target = tune.Target("norm_fwd", "norm", "forward", cases.setting("norm", "124m"), 90, best, {})
    pool: Any = FakePool()
    row = eval(tune.search(target, 60.0, 8, pool, machine.Lines(None)).rstrip(","), {"Row": Row})
    assert launch_search.point(row) == launch_search.point(best) and "best of" in row.source


def test_shapes_of_a_kernel_that_is_not_used_are_tried_once(capsys: pytest.CaptureFixture):
    target = tune.Target("norm_fwd", "norm", "forward", cases.setting("norm", "124m"), 90, ROW, {})
    rows = [launch_search.moved(ROW, {"fused": False}), launch_search.moved(ROW, {"fused": False, "ROWS": 2})]
    pool: Any = FakePool()
    assert [row for row, _ in tune.compile_rows(pool, target, rows, 0.0, machine.Lines(None))] == rows[:1]
    assert "not launched" in capsys.readouterr().out


def test_the_worst_ops_come_from_a_file_of_results(tmp_path: Path):
    lines = machine.Lines(tmp_path / "ops.jsonl")
    for op, ms in (("norm", 1.0), ("grad_norm", 9.0), ("adamw_", 5.0)):
        lines.write(op=op, size="124m", contestant="ours", mode="forward", ms=ms, floor_ms=0.5)
        lines.write(op=op, size="124m", contestant="eager", mode="forward", ms=100.0, floor_ms=0.5)
    lines.write(op="norm", size="124m", contestant="ours", mode="both", ms=6.0, floor_ms=0.5)
    found = tune.worst(tmp_path / "ops.jsonl", 2, 90, torch.bfloat16)
    assert found == [(name, "124m") for name in ("grad_norm", "norm_fwd", "norm_bwd", "column_sums")]


# ---- compiling ----


def test_a_launch_belongs_to_the_longest_key_it_goes_on_from(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "TABLE", {"a": (), "a_bwd": (), "ab": ()})
    names = ("a", "a_fwd", "a_bwd", "a_bwd_rows", "ab_fwd", "abc")
    assert [compiled.row_of(name) for name in names] == ["a", "a", "a_bwd", "a_bwd", "ab", ""]


def test_what_does_not_fit_is_refused():
    large, spilling = Resources(shared=200_000), Resources(spilled=8)
    assert large.misfits(90) == [] and large.misfits(80) == ["SMEM over 163 KB"]
    assert spilling.misfits(90) == ["SPILL 8 bytes"] and spilling.misfits(80) == []
    assert Resources(shared=100 * 1024).misfits(121) == ["SMEM over 99 KB"]  # not listed: as sm_120
    assert Resources(tensor_memory=513).misfits(100) == ["TMEM 513 columns"]


def test_the_interpreter_cannot_compile(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="nothing can be compiled"):
        compiled.Compilers(1)


def test_candidates_compile_in_processes_of_their_own():
    """The whole offline path, for one small kernel and for a tile that no kernel can have."""
    code = (
        "import time, tune, torch, machine\n"
        "from nanogpt_fast import launch_search\n"
        "from compiled import Compilers\n"
        "target = tune.find('adamw', 'tiny', torch.bfloat16, 90, 0.0)\n"
        "rows = [target.present, launch_search.moved(target.present, {'BLOCK': 3})]\n"
        "with Compilers(1) as pool:\n"
        "    good = tune.compile_rows(pool, target, rows, time.monotonic() + 200, machine.Lines(None))\n"
        "assert [row for row, _ in good] == rows[:1], good\n"
        "assert good[0][1].registers > 16 and good[0][1].launches >= 1, good\n"
    )
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("bench", "profiling", "kernels", ""))
    env = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BLOCK=3" in done.stdout and "power of 2" in done.stdout, done.stdout


def dies_on_2(task: int) -> Resources:
    if task == 2:
        os._exit(1)
    return Resources(registers=task)


def test_a_crashing_compiler_costs_one_candidate(monkeypatch: pytest.MonkeyPatch):
    """Real workers, and a task that ends its own; forked, because spawned ones would import torch first."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(compiled, "compile_task", dies_on_2)
    with compiled.Compilers(2) as pool:
        tasks: Any = range(5)
        found = dict(pool.compile(tasks, time.monotonic() + 200))
    assert found.pop(2).problem == "the compiler crashed"
    assert {i: used.registers for i, used in found.items()} == {0: 0, 1: 1, 3: 3, 4: 4}
