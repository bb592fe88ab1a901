"""Greedy sampling by ours, stock nanoGPT and Hugging Face, with and without a cache of keys and values: ms a token.

    python bench/sampling.py [--config gpt2_124m] [--device cuda] [--arms ours nanogpt ...] [--out DIR]

Arms are bench/sample_arms.py's, from the same random weights; in float32 each must continue the prompt by the same ids
as the first, or it is not timed. They take turns, a continuation each; on a CPU each is a process of its own.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import machine
import sample_arms
import step
import torch
import turns
from step_arms import Setup
from step_timing import why

from nanogpt_fast.command import run_command

TINY = 12  # new tokens of --tiny


class Here:
    """An arm in this process. facts: what a row says of it; ids: its first continuation."""

    def __init__(self, name: str, setup: Setup, args: argparse.Namespace):
        self.sample = sample_arms.make_sampler(name, setup, args.kernels)
        self.device, self.new_tokens = setup.world.device, args.new_tokens
        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(setup.shape.vocab_size, (1, args.prompt), generator=generator).to(self.device)
        first = self.sample(self.prompt, self.new_tokens)
        self.facts: dict[str, Any] = {"ids": first[0].tolist(), "dtype": _name(setup.dtype)}

    def once(self) -> float:
        """Seconds of one continuation."""
        began = time.perf_counter()
        self.sample(self.prompt, self.new_tokens)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def turn(self, calls: int) -> dict[str, Any]:
        return {"seconds": [self.once() for _ in range(calls + 1)][1:]}

    def end(self) -> None:
        """The memory goes with the last reference."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def serve(name: str, setup: Setup, args: argparse.Namespace) -> None:
    def make() -> tuple[dict[str, Any], Callable[[], Any], Callable[[], dict[str, Any]]]:
        arm = Here(name, setup, args)
        return arm.facts, arm.once, dict

    turns.serve(make, why)


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="gpt2_124m")
    parser.add_argument("--arms", nargs="+", default=list(sample_arms.ARMS), help="; ".join(sample_arms.ARMS))
    parser.add_argument("--prompt", type=int, help="tokens to continue, 16; a whole block: all new ones are past it")
    parser.add_argument("--new_tokens", type=int, help="tokens of a continuation; default fills the block")
    parser.add_argument("--block_size", type=int, help="instead of the preset's")
    parser.add_argument("--vocab_size", type=int, help="of a preset on characters: 65 for Tiny Shakespeare")
    parser.add_argument("--kernels", default="auto", help="ops of ours")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="5 rounds of 64 tokens at most")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--nanogpt", type=Path, default=os.environ.get("NANOGPT_DIR"), help="karpathy/nanoGPT")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, in this process: to see that this runs")
    parser.add_argument("--out", type=Path, help="append to DIR/sample.jsonl")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def setup_of(args: argparse.Namespace) -> Setup:
    """step.py's, with another context."""
    words = [f"--config={args.config}", f"--device={args.device}", f"--dtype={args.dtype}", "--accumulation=1"]
    words += [f"--vocab_size={args.vocab_size}"] if args.vocab_size else []
    words += [f"--nanogpt={args.nanogpt}"] if args.nanogpt else []
    words += [f"--block_size={args.block_size}"] if args.block_size else []
    return step.setup_of(step.parsed([*words, *(["--tiny"] if args.tiny else [])]))


def main(argv: list[str]) -> int:
    args = parsed(argv)
    setup = setup_of(args)
    block_size = setup.shape.block_size
    args.prompt = min(args.prompt, block_size) if args.prompt else min(16, block_size // 2)
    room = block_size - args.prompt or block_size
    args.new_tokens = args.new_tokens or (min(room, TINY) if args.tiny else room)
    args.rounds, args.new_tokens = (5, min(64, args.new_tokens)) if args.quick else (args.rounds, args.new_tokens)
    if args.serve:
        serve(args.serve, setup, args)
        return 0
    facts = machine.machine_facts(setup.world.device.type) | {"config": args.config, "batch_size": 1}
    facts |= {"prompt": args.prompt, "new_tokens": args.new_tokens, "block_size": block_size}
    lines = machine.Lines(args.out and args.out / "sample.jsonl", bench="sample", **facts)
    arms: dict[str, Any] = {}
    try:
        for name in args.arms:
            try:
                arms[name] = made(name, setup, args, argv)
                checked(name, arms)
            except Exception as problem:
                arms.pop(name, None)
                lines.write(arm=name, cache=sample_arms.cached(name), status=why(problem))
                print(f"{name}: {why(problem)}", flush=True)
        timed(arms, args, lines)
    finally:
        for arm in arms.values():
            arm.end()
    return 0 if arms else 1


def made(name: str, setup: Setup, args: argparse.Namespace, argv: list[str]) -> Any:
    if setup.world.device.type == "cpu" and not args.tiny:
        return turns.Apart([sys.executable, __file__, *argv, "--serve", name])
    return Here(name, setup, args)


def checked(name: str, arms: dict[str, Any]) -> None:
    """ValueError where an arm in float32 continues the prompt otherwise than the first; 16 bits may round otherwise."""
    mine, first = arms[name].facts, next(iter(arms.values())).facts
    pairs = enumerate(zip(mine["ids"], first["ids"]))
    same = next((i for i, (a, b) in pairs if a != b), len(first["ids"]))
    if mine["dtype"] == "float32" and same < len(first["ids"]):
        raise ValueError(f"WRONG: continues otherwise than the first arm from token {same} on")
    mine["same_ids"] = same


def timed(arms: dict[str, Any], args: argparse.Namespace, lines: machine.Lines) -> None:
    """Every arm in turn, and a row of each."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(args.rounds):
        for name in turns.rotated(list(arms), turn):
            seconds[name] += arms[name].turn(1)["seconds"]
    rows = []
    for name, arm in arms.items():
        found = harness.summary([s * 1e3 / args.new_tokens for s in seconds[name]])
        against = harness.summary([a / b for a, b in zip(seconds[name], next(iter(seconds.values())))])
        row = {"ms_token": found["ms"], "q1": found["q1"], "q3": found["q3"], "tokens_per_s": 1e3 / found["ms"]}
        row |= {"x_first": against["ms"], "x_first_q1": against["q1"], "x_first_q3": against["q3"]}
        more = {key: arm.facts[key] for key in ("dtype", "same_ids")}
        lines.write(arm=name, cache=sample_arms.cached(name), status="ok", seconds=seconds[name], **row, **more)
        rows.append([name, row["ms_token"], row["tokens_per_s"], row["x_first"],
                     f"{against['q1']:.3f}-{against['q3']:.3f}"])  # fmt: skip
    print(machine.table(["arm", "ms a token", "tokens/s", "x first", "quartiles"], rows) if rows else "no arm ran")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
