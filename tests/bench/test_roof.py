"""bench/roof.py and bench/environment.py: what is measured, in which order, what is left out and how it is read."""

import json
import sys
from pathlib import Path
from typing import Any

import environment
import machine
import ops
import pytest
import roof
import torch
from work import Work

from nanogpt_fast import timing
from nanogpt_fast.errors import ConfigError, DataError, DeviceError
from nanogpt_fast.settings.config import GPTConfig

CPU = torch.device("cpu")
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=16, vocab_size=11)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1 << 10)
    monkeypatch.setattr(roof, "COPY_LEAST", 1 << 16)
    monkeypatch.setitem(roof.GEMM_SIZE, "cpu", 16)
    monkeypatch.setitem(roof.SWEEP, "cpu", [(8, 16, 24)])
    monkeypatch.setitem(roof.ROUNDS, "cpu", 1)
    monkeypatch.setattr(timing, "CPU_SPAN_MS", 0.01)


def test_products_of_a_model_are_those_of_its_step():
    """Forward, and both gradients, against the matrix products that torch makes of a layer."""
    from torch.utils.flop_counter import FlopCounterMode

    found = roof.model_products(SMALL, batch_size=3)
    M = 3 * 16
    assert found["qkv forward"] == (M, 8, 24) and found["qkv dgrad"] == (M, 24, 8) and found["qkv wgrad"] == (24, M, 8)
    assert found["head forward"] == (M, 8, 11) and found["mlp proj forward"] == (M, 32, 8) and len(found) == 15
    for name in ("qkv", "fc", "head"):
        _, into, out = found[f"{name} forward"]
        x, w = torch.randn(M, into, requires_grad=True), torch.randn(out, into, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            (x @ w.t()).sum().backward()
        ours = sum(2 * a * b * c for which, (a, b, c) in found.items() if which.startswith(f"{name} "))
        assert counter.get_total_flops() == ours


@pytest.mark.parametrize("name", ["qkv forward", "qkv dgrad", "qkv wgrad", "16^3"])
def test_a_product_has_its_shape_and_the_layout_of_its_pass(name: str, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append((a, b, out)))
    item = roof.product_item(CPU, torch.float32, "model", name, (4, 6, 10))
    item.make()()
    ((a, b, out),) = seen
    assert (a.shape, b.shape, out.shape) == ((4, 6), (6, 10), (4, 10)) and item.amount == 2 * 4 * 6 * 10
    assert a.is_contiguous() == (not name.endswith("wgrad"))
    assert b.is_contiguous() == name.endswith(("dgrad", "wgrad"))
    assert a.std() > 0.5  # no zeros


def test_everything_is_measured_in_order_of_importance(small: None):
    todo = list(roof.items(CPU, [torch.float32], SMALL, 3))
    assert [item.facts.get("of", "copy") for item in todo] == ["copy", "square", *["model"] * 15, "sweep"]
    written: list[dict] = []
    rows = roof.measure(CPU, todo, 60.0, lambda **row: written.append(row))
    assert rows == written and {row["status"] for row in rows} == {"ok"}
    copy, square, qkv = rows[:3]
    assert copy["gbps"] == pytest.approx(2 * copy["bytes"] / copy["ms"] / 1e6) and copy["bytes"] == 1 << 16
    assert square["shape"] == [16, 16, 16] and square["tflops"] == pytest.approx(2 * 16**3 / square["ms"] / 1e9)
    assert qkv["name"] == "qkv forward" and qkv["dtype"] == "float32" and "sheet" not in qkv
    assert qkv["q1"] <= qkv["ms"] <= qkv["q3"]
    assert [item.name for item in roof.items(CPU, [torch.float32], None, 0)] == ["copy", "16^3", "8x16x24"]


def test_beside_the_data_sheet(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    gpu = torch.device("cuda")
    todo = {item.name: item for item in roof.items(gpu, [torch.bfloat16], SMALL, 3)}
    assert todo["copy"].sheet == 3350.0 and todo["copy"].facts == {"bytes": 2 << 30}
    assert todo["8192^3"].sheet == 989.0 and todo["2048x13312x2048"].facts["shape"] == [2048, 13312, 2048]
    assert {"4096x4096x4096", "16384x16384x16384"} <= todo.keys()
    monkeypatch.setattr(timing, "make_arm", lambda *_, **__: None)
    monkeypatch.setattr(timing, "interleaved", lambda *_: {"": [2.0, 2.0, 2.0]})
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    item = roof.Item("gemm", "x", {}, 989e9, 989.0, lambda: lambda: None)
    assert roof.measure_item(item, gpu, 3) == {
        "ms": 2.0, "q1": 2.0, "q3": 2.0, "tflops": 494.5, "sheet": 989.0, "of_sheet": 0.5
    }  # fmt: skip
    assert "n/a" in roof.shown([{"name": "a", "what": "copy", "bytes": 1, "status": "ok", "gbps": 1.0, "ms": 1.0,
                                 "q1": 1.0, "q3": 1.0}])  # fmt: skip


def test_what_the_time_does_not_allow_is_said(small: None, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(roof.time, "monotonic", lambda: now[0])

    def measured(item: roof.Item, *_: Any) -> dict[str, float]:
        now[0] += 1.0
        if item.name == "broken":
            raise RuntimeError("out of memory\nand more")
        return {"ms": item.amount, "q1": 1.0, "q3": 1.0, "tflops": 1.0}  # a thousand a second

    monkeypatch.setattr(roof, "measure_item", measured)
    make = lambda name, amount: roof.Item("gemm", name, {"dtype": "float32"}, amount, None, lambda: lambda: None)
    rows = roof.measure(
        CPU, [make("a", 500.0), make("long", 9e9), make("broken", 1.0), make("b", 1.0), make("c", 1.0)], 3.0
    )
    assert [row["status"].split(":")[0] for row in rows] == ["ok", "left out", "failed", "ok", "no time left"]
    assert rows[2]["status"] == "failed: out of memory"
    text = roof.shown(rows[1:3] + rows[4:])
    assert "left out: about" in text and "no time left: c float32" in text


# ---- reading ----


def row(**fields: Any) -> dict[str, Any]:
    return {"bench": "roof", "status": "ok", "device": "cuda", "gpu": "G", "dtype": "bfloat16", **fields}


ROWS = [
    row(gpu="old", what="copy", name="copy", gbps=1.0),
    row(what="copy", name="copy", gbps=2900.0),
    row(what="gemm", of="square", name="8192^3", tflops=600.0),
    row(what="gemm", of="square", name="8192^3", tflops=610.0),  # again
    row(what="gemm", of="model", name="qkv forward", tflops=590.0),
    row(what="gemm", of="sweep", name="2048x13312x2048", tflops=790.0),
    row(what="gemm", of="sweep", name="x", dtype="float16", tflops=999.0),
    row(what="gemm", of="sweep", name="y", status="no time left"),
]


def test_the_roof_is_read_back(tmp_path: Path):
    expected = roof.Roof(2900.0, 790.0, 610.0, {"qkv forward": 590.0}, "bfloat16")
    assert roof.read(ROWS) == expected
    (tmp_path / "roof.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS) + '{"cut')
    assert roof.read(tmp_path) == roof.read(tmp_path / "roof.jsonl") == expected
    assert roof.read(ROWS, "float16").best_tflops == 999.0 and roof.read(ROWS, "float16").copy_gbps == 2900.0
    with pytest.raises(ConfigError, match="no measured roof"):
        roof.read(tmp_path / "none")
    for empty in ([], ROWS[-1:], [{"bench": "ops", "status": "ok"}]):
        with pytest.raises(DataError, match="no figure"):
            roof.read(empty)


def test_a_floor_is_the_larger_of_the_limits():
    found = roof.Roof(copy_gbps=1000.0, best_tflops=100.0)
    assert found.floor_ms(Work(flops=1e11, bytes=2e9)) == (2.0, "bytes")
    assert found.floor_ms(Work(flops=4e11, bytes=2e9)) == (4.0, "flops")
    assert found.floor_ms(Work(flops=1e11, bytes=2e9), in_cache=True) == (1.0, "flops")
    assert found.floor_ms(Work(bytes=2e9), in_cache=True) is None
    assert roof.Roof(copy_gbps=1000.0).floor_ms(Work(flops=1.0, bytes=1.0)) is None


# ---- command lines ----


def test_the_command_writes_rows_and_a_table(small: None, tmp_path: Path, capsys: pytest.CaptureFixture):
    argv = ["--device", "cpu", "--dtype", "float32", "--vocab_size", "64", "--batch_size", "1", "--seconds", "20"]
    assert roof.main([*argv, "--out", str(tmp_path)]) == 0
    rows = machine.read_lines(tmp_path / "roof.jsonl")
    assert {row["bench"] for row in rows} == {"roof"} and rows[0]["device"] == "cpu" and rows[0]["threads"]
    model = [row for row in rows if row.get("of") == "model"]
    assert model[0]["config"] == "shakespeare_char_cpu" and model[0]["vocab_size"] == 64 and "config" not in rows[0]
    assert roof.read(tmp_path).model_tflops.keys() == roof.model_products(SMALL, 1).keys()
    assert "GFLOP/s" in capsys.readouterr().out


def test_bad_flags_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="roof.py --device cuda needs"):
        roof.main(["--device", "cuda"])
    with pytest.raises(ConfigError, match="--seconds must be above 0"):
        roof.main(["--device", "cpu", "--seconds", "-1"])
    with pytest.raises(ConfigError, match="did you mean"):
        roof.main(["--device", "cpu", "--config", "gpt2_124"])
    monkeypatch.setattr(roof, "cpu_multiplies", lambda dtype: dtype == torch.float32)
    with pytest.raises(ConfigError, match="does not multiply bfloat16"):
        roof.main(["--device", "cpu", "--dtype", "bfloat16"])
    assert roof.default_dtypes(CPU) == [torch.float32]
    monkeypatch.setattr(roof, "cpu_multiplies", lambda dtype: True)
    assert roof.default_dtypes(CPU) == [torch.float32, torch.bfloat16]


def test_the_environment_of_a_cpu(small: None, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert environment.main(["--device=cpu", "--config=none", "--seconds=20", "--out", str(tmp_path)]) == 0
    (line,) = machine.read_lines(tmp_path / "environment.jsonl")
    assert line["bench"] == "environment" and line["load"] is not None and line["cpu"] and line["status"] == "ok"
    assert line["versions"]["torch"] and line["memory_bytes"] > 1e8
    assert [row["name"] for row in machine.read_lines(tmp_path / "roof.jsonl")][0] == "copy"
    assert "16^3" in capsys.readouterr().out
    assert environment.main(["--dry_run"]) == 0


# ---- ops.py on a CPU ----


def test_ops_on_a_cpu(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Real times of something tiny, whose values nobody looks at: eager, torch's own, and why others are missing."""
    monkeypatch.setattr(ops, "ROOF_S", 20.0)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # not installed here, whatever is
    for imported in [name for name in sys.modules if name == "peers.liger" or name.startswith("liger_kernel.")]:
        monkeypatch.delitem(sys.modules, imported)
    argv = [
        "norm",
        "grad_norm",
        "--device=cpu",
        "--sizes",
        "tiny",
        "--rounds",
        "2",
        "--no_compile",
        "--out",
        str(tmp_path),
    ]
    assert ops.main([*argv, "--peers", "pytorch", "liger"]) == 0
    lines = [line for line in machine.read_lines(tmp_path / "ops.jsonl") if "contestant" in line]
    status = {(line["op"], line["contestant"]): line["status"] for line in lines}
    assert status["norm", "ours"] == "missing: Triton ops need a GPU" and status["norm", "eager"] == "ok"
    assert status["norm", "liger"].startswith("not installed") and status["grad_norm", "torch._foreach_norm"] == "ok"
    eager = [line for line in lines if line["contestant"] == "eager" and line["mode"] == "forward"]
    assert all(line["x_eager"] == 1.0 and "x_ours" not in line and line["timed"] == "cpu" for line in eager)
    assert eager[0]["device"] == "cpu" and eager[0]["dtype"] == "float32" and eager[0]["of_floor"] > 0
    assert "x eager" in capsys.readouterr().out
    before = len(machine.read_lines(tmp_path / "roof.jsonl"))
    assert ops.main([*argv, "--peers", "none"]) == 0 and len(machine.read_lines(tmp_path / "roof.jsonl")) == before


def test_ops_on_a_cpu_by_default_and_without_a_compiler(monkeypatch: pytest.MonkeyPatch):
    import lineup

    args = ops.parsed(["--device=cpu"])
    assert args.sizes == ["cpu", "cpu-124m"] and args.dtype == "float32"
    args = ops.parsed([])
    assert args.sizes == ["124m", "1558m"] and args.dtype == "bfloat16"
    monkeypatch.setattr(lineup, "cpp_compiler", lambda: None)
    at = ops.setting_of("norm", "tiny", ops.parsed(["--device=cpu"]), CPU)
    assert "C++ compiler" in lineup.contestants("norm", at, [], ours=False).absent["torch.compile"]
    with pytest.raises(ConfigError, match="--rounds"):
        ops.main(["--device=cpu", "--rounds", "0"])
    monkeypatch.setattr(ops, "cpu_multiplies", lambda dtype: False)
    with pytest.raises(ConfigError, match="does not multiply bfloat16"):
        ops.main(["--device=cpu", "--dtype=bfloat16"])


def test_a_difference_that_noise_ate_is_no_figure(monkeypatch: pytest.MonkeyPatch):
    at = ops.setting_of("norm", "tiny", ops.parsed(["--device=cpu"]), CPU)
    times = {("eager", "forward"): [2.0, 2.0], ("eager", "both"): [1.0, 3.0], ("eager", "backward"): [-1.0, 1.0]}
    monkeypatch.setattr(ops, "timed", lambda *_: (times, {"eager": "cpu"}, {}))
    monkeypatch.setattr(ops, "floor_of", lambda *_: None)
    found = {line["mode"]: line for line in ops.measured("norm", at, ops.Lineup(), {"eager": 0.0}, 2)}
    assert found["backward"]["status"].startswith("lost in noise") and "gbps" not in found["backward"]
    assert found["both"]["x_eager"] == 1.0


def test_inputs_in_the_cache_have_no_floor_of_bytes(monkeypatch: pytest.MonkeyPatch):
    found = roof.Roof(copy_gbps=1.0, best_tflops=1.0)
    at = ops.setting_of("norm", "tiny", ops.parsed(["--device=cpu"]), CPU)
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1 << 40)
    assert ops.floor_of(Work(bytes=1e6), "norm", at, found) is None
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1)
    assert ops.floor_of(Work(bytes=1e6), "norm", at, found) == (1.0, "bytes")
