"""Every stage of bench/gpu_session.py on the CPU, without the packages that a bare machine with a GPU lacks."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_session
import gpu_stages
import machine
import pytest
from gpu_stages import Stage

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = ("tyro", "rich", "safetensors", "nvtx", "filelock", "hypothesis", "expecttest", "xdist", "pytest_timeout")
BARE_PYTHON = f"""
import importlib.machinery, os, sys, time
stock = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.partition(".")[0] in {BLOCKED!r} else stock(name, *rest)
)
script = next((os.path.basename(word) for word in sys.orig_argv if word.endswith(".py")), "")
if script == os.environ.get("PLANTED_CRASH"):
    os.abort()
if script == os.environ.get("PLANTED_HANG"):
    time.sleep(600)
"""
WRITES = {"environment": "environment", "compile": "compile", "step": "step", "step-peers": "step", "tune": "",
          "race": "race", "race-own-ptxas": "race", "race-all": "race", "race-dropout": "race", "memcheck": "memcheck",
          "shipped": "tests", "ops": "ops", "peers": "ops", "ops-1558m": "ops", "profile": "profile",
          "sample": "sample", "loader": "loader"}  # fmt: skip
WRITES |= {f"step-{size}": "step" for size in ("350m", "774m", "1558m")}


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stage starts finds torch, Triton and pytest, and little else."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/sitecustomize.py").write_text(BARE_PYTHON)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bare"))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # plugins are found by their metadata, not by import
    monkeypatch.delenv("NANOGPT_DIR", raising=False)


def rehearse(out: Path, monkeypatch: pytest.MonkeyPatch, *names: str, **limits: float) -> dict[str, str]:
    """{stage: its status}; after each stage that is done its own lines are on the disk."""
    stages = [gpu_stages.in_rehearsal(stage) for stage in gpu_stages.all_stages(out)]
    stages = [replace(s, limit_s=limits.get(s.name, s.limit_s)) for s in stages if not names or s.name in names]
    stock = gpu_session.run_stage

    def spying(stage: Stage, seconds: float, out: Path, watch: Any = None) -> dict:
        path = out / f"{WRITES.get(stage.name)}.jsonl"
        before = len(machine.read_lines(path))
        outcome = stock(stage, seconds, out)
        if outcome["status"] == "done" and WRITES.get(stage.name):
            assert len(machine.read_lines(path)) > before, (stage.name, outcome)
        return outcome

    monkeypatch.setattr(gpu_session, "run_stage", spying)
    return {name: outcome["status"] for name, outcome in gpu_session.run_session(stages, 60.0, out, "t")}


def test_rehearsal_on_a_bare_machine(tmp_path: Path, bare: None, monkeypatch: pytest.MonkeyPatch):
    """One stage crashes, one hangs; the others do not notice."""
    out = tmp_path / "out"
    monkeypatch.setenv("PLANTED_CRASH", "race.py")
    monkeypatch.setenv("PLANTED_HANG", "memcheck.py")
    names = ("compile", "shipped", "race", "memcheck", "step-peers")
    found = rehearse(out, monkeypatch, *names, memcheck=1.0)
    assert found == {"compile": "done", "shipped": "done", "race": "failed", "memcheck": "over its limit",
                     "step-peers": "done"}  # fmt: skip
    compiled = machine.read_lines(out / "compile.jsonl")
    assert [row["status"] for row in compiled] == ["compiled"] * 2 and compiled[0]["ptxas"]["version"]
    ours, stock = machine.read_lines(out / "step.jsonl")
    assert ours["tokens_per_s"] > 0 and stock["status"].startswith("missing: stock nanoGPT")
    assert gpu_session.states(out / "session.jsonl", "t")["race"]["rc"] == -signal.SIGABRT


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_rehearsal_of_every_stage_on_a_bare_machine(tmp_path: Path, bare: None, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    found = rehearse(out, monkeypatch)
    assert set(found.values()) == {"done"} and list(found) == [s.name for s in gpu_stages.all_stages(out)], found
    assert any(row["kernel"].endswith("::attention_fwd") for row in machine.read_lines(out / "kernels.jsonl"))


def test_pytest_on_a_bare_machine(tmp_path: Path, bare: None):
    """Property tests skip themselves, files that need another package are skipped, the rest runs; without the plugin
    the run stops at collection."""
    (tmp_path / "pytest.ini").write_text("[pytest]\ntimeout = 300\n")
    (tmp_path / "test_property.py").write_text(
        "import pytest\nfrom hypothesis import HealthCheck, given, settings\nfrom hypothesis import strategies as st\n"
        "@pytest.mark.parametrize('a', [1, 2])\n@settings(deadline=None, suppress_health_check=[HealthCheck.x])\n"
        "@given(st.lists(st.integers(0, 5)).map(len), b=st.booleans() | st.none())\n"
        "def test_property(a, n, b):\n    assert 0\n"
        "@pytest.mark.timeout(5)\ndef test_plain():\n    pass\n"
        "def test_wrong():\n    assert 0\ndef test_without(x):\n    pass\n"
    )
    (tmp_path / "test_file.py").write_text("import tyro\ndef test_t():\n    pass\n")
    (tmp_path / "test_broken.py").write_text("import torhc\n")
    command = [sys.executable, "-m", "pytest", "-rs", "--strict-markers", "-p", "no:cacheprovider", "."]
    env = {**os.environ, "PYTHONPATH": f"{os.environ['PYTHONPATH']}{os.pathsep}{ROOT / 'bench'}"}
    run = lambda *more: subprocess.run([*command, *more], cwd=tmp_path, env=env, capture_output=True, text=True)
    stopped = run()
    assert stopped.returncode == 2 and "3 errors" in stopped.stdout
    said = run("-p", "pytest_stage", "--continue-on-collection-errors", "--results", "tests.jsonl").stdout
    assert "1 failed, 1 passed, 3 skipped, 1 warning, 2 errors" in said, (
        said
    )  # what is no optional package is an error still
    rows = machine.read_lines(tmp_path / "tests.jsonl")
    assert [row["status"] for row in rows] == ["skipped", "skipped", "passed", "failed", "error"]
    assert rows[2]["test"] == "test_property.py::test_plain" and rows[3]["error"].endswith("AssertionError")
    assert "hypothesis is not installed" in said and "tyro is not installed" in said
