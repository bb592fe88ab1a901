"""What bench/compare.py draws, and what it says of a file that someone wants to send: on made-up rows."""

import sys
from pathlib import Path
from typing import Any

import compare
import compare_check
import compare_plots
import compare_rows
import compare_tables
import pytest
from made_up_rows import FACTS, GPU, gemm, results, step, written

from nanogpt_fast.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


# ---- plots ----


@pytest.mark.parametrize("count", [1, 2, 12])
def test_plots_are_drawn_of_few_and_many_rows(file: Path, count: int):
    pytest.importorskip("matplotlib")
    rows = [step(f"arm $\\x$ {i}", [1.0 + i, 1.1 + i], config=f"m{i % 3}", params=10.0 ** (6 + i % 3), run=str(i),
                 gpu=f"GPU {i % 2}") for i in range(count)]  # fmt: skip
    found = results(
        file, *rows, step("arm $\\x$ 0", [0.9, 1.0], config="m0", params=1e6, gpu="GPU 0", run="z", commit="2")
    )
    plots, why = compare_plots.draw_all(found, compare_tables.same_machine(found))
    names = ["mfu_by_size.png"] * (count > 1) + ["mfu_by_gpu.png", "speed_by_arm.png", "two_versions.png"]
    assert ([p.name for p in plots], why) == (names, "")
    assert all(p.png.startswith(b"\x89PNG") and p.caption for p in plots)


def test_without_an_mfu_tokens_are_drawn_and_without_rows_nothing(file: Path):
    pytest.importorskip("matplotlib")
    row = step("reference", [1.0, 1.0])
    del row["mfu_nanogpt"]
    plots, _ = compare_plots.draw_all(results(file, row), [])
    assert [p.name for p in plots] == ["speed_by_gpu.png", "speed_by_arm.png"]
    assert "no row here has an MFU" in plots[0].caption
    assert compare_plots.draw_all([], []) == ([], "No plots: no step in these results has a time.")


def test_without_matplotlib_the_page_says_so(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plots, why = compare_plots.draw_all(results(file, step("triton", [1.0, 1.0])), [])
    assert plots == [] and "pip install" in why


# ---- rows to send ----


def complete(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    gpu = {**GPU, "gpu": "NVIDIA Made-up 80GB"}
    rows = [
        {**FACTS, **gpu, "bench": "environment", "driver": None, "power_limit_w": None},  # a container tells neither
        {**FACTS, **gpu, "bench": "roof", "what": "copy", "gbps": 1.0},
        *({**gemm(of, 1.0, 1.0), **gpu} for of in ("square", "sweep", "model")),
        *({**step(arm, [1.0, 1.0]), **gpu} for arm in ("triton", "nanogpt+compile")),
        {**FACTS, **gpu, "bench": "step", "config": "tiny", "arm": "hf", "how": "alone", "status": "missing: pip"},
    ]
    return folder / "nvidia-made-up-80gb/2026-01-02-abcdef0.jsonl", rows


def test_a_complete_file_can_be_sent(tmp_path: Path, capsys: pytest.CaptureFixture):
    path, rows = complete(tmp_path)
    assert compare.main(["--check", str(written(path, *rows))]) == 0
    said = capsys.readouterr().out
    assert "nothing is missing" in said and "kept as it is: step hf: missing: pip" in said


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda rows: rows[5].pop("seconds"), "no seconds by round"),
        (lambda rows: rows[5].pop("tree"), "no tree in line 6"),
        (lambda rows: rows[5].update(q1="fast"), "no q1 in line 6"),
        (lambda rows: rows[5].update(dirty=True), "uncommitted changes"),
        (lambda rows: rows[5].update(commit="123456789a"), "several commits"),
        (lambda rows: rows[5].update(gpu="Another"), "several machines"),
        (lambda rows: rows.pop(0), "no row of the machine"),
        (lambda rows: rows.pop(1), "no measured copy"),
        (lambda rows: rows.pop(3), "no products of the sweep in bfloat16"),
        (lambda rows: rows.pop(6), "stock nanoGPT was not timed"),
        (lambda rows: [row.update(how="alone") for row in rows[5:]], "no step that was timed in turn"),
        (lambda rows: [row.pop("loss_after") for row in rows[5:7]], "no loss after some steps"),
        (lambda rows: [row.pop("joules_per_token") for row in rows[5:7]], "no joules a token"),
        (lambda rows: rows[7].update(status="failed: /home/someone/x.py"), "/home/someone/x.py"),
        (lambda rows: [row.update(dtype="float16") for row in rows[5:7]], "no measured product in float16"),
        (lambda rows: [row.update(time="2026-01-03T00:00:00+00:00") for row in rows], "2026-01-03-abcdef0.jsonl"),
    ],
)
def test_what_a_file_lacks_is_said(tmp_path: Path, capsys: pytest.CaptureFixture, change, said: str):
    path, rows = complete(tmp_path)
    change(rows)
    assert compare.main(["--check", str(written(path, *rows))]) == 3
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert any(said in line for line in lines), lines


def test_place_and_name_of_a_file(tmp_path: Path):
    path, rows = complete(tmp_path)
    rows = compare_rows.read([written(tmp_path / "mine.jsonl", *rows)]).rows
    wanted = ["its place and name: bench/results/nvidia-made-up-80gb/2026-01-02-abcdef0.jsonl"]
    assert list(compare_check.lacks(tmp_path / "mine.jsonl", rows)) == wanted
    assert list(compare_check.lacks(path, rows)) == []
    assert list(compare_check.lacks(tmp_path / "cpu" / path.name, rows)) == wanted


def test_check_takes_one_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="one file"):
        compare.main(["--check", "a.jsonl", "b.jsonl"])
