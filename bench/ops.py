"""Each op against torch and its peers: forward, backward and both, as a table and JSON lines.

    python bench/ops.py [OP ...] [--sizes 124m 1558m] [--peers all|none|NAME ...] [--out DIR]
    python bench/ops.py --device=cpu           the specification, torch's own and what of the peers runs there
    python bench/ops.py --dry_run              what would run: shapes, FLOPs, bytes (no GPU needed)
    python bench/ops.py --check --sizes tiny   every contestant's results, no times (any device)

Contestants: ours (and ours with each switch of its launch rows turned), torch eager (nanogpt_kernels/reference.py),
torch.compile of that, and bench/peers/. Each is checked against eager, the specification, before it is timed: random
inputs, memory full of NaN beforehand. `backward` is the paired difference of `both` and `forward`, round by round.
Floors are the data sheet's on a GPU, the measured roof's (roof.py) on a CPU; x_ours and x_eager are the ratios to those
two, paired by round, with their quartiles.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cases
import harness
import machine
import roof
import torch
from cases import CASES, SHAPES, SIZES
from harness import Contestant
from lineup import PEERS, Lineup, checked, contestants, first_line, peer_contestants
from op_inputs import Setting
from work import Work

from nanogpt_fast import timing
from nanogpt_fast.command import run_command
from nanogpt_fast.errors import ConfigError, did_you_mean
from nanogpt_fast.hardware import cpu_multiplies

MODES = ("forward", "both")  # what is timed; backward is their difference
DTYPE = {"cuda": "bfloat16", "cpu": "float32"}
ROOF_S = 5.0  # for measuring a CPU's roof

Line = dict[str, Any]  # of ops.jsonl


def calls_of(contestant: Contestant, op: str, at: Setting, sets: int) -> dict[str, list[Callable[[], Any]]]:
    """{mode: one call a set of inputs}."""
    forward, whole = [], []
    for i in range(sets):
        drawn = replace(at, seed=at.seed + 100 * i)
        bound = contestant.bind(*CASES[op].inputs(drawn))
        forward.append(within(contestant, bound.forward))
        if cases.differentiable(op, at):
            with contestant.within():
                outs = harness.outputs_of(bound.forward())
            if any(out is not None and out.requires_grad for out in outs):  # some peers are forward only
                douts = cases.douts_of(outs, drawn)
                whole.append(within(contestant, partial(harness.both, bound, douts)))
    return {"forward": forward, "both": whole} if whole else {"forward": forward}


def within(contestant: Contestant, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with contestant.within():
            call()

    return run


def timed(
    op: str, at: Setting, lineup: Lineup, rounds: int
) -> tuple[dict[tuple[str, str], list[float]], dict[str, str], dict[str, Any]]:
    """({(contestant, mode): milliseconds a call}, {contestant: how, or what went wrong}, the GPU's state meanwhile)."""
    kind = at.device.type
    sets = harness.input_sets(bytes_of_inputs(op, at), kind)
    pool, arms, how, state = None if kind == "cpu" else torch.cuda.graph_pool_handle(), {}, {}, {}
    for name, contestant in lineup.contestants.items():
        try:
            modes = calls_of(contestant, op, at, sets)
            made = {
                f"{name}|{mode}": timing.make_arm(calls, pool, contestant.capturable, kind)
                for mode, calls in modes.items()
            }
            how[name] = next(iter(made.values())).how
            arms |= made
        except Exception as problem:
            how[name] = f"not timed: {first_line(problem)}"
        harness.release(at.device)
    spans = timing.interleaved(arms, rounds, lambda: state.update(machine.gpu_state()))
    times = {(name, mode): spans[f"{name}|{mode}"] for name in how for mode in MODES if f"{name}|{mode}" in spans}
    for name in lineup.contestants:
        if (name, "both") in times:
            times[name, "backward"] = [b - f for b, f in zip(times[name, "both"], times[name, "forward"])]
    return times, how, state


def bytes_of_inputs(op: str, at: Setting) -> int:
    return sum(a.numel() * a.element_size() for a in CASES[op].inputs(at) if isinstance(a, torch.Tensor))


def floor_of(work: Work, op: str, at: Setting, measured_roof: roof.Roof | None) -> tuple[float, str] | None:
    """(ms, what binds): by the data sheet, on a CPU by the measured roof. Inputs that stay in a CPU's cache from call
    to call have no floor of bytes."""
    if at.device.type != "cpu":
        return machine.floor_ms(work, at.dtype)
    one = bytes_of_inputs(op, at)
    in_cache = one * harness.input_sets(one, "cpu") < machine.cache_bytes()
    return measured_roof.floor_ms(work, in_cache) if measured_roof else None


def work_of(mode: str, op: str, at: Setting) -> Work:
    forward, backward = CASES[op].work(at.shape, at.dtype.itemsize)
    return forward if mode == "forward" or backward is None else backward if mode == "backward" else forward + backward


def excluded(lineup: Lineup, verdicts: dict[str, float | str]) -> list[Line]:
    """A line for each who is not timed: missing, broken or wrong."""
    failed = {name: verdict for name, verdict in verdicts.items() if isinstance(verdict, str)}
    return [{"contestant": name, "status": why} for name, why in {**lineup.absent, **failed}.items()]


def measured(
    op: str,
    at: Setting,
    lineup: Lineup,
    verdicts: dict[str, float | str],
    rounds: int,
    measured_roof: roof.Roof | None = None,
) -> list[Line]:
    """Time everyone left; a line for each contestant and mode, and for each whom nothing could time."""
    times, how, state = timed(op, at, lineup, rounds)
    found: list[Line] = []
    for (name, mode), values in times.items():
        work, ms = work_of(mode, op, at), harness.summary(values)
        line = {"contestant": name, "mode": mode, "timed": how[name], "error": verdicts[name], "rounds": rounds, **ms}
        if ms["ms"] <= 0.0:
            found.append({**line, "status": "lost in noise: both ways took no longer than forward"})
            continue
        line |= {"status": "ok", "tflops": work.flops / ms["ms"] / 1e9, "gbps": work.bytes / ms["ms"] / 1e6}
        if floor := floor_of(work, op, at, measured_roof):
            line |= {"floor_ms": floor[0], "bound": floor[1], "of_floor": floor[0] / ms["ms"]}
        for base in ("ours", "eager"):
            if (base, mode) in times:
                line |= harness.paired(values, times[base, mode], f"x_{base}")
        found.append(line | state)
    problems = {name: problem for name, problem in how.items() if problem.startswith("not timed")}
    return found + [{"contestant": name, "status": problem} for name, problem in problems.items()]


def show(found: list[Line]) -> None:
    """Print lines: those without a time and why, then a table of the others, beside ours or, without, beside eager."""
    rows, base = [], "ours" if any("x_ours" in line for line in found) else "eager"
    for line in found:
        if line["status"] != "ok":
            print(f"  {line['contestant']}: {line['status']}")
            continue
        speed = roof.flops_in_words(line["tflops"]) if line["tflops"] else f"{line['gbps']:.3g} GB/s"
        share, ratio = (line.get(name) for name in ("of_floor", f"x_{base}"))
        spread = "" if ratio is None else f"{line[f'x_{base}_q1']:.2f}-{line[f'x_{base}_q3']:.2f}"
        rows.append([line["contestant"], line["mode"], line["ms"], f"{line['q1']:.4g}-{line['q3']:.4g}", speed,
                     "n/a" if share is None else f"{share:.0%}", "n/a" if ratio is None else f"{ratio:.2f}",
                     spread, line["timed"]])  # fmt: skip
    if rows:
        header = ["contestant", "mode", "ms", "quartiles", "rate", "of floor", f"x {base}", "quartiles", "timed"]
        print(machine.table(header, rows))
    sys.stdout.flush()


def tell(found: list[Line], facts: dict[str, Any], lines: machine.Lines) -> None:
    for line in found:
        lines.write(**facts, **line)
    show(found)


def measure(
    op: str,
    at: Setting,
    lineup: Lineup,
    rounds: int,
    facts: dict[str, Any],
    lines: machine.Lines,
    measured_roof: roof.Roof | None = None,
) -> None:
    """Check everyone, then time those who passed. measured_roof: on a CPU, for the floors."""
    verdicts = checked(op, at, lineup)
    tell(excluded(lineup, verdicts), facts, lines)  # at once: timing may be cut short
    tell(measured(op, at, lineup, verdicts, rounds, measured_roof), facts, lines)


def plan(op: str, at: Setting) -> str:
    """A line of --dry_run."""
    forward, backward = CASES[op].work(at.shape, at.dtype.itemsize)
    shapes = " ".join(str(list(a.shape)) for a in CASES[op].inputs(at) if isinstance(a, torch.Tensor))
    words = [
        f"{mode} {work.flops / 1e9:.4g} GFLOP {work.bytes / 1e6:.4g} MB"
        for mode, work in (("forward", forward), ("backward", backward))
        if work is not None
    ]
    return f"  {op}: {shapes}; {', '.join(words)}"


def main(argv: list[str]) -> int:
    args = parsed(argv)
    peers = {"all": list(PEERS), "none": []}.get(args.peers[0], args.peers)
    for name, known in [*((op, CASES) for op in args.ops), *((name, PEERS) for name in peers)]:
        if name not in known:
            kind = "op" if known is CASES else "peer"
            raise ConfigError(f"unknown {kind} {name!r}{did_you_mean(name, known)}", expected=", ".join(known))
    if args.dry_run:
        return dry_run(args, peers)
    device, timed_on_cpu = torch.device(args.device), args.device == "cpu" and not args.check
    if device.type == "cpu" and args.check and args.dtype != "float32":
        raise ConfigError("Triton's interpreter does not compute bfloat16 exactly", hint="--check --dtype=float32")
    if timed_on_cpu and cpu_multiplies(getattr(torch, args.dtype)) is False:
        raise ConfigError(f"this CPU does not multiply {args.dtype}: its times mean nothing", hint="--dtype=float32")
    if device.type != "cpu":
        device = machine.require_cuda("bench/ops.py")
    facts = machine.machine_facts(device.type)
    lines = machine.Lines(args.out and args.out / "ops.jsonl", bench="ops", **facts)
    asked = [args.dtype, args.p, args.no_bias, args.no_compile, *peers]
    done = machine.read_lines(args.out / "ops.jsonl") if args.resume and args.out else []
    done = [(row["size"], row["op"], row["asked"]) for row in done if row.get("finished") == machine.tree_hash()]
    measured_roof = roof_for(args, device) if timed_on_cpu else None
    wrong, needed = 0, "eager" if timed_on_cpu else "ours"
    for size, op in itertools.product(args.sizes, args.ops or CASES):
        if (size, op, asked) in done:
            print(f"{op}, {size}: measured before")
            continue
        at = setting_of(op, size, args, device)
        lineup = contestants(op, at, peers, not (args.no_compile or args.check), ours=not timed_on_cpu)
        facts = {"op": op, "size": size, "shape": vars(at.shape), "dtype": args.dtype, "p": at.p, "bias": at.bias}
        print(f"{op}, {size}: B={at.shape.B} T={at.shape.T} C={at.shape.C} {args.dtype}", flush=True)
        if args.check:
            wrong += check(op, at, lineup, facts, lines)
            continue
        measure(op, at, lineup, args.rounds, facts, lines, measured_roof)
        wrong += needed not in lineup.contestants
        lines.write(size=size, op=op, asked=asked, finished=machine.tree_hash())
        harness.release(at.device)
        if not timed_on_cpu:
            torch.cuda.empty_cache()
    print(f"{wrong} ops failed" if timed_on_cpu else f"{wrong} of our ops missing or wrong")
    return 1 if wrong else 0


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), help=f"default {SIZES}")
    parser.add_argument("--peers", nargs="+", default=["all"], help=f"all, none, or of {', '.join(PEERS)}")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help=f"default {DTYPE}")
    parser.add_argument("--p", type=float, default=0.0, help="dropout; peers take part without it only")
    parser.add_argument("--no_bias", action="store_true", help="as nanoGPT trains; peers that need one are left out")
    parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--check", action="store_true", help="compare results, take no times")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--out", type=Path, help="append to DIR/ops.jsonl")
    parser.add_argument("--resume", action="store_true", help="skip what DIR/ops.jsonl has of these very files")
    args = parser.parse_args(argv)
    kind = "cpu" if args.device == "cpu" and not args.check else "cuda"
    args.sizes, args.dtype = args.sizes or SIZES[kind], args.dtype or DTYPE[kind]
    if args.rounds < 1:
        raise ConfigError("--rounds must be 1 or more", found=str(args.rounds))
    return args


def roof_for(args: argparse.Namespace, device: torch.device) -> roof.Roof:
    """Of this CPU: what DIR/roof.jsonl has of this process's number of threads, else measured in a few seconds."""
    lines = machine.Lines(args.out and args.out / "roof.jsonl", bench="roof", **machine.machine_facts("cpu"))
    names = ("device", "cpu", "threads")
    rows = machine.read_lines(lines.path) if lines.path else []
    rows = [row for row in rows if all(row.get(name) == lines.facts[name] for name in names)]
    if not any(row.get("dtype") == args.dtype and row["status"] == "ok" for row in rows):
        print("measuring the roof", flush=True)
        rows = [{**lines.facts, **row} for row in roof.roof_of(device, [args.dtype], None, ROOF_S, lines)]
    return roof.read(rows, args.dtype)


def setting_of(op: str, size: str, args: argparse.Namespace, device: torch.device) -> Setting:
    dtype = getattr(torch, args.dtype)
    return cases.setting(op, size, dtype=dtype, device=device, p=args.p, bias=not args.no_bias)


def check(op: str, at: Setting, lineup: Lineup, facts: dict[str, Any], lines: machine.Lines) -> bool:
    """Print everyone's verdict; whether one of ours is missing or wrong."""
    verdicts = {**lineup.absent, **checked(op, at, lineup)}
    for name, verdict in verdicts.items():
        wrong = isinstance(verdict, str)
        lines.write(**facts, contestant=name, mode="check", status=verdict if wrong else "ok", error=verdict)
        print(f"  {name}: {verdict if wrong else f'relative error {verdict:.2g}'}")
    return any(isinstance(verdict, str) for name, verdict in verdicts.items() if name.startswith("ours"))


def _named(peer: str, op: str) -> dict[str, Contestant]:
    return {f"{op}: {who}": contestant for who, contestant in peer_contestants(peer, op).items()}


def dry_run(args: argparse.Namespace, peers: list[str]) -> int:
    for size in args.sizes:
        print(f"{size}, {args.dtype}")
        for op in args.ops or CASES:
            print(plan(op, setting_of(op, size, args, torch.device("meta"))))
    print("peers")
    for name in peers:
        lineup = Lineup()
        for op in CASES:
            lineup.add(name, partial(_named, name, op))
        print(f"  {name}: {lineup.absent.get(name) or '; '.join(lineup.contestants)}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
