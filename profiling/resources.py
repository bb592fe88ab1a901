"""What every Triton kernel takes of a GPU, compiled here without one: registers, spills, shared memory, instructions.

    python profiling/resources.py [--arch sm_90 ...] [--op NAME ...] [--core] [--json FILE] [--update-budgets]

It needs both packages: `pip install -e .`, or PYTHONPATH=.:kernels from the repository's root; no GPU. Every public op
is called forward and backward on tensors without data at the shapes the product uses (kernel_calls.py), and every
distinct kernel is compiled once, as a launch would compile it. The exit code is 1 if any line breaks a rule:

    SPILL         registers spill to memory: at all on sm_90, more than 64 bytes a thread elsewhere
    SMEM          more shared memory a block than the architecture has (such a kernel compiles, and fails when launched)
    TMEM          more than the 512 columns of tensor memory that sm_100 has
    NO WGMMA      a product of 16-bit tiles on sm_90 without wgmma: half the rate at best
    SERIAL WGMMA  ptxas makes every wgmma wait for the one before it
    WRAPS         a 32-bit integer on the way to an address can overflow in a tensor of more than 2^31 elements
    BUDGET        more registers, shared memory or spills than profiling/budgets.toml says, or, of a kernel in a
                  training step of GPT-2 124M, more instructions (--update-budgets accepts)

and if a row of nanogpt_kernels/launch_rows.py was taken by no call. Columns: regs a thread; spill in bytes a thread;
smem in bytes a block; blocks an SM holds at once, and their share of its warps; instructions of a warp, of what every
iteration of its hot loop passes (sass.py) and all; for one block's iteration of that loop, or for the whole block where
there is none, the clocks that an SM's tensor cores, shared memory, special functions, FP32 lanes and issue slots each
need, and memory for its share of the operands at the data sheet's rate (bounds.py), and the longest of them; product
instructions in the PTX; widest global load/store of a thread in bytes. "-": not known, or, with --core, not counted.
"""

import argparse
import collections
import json
import math
import os
import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path

from aot_compile import TRITON_MINOR, Compiled, compile_all
from bounds import BOUNDS, CARDS, an_iteration, blocks_held, largest
from kernel_calls import Case, cases
from nanogpt_kernels import launch
from nanogpt_kernels.ahead import distinct
from nanogpt_kernels.launch import Call, Recording
from nanogpt_kernels.launch_rows import ARCHITECTURES, TABLE, Row

WITHOUT_WGMMA = {"_cached_attention_kernel"}  # a few new tokens fill no tile of 64 rows, and memory is its bound
BUDGETS = Path(__file__).with_name("budgets.toml")


# {Triton's minor: {"sm_90": {kernel: [registers, shared, spilled]}, "sm_90 instructions": {kernel: [hot loop, all]}}}
Budgets = dict[str, dict[str, dict[str, list[int]]]]


def record(chosen: list[Case], arch: int) -> tuple[Recording, set[int]]:
    """The launches of some cases, and the ids of those that a training step has (Case.step)."""
    of_step = set[int]()
    with launch.recording(arch) as recording:
        for case in chosen:
            before = len(recording)
            try:
                case.run()
            except Exception as error:
                raise RuntimeError(f"{case.op} ({case.label}) cannot be recorded for sm_{arch}: {error}") from error
            of_step |= {id(call) for call in recording[before:]} if case.step else set()
    return recording, of_step


def reachable(op: str, row: Row, arch: int) -> bool:
    """Whether sm_arch takes the row for any size: unless a row of a later architecture covers all it serves."""
    covering = [r.arch for r in TABLE[op] if r.arch <= arch and r.itemsize >= row.itemsize and r.up_to >= row.up_to]
    return row.arch == max(covering, default=0)


def untaken(recording: Recording, arch: int) -> list[str]:
    """Rows of launch.TABLE for sm_arch that no call took."""
    taken = {id(row) for _, row in recording.rows}
    missing = [(op, row) for op, rows in TABLE.items() for row in rows if reachable(op, row, arch)]
    return [
        f"{op}: no call takes the row of sm_{row.arch}, itemsize={row.itemsize}, up_to={row.up_to}, {row.blocks}"
        for op, row in missing
        if id(row) not in taken
    ]


LIMITED = ("registers", "shared memory", "spills")
INSTRUCTIONS = ("instructions in its loop", "instructions")


def over(budget: dict[str, list[int]] | None, c: Compiled, names: tuple[str, ...], found: list[int]) -> list[str]:
    """What of `found` is over the budget of such a kernel; without budgets nothing is."""
    if budget is None:
        return []
    if (allowed := budget.get(budget_key(c))) is None:
        return [f"BUDGET has no entry for its {names[-1]}" if names is INSTRUCTIONS else "BUDGET has no entry"]
    return [f"BUDGET {what} {new} > {old}" for what, old, new in zip(names, allowed, found) if new > old]


def verdict(
    c: Compiled, arch: int, budget: dict[str, list[int]] | None, instructions: dict[str, list[int]] | None = None
) -> str:
    """The rules that the kernel breaks, or "ok". instructions: their budgets, for a kernel of a training step."""
    broken = c.misfits(arch)
    if ARCHITECTURES[arch].wgmma and c.dots16 and not c.products["wgmma"] and c.kernel not in WITHOUT_WGMMA:
        broken.append("NO WGMMA")
    if c.serialised:
        broken.append("SERIAL WGMMA")
    if c.wraps:
        broken.append("WRAPS " + "; ".join(c.wraps))
    broken += over(budget, c, LIMITED, [c.registers, c.shared, c.spilled])
    if c.sass is not None:
        broken += over(instructions, c, INSTRUCTIONS, c.sass.budget)
    return ", ".join(broken) or "ok"


# ---- budgets ----


def budget_key(c: Compiled) -> str:
    return f"{c.kernel} {c.types}"


def read_budgets() -> Budgets:
    return tomllib.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}


def write_budgets(budgets: Budgets) -> None:
    lines = [
        "# The most that any shape of a kernel takes, by the types of its pointers: [registers a thread, bytes of",
        "# shared memory a block, bytes spilled a thread]. Instructions, of kernels in a training step of GPT-2 124M:",
        "# [what every iteration of the hot loop passes, 0 without one; all of the kernel], of a warp.",
        "# Written by `python profiling/resources.py --arch ... --update-budgets`.",
    ]
    for minor in sorted(budgets):
        for section in sorted(budgets[minor], key=lambda name: (int(name.split()[0][3:]), name)):
            quoted = f'"{section}"' if " " in section else section
            lines += ["", f'["{minor}".{quoted}]']
            lines += [f'"{kernel}" = {numbers}' for kernel, numbers in sorted(budgets[minor][section].items())]
    BUDGETS.write_text("\n".join(lines) + "\n")


def most(compiled: list[Compiled], figures: Callable[[Compiled], list[int]]) -> dict[str, list[int]]:
    """The largest of each figure among the kernels that share a line of the budgets."""
    found: dict[str, list[int]] = {}
    for c in compiled:
        numbers, key = figures(c), budget_key(c)
        found[key] = [max(pair) for pair in zip(numbers, found.get(key, numbers))]
    return found


def measured_budgets(compiled: list[Compiled], of_step: list[bool], arch: int) -> dict[str, dict[str, list[int]]]:
    """{section: {kernel: figures}} as they are now."""
    stepping = [c for c, marked in zip(compiled, of_step) if marked]
    return {
        f"sm_{arch}": most(compiled, lambda c: [c.registers, c.shared, c.spilled]),
        f"sm_{arch} instructions": most(stepping, lambda c: c.sass.budget if c.sass else []),
    }


# ---- printing ----


COLUMNS = ["op", "kernel", "types", "warps", "stages", "regs", "spill", "smem", "blocks", "warps", "loop", "all",
           *BOUNDS, "memory", "bound", "products", "ld/st", "verdict", "constexprs", ""]  # fmt: skip
NUMERIC = range(3, 18)


def print_table(compiled: list[Compiled], groups: list[list[Call]], verdicts: list[str], arch: int) -> None:
    rows = []
    lines = zip(compiled, groups, verdicts)
    for c, (call, *_), said in sorted(lines, key=lambda line: (line[0].op, line[0].kernel, line[0].constexprs)):
        held = blocks_held(c, arch)
        share = f"{held * c.num_warps / ARCHITECTURES[arch].warps:.0%}"
        products = " ".join(f"{n} {kind}" for kind, n in c.products.items() if n) or "-"
        numbers = (c.num_warps, c.num_stages, c.registers, c.spilled, c.shared, held, share)
        code = ["-"] * 9
        if c.sass is not None:
            clocks = an_iteration(call, c, c.sass, CARDS[arch])
            needed = ["-" if math.isnan(n) else f"{n:.0f}" for n in clocks.values()]
            code = [*map(str, c.sass.budget), *needed, largest(clocks)[0]]
        name = c.kernel.strip("_").removesuffix("_kernel")
        accesses = f"{c.load_bytes}/{c.store_bytes}"
        rows.append((c.op, name, c.types, *map(str, numbers), *code, products, accesses, said, c.constexprs))
    alike = collections.Counter(rows)  # specialised apart, for instance by a V that 16 does not divide
    shown = [COLUMNS] + [[*row, f"x{n}" if n > 1 else ""] for row, n in alike.items()]
    widths = [max(map(len, column)) for column in zip(*shown)]
    for line in shown:
        cells = [cell.rjust(w) if i in NUMERIC else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))]
        print("  ".join(cells).rstrip())


def examine(arch: int, args: argparse.Namespace, budgets: Budgets) -> tuple[list[Compiled], list[str], list[str]]:
    """(compiled kernels, a verdict each, rows not taken) of one architecture."""
    chosen = [case for case in cases() if (not args.op or case.op in args.op) and (case.core or not args.core)]
    recording, stepping = record(chosen, arch)
    groups = distinct(recording, arch)
    print(f"sm_{arch}, Triton {TRITON_MINOR}: {len(chosen)} calls, {len(recording)} launches, {len(groups)} kernels; "
          f"{ARCHITECTURES[arch].block_shared // 1024} KB of shared memory a block; clocks of {CARDS[arch]}\n",
          flush=True)  # fmt: skip
    of_step = [any(id(call) in stepping for call in group) for group in groups]
    count = [i for i, marked in enumerate(of_step) if marked or not args.core]
    compiled = compile_all(groups, arch, args.jobs, count)
    if args.update_budgets:
        known = budgets.setdefault(TRITON_MINOR, {})
        for section, found in measured_budgets(compiled, of_step, arch).items():
            kept = known.get(section, {}) if args.op else {}  # of an op's kernels other ops may have larger shapes
            if kept or found:
                known[section] = kept | {k: [max(pair) for pair in zip(n, kept.get(k, n))] for k, n in found.items()}
        write_budgets(budgets)
    known = budgets.get(TRITON_MINOR, {})
    limits, instructions = known.get(f"sm_{arch}"), known.get(f"sm_{arch} instructions")
    verdicts = [verdict(c, arch, limits, instructions if marked else None) for c, marked in zip(compiled, of_step)]
    print_table(compiled, groups, verdicts, arch)
    if limits is None or instructions is None:
        print(f"\nno budgets for Triton {TRITON_MINOR} on sm_{arch}: --update-budgets records them")
    return compiled, verdicts, [] if args.op else untaken(recording, arch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [f"sm_{arch}" for arch in ARCHITECTURES]
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=known, metavar="ARCH", help=", ".join(known))
    parser.add_argument("--op", nargs="+", metavar="NAME", choices=sorted({c.op for c in cases()}),
                        help=", ".join(sorted({c.op for c in cases()})))  # fmt: skip
    parser.add_argument("--core", action="store_true", help="fewer shapes: what the default tests compile")
    parser.add_argument("--jobs", type=int, help="processes to compile in (default: one a core)")
    parser.add_argument("--json", metavar="FILE", help="write the table there as well")
    parser.add_argument(
        "--update-budgets",
        action="store_true",
        help="take what was measured as the new budgets; with --op, only what is more",
    )
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: nothing compiles under the interpreter; unset it")
    if args.update_budgets and args.core:
        parser.error("--update-budgets needs every shape: leave --core out")
    warnings.simplefilter("ignore")
    budgets, found, wrong = read_budgets(), [], []
    for arch in (int(name[3:]) for name in args.arch):
        compiled, verdicts, rows = examine(arch, args, budgets)
        found += [
            vars(c) | {"sass": c.sass.budget if c.sass else None, "arch": arch, "verdict": v}
            for c, v in zip(compiled, verdicts)
        ]
        wrong += [f"sm_{arch} {budget_key(c)} ({c.constexprs}): {v}" for c, v in zip(compiled, verdicts) if v != "ok"]
        wrong += [f"sm_{arch} {row}" for row in rows]
        print()
    if args.json:
        report = {"triton": TRITON_MINOR, "kernels": found, "violations": wrong}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(wrong)} violations" + "".join(f"\n  {line}" for line in wrong) if wrong else "no violations")
    if any("BUDGET" in line for line in wrong):
        command = f"python profiling/resources.py --arch {' '.join(args.arch)} --update-budgets"
        print(f"budgets are in {BUDGETS.name}; to accept these: {command}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
