"""bench/against_revision.py, selfcheck.py and `pytest bench`: what they run, what they say when they cannot."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import against_revision
import machine
import pytest
import selfcheck
import timed_step
import turns

from nanogpt_fast.errors import ConfigError, DeviceError

ROOT = Path(__file__).resolve().parents[2]
ARGS = Namespace(
    config="shakespeare_char_cpu", device="cpu", dtype="float32", kernels="reference", rounds=1, turns=2, steps=2
)
in_a_checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")


# ---- revisions ----


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One commit, tagged v1, and a change that is not committed."""
    root = tmp_path / "repository"
    root.mkdir()
    run = lambda *words: subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True)
    run("init", "--quiet")
    (root / "file").write_text("first")
    run("add", "file")
    run("-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "-m", "first")
    run("tag", "v1")
    (root / "file").write_text("changed")
    monkeypatch.setattr(machine, "ROOT", root)
    return root


def worktrees(root: Path) -> int:
    told = subprocess.run(["git", "-C", str(root), "worktree", "list"], capture_output=True, text=True).stdout
    return len(told.splitlines())


def test_a_worktree_holds_the_revision_and_goes(repository: Path):
    with against_revision.worktree(against_revision.commit_of("v1")) as base:
        assert (base / "file").read_text() == "first" and worktrees(repository) == 2
    assert not base.exists() and worktrees(repository) == 1
    with pytest.raises(KeyboardInterrupt), against_revision.worktree("v1") as base:
        raise KeyboardInterrupt
    assert not base.exists() and worktrees(repository) == 1


def test_a_revision_that_is_not_there(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for revision in ("v2", "--help", "HEAD:file"):
        with pytest.raises(ConfigError, match="unknown revision") as error:
            against_revision.commit_of(revision)
        assert error.value.exit_code == 2
    with pytest.raises(ConfigError, match="did you mean 'v1'"):
        against_revision.commit_of("v11")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ConfigError, match="no git checkout"):
        against_revision.commit_of("v1")


def test_sides_take_turns_and_the_ratio_is_paired(monkeypatch: pytest.MonkeyPatch):
    ran: list[str] = []

    class Side:
        def __init__(self, root: Path, args: Namespace):
            self.name = root.name

        def turn(self, steps: int) -> dict[str, Any]:
            ran.append(self.name)
            return {"seconds": [{"base": 0.010, "here": 0.011}[self.name]] * steps}

        def end(self) -> None:
            ran.append(f"{self.name} ends")

    monkeypatch.setattr(against_revision, "worker", Side)
    roots = {side: Path(side) for side in against_revision.SIDES}
    times = against_revision.one_round(roots, Namespace(turns=3, steps=1))
    assert ran == ["base", "here", "here", "base", "base", "here", "base ends", "here ends"]
    assert times == {"base": [10.0] * 3, "here": [11.0] * 3}
    times = {"base": [10.0, 20.0, 30.0], "here": [11.0, 22.0, 36.0]}
    text = against_revision.said(times, {"base": "v1", "here": "abc and changes"}).splitlines()
    assert text[2].split() == ["here:", "abc", "and", "changes", "22", "16.5-29", "1.100", "1.100-1.150"]


def test_a_side_that_cannot_step_is_named(monkeypatch: pytest.MonkeyPatch):
    ended: list[str] = []

    def worker(root: Path, args: Namespace) -> Any:
        if root.name == "base":
            raise turns.Failed("ModuleNotFoundError: No module named 'nanogpt_fast.optim'")
        return Namespace(end=lambda: ended.append(root.name))

    monkeypatch.setattr(against_revision, "worker", worker)
    monkeypatch.setattr(against_revision, "SIDES", ("here", "base"))
    with pytest.raises(DeviceError, match="base cannot make a step") as error:
        against_revision.one_round({"base": Path("base"), "here": Path("here")}, ARGS)
    assert "nanogpt_fast.optim" in str(error.value) and ended == ["here"]


def test_flags_are_checked():
    for argv, said in ((["HEAD", "--rounds", "0"], "--rounds"), (["HEAD", "--config", "quickstar"], "did you mean")):
        with pytest.raises(ConfigError, match=said):
            against_revision.main(argv)


@pytest.mark.slow
@in_a_checkout
def test_this_checkout_beside_a_revision(tmp_path: Path, capsys: pytest.CaptureFixture):
    argv = ["HEAD", "--rounds", "1", "--turns", "1", "--steps", "1", "--dtype", "float32", "--device", "cpu"]
    assert against_revision.main([*argv, "--out", str(tmp_path)]) == 0
    (row,) = machine.read_lines(tmp_path / "revision.jsonl")
    assert len(row["base_ms"]) == len(row["here_ms"]) == 1 and row["base_ms"][0] > 0 and row["status"] == "ok"
    assert "base: HEAD (" in capsys.readouterr().out


def test_modules_from_elsewhere_are_seen(tmp_path: Path):
    assert timed_step.strangers(ROOT) == []
    assert "nanogpt_fast" in timed_step.strangers(tmp_path)


@pytest.mark.slow
def test_a_side_without_a_module_does_not_borrow_it(tmp_path: Path):
    """An editable install answers for modules that the revision lacks: then nothing is timed."""
    (tmp_path / "nanogpt_fast").mkdir()
    (tmp_path / "nanogpt_fast/__init__.py").touch()
    with pytest.raises(turns.Failed, match=r"no nanogpt_fast\.|No module named|cannot import"):
        against_revision.worker(tmp_path, ARGS)


# ---- the harness on real clocks ----


@pytest.mark.parametrize("planted,quartiles,held", [
    (1.0, (0.98, 1.0, 1.02), True), (1.0, (1.01, 1.05, 1.1), False), (1.1, (1.05, 1.1, 1.2), True),
    (1.1, (0.99, 1.1, 1.2), False), (1.1, (1.2, 1.3, 1.4), False),
])  # fmt: skip
def test_what_was_planted_is_found_or_not(planted: float, quartiles: tuple[float, float, float], held: bool):
    q1, x, q3 = quartiles
    assert selfcheck.held(planted, x=x, x_q1=q1, x_q3=q3) is held


def test_the_self_check_says_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    seen: list[int] = []

    def interleaved(arms: Any, rounds: int) -> dict[str, list[float]]:
        products: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selfcheck.torch, "mm", lambda *_, **__: products.append(1))
            for arm in arms.values():
                before = len(products)
                arm.replay()
                seen.append(len(products) - before)
        return {"a": [1.0, 1.0], "b": [seen[-1] / seen[-2]] * 2}

    monkeypatch.setattr(selfcheck.timing, "interleaved", interleaved)
    assert selfcheck.main(["--device", "cpu", "--rounds", "2", "--out", str(tmp_path)]) == 0
    assert seen == [20, 20, 20, 22]
    assert [row["x"] for row in machine.read_lines(tmp_path / "selfcheck.jsonl")] == [1.0, 1.1]
    monkeypatch.setattr(selfcheck.timing, "interleaved", lambda *_: {"a": [1.0, 1.0], "b": [1.0, 1.0]})
    assert selfcheck.main(["--device", "cpu"]) == 1
    assert "NOT as planted" in capsys.readouterr().out


# ---- pytest bench ----


@pytest.mark.slow
def test_pytest_bench_saves_and_compares(tmp_path: Path):
    pytest.importorskip("pytest_benchmark")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "-k",
        "test_op and norm-forward and not add",
        "-p",
        "no:cacheprovider",
    ]
    command += [f"--benchmark-storage=file://{tmp_path}", "--benchmark-max-time=0.01"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    env.pop("PYTEST_XDIST_WORKER", None)
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    first, second = sorted(tmp_path.rglob("*.json"))
    assert "(NOW)" in done.stdout and first.name.startswith("0001_") and second.name.startswith("0002_")
    (saved, *_) = json.loads(first.read_text())["benchmarks"]
    assert saved["extra_info"].keys() >= {"device", "op", "mode", "dtype", "commit"}
