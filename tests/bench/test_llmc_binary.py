"""bench/llmc_binary.py: what llm.c is given and what it prints. Its CPU program is run where LLMC_DIR is a checkout."""

import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import llmc_binary
import numpy as np
import pytest
import step
import step_arms
import torch
from step_arms import Setup

from nanogpt_fast.distributed import World
from nanogpt_fast.errors import ConfigError, DeviceError

# by the formats of train_gpt2.cu's and train_gpt2.c's printf
CUDA = (
    "step {:4d}/8 | loss {:7.6f} ({}z)| norm {:6.4f} ({}z)| lr 3.00e-04 | {:.2f} ms | {:.1f}% bf16 MFU | {:.0f} tok/s\n"
)
CPU = "step {}: train loss {:f} (took {:f} ms)\n"


def printed(losses: list[float], ms: list[float]) -> str:
    lines = [CUDA.format(i + 1, x, "+nan", 1.5, "-0.12", t, 31.4, 1e5) for i, (x, t) in enumerate(zip(losses, ms))]
    return "| device | NVIDIA H100 |\nval loss 11.01\n" + "".join(lines) + "total average iteration time: 1.0 ms\n"


def setup_of(**changes: Any) -> Setup:
    sizes = {**step.TINY, "block_size": 64, "n_layer": 2, "batch_size": 4, "gradient_accumulation_steps": 1, **changes}
    config = step.configuration("gpt2_124m").replace(**sizes)
    weights = step_arms.initial_weights(config)
    for weight in weights.values():  # as after some training: the first loss must not be log V by itself
        if weight.dim() == 2:
            weight.mul_(8.0)
    return Setup(config, torch.float32, World(), weights)


def test_lines_of_the_cuda_program_are_read():
    steps = llmc_binary.parsed(printed([11.0, 10.5, math.nan], [900.0, 140.25, 141.0]))
    assert [(s.number, s.loss, s.grad_norm, s.ms) for s in steps[:2]] == [(1, 11.0, 1.5, 900.0), (2, 10.5, 1.5, 140.25)]
    assert len(steps) == 3 and math.isnan(steps[2].loss)
    assert llmc_binary.parsed("step    1/8 | loss 11.0") == []  # cut off


def test_lines_of_the_cpu_program_are_read():
    (only,) = llmc_binary.parsed("val loss 4.1\n" + CPU.format(0, 4.5, 12.345))
    assert (only.number, only.loss, only.grad_norm, only.ms) == (0, 4.5, None, 12.345)


def test_a_row_has_the_steps_after_the_first():
    setup = setup_of()
    row = llmc_binary.row_of(printed([5.0] * 6, [900.0, 500.0, 200.0, 100.0, 110.0, 120.0]), 5.01, setup)
    assert (row["status"], row["loss"], row["ms_s"], row["rounds"]) == ("ok", 5.0, 0.11, 3)
    assert row["q1"] == pytest.approx(0.105) and row["tokens_per_s"] == pytest.approx(4 * 64 / 0.11)
    assert "alone" not in row and "own process" in row["note"]


def test_a_run_that_failed_keeps_its_row():
    setup = setup_of()
    wrong = llmc_binary.row_of(printed([5.0] * 6, [1.0] * 6), 4.0, setup)
    assert wrong["status"] == "WRONG: loss 5; plain PyTorch has 4" and "ms_s" not in wrong
    failed = llmc_binary.row_of("header\n[CUDA ERROR] at file x.cu:1\nout of memory\n\n", 4.0, setup)
    assert failed["status"] == "failed: llm.c printed 0 steps; its last line: out of memory"
    assert "nan" in llmc_binary.row_of(printed([math.nan] * 6, [1.0] * 6), 4.0, setup)["status"]


def test_bad_input_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="no built train_gpt2cu"):
        llmc_binary.main(["--llmc", str(tmp_path)])
    (tmp_path / "train_gpt2cu").touch()
    with pytest.raises(ConfigError, match="too few steps"):
        llmc_binary.main(["--llmc", str(tmp_path), "--steps", "3"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="needs a CUDA GPU"):
        llmc_binary.main(["--llmc", str(tmp_path)])


def test_its_command_names_the_step(tmp_path: Path):
    inputs = llmc_binary.Inputs(tmp_path / "m.bin", tmp_path / "t.bin", 1.0)
    words = llmc_binary.command(tmp_path / "x", inputs, 64, 1024, 8, 20)
    pairs = dict(zip(words[1::2], words[2::2]))
    assert pairs["-b"] == "64" and pairs["-t"] == "1024" and pairs["-d"] == str(2**19) and pairs["-x"] == "20"
    assert pairs["-e"].endswith("m.bin") and pairs["-i"] == pairs["-j"] and pairs["-v"] != "0" and pairs["-s"] == "0"


@pytest.mark.skipif(
    "LLMC_DIR" not in os.environ or shutil.which("cc") is None,
    reason="LLMC_DIR names no checkout of karpathy/llm.c, or there is no C compiler",
)
@pytest.mark.parametrize("bias", [True, False])
def test_llmc_trains_from_our_loss(tmp_path: Path, bias: bool):
    """Its train_gpt2.c: B=4, T=64 and the files' names are fixed in it; it reads the model's sizes from the file."""
    setup = setup_of(bias=bias)
    inputs = llmc_binary.write_inputs(setup, 4, tmp_path, torch.float32)
    data = tmp_path / "dev/data/tinyshakespeare"
    data.mkdir(parents=True)
    shutil.copy(inputs.model, tmp_path / "gpt2_124M.bin")
    for split in ("train", "val"):
        shutil.copy(inputs.tokens, data / f"tiny_shakespeare_{split}.bin")
    header = np.zeros(256, "<u4")
    header[:4] = 20240328, 2, 96, 0  # it samples, so it wants a tokenizer: magic, version, words, end of text
    (tmp_path / "gpt2_tokenizer.bin").write_bytes(header.tobytes() + b"\x01a" * 96)
    source = Path(os.environ["LLMC_DIR"]).resolve()
    build = ["cc", "-O2", "-w", f"-I{source}", str(source / "train_gpt2.c"), "-o", "train", "-lm"]
    subprocess.run(build, cwd=tmp_path, check=True)
    text = subprocess.run(["./train"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    steps = llmc_binary.parsed(text)
    assert len(steps) == 41 and steps[0].loss == pytest.approx(inputs.loss, rel=1e-5)
    assert abs(inputs.loss - math.log(96)) > 0.01 and steps[-1].loss < steps[0].loss
    row = llmc_binary.row_of(text, inputs.loss, setup)
    assert row["status"] == "ok" and row["rounds"] == 38


def test_the_loss_it_must_start_at_is_of_the_tokens_that_occur(tmp_path: Path):
    """GPT-2's padded rows are no words of llm.c's softmax."""
    setup = setup_of(vocab_size=50304, n_layer=1, block_size=16)
    inputs = llmc_binary.write_inputs(setup, 2, tmp_path, torch.bfloat16)
    tokens = np.fromfile(inputs.tokens, "<u2")[512:]
    assert tokens.size == 2 * 16 + 1 and tokens.max() < 50257
    header = np.fromfile(inputs.model, "<i4", 8)
    assert header[:4].tolist() == [20240326, 5, 16, 50257] and header[7] == 50304
    louder = replace(setup, weights={name: weight.clone() for name, weight in setup.weights.items()})
    louder.weights["transformer.wte.weight"][50257:] *= 100.0
    assert llmc_binary.write_inputs(louder, 2, tmp_path, torch.bfloat16).loss == inputs.loss
