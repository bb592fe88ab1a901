"""Ranks: torchrun's environment, and the few collectives the trainer needs; alone, each is the identity."""

import ctypes
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt_fast.command import out_of_memory
from nanogpt_fast.errors import ConfigError, DeviceError
from nanogpt_fast.hardware import CPU_INSTRUCTIONS, cpu_multiplies
from nanogpt_fast.pulse import Pulse, lost, place_of

T = TypeVar("T")
log = logging.getLogger(__name__)
# Measured on an AVX2 core, quickstart: 65 to 94 ms an iteration in float32, 828 to 943 in bfloat16, float16 as slow.
SLOW_DTYPE = "this CPU has neither {missing} and emulates {name}, about ten times as slow as float32: --dtype=float32"

NAMED_BEFORE = {  # torch 2.13
    "reduce_scatter_single": "reduce_scatter_tensor",
    "all_gather_single": "all_gather_into_tensor",
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    pulse: Pulse | None = field(default=None, compare=False)

    @property
    def alone(self) -> bool:
        """Whether there is nobody to exchange anything with."""
        return self.size == 1

    @property
    def is_main(self) -> bool:
        """The rank that evaluates, logs and saves."""
        return self.rank == 0

    def all_reduce_(self, tensor: Tensor) -> None:
        """Sum over ranks, in place."""
        self.all_reduce(tensor)()

    def all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        """Start to sum over ranks, in place; what is returned waits: a GPU's stream, or on the CPU this thread."""
        return self._started("all_reduce", tensor)

    def reduce_scatter(self, share: Tensor, tensor: Tensor) -> Callable[[], None]:
        """Start to sum over ranks; share, [len(tensor) / size], becomes this rank's part of the sum. It may lie in
        tensor, at its own place, whose rest is then in any state."""
        return self._started("reduce_scatter_single", share, tensor)

    def all_gather(self, tensor: Tensor, share: Tensor) -> Callable[[], None]:
        """Start to fill tensor with every rank's share, which may lie in it, at its own place."""
        return self._started("all_gather_single", tensor, share)

    def _started(self, name: str, *tensors: Tensor, **settings: int) -> Callable[[], None]:
        if self.alone:
            return lambda: None
        collective = getattr(dist, name, None) or getattr(dist, NAMED_BEFORE[name])
        with self._with_all(name):
            work: Any = collective(*tensors, **settings, async_op=True)

        def wait() -> None:
            with self._with_all(name):
                work.wait()

        return wait

    def broadcast_(self, tensor: Tensor) -> None:
        """Rank 0's values to all, in place."""
        self._started("broadcast", tensor, src=0)()

    def main_says(self, flag: bool) -> bool:
        """Rank 0's flag, on every rank."""
        return self.any(flag and self.is_main)

    def main_object(self, thing: T) -> T:
        """Rank 0's, on every rank; it travels as a pickle, between processes that trust one another."""
        said = [thing]
        if not self.alone:
            with self._with_all("broadcast"):
                dist.broadcast_object_list(said, src=0, device=self.device)
        return said[0]

    def any(self, flag: bool) -> bool:
        """True on every rank when it is True on one."""
        if self.alone:
            return flag
        votes = torch.tensor([float(flag)], device=self.device)
        self.all_reduce_(votes)
        return bool(votes.item())

    @contextmanager
    def _with_all(self, name: str) -> Iterator[None]:
        """A collective fails here when another rank has died, or has not come within --timeout."""
        try:
            yield
        except RuntimeError as error:  # DistBackendError of NCCL is one, gloo's is a plain one
            if out_of_memory(error):
                raise
            said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            absent = self.pulse.absent() if self.pulse else said
            place, _ = place_of(sys._getframe())
            at = f", {self.pulse.at}" if self.pulse else ""
            raise lost(self.rank, self.size, f"in {name} of {place}{at}", absent) from error

    def close(self, why: str = "") -> None:
        """Leave the ranks; why: what ended this one, for the others to read."""
        if self.pulse:
            self.pulse.close(why)
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
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Of the CPU: let glibc hold up to 1 GiB of freed memory for the next step; elsewhere nothing.

    Its default hands activations back to the kernel and faults them in again: 60 iterations of shakespeare_char_cpu in
    float32 took 105K page faults and more on one core, 57K this way.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the most that every glibc accepts
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


def join(
    device: str,
    backend: str,
    gradient_accumulation_steps: int,
    ramp_start: int = 0,
    tf32: bool = True,
    timeout: float = 600.0,
) -> World:
    """The World of this process: alone, or one of torchrun's (RANK, LOCAL_RANK, WORLD_SIZE are set).

    timeout: seconds after which a collective that not all have come to is an error. Raises ConfigError unless all ranks
    get as many of the micro-batches, at --batch_ramp's start too (0: no ramp).
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
    rank, local_rank, size = (_number(key) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if not 0 <= rank < size:
        raise ConfigError(
            "the environment describes no rank",
            where=f"RANK={rank}, WORLD_SIZE={size}",
            expected="0 <= RANK < WORLD_SIZE",
            hint="start with torchrun, or `unset RANK` to train alone",
        )
    require_shares(size, gradient_accumulation_steps, ramp_start)
    on = resolve_device(device)
    if on.type == "mps" and size > 1:
        raise DeviceError(
            "MPS trains in one process: a Mac has one GPU, and gloo exchanges CPU tensors only",
            where=f"--device={device}, WORLD_SIZE = {size}",
            expected="no torchrun, or --device=cpu",
            hint="python -m nanogpt_fast.train with the same flags",
        )
    on = _use(resolve_device(f"cuda:{local_rank}") if on.type == "cuda" else on, tf32)
    try:
        store = _meeting_place(rank, size, timeout)
        kind, limit = (backend, timeout + 60.0) if on.type == "cuda" else ("gloo", timeout)  # NCCL's ends the process
        dist.init_process_group(kind, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=limit))
    except (RuntimeError, ValueError) as error:  # an address that is missing, is no address, or does not answer
        place = ", ".join(f"{key}={os.environ.get(key, '')!r}" for key in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConfigError(
            "the ranks cannot meet",
            where=f"rank {rank} of {size}, {place}",
            expected="MASTER_ADDR and MASTER_PORT of rank 0, as torchrun sets them",
            found=str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
            hint="start with torchrun, or `unset RANK` to train alone",
        ) from error
    return World(rank, size, on, Pulse(store, rank, size, timeout) if size > 1 else None)


def _meeting_place(rank: int, size: int, timeout: float) -> Any:
    """The store of these ranks, as they are now. torchrun's stays from one start of the ranks to the next, so what the
    ones before left there must not be read: starts are told apart by torchrun's count, and where that stays, because a
    node came or went, by the ranks that have come."""
    store, _, _ = next(iter(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout))))
    start = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{size}"
    return dist.PrefixStore(f"{start}/{(store.add(f'{start}/came', 1) - 1) // size}", store)


def require_shares(size: int, gradient_accumulation_steps: int, ramp_start: int = 0) -> None:
    """ConfigError unless so many ranks get as many of the micro-batches each, at --batch_ramp's start too."""
    for key, count in (("gradient_accumulation_steps", gradient_accumulation_steps), ("batch_ramp", ramp_start)):
        if count % size:
            up, rest = -(-count // size) * size, ":ITERS" if key == "batch_ramp" else ""
            raise ConfigError(
                f"{key} counts the micro-batches of all ranks and must divide by their number",
                where=f"{key} = {count}{rest}, WORLD_SIZE = {size}",
                expected=f"a multiple of {size}{rest}",
                hint=f"--{key}={up}{rest}",
            )


def _number(key: str) -> int:
    """What the environment says of a rank. Raises ConfigError."""
    text = os.environ[key]
    if not re.fullmatch(r"\d{1,9}", text):
        raise ConfigError(
            f"{key} is no number",
            where="the environment",
            expected=f"{key} as torchrun sets it",
            found=f"{key}={text!r}",
            hint="start with torchrun, or `unset RANK` to train alone",
        )
    return int(text)
