"""bench/gpu_session.py on stages that need no GPU: what is run, what is skipped, what is cut off, what is kept."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_session
import gpu_stages
import machine
import memcheck
import pytest
import torch
import triton
import warm_cache
from gpu_session import run_session
from gpu_stages import Stage

from nanogpt_fast import assembler
from nanogpt_fast.errors import ConfigError, DeviceError

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def noting(folder: Path, name: str, more: str = "") -> Stage:
    """A stage that leaves a line in a file each time it is run."""
    code = f"open({str(folder / 'ran')!r}, 'a').write('{name} ')\n{more}\nprint('{name} says')"
    return Stage(name, python(code), limit_s=60, least_s=0.1)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_session, "RESERVE_S", 0.0)
    monkeypatch.setattr(gpu_session, "GRACE_S", 0.2)
    return tmp_path / "out"


def ran(out: Path) -> list[str]:
    path = out.parent / "ran"
    names = path.read_text().split() if path.exists() else []
    path.write_text("")
    return names


def status(outcomes: list[tuple[str, dict]]) -> dict[str, str]:
    return {name: outcome["status"] for name, outcome in outcomes}


def test_what_is_done_is_not_done_again(out: Path):
    stages = [noting(out.parent, "a"), noting(out.parent, "b")]
    outcomes = run_session(stages, 1.0, out, "tree1")
    assert ran(out) == ["a", "b"] and status(outcomes) == {"a": "done", "b": "done"}
    assert outcomes[0][1]["result"] == "a says" and "==== b:" in (out / "session.log").read_text()
    again = run_session([*stages, noting(out.parent, "c")], 1.0, out, "tree1")
    assert ran(out) == ["c"] and again[0][1]["note"] == "before"
    run_session(stages, 1.0, out, "tree2")
    assert ran(out) == ["a", "b"]
    run_session([*stages, noting(out.parent, "c")], 1.0, out, "tree3", any_tree=True)
    assert ran(out) == []


def test_what_failed_is_tried_again_last(out: Path):
    stages = [noting(out.parent, "bad", "raise SystemExit(3)"), noting(out.parent, "good")]
    outcomes = run_session(stages, 1.0, out, "t")
    assert ran(out) == ["bad", "good"] and outcomes[0][1]["rc"] == 3 and outcomes[0][1]["status"] == "failed"
    run_session([*stages, noting(out.parent, "new")], 1.0, out, "t")
    assert ran(out) == ["new", "bad"]


def test_a_stage_is_cut_off_when_the_time_is_up(out: Path):
    slow = noting(out.parent, "slow", "import time; time.sleep(60)")
    late = Stage("late", python("print(1)"), limit_s=10, least_s=30)
    began = time.monotonic()
    outcomes = run_session([slow, late], 3.0 / 60, out, "t")
    assert status(outcomes) == {"slow": "cut off", "late": "no time left"} and time.monotonic() - began < 30
    assert ran(out) == ["slow"]
    assert "late" not in gpu_session.states(out / "session.jsonl", "t")
    run_session([noting(out.parent, "slow"), noting(out.parent, "late")], 1.0, out, "t")
    assert ran(out) == ["slow", "late"]  # in its old place: the session's end was no fault of its own


def test_a_stage_over_its_own_limit_waits_for_the_others(out: Path):
    slow = Stage("slow", python("import time; time.sleep(60)"), limit_s=0.5, least_s=0.1)
    other = noting(out.parent, "other")
    assert status(run_session([slow, other], 1.0, out, "t"))["slow"] == "over its limit"
    assert [s.name for s in gpu_session.to_run([slow, noting(out.parent, "new")], gpu_session.states(
        out / "session.jsonl", "t"))] == ["new", "slow"]  # fmt: skip


def test_a_stage_that_was_killed_with_the_session_is_run_again(out: Path):
    machine.Lines(out / "session.jsonl", tree="t").write(stage="a", status="started")
    (out / "session.jsonl").open("a").write('{"stage": "b", "tree": "t", "status": "do')
    run_session([noting(out.parent, "a"), noting(out.parent, "b")], 1.0, out, "t")
    assert ran(out) == ["a", "b"]


def test_nothing_that_a_stage_started_outlives_it(out: Path):
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    child = f"import os, time, signal; {deaf}; print(os.getpid(), flush=True); time.sleep(60)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); time.sleep(60)"
    stage = Stage("parent", python(code), limit_s=2.0, least_s=0.1)
    outcome = dict(run_session([stage], 1.0, out, "t"))["parent"]
    pid = int(outcome["result"])
    for _ in range(100):
        if not _alive(pid):
            break
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_an_interrupted_session_ends_its_stage(tmp_path: Path):
    """SIGTERM to the session: the stage goes too, and the next call runs it again."""
    code = (
        "import signal, sys\nfrom pathlib import Path\nimport gpu_session as g\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "stage = g.Stage('s', [sys.executable, '-S', '-c', 'import os, time; print(os.getpid(), flush=True); "
        "time.sleep(60)'], 60)\n"
        f"g.run_session([stage], 1.0, Path({str(tmp_path)!r}), 't')\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / f) for f in ("bench", "kernels", ""))}
    session = subprocess.Popen([sys.executable, "-c", code], env=env)
    log = tmp_path / "session.log"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().strip().split("\n")[-1].isdigit()):
        time.sleep(0.05)
    pid = int(log.read_text().split()[-1])
    session.send_signal(signal.SIGTERM)
    assert session.wait(60) == 143 and not _alive(pid)
    assert gpu_session.states(tmp_path / "session.jsonl", "t")["s"]["status"] == "started"


def test_a_stage_learns_how_long_it_has(out: Path):
    stage = Stage("s", [*python("import sys; print(sys.argv[1])"), gpu_stages.SECONDS], limit_s=45, least_s=0.1)
    assert dict(run_session([stage], 10.0, out, "t"))["s"]["result"] == "30"
    assert dict(run_session([stage], 0.3, out, "u"))["s"]["result"] in ("2", "3")


def test_stages_find_the_packages_and_their_own_environment(out: Path):
    code = "import os; import nanogpt_kernels, nanogpt_fast; print(os.environ['X'], os.getcwd())"
    outcome = dict(run_session([Stage("s", [sys.executable, "-c", code], 60, 0.1, {"X": "7"})], 1.0, out, "t"))["s"]
    assert outcome["result"] == f"7 {ROOT}", outcome


def test_a_missing_tool_is_said_not_run(out: Path):
    stages = [Stage("s", ["/nonexistent"], 60, 0.1, missing="not installed"), Stage("t", ["/nonexistent"], 60, 0.1)]
    outcomes = run_session(stages, 1.0, out, "t")
    assert outcomes[0][1] == {"status": "missing", "result": "not installed"}
    assert outcomes[1][1]["status"] == "failed" and "/nonexistent" in outcomes[1][1]["result"]
    assert status(run_session(stages[:1], 1.0, out, "t")) == {"s": "missing"}


def test_results_of_an_earlier_folder_are_taken_over(out: Path):
    earlier = out.parent / "earlier"
    run_session([noting(out.parent, "a")], 1.0, earlier, "t")
    machine.Lines(earlier / "ops.jsonl").write(op="norm")
    out.mkdir()
    machine.Lines(out / "ops.jsonl").write(op="mlp")
    for _ in range(2):
        gpu_session.take_over([earlier], out)
    assert [row["op"] for row in machine.read_lines(out / "ops.jsonl")] == ["norm", "mlp"]
    ran(out)
    assert dict(run_session([noting(out.parent, "a")], 1.0, out, "t"))["a"]["note"] == "before" and ran(out) == []
    with pytest.raises(ConfigError):
        gpu_session.take_over([out / "nowhere"], out)


# ---- the real stages ----


def test_every_gpu_test_is_in_one_slice():
    sliced = [file for files in gpu_stages.gpu_test_slices().values() for file in files]
    ops = {f"tests/ops/{p.name}" for p in (ROOT / "tests/ops").glob("test_*.py")}
    assert len(sliced) == len(set(sliced)) and ops <= set(sliced)
    assert "tests/commands/test_train_gpu.py" in gpu_stages.gpu_test_slices()["others"]
    assert "tests/ops/test_norm.py" in gpu_stages.gpu_test_slices()["norm"]


def test_scripts_of_the_stages_accept_their_flags(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Each script's own parser reads what its stage passes, up to the GPU that is not there."""
    import environment
    import ops
    import race
    import step
    import tune

    mains = {f"{m.__name__}.py": m.main for m in (environment, memcheck, ops, race, step, tune)}
    reached = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for stage in gpu_stages.all_stages(tmp_path):
            words = [word.replace(gpu_stages.SECONDS, "30") for word in stage.command]
            words = [word.replace(gpu_stages.DEAREST, "attention_fwd") for word in words]
            at = next((i for i, word in enumerate(words) if Path(word).name in mains), None)
            if at is not None:
                reached.add(Path(words[at]).name)
                with pytest.raises(DeviceError):
                    mains[Path(words[at]).name](words[at + 1 :])
    assert reached == mains.keys()


def test_memcheck_reaches_the_rows_of_narrow_tiles():
    """Those in which two products of 16 or 32 were seen to corrupt memory on sm_90: masked, and atomic."""
    found: dict[str, set[int]] = {}
    for op, at in memcheck.settings(torch.device("meta"), torch.bfloat16):
        for call in warm_cache.with_switches(op, at, 90) if op == "attention" else []:
            blocks = [size for name, size in call.options.items() if name in ("BLOCK_M", "BLOCK_N")]
            found.setdefault(call.op, set()).update(blocks)
            assert not blocks or max(blocks) < memcheck.T, call.op  # more than one tile
    narrow = {op for op, sizes in found.items() if sizes & {16, 32}}
    assert narrow >= {
        f"attention_bwd_{row}"
        for row in ("dq_dropout_or_docs", "dkdv", "dkdv_dropout_or_docs", "atomic", "atomic_dropout_or_docs")
    }


def test_tune_takes_the_dearest_kernels_of_the_last_profile(out: Path):
    stage = Stage("tune", [*python("import sys; print(*sys.argv[1:])"), gpu_stages.DEAREST, "end"], 60, 0.1)
    outcome = dict(run_session([stage], 1.0, out, "t"))["tune"]
    assert outcome["status"] == "missing" and "stage step" in outcome["result"]
    lines = machine.Lines(out / "kernels.jsonl")
    lines.write(run="1", kernel="_old_kernel", launch_op="adamw", ms=900.0)
    for name, op, ms in (
        ("_a", "norm_fwd", 1.0),
        ("_b", "attention_fwd", 5.0),
        ("_c", "norm_fwd", 7.0),
        ("mm", "", 99),
    ):
        lines.write(run="2", kernel=name, launch_op=op, ms=ms)
    lines.write(run="2", arm="triton", status="failed")
    assert dict(run_session([stage], 1.0, out, "t"))["tune"]["result"] == "norm_fwd attention_fwd end"
    assert gpu_session.dearest(out, most=1) == ["norm_fwd"]


def test_another_assembler_is_named_to_every_stage_and_raced_beside_triton_s_own(tmp_path: Path):
    stages = {stage.name: stage for stage in gpu_stages.all_stages(tmp_path, ptxas=Path("/new/ptxas"))}
    assert stages["step"].env["TRITON_PTXAS_PATH"] == stages["race"].env["TRITON_PTXAS_BLACKWELL_PATH"] == "/new/ptxas"
    own = stages["race-own-ptxas"]
    assert Path(own.env["TRITON_PTXAS_PATH"] or "").samefile(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas")
    assert not own.missing and own.command == stages["race"].command
    assert "--ptxas" in next(s for s in gpu_stages.all_stages(tmp_path) if s.name == own.name).missing
    (tmp_path / "ptxas").write_text("not an assembler")
    with pytest.raises(ConfigError, match="--ptxas does not run"):
        gpu_session.main(["--list", "--ptxas", str(tmp_path / "ptxas")])


def test_an_assembler_is_taken_where_it_is_named(tmp_path: Path):
    """Triton's own, by another path: in a process that is told so, with the version that it gives."""
    triton = pytest.importorskip("triton")
    copy = tmp_path / "ptxas"
    copy.symlink_to(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas")
    env = {k: v for k, v in gpu_stages.assembled_by(copy).items() if v} | {"PYTHONPATH": str(ROOT / "bench")}
    code = "import machine; tools = machine.ptxas(90), machine.ptxas(100); print(*(t['path'] for t in tools), tools[0])"
    said = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    ).stdout
    assert said.split()[:2] == [str(copy), str(copy)] and assembler.version_of(copy) in said, said
    assert assembler.version_of(copy).count(".") >= 1 and assembler.version_of(tmp_path / "none") == ""


def test_list_and_dry_run_need_no_gpu(capsys: pytest.CaptureFixture):
    assert gpu_session.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed[:11] == [
        "environment", "compile", "step", "ops", "shipped", "captured", "step-small", "race", "race-own-ptxas",
        "memcheck", "tune",
    ]  # fmt: skip
    assert listed.index("step-peers") < listed.index("peers") < listed.index("tests-attention")
    assert gpu_session.main(["--dry_run", "--only", "race"]) == 0
    assert "bench/race.py attention qkv_attention embedding --out DIR" in capsys.readouterr().out


def test_without_cuda_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="bench/gpu_session.py needs a CUDA GPU"):
        gpu_session.main(["--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="did you mean 'race'"):
        gpu_session.main(["--only", "rase"])


def test_the_last_table_holds_the_newest_figures(tmp_path: Path):
    lines = machine.Lines(tmp_path / "ops.jsonl")
    for who, ms in (("ours", 9.0), ("ours", 2.0), ("eager", 4.0), ("Liger", 3.0)):
        lines.write(op="norm", size="124m", mode="both", contestant=who, status="ok", ms=ms, of_floor=0.5)
    lines.write(op="norm", size="124m", contestant="apex", status="not installed")
    lines = machine.Lines(tmp_path / "step.jsonl", config="gpt2_124m", arm="triton")
    lines.write(how="alone", status="ok", tokens_per_s=1e5, mfu_nanogpt=0.5, batch_size=64)
    lines.write(how="in turn", status="out of memory beside the others")
    machine.Lines(tmp_path / "kernels.jsonl").write(run="1", kernel="_k", calls=12, ms=3.0, share=0.25)
    text = gpu_session.measured(tmp_path)
    assert text.splitlines()[1].split() == ["norm", "124m", "both", "2", "50%", "4", "Liger", "3"]
    assert "gpt2_124m triton, alone: 100000 tokens/s, MFU 50.0% (nanoGPT's count), B=64" in text
    assert "triton, in turn: out of memory beside the others" in text
    assert text.splitlines()[-1].split() == ["_k", "12", "3", "25.0%"]
