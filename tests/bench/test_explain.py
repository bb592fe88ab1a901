"""profiling/explain.py: floors by hand, the advice that the dearest excess calls for, the chart, the rows."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import explain
import measured_roof
import pytest
import torch
from explain import explanation, find, floors, load
from measured_roof import Roof, copy_bandwidth, roof_of

from nanogpt_fast.errors import DataError
from nanogpt_fast.files import cpu_name
from nanogpt_fast.run import step_parts
from nanogpt_fast.run.step_parts import Summary

SHAPE = dict(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False, activation="gelu")
FACTS = dict(shape=SHAPE, batch_size=12, micro_steps=1, dtype="float32", residual_dtype="auto", kernels="auto",
             compile=False, ranks=1, device="cpu", device_name="a CPU")  # fmt: skip
ROOF = Roof(100e9, 10e9, "given")
PARTS = {"matrix products": 60.0, "attention": 20.0, "Python, autograd, dispatch": 10.0, "GELU": 8.0, "embedding": 2.0}


def summary(parts: dict[str, float] | None = None, device: str = "cpu", untraced: float | None = None, **facts: Any):
    parts = parts or PARTS
    return Summary(device=device, steps=4, wall_ms=sum(parts.values()), parts=parts, ranges=[], layers={}, top=[],
                   gaps={}, streams={}, untraced_ms=untraced, facts=FACTS | facts)  # fmt: skip


def advice(parts: dict[str, float], device: str = "cpu", untraced: float | None = None, **facts: Any) -> str:
    return explanation(summary(parts, device, untraced, **facts), ROOF).advice


def test_floors_by_hand():
    """768 rows; products 2 M K N three times: at 100 GFLOP/s they bind, LayerNorm's bytes at 10 GB/s."""
    M, C, V = 768, 128, 65
    weights = 4 * 12 * C * C + V * C
    found = floors(summary(), ROOF)
    assert found["matrix products"] == pytest.approx(6 * M * weights / 100e9 * 1e3)
    residual_norm = (2 + 3 + 2 * 4 * (4 + 4)) * 4 * M * C  # the first norm's 2 and 3, 8 add_norms of 4 each way
    assert found["LayerNorm and residual"] == pytest.approx(residual_norm / 10e9 * 1e3)
    assert found["GELU"] == found["casts and copies"] == 0.0
    half = floors(summary(dtype="bfloat16"), ROOF)
    for part in ("embedding", "cross-entropy", "LayerNorm and residual"):
        assert half[part] == pytest.approx(found[part] / 2), part
    assert floors(summary(micro_steps=3), ROOF)["embedding"] == pytest.approx(3 * found["embedding"])


def test_shares_add_up_and_ratios_are_of_the_floor():
    explained = explanation(summary(), ROOF)
    assert sum(p.share for p in explained.parts) == pytest.approx(1.0)
    assert [p.ms for p in explained.parts] == sorted(PARTS.values(), reverse=True)
    products = explained.parts[0]
    assert products.floor_ms and products.of_floor
    assert products.of_floor == pytest.approx(products.floor_ms / 60.0)
    assert "matrix products (60%)" in explained.text and f"{1 / products.of_floor:.2f}" in explained.text
    assert "4 layers of 128, 12 x 64 tokens" in explained.text and "a CPU in float32" in explained.text


def test_rows_are_those_of_benchs_results():
    rows = explanation(summary(), ROOF, config="shakespeare_char_cpu").rows()
    assert [row["part"] for row in rows] == [*PARTS, "step"]
    assert all(row["bench"] == "profile" and row["config"] == "shakespeare_char_cpu" for row in rows)
    assert rows[-1]["ms"] == 100.0 and rows[-1]["text"] and rows[-1]["advice"]
    assert set(rows[0]) >= {"ms", "share", "floor_ms", "of_floor"} and json.dumps(rows)


def test_without_a_roof_there_are_parts_but_no_floors():
    unknown = Roof(None, None, "unknown")
    rows = explanation(summary(), unknown).rows()
    assert all("floor_ms" not in row and "of_floor" not in row for row in rows) and rows[-1]["advice"]
    bare = dataclasses.replace(summary(), facts={})
    assert explanation(bare, ROOF).text.startswith("A step of a run took")


WITH = PARTS | {"data wait": 8.0}  # products are further above their floor


@pytest.mark.parametrize(
    ("parts", "device", "facts", "told"),
    [
        (WITH, "cpu", {}, "feed the device"),
        ({"launch gaps": 50.0, "matrix products": 30.0}, "cuda", {}, "--compile=True"),
        ({"launch gaps": 50.0, "matrix products": 30.0}, "cuda", dict(kernels="triton", micro_steps=4), "half the"),
        ({"matrix products": 80.0, "GELU": 1.0}, "cuda", {}, "--dtype=bfloat16"),
        ({"matrix products": 80.0, "GELU": 1.0}, "cuda", dict(dtype="bfloat16"), "pad vocab_size = 65"),
        ({"attention": 80.0}, "cuda", dict(dtype="bfloat16"), "--kernels=triton"),
        ({"attention": 80.0}, "cuda", dict(shape=SHAPE | {"dropout": 0.1}), "--dropout=0.0"),
        ({"LayerNorm and residual": 80.0}, "cuda", dict(kernels="triton"), "bench/tune.py"),
        ({"LayerNorm and residual": 80.0}, "cpu", {}, "torch's own CPU operators"),
        ({"Python, autograd, dispatch": 80.0, "GELU": 9.0}, "cpu", {}, "--batch_size=24"),
        ({"casts and copies": 80.0}, "cpu", dict(dtype="bfloat16"), "--dtype=float32"),
        ({"communication": 80.0}, "cuda", dict(ranks=8), "all-reduce less often"),
        ({"AdamW, norm, zeroing": 80.0}, "cuda", {}, "--gradient_accumulation_steps"),
        ({"evaluation": 80.0, "GELU": 1.0}, "cpu", {}, "trace other iterations"),
        ({"matrix products": 3.7}, "cpu", {}, "nothing in this program"),
    ],
)
def test_the_first_thing_to_do(parts: dict[str, float], device: str, facts: dict[str, Any], told: str):
    assert told in advice(parts, device, **facts)


def test_every_part_has_its_rule():
    for part in step_parts.PARTS:
        for device in ("cpu", "cuda"):
            assert len(advice({part: 1000.0}, device)) > 40, part


def test_what_the_profiler_takes_is_no_excess_of_dispatch():
    parts = {"Python, autograd, dispatch": 60.0, "attention": 40.0}
    assert "dispatcher" in advice(parts)
    assert "dispatcher" not in advice(parts, untraced=55.0)


def test_a_listed_gpu_has_its_data_sheets_roof():
    found = roof_of(FACTS | {"device": "cuda:0", "device_name": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16"})
    assert (found.flops, found.bandwidth, found.measured) == (989e12, 3350e9, False)
    assert found.exp_rate == pytest.approx(16 * 132 * 1.83e9, rel=0.01)


def test_a_cpus_roof_is_measured_here_and_only_here(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measured_roof, "COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(measured_roof, "measure_gemm", lambda device, dtype: 5e9)
    here = roof_of(FACTS | {"device_name": cpu_name()})
    assert here.flops == 5e9 and here.bandwidth and here.measured and "5 GFLOP/s" in here.source
    other = roof_of(FACTS | {"device_name": "another"})
    assert other.flops is None and "not this machine" in other.source
    assert 1e7 < copy_bandwidth(torch.device("cpu")) < 1e13


def test_bars_mark_the_floor():
    lines = explain.bars(explanation(summary(), ROOF)).splitlines()
    assert lines[0].startswith("matrix products") and "60 ms  60.0%" in lines[0] and "|" in lines[0]
    assert lines[0].count("#") > lines[1].count("#") and "floor 0" in next(line for line in lines if "GELU" in line)


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary(**changes).as_json()))
    return folder / "summary.json"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    write(tmp_path / "out/profile")
    explain.main([str(tmp_path / "out"), "--tflops=0.1", "--gbps=10"])
    shown = capsys.readouterr().out
    assert "matrix products" in shown and "first: " in shown and "profile.png" in shown
    picture = (tmp_path / "out/profile/profile.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 10_000


def test_without_matplotlib_the_bars_are_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    explain.main([str(write(tmp_path)), "--tflops=0.1", "--gbps=10"])
    shown = capsys.readouterr().out
    assert "####" in shown and "pip install" in shown and not list(tmp_path.glob("*.png"))


def test_what_is_no_summary_is_said(tmp_path: Path):
    with pytest.raises(DataError, match="--profile=10:15"):
        find(tmp_path / "nothing")
    with pytest.raises(DataError, match="an empty folder"):
        find(tmp_path)
    path = write(tmp_path)
    assert load(path) == summary() and find(tmp_path) == [path]
    for text in ("", '{"format": 1', "[]", '{"parts": {}}'):
        path.write_text(text)
        with pytest.raises(DataError, match="no summary of traced steps"):
            load(path)
