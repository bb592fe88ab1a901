"""bench/run.py: its stages, what it leaves when it is interrupted, and the report of made-up rows."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cpu_stages
import gpu_stages
import machine
import pytest
import report
import report_sections
import run
from gpu_stages import Stage

from nanogpt_fast.errors import ConfigError, DataError

FACTS = {"run": "r1", "device": "cpu", "cpu": "<b>Some</b> CPU", "torch": "2.13.0", "commit": "abcdef1234"}


def step_row(arm: str, **more: Any) -> dict[str, Any]:
    """One of bench/step.py's, figures made up."""
    row = {
        "bench": "step",
        **FACTS,
        "config": "tiny",
        "arm": arm,
        "how": "in turn",
        "status": "ok",
        "dtype": "float32",
        "ms_s": 0.08,
        "q1": 0.07,
        "q3": 0.1,
        "tokens": 768,
        "tokens_per_s": 9600.0,
        "tflops": 0.05,
        "params": 800000,
        "peak": "0.1 TFLOP/s, made up",
        "mfu_nanogpt": 0.5,
        "peak_gb": 0.4,
        "seconds": [0.08, 0.08, 0.08],
    }
    return {**row, **more}


def write(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def cells(folder: Path, title: str) -> list[list[Any]]:
    section = next(s for s in report.sections(folder, []) if s.title.startswith(title))
    return [row for _, _, rows in section.tables for row in rows]


def test_ratios_are_of_one_round(tmp_path: Path):
    """The machine slows down threefold from round to round; the ratio within each is 0.8."""
    ours = step_row("reference", seconds=[0.08, 0.24, 0.72])
    stock = step_row("nanogpt", seconds=[0.1, 0.3, 0.9], ms_s=0.3)
    write(tmp_path, "step", ours, stock, step_row("hf", how="alone", status="missing: pip install transformers"))
    write(
        tmp_path,
        "roof",
        {
            "bench": "roof",
            **FACTS,
            "what": "gemm",
            "dtype": "float32",
            "shape": [64, 64, 64],
            "ms": 1.0,
            "tflops": 0.1,
            "of": "sweep",
        },
    )
    mine, theirs, missing = cells(tmp_path, "Training step")
    assert mine[0] == "reference" and mine[6] == "" and theirs[6] == "0.800 (0.800 to 0.800)"
    assert mine[5] == "50.0%"  # of the best product
    assert missing[1:8] == [None] * 7 and missing[8] == "missing: pip install transformers"
    write(tmp_path, "step", ours, {**stock, "run": "another"})
    assert [row[6] for row in cells(tmp_path, "Training step")] == ["", ""]  # never across runs


def test_the_last_row_of_an_arm_is_shown(tmp_path: Path):
    write(
        tmp_path,
        "step",
        step_row("reference", ms_s=1.0),
        step_row("reference", ms_s=2.0),
        step_row("nanogpt", how="alone"),
    )
    assert [(row[0], row[1], row[8]) for row in cells(tmp_path, "Training step")] == [
        ("reference", 2000.0, ""),
        ("nanogpt", 80.0, "alone, not in turn"),
    ]


def test_the_page_holds_every_part_and_no_foreign_markup(tmp_path: Path, capsys: pytest.CaptureFixture):
    write(tmp_path, "step", step_row("reference"), step_row("nanogpt"))
    write(
        tmp_path,
        "profile",
        *(
            {"bench": "profile", **FACTS, "status": "ok", "config": "tiny", **row}
            for row in (
                {"part": "matrix products", "ms": 50.0, "share": 0.6, "floor_ms": 40.0, "of_floor": 0.8},
                {
                    "part": "step",
                    "ms": 80.0,
                    "text": "Most goes to matrix products.",
                    "advice": "First: a larger batch.",
                },
            )
        ),
    )
    write(
        tmp_path,
        "sample",
        *(
            {
                "bench": "sample",
                **FACTS,
                "status": "ok",
                "arm": arm,
                "ms_token": 2.0,
                "q1": 1.9,
                "q3": 2.2,
                "tokens_per_s": 500.0,
                "seconds": [s, s],
                "new_tokens": 9,
                "prompt": 4,
                "config": "tiny",
            }
            for arm, s in (("ours", 1.0), ("ours, no cache", 4.0))
        ),
    )
    write(
        tmp_path,
        "ops",
        {
            "bench": "ops",
            **FACTS,
            "op": "norm",
            "size": "cpu",
            "contestant": "eager",
            "mode": "forward",
            "status": "ok",
            "ms": 0.5,
            "q1": 0.4,
            "q3": 0.6,
            "tflops": 0.0,
            "gbps": 3.0,
            "of_floor": 0.4,
        },
        {
            "bench": "ops",
            **FACTS,
            "op": "norm",
            "size": "cpu",
            "contestant": "Liger",
            "status": "missing: pip install x",
        },
    )
    write(
        tmp_path,
        "train",
        *(
            {
                "bench": "train",
                **FACTS,
                "status": "ok",
                "arm": arm,
                "round": 0,
                "wall_s": s,
                "iter_ms": 1.0,
                "val_loss": 1.9,
                "iterations": 200,
            }
            for arm, s in (("nanogpt", 20.0), ("ours", 10.0))
        ),
    )
    target = report.write(tmp_path, ["a GPU"])
    said, html = capsys.readouterr().out, target.read_text()
    for text in (
        "First: a larger batch.",
        "0.250 (0.250 to 0.250)",
        "missing: pip install x",
        "a GPU",
        "0.500 (0.500 to 0.500)",
    ):
        assert text in said and text in html, text
    assert "<b>Some</b>" not in html and "&lt;b&gt;Some" in html
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"training-step-tiny.png", "where-the-step-goes.png", "sampling.png", "ops-one-at-a-time.png"}
    assert html.count("data:image/png") == len(pictures) and html.count("<table") >= 6


def test_without_rich_and_matplotlib_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    for name in ("rich.console", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    write(tmp_path, "step", step_row("reference"))
    html = report.write(tmp_path).read_text()
    assert "No plot" in html and "nanogpt-fast[plot]" in html and "reference" in capsys.readouterr().out


def test_no_results_are_an_error(tmp_path: Path):
    (tmp_path / "session.jsonl").write_text('{"stage": "step"}\n')
    with pytest.raises(DataError, match="no results"):
        report.write(tmp_path)


def test_suites_name_existing_scripts(tmp_path: Path):
    for quick in (True, False):
        for stage in cpu_stages.cpu_stages(tmp_path, quick, True):
            assert Path(stage.command[1]).is_file(), stage.name
            assert stage.suite in run.SUITES + run.ALWAYS + ("profile",), stage.suite
    suites = {stage.suite for stage in gpu_stages.all_stages(tmp_path)}
    assert suites <= set(run.SUITES + run.ALWAYS + ("profile",))


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--suite=loader"], ["environment", "loader"]),
        (["--suite=step", "--profile"], ["environment", "step", "profile", "step-trainers"]),
        (["--suite=step", "--peers=none"], ["environment", "step"]),
        (["--quick"], ["environment", "step", "step-trainers", "sample", "loader", "ops", "train"]),
    ],
)
def test_what_a_suite_runs_on_a_cpu(argv: list[str], names: list[str], tmp_path: Path):
    args = run.parsed([*argv, "--device=cpu"])
    assert [stage.name for stage in run.stages_of(args.suite, "cpu", tmp_path, args)] == names


def test_without_peers_no_arm_is_anybody_else_s(tmp_path: Path):
    for stage in cpu_stages.cpu_stages(tmp_path, False, False):
        assert not {"nanogpt", "hf", "nanogpt+compile"} & set(stage.command), stage.name


def test_a_device_without_a_benchmark_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "resolve_device", lambda name: machine.torch.device("mps"))
    with pytest.raises(ConfigError, match="does not measure mps"):
        run.main(["--device=mps"])


def test_the_results_file_is_whole_lines_of_all_kinds(tmp_path: Path):
    write(tmp_path, "step", step_row("reference"))
    with (tmp_path / "ops.jsonl").open("w") as file:
        file.write(f'{{"bench": "ops", "op": "norm", "path": "{machine.ROOT}/x"}}\n')
        file.write('{"finished": "tree"}\n{"bench": "ops", "op": "cut o')
    for _ in range(2):  # once more does not take its own result in
        target = run.results_file(tmp_path, 0.0)
        assert [json.loads(line)["bench"] for line in target.read_text().splitlines()] == ["ops", "step"]
    assert json.loads(target.read_text().splitlines()[0])["path"] == "./x"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\w{7}\.jsonl", target.name)
    assert len(report_sections.read(tmp_path)["step"]) == 1


SLOW = """
import sys, json, time, pathlib
path = pathlib.Path(sys.argv[1]) / "step.jsonl"
row = dict(bench="step", config="tiny", arm="x", how="alone", status="missing: y", tokens=1, commit="c")
with path.open("a") as file:
    file.write(json.dumps(row) + "\\n")
print("written", flush=True)
if len(path.read_text().splitlines()) == 1:
    time.sleep(60)
"""


@pytest.mark.usefixtures("signals_heeded")
def test_an_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path: Path):
    """Ctrl-C in the second stage: its rows are whole, the page is there, and the printed command finishes the rest."""
    patch = (
        f"import sys; sys.path[:0] = [{str(Path(run.__file__).parent)!r}]; import run; from gpu_stages import Stage\n"
        f"stage = lambda name, code: Stage(name, [sys.executable, '-S', '-c', code, {str(tmp_path)!r}], 50.0, 0.1)\n"
        f"run.stages_of = lambda *_: [stage('first', 'print(1)'), stage('slow', {SLOW!r}), stage('last', 'print(3)')]\n"
        "sys.exit(run.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", patch, "--device=cpu", "--out", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(machine.ROOT), str(machine.ROOT / "kernels")])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    for _ in range(600):
        if (tmp_path / "step.jsonl").is_file():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "to go on:\n  python bench/run.py --device=cpu --out" in said and (tmp_path / "report.html").is_file()
    assert len(machine.read_lines(tmp_path / "step.jsonl")) == 1
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    states = {row["stage"]: row["status"] for row in machine.read_lines(tmp_path / "session.jsonl")}
    assert states == {"first": "done", "slow": "done", "last": "done"}
    assert "first" not in re.findall(r"^(\w+): up to", done.stdout, re.MULTILINE)


def test_the_progress_line_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(run.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(run.os, "get_terminal_size", lambda: os.terminal_size((60, 20)))
    stages = [Stage("a", [], 10.0), Stage("b", [], 10.0)]
    with run.progress(stages) as watch:
        assert watch is not None
        watch(stages[1], 3.0, 10.0, "round 3\x1b[2J of 5" + "x" * 100)
    line = capsys.readouterr().out.split("\r")[1]
    assert line.startswith("[2/2] b 3 of 10 s at most: round 3") and len(line) == 59 and "\x1b" not in line
