"""FLOPs, peaks, MFU's denominator and the memory estimate, against published and counted figures."""

import dataclasses
from pathlib import Path

import pytest
import torch

from nanogpt_fast import hardware
from nanogpt_fast.gpus import GPUS
from nanogpt_fast.hardware import (
    Peak,
    cpu_multiplies,
    flops_per_token,
    peak_flops,
    resolve_peak,
    training_peak,
)
from nanogpt_fast.settings.config import GPTConfig

GPT2_124M = GPTConfig(bias=False)


def test_nanogpts_count_of_the_124m_model():
    """0.8548 GFLOP a token, as nanoGPT's estimate_mfu: 6 x 123,587,328 + 12 x 12 x 12 x 64 x 1024."""
    flops = flops_per_token(GPT2_124M)["nanogpt"]
    assert flops == 6 * 123_587_328 + 12 * 12 * 12 * 64 * 1024 == 854_770_176
    assert flops / 1e9 == pytest.approx(0.8548, abs=5e-5)


def test_llmcs_count_of_the_124m_model():
    """All 124,475,904 parameters of its padded vocabulary with biases, and causal attention."""
    flops = flops_per_token(GPTConfig(vocab_size=50304, bias=True))["llmc"]
    assert flops == 6 * 124_475_904 + 6 * 12 * 768 * 1024


@pytest.mark.parametrize("kind", ["nanogpt", "llmc"])
def test_a_token_embedding_beside_a_head_of_its_own_multiplies_nothing(kind: str):
    untied = dataclasses.replace(GPT2_124M, tie_word_embeddings=False)
    assert untied.num_params() - GPT2_124M.num_params() == 50304 * 768
    assert flops_per_token(untied)[kind] == flops_per_token(GPT2_124M)[kind]


@pytest.mark.parametrize("T", [128, 1024, 4096])
def test_attention_grows_with_the_block(T: int):
    """The counts differ by half the attention and by the positions, at any length."""
    config = dataclasses.replace(GPT2_124M, block_size=T)
    flops = flops_per_token(config)
    assert flops["nanogpt"] - flops["llmc"] == 6 * 12 * 768 * T - 6 * 768 * T


def test_peaks_match_exact_names_only():
    flops, source = peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") or (0.0, "")
    assert flops == 989e12 and "NVIDIA H100 80GB HBM3" in source
    for name in ("NVIDIA H100", "nvidia h100 80gb hbm3", "NVIDIA H100 80GB HBM3e", "", "NVIDIA H100 PCIe "):
        assert peak_flops(name, "bfloat16") is None, name


def test_float32_has_no_peak_in_the_table():
    """The table is of 16-bit tensor cores: float32 divided by it would flatter by an order of magnitude."""
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
    known = 989e12, "989 TFLOP/s dense float16 of NVIDIA H100 80GB HBM3 (H100 data sheet)"
    assert peak_flops("NVIDIA H100 80GB HBM3", "float16") == known


@pytest.mark.parametrize("name", ["Tesla V100-SXM2-16GB", "Tesla T4"])
def test_chips_without_bfloat16_have_no_peak_for_it(name: str):
    assert peak_flops(name, "bfloat16") is None
    assert (peak_flops(name, "float16") or (0.0, ""))[0] == GPUS[name].tflops * 1e12


@pytest.mark.parametrize("name", GPUS)
def test_peaks_are_dense_with_float32_accumulation(name: str):
    """SMs x FLOPs a clock of each is the peak at some clock: a sparse rate, or float16 accumulation's on a GeForce,
    would take twice the clock, more than any of these chips has; so would a figure of another form factor's SMs."""
    gpu = GPUS[name]
    assert gpu.source and gpu.gbps >= 300 and 16 <= gpu.gib <= 192 and name.startswith(("NVIDIA ", "Tesla ", "AMD "))
    if gpu.flops_a_clock is not None:
        assert 1.3 < gpu.tflops * 1e3 / (gpu.sms * gpu.flops_a_clock) < 2.65
    assert gpu.bfloat16 == (gpu.capability not in (70, 75))


def test_form_factors_of_one_chip_differ():
    sxm, pcie, nvl = (GPUS[f"NVIDIA H100 {form}"].tflops for form in ("80GB HBM3", "PCIe", "NVL"))
    assert pcie < nvl < sxm
    assert GPUS["NVIDIA A100-SXM4-80GB"].tflops == 312.0, "nanoGPT's constant"


CPUS = [  # flags of /proc/cpuinfo, multiplies bfloat16, float16
    ("fpu sse2 avx avx2", False, False),
    ("fpu sse2 avx2 avx512f avx512_bf16", True, False),
    ("fpu sse2 avx512f amx_bf16 avx512_fp16", True, True),
    ("fp asimd bf16", None, None),  # not x86
    (None, None, None),  # not Linux
]


@pytest.mark.parametrize(("flags", "bfloat16", "float16"), CPUS, ids=str)
def test_what_a_cpu_multiplies(
    monkeypatch: pytest.MonkeyPatch, flags: str | None, bfloat16: bool | None, float16: bool | None
):
    def read_text(_: Path) -> str:
        if flags is None:
            raise FileNotFoundError("/proc/cpuinfo")
        return f"model name : a CPU\nflags : {flags}\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    found = [cpu_multiplies(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert found == [True, bfloat16, float16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    monkeypatch.setitem(hardware.GEMM_SIZE, "cpu", 64)
    monkeypatch.setattr(hardware, "cpu_multiplies", lambda _: True)
    peak, source = resolve_peak(torch.device("cpu"), dtype)
    assert peak is not None and peak > 0 and "measured 64^3" in source and str(dtype).split(".")[1] in source
    growing = training_peak(torch.device("cpu"), dtype)
    assert growing.flops is None and "64^3" in growing.source and str(dtype).split(".")[1] in growing.source
    assert growing.refine() > 0.0 and growing.flops


@pytest.mark.parametrize("native", [False, None])
def test_a_dtype_that_the_cpu_emulates_is_not_measured(monkeypatch: pytest.MonkeyPatch, native: bool | None):
    monkeypatch.setattr(hardware, "gemm", lambda *_: pytest.fail("takes seconds"))
    monkeypatch.setattr(hardware, "cpu_multiplies", lambda _: native)
    for dtype in (torch.bfloat16, torch.float16):
        flops, source = resolve_peak(torch.device("cpu"), dtype)
        assert flops is None and "n/a" in source and str(dtype).split(".")[1] in source
        peak = training_peak(torch.device("cpu"), dtype)
        assert peak.refine() == 0.0 and peak.mfu(1.0) is None


class Machine:
    """A clock and a product on it: each product takes 0.1 s and has the next of the given rates."""

    def __init__(self, *rates: float):
        self.now, self.rates = 100.0, list(rates)

    def clock(self) -> float:
        return self.now

    def product(self) -> float:
        self.now += 0.1
        return self.rates.pop(0)


def test_a_cpus_peak_is_the_best_product_of_the_first_seconds():
    rates = [30.0, 110.0, *[90.0] * 7, 120.0]
    machine = Machine(*rates, *[500.0] * 5)
    peak = Peak(None, "a product", machine.product, machine.clock)
    assert peak.mfu(10.0) is None, "nothing measured yet"
    assert peak.refine() == pytest.approx(0.1) and peak.mfu(15.0) == pytest.approx(0.5)
    assert peak.refine() == 0.0, "the next is not due"
    seen = []
    for _ in range(40):
        machine.now += 0.25
        if peak.refine():
            seen.append((machine.now - 100.0, peak.flops))
    assert [flops for _, flops in seen] == [110.0] * 8 + [120.0]
    assert Peak.SPAN_S <= seen[-1][0] < Peak.SPAN_S + 1.0 and machine.rates == [500.0] * 5
    assert peak.mfu(120.0) == 1.0


def test_mfu_is_never_above_one(caplog: pytest.LogCaptureFixture):
    """While products still mend the peak, too high a share waits for the next; after that the peak is given up."""
    machine = Machine(10.0, 40.0)
    peak = Peak(None, "the best product", machine.product, machine.clock)
    peak.refine()
    assert peak.mfu(20.0) is None and not caplog.records
    machine.now += Peak.SPAN_S
    peak.refine()
    assert peak.mfu(20.0) == 0.5
    assert [peak.mfu(rate) for rate in (60.0, 20.0, 60.0)] == [None] * 3
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "MFU is n/a from here: it would be 150% of the best product"


@pytest.mark.parametrize(
    "gpu, dtype, why",
    [
        ("NVIDIA B900", torch.bfloat16, "it is not in gpus.py"),
        ("NVIDIA L40S", torch.float32, "its row in gpus.py has no float32 peak"),
        ("Tesla T4", torch.bfloat16, "its row in gpus.py has no bfloat16 peak"),
    ],
)
def test_where_the_data_sheet_says_nothing_the_gpu_is_measured(
    gpu: str, dtype: torch.dtype, why: str, monkeypatch: pytest.MonkeyPatch
):
    measured: list[tuple[str, torch.dtype]] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu)
    monkeypatch.setattr(hardware, "measure_gemm", lambda at, of: measured.append((at.type, of)) or 123.44e12)
    peak, source = resolve_peak(torch.device("cuda"), dtype)
    name = str(dtype).removeprefix("torch.")
    assert peak == 123.44e12 and measured == [("cuda", dtype)]
    assert source == f"123.4 TFLOP/s, measured 8192^3 {name} product on {gpu} ({why}): MFU against it"


def test_a_product_by_tf32_is_named_so(monkeypatch: pytest.MonkeyPatch):
    """distributed.join sets a GPU's float32 products so, as nanoGPT does."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA B900")
    monkeypatch.setattr(hardware, "measure_gemm", lambda *_: 1e14)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert "8192^3 float32 product by TF32 on NVIDIA B900" in resolve_peak(torch.device("cuda"), torch.float32)[1]
        assert "TF32" not in resolve_peak(torch.device("cuda"), torch.bfloat16)[1]
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_listed_gpu_is_not_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L40S")
    monkeypatch.setattr(hardware, "measure_gemm", lambda *_: pytest.fail("takes half a second"))
    assert resolve_peak(torch.device("cuda"), torch.bfloat16)[0] == 362e12


def test_a_full_gpu_has_no_peak(monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA B900")
    monkeypatch.setattr(hardware, "measure_gemm", full)
    peak, source = resolve_peak(torch.device("cuda"), torch.bfloat16)
    assert peak is None and "NVIDIA B900" in source and "n/a" in source


def test_the_best_of_many_products_is_taken(monkeypatch: pytest.MonkeyPatch):
    """By a clock that says how long each took; the settling time asks for more than five."""
    spans = iter([9.0, 5.0, 4.0, 4.0, 4.0, 2.0, 3.0])
    now, products = [0.0], []

    def product(a: torch.Tensor, b: torch.Tensor) -> None:
        products.append(a.shape)
        now[0] += next(spans)

    monkeypatch.setattr(hardware.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setitem(hardware.GEMM_SIZE, "cpu", 8)
    monkeypatch.setitem(hardware.SETTLE_S, "cpu", 27.0)
    assert hardware.measure_gemm(torch.device("cpu"), torch.float32) == 2 * 8**3 / 2.0
    assert products == [(8, 8)] * 6
