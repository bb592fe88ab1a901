"""Whole training steps of one model, an arm at a time: tokens/s and MFU, written as soon as each is known.

    python bench/step.py [--config gpt2_124m] [--arms triton reference+compile nanogpt+compile] [--profile] [--out DIR]

Arms are bench/step_arms.py's. Each starts from the same weights and first takes a step of two sequences, whose loss and
gradient norm must be the plain PyTorch ops'; then it is timed alone and its line is written (DIR/step.jsonl) before the
next arm is built. At the end those that ran are timed again in turn, because machines drift: only these lines compare
arms. --profile adds a table of the kernels in one step of the first arm (DIR/kernels.jsonl).

A step is --accumulation micro-batches of --batch_size sequences, 0.5M tokens of GPT-2 by default. An arm that runs out
of memory is tried again with half the batch and twice the accumulation, and says so.
"""

import argparse
import gc
import itertools
import os
import statistics
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import machine
import ops as op_bench
import step_arms
import torch
from step_arms import Arm, Missing, Setup
from torch.profiler import ProfilerActivity, profile

from nanogpt_fast.distributed import join, resolve_dtype
from nanogpt_fast.errors import ConfigError, did_you_mean, run_command
from nanogpt_fast.hardware import flops_per_token, resolve_peak
from nanogpt_fast.settings.config import Config

TINY = dict(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=96, batch_size=4)
SWITCHED = ("triton", "triton+atomic=true", "triton+fused=true")  # ours, and ours with each switch of its launch rows
HALVINGS = 3  # batch sizes tried: 64, 32, 16
CHECKED = 2  # sequences of the first step
SHOWN = 30  # kernels of the printed table


def configuration(name: str, **changes: Any) -> Config:
    """The preset with some fields changed. Read here, so that this needs none of the command line's packages."""
    path = machine.ROOT / "configs" / f"{name}.toml"
    if not path.is_file():
        known = [p.stem for p in path.parent.glob("*.toml")]
        raise ConfigError(
            f"there is no configs/{name}.toml{did_you_mean(name, known)}", expected=", ".join(sorted(known))
        )
    sections = tomllib.loads(path.read_text())
    preset = {key: value for section in sections.values() for key, value in section.items()}
    return Config().replace(**{**preset, **{key: value for key, value in changes.items() if value is not None}})


@dataclass
class Ready:
    """An arm that takes steps, and what is known of it."""

    arm: Arm
    batch: torch.Tensor
    facts: dict[str, Any]
    seconds: list[float] = field(default_factory=list)  # a step, alone
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def time(self, device: torch.device) -> float:
        """Wall time of one step until the device has finished: what a user waits."""
        began = time.perf_counter()
        self.arm(self.batch, next(self.numbers))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began


def first_step(arm: Arm, setup: Setup) -> tuple[float, float]:
    """(loss, gradient norm) of a step of a few sequences."""
    size = (1, CHECKED, setup.shape.block_size + 1)
    batch = torch.randint(setup.shape.vocab_size, size, generator=torch.Generator().manual_seed(1))
    result = arm(batch, 0)
    return float(result.loss), float(result.grad_norm)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def ready(name: str, setup: Setup, expected: tuple[float, float], warmup: int) -> Ready:
    """Build an arm, check its first step and run its next ones; ValueError for one that computes something else.

    Out of memory it is built again with half the batch, so that nothing of the failed try is left."""
    A, B = setup.config.data.gradient_accumulation_steps, setup.config.data.batch_size
    tried = [b for b in (B >> i for i in range(HALVINGS)) if b and B % b == 0]
    for b in tried:
        arm = found = None
        free(setup.world.device)
        size = (A * (B // b), b, setup.shape.block_size + 1)
        batch = torch.randint(setup.shape.vocab_size, size, generator=torch.Generator().manual_seed(0))
        facts: dict[str, Any] = {"batch_size": b, "accumulation": A * (B // b)}
        try:
            arm = step_arms.make_arm(name, setup)
            loss, norm = first_step(arm, setup)
            if not (abs(loss - expected[0]) <= 1e-2 * expected[0] and abs(norm - expected[1]) <= 5e-2 * expected[1]):
                raise ValueError(f"WRONG: loss {loss:.5g}, norm {norm:.5g}; plain PyTorch has {expected}")
            found = Ready(arm, batch, {**facts, "loss": loss, "grad_norm": norm})
            for _ in range(warmup):
                found.time(setup.world.device)
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory at B={b}", flush=True)
            continue
        if b < B:
            found.facts["note"] = f"out of memory at B={b * 2}"
        if setup.world.device.type == "cuda":
            found.facts["peak_gb"] = torch.cuda.max_memory_allocated(setup.world.device) / 1e9
        return found
    raise torch.OutOfMemoryError(f"out of memory at B={', '.join(map(str, tried))}")


def why(problem: Exception) -> str:
    """The status of an arm that did not get through."""
    if isinstance(problem, Missing):
        return f"missing: {problem}"
    return str(problem) if isinstance(problem, ValueError) and "WRONG" in str(problem) else (
        f"failed: {op_bench.first_line(problem)}"
    )  # fmt: skip


def rates(seconds: list[float], setup: Setup, peak: float | None) -> dict[str, float]:
    """Median and quartiles of a step, tokens/s, MFU by both counts."""
    found = {"ms_s" if name == "ms" else name: value for name, value in harness.summary(seconds).items()}
    found["tokens_per_s"] = setup.config.tokens_per_iter / found["ms_s"]
    flops = flops_per_token(setup.shape)
    return found | ({f"mfu_{k}": v * found["tokens_per_s"] / peak for k, v in flops.items()} if peak else {})


# ---- kernels ----


def kernels(run: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """[{"kernel", "calls", "ms", "share"}] of what the device did meanwhile, dearest first; on the CPU torch's ops."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as trace:
        run()
    rows = []
    for event in trace.key_averages():
        if (event.device_type.name == "CUDA") == on_gpu and not getattr(event, "is_user_annotation", False):
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            rows.append({"kernel": event.key, "calls": event.count, "ms": own / 1e3})
    total = sum(row["ms"] for row in rows) or 1.0
    rows = sorted(({**row, "share": row["ms"] / total} for row in rows), key=lambda row: -row["ms"])
    return [row for row in rows if row["ms"] > 0.0]


def launch_ops(arm: str, setup: Setup) -> dict[str, str]:
    """{our kernel's name: the launch op that it belongs to}, {} for an arm without our kernels."""
    if not arm.startswith("triton"):
        return {}
    from compiled import row_of
    from nanogpt_kernels import launch

    calls = step_arms.recorded(arm, setup.config, setup.dtype, launch.architecture(setup.world.device))
    return {call.kernel.__name__: row_of(call.op) for call in calls}


def profiled(name: str, found: Ready, setup: Setup, lines: machine.Lines) -> None:
    """Write and print where one step's time goes, a row a kernel; where the profiler fails, why."""
    device = setup.world.device
    spans: list[float] = []
    run = f"{time.time():.3f}"  # what the rows of one table have in common
    try:
        rows = kernels(lambda: spans.append(found.time(device)), device)
        of = launch_ops(name, setup)
    except Exception as problem:
        lines.write(arm=name, status=why(problem))
        print(f"{name}: not profiled: {why(problem)}", flush=True)
        return
    for row in rows:
        lines.write(run=run, arm=name, batch_size=found.facts["batch_size"], launch_op=of.get(row["kernel"], ""), **row)
    busy, whole = sum(row["ms"] for row in rows), spans[0] * 1e3
    print(f"{name}: {busy:.4g} ms in kernels of a step of {whole:.4g} ms under the profiler")
    shown = [[row["kernel"][:70], row["calls"], row["ms"], f"{row['share']:.1%}"] for row in rows[:SHOWN]]
    print(machine.table(["kernel", "calls", "ms", "share"], shown), flush=True)


# ---- the run ----


def main(argv: list[str]) -> int:
    args = parsed(argv)
    tiny = TINY if args.tiny else {}
    B = args.batch_size or tiny.get("batch_size", 64)
    config = configuration(args.config, **tiny)
    accumulation = args.accumulation or max(1, args.tokens // (B * config.data.block_size))
    config = config.replace(batch_size=B, gradient_accumulation_steps=accumulation, dtype=args.dtype)
    config = config if args.dropout is None else config.replace(dropout=args.dropout)
    tokens, flops = config.tokens_per_iter, flops_per_token(config.shape(config.model.vocab_size or 50304))
    print(f"{args.config}: {tokens:,} tokens a step, {flops['nanogpt'] * tokens / 1e12:.4g} TFLOP (nanoGPT's count), "
          f"{flops['llmc'] * tokens / 1e12:.4g} (llm.c's); arms {', '.join(args.arms)}", flush=True)  # fmt: skip
    if args.dry_run:
        return 0
    if args.device != "cpu":
        machine.require_cuda("bench/step.py")
    world = join(args.device, "nccl", accumulation)
    dtype = resolve_dtype(config.system.dtype, world.device)
    return run(args, Setup(config, dtype, world, step_arms.initial_weights(config), args.nanogpt))


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="gpt2_124m")
    parser.add_argument("--arms", nargs="+", default=["triton", "reference+compile", "nanogpt+compile"])
    parser.add_argument("--batch_size", type=int, help="sequences a micro-batch: 64")
    parser.add_argument("--accumulation", type=int, help="micro-batches a step, instead of --tokens")
    parser.add_argument("--tokens", type=int, default=2**19, help="of a step")
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    parser.add_argument("--warmup", type=int, default=2, help="steps of an arm before it is timed")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of an arm alone")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each arm in turn at the end")
    parser.add_argument("--profile", action="store_true", help="a table of the first arm's kernels")
    parser.add_argument("--total_s", type=float, default=float("inf"), help="begin no arm or round after so long")
    parser.add_argument("--nanogpt", type=Path, default=os.environ.get("NANOGPT_DIR"), help="karpathy/nanoGPT")
    parser.add_argument("--device", default="cuda", help="cpu only shows that this runs")
    parser.add_argument("--tiny", action="store_true", help=f"{TINY}: with --device=cpu, to see that this runs")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--out", type=Path, help="append to DIR/step.jsonl and DIR/kernels.jsonl")
    args = parser.parse_args(argv)
    args.nanogpt = args.nanogpt and Path(args.nanogpt)
    return args


def run(args: argparse.Namespace, setup: Setup) -> int:
    deadline, device = time.monotonic() + args.total_s, setup.world.device
    peak, source = resolve_peak(device, setup.dtype)
    facts = machine.machine_facts() | {"dtype": str(setup.dtype).removeprefix("torch."), "device": str(device)}
    facts |= {"config": args.config, "tokens": setup.config.tokens_per_iter}
    lines = machine.Lines(args.out and args.out / "step.jsonl", bench="step", peak=source, **facts)
    expected = first_step(step_arms.make_arm("reference", setup), setup)
    running: dict[str, Ready] = {}
    for i, name in enumerate(args.arms):
        if time.monotonic() > deadline:
            lines.write(arm=name, how="alone", status="no time left")
            print(f"{name}: no time left", flush=True)
            continue
        try:
            found = ready(name, setup, expected, args.warmup)
            found.seconds = [found.time(device) for _ in range(args.steps)]
            row = {**found.facts, **rates(found.seconds, setup, peak)}
            lines.write(arm=name, how="alone", status="ok", **row)
            print(said(name, row), flush=True)
            running[name] = found
            if args.profile and i == 0:
                profiled(name, found, setup, beside(lines, "kernels.jsonl"))
        except Exception as problem:  # the next arm has its own model
            lines.write(arm=name, how="alone", status=why(problem))
            print(f"{name}: {why(problem)}", flush=True)
    compared(running, args.rounds, deadline, setup, peak, lines)
    return 0 if running else 1


def beside(lines: machine.Lines, name: str) -> machine.Lines:
    """The same facts into another file of the folder."""
    return machine.Lines(lines.path and lines.path.with_name(name), **lines.facts)


def compared(
    running: dict[str, Ready], rounds: int, deadline: float, setup: Setup, peak: float | None, lines: machine.Lines
) -> None:
    """Time the arms in turn, each round from another one on, and write what each is against the first."""
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(rounds if len(running) > 1 else 0):
        if time.monotonic() > deadline:
            break
        names = list(running)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            try:
                seconds[name].append(running[name].time(setup.world.device))
            except torch.OutOfMemoryError:
                del running[name]
                lines.write(arm=name, how="in turn", status="out of memory beside the others")
    first = next(iter(seconds.values()), [])
    rows = []
    for name, found in running.items():
        row = {**found.facts, **rates(seconds[name] or found.seconds, setup, peak)}
        if seconds[name]:
            row["x_first"] = statistics.median(a / b for a, b in zip(seconds[name], first))
            lines.write(arm=name, how="in turn", status="ok", rounds=len(first), **row)
        rows.append([name, row["batch_size"], row["ms_s"] * 1e3, row["tokens_per_s"], row.get("mfu_nanogpt"),
                     row.get("mfu_llmc"), row.get("x_first"), row.get("peak_gb"), row["loss"]])  # fmt: skip
    header = ["arm", "B", "ms a step", "tokens/s", "MFU nanoGPT", "MFU llm.c", "x first", "peak GB", "loss"]
    print(machine.table(header, rows) if rows else "no arm ran")


def said(name: str, row: dict[str, Any]) -> str:
    mfu = f", MFU {row['mfu_nanogpt']:.1%} (nanoGPT's count)" if "mfu_nanogpt" in row else ""
    spread = f"{row['q1'] * 1e3:.4g}-{row['q3'] * 1e3:.4g}"
    note = f"; {row['note']}" if "note" in row else ""
    return (f"{name}: {row['ms_s'] * 1e3:.4g} ms a step ({spread}), {row['tokens_per_s']:.0f} tokens/s{mfu}, "
            f"B={row['batch_size']}{note}")  # fmt: skip


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
