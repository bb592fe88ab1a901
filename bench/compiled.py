"""Compile candidate launch rows ahead of time, many at once, and read what each takes of a multiprocessor.

Each worker is a process of its own without a GPU: it records our op's launches on meta tensors and compiles them for
the target. On a machine with a GPU the compiled kernels are found again in Triton's cache.
"""

import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

import cases
from cases import Setting


@dataclass(frozen=True)
class Task:
    """A candidate to compile: the rows with these fields replaced (cases.overridden's)."""

    op: str  # of CASES
    launch_op: str
    at: Setting
    arch: int
    overrides: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Resources:
    """What a candidate's kernels take, the largest over them; problem: why it cannot be used."""

    registers: int = 0
    spilled: int = 0  # bytes a thread
    shared: int = 0  # bytes a block
    launches: int = 0  # distinct ones: with some choices a row's kernel is not used at all
    problem: str = ""


class _Target:
    """What Triton asks of a driver, of a GPU that need not be there."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_task(task: Task) -> Resources:
    """Run in a worker."""
    from triton.runtime import driver

    target: Any = _Target(task.arch)
    driver.set_active(target)
    used = []
    try:
        with cases.overridden(task.overrides):
            calls = cases.recorded(task.op, task.at, task.arch, backward=True)
        for call in calls:
            if row_of(call.op) == task.launch_op:
                kernel = call.kernel.warmup(*call.args, grid=call.grid, **call.options)
                used.append(_read(kernel.asm["cubin"], kernel.metadata.shared))
    except Exception as problem:  # a tile too small for tl.dot, a contract: the candidate is not one
        text = str(problem).strip().splitlines() or [""]
        return Resources(problem=f"{type(problem).__name__}: {text[-1]}"[:200])
    most = [max((getattr(r, name) for r in used), default=0) for name in ("registers", "spilled", "shared")]
    found = Resources(*most, launches=len(used))
    return replace(found, problem=_problem(found, task.arch))


def row_of(call_op: str) -> str:
    """The key of TABLE that a launch belongs to: its own name, or the longest key that it goes on from."""
    from nanogpt_kernels import launch

    return max((key for key in launch.TABLE if call_op == key or call_op.startswith(f"{key}_")), key=len, default="")


def _problem(used: Resources, arch: int) -> str:
    from nanogpt_kernels.launch_rows import ARCHITECTURES

    limit = ARCHITECTURES[max(listed for listed in ARCHITECTURES if listed <= arch)].block_shared
    if used.spilled:
        return f"spills {used.spilled} bytes a thread"
    return f"needs {used.shared} bytes of shared memory of {limit}" if used.shared > limit else ""


def _read(cubin: bytes, shared: int) -> Resources:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text.strip().splitlines()[-1])}
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"] + shared)


class Compilers:
    """A pool of workers; leave it to end them, also those that are still compiling."""

    def __init__(self, workers: int | None = None):
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise RuntimeError("TRITON_INTERPRET=1 is set: nothing can be compiled in such a process")
        self.workers = workers or os.cpu_count() or 1
        self.start()

    def start(self) -> None:
        self.pool = ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("spawn"))

    def stop(self) -> None:
        workers = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()

    def __enter__(self) -> "Compilers":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def compile(self, tasks: Sequence[Task], until: float) -> Iterator[tuple[int, Resources]]:
        """(number of the task, its resources) as they come, those that are done by time.monotonic() == until.

        A task that takes its worker down (compilers abort) breaks the pool: from then on one runs at a time, so that
        it can be told which.
        """
        waiting, running, at_once = list(range(len(tasks))), {}, self.workers
        while (waiting or running) and (left := until - time.monotonic()) > 0:
            while waiting and len(running) < at_once:
                i = waiting.pop(0)
                running[self.pool.submit(compile_task, tasks[i])] = i
            done, _ = wait_for(running, timeout=left, return_when="FIRST_COMPLETED")
            for future in done & running.keys():
                if not isinstance(future.exception(), BrokenProcessPool):
                    yield running.pop(future), future.result()
                    continue
                if len(running) == 1:
                    yield running[future], Resources(problem="the compiler crashed")
                else:
                    waiting[:0] = sorted(running.values())
                self.stop()
                self.start()
                running, at_once = {}, 1
        for future in running:
            future.cancel()
