"""Does the harness find what is there, and nothing else, on this machine as it is now?

    python bench/selfcheck.py [--device cuda|cpu] [--rounds 31] [--out DIR]

A against A: the ratio's quartiles should hold 1. A against A with a tenth more work: they should hold 1.1 and not 1.
Where they do not, the machine is too unsteady for a difference of a tenth: close what else runs, or take more rounds.
On a GPU also one op by triton.testing.do_bench, an independent harness. tests/bench/test_harness_proof.py shows the
same on a clock of its own.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import machine
import torch

from nanogpt_fast import timing
from nanogpt_fast.command import run_command
from nanogpt_fast.errors import ConfigError

UNITS = 20  # products of a call, so that a tenth more is two of them
EDGE = {"cuda": 2048, "cpu": 192}


def work(device: torch.device, units: int) -> Callable[[], Any]:
    """So many equal products: a call of a millisecond or so on either device."""
    a, b = (torch.randn(EDGE[device.type], EDGE[device.type], device=device) for _ in range(2))
    c = torch.empty_like(a)

    def call() -> None:
        for _ in range(units):
            torch.mm(a, b, out=c)

    return call


def against_itself(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Two rows: {"planted", "x", "x_q1", "x_q3", "held"}, held: the quartiles say what was planted."""
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    rows = []
    for planted in (1.0, 1.1):
        units = {"a": UNITS, "b": round(UNITS * planted)}
        arms = {name: timing.make_arm([work(device, n)], pool, device_type=device.type) for name, n in units.items()}
        replays = max(arm.replays for arm in arms.values())
        for arm in arms.values():  # spans of unequal length would feel interruptions unequally
            arm.replays = replays
        times = timing.interleaved(arms, rounds)
        found = harness.paired(times["b"], times["a"], "x")
        rows.append({"planted": planted, **found, "held": held(planted, **found), "rounds": rounds})
    return rows


def held(planted: float, x: float, x_q1: float, x_q3: float) -> bool:
    """Whether the quartiles hold 1 where nothing was planted; else whether they exclude it, the ratio being within half
    of what was planted."""
    if planted == 1.0:
        return x_q1 <= 1.0 <= x_q3
    return x_q1 > 1.0 and abs(x - planted) < (planted - 1.0) / 2


def independent(device: torch.device, rounds: int) -> dict[str, Any]:
    """LayerNorm of the 124M by both harnesses, ms. do_bench flushes the L2 cache; ours takes inputs in turn. Agreed:
    within a twentieth of one another, or within the quartiles."""
    import cases
    from triton.testing import do_bench

    at = cases.setting("norm", "124m", device=device)
    specification = cases.specification("norm")
    size = sum(a.numel() * a.element_size() for a in cases.CASES["norm"].inputs(at) if isinstance(a, torch.Tensor))
    sets = [harness.plain(specification).bind(*cases.CASES["norm"].inputs(at)) for _ in range(harness.input_sets(size))]
    arm = timing.make_arm([bound.forward for bound in sets], torch.cuda.graph_pool_handle())
    ours = harness.summary(timing.interleaved({"": arm}, rounds)[""])
    theirs: Any = do_bench(sets[0].forward, return_mode="median")
    agreed = ours["q1"] <= theirs <= ours["q3"] or abs(theirs / ours["ms"] - 1.0) < 0.05
    return {"op": "norm", **ours, "do_bench_ms": theirs, "held": agreed}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(EDGE), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, help="append to DIR/selfcheck.jsonl")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        raise ConfigError("--rounds must be 2 or more", found=str(args.rounds))
    device = machine.require_cuda("bench/selfcheck.py") if args.device == "cuda" else torch.device("cpu")
    facts = machine.machine_facts(args.device)
    lines = machine.Lines(args.out and args.out / "selfcheck.jsonl", bench="selfcheck", status="ok", **facts)
    rows = against_itself(device, args.rounds)
    for row in rows:
        verdict = "as planted" if row["held"] else "NOT as planted: this machine is too unsteady now"
        print(f"planted {row['planted']:.1f}, found {row['x']:.3f} (quartiles {row['x_q1']:.3f} to {row['x_q3']:.3f}, "
              f"{args.rounds} rounds): {verdict}")  # fmt: skip
    if args.device == "cuda":
        rows.append(independent(device, args.rounds))
        print(f"norm: {rows[-1]['ms']:.4f} ms, do_bench {rows[-1]['do_bench_ms']:.4f} ms: "
              f"{'agreed' if rows[-1]['held'] else 'NOT agreed'}")  # fmt: skip
    for row in rows:
        lines.write(load=machine.load_average(), **row)
    return 0 if all(row["held"] for row in rows) else 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
