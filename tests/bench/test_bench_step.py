"""bench/step.py: arms, what becomes of one that fails, the table of kernels. No time is asserted anywhere."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernel_table
import machine
import pytest
import step
import step_arms
import step_timing
import torch
from nanogpt_kernels import launch
from torch.profiler import ProfilerActivity

from nanogpt_fast.distributed import World

STEP = ["--device=cpu", "--tiny", "--dtype=float32", "--batch_size=2", "--accumulation=2", "--warmup=0", "--steps=2"]


def test_step_writes_each_arm_and_then_compares(tmp_path: Path, capsys: pytest.CaptureFixture):
    arms = ["reference", "odd", "reference+x=true", "nanogpt", "reference+compile"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NANOGPT_DIR", raising=False)
        patch.setattr(torch.nn.Module, "compile", lambda model: None)
        assert step.main([*STEP, "--rounds=3", "--profile", "--arms", *arms, "--out", str(tmp_path)]) == 0
    rows = machine.read_lines(tmp_path / "step.jsonl")
    assert [(row["arm"], row["how"]) for row in rows] == [
        *((arm, "alone") for arm in arms), ("reference", "in turn"), ("reference+compile", "in turn")
    ]  # fmt: skip
    ours, odd, switch, stock, _, again, _ = rows
    assert ours["status"] == "ok" and ours["tokens"] == 64 and ours["tokens_per_s"] > 0 and again["x_first"] == 1.0
    assert (ours["batch_size"], ours["accumulation"], ours["config"]) == (2, 2, "gpt2_124m")
    assert odd["status"].startswith("failed: ConfigError") and "tokens_per_s" not in odd
    assert "unknown word of an arm 'x'" in switch["status"]
    assert stock["status"].startswith("missing: stock nanoGPT") and "--nanogpt DIR" in stock["status"]
    kernels = machine.read_lines(tmp_path / "kernels.jsonl")
    assert {"aten::mm", "aten::addmm"} & {row["kernel"] for row in kernels}
    assert kernels == sorted(kernels, key=lambda row: -row["ms"]) and kernels[0]["calls"] > 0
    assert sum(row["share"] for row in kernels) == pytest.approx(1.0)


def test_step_out_of_memory_takes_half_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stock = step_arms.make_arm

    def small_machine(name: str, setup: Any) -> step_arms.Arm:
        arm, most = stock(name, setup), {"reference": 2, "reference+compile": 0}[name]

        def run(batch: torch.Tensor, iteration: int) -> Any:
            if batch.size(1) > most and iteration > 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return arm(batch, iteration)

        return run

    expected = step_timing.first_step
    monkeypatch.setattr(step_timing, "first_step", lambda arm, setup: expected(stock("reference", setup), setup))
    monkeypatch.setattr(step_arms, "make_arm", small_machine)
    argv = [*STEP, "--batch_size=8", "--warmup=1", "--arms", "reference", "reference+compile", "--out", str(tmp_path)]
    assert step.main(argv) == 0
    fits, does_not = machine.read_lines(tmp_path / "step.jsonl")
    assert (fits["batch_size"], fits["accumulation"], fits["tokens"]) == (2, 8, 2 * 8 * 16)
    assert fits["note"] == "out of memory at B=4"
    assert "out of memory at B=8, 4, 2" in does_not["status"]


def test_step_takes_out_an_arm_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stock = step_arms.select_ops

    def wrong(spec: str, device: str) -> Any:
        ops = stock("reference", device)
        return dataclasses.replace(ops, grad_norm=lambda g: ops.grad_norm(g) * 1.1) if spec == "triton" else ops

    monkeypatch.setattr(step_arms, "select_ops", wrong)
    assert step.main([*STEP, "--arms", "triton", "--out", str(tmp_path)]) == 1
    (row,) = machine.read_lines(tmp_path / "step.jsonl")
    assert row["status"].startswith("WRONG: loss") and "tokens_per_s" not in row


def test_step_of_stock_nanogpt(tmp_path: Path):
    """A model.py of nanoGPT's interface and parameter names, in which the twin computes."""
    (tmp_path / "model.py").write_text(STOCK_MODEL)
    argv = [*STEP, "--arms", "nanogpt", "--nanogpt", str(tmp_path), "--out", str(tmp_path)]
    assert step.main(argv) == 0  # the same loss and gradient norm as the plain PyTorch ops
    (row,) = machine.read_lines(tmp_path / "step.jsonl")
    assert row["status"] == "ok" and row["arm"] == "nanogpt"
    (tmp_path / "model.py").write_text(STOCK_MODEL.replace('PREFIX = "transformer."', 'PREFIX = "other."'))
    assert step.main(argv) == 1
    assert "not the nanoGPT we know" in machine.read_lines(tmp_path / "step.jsonl")[-1]["status"]


STOCK_MODEL = """
from dataclasses import dataclass
import torch
from twin import Twin

PREFIX = "transformer."

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.twin = Twin(config)

    def load_state_dict(self, weights, strict):
        mine = {name.replace("transformer.", PREFIX): p for name, p in self.twin.named().items()}
        with torch.no_grad():
            for name in mine.keys() & weights.keys():
                mine[name].copy_(weights[name])
        return ["lm_head.weight", *(mine.keys() - weights.keys())], list(weights.keys() - mine.keys())

    def forward(self, idx, targets):
        return None, self.twin(idx, targets)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.twin.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""


def test_the_launches_of_a_step_are_found_without_a_gpu():
    config = step.configuration("gpt2_124m", n_layer=1, batch_size=4)
    ops = {call.op for call in step_arms.recorded("triton", config, torch.bfloat16, 90)}
    atomic = {call.op for call in step_arms.recorded("triton+atomic=true", config, torch.bfloat16, 90)}
    assert "attention_bwd_dq" in ops - atomic and "attention_bwd_atomic" in atomic - ops and "adamw" in ops & atomic


def test_the_table_of_kernels_counts_what_the_gpu_did(monkeypatch: pytest.MonkeyPatch):
    """On a GPU its kernels, not the operators that launched them nor the profiler's own ranges."""
    event = lambda key, on, us, user=False: SimpleNamespace(
        key=key, count=2, device_type=getattr(torch.autograd.DeviceType, on), is_user_annotation=user,
        self_device_time_total=us, self_cpu_time_total=7.0,
    )  # fmt: skip
    events = [event("aten::mm", "CPU", 500.0), event("_k", "CUDA", 1000.0), event("gemm", "CUDA", 3000.0),
              event("ProfilerStep#1", "CUDA", 9000.0, user=True)]  # fmt: skip

    class Profile:
        def __init__(self, activities: list):
            assert ProfilerActivity.CUDA in activities

        def __enter__(self) -> Any:
            return SimpleNamespace(key_averages=lambda: events)

        def __exit__(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(kernel_table, "profile", Profile)
    assert kernel_table.kernels(lambda: None, torch.device("cuda")) == [
        {"kernel": "gemm", "calls": 2, "ms": 3.0, "share": 0.75}, {"kernel": "_k", "calls": 2, "ms": 1.0, "share": 0.25}
    ]  # fmt: skip


def test_a_profiler_that_fails_costs_its_table_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(**_: Any) -> Any:
        raise RuntimeError("CUPTI is not there")

    monkeypatch.setattr(kernel_table, "profile", broken)
    assert step.main([*STEP, "--profile", "--arms", "reference", "--out", str(tmp_path)]) == 0
    assert [row["status"] for row in machine.read_lines(tmp_path / "step.jsonl")] == ["ok"]
    assert "CUPTI" in machine.read_lines(tmp_path / "kernels.jsonl")[0]["status"]


def test_our_kernels_are_known_by_the_rows_that_launch_them():
    config = step.configuration("gpt2_124m", n_layer=1, batch_size=4)
    setup = step_arms.Setup(config, torch.bfloat16, World(), {})
    known = kernel_table.launch_ops("triton+atomic=true", setup)
    assert "attention_bwd_atomic" in known.values() and known["_adamw_kernel"] == "adamw"
    assert set(known.values()) <= launch.TABLE.keys() and len(known) > 10
    assert kernel_table.launch_ops("reference+compile", setup) == {}
