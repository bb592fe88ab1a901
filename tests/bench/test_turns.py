"""bench/turns.py, and what uses it: arms in processes of their own. No time is asserted anywhere."""

import json
import shlex
import sys
from pathlib import Path

import against_nanogpt
import loader
import machine
import pytest
import step
import step_timing
import turns

from nanogpt_fast.settings.cli import load_config

BENCH = Path(turns.__file__).parent
TINY = ["--device=cpu", "--tiny", "--dtype=float32", "--batch_size=2", "--accumulation=1", "--warmup=1"]


def arm(body: str) -> list[str]:
    """A process that serves `call`, written in `body`."""
    return [sys.executable, "-S", "-c", f"import sys\nsys.path.insert(0, {str(BENCH)!r})\nimport turns\n{body}"]


COUNTING = """
calls = []
def make():
    print("a library's own line")
    return {"kind": "counting"}, lambda: calls.append(1), lambda: {"calls": len(calls)}
turns.serve(make)
"""


def test_a_turn_s_first_call_is_not_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    clock = iter([0.0, 9.0, 9.0, 9.25, 10.0, 10.5])
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(sys, "stdin", iter(["3\n"]))
    turns.serve(lambda: ({}, lambda: None, dict))
    answer = json.loads(capsys.readouterr().out.splitlines()[1].removeprefix(turns.MARK))
    assert answer["seconds"] == [9.0, 0.25, 0.5]  # Apart.turn(2) asked for three and leaves the first out


def test_an_arm_makes_its_calls_and_one_more(capsys: pytest.CaptureFixture):
    process = turns.Apart(arm(COUNTING))
    assert process.facts == {"kind": "counting"} and "a library's own line" in capsys.readouterr().out
    first, second = process.turn(3), process.turn(1)
    assert (len(first["seconds"]), first["calls"], len(second["seconds"]), second["calls"]) == (3, 4, 1, 6)
    assert min(first["seconds"]) >= 0.0 and first["peak_gb"] > 0.001
    process.end()
    assert process.process.poll() is not None
    process.end()  # once more does no harm


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("turns.serve(lambda: 1 / 0)", "division by zero"),
        ("import os; os._exit(7)", "ended with exit code 7"),
        ("print('no answer')", "ended with exit code 0"),
        ("import os; os.abort()", "ended with exit code -6"),
    ],
)
def test_an_arm_that_never_gets_ready_says_why(body: str, why: str):
    with pytest.raises(turns.Failed, match=why):
        turns.Apart(arm(body))


def test_an_arm_that_fails_in_its_turn_says_why():
    body = COUNTING.replace("calls.append(1)", "len(calls) > 1 and 1 / 0 or calls.append(1)")
    process = turns.Apart(arm(body))
    process.turn(1)
    with pytest.raises(turns.Failed, match="division by zero"):
        process.turn(1)
    with pytest.raises(turns.Failed, match="ended with exit code"):
        process.turn(1)
    process.end()


def test_each_round_begins_with_another():
    assert [turns.rotated("abc", turn) for turn in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert turns.rotated([], 3) == []


def test_a_step_in_a_process_of_its_own():
    setup = step.setup_of(step.parsed(TINY))
    expected = step_timing.first_step(step_timing.step_arms.make_arm("reference", setup), setup)
    here = step_timing.ready("reference", setup, expected, 1)
    here.time(setup.world.device, 3)
    there = step_timing.Apart("reference", TINY, expected)
    try:
        assert len(there.time(setup.world.device, 2)) == 2  # and one before, so 1 + 1 + 2 steps, as here
        assert there.facts["loss"] == here.facts["loss"] and there.facts["peak_gb"] > 0.05
        assert (
            there.facts["loss_after"] == step_timing.said(here.facts)["loss_after"]
            and here.facts["loss_after"]["steps"] == 4
        )
    finally:
        there.end()
    with pytest.raises(turns.Failed, match="^WRONG: loss"):
        step_timing.Apart("reference", TINY, (expected[0], expected[1] * 1.2))
    with pytest.raises(turns.Failed, match="^missing: stock nanoGPT"):
        step_timing.Apart("nanogpt", [*TINY, "--nanogpt", "nowhere"], expected)


def test_loader_writes_a_row_for_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader, "TOKENS", 1 << 18)
    monkeypatch.setattr(loader, "GPT2", (2, 64))
    monkeypatch.setattr(loader, "ProcessLoader", lambda paths, batch, block: loader.loader_of(paths, batch, block, 0))
    argv = ["--quick", "--out", str(tmp_path), "--consumer", "1e6"]
    monkeypatch.setattr(loader, "timed", lambda source, work, seconds: (next(source).numel() / 1e3, 2.0))
    assert loader.main(argv) == 0
    rows = machine.read_lines(tmp_path / "loader.jsonl")
    assert [row["worker"] for row in rows if row["table"] == "worker"] == ["none", "thread", "process"]
    assert [row["order"] for row in rows if row["table"] == "order"] == ["shuffle", "nanogpt"]
    formats = [row["format"] for row in rows if row["table"] == "format"]
    assert len(set(formats)) == 5 and sum("uint32" in name for name in formats) == 1
    first = rows[-1]  # 2 x 64 tokens in (2 x 65) / 1e3 us; 2 us of waiting beside 128 us
    assert first["tokens_per_s"] == pytest.approx(128 / 0.13 * 1e6)
    assert first["data_wait"] == pytest.approx(2 / 130) and first["rounds"] == 3


def test_the_formats_hold_the_same_batches(tmp_path: Path):
    files = loader.write_files(tmp_path, 1 << 16)
    batches = {}
    for name, paths in files.items():
        with loader.loader_of(paths, 2, 32, prefetch=2) as source:
            batches[name] = next(source).tolist()
    shards = batches.pop(next(name for name in batches if "shards" in name))
    first = next(iter(batches.values()))
    assert all(batch == first for batch in batches.values()) and shards != first  # windows do not cross shards


def test_whole_runs_are_compared_within_a_round(tmp_path: Path):
    runs = {
        "nanogpt": [{"round": i, "wall_s": s, "iter_ms": 2.0, "val_loss": 1.9, "best_val_loss": 1.8}
                    for i, s in enumerate((10.0, 20.0, 40.0))],
        "ours": [{"round": i, "wall_s": s, "iter_ms": 1.0, "val_loss": 1.9, "best_val_loss": 1.8}
                 for i, s in ((0, 5.0), (2, 10.0))],
    }  # fmt: skip
    assert [(row[0], row[2]) for row in against_nanogpt.summary(runs)] == [("nanogpt", 1.0), ("ours", 0.375)]
    assert against_nanogpt.summary({"ours": runs["ours"]})[0][2] is None


@pytest.mark.parametrize("job", against_nanogpt.JOBS)
def test_our_commands_are_runs_of_so_many_iterations(job: str, capsys: pytest.CaptureFixture[str]):
    assert against_nanogpt.main([f"--job={job}", "--dry_run"]) == 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    words = shlex.split(said["ours"])
    config = load_config(words[words.index("nanogpt_fast.train") + 1 :])
    assert config.optim.max_iters == config.optim.lr_decay_iters == against_nanogpt.JOBS[job]
    tokens = config.data.batch_size * config.data.block_size * config.data.gradient_accumulation_steps
    assert tokens == {"cpu": 768, "shakespeare_char": 16384, "gpt2_124m": 65536}[job]
    assert f"--max_iters={config.optim.max_iters}" in shlex.split(said["nanogpt"])


def test_losses_of_the_same_batches_are_laid_beside_each_other():
    ours, theirs = {0: 4.0, 1: 3.5, 2: 3.0}, {0: 4.0, 1: 3.25}
    assert against_nanogpt.gap(ours, theirs) == {"largest_gap": 0.25, "end_gap": 0.125}


def test_a_run_that_fails_is_a_row_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "ng/config").mkdir(parents=True)
    for name in ("model.py", "configurator.py", "config/train_shakespeare_char.py"):
        (tmp_path / "ng" / name).write_text("")
    (tmp_path / "ng/train.py").write_text("raise SystemExit('no such luck')")
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 400)
    argv = [
        "--nanogpt",
        str(tmp_path / "ng"),
        "--text",
        str(text),
        "--rounds=1",
        "--iterations=2",
        "--out",
        str(tmp_path),
    ]
    assert against_nanogpt.main([*argv, "--arms", "nanogpt", "ours"]) == 0
    stock, ours = machine.read_lines(tmp_path / "train.jsonl")
    assert stock["status"] == "failed: exit code 1: no such luck" and ours["status"] == "ok" and ours["val_loss"] > 0
    assert not (tmp_path / "ng/data").exists()
    assert against_nanogpt.main(["--text", str(text), "--arms", "nanogpt", "--out", str(tmp_path)]) == 1
    assert machine.read_lines(tmp_path / "train.jsonl")[-1]["status"].startswith("missing: name a checkout")
