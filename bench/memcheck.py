"""Small calls of every op for compute-sanitizer, which makes kernels ten and more times as slow.

    compute-sanitizer --tool memcheck --error-exitcode 9 python bench/memcheck.py [--out DIR]

Attention comes with heads of 32, 64 and 128, without dropout and with it (rows of their own: _dropout_or_docs),
deterministic and atomic, over a T of several tiles and a rest: on sm_90 two products of tiles of 16 or 32 in one loop
have been seen to corrupt memory (pytorch/helion #1905, triton-lang/triton #11366), and these rows have such tiles.
Results are held against the specification too.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import cases
import machine
import ops
import torch
from op_inputs import Setting, Shape

from nanogpt_fast.command import run_command

HEADS = (64, 32, 128)  # channels of one
T = 161  # of tiles of 32 to 128 rows: some whole ones, and one of a single row


def settings(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Setting]]:
    """What is run, the suspects first."""
    for D in HEADS:
        for p in (0.0, 0.1):
            yield "attention", Setting(Shape(B=1, T=T, C=2 * D, H=2, V=96, N=5000), dtype, device, p)
    for op in cases.CASES:
        if op != "attention":
            yield op, cases.setting(op, "tiny", dtype=dtype, device=device)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--most", type=int, help="only the first so many")
    parser.add_argument("--device", default="cuda", help="cpu: interpreted, to see that this runs")
    parser.add_argument("--out", type=Path, help="append to DIR/memcheck.jsonl")
    args = parser.parse_args(argv)
    device = torch.device("cpu") if args.device == "cpu" else machine.require_cuda("bench/memcheck.py")
    lines = machine.Lines(args.out and args.out / "memcheck.jsonl", bench="memcheck", **machine.machine_facts())
    wrong = 0
    for op, at in list(settings(device, getattr(torch, args.dtype)))[: args.most]:
        facts = {"op": op, "shape": vars(at.shape), "dtype": args.dtype, "p": at.p}
        print(f"{op}: {at.shape} {args.dtype} p={at.p}", flush=True)
        wrong += ops.check(op, at, ops.contestants(op, at, [], compiled=False), facts, lines)
    print(f"{wrong} of our ops missing or wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
