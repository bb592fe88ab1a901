"""roofline.py's --compiled: what the machine code of a step's kernels predicts of its time, beside what was measured.

Each Triton kernel by bounds.py; products by cuBLAS at the rate that a step's products reached on such a GPU, else at
the data sheet's; torch's own kernels, and those whose loops nobody counts, by their bytes. Kernels follow one another.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aot_compile import compile_all
from bounds import MEASURED, executed, largest, resident_warps, seconds
from measured_roof import sheet_roof
from nanogpt_kernels.ahead import distinct
from roofline import floor_of, print_beside
from step_launches import Launch, Launches

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.gpus import GPUS

BY_CUBLAS = ("nvjet", "cublas", "cutlass", "gemm", "splitK")


@dataclass(frozen=True)
class Expected:
    """Of one launch."""

    seconds: float
    bound: str


def from_code(found: Launches, arch: int, name: str) -> dict[Launch, Expected]:
    """Of the Triton launches whose loops are counted."""
    launch_of = {id(call): launch for launch, call in found.calls.items()}
    groups = distinct(list(found.calls.values()), arch)
    expected = {}
    for group, c in zip(groups, compile_all(groups, arch, count=range(len(groups)))):
        assert c.sass is not None
        for call in group:
            launch, done = launch_of[id(call)], executed(call, c.sass, c.num_warps)
            if done is not None:
                resident = resident_warps(c, math.prod(call.grid), arch)
                bound, needed = largest(seconds(done, resident, name, launch.work.bytes))
                expected[launch] = Expected(needed, bound)
    return expected


def from_work(launch: Launch, name: str) -> Expected:
    """By the FLOPs of a product, and by the bytes of anything."""
    measured, gpu = MEASURED.get(name), GPUS[name]
    memory = launch.work.bytes / (measured.bandwidth if measured else gpu.gbps * 1e9)
    products = launch.work.flops / (measured.products if measured else gpu.tflops * 1e12)
    of_product = launch.kind == "product" and products > memory
    return Expected(products, "products") if of_product else Expected(memory, "memory")


# ---- what was measured ----


def rows_of(file: str, name: str, batch_size: int) -> list[dict[str, Any]]:
    """The rows of a results file that are of our eager step on that GPU, at so many sequences."""
    try:
        rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(
            "no results file", where=file, hint="one of bench/results/, as bench/run.py writes"
        ) from error
    found = [r for r in rows if r.get("arm") == "triton" and r.get("gpu") == name and r.get("batch_size") == batch_size]
    if not any(r["bench"] == "kernels" for r in found):
        raise ConfigError(
            f"no kernels of a step of {batch_size} sequences on {name}", where=file, hint="--batch_size=64"
        )
    return found


def kind_of(row: dict[str, Any]) -> tuple[str, str]:
    """(kind, name) as a Launch has them, of a measured kernel; products and torch's kernels share a line each."""
    if row["launch_op"]:
        return "Triton", row["launch_op"]
    return ("product" if any(word in row["kernel"] for word in BY_CUBLAS) else "torch"), ""


def measured_ms(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = defaultdict(float)
    for row in rows:
        if row["bench"] == "kernels":
            found[kind_of(row)] += row["ms"]
    return found


# ---- the table ----


def show_compiled(found: Launches, micro_steps: int, arch: int, name: str, batch_size: int, file: str | None) -> None:
    """Print a row a kind of launch, dearest first."""
    roof = sheet_roof(name, "bfloat16")
    assert roof is not None, name
    rows = rows_of(file, name, batch_size) if file else []
    measured, by_code = measured_ms(rows), from_code(found, arch, name)
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    takes: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for launch, times in found.step(micro_steps).items():
        key = launch.kind, launch.name if launch.kind == "Triton" else ""
        expected = by_code.get(launch) or from_work(launch, name)
        for i, n in enumerate((1, floor_of(launch.work, roof)[0] * 1e3, expected.seconds * 1e3)):
            sums[key][i] += n * times
        takes[key][expected.bound] += expected.seconds * times
    table, totals = [], [0.0, 0.0, 0.0, 0.0]
    for key, (times, floor, ms) in sorted(sums.items(), key=lambda pair: -pair[1][2]):
        seen = measured.get(key, 0.0)
        bound = max(takes[key], key=lambda b: takes[key][b])
        table.append(_cells(": ".join(filter(None, key)), times, floor, ms, seen, bound))
        totals = [a + b for a, b in zip(totals, (times, floor, ms, seen))]
    times, floor, ms, seen = totals
    table.append(_cells("a step", times, floor, ms, seen, ""))
    print(f"\nas compiled for sm_{arch}; {_rates(name)}\n")
    print_beside(["of a step", "launches", "floor ms", "as compiled ms", "bound", "measured ms", "error"], table)
    in_a_row = [r["ms_s"] * 1e3 for r in rows if r["bench"] == "step" and r.get("how") == "alone"]
    if in_a_row:
        print(f"\nsteps in a row took {in_a_row[0]:.0f} ms; the kernels above are of one profiled step")


def _cells(what: str, times: float, floor: float, ms: float, seen: float, bound: str) -> list[str]:
    """Milliseconds a step; floor and error beside what was measured."""
    error = [f"{seen:.2f}", f"{ms / seen - 1:+.0%}"] if seen else ["-", "-"]
    return [what, f"{times:,.0f}", f"{floor:.2f}", f"{ms:.2f}", bound, *error]


def _rates(name: str) -> str:
    if (at := MEASURED.get(name)) is None:
        return f"{name} has not been timed: bounds at the data sheet's rates, nothing for what hides badly"
    return (
        f"as {name} was timed: {at.clock / 1e6:.0f} MHz, products {at.products / 1e12:.0f} TFLOP/s, "
        f"{at.bandwidth / 1e12:.2f} TB/s, {at.warp_clocks:g} clocks from an instruction of a warp to its next"
    )
