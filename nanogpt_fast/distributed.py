"""Ranks: torchrun's environment, and the few collectives the trainer needs; alone, each is the identity."""

import ctypes
import logging
import os
import platform
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt_fast.errors import ConfigError, DeviceError
from nanogpt_fast.hardware import CPU_INSTRUCTIONS, cpu_multiplies

log = logging.getLogger(__name__)
# Measured on an AVX2 core, quickstart: 65 to 94 ms an iteration in float32, 828 to 943 in bfloat16, float16 as slow.
SLOW_DTYPE = "this CPU has neither {missing} and emulates {name}, about ten times as slow as float32: --dtype=float32"

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """The rank that evaluates, logs and saves."""
        return self.rank == 0

    def all_reduce_(self, tensor: Tensor) -> None:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def broadcast_(self, tensor: Tensor) -> None:
        """Rank 0's values to all, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def any(self, flag: bool) -> bool:
        """True on every rank when it is True on one."""
        if self.size == 1:
            return flag
        votes = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(votes)
        return bool(votes.item())

    def close(self) -> None:
        if dist.is_available() and dist.is_initialized():  # also for torchrun with one rank
            dist.destroy_process_group()


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`, ... -> a device that exists; DeviceError otherwise."""
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name == "auto":
        return torch.device("cuda")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"unknown device {name!r}", where=f"--device={name}", expected="auto, cpu, cuda, cuda:N, mps"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"there is no device {name!r}",
            where=f"--device={name}",
            expected="a CUDA GPU that torch sees",
            found=f"{torch.cuda.device_count()} GPUs, torch {torch.__version__}",
            hint="--device=cpu, or `python -m nanogpt_fast.doctor`",
        )
    if device.type == "mps" and not (torch.backends.mps.is_available() and not device.index):
        built = "one Apple GPU" if torch.backends.mps.is_available() else "none"
        how = "with" if torch.backends.mps.is_built() else "without"
        raise DeviceError(
            f"there is no device {name!r}",
            where=f"--device={name}",
            expected="an Apple GPU that torch sees: macOS 14 or later on Apple silicon, and then mps alone",
            found=f"{built}; torch {torch.__version__}, built {how} MPS, on {platform.system()}",
            hint="--device=cpu, or `python -m nanogpt_fast.doctor`",
        )
    if device.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(f"device {name!r} is not supported", where=f"--device={name}", expected="cpu, cuda or mps")
    return device


def resolve_dtype(name: str, device: torch.device, *, comparable: bool = False) -> torch.dtype:
    """The compute dtype; one that the CPU emulates is warned of. `auto` takes bfloat16 where the device multiplies it
    natively, else float16 on CUDA and float32 on the CPU; with comparable=True float32 on any CPU, as nanoGPT there."""
    if name != "auto":
        dtype = getattr(torch, name)
        if device.type == "cpu" and cpu_multiplies(dtype) is False:
            missing = " nor ".join(word.upper() for word in CPU_INSTRUCTIONS[dtype])
            log.warning(SLOW_DTYPE.format(name=name, missing=missing))
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":  # no Mac of ours has measured bfloat16, and MPS's own 16-bit attention was wrong (#195910)
        return torch.float32
    return torch.bfloat16 if not comparable and cpu_multiplies(torch.bfloat16) else torch.float32


def _use(device: torch.device, tf32: bool) -> torch.device:
    """Make a GPU the current one, its float32 products TF32 or exact; on the CPU, keep freed memory."""
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # it refuses a device without an index
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    elif device.type == "cpu":
        _keep_freed_memory()
    return device


def _keep_freed_memory() -> None:
    """Let glibc hold up to 1 GiB of freed memory for the next step; elsewhere nothing.

    Its default hands activations back to the kernel and faults them in again: 60 iterations of shakespeare_char_cpu in
    float32 took 105K page faults and more on one core, 57K this way.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the most that every glibc accepts
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


def join(device: str, backend: str, gradient_accumulation_steps: int, ramp_start: int = 0, tf32: bool = True) -> World:
    """The World of this process: alone, or one of torchrun's (RANK, LOCAL_RANK, WORLD_SIZE are set).

    Raises ConfigError unless all ranks get as many of the micro-batches, at --batch_ramp's start too (0: no ramp).
    """
    if "RANK" not in os.environ:
        return World(device=_use(resolve_device(device), tf32))
    if missing := [k for k in ("LOCAL_RANK", "WORLD_SIZE") if k not in os.environ]:
        raise ConfigError(
            "the environment describes half a rank",
            where="RANK is set",
            expected="LOCAL_RANK and WORLD_SIZE too, as torchrun sets them",
            found=f"no {' and no '.join(missing)}",
            hint="start with torchrun, or `unset RANK` to train alone",
        )
    rank, local_rank, size = (int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    for key, count in (("gradient_accumulation_steps", gradient_accumulation_steps), ("batch_ramp", ramp_start)):
        if count % size:
            up, rest = -(-count // size) * size, ":ITERS" if key == "batch_ramp" else ""
            raise ConfigError(
                f"{key} counts the micro-batches of all ranks and must divide by their number",
                where=f"{key} = {count}{rest}, WORLD_SIZE = {size}",
                expected=f"a multiple of {size}{rest}",
                hint=f"--{key}={up}{rest}",
            )
    on = resolve_device(device)
    if on.type == "mps" and size > 1:
        raise DeviceError(
            "MPS trains in one process: a Mac has one GPU, and gloo exchanges CPU tensors only",
            where=f"--device={device}, WORLD_SIZE = {size}",
            expected="no torchrun, or --device=cpu",
            hint="python -m nanogpt_fast.train with the same flags",
        )
    on = _use(resolve_device(f"cuda:{local_rank}") if on.type == "cuda" else on, tf32)
    dist.init_process_group(backend if on.type == "cuda" else "gloo", rank=rank, world_size=size)
    return World(rank, size, on)
