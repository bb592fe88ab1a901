"""--device=mps: what MPS lacks stays on the CPU, shown on a stand-in device. No Mac of ours has run it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mps_stand_in import MPSError, StandIn, has_mps_kernel
from nanogpt_kernels.reference import dropout_mask
from tiny_run import VOCAB, metrics, train, write_dataset

from nanogpt_fast import evaluate, examination, hardware, sample, trainer
from nanogpt_fast.distributed import join, resolve_device, resolve_dtype
from nanogpt_fast.errors import DeviceError
from nanogpt_fast.ops import select_ops
from nanogpt_fast.settings.examining import DoctorConfig
from nanogpt_fast.step import TrainStep


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in, with torch saying that MPS is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    monkeypatch.setitem(hardware.GEMM_SIZE, "mps", 64)
    monkeypatch.setitem(hardware.SETTLE_S, "mps", 0.0)
    with StandIn() as stand_in:
        yield stand_in


# ---- the stand-in refuses what MPS does ----


def on(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device="mps")


REFUSED: dict[str, Callable[[], Any]] = {
    "float64": lambda: torch.zeros(5, dtype=torch.float64, device="mps"),
    "to float64": lambda: on(5).double(),
    "sum in float64": lambda: on(5).sum(dtype=torch.float64),
    "uint16": lambda: torch.zeros(5, dtype=torch.uint16).to("mps"),
    "Philox": lambda: dropout_mask((4, 4), 0.5, on(1, dtype=torch.int64), 0),
    "shift": lambda: on(5, dtype=torch.int32) >> 3,
    "attention": lambda: F.scaled_dot_product_attention(on(1, 1, 4, 8), on(1, 1, 4, 8), on(1, 1, 4, 8)),
    "drawing": lambda: torch.multinomial(on(1, 5), 1),
    "two devices": lambda: on(5) + torch.ones(5),
    "a view of numbers": lambda: on(5) * torch.ones(5)[3],
    "numpy": lambda: on(5).numpy(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_stand_in_refuses(mps: StandIn, what: str):
    with pytest.raises(MPSError):
        REFUSED[what]()


def test_the_stand_in_computes(mps: StandIn):
    """Marks follow views, results, in-place writes and gradients; numbers and copies to the host are free of them."""
    x = torch.arange(6.0).to("mps").view(2, 3).requires_grad_()
    y = (x[1] * 2.0 + 1.0).sum()
    y.backward()
    assert x.grad is not None
    assert [t.device.type for t in (x, x[1], y, x.grad, torch.zeros_like(x), x.cpu())] == ["mps"] * 5 + ["cpu"]
    assert y.item() == 27.0 and x.grad.tolist() == [[0.0] * 3, [2.0] * 3]
    z = torch.zeros(3)
    z.copy_(x[0].detach())
    assert z.device.type == "cpu" and z.tolist() == [0.0, 1.0, 2.0]


def test_torchs_own_list_tells_what_has_a_kernel():
    """Its kernels, its composites; addmm with out_dtype, which CUDA takes, is not there."""
    assert all(map(has_mps_kernel, ("mul.Tensor", "index_add_", "_fused_adamw_", "layer_norm", "select.int")))
    assert not has_mps_kernel("addmm.dtype")


# ---- whole commands on it ----

RUNS = {
    "plain": {},
    "dropout": dict(dropout=0.1, bias=True),
    "clipped": dict(grad_clip=0.05, activation="gelu_tanh", gradient_accumulation_steps=2),
    "nanogpt": dict(data_order="nanogpt", eval_mode="full"),
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_run_is_the_cpus(mps: StandIn, tmp_path: Path, changes: dict[str, Any]):
    """Training and evaluation: the losses, gradient norms and validation losses of the CPU, to rounding."""
    figures = {}
    for device in ("cpu", "mps"):
        (tmp_path / device).mkdir()
        write_dataset(tmp_path / device)
        assert train(tmp_path / device, device=device, compile=True, **changes) == 0
        figures[device] = [
            metrics(tmp_path / device, *what)
            for what in (("train", "loss"), ("train", "grad_norm"), ("eval", "val_loss"))
        ]
    for mine, wanted in zip(figures["mps"], figures["cpu"], strict=True):
        assert len(wanted) >= 3 and mine == pytest.approx(wanted, rel=2e-4)
    assert mps.ops["_fused_adamw_"] and mps.ops["native_layer_norm_backward"], "trained somewhere else"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_precisions_train(mps: StandIn, tmp_path: Path, dtype: str):
    write_dataset(tmp_path)
    assert train(tmp_path, device="mps", dtype=dtype, dropout=0.1, max_iters=40) == 0
    losses = metrics(tmp_path, "train", "loss")
    assert losses[40] < losses[0] - 0.5


def test_resume_evaluate_and_sample(mps: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What was trained on the stand-in goes on there bit for bit; it is evaluated and sampled as on the CPU."""
    itos = [chr(ord("A") + i) for i in range(VOCAB)]
    meta = {"format": 1, "vocab_size": VOCAB, "tokenizer": {"kind": "char", "itos": itos}, "splits": {}}
    for folder in (tmp_path, tmp_path / "other"):
        write_dataset(folder)
        (folder / "data/toy/meta.json").write_text(json.dumps(meta))
    assert train(tmp_path, device="mps", max_iters=12, eval_interval=6, dropout=0.1) == 0
    for changes in (dict(max_iters=5), dict(max_iters=12, init_from="resume")):
        assert train(tmp_path / "other", device="mps", eval_interval=6, dropout=0.1, **changes) == 0
    assert metrics(tmp_path / "other", "train", "loss") == metrics(tmp_path, "train", "loss")

    model = [f"--init_from={tmp_path}/out", f"--data_dir={tmp_path}/data", "--dtype=float32"]
    lengths = ["--start=ABCDEF", "--num_samples=2", "--max_new_tokens=12"]  # past the block size of 8
    said: dict[str, list[str]] = {}
    for device in ("cpu", "mps"):
        capsys.readouterr()
        evaluate.main([*model, f"--device={device}", "--dataset=toy", "--json"])
        score = json.loads(capsys.readouterr().out.splitlines()[0])
        sample.main([*model, *lengths, f"--device={device}"])
        said[device] = [f"{score['loss']:.4f}", capsys.readouterr().out]
        assert score["device"] == device
    assert said["mps"] == said["cpu"]


def test_doctor_lists_and_tries_it(mps: StandIn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(examination, "SMOKE_STEPS", 15)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * 2**30)
    report = examination.examine(DoctorConfig())
    assert report["smoke"]["device"] == "mps, float32" and report["gpus"][-1]["name"] == "Apple MPS"
    assert report["gpus"][-1]["memory"].startswith("12.0 GiB")
    assert "measured 64^3 float32 product on mps" in report["gpus"][-1]["peak for MFU"]


def test_out_of_memory_is_said_as_on_cuda(mps: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """MPS raises a plain RuntimeError; any other one is not taken for it."""
    write_dataset(tmp_path)
    real = TrainStep.__call__
    monkeypatch.setattr(trainer, "free_memory", lambda _: None)
    for text, wanted in (("MPS backend out of memory (MPS allocated: 7 GiB)", DeviceError), ("else", RuntimeError)):

        def fail(step: TrainStep, *args: Any, text: str = text) -> Any:
            if step.device.type == "meta":  # a predicted one
                return real(step, *args)
            raise RuntimeError(text)

        monkeypatch.setattr(TrainStep, "__call__", fail)
        with pytest.raises(wanted) as error:
            train(tmp_path, device="mps")
        assert text in str(error.value) and isinstance(error.value, DeviceError) == (wanted is DeviceError)


# ---- choosing it ----


def test_auto_finds_it_in_float32(mps: StandIn):
    assert resolve_device("auto") == resolve_device("mps") == torch.device("mps")
    assert resolve_dtype("auto", torch.device("mps"), comparable=False) == torch.float32
    assert resolve_dtype("bfloat16", torch.device("mps"), comparable=False) == torch.bfloat16
    with pytest.raises(DeviceError, match="the Triton ops need a CUDA device"):
        select_ops("triton", "mps")


@pytest.mark.parametrize(("name", "there"), [("mps", False), ("mps:1", True)])
def test_where_it_is_absent(monkeypatch: pytest.MonkeyPatch, name: str, there: bool):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)
    with pytest.raises(DeviceError) as error:
        resolve_device(name)
    for part in (f"no device '{name}'", f"--device={name}", torch.__version__, "--device=cpu"):
        assert part in str(error.value)


def test_torchrun_is_refused(mps: StandIn, monkeypatch: pytest.MonkeyPatch):
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(DeviceError, match="one process"):
        join("auto", "nccl", 2)
