"""Whole training steps of one model, an arm at a time: tokens/s and MFU, written as soon as each is known.

    python bench/step.py [--config gpt2_124m] [--arms triton reference+compile nanogpt+compile] [--profile] [--out DIR]
    python bench/step.py --device=cpu --config shakespeare_char_cpu --vocab_size=65 --arms reference nanogpt

Arms are bench/step_arms.py's. Each starts from the same weights and first takes a step of two sequences, whose loss and
gradient norm must be the plain PyTorch ops'; then it is timed alone and its line is written (DIR/step.jsonl) before the
next arm is built. At the end those that ran are timed again in turn, because machines drift: only these lines compare
arms. --profile adds a table of the kernels in one step of the first arm (DIR/kernels.jsonl).

A step is --accumulation micro-batches of --batch_size sequences: on a GPU 0.5M tokens, on a CPU the preset's. An arm
that runs out of memory is tried again with half the batch and twice the accumulation, and says so. On a CPU each arm is
a process of its own (bench/turns.py), and a round's figure is the median of --turn steps.
"""

import argparse
import os
import statistics
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import harness
import kernel_table
import machine
import nvml
import step_arms
import step_timing
import torch
from step_arms import Setup
from step_timing import Apart, Ready, said, why
from turns import rotated

from nanogpt_fast.command import run_command
from nanogpt_fast.data.recipes import RECIPES
from nanogpt_fast.distributed import World, join, resolve_dtype
from nanogpt_fast.errors import ConfigError, did_you_mean
from nanogpt_fast.hardware import flops_per_token, measure_gemm, resolve_peak
from nanogpt_fast.settings.config import Config

TINY = dict(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=96, batch_size=4)
# ours: eager, captured, and with each switch of its launch rows
SWITCHED = ("triton", "triton+graph", "triton+atomic=true", "triton+fused=true")
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


def rates(seconds: list[float], setup: Setup, peak: float | None) -> dict[str, float]:
    """Median and quartiles of a step in seconds, tokens/s, model TFLOP/s (nanoGPT's count), MFU by both counts."""
    found = {"ms_s" if name == "ms" else name: value for name, value in harness.summary(seconds).items()}
    found["tokens_per_s"] = setup.config.tokens_per_iter / found["ms_s"]
    flops = flops_per_token(setup.shape)
    found["tflops"] = flops["nanogpt"] * found["tokens_per_s"] / 1e12
    if peak is None:
        return found
    return found | {"peak_flops": peak} | {f"mfu_{k}": v * found["tokens_per_s"] / peak for k, v in flops.items()}


def refined(peak: float | None, setup: Setup) -> float | None:
    """A CPU's peak is a measured product: the best so far, since one measured beside other work is too low."""
    device = setup.world.device
    return max(peak, measure_gemm(device, setup.dtype)) if peak and device.type == "cpu" else peak


def arm_facts(name: str, setup: Setup) -> dict[str, Any]:
    """What a row says of an arm besides its times."""
    dtype = str(setup.dtype).removeprefix("torch.")
    ours = step_arms.is_ours(name)
    on_cpu = setup.world.device.type == "cpu"  # there nanoGPT's train.py computes in float32, whatever its dtype says
    return {
        "dtype": dtype if ours or not on_cpu else "float32",
        "residual_dtype": dtype if ours else "float32",  # autocast leaves the others' stream in float32
        "graph": ours and "graph" in name.split("+"),
    }


# ---- the run ----


def main(argv: list[str]) -> int:
    args = parsed(argv)
    setup = setup_of(args)
    if args.serve:
        name, loss, norm = args.serve
        step_timing.serve(name, setup, (float(loss), float(norm)), args.warmup)
        return 0
    tokens, flops = setup.config.tokens_per_iter, flops_per_token(setup.shape)
    print(f"{args.config}: {tokens:,} tokens a step, {flops['nanogpt'] * tokens / 1e12:.4g} TFLOP (nanoGPT's count), "
          f"{flops['llmc'] * tokens / 1e12:.4g} (llm.c's); arms {', '.join(args.arms)}", flush=True)  # fmt: skip
    return 0 if args.dry_run else run(args, argv, setup)


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="gpt2_124m")
    parser.add_argument("--arms", nargs="+", default=["triton", "reference+compile", "nanogpt+compile"])
    parser.add_argument("--batch_size", type=int, help="sequences a micro-batch: 64, on a CPU the preset's")
    parser.add_argument("--accumulation", type=int, help="micro-batches a step, instead of --tokens")
    parser.add_argument("--tokens", type=int, help="of a step: 0.5M, on a CPU the preset's micro-batches")
    parser.add_argument("--block_size", type=int, help="instead of the preset's")
    parser.add_argument("--vocab_size", type=int, help="of a preset on characters: 65 for Tiny Shakespeare")
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    parser.add_argument("--warmup", type=int, default=2, help="steps of an arm before it is timed")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of an arm alone")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each arm at the end")
    parser.add_argument("--turn", type=int, help="steps of a turn: 1, on a CPU 8")
    parser.add_argument("--profile", action="store_true", help="a table of the first arm's kernels")
    parser.add_argument("--total_s", type=float, default=float("inf"), help="begin no arm or round after so long")
    parser.add_argument("--nanogpt", type=Path, default=os.environ.get("NANOGPT_DIR"), help="karpathy/nanoGPT")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help=f"{TINY}, all in this process: to see that this runs")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--out", type=Path, help="append to DIR/step.jsonl and DIR/kernels.jsonl")
    parser.add_argument("--serve", nargs=3, metavar=("ARM", "LOSS", "NORM"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.nanogpt = args.nanogpt and Path(args.nanogpt)
    args.turn = args.turn or (8 if args.device == "cpu" and not args.tiny else 1)
    return args


def setup_of(args: argparse.Namespace) -> Setup:
    """What all arms start from. ConfigError for a preset on characters without --vocab_size."""
    tiny, on_cpu = TINY if args.tiny else {}, args.device == "cpu"
    config = configuration(args.config, **{"block_size": args.block_size, **tiny})
    vocab, recipe = args.vocab_size or config.model.vocab_size, RECIPES.get(config.data.dataset)
    if not vocab and recipe is not None and recipe.tokenizer == "char":
        raise ConfigError(
            f"how many characters has the dataset {config.data.dataset}?",
            where=f"configs/{args.config}.toml leaves vocab_size to its meta.json, which is not read here",
            expected="--vocab_size=N (Tiny Shakespeare: 65)",
        )
    B = args.batch_size or tiny.get("batch_size") or (config.data.batch_size if on_cpu else 64)
    tokens = args.tokens or (0 if on_cpu and not args.tiny else 2**19)
    by_tokens = tokens // (B * config.data.block_size) if tokens else config.data.gradient_accumulation_steps
    accumulation = args.accumulation or max(1, by_tokens)
    config = config.replace(batch_size=B, gradient_accumulation_steps=accumulation, dtype=args.dtype, vocab_size=vocab)
    config = config if args.dropout is None else config.replace(dropout=args.dropout)
    if args.dry_run:
        return Setup(config, torch.bfloat16, World(), {}, args.nanogpt)
    if not on_cpu:
        machine.require_cuda("bench/step.py")
    keeps_memory = not args.serve or step_arms.is_ours(args.serve[0])  # join has malloc keep it, which is ours alone
    world = join(args.device, "nccl", accumulation) if keeps_memory else World(device=torch.device(args.device))
    dtype = resolve_dtype(config.system.dtype, world.device)
    return Setup(config, dtype, world, step_arms.initial_weights(config), args.nanogpt)


def run(args: argparse.Namespace, argv: list[str], setup: Setup) -> int:
    deadline, device = time.monotonic() + args.total_s, setup.world.device
    peak, source = resolve_peak(device, setup.dtype)
    facts = machine.machine_facts(device.type) | {"config": args.config, "peak": source}
    facts |= {"tokens": setup.config.tokens_per_iter, "block_size": setup.shape.block_size}
    facts |= {"params": setup.shape.num_params(non_embedding=False), "vocab_size": setup.shape.vocab_size}
    lines = machine.Lines(args.out and args.out / "step.jsonl", bench="step", **facts)
    expected = step_timing.first_step(step_arms.make_arm("reference", setup), setup)
    running: dict[str, Ready | Apart] = {}
    try:
        for i, name in enumerate(args.arms):
            row: dict[str, Any] = arm_facts(name, setup)
            if time.monotonic() > deadline:
                row["status"] = "no time left"
            else:
                try:
                    found = make_ready(name, setup, expected, args, argv)
                    running[name] = found
                    with nvml.energy() as spent:
                        found.seconds = found.time(device, args.steps)
                    peak = refined(peak, setup)
                    if spent.joules is not None:
                        found.facts["joules_per_token"] = spent.joules / (args.steps * setup.config.tokens_per_iter)
                    found.facts |= found.state(device)
                    row |= {
                        "status": "ok",
                        "steps": args.steps,
                        **said(found.facts),
                        **rates(found.seconds, setup, peak),
                    }
                except Exception as problem:  # the next arm has its own model
                    row["status"] = why(problem)
                    running.pop(name, None)
            lines.write(arm=name, how="alone", **row)
            print(told(name, row), flush=True)
            if args.profile and i == 0 and isinstance(running.get(name), Ready):
                profiled(name, running[name], setup, beside(lines, "kernels.jsonl"))
        compared(running, args, deadline, setup, refined(peak, setup), lines)
    finally:
        for found in running.values():
            found.end()
    return 0 if running else 1


def make_ready(
    name: str, setup: Setup, expected: tuple[float, float], args: argparse.Namespace, argv: list[str]
) -> Ready | Apart:
    apart = setup.world.device.type == "cpu" and not args.tiny
    return Apart(name, argv, expected) if apart else step_timing.ready(name, setup, expected, args.warmup)


def beside(lines: machine.Lines, name: str) -> machine.Lines:
    """The same facts into another file of the folder."""
    return machine.Lines(lines.path and lines.path.with_name(name), **{**lines.facts, "bench": Path(name).stem})


def compared(
    running: dict[str, Ready | Apart],
    args: argparse.Namespace,
    deadline: float,
    setup: Setup,
    peak: float | None,
    lines: machine.Lines,
) -> None:
    """Time the arms in turn, each round from another one on, and write what each is against the first."""
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(args.rounds if len(running) > 1 else 0):
        if time.monotonic() > deadline:
            break
        for name in rotated(list(running), turn):
            try:
                seconds[name].append(statistics.median(running[name].time(setup.world.device, args.turn)))
            except Exception as problem:
                oom = isinstance(problem, torch.OutOfMemoryError)
                running.pop(name).end()
                status = "out of memory beside the others" if oom else why(problem)
                lines.write(arm=name, how="in turn", status=status, **arm_facts(name, setup))
    first = next((seconds[name] for name in running), [])
    rows = []
    for name, found in running.items():
        row = {**arm_facts(name, setup), **said(found.facts), **rates(seconds[name] or found.seconds, setup, peak)}
        if seconds[name]:
            against = harness.summary([a / b for a, b in zip(seconds[name], first)])
            row |= {"x_first": against["ms"], "x_first_q1": against["q1"], "x_first_q3": against["q3"]}
            lines.write(arm=name, how="in turn", status="ok", rounds=len(first), seconds=seconds[name], **row)
        spread = f"{row['x_first_q1']:.3f}-{row['x_first_q3']:.3f}" if seconds[name] else None
        rows.append([name, row["batch_size"], row["ms_s"] * 1e3, row["tokens_per_s"], row.get("mfu_nanogpt"),
                     row.get("mfu_llmc"), row.get("x_first"), spread, row.get("peak_gb"), row["loss"]])  # fmt: skip
    header = [
        "arm",
        "B",
        "ms a step",
        "tokens/s",
        "MFU nanoGPT",
        "MFU llm.c",
        "x first",
        "quartiles",
        "peak GB",
        "loss",
    ]
    print(machine.table(header, rows) if rows else "no arm ran")


def told(name: str, row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{name}: {row['status']}"
    mfu = f", MFU {row['mfu_nanogpt']:.1%} (nanoGPT's count)" if "mfu_nanogpt" in row else ""
    spread = f"{row['q1'] * 1e3:.4g}-{row['q3'] * 1e3:.4g}"
    note = f"; {row['note']}" if "note" in row else ""
    return (f"{name}: {row['ms_s'] * 1e3:.4g} ms a step ({spread}), {row['tokens_per_s']:.0f} tokens/s{mfu}, "
            f"B={row['batch_size']}{note}")  # fmt: skip


def profiled(name: str, found: Ready | Apart, setup: Setup, lines: machine.Lines) -> None:
    """Write and print where one step's time goes, a row a kernel; where the profiler fails, why."""
    device = setup.world.device
    spans: list[float] = []
    try:
        rows = kernel_table.kernels(lambda: spans.extend(found.time(device, 1)), device)
        of = kernel_table.launch_ops(name, setup)
    except Exception as problem:
        lines.write(arm=name, status=why(problem))
        print(f"{name}: not profiled: {why(problem)}", flush=True)
        return
    for row in rows:
        lines.write(arm=name, batch_size=found.facts["batch_size"], launch_op=of.get(row["kernel"], ""), **row)
    busy, whole = sum(row["ms"] for row in rows), spans[0] * 1e3
    print(f"{name}: {busy:.4g} ms in kernels of a step of {whole:.4g} ms under the profiler")
    shown = [[row["kernel"][:70], row["calls"], row["ms"], f"{row['share']:.1%}"] for row in rows[:SHOWN]]
    print(machine.table(["kernel", "calls", "ms", "share"], shown), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
