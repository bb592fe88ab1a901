"""Whole training steps of one model by several sets of ops, in turn: tokens/s and MFU.

    python bench/step.py [--config gpt2_124m] [--arms reference triton reference+compile] [--out DIR]

An arm is what --kernels takes, `+compile` for torch.compile of the model. All start from the same weights and get the
same batches; their first loss and gradient norm are held against the first arm's before anything is timed. A step is
--accumulation micro-batches of --batch_size sequences, whatever the preset says.
"""

import argparse
import gc
import itertools
import statistics
import sys
import time
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import machine
import ops as op_bench
import torch

from nanogpt_fast.distributed import World, join, resolve_dtype
from nanogpt_fast.errors import ConfigError, did_you_mean, run_command
from nanogpt_fast.hardware import flops_per_token, resolve_peak
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import select_ops
from nanogpt_fast.optim import AdamW, FlatParameters
from nanogpt_fast.settings.config import Config
from nanogpt_fast.step import TrainStep


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


def make_step(arm: str, config: Config, dtype: torch.dtype, world: World, weights: dict[str, Any]) -> TrainStep:
    kernels, _, compiled = arm.partition("+")
    model = GPT(config.shape(config.model.vocab_size or 50304), select_ops(kernels, world.device.type)).train()
    model.load_state_dict(weights)
    optimizer = AdamW(FlatParameters(model, dtype, world.device), config.optim, model.ops, dtype == torch.float16)
    optimizer.set_lr(1e-4)
    if compiled == "compile":
        model.compile()
    return TrainStep(model, optimizer, world, config.run.seed)


def initial_weights(config: Config) -> dict[str, Any]:
    model = GPT(config.shape(config.model.vocab_size or 50304))
    model.init_weights(torch.Generator().manual_seed(config.run.seed))
    return model.state_dict()


def run_steps(step: TrainStep, batch: torch.Tensor, iterations: list[int]) -> None:
    for iteration in iterations:
        step(batch, iteration)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time until the device has finished: what a user waits."""
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def prepare(
    arms: list[str], config: Config, dtype: torch.dtype, world: World, batch: torch.Tensor
) -> tuple[dict[str, TrainStep], dict[str, dict[str, Any]]]:
    """Arms that ran a first step with the first arm's loss, and what is known of each."""
    steps, known, weights = {}, {}, initial_weights(config)
    base: tuple[float, float] | None = None
    for arm in arms:
        try:
            if world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step = make_step(arm, config, dtype, world, weights)
            first = step(batch, 0)
            loss, norm = float(first.loss), float(first.grad_norm)
            base = base or (loss, norm)
            close = abs(loss - base[0]) <= 1e-2 * base[0] and abs(norm - base[1]) <= 5e-2 * base[1]
            known[arm] = {"loss": loss, "grad_norm": norm, "status": "ok" if close else "WRONG: another loss or norm"}
            if world.device.type == "cuda":
                known[arm]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            if close:
                steps[arm] = step
        except Exception as problem:
            known[arm] = {"status": f"failed: {op_bench.first_line(problem)}"}
        gc.collect()
    return steps, known


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="gpt2_124m")
    parser.add_argument("--arms", nargs="+", default=["reference", "triton", "reference+compile"])
    parser.add_argument("--batch_size", type=int, default=16, help="sequences a micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of an arm in a round")
    parser.add_argument("--device", default="cuda", help="cpu only shows that this runs")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--out", type=Path, help="append to DIR/step.jsonl")
    args = parser.parse_args(argv)
    config = configuration(args.config, batch_size=args.batch_size, gradient_accumulation_steps=args.accumulation,
                           dropout=args.dropout, dtype=args.dtype)  # fmt: skip
    shape = config.shape(config.model.vocab_size or 50304)
    tokens, flops = config.tokens_per_iter, flops_per_token(shape)
    print(f"{args.config}: {tokens:,} tokens a step, {flops['nanogpt'] * tokens / 1e12:.4g} TFLOP (nanoGPT's count), "
          f"{flops['llmc'] * tokens / 1e12:.4g} (llm.c's); arms {', '.join(args.arms)}")  # fmt: skip
    if args.dry_run:
        return 0
    if args.device != "cpu":
        machine.require_cuda("bench/step.py")
    world = join(args.device, "nccl", config.data.gradient_accumulation_steps)
    dtype = resolve_dtype(config.system.dtype, world.device, comparable=False)
    size = (config.data.gradient_accumulation_steps, config.data.batch_size, shape.block_size + 1)
    batch = torch.randint(shape.vocab_size, size, generator=torch.Generator().manual_seed(0))
    steps, known = prepare(args.arms, config, dtype, world, batch)
    seconds: dict[str, list[float]] = {arm: [] for arm in steps}
    iterations = itertools.count(1)
    for turn in range(args.rounds + 1):
        names = list(steps)
        for arm in names[turn % len(names) :] + names[: turn % len(names)] if names else []:
            numbers = list(itertools.islice(iterations, args.steps))
            span = seconds_of(partial(run_steps, steps[arm], batch, numbers), world.device)
            seconds[arm] += [span / args.steps] * (turn > 0)  # the first round warms up
    report(args, config, known, seconds, dtype, world)
    return 0 if steps else 1


def report(
    args: argparse.Namespace,
    config: Config,
    known: dict[str, dict[str, Any]],
    seconds: dict[str, list[float]],
    dtype: torch.dtype,
    world: World,
) -> None:
    shape, tokens = config.shape(config.model.vocab_size or 50304), config.tokens_per_iter
    flops, (peak, source) = flops_per_token(shape), resolve_peak(world.device, dtype)
    lines = machine.Lines(args.out and args.out / "step.jsonl", bench="step", **machine.machine_facts())
    rows, first = [], next(iter(seconds.values()), [])
    for arm, facts in known.items():
        times = seconds.get(arm)
        if times:
            facts |= {f"{k}_s" if k == "ms" else k: v for k, v in harness.summary(times).items()}
            facts |= {"tokens_per_s": tokens / facts["ms_s"], "x_first": statistics.median(map(_ratio, times, first))}
            facts |= {f"mfu_{k}": v * facts["tokens_per_s"] / peak for k, v in flops.items()} if peak else {}
        lines.write(arm=arm, config=args.config, batch_size=config.data.batch_size, tokens=tokens, peak=source,
                    dtype=str(dtype).removeprefix("torch."), device=str(world.device), **facts)  # fmt: skip
        rows.append([arm, facts.get("ms_s", 0) * 1e3 or None, facts.get("tokens_per_s"), facts.get("mfu_nanogpt"),
                     facts.get("mfu_llmc"), facts.get("x_first"), facts.get("peak_gb"), facts.get("loss"),
                     facts["status"]])  # fmt: skip
    header = ["arm", "ms a step", "tokens/s", "MFU nanoGPT", "MFU llm.c", "x first", "peak GB", "loss", "status"]
    print(machine.table(header, rows))


def _ratio(a: float, b: float) -> float:
    return a / b


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
