"""bench/: cases, contestants and their check, timing with a made-up clock. No time is asserted anywhere."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import environment
import harness
import kernel_case
import machine
import ops
import pytest
import race
import step
import torch
import tune
from harness import Bound, Contestant, plain
from op_inputs import Setting, Shape
from work import Work

from nanogpt_fast import agreement, timing
from nanogpt_fast.errors import ConfigError, DeviceError
from nanogpt_fast.timing import Arm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = kernel_case.DEVICE


def tiny(op: str, **options: Any) -> Setting:
    return cases.setting(op, "tiny", device=DEVICE, dtype=options.pop("dtype", torch.float32), **options)


# ---- cases ----


@pytest.mark.parametrize("op,p", [*((op, 0.0) for op in cases.CASES), ("attention", 0.1), ("dropout_add", 0.1)])
def test_our_op_agrees_with_its_specification(op: str, p: float):
    """So that a session on a GPU is not spent on a case that cannot run: every variant, values and gradients."""
    lineup = ops.contestants(op, tiny(op, p=p), [], compiled=False)
    assert not lineup.absent
    verdicts = ops.checked(op, tiny(op, p=p), lineup)
    assert {"ours", "eager"} <= verdicts.keys()
    assert all(isinstance(error, float) for error in verdicts.values()), verdicts


def test_every_switch_of_a_launch_row_is_a_contestant():
    """attention_bwd has its atomic form beside the deterministic one: both are to be reported."""
    lineup = ops.contestants("attention", tiny("attention"), [], compiled=False)
    assert [name for name in lineup.contestants if name.startswith("ours")] == ["ours", "ours, atomic=True"]


def test_work_counts_products_and_bytes_once():
    shape = Shape(B=2, T=8, C=4, H=2, V=16, N=10)
    forward, backward = cases.CASES["linear_cross_entropy"].work(shape, 2)
    assert (forward.flops, backward and backward.flops) == (2 * 16 * 4 * 16, 4 * 16 * 4 * 16)
    assert forward.bytes == 2 * (16 * 4 + 16 * 4)
    adamw, none = cases.CASES["adamw_"].work(shape, 2)
    assert adamw.bytes == 10 * (4 * 4 + 3 * 4 + 2) and none is None  # reads master m v g, writes three and p
    forward, _ = cases.CASES["attention"].work(shape, 2)
    assert forward.flops == 2 * (2 * 2 * 2) * 8 * 8 * 2 / 2  # two products a head of B=2 H=2 D=2, half of them masked


def test_inputs_repeat_and_differ_with_the_seed():
    first, again, other = (cases.CASES["norm"].inputs(tiny("norm", seed=s))[0] for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---- the check ----


def eager_lineup(op: str) -> ops.Lineup:
    """The specification against itself: what is tested here is not the ops, and the interpreter is slow."""
    found = {"ours": plain(cases.specification(op)), "eager": plain(cases.specification(op), not cases.CASES[op].syncs)}
    return ops.Lineup(found)


def contestant_for_norm(change: Any) -> Contestant:
    def function(r, w, b, eps=1e-5):
        return change(cases.specification("norm")(r, w, b, eps))

    return plain(function)


@pytest.mark.parametrize(
    "change",
    [lambda y: y * 1.01, lambda y: torch.where(y > 3.0, math.nan, y), lambda y: y[:1], lambda y: y.flip(0)],
    ids=["scaled", "NaN", "short", "permuted"],
)
def test_a_wrong_contestant_is_taken_out(change: Any):
    lineup = eager_lineup("norm")
    lineup.contestants["peer"] = contestant_for_norm(change)
    verdicts = ops.checked("norm", tiny("norm"), lineup)
    assert isinstance(verdicts["peer"], str) and "peer" not in lineup.contestants
    assert isinstance(verdicts["ours"], float)


def test_a_contestant_that_raises_is_reported(capsys: pytest.CaptureFixture):
    def broken(*args):
        raise RuntimeError("no kernel image")

    lineup = ops.Lineup({"eager": plain(cases.specification("norm")), "peer": plain(broken)})
    assert ops.checked("norm", tiny("norm"), lineup)["peer"] == "failed: RuntimeError: no kernel image"


def test_zeros_prove_nothing():
    with pytest.raises(ValueError, match="zeros"):
        agreement.relative_error(torch.zeros(3), torch.zeros(3))


def test_a_missing_and_a_broken_peer_are_reported(monkeypatch: pytest.MonkeyPatch):
    assert set(ops.PEERS) == {p.stem for p in (ROOT / "bench/peers").glob("*.py")} and "liger" in ops.PEERS
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.delitem(sys.modules, "peers.liger", raising=False)
    lineup = ops.contestants("norm", tiny("norm"), ["liger"], compiled=False)
    assert lineup.absent["liger"].startswith("not installed") and "ours" in lineup.contestants
    lineup = ops.Lineup()
    lineup.add("odd", lambda: {"odd": [][1]})
    assert lineup.absent["odd"].startswith("broken (IndexError")


def test_torch_s_own_peers_agree():
    """SDPA's packed and separate forms and AdamW(fused) bind to our arguments."""
    for op, name in (("attention", "SDPA flash"), ("adamw_", "torch.optim.AdamW(fused)"), ("grad_norm", "torch._")):
        at = tiny(op, dtype=torch.bfloat16 if op == "attention" else torch.float32)  # flash on a GPU takes 16-bit only
        lineup = eager_lineup(op)
        lineup.add("pytorch", lambda op=op: importlib.import_module("peers.pytorch").contestants(op))
        found = {who: verdict for who, verdict in ops.checked(op, at, lineup).items() if who.startswith(name)}
        assert found and all(isinstance(verdict, float) for verdict in found.values()), found


# ---- what is measured ----


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything runs once, and a call takes 1 ms forward, 3 ms for both."""

    def make_arm(calls: Any, pool: Any, capturable: bool = True, device_type: str = "cuda") -> Arm:
        for call in calls:
            call()
        return Arm(lambda: None, 1, "graph" if capturable else "events")

    def interleaved(arms: dict[str, Arm], rounds: int, while_busy: Any) -> dict[str, list[float]]:
        while_busy()
        return {name: [1.0 if "forward" in name else 3.0] * rounds for name in arms}

    monkeypatch.setattr(timing, "make_arm", make_arm)
    monkeypatch.setattr(timing, "interleaved", interleaved)
    monkeypatch.setattr(harness, "input_sets", lambda size, kind: 2)
    monkeypatch.setattr(ops, "floor_of", lambda work, op, at, roof: (0.5, "bytes"))
    monkeypatch.setattr(machine, "gpu_state", lambda: {"sm_mhz": 1980.0})
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


def test_measured_lines_say_what_was_measured(no_gpu_needed: None, tmp_path: Path, capsys: pytest.CaptureFixture):
    at, path = tiny("norm"), tmp_path / "new" / "ops.jsonl"
    lineup = eager_lineup("norm")
    lineup.contestants["wrong"] = contestant_for_norm(lambda y: y + 1.0)
    lineup.absent["liger"] = "not installed"
    ops.measure("norm", at, lineup, 3, {"op": "norm"}, machine.Lines(path, bench="ops", gpu="G"))
    lines = machine.read_lines(path)
    status = {line["contestant"]: line["status"] for line in lines}
    assert status["liger"] == "not installed" and status["wrong"].startswith("WRONG")
    ours = {line["mode"]: line for line in lines if line["contestant"] == "ours"}
    assert {mode: line["ms"] for mode, line in ours.items()} == {"forward": 1.0, "both": 3.0, "backward": 2.0}
    work = cases.CASES["norm"].work(at.shape, 4)[0]
    assert ours["forward"]["gbps"] == work.bytes / 1e6 and ours["forward"]["of_floor"] == 0.5
    assert ours["both"]["sm_mhz"] == 1980.0 and ours["both"]["gpu"] == "G" and ours["both"]["timed"] == "graph"
    assert {mode: line["x_ours"] for mode, line in ours.items()} == {"forward": 1.0, "both": 1.0, "backward": 1.0}
    assert [ours["both"][name] for name in ("x_eager", "x_eager_q1", "x_eager_q3")] == [1.0, 1.0, 1.0]
    text = capsys.readouterr().out
    assert "  liger: not installed" in text and "  wrong: WRONG" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("eager")]
    assert [row[1:3] for row in rows] == [["forward", "1"], ["both", "3"], ["backward", "2"]]


def test_without_ours_nothing_is_compared_with_it(no_gpu_needed: None, capsys: pytest.CaptureFixture):
    lineup = ops.Lineup({"eager": plain(cases.specification("norm"))})
    found = ops.measured("norm", tiny("norm"), lineup, {"eager": 0.0}, 3)
    ops.show(found)
    assert not any("x_ours" in line for line in found)
    assert "x eager" in capsys.readouterr().out


def test_what_mutates_its_arguments_is_timed_forward_only(no_gpu_needed: None):
    lineup = eager_lineup("adamw_")
    verdicts: dict[str, float | str] = {"ours": 0.0, "eager": 0.0}
    found = ops.measured("adamw_", tiny("adamw_"), lineup, verdicts, 3)
    ran = {(line["contestant"], line["mode"], line["timed"]) for line in found}
    assert ran == {("ours", "forward", "graph"), ("eager", "forward", "events")}


def test_the_whole_run_resumes(
    no_gpu_needed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(machine, "require_cuda", lambda what: DEVICE)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    argv = ["grad_norm", "dropout_add", "--sizes", "tiny", "--dtype=float32", "--no_compile", "--resume", "--rounds=3"]
    assert ops.main([*argv[1:], "--peers", "none", "--out", str(tmp_path)]) == 0
    assert ops.main([*argv, "--peers", "none", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("measured before") == 1
    assert ops.main([*argv[:1], *argv[2:], "--peers", "pytorch", "--out", str(tmp_path)]) == 0  # asks for more: run
    text = capsys.readouterr().out
    assert "torch._foreach_norm" in text and "measured before" not in text and "50%" in text
    monkeypatch.setattr(cases, "ours", lambda op: lambda g: g.sum())
    assert ops.main([*argv[:1], "--sizes", "tiny", "--dtype=float32", "--no_compile", "--peers", "none"]) == 1
    assert "ours: WRONG" in capsys.readouterr().out


def test_floor_is_the_largest_of_the_limits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(machine, "highest_clock", lambda: None)
    assert machine.floor_ms(Work(flops=989e9, bytes=3.35e6), torch.bfloat16) == (1.0, "flops")
    assert machine.floor_ms(Work(bytes=3.35e9), torch.float32) == (1.0, "bytes")
    assert machine.floor_ms(Work(flops=1.0), torch.float32) is None  # no float32 peak has a source
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Unheard Of")
    assert machine.floor_ms(Work(bytes=1.0), torch.bfloat16) is None


# ---- lines, command lines ----


def test_lines_survive_a_kill(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    lines = machine.Lines(path, bench="x")
    lines.write(n=1)
    path.open("a").write('{"n": 2, "cut')
    assert [row["n"] for row in machine.read_lines(path)] == [1]
    assert machine.read_lines(tmp_path / "none.jsonl") == []
    assert json.loads(path.read_text().splitlines()[0]).keys() == {"bench", "time", "n"}


@pytest.mark.parametrize(
    "main", [ops.main, race.main, tune.main, step.main, environment.main], ids=lambda m: m.__module__
)
def test_without_cuda_it_says_so(main: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="needs a CUDA GPU") as error:
        main([])
    assert error.value.exit_code == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_exit_code_and_message_of_a_bare_checkout():
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "bench/race.py")]
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True)
    assert done.returncode == 5 and done.stderr.startswith("error: bench/race.py needs a CUDA GPU"), done.stderr


def test_dry_runs_need_no_gpu(capsys: pytest.CaptureFixture):
    assert ops.main(["norm", "mlp", "--dry_run", "--sizes", "124m"]) == 0
    assert race.main(["norm", "--dry_run"]) == 0
    assert step.main(["--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "norm: [64, 1024, 768] [768] [768]; forward 0 GFLOP 201.3 MB" in text
    assert "mlp: [64, 1024, 768] [3072, 768]" in text and "618.5 GFLOP" in text
    assert "1000 x  norm: [8, 1024, 768]" in text and "gpt2_124m: 524,288 tokens a step" in text


def test_unknown_names_are_refused():
    for main, argv in ((ops.main, ["nrm"]), (race.main, ["nrm"]), (ops.main, ["norm", "--peers", "ligre"])):
        with pytest.raises(ConfigError, match="did you mean"):
            main(argv)
    with pytest.raises(ConfigError, match="gpt2_124m"):
        step.main(["--config", "gpt2_124", "--dry_run"])


# ---- race ----


@pytest.mark.parametrize("op", ["norm", "adamw_"])
def test_race_finds_bits_that_change(op: str, monkeypatch: pytest.MonkeyPatch):
    stock, runs = cases.specification(op), iter(range(100))
    monkeypatch.setattr(cases, "ours", lambda _: stock)
    assert set(race.race(op, tiny(op), 3, race.Ballast(DEVICE, 0)).values()) == {0}

    def unsteady(*args: Any) -> Any:
        result = stock(*args)
        changed = args[1] if op == "adamw_" else result
        if next(runs) in (3, 4):
            changed.data.view(-1)[5] += 1e-3
        return result

    monkeypatch.setattr(cases, "ours", lambda _: unsteady)
    counts = race.race(op, tiny(op), 5, race.Ballast(DEVICE, 0))
    assert sorted(counts.values())[-1] == 2 and sum(counts.values()) == 2


def test_bits_tell_nan_and_zero_apart():
    x = torch.tensor([math.nan, 0.0])
    assert torch.equal(race.bits(x), race.bits(x.clone())) and not torch.equal(race.bits(x), race.bits(x * -1.0))


def test_bound_defaults():
    w = torch.ones(2, requires_grad=True)
    bound = plain(lambda a, b: a * b).bind(torch.ones(2), w)
    assert isinstance(bound, Bound) and bound.leaves == [w] and torch.equal(bound.forward(), torch.ones(2))
