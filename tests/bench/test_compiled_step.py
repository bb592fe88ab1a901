"""roofline.py --compiled: a step predicted from its kernels' machine code, beside what a results file measured."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

compiled_step = pytest.importorskip("compiled_step", reason="needs Triton")
import roofline  # noqa: E402  # after Triton is known to be there
from compiled_step import Expected, from_work, measured_ms, rows_of  # noqa: E402
from step_launches import Launch, Launches  # noqa: E402
from work import Work  # noqa: E402

from nanogpt_fast.errors import ConfigError  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "bench/results/h100/2026-11-27-3849647.jsonl"
H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


def test_what_is_not_compiled_is_predicted_by_its_work():
    product = Launch("product", "a", Work(6.85e12, 1e9))
    assert from_work(product, H100) == Expected(0.01, "products")  # as timed, 685 TFLOP/s
    assert from_work(product, A100) == Expected(6.85 / 312, "products")  # the data sheet's 312
    assert from_work(Launch("torch", "add", Work(bytes=2.95e9)), H100) == Expected(1e-3, "memory")


def test_a_results_file_by_op():
    """The kernels that bench/README.md sums up: matrix products 58.6 ms a micro-step and so on, 854 ms in all."""
    found = measured_ms(rows_of(str(MEASURED), H100, 64))
    assert found["product", ""] / 8 == pytest.approx(58.6, abs=0.05)
    assert found["Triton", "attention_fwd"] == pytest.approx(33.218, abs=1e-3)
    assert sum(found.values()) == pytest.approx(854, abs=0.5)


@pytest.mark.parametrize(
    ("text", "batch_size", "message"),
    [
        (None, 64, "no results file"),
        ("{", 64, "no results file"),
        ("{}", 64, "no kernels"),
        (MEASURED, 63, "no kernels"),
    ],
)
def test_files_that_it_refuses(text: str | Path | None, batch_size: int, message: str, tmp_path: Path):
    file = text if isinstance(text, Path) else tmp_path / "results.jsonl"
    if isinstance(text, str):
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        rows_of(str(file), H100, batch_size)


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Two micro-steps: 3 x 2 launches of attention of 2 ms by its code, 2 products of 10 ms, one copy of 1 ms."""
    attention, product = Launch("Triton", "attention_fwd", Work(1.0, 1.0)), Launch("product", "b", Work(6.85e12, 1.0))
    found = Launches(Counter({attention: 3, product: 1}), Counter({Launch("torch", "add", Work(bytes=2.95e9)): 1}), {})
    monkeypatch.setattr(compiled_step, "from_code", lambda *_: {attention: Expected(2e-3, "serial")})
    rows = [
        {"bench": "kernels", "launch_op": "attention_fwd", "kernel": "_attention_fwd_kernel", "ms": 10.0},
        {"bench": "kernels", "launch_op": "", "kernel": "nvjet_sm90_tst", "ms": 16.0},
        {"bench": "step", "how": "alone", "ms_s": 0.04},
        {"bench": "kernels", "launch_op": "", "kernel": "nvjet_of_half_a_batch", "ms": 99.0, "batch_size": 32},
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join(json.dumps({"arm": "triton", "gpu": H100, "batch_size": 64} | row) for row in rows))
    compiled_step.show_compiled(found, 2, 90, H100, 64, str(file))
    shown = capsys.readouterr().out
    cells = {(row := re.split(r"\s{2,}", line))[0]: row[1:] for line in shown.splitlines() if "  " in line}
    assert cells["Triton: attention_fwd"] == ["6", "0.00", "12.00", "serial", "10.00", "+20%"]
    assert cells["product"] == ["2", "13.85", "20.00", "products", "16.00", "+25%"]
    assert cells["torch"] == ["1", "0.88", "1.00", "memory", "-", "-"]
    assert cells["a step"][-3:] == ["33.00", "26.00", "+27%"]
    assert "1605 MHz" in shown and "steps in a row took 40 ms" in shown
    compiled_step.show_compiled(found, 2, 80, A100, 64, None)
    assert "has not been timed" in capsys.readouterr().out


def test_it_is_of_one_gpu_and_a_configuration(capsys: pytest.CaptureFixture):
    for argv in (["--compiled"], ["--config", "gpt2_124m", "--compiled", "--gpu", "h100", "a100"],
                 ["--config", "gpt2_124m", "--measured", "x"]):  # fmt: skip
        with pytest.raises(SystemExit):
            roofline.main(argv)
    assert "--measured goes with it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_step_of_gpt2_124m_is_predicted_within_a_tenth():
    """Its kernels are compiled. Of the profiled step; products within 5%, each of our dear kernels within 20%."""
    command = ["profiling/roofline.py", "--config", "gpt2_124m", "--gpu", "h100", "--batch_size=64",
               "--gradient_accumulation_steps=8", "--compiled", "--measured", str(MEASURED)]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    env.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    table = run.stdout.split("as compiled for sm_90")[1]
    rows = [re.split(r"\s{2,}", line) for line in table.splitlines() if line.endswith("%")]
    errors = {row[0]: int(row[-1].rstrip("%")) for row in rows if float(row[-2]) > 20}  # ms
    assert abs(errors.pop("a step")) <= 10 and abs(errors["product"]) <= 5
    assert len(errors) == 9 and all(abs(error) <= 20 for error in errors.values()), errors
