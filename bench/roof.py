"""The roof of this machine, measured: what a copy moves and what matrix products reach, beside the data sheet.

    python bench/roof.py [--device cuda|cpu] [--dtype NAME ...] [--config gpt2_124m] [--seconds S] [--out DIR]

In order of importance, until the seconds are up: a copy much larger than any cache (read and written bytes counted),
one square product (8192^3, on a CPU 1024^3), the products of the config's layers at its micro-batch (forward, and those
of both gradients, in the layouts that a linear layer has), and a sweep of shapes. The best of all products is the roof
that a step is held against: 8192^3 is not the fastest shape there is. On random data: zeros draw less power and run
faster. What was left out has a row with the reason.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import harness
import machine
import torch
from measured_roof import copying
from torch import Tensor
from work import Work

from nanogpt_fast import timing
from nanogpt_fast.command import run_command
from nanogpt_fast.data.dataset import read_meta
from nanogpt_fast.errors import ConfigError, DataError
from nanogpt_fast.gpus import GPUS
from nanogpt_fast.hardware import GEMM_SIZE, cpu_multiplies, peak_flops
from nanogpt_fast.settings.config import GPTConfig

DTYPES = ("bfloat16", "float16", "float32")
SECONDS = {"cuda": 15.0, "cpu": 15.0}
CONFIG = {"cuda": "gpt2_124m", "cpu": "shakespeare_char_cpu"}  # whose products are timed by default
ROUNDS = {"cuda": 10, "cpu": 5}
COPY_BYTES = 2 << 30
COPY_LEAST = 256 << 20  # on a CPU; else 8 times its cache


def _cube(edge: int) -> tuple[int, int, int]:
    return edge, edge, edge


SWEEP = {  # [M, K, N]
    "cuda": [(2048, 13312, 2048), _cube(4096), _cube(16384), (2048, 12288, 2048), (2048, 16384, 2048),
             (4096, 13312, 2048), (2048, 13312, 4096), (4096, 8192, 4096), _cube(6144), (8192, 4096, 8192),
             (8192, 16384, 8192), _cube(12288)],
    "cpu": [_cube(512), _cube(2048), (1024, 2048, 1024), (512, 4096, 512), (2048, 512, 2048), (256, 1024, 1024)],
}  # fmt: skip


# ---- what others take ----


@dataclass
class Roof:
    """Of one machine and dtype; None: not measured. model_tflops: {"qkv forward": TFLOP/s, ...}."""

    copy_gbps: float | None = None
    best_tflops: float | None = None
    square_tflops: float | None = None
    model_tflops: dict[str, float] = field(default_factory=dict)
    dtype: str = ""

    def floor_ms(self, work: Work, in_cache: bool = False) -> tuple[float, str] | None:
        """(milliseconds, "flops" or "bytes", whichever binds) that the work takes at these rates; None where one that
        it needs is unknown. in_cache: its bytes never reach the memory, so that they set no floor."""
        moved = 0.0 if in_cache else work.bytes
        needed = {
            "flops": (work.flops, (self.best_tflops or 0.0) * 1e12),
            "bytes": (moved, (self.copy_gbps or 0.0) * 1e9),
        }
        needed = {name: pair for name, pair in needed.items() if pair[0] > 0.0}
        if not needed or not all(rate for _, rate in needed.values()):
            return None
        seconds = {name: amount / rate for name, (amount, rate) in needed.items()}
        binding = max(seconds, key=lambda name: seconds[name])
        return seconds[binding] * 1e3, binding


def read(where: Path | Iterable[dict[str, Any]], dtype: str | None = None) -> Roof:
    """The roof out of roof.jsonl (a folder that has one, the file itself, or its rows): of the machine that the last
    row names, each shape's last figure. dtype: of the products, by default the last square one's. ConfigError where
    there is no such file, DataError where it has no figure."""
    path = None
    if isinstance(where, Path):
        path = where / "roof.jsonl" if where.is_dir() else where
        if not path.is_file():
            raise ConfigError("there is no measured roof", where=str(path), hint="python bench/roof.py --out DIR")
        where = machine.read_lines(path)
    rows = [row for row in where if row.get("bench") == "roof" and row.get("status") == "ok"]
    if not rows:
        raise DataError(
            "no figure of a roof was found", where=str(path or "rows"), hint="python bench/roof.py --out DIR"
        )
    rows = [row for row in rows if _machine(row) == _machine(rows[-1])]
    products = [row for row in rows if row["what"] == "gemm"]
    ordered = sorted(products, key=lambda row: row["of"] == "square")  # stable: the last square one comes last
    of_dtype: str = dtype or (ordered[-1]["dtype"] if ordered else "")
    last = {(row["of"], row["name"]): row["tflops"] for row in products if row["dtype"] == of_dtype}
    return Roof(
        copy_gbps=next((row["gbps"] for row in reversed(rows) if row["what"] == "copy"), None),
        best_tflops=max(last.values(), default=None),
        square_tflops=next((tflops for (of, _), tflops in last.items() if of == "square"), None),
        model_tflops={name: tflops for (of, name), tflops in last.items() if of == "model"},
        dtype=of_dtype,
    )


def _machine(row: dict[str, Any]) -> tuple[Any, Any]:
    return row.get("device"), row.get("gpu") or row.get("cpu")


# ---- what is measured ----


@dataclass(frozen=True)
class Item:
    """One figure. amount: bytes or FLOPs of a call; sheet: the data sheet's rate in GB/s or TFLOP/s; make: a call."""

    what: str  # copy, gemm
    name: str
    facts: dict[str, Any]
    amount: float
    sheet: float | None
    make: Callable[[], Callable[[], Any]]


def copy_item(device: torch.device, byte_count: int) -> Item:
    """A copy of so many bytes within the device's memory."""
    make = partial(copying, device, byte_count)
    sheet = GPUS[name].gbps if (name := _gpu_name(device)) in GPUS else None
    return Item("copy", "copy", {"bytes": byte_count}, 2.0 * byte_count, sheet, make)


def product_item(device: torch.device, dtype: torch.dtype, of: str, name: str, shape: tuple[int, int, int]) -> Item:
    """[M, K] times [K, N] in the layout of the pass that ends `name`: forward multiplies by w [N, K] transposed (so do
    products of no layer), dgrad by w as it lies, wgrad multiplies dy [K, M] transposed."""
    M, K, N = shape

    def make() -> Callable[[], Any]:
        normal = lambda *size: torch.randn(*size, device=device, dtype=dtype)
        a: Tensor = normal(K, M).t() if name.endswith("wgrad") else normal(M, K)
        b: Tensor = normal(K, N) if name.endswith(("dgrad", "wgrad")) else normal(N, K).t()
        c = torch.empty(M, N, device=device, dtype=dtype)
        return lambda: torch.mm(a, b, out=c)

    peak = peak_flops(_gpu_name(device), _name(dtype))
    facts = {"of": of, "dtype": _name(dtype), "shape": list(shape)}
    return Item("gemm", name, facts, 2.0 * M * K * N, peak and peak[0] / 1e12, make)


def model_products(shape: GPTConfig, batch_size: int) -> dict[str, tuple[int, int, int]]:
    """{"qkv forward": [M, K, N], ...} of every linear layer at a micro-batch, and of its two gradients."""
    M, C = batch_size * shape.block_size, shape.n_embd
    layers = {
        "qkv": (C, 3 * C),
        "proj": (C, C),
        "fc": (C, 4 * C),
        "mlp proj": (4 * C, C),
        "head": (C, shape.vocab_size),
    }
    found: dict[str, tuple[int, int, int]] = {}
    for name, (into, out) in layers.items():
        found |= {f"{name} forward": (M, into, out), f"{name} dgrad": (M, out, into), f"{name} wgrad": (out, M, into)}
    return found


def items(device: torch.device, dtypes: list[torch.dtype], shape: GPTConfig | None, batch_size: int) -> Iterator[Item]:
    """In order of importance. Without a shape there are no products of a model."""
    on_cpu, edge = device.type == "cpu", GEMM_SIZE[device.type]
    yield copy_item(device, max(COPY_LEAST, 8 * machine.cache_bytes()) if on_cpu else COPY_BYTES)
    for dtype in dtypes:
        yield product_item(device, dtype, "square", f"{edge}^3", _cube(edge))
    for dtype in dtypes:
        for name, sizes in model_products(shape, batch_size).items() if shape else ():
            yield product_item(device, dtype, "model", name, sizes)
    for dtype in dtypes:
        for sizes in SWEEP[device.type]:
            yield product_item(device, dtype, "sweep", "x".join(map(str, sizes)), sizes)


def measure_item(item: Item, device: torch.device, rounds: int) -> dict[str, float]:
    """Median and quartiles of its time in ms, and its rate."""
    call = item.make()
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    arm = timing.make_arm([call], pool, device_type=device.type)
    found = harness.summary(timing.interleaved({"": arm}, rounds)[""])
    unit, scale = ("gbps", 1e6) if item.what == "copy" else ("tflops", 1e9)
    rate = item.amount / found["ms"] / scale
    sheet = {"sheet": item.sheet, "of_sheet": rate / item.sheet} if item.sheet else {}
    return {**found, unit: rate, **sheet}


def measure(
    device: torch.device, todo: Iterable[Item], seconds: float, write: Callable[..., None] = lambda **_: None
) -> list[dict[str, Any]]:
    """The rows of a roof, each handed to `write` at once; what the seconds do not allow is a row that says so."""
    deadline, rounds = time.monotonic() + seconds, ROUNDS[device.type]
    rows: list[dict[str, Any]] = []
    rates: dict[str, float] = {}  # by kind and dtype, an hour of a slow machine is not spent on one product
    for item in todo:
        kind, left = f"{item.what} {item.facts.get('dtype')}", deadline - time.monotonic()
        needed = (rounds + 3) * item.amount / rates[kind] if kind in rates else 0.0
        row: dict[str, Any] = {"what": item.what, "name": item.name, **item.facts}
        if left <= 0.0:
            row["status"] = "no time left"
        elif needed > left:
            row["status"] = f"left out: about {needed:.0f} s at the rate so far, {left:.0f} s left"
        else:
            try:
                row |= {"status": "ok", **measure_item(item, device, rounds)}
                rates[kind] = max(rates.get(kind, 0.0), item.amount / row["ms"] * 1e3)
            except (torch.OutOfMemoryError, RuntimeError) as problem:  # on a CPU memory ends as a RuntimeError
                row["status"] = f"failed: {str(problem).splitlines()[0][:160]}"
        rows.append(row)
        write(**row)
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


# ---- the command ----


def default_dtypes(device: torch.device) -> list[torch.dtype]:
    """bfloat16 on a GPU that has it, else float16; float32 on a CPU, and bfloat16 where it multiplies that natively."""
    if device.type == "cuda":
        return [torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16]
    return [torch.float32, *([torch.bfloat16] if cpu_multiplies(torch.bfloat16) else [])]


def chosen_dtypes(names: list[str] | None, device: torch.device) -> list[torch.dtype]:
    """ConfigError for one that this CPU would multiply element by element."""
    for name in names or []:
        if device.type == "cpu" and cpu_multiplies(getattr(torch, name)) is False:
            raise ConfigError(
                f"this CPU does not multiply {name}: one product would take seconds", hint="--dtype float32"
            )
    return [getattr(torch, name) for name in names] if names else default_dtypes(device)


def model_of(name: str, batch_size: int | None, vocab_size: int | None) -> tuple[GPTConfig, int]:
    """(the model of configs/NAME.toml with the vocabulary that a run would have, its micro-batch)."""
    from step import configuration  # which imports this file's neighbours, and may come to import this one

    config = configuration(name)
    meta = read_meta(Path(config.data.data_dir) / config.data.dataset)
    words = vocab_size or config.model.vocab_size or (meta.vocab_size if meta else 50304)
    return config.shape(words), batch_size or config.data.batch_size


def roof_of(
    device: torch.device,
    names: list[str] | None,
    config: str | None,
    seconds: float,
    lines: machine.Lines,
    **sizes: Any,
) -> list[dict[str, Any]]:
    """Measure everything, as rows that are also lines; config None: no products of a model. sizes: batch_size,
    vocab_size, where they are not the config's."""
    shape, batch_size = model_of(config, sizes.get("batch_size"), sizes.get("vocab_size")) if config else (None, 0)
    facts = {"config": config, "batch_size": batch_size, "vocab_size": shape.vocab_size} if shape else {}
    write = lambda **row: lines.write(**(facts if row.get("of") == "model" else {}), **row)
    if device.type == "cuda":
        wake(device)
    return measure(device, items(device, chosen_dtypes(names, device), shape, batch_size), seconds, write)


def wake(device: torch.device, seconds: float = 0.3) -> None:
    """Keep a GPU busy until its clocks are up: of an idle H100 a copy took 1.21 times as long (2.44 and 2.95 TB/s)."""
    x, began = torch.randn(4096, 4096, device=device), time.perf_counter()
    while time.perf_counter() - began < seconds:
        torch.mm(x, x)
        torch.cuda.synchronize(device)


def flops_in_words(tflops: float) -> str:
    return f"{tflops:.4g} TFLOP/s" if tflops >= 1.0 else f"{tflops * 1e3:.4g} GFLOP/s"


def shown(rows: list[dict[str, Any]]) -> str:
    """A table, and below it what was left out and why."""
    cells = []
    for row in (row for row in rows if row["status"] == "ok"):
        rate = f"{row['gbps']:.4g} GB/s" if row["what"] == "copy" else flops_in_words(row["tflops"])
        sheet = f"{row['of_sheet']:.1%} of {row['sheet']:g}" if "sheet" in row else "n/a"
        size = f"{row['bytes'] / 1e9:.2g} GB" if row["what"] == "copy" else " ".join(map(str, row["shape"]))
        spread = f"{row['q1']:.4g}-{row['q3']:.4g}"
        cells.append([row["name"], row.get("dtype", ""), size, row["ms"], spread, rate, sheet])
    text = [machine.table(["", "dtype", "M K N", "ms", "quartiles", "rate", "of data sheet"], cells)] if cells else []
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            reasons.setdefault(row["status"], []).append(f"{row['name']} {row.get('dtype', '')}".strip())
    return "\n".join([*text, *(f"{why}: {', '.join(names)}" for why, names in reasons.items())])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SWEEP), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: what the device is fast in")
    parser.add_argument("--config", help=f"whose products are timed: {CONFIG}")
    parser.add_argument("--batch_size", type=int, help="sequences a micro-batch, instead of the config's")
    parser.add_argument("--vocab_size", type=int, help="instead of the config's or its prepared dataset's")
    parser.add_argument("--seconds", type=float, help=f"begin nothing after so long: {SECONDS}")
    parser.add_argument("--out", type=Path, help="append to DIR/roof.jsonl")
    args = parser.parse_args(argv)
    for name in ("batch_size", "vocab_size", "seconds"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"--{name} must be above 0", found=str(value))
    device = machine.require_cuda("bench/roof.py --device cuda") if args.device == "cuda" else torch.device("cpu")
    config = args.config or CONFIG[args.device]
    lines = machine.Lines(args.out and args.out / "roof.jsonl", bench="roof", **machine.machine_facts(args.device))
    rows = roof_of(device, args.dtype, config, args.seconds or SECONDS[args.device], lines,
                   batch_size=args.batch_size, vocab_size=args.vocab_size)  # fmt: skip
    print(f"{machine.machine_facts(args.device).get('gpu') or machine.cpu_facts()['cpu']}; products of {config}")
    print(shown(rows))
    return 0 if any(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
