"""Compile recorded launches ahead of time, as a launch would, where no GPU is touched.

`launch.recording(arch)` collects launches on meta tensors; `JITFunction.warmup` compiles one with Triton's own
specialisation of its arguments (divisibility by 16, integers equal to 1, None), as long as a driver names the target.
What is compiled lies in Triton's cache on the disk, where a launch finds it. A compile keeps one core busy: so
`compile_ahead` shares them out, in forked processes, as recorded launches hold what cannot be pickled.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .launch import Call, recording


class TargetDriver:
    """What Triton asks of a driver to compile for sm_`arch`. The architecture is its device number as well, because
    Triton keeps one set of compiled kernels a device."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(arch: int) -> None:
    """From here on this process compiles for sm_arch, whatever GPU it has or lacks."""
    driver.set_active(TargetDriver(arch))  # type: ignore[arg-type]


def distinct(calls: list[Call], arch: int) -> list[list[Call]]:
    """The calls in groups that share one compiled kernel on sm_arch, by Triton's own cache key."""
    compile_for(arch)
    for call in calls:
        call.kernel.device_caches.pop(arch, None)  # what is compiled already would not ask the hook
    found: dict[tuple[str, str], list[Call]] = {}
    keys: list[str] = []

    def note_and_refuse(*, key: str, **_: Any) -> bool:
        keys.append(key)
        return True  # compiles nothing

    knobs.runtime.jit_cache_hook = note_and_refuse
    try:
        for call in calls:
            call.kernel.warmup(*call.args, grid=call.grid, **call.options)
            found.setdefault((call.kernel.__name__, keys.pop()), []).append(call)
    finally:
        knobs.runtime.jit_cache_hook = None
    return list(found.values())


def compile_call(call: Call) -> Any:
    """What Triton makes of a recorded launch: `asm` (ttir, ptx, cubin) and `metadata`."""
    return call.kernel.warmup(*call.args, grid=call.grid, **call.options)


def compile_ahead(work: Callable[[], Any], arch: int, limit_s: float = 120.0) -> None:
    """Compile what work() launches on meta tensors for sm_`arch`, on all cores; to be called before the process touches
    a GPU. What fails to compile or is late fails or is compiled when it is launched."""
    lead = multiprocessing.get_context("fork").Process(target=_compile_all, args=(work, arch))
    lead.start()
    lead.join(limit_s)
    if lead.is_alive():
        with suppress(ProcessLookupError):
            os.killpg(lead.pid or 0, signal.SIGKILL)  # its workers too
        lead.join()


def _alone() -> None:
    """Of a forked process: it ends when its parent does (Linux), and holds none of its pipes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _compile_all(work: Callable[[], Any], arch: int) -> None:
    os.setsid()
    _alone()
    with recording(arch) as calls:
        work()
    groups = distinct(calls, arch)
    jobs = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(groups))
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_compile_each, args=(groups[i::jobs],)) for i in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _compile_each(groups: list[list[Call]]) -> None:
    _alone()
    for call, *_ in groups:
        with suppress(Exception):  # as a launch will say; the others are compiled all the same
            compile_call(call)
