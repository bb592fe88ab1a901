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
    BUDGET        more registers, shared memory or spills than profiling/budgets.toml says (--update-budgets accepts)

and if a row of nanogpt_kernels/launch_rows.py was taken by no call. Columns: regs a thread; spill in bytes a thread;
smem in bytes a block; blocks an SM holds at once, and their share of its warps; product instructions in the PTX; widest
global load/store of a thread in bytes.
"""

import argparse
import collections
import dataclasses
import json
import os
import sys
import tomllib
import warnings
from pathlib import Path

from aot_compile import SYSTEM_SHARED, TRITON_MINOR, Compiled, compile_all
from kernel_calls import Case, cases
from nanogpt_kernels import launch
from nanogpt_kernels.ahead import distinct
from nanogpt_kernels.launch import Recording
from nanogpt_kernels.launch_rows import ARCHITECTURES, TABLE, Row

WITHOUT_WGMMA = {"_cached_attention_kernel"}  # a few new tokens fill no tile of 64 rows, and memory is its bound
BUDGETS = Path(__file__).with_name("budgets.toml")


def blocks_held(c: Compiled, arch: int) -> int:
    """How many blocks of a kernel run on an SM at once. Registers are given out by 256 a warp, shared memory by 128
    bytes (CUDA occupancy calculator)."""
    on = ARCHITECTURES[arch]
    warps = on.registers // (-(-c.registers * 32 // 256) * 256) // 4 * 4
    by_shared = on.shared_kb * 1024 // (-(-c.shared // 128) * 128 + SYSTEM_SHARED)
    return min(on.blocks, on.warps // c.num_warps, warps // c.num_warps, by_shared)


# {Triton's minor: {"sm_90": {kernel: [registers, shared, spilled]}}}
Budgets = dict[str, dict[str, dict[str, list[int]]]]


def record(chosen: list[Case], arch: int) -> Recording:
    """The launches of some cases."""
    with launch.recording(arch) as recording:
        for case in chosen:
            try:
                case.run()
            except Exception as error:
                raise RuntimeError(f"{case.op} ({case.label}) cannot be recorded for sm_{arch}: {error}") from error
    return recording


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


def verdict(c: Compiled, arch: int, budget: dict[str, list[int]] | None) -> str:
    """The rules that the kernel breaks, or "ok"."""
    broken = c.misfits(arch)
    if ARCHITECTURES[arch].wgmma and c.dots16 and not c.products["wgmma"] and c.kernel not in WITHOUT_WGMMA:
        broken.append("NO WGMMA")
    if c.serialised:
        broken.append("SERIAL WGMMA")
    if c.wraps:
        broken.append("WRAPS " + "; ".join(c.wraps))
    if budget is not None:
        allowed = budget.get(budget_key(c))
        if allowed is None:
            broken.append("BUDGET has no entry")
        else:
            named = zip(("registers", "shared memory", "spills"), allowed, (c.registers, c.shared, c.spilled))
            broken += [f"BUDGET {what} {new} > {old}" for what, old, new in named if new > old]
    return ", ".join(broken) or "ok"


# ---- budgets ----


def budget_key(c: Compiled) -> str:
    return f"{c.kernel} {c.types}"


def read_budgets() -> Budgets:
    return tomllib.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}


def write_budgets(budgets: Budgets) -> None:
    lines = [
        "# The most that any shape of a kernel takes, by the types of its pointers: [registers a thread, bytes of",
        "# shared memory a block, bytes spilled a thread].",
        "# Written by `python profiling/resources.py --arch ... --update-budgets`.",
    ]
    for minor in sorted(budgets):
        for arch in sorted(budgets[minor], key=lambda name: int(name[3:])):
            lines += ["", f'["{minor}".{arch}]']
            lines += [f'"{kernel}" = {numbers}' for kernel, numbers in sorted(budgets[minor][arch].items())]
    BUDGETS.write_text("\n".join(lines) + "\n")


def measured_budgets(compiled: list[Compiled]) -> dict[str, list[int]]:
    most: dict[str, list[int]] = {}
    for c in compiled:
        measured = c.registers, c.shared, c.spilled
        most[budget_key(c)] = [max(pair) for pair in zip(measured, most.get(budget_key(c), (0, 0, 0)))]
    return most


# ---- printing ----


COLUMNS = ["op", "kernel", "types", "warps", "stages", "regs", "spill", "smem", "blocks", "warps", "products", "ld/st",
           "verdict", "constexprs", ""]  # fmt: skip
NUMERIC = range(3, 10)


def print_table(compiled: list[Compiled], verdicts: list[str], arch: int) -> None:
    rows = []
    for c, said in sorted(zip(compiled, verdicts), key=lambda pair: (pair[0].op, pair[0].kernel, pair[0].constexprs)):
        held = blocks_held(c, arch)
        share = f"{held * c.num_warps / ARCHITECTURES[arch].warps:.0%}"
        products = " ".join(f"{n} {kind}" for kind, n in c.products.items() if n) or "-"
        numbers = (c.num_warps, c.num_stages, c.registers, c.spilled, c.shared, held, share)
        name = c.kernel.strip("_").removesuffix("_kernel")
        accesses = f"{c.load_bytes}/{c.store_bytes}"
        rows.append((c.op, name, c.types, *map(str, numbers), products, accesses, said, c.constexprs))
    alike = collections.Counter(rows)  # specialised apart, for instance by a V that 16 does not divide
    lines = [COLUMNS] + [[*row, f"x{n}" if n > 1 else ""] for row, n in alike.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = [cell.rjust(w) if i in NUMERIC else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))]
        print("  ".join(cells).rstrip())


def examine(arch: int, args: argparse.Namespace, budgets: Budgets) -> tuple[list[Compiled], list[str], list[str]]:
    """(compiled kernels, a verdict each, rows not taken) of one architecture."""
    chosen = [case for case in cases() if (not args.op or case.op in args.op) and (case.core or not args.core)]
    recording = record(chosen, arch)
    groups = distinct(recording, arch)
    print(f"sm_{arch}, Triton {TRITON_MINOR}: {len(chosen)} calls, {len(recording)} launches, {len(groups)} kernels; "
          f"{ARCHITECTURES[arch].block_shared // 1024} KB of shared memory a block\n", flush=True)  # fmt: skip
    compiled = compile_all(groups, arch, args.jobs)
    if args.update_budgets:
        known = budgets.setdefault(TRITON_MINOR, {})
        known[f"sm_{arch}"] = (known.get(f"sm_{arch}", {}) if args.op else {}) | measured_budgets(compiled)
        write_budgets(budgets)
    budget = budgets.get(TRITON_MINOR, {}).get(f"sm_{arch}")
    verdicts = [verdict(c, arch, budget) for c in compiled]
    print_table(compiled, verdicts, arch)
    if budget is None:
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
    parser.add_argument("--update-budgets", action="store_true", help="take what was measured as the new budgets")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: nothing compiles under the interpreter; unset it")
    if args.update_budgets and args.core:
        parser.error("--update-budgets needs every shape: leave --core out")
    warnings.simplefilter("ignore")
    budgets, found, wrong = read_budgets(), [], []
    for arch in (int(name[3:]) for name in args.arch):
        compiled, verdicts, rows = examine(arch, args, budgets)
        found += [dataclasses.asdict(c) | {"arch": arch, "verdict": v} for c, v in zip(compiled, verdicts)]
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
