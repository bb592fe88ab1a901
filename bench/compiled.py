"""Compile candidate launch rows ahead of time, many at once, and read what each takes of a multiprocessor.

The compiler is profiling/aot_compile.py's. Each worker is a process of its own without a GPU, which records our op's
launches on meta tensors and compiles them for the target: spawned, as its parent may have used the GPU, and
expendable, as a candidate may take the compiler down. A GPU's process finds the kernels again in Triton's cache.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, astuple, dataclass
from typing import Any

import cases
from aot_compile import Usage, usage
from nanogpt_kernels.ahead import compile_call, compile_for
from op_inputs import Setting


@dataclass(frozen=True)
class Task:
    """A candidate to compile: the rows with these fields replaced (cases.overridden's)."""

    op: str  # of CASES
    launch_op: str
    at: Setting
    arch: int
    overrides: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Resources(Usage):
    """What a candidate's kernels take, the largest over them; problem: why it cannot be used."""

    launches: int = 0  # distinct ones: with some choices a row's kernel is not used at all
    problem: str = ""


def compile_task(task: Task) -> Resources:
    """Run in a worker."""
    compile_for(task.arch)
    try:
        with cases.overridden(task.overrides):
            calls = cases.recorded(task.op, task.at, task.arch, backward=True)
        used = [usage(compile_call(call)) for call in calls if row_of(call.op) == task.launch_op]
    except Exception as problem:  # a tile too small for tl.dot, a contract: the candidate is not one
        text = str(problem).strip().splitlines() or [""]
        return Resources(problem=f"{type(problem).__name__}: {text[-1]}"[:200])
    most = Usage(*map(max, zip(*map(astuple, used)))) if used else Usage()
    return Resources(**asdict(most), launches=len(used), problem=", ".join(most.misfits(task.arch)))


def row_of(call_op: str) -> str:
    """The key of TABLE that a launch belongs to: its own name, or the longest key that it goes on from."""
    from nanogpt_kernels import launch

    return max((key for key in launch.TABLE if call_op == key or call_op.startswith(f"{key}_")), key=len, default="")


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
        for worker in list((self.pool._processes or {}).values()):
            worker.terminate()
        self.pool.shutdown(cancel_futures=True)  # which waits for its thread: else Python's end may meet it half closed

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
            # those that are good first: the first broken one ends the pool, and what else it had is given it again
            for future in sorted(done, key=lambda f: isinstance(f.exception(), BrokenProcessPool)):
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
                break
        for future in running:
            future.cancel()
