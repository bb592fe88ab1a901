"""Search launch rows: tiles, warps, stages and choices, from the present row outwards.

    python bench/tune.py LAUNCH_OP ... [--size 124m] [--dtype bfloat16] [--limit_s 60] [--out DIR]
    python bench/tune.py --worst DIR/ops.jsonl     the launch ops of the cases that lose most against their floor
    python bench/tune.py --rows FILE.json          these rows alone: {LAUNCH_OP: [{"BLOCK_M": 64, "num_warps": 4}, ...]}
    python bench/tune.py LAUNCH_OP --compile_only --arch 90      resources of the candidates (no GPU needed)
    python bench/tune.py LAUNCH_OP --dry_run                     the candidates (no GPU needed)

LAUNCH_OP is a key of nanogpt_kernels.launch.TABLE. Candidates are compiled in parallel; those that do not fit (by the
rules of profiling/resources.py on spills and shared memory) or compute something else than the present row are dropped;
the rest are timed by graph replay, interleaved with the present row, within the public op that launches them. The
search (nanogpt_fast/launch_search.py, the user's own tune's too) moves to the best and goes on. It ends in a row to
paste into nanogpt_kernels/launch_rows.py.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cases
import harness
import lineup
import machine
import ops
import torch
from cases import CASES, SHAPES
from compiled import Compilers, Resources, Task
from op_inputs import Setting

from nanogpt_fast import agreement, launch_search, timing
from nanogpt_fast.command import run_command
from nanogpt_fast.errors import ConfigError, did_you_mean
from nanogpt_fast.launch_search import GAIN, MOST, SHAPE, candidates, moved, point, ranked, shown

COMPARE_ROUNDS = 15


@dataclass(frozen=True)
class Target:
    """A launch op as some case reaches it: present is its row there."""

    launch_op: str
    op: str
    mode: str  # "forward" or "both": the shorter one that asks for it
    at: Setting
    arch: int
    present: Any
    others: dict[str, dict[str, Any]]  # overrides of other rows, without which it is not asked for

    def overrides(self, row: Any) -> dict[str, dict[str, Any]]:
        """What makes a row of it the present one."""
        return {**self.others, self.launch_op: {name: getattr(row, name) for name in ("blocks", "choices", *SHAPE)}}


def find(
    launch_op: str, at_size: str, dtype: torch.dtype, arch: int, p: float, bias: bool = True, of: str = ""
) -> Target:
    """The cheapest case that asks for this launch op: as the rows stand, else with one switch of another row turned,
    else with dropout; or the case `of`. ConfigError where none does."""
    for at_p, turned in ((p, False), (p, True), (p or 0.1, False), (p or 0.1, True)):
        found: dict[float, Target] = {}
        for op, backward in itertools.product([of] if of else CASES, (False, True)):
            at = cases.setting(op, at_size, dtype=dtype, p=at_p, bias=bias)
            try:
                rows = dict(cases.recorded(op, at, arch, backward).rows)
            except ImportError:
                continue
            for others in _switches(rows) if turned else [{}]:
                with cases.overridden(others):
                    rows = dict(cases.recorded(op, at, arch, backward).rows)
                if launch_op in rows:
                    mode = "both" if backward else "forward"
                    work = ops.work_of(mode, op, at)
                    cost = work.flops / 1e15 + work.bytes / 3e12  # seconds, on something like an H100
                    found.setdefault(cost, Target(launch_op, op, mode, at, arch, rows[launch_op], others))
        if found:
            return found[min(found)]
    raise ConfigError(
        f"no op of bench/cases.py asks for {launch_op!r} at {at_size}, {str(dtype).removeprefix('torch.')}, sm_{arch}",
        hint="another --size, --dtype or --p",
    )


def _switches(rows: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """Each boolean choice of some rows turned, one at a time."""
    return [
        {name: {"choices": {choice: not value}}}
        for name, row in rows.items()
        for choice, value in row.choices.items()
        if isinstance(value, bool)
    ]


def compile_rows(
    pool: Compilers, target: Target, rows: list[Any], until: float, lines: machine.Lines
) -> list[tuple[Any, Resources]]:
    """Those that compile and fit, by `until`."""
    tasks = [Task(target.op, target.launch_op, target.at, target.arch, target.overrides(row)) for row in rows]
    good = []
    for i, used in pool.compile(tasks, until):
        if not used.launches and not used.problem and rows[i] != moved(target.present, rows[i].choices):
            continue  # its kernel is not used, so its shape does not matter: the choices alone are tried once
        lines.write(launch_op=target.launch_op, **point(rows[i]), **vars(used), status=used.problem or "compiled")
        takes = f"{used.registers} registers, {used.shared} B shared" if used.launches else "not launched"
        print(f"  {shown(rows[i])}: {used.problem or takes}", flush=True)
        if not used.problem:
            good.append((rows[i], used))
    return good


class Race:
    """Rows of one launch op timed against each other, on one set of inputs and one check."""

    def __init__(self, target: Target):
        self.target, self.pool = target, torch.cuda.graph_pool_handle()
        self.stock = harness.plain(cases.ours(target.op))
        self.expected = lineup.results(self._contestant(target.present), target.op, target.at)
        inputs = CASES[target.op].inputs(target.at)
        sets = harness.input_sets(sum(a.numel() * a.element_size() for a in inputs if isinstance(a, torch.Tensor)))
        self.calls = ops.calls_of(self.stock, target.op, target.at, sets)[target.mode]

    def right(self, row: Any) -> str:
        """ "" where the row computes what the present one does, else what is wrong."""
        try:
            got = lineup.results(self._contestant(row), self.target.op, self.target.at)
            error = lineup.difference(got, self.expected)
        except Exception as problem:
            return ops.first_line(problem)
        return "" if error <= agreement.TOLERANCE[self.target.at.dtype] else f"WRONG: relative error {error:.3g}"

    def _contestant(self, row: Any) -> harness.Contestant:
        return replace(self.stock, within=partial(cases.overridden, self.target.overrides(row)))

    def times(self, rows: Sequence[Any], rounds: int) -> list[list[float]]:
        """Milliseconds a call, one list a row."""
        arms = {}
        for i, row in enumerate(rows):
            calls = [ops.within(self._contestant(row), call) for call in self.calls]
            arms[str(i)] = timing.make_arm(calls, self.pool)
        return list(timing.interleaved(arms, rounds).values())


class Arena(launch_search.Arena):
    """A target's rows: compiled by the pool, raced, and told to the lines and the console."""

    def __init__(self, target: Target, pool: Compilers, lines: machine.Lines):
        self.target, self.pool, self.lines, self.race = target, pool, lines, Race(target)
        self.launch_op, self.present = target.launch_op, target.present
        self.right, self.times = self.race.right, self.race.times

    def fitting(self, rows: list[Any], until: float) -> list[Any]:
        return [row for row, _ in compile_rows(self.pool, self.target, rows, until, self.lines)]

    def tell(self, row: Any, status: str, **figures: Any) -> None:
        self.lines.write(launch_op=self.launch_op, **point(row), status=status, **figures)
        if status == "timed":
            print(f"  {figures['ratio']:.3f} of the centre: {shown(row)}", flush=True)
        elif status != "best":
            print(f"  {shown(row)}: {status}")


def search(target: Target, limit_s: float, most: int, pool: Compilers, lines: machine.Lines) -> str:
    """The row to paste."""
    walk = launch_search.search(Arena(target, pool, lines), time.monotonic() + limit_s, most)
    better = walk.best != target.present
    return pasted(walk.best, target, f"{walk.ratio:.3f} of the row before" if better else f"best of {len(walk.seen)}")


def compare(target: Target, named: list[dict[str, Any]], limit_s: float, pool: Compilers, lines: machine.Lines) -> str:
    """The best of the present row and those that `named` changes it to, to paste."""
    rows, until = [moved(target.present, changes) for changes in named], time.monotonic() + limit_s
    found, _ = ranked(Arena(target, pool, lines), rows, target.present, COMPARE_ROUNDS, until)
    best, r = found[0] if found and found[0][1] <= GAIN else (target.present, 1.0)
    return pasted(best, target, f"{r:.3f} of the row before" if r < 1.0 else f"best of {len(rows) + 1}")


def pasted(row: Any, target: Target, outcome: str) -> str:
    """As launch_rows.py has it, for this architecture and element size."""
    at = target.at
    what = f"{target.op} {target.mode}, B={at.shape.B} T={at.shape.T} C={at.shape.C}"
    dtype, day = str(at.dtype).removeprefix("torch."), datetime.date.today().isoformat()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"sm_{target.arch}"
    parts = [str(target.arch), _dict(row.blocks), f"num_warps={row.num_warps}", f"num_stages={row.num_stages}",
             f"itemsize={at.dtype.itemsize}"]  # fmt: skip
    parts += [f"max_registers={row.max_registers}"] * (row.max_registers is not None)
    parts += [f"up_to={row.up_to}"] * (row.up_to < 2**62) + [f"choices={_dict(row.choices)}"] * bool(row.choices)
    warning = (
        "# gives up reproducible sums\n" if row.choices.get("atomic") and not target.present.choices["atomic"] else ""
    )
    return f'{warning}Row({", ".join(parts)},\n    source="measured on {gpu}, {day}, {what} {dtype}: {outcome}"),'


def _dict(values: dict[str, Any]) -> str:
    return f"dict({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def worst(path: Path, most: int, arch: int, dtype: torch.dtype) -> list[tuple[str, str]]:
    """(launch op, size) of the cases that lose most milliseconds against their floor, by a file of ops.py."""
    last: dict[tuple[str, str], float] = {}
    for line in machine.read_lines(path):
        if line.get("contestant") == "ours" and line.get("mode") in ("forward", "both") and "ms" in line:
            last[line["op"], line["size"]] = line["ms"] - line.get("floor_ms", 0.0)  # both comes after forward
    found: list[tuple[str, str]] = []
    for op, size in sorted(last, key=lambda key: -last[key])[:most]:
        rows = cases.recorded(op, cases.setting(op, size, dtype=dtype), arch, backward=True).rows
        found += [(name, size) for name in dict(rows) if (name, size) not in found]
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("launch_ops", nargs="*", metavar="LAUNCH_OP", help="of launch.TABLE")
    parser.add_argument("--size", default="124m", choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--p", type=float, default=0.0, help="dropout")
    parser.add_argument("--no_bias", action="store_true", help="as nanoGPT trains GPT-2")
    parser.add_argument(
        "--within", default="", choices=["", *CASES], help="the op to time; default the shortest that launches it"
    )
    parser.add_argument("--limit_s", type=float, default=60.0, help="for one launch op")
    parser.add_argument("--total_s", type=float, default=float("inf"), help="for all of them, shared evenly")
    parser.add_argument("--most", type=int, default=MOST, help="candidates compiled before the search moves on")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="JSON: {launch op: [what its present row is changed to]}"
    )
    parser.add_argument("--worst", type=Path, metavar="FILE", help="take the launch ops from ops.py's results")
    parser.add_argument("--worst_ops", type=int, default=3, help="how many ops of that file")
    parser.add_argument("--arch", type=int, default=90, help="of --compile_only and --dry_run")
    parser.add_argument("--compile_only", action="store_true")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--out", type=Path, help="append to DIR/tune.jsonl")
    args = parser.parse_args(argv)
    from nanogpt_kernels import launch

    named: dict[str, list[dict[str, Any]]] = json.loads(args.rows.read_text()) if args.rows else {}
    for name in (*args.launch_ops, *named):
        if name not in launch.TABLE:
            hint = did_you_mean(name, launch.TABLE)
            raise ConfigError(f"unknown launch op {name!r}{hint}", expected=", ".join(launch.TABLE))
    offline, dtype = args.dry_run or args.compile_only, getattr(torch, args.dtype)
    arch = args.arch if offline else launch.architecture(machine.require_cuda("bench/tune.py"))
    wanted = [(name, args.size) for name in args.launch_ops or named or (() if args.worst else launch.TABLE)]
    wanted += worst(args.worst, args.worst_ops, arch, dtype) if args.worst else []
    lines = machine.Lines(args.out and args.out / "tune.jsonl", bench="tune", arch=arch, **machine.machine_facts())
    targets = []
    for name, size in wanted:
        try:
            targets.append(find(name, size, dtype, arch, args.p, not args.no_bias, args.within))
        except ConfigError as problem:
            if args.launch_ops:
                raise
            print(f"{name}: {problem.what}")
    pasteable, limit_s = [], min(args.limit_s, args.total_s / max(1, len(targets)))
    with contextlib.nullcontext() if args.dry_run else Compilers() as pool:
        for target in targets:
            B, T, C = target.at.shape.B, target.at.shape.T, target.at.shape.C
            print(f"{target.launch_op} by {target.op} {target.mode}, B={B} T={T} C={C} {args.dtype}, sm_{arch}")
            mine = named.get(target.launch_op, [])
            chosen = [moved(target.present, changes) for changes in mine]
            around = [
                target.present,
                *itertools.islice(chosen or candidates(target.launch_op, target.present), args.most),
            ]
            if pool is None:
                print("\n".join(f"  {shown(row)}" for row in around))
            elif args.compile_only:
                compile_rows(pool, target, around, time.monotonic() + limit_s, lines)
            else:
                found = (
                    search(target, limit_s, args.most, pool, lines)
                    if not mine
                    else compare(target, mine, limit_s, pool, lines)
                )
                pasteable.append(f"# {target.launch_op}\n{found}")
                print(pasteable[-1], flush=True)
    if pasteable:
        print("\nrows for nanogpt_kernels/launch_rows.py\n" + "\n".join(pasteable))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
