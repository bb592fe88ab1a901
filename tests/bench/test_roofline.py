"""The roofline's arithmetic against numbers worked out by hand, and the byte ledger."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from roofline import CHOICES, MODELS, compute_and_memory, step_work
from work import adamw_bytes, add_norm_bytes, norm_bytes

from nanogpt_fast.gpus import GPUS
from nanogpt_fast.hardware import flops_per_token
from nanogpt_fast.settings.config import GPTConfig

ROOT = Path(__file__).resolve().parents[2]
PEAK, BANDWIDTH, EXPS = 989e12, 3.35e12, 132 * 16 * 1.83e9  # an H100 SXM; 132 SMs at 1.83 GHz
L, C, T, V, F = 12, 768, 1024, 50304, 3072
TOKENS = 64 * T * 8


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    return subprocess.run([sys.executable, str(ROOT / script), *args], env=env, capture_output=True, text=True)


def works(**options: bool):
    return step_work(MODELS["124m"], 64, 8, **options)


def test_flops_are_those_of_the_model():
    """Products of weights: 6 a weight and token. Attention: of the causal half, 2 products forward and 5 backward."""
    step = works()
    attention = [w for op, w in step.items() if op in ("attention", "attention backward, 5 products")]
    weights = sum(w.flops for w in step.values()) - sum(w.flops for w in attention)
    assert weights == 6.0 * (12 * L * C * C + V * C) * TOKENS
    causal = 7 * 2.0 * C * (T / 2) * TOKENS * L
    assert sum(w.flops for w in attention) == pytest.approx(causal * (1 + 128 / T))
    llmc = flops_per_token(MODELS["124m"])["llmc"] * TOKENS  # counts all parameters, and 6 products of attention
    positions_and_norms = 6.0 * (T * C + 25 * C) * TOKENS
    assert weights + causal * 6 / 7 == pytest.approx(llmc - positions_and_norms)


def test_bytes_by_hand():
    step = works()
    c = 2 * C  # bytes a token of one [C] row
    assert step["attention"].bytes == 4 * c * TOKENS * L
    assert step["attention backward, 5 products"].bytes == 8 * c * TOKENS * L
    assert step["fc + GELU"].bytes == (9 * c * TOKENS + 2 * C * F * 8) * L
    assert step["fc, wgrad"].bytes == (5 * c * TOKENS + 8 * C * F * 8) * L
    assert step["cross-entropy in place"].bytes == 4 * V * TOKENS
    assert step["residual + LayerNorm"].bytes == (2 + 4 * 2 * L) * c * TOKENS
    assert step["residual + LayerNorm, backward"].bytes == (3 + 4 * 2 * L) * c * TOKENS
    assert step["gradient norm, AdamW, zeroing"].bytes == 38 * MODELS["124m"].num_params(non_embedding=False)
    assert (norm_bytes(1, C, backward=False), adamw_bytes(1)) == (2 * c, 30)
    assert add_norm_bytes(1, C, backward=True, dropout=True) == 5 * c


def test_attention_waits_for_exponentials():
    """At head size 64 they take as long as the forward's two products; whole tiles add an eighth."""
    compute, memory = compute_and_memory(works()["attention"], PEAK, BANDWIDTH, EXPS)
    products = 4 * 64 * (T * T / 2) * 1.125 * 12 * (TOKENS / T) * L / PEAK
    assert compute == pytest.approx(2 * products, rel=1e-3) and memory < compute


def test_tiles_compute_no_more_than_the_square():
    """A context shorter than a tile: all pairs, not one and a half times as many."""
    config = GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=128)
    assert step_work(config, 3, 1)["attention"].flops == 4 * 64 * (64 * 64) * 2 * 3 * 2


def test_the_deterministic_backward_costs_two_products_and_the_exponentials_again():
    ours, other = works()["attention backward, 5 products"], works(deterministic=True)["attention backward, 7 products"]
    assert other.flops == pytest.approx(ours.flops * 7 / 5) and other.exps == 2 * ours.exps
    assert other.bytes == ours.bytes


def test_fewer_tokens_at_once_move_more_weights():
    config = GPTConfig(n_layer=2, n_head=2, n_embd=128, bias=False)
    whole, split = step_work(config, 8, 1), step_work(config, 1, 8)
    assert sum(w.flops for w in whole.values()) == sum(w.flops for w in split.values())
    assert sum(w.bytes for w in whole.values()) < sum(w.bytes for w in split.values())


@pytest.mark.parametrize("name", CHOICES.values())
def test_its_gpus_are_in_the_table_with_all_that_a_roofline_takes(name: str):
    assert GPUS[name].flops_a_clock and GPUS[name].bfloat16


def test_the_table():
    shown = run("profiling/roofline.py").stdout
    total = float(re.findall(r"^total .* ([\d.]+)$", shown, re.MULTILINE)[0])
    rows = [re.split(r"\s{2,}", line.strip()) for line in shown.splitlines() if line.endswith(("products", "memory"))]
    assert len(rows) == len(works())
    assert sum(float(row[5]) for row in rows) == pytest.approx(total, abs=0.1)
    assert 500 < total < 570  # ms of a step of 2^19 tokens on an H100
    assert "NVIDIA H100 80GB HBM3: 989 TFLOP/s, 3.35 TB/s" in shown
    slower = run("profiling/roofline.py", "--tflops", "494.5").stdout
    assert "494 TFLOP/s (supposed)" in slower
    assert float(re.findall(r"^total .* ([\d.]+)$", slower, re.MULTILINE)[0]) > 1.5 * total


@pytest.mark.slow  # tests/ops/test_*_bytes.py hold the same of fewer rows
@pytest.mark.timeout(900)
def test_the_ledger_balances():
    """Every memory-bound kernel within its limit of the fewest bytes, at 4096 rows and 16 programs; about 30 s."""
    shown = run("profiling/roofline.py", "--ledger")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    ledger = shown.stdout.split("bytes of kernels")[1]
    assert "TOO MANY" not in ledger and "none over the limit" in ledger
    for op in ("norm", "norm, backward", "add_norm, p=0.1", "cross_entropy in place", "grad_norm", "adamw"):
        line = next(line for line in ledger.splitlines() if line.startswith(f"{op} "))
        assert float(line.split()[-2]) >= 1.0, "fewer bytes than there are"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts")
def test_the_ledger_sees_waste():
    import ledger

    g = torch.ones(8192)
    twice = ledger.count("grad_norm, twice", lambda: [ledger.grad_norm(g), ledger.grad_norm(g)], 4 * g.numel(), 1.02)
    once = ledger.count("grad_norm", lambda: ledger.grad_norm(g), 4 * g.numel(), 1.02)
    assert twice.ratio == 2 * once.ratio and twice.too_many and not once.too_many
