"""Does every op give the same bits each time? Many forward and backward passes on fixed inputs, compared on the device.

    python bench/race.py [OP ...] [--repeats 1000] [--size race] [--out DIR]

A difference is a race (a missing barrier, a read of memory nobody wrote) or an order of summation left to chance: every
op promises neither, with the choice `atomic` off. Other work of random sizes runs beside it on a second stream, so that
blocks are scheduled differently each time; nothing waits for the device until the end of an op.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import cases
import harness
import machine
import ops
import torch
from cases import CASES, SHAPES
from op_inputs import Setting
from torch import Tensor

from nanogpt_fast.command import run_command
from nanogpt_fast.errors import ConfigError, did_you_mean
from nanogpt_fast.proof import Ballast, bits


def deterministic(op: str, at: Setting) -> dict[str, dict[str, Any]]:
    """The overrides that turn off every choice named `atomic` of the rows the op takes."""
    from nanogpt_kernels import launch

    rows = dict(cases.recorded(op, at, launch.architecture(at.device), backward=True).rows)
    return {name: {"choices": {"atomic": False}} for name, row in rows.items() if row.choices.get("atomic")}


def race(op: str, at: Setting, repeats: int, ballast: Ballast) -> dict[str, int]:
    """{tensor: how many of the repeats differed from the first}."""
    case, args = CASES[op], CASES[op].inputs(at)
    fresh = {i: args[i].clone() for i, a in enumerate(args) if case.mutates and isinstance(a, Tensor)}
    bound = harness.plain(cases.ours(op)).bind(*args)
    leaves = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
    douts = None if case.mutates else cases.douts_of(harness.outputs_of(bound.forward()), at)

    def once() -> dict[str, Tensor]:
        for i, x in fresh.items():
            args[i].copy_(x)
        if douts is None:
            named = {f"output {i}": out for i, out in enumerate(harness.outputs_of(bound.forward()))}
            return named | {f"argument {i}": args[i] for i in case.mutates if args[i] is not None}
        outs, grads = harness.both(bound, douts)
        named = {f"output {i}": out for i, out in enumerate(outs)}
        return named | {f"gradient of argument {i}": grad for i, grad in zip(leaves, grads)}

    first = {name: bits(x).clone() for name, x in once().items()}
    counts = {name: torch.zeros((), dtype=torch.int64, device=at.device) for name in first}
    for _ in range(repeats):
        ballast.add()
        for name, x in once().items():
            counts[name] += (bits(x) != first[name]).any()
    return {name: int(count) for name, count in counts.items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--size", default="race", choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--p", type=float, default=0.0, help="dropout")
    parser.add_argument("--ballast_mb", type=int, default=2048, help="0: nothing runs beside it")
    parser.add_argument("--device", default="cuda", help="cpu: interpreted, which shows no race but that this runs")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--out", type=Path, help="append to DIR/race.jsonl")
    args = parser.parse_args(argv)
    for op in args.ops:
        if op not in CASES:
            raise ConfigError(f"unknown op {op!r}{did_you_mean(op, CASES)}", expected=", ".join(CASES))
    device = torch.device("meta" if args.dry_run else args.device)
    if device.type == "cuda":
        device = machine.require_cuda("bench/race.py")
    make = partial(cases.setting, size=args.size, dtype=getattr(torch, args.dtype), device=device, p=args.p)
    if args.dry_run:
        print("\n".join(f"{args.repeats} x{ops.plan(op, make(op))}" for op in args.ops or CASES))
        return 0
    arch = 10 * torch.cuda.get_device_capability()[0] if device.type == "cuda" else 90
    facts: dict[str, Any] = {
        "bench": "race",
        "size": args.size,
        "dtype": args.dtype,
        "p": args.p,
        "ptxas": machine.ptxas(arch),
    }
    lines = machine.Lines(args.out and args.out / "race.jsonl", **facts, **machine.machine_facts())
    ballast, found = Ballast(device, args.ballast_mb), False
    for op in args.ops or CASES:
        try:
            turned = deterministic(op, make(op))
            with cases.overridden(turned):
                counts = race(op, make(op), args.repeats, ballast)
        except Exception as problem:  # the next op has its own memory and kernels
            lines.write(op=op, status=ops.first_line(problem))
            print(f"{op}: {ops.first_line(problem)}", flush=True)
            found = True
            continue
        differing = {name: count for name, count in counts.items() if count}
        lines.write(op=op, status="differs" if differing else "ok", repeats=args.repeats, differing=differing)
        listed = ", ".join(f"{name} in {count}" for name, count in differing.items())
        said = f"DIFFERS, of {args.repeats} runs: {listed}" if differing else f"the same {args.repeats} times"
        note = f" ({', '.join(turned)}: atomic off)" if turned else ""
        print(f"{op}{note}: {len(counts)} tensors {said}", flush=True)
        found = found or bool(differing)
    tool = machine.ptxas(arch)
    if found:
        print(
            f"assembled by {tool['path']}, {tool['version']}. Versions before 13.3 can corrupt the registers of wgmma "
            "on Hopper: before reading the code, try bench/gpu_session.py --ptxas PATH of the extra `ptxas`"
        )
    print("a race, or an op that did not run: see above" if found else f"the same bits, by ptxas {tool['version']}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
