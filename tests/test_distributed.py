"""Joining: the device and the environment are checked before anything. What ranks do together: test_exchange.py."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanogpt_fast import distributed, pulse
from nanogpt_fast.distributed import World, join, resolve_device, resolve_dtype
from nanogpt_fast.errors import ConfigError, DeviceError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_a_gpu_is_made_the_current_one(name: str, index: int, monkeypatch: pytest.MonkeyPatch):
    """--device=auto and cuda name no index, which torch.cuda.set_device demands."""
    chosen: list[int] = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    distributed._use(torch.device(name), tf32=True)
    assert chosen == [index]


def test_collectives_of_one_process_are_the_identity():
    world, tensor = World(), torch.tensor([1.0, 2.0])
    world.all_reduce_(tensor)
    world.reduce_scatter(tensor, tensor)()
    world.all_gather(tensor, tensor)()
    world.broadcast_(tensor)
    assert tensor.tolist() == [1.0, 2.0] and world.any(True) and not world.any(False) and world.is_main
    assert world.main_says(True) and not world.main_says(False)
    world.close()


def test_a_rank_that_is_lost_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("[pair.cc:537] Read error [127.0.0.1]:16537: Connection reset by peer.")

    class Started:
        wait = broken

    monkeypatch.setattr(torch.distributed, "all_reduce", broken)
    monkeypatch.setattr(torch.distributed, "broadcast", broken)
    monkeypatch.setattr(torch.distributed, "all_gather_single", lambda *_, **__: Started(), raising=False)
    world = World(1, 2)
    gather = lambda t: world.all_gather(t, t)()
    for collective in (world.all_reduce_, world.broadcast_, lambda _: world.any(True), gather):
        with pytest.raises(DeviceError, match="another rank does not answer") as error:
            collective(torch.zeros(1))
        assert "rank 1 of 2" in error.value.where and "Connection reset" in error.value.found


def test_the_frames_in_which_a_rank_waits_are_there():
    """pulse.py knows them by their names."""
    for name in pulse.WAITS:
        file, _, function = name.partition(":")
        text = (ROOT / "nanogpt_fast" / file).read_text()
        assert not function or f"def {function}(" in text, name


# ---- joining ----


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone_any_accumulation_will_do(environment: pytest.MonkeyPatch):
    assert join("cpu", "nccl", 5) == World(0, 1, torch.device("cpu"))


def test_accumulation_must_divide_by_the_ranks(environment: pytest.MonkeyPatch):
    """Before any process group is made, so that every rank says it instead of waiting for the others."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        join("cpu", "nccl", 6)
    assert "gradient_accumulation_steps = 6, WORLD_SIZE = 4" in str(error.value)
    assert error.value.hint == "--gradient_accumulation_steps=8" and error.value.exit_code == 2


def test_a_ramps_start_must_divide_by_the_ranks_too(environment: pytest.MonkeyPatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match="batch_ramp = 6:ITERS, WORLD_SIZE = 4") as error:
        join("cpu", "nccl", 16, 6)
    assert error.value.hint == "--batch_ramp=8:ITERS"


def test_half_an_environment_is_an_error(environment: pytest.MonkeyPatch):
    environment.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="no LOCAL_RANK and no WORLD_SIZE"):
        join("cpu", "nccl", 1)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"RANK": "x"}, "RANK is no number"),
        ({"RANK": "-1"}, "RANK is no number"),
        ({"WORLD_SIZE": "0"}, "describes no rank"),
        ({"RANK": "1"}, "describes no rank"),
        ({}, "cannot meet"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "ten"}, "cannot meet"),
    ],
    ids=str,
)
def test_an_environment_of_no_rank(environment: pytest.MonkeyPatch, changes: dict[str, str], what: str):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        environment.delenv(name, raising=False)
    for name, value in ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | changes).items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match=what) as error:
        join("cpu", "nccl", 1)
    assert "torchrun" in error.value.hint


def test_more_ranks_than_gpus(environment: pytest.MonkeyPatch):
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}.items():
        environment.setenv(name, value)
    environment.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="'cuda:3'"):
        join("cuda", "nccl", 4)


# ---- devices and dtypes ----


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("cuda") == torch.device("cuda") and resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(DeviceError) as error:
        resolve_device("cuda:1")
    assert error.value.exit_code == 5 and error.value.found.startswith("1 GPUs") and "--device=cpu" in error.value.hint
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DeviceError):
        resolve_device("cuda")


@pytest.mark.parametrize(("name", "error"), [("gpu", ConfigError), ("cuda:x", ConfigError), ("meta", DeviceError)])
def test_devices_that_are_none(name: str, error: type[Exception]):
    with pytest.raises(error, match=f"--device={name}"):
        resolve_device(name)


@pytest.mark.parametrize("available", [True, False])
def test_auto_device(monkeypatch: pytest.MonkeyPatch, available: bool):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device("auto").type == ("cuda" if available else "cpu")


AUTO = [  # device, multiplies bfloat16 (None: nothing tells), comparable, dtype
    ("cuda", True, False, torch.bfloat16),
    ("cuda", True, True, torch.bfloat16),
    ("cuda", False, False, torch.float16),
    ("cpu", True, False, torch.bfloat16),
    ("cpu", True, True, torch.float32),
    ("cpu", False, False, torch.float32),
    ("cpu", None, False, torch.float32),
]


@pytest.mark.parametrize(("device", "native", "comparable", "dtype"), AUTO, ids=lambda v: str(v))
def test_auto_dtype(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: str,
    native: bool | None,
    comparable: bool,
    dtype: torch.dtype,
):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: native is True and not including_emulation
    )
    monkeypatch.setattr(distributed, "cpu_multiplies", lambda _: native)
    assert resolve_dtype("auto", torch.device(device), comparable=comparable) == dtype
    assert not caplog.records, "nobody asked for this dtype"


ASKED = [  # device, dtype asked for, the CPU multiplies it, warned
    ("cpu", "bfloat16", False, True),
    ("cpu", "float16", False, True),
    ("cpu", "bfloat16", True, False),
    ("cpu", "float16", None, False),
    ("cuda", "float16", False, False),
]


@pytest.mark.parametrize(("device", "name", "native", "warned"), ASKED, ids=str)
def test_a_dtype_that_the_cpu_emulates_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: str,
    name: str,
    native: bool | None,
    warned: bool,
):
    monkeypatch.setattr(distributed, "cpu_multiplies", lambda _: native)
    assert resolve_dtype(name, torch.device(device)) == getattr(torch, name)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == warned
    for line in lines:
        instructions = {"bfloat16": "neither AVX512_BF16 nor AMX_BF16", "float16": "neither AVX512_FP16 nor AMX_FP16"}
        assert instructions[name] in line and f"emulates {name}" in line and "--dtype=float32" in line


FAULTS = """
import resource
import torch
from nanogpt_fast.distributed import join

def step() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.zeros(2**20) for _ in range(16)]  # 64 MiB, freed at once
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

{join}
print(min([step() for _ in range(6)][2:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_on_the_cpu_freed_memory_is_kept_for_the_next_step():
    faults = {}
    for call in ("", "join('cpu', 'gloo', 1)"):
        run = subprocess.run(
            [sys.executable, "-c", FAULTS.format(join=call)],
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
            capture_output=True,
            text=True,
            check=True,
        )
        faults[bool(call)] = int(run.stdout)
    assert faults[True] < 100, faults
    if faults[False] < 100:
        pytest.skip(f"torch {torch.__version__} keeps freed memory here by itself")
