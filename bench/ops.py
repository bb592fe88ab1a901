"""Each op against torch and its peers: forward, backward and both, as a table and JSON lines.

    python bench/ops.py [OP ...] [--sizes 124m 1558m] [--peers all|none|NAME ...] [--out DIR]
    python bench/ops.py --dry_run              what would run: shapes, FLOPs, bytes (no GPU needed)
    python bench/ops.py --check --sizes tiny   every contestant's results, no times (any device)

Contestants: ours (and ours with each switch of its launch rows turned), torch eager (nanogpt_kernels/reference.py),
torch.compile of that, and bench/peers/. Each is checked against eager, the specification, before it is timed: random
inputs, memory full of NaN beforehand. `backward` is the paired difference of `both` and `forward`, round by round.
"""

import argparse
import gc
import importlib
import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import cases
import harness
import machine
import peer_facts
import torch
from cases import CASES, SHAPES
from harness import Contestant
from op_inputs import Setting
from work import Work

from nanogpt_fast.errors import ConfigError, did_you_mean, run_command

MODES = ("forward", "both")  # what is timed; backward is their difference
PEERS = tuple(sorted(path.stem for path in (Path(__file__).parent / "peers").glob("*.py")))


@dataclass
class Lineup:
    """Who takes part in an op, and who cannot, with the reason."""

    contestants: dict[str, Contestant] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, find: Callable[[], dict[str, Contestant]]) -> None:
        try:
            self.contestants |= find()
        except Exception as problem:  # a peer that breaks on import is as good as missing, and must not stop the rest
            missing, how = isinstance(problem, ImportError), peer_facts.facts(name).requires
            why = f"{'not installed' if missing else 'broken'} ({first_line(problem)})"
            self.absent[name] = f"{why}; {how}" if how else why


def first_line(problem: BaseException) -> str:
    text = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {text[0]}"[:160] if text else type(problem).__name__


def _ours(op: str, at: Setting) -> dict[str, Contestant]:
    """Ours, and ours with each boolean choice of its launch rows the other way."""
    from nanogpt_kernels import launch

    stock = harness.plain(cases.ours(op))
    found = {"ours": stock}
    for name, row in dict(cases.recorded(op, at, launch.architecture(at.device), backward=True).rows).items():
        for choice, value in row.choices.items():
            if isinstance(value, bool):
                within = partial(launch.override, name, choices={choice: not value})
                found[f"ours, {choice}={not value}"] = replace(stock, within=within)
    return found


def _compiled(op: str) -> dict[str, Contestant]:
    if CASES[op].syncs:
        return {}
    return {"torch.compile": harness.plain(torch.compile(cases.specification(op), dynamic=False))}


def _peer(name: str, op: str) -> dict[str, Contestant]:
    served = op in peer_facts.facts(name).ops
    return importlib.import_module(f"peers.{name}").contestants(op) if served else {}


def contestants(op: str, at: Setting, peers: list[str], compiled: bool = True) -> Lineup:
    """Everyone for an op."""
    lineup = Lineup()
    lineup.add("ours", lambda: _ours(op, at))
    lineup.add("eager", lambda: {"eager": harness.plain(cases.specification(op), capturable=not CASES[op].syncs)})
    if compiled:
        lineup.add("torch.compile", lambda: _compiled(op))
    for name in peers if at.p == 0.0 else []:
        lineup.add(name, lambda name=name: _peer(name, op))
    return lineup


Line = dict[str, Any]  # of ops.jsonl
Results = tuple[list[torch.Tensor | None], list[torch.Tensor | None]]  # outputs (or what was mutated), gradients


def results(contestant: Contestant, op: str, at: Setting) -> Results:
    """Of one run on fresh inputs, in memory that was full of NaN."""
    args = CASES[op].inputs(at)
    bound = contestant.bind(*args)
    megabytes = min(2048, 1 + sum(a.numel() * a.element_size() for a in args if isinstance(a, torch.Tensor)) // 2**19)
    with contestant.within():
        if CASES[op].mutates:
            outs = harness.outputs_of(bound.forward())
            return [*outs, *(args[i] for i in CASES[op].mutates)], []
        douts = cases.douts_of(harness.outputs_of(bound.forward()), at)
        harness.poison(at.device, megabytes)
        outs, grads = harness.both(bound, douts)
    return list(outs), list(bound.canonical(grads))


def difference(got: Results, expected: Results) -> float:
    """The largest relative error over results that both have (peers lack some); NaN where one is NaN or misshapen."""
    pairs = [pair for mine, theirs in zip(got, expected) for pair in zip(mine, theirs)]
    errors = [harness.relative_error(a, b) for a, b in pairs if a is not None and b is not None]
    return float("nan") if any(e != e for e in errors) else max(errors)


def checked(op: str, at: Setting, lineup: Lineup) -> dict[str, float | str]:
    """{contestant: relative error, or what went wrong}; those that fail are taken out. The measure is eager, the
    specification itself; where that fails (memory), ours."""
    verdicts: dict[str, float | str] = {}
    expected = None
    for name in sorted(lineup.contestants, key=lambda name: name != "eager"):
        try:
            got = results(lineup.contestants[name], op, at)
            expected = expected or got
            error = difference(got, expected)
            verdicts[name] = error if error <= harness.TOLERANCE[at.dtype] else f"WRONG: relative error {error:.3g}"
        except Exception as problem:
            verdicts[name] = f"failed: {first_line(problem)}"
        if isinstance(verdicts[name], str):
            del lineup.contestants[name]
        gc.collect()
    return verdicts


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
    sizes = [a.numel() * a.element_size() for a in CASES[op].inputs(at) if isinstance(a, torch.Tensor)]
    sets = harness.input_sets(sum(sizes))
    pool, arms, how, state = torch.cuda.graph_pool_handle(), {}, {}, {}
    for name, contestant in lineup.contestants.items():
        try:
            modes = calls_of(contestant, op, at, sets)
            made = {f"{name}|{mode}": harness.make_arm(c, pool, contestant.capturable) for mode, c in modes.items()}
            how[name] = next(iter(made.values())).how
            arms |= made
        except Exception as problem:
            how[name] = f"not timed: {first_line(problem)}"
        gc.collect()
    spans = harness.interleaved(arms, rounds, lambda: state.update(machine.gpu_state()))
    times = {(name, mode): spans[f"{name}|{mode}"] for name in how for mode in MODES if f"{name}|{mode}" in spans}
    for name in lineup.contestants:
        if (name, "both") in times:
            times[name, "backward"] = [b - f for b, f in zip(times[name, "both"], times[name, "forward"])]
    return times, how, state


def work_of(mode: str, op: str, at: Setting) -> Work:
    forward, backward = CASES[op].work(at.shape, at.dtype.itemsize)
    return forward if mode == "forward" or backward is None else backward if mode == "backward" else forward + backward


def excluded(lineup: Lineup, verdicts: dict[str, float | str]) -> list[Line]:
    """A line for each who is not timed: missing, broken or wrong."""
    failed = {name: verdict for name, verdict in verdicts.items() if isinstance(verdict, str)}
    return [{"contestant": name, "status": why} for name, why in {**lineup.absent, **failed}.items()]


def measured(op: str, at: Setting, lineup: Lineup, verdicts: dict[str, float | str], rounds: int) -> list[Line]:
    """Time everyone left; a line for each contestant and mode, and for each whom nothing could time."""
    times, how, state = timed(op, at, lineup, rounds)
    found: list[Line] = []
    for (name, mode), values in times.items():
        work, ms = work_of(mode, op, at), harness.summary(values)
        floor = machine.floor_ms(work, at.dtype)
        line = {"contestant": name, "mode": mode, "timed": how[name], "error": verdicts[name], "rounds": rounds}
        line |= {"status": "ok", **ms, "tflops": work.flops / ms["ms"] / 1e9, "gbps": work.bytes / ms["ms"] / 1e6}
        if floor:
            line |= {"floor_ms": floor[0], "bound": floor[1], "of_floor": floor[0] / ms["ms"]}
        if ("ours", mode) in times:
            line["x_ours"] = statistics.median(a / b for a, b in zip(values, times["ours", mode]))
        found.append(line | state)
    problems = {name: problem for name, problem in how.items() if problem.startswith("not timed")}
    return found + [{"contestant": name, "status": problem} for name, problem in problems.items()]


def show(found: list[Line]) -> None:
    """Print lines: those without a time and why, then a table of the others."""
    rows = []
    for line in found:
        if line["status"] != "ok":
            print(f"  {line['contestant']}: {line['status']}")
            continue
        speed = f"{line['tflops']:.0f} TFLOP/s" if line["tflops"] else f"{line['gbps']:.0f} GB/s"
        share, ratio = (line.get(name) for name in ("of_floor", "x_ours"))
        rows.append([line["contestant"], line["mode"], line["ms"], f"{line['q1']:.4g}-{line['q3']:.4g}", speed,
                     "n/a" if share is None else f"{share:.0%}", "n/a" if ratio is None else f"{ratio:.2f}",
                     line["timed"]])  # fmt: skip
    if rows:
        print(machine.table(["contestant", "mode", "ms", "quartiles", "rate", "of floor", "x ours", "timed"], rows))
    sys.stdout.flush()


def tell(found: list[Line], facts: dict[str, Any], lines: machine.Lines) -> None:
    for line in found:
        lines.write(**facts, **line)
    show(found)


def measure(op: str, at: Setting, lineup: Lineup, rounds: int, facts: dict[str, Any], lines: machine.Lines) -> None:
    """Check everyone, then time those who passed."""
    verdicts = checked(op, at, lineup)
    tell(excluded(lineup, verdicts), facts, lines)  # at once: timing may be cut short
    tell(measured(op, at, lineup, verdicts, rounds), facts, lines)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--sizes", nargs="+", default=["124m", "1558m"], choices=list(SHAPES))
    parser.add_argument("--peers", nargs="+", default=["all"], help=f"all, none, or of {', '.join(PEERS)}")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--p", type=float, default=0.0, help="dropout; peers take part without it only")
    parser.add_argument("--no_bias", action="store_true", help="as nanoGPT trains; peers that need one are left out")
    parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda", help="of --check")
    parser.add_argument("--check", action="store_true", help="compare results, take no times")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--out", type=Path, help="append to DIR/ops.jsonl")
    parser.add_argument("--resume", action="store_true", help="skip what DIR/ops.jsonl has of these very files")
    args = parser.parse_args(argv)
    for op in args.ops:
        if op not in CASES:
            raise ConfigError(f"unknown op {op!r}{did_you_mean(op, CASES)}", expected=", ".join(CASES))
    peers = {"all": list(PEERS), "none": []}.get(args.peers[0], args.peers)
    for peer in peers:
        if peer not in PEERS:
            raise ConfigError(f"unknown peer {peer!r}{did_you_mean(peer, PEERS)}", expected=", ".join(PEERS))
    if args.dry_run:
        return dry_run(args, peers)
    device = torch.device(args.device)
    if device.type == "cpu" and args.dtype != "float32":
        raise ConfigError("Triton's interpreter does not compute bfloat16 exactly", hint="--check --dtype=float32")
    if device.type == "cuda" or not args.check:
        device = machine.require_cuda("bench/ops.py")
    lines = machine.Lines(args.out and args.out / "ops.jsonl", bench="ops", **machine.machine_facts())
    asked = [args.dtype, args.p, args.no_bias, args.no_compile, *peers]
    done = machine.read_lines(args.out / "ops.jsonl") if args.resume and args.out else []
    done = [(row["size"], row["op"], row["asked"]) for row in done if row.get("finished") == machine.tree_hash()]
    wrong = 0
    for size, op in itertools.product(args.sizes, args.ops or CASES):
        if (size, op, asked) in done:
            print(f"{op}, {size}: measured before")
            continue
        at = setting_of(op, size, args, device)
        lineup = contestants(op, at, peers, compiled=not (args.no_compile or args.check))
        facts = {"op": op, "size": size, "shape": vars(at.shape), "dtype": args.dtype, "p": at.p, "bias": at.bias}
        print(f"{op}, {size}: B={at.shape.B} T={at.shape.T} C={at.shape.C} {args.dtype}", flush=True)
        if args.check:
            wrong += check(op, at, lineup, facts, lines)
            continue
        measure(op, at, lineup, args.rounds, facts, lines)
        wrong += "ours" not in lineup.contestants
        lines.write(size=size, op=op, asked=asked, finished=machine.tree_hash())
        gc.collect()
        torch.cuda.empty_cache()
    print(f"{wrong} of our ops missing or wrong")
    return 1 if wrong else 0


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


def dry_run(args: argparse.Namespace, peers: list[str]) -> int:
    for size in args.sizes:
        print(f"{size}, {args.dtype}")
        for op in args.ops or CASES:
            print(plan(op, setting_of(op, size, args, torch.device("meta"))))
    print("peers")
    for peer in peers:
        lineup = Lineup()
        lineup.add(peer, lambda peer=peer: {f"{op}: {name}": c for op in CASES for name, c in _peer(peer, op).items()})
        print(f"  {peer}: {lineup.absent.get(peer) or '; '.join(lineup.contestants)}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
