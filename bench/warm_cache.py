"""Compile the kernels of what follows into Triton's cache, on all cores, without touching the GPU.

    python bench/warm_cache.py [--arch 90] [--parts step ops race memcheck] [--total_s 30] [--out DIR]

Launches are recorded on meta tensors, in the order in which they will be needed, and compiled in forked processes; a
later process on the same machine finds the kernels in the cache. One line a kernel goes to DIR/compile.jsonl, so it
also says which kernels do not compile here. What is not done in time is compiled when it is first launched.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import machine
import memcheck
import step
import step_arms
import torch
from op_inputs import Setting

from nanogpt_fast.command import run_command

RACED = ("attention", "qkv_attention", "embedding")  # where a race is likeliest: products, atomics, sorted segments


def of_step(arch: int, dtype: torch.dtype) -> Iterator[Any]:
    config = step.configuration("gpt2_124m", batch_size=64)
    for arm in step.SWITCHED:
        yield from step_arms.recorded(arm, config, dtype, arch)


def of_ops(arch: int, dtype: torch.dtype) -> Iterator[Any]:
    for op in cases.CASES:
        yield from with_switches(op, cases.setting(op, "124m", dtype=dtype), arch)


def of_race(arch: int, dtype: torch.dtype) -> Iterator[Any]:
    for op in RACED:
        yield from cases.recorded(op, cases.setting(op, "race", dtype=dtype), arch, backward=True)


def of_memcheck(arch: int, dtype: torch.dtype) -> Iterator[Any]:
    for op, at in memcheck.settings(torch.device("cuda"), dtype):
        yield from with_switches(op, at, arch)


PARTS: dict[str, Callable[[int, torch.dtype], Iterator[Any]]] = {
    "step": of_step,
    "ops": of_ops,
    "race": of_race,
    "memcheck": of_memcheck,
}


def with_switches(op: str, at: Setting, arch: int) -> Iterator[Any]:
    """The launches of an op as its rows stand, and with each of their switches the other way."""
    calls = cases.recorded(op, at, arch, backward=True)
    yield from calls
    for name, row in dict(calls.rows).items():
        for choice, value in row.choices.items():
            if isinstance(value, bool):
                with cases.overridden({name: {"choices": {choice: not value}}}):
                    yield from cases.recorded(op, at, arch, backward=True)


def compile_share(groups: list[list[Any]], arch: int, lines: machine.Lines) -> None:
    """In a process of its own: a compiler that aborts takes only this share along."""
    from nanogpt_kernels.ahead import compile_call, compile_for

    compile_for(arch)
    for call, *_ in groups:
        began, status = time.monotonic(), "compiled"
        try:
            compile_call(call)
        except Exception as problem:
            status = f"failed: {type(problem).__name__}: {problem}"[:300]
        lines.write(op=call.op, kernel=call.kernel.__name__, status=status, seconds=round(time.monotonic() - began, 2))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="compute capability as in sm_90")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="what follows, in order")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--most", type=int, help="no more kernels than so many")
    parser.add_argument("--total_s", type=float, default=30.0, help="stop after so long")
    parser.add_argument("--out", type=Path, required=True, help="append to DIR/compile.jsonl")
    args = parser.parse_args(argv)
    from nanogpt_kernels.ahead import distinct

    deadline = time.monotonic() + args.total_s
    calls = [call for part in args.parts for call in PARTS[part](args.arch, getattr(torch, args.dtype))]
    groups = distinct(calls, args.arch)[: args.most]
    lines = machine.Lines(args.out / "compile.jsonl", bench="compile", arch=args.arch, ptxas=machine.ptxas(args.arch))
    before = len(machine.read_lines(args.out / "compile.jsonl"))
    jobs = [groups[i :: args.jobs] for i in range(min(args.jobs, len(groups)))]
    context = multiprocessing.get_context("fork")  # calls hold jit functions and meta tensors, which do not pickle
    workers = [context.Process(target=compile_share, args=(job, args.arch, lines)) for job in jobs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
    late = [worker for worker in workers if worker.is_alive()]
    for worker in late:
        worker.kill()
        worker.join()
    rows = machine.read_lines(args.out / "compile.jsonl")[before:]
    bad = [row for row in rows if row["status"] != "compiled"]
    for row in bad:
        print(f"{row['kernel']}: {row['status']}")
    crashed = sum(worker.exitcode != 0 for worker in workers) - len(late)
    print(f"{len(rows) - len(bad)} of {len(groups)} kernels compiled" + (f", {len(late)} cores cut off" * bool(late))
          + f", {crashed} compilers crashed" * bool(crashed))  # fmt: skip
    return 1 if bad or crashed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
