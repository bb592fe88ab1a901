"""llm.c's own trainer on the model and the tokens of a step: its milliseconds, as a row of bench/step.py.

    python bench/llmc_binary.py --llmc DIR [--config gpt2_124m] [--batch_size 64] [--steps 20] [--out DIR]

DIR is a checkout of karpathy/llm.c with a built train_gpt2cu (make train_gpt2cu USE_CUDNN=1). We write a model and a
token file, it trains on them, and the lines that it prints are read: written against f1e2ace651 (2025-05-10). It is a
process of its own under its own timer, so its row is measured alone, never in turn. Not the same as the other arms:
tanh GELU, biases always, the same tokens every step. The first loss must be our plain ops' on the same tokens.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import machine
import numpy as np
import step
import step_arms
import torch
from torch import Tensor

from nanogpt_fast.command import run_command
from nanogpt_fast.distributed import World
from nanogpt_fast.errors import ConfigError
from nanogpt_fast.hardware import flops_per_token, resolve_peak
from nanogpt_fast.model import GPT

PROGRAM = "train_gpt2cu"
BUILD = f"make {PROGRAM} USE_CUDNN=1 in DIR, a checkout of karpathy/llm.c"
FLAGS = ["-r", "0"]  # keeps GELU's output, as its script for GPT-2 124M does
WARMUP = 3  # printed steps that are left out
NUMBER = r"(-?\d+\.\d+|-?nan|-?inf)"
CUDA_LINE = re.compile(rf"^step +(\d+)/\d+ \| loss +{NUMBER} .*\| norm +{NUMBER} .*\| {NUMBER} ms \|", re.MULTILINE)
CPU_LINE = re.compile(rf"^step (\d+): train loss {NUMBER} \(took {NUMBER} ms\)", re.MULTILINE)  # its train_gpt2.c


@dataclass(frozen=True)
class Printed:
    """A step that llm.c printed. grad_norm: None from its CPU program."""

    number: int
    loss: float
    grad_norm: float | None
    ms: float


def parsed(text: str) -> list[Printed]:
    """The steps in llm.c's output, of either program; [] where there is none."""
    found = [Printed(int(n), float(loss), float(norm), float(ms)) for n, loss, norm, ms in CUDA_LINE.findall(text)]
    return found or [Printed(int(n), float(loss), None, float(ms)) for n, loss, ms in CPU_LINE.findall(text)]


@dataclass(frozen=True)
class Inputs:
    """What llm.c is given, and the loss that it must start at."""

    model: Path
    tokens: Path
    loss: float


def write_inputs(setup: step_arms.Setup, rows: int, folder: Path, dtype: torch.dtype) -> Inputs:
    """A model file and a token file of `rows` sequences, which is one step: llm.c takes the same ones every time."""
    from nanogpt_fast.data.token_format import LLMC_LAYOUTS, LLMC_UINT16
    from nanogpt_fast.weights import llmc
    from nanogpt_fast.weights.canonical import Weights, require_tied_head, with_biases

    shape = replace(setup.shape, activation="gelu_tanh", dropout=0.0)
    weights = Weights(model_args=shape, model=setup.weights)
    require_tied_head(weights, folder)
    V, T = weights.used_vocab, shape.block_size
    model, tokens = folder / "model.bin", folder / "tokens.bin"
    llmc.write(weights, model, dtype)
    drawn = torch.randint(V, (rows * T + 1,), generator=torch.Generator().manual_seed(0))
    header = np.zeros(256, "<i4")
    header[:3] = LLMC_UINT16, LLMC_LAYOUTS[LLMC_UINT16][0], drawn.numel()
    tokens.write_bytes(header.tobytes() + drawn.numpy().astype("<u2").tobytes())
    plain = GPT(replace(shape, vocab_size=V, bias=True))
    plain.load_state_dict({name: w[:V] if "wte" in name else w for name, w in with_biases(weights).items()})
    return Inputs(model, tokens, _loss(plain.to(setup.world.device), drawn, T))


@torch.no_grad()
def _loss(model: GPT, tokens: Tensor, T: int, at_once: int = 4) -> float:
    """Mean negative log-likelihood of consecutive tokens cut into sequences of T."""
    ids, targets = (part.view(-1, T).to(model.transformer.wte.weight.device) for part in (tokens[:-1], tokens[1:]))
    nll = [model(i, t)[1] for i, t in zip(ids.split(at_once), targets.split(at_once))]
    return float(torch.cat(nll).mean())


def command(program: Path, inputs: Inputs, B: int, T: int, accumulation: int, steps: int) -> list[str]:
    """Training alone: one validation batch before and after, which its loop insists on, no samples, no files."""
    sizes = {"-b": B, "-t": T, "-d": B * T * accumulation, "-x": steps, "-l": step_arms.LR, "-c": 0.1}
    quiet = {"-v": 10**6, "-m": 1, "-s": 0, "-h": 0, "-n": 0}  # it divides by -v, so 0 does not switch it off
    files = ["-e", str(inputs.model), "-i", str(inputs.tokens), "-j", str(inputs.tokens)]
    flags = [text for pair in {**sizes, **quiet}.items() for text in map(str, pair)]
    return [str(program), *files, *flags, *FLAGS]


def row_of(text: str, expected: float, setup: step_arms.Setup) -> dict[str, Any]:
    """The fields of its row; status says why there are no times."""
    found, tokens = parsed(text), setup.config.tokens_per_iter
    if len(found) <= WARMUP:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "nothing")
        return {"status": f"failed: llm.c printed {len(found)} steps; its last line: {last.strip()[:160]}"}
    first = found[0]
    facts = {"loss": first.loss, "grad_norm": first.grad_norm, "note": "its own process and timer; tanh GELU"}
    if not abs(first.loss - expected) <= 1e-2 * expected:
        return {"status": f"WRONG: loss {first.loss:.5g}; plain PyTorch has {expected:.5g}", **facts}
    seconds = [printed.ms / 1e3 for printed in found[WARMUP:]]
    times = {"ms_s" if name == "ms" else name: value for name, value in harness.summary(seconds).items()}
    rate = tokens / times["ms_s"]
    peak, source = resolve_peak(setup.world.device, setup.dtype)
    mfu = {f"mfu_{k}": v * rate / peak for k, v in flops_per_token(setup.shape).items()} if peak else {}
    counted = {"rounds": len(seconds), "tokens_per_s": rate, "peak": source}
    return {"status": "ok", **facts, **times, **counted, **mfu}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmc", type=Path, required=True, help=f"checkout of karpathy/llm.c with {PROGRAM}")
    parser.add_argument("--config", default="gpt2_124m")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2**19, help="of a step")
    parser.add_argument("--steps", type=int, default=20, help=f"the first {WARMUP} are left out")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds")
    parser.add_argument("--out", type=Path, help="append to DIR/step.jsonl")
    args = parser.parse_args(argv)
    program = args.llmc.resolve() / PROGRAM
    if not program.is_file():
        raise ConfigError(f"there is no built {PROGRAM}", where=str(args.llmc), hint=BUILD)
    if args.steps <= WARMUP:
        raise ConfigError("too few steps", where="--steps", expected=f"more than {WARMUP}", found=str(args.steps))
    device, config, B = machine.require_cuda("bench/llmc_binary.py"), step.configuration(args.config), args.batch_size
    T = config.data.block_size
    if args.tokens % (B * T):
        raise ConfigError("no whole number of micro-batches", expected=f"a multiple of {B * T}", found=str(args.tokens))
    accumulation = args.tokens // (B * T)
    config = config.replace(batch_size=B, gradient_accumulation_steps=accumulation)
    setup = step_arms.Setup(config, torch.bfloat16, World(device=device), step_arms.initial_weights(config))
    facts = machine.machine_facts() | {"dtype": "bfloat16", "device": "cuda", "config": args.config, "arm": "llm.c"}
    facts |= {"how": "alone", "batch_size": B, "accumulation": accumulation, "tokens": config.tokens_per_iter}
    facts |= {"block_size": T, "graph": False}
    lines = machine.Lines(args.out and args.out / "step.jsonl", bench="step", **facts)
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(setup, B * accumulation, Path(folder), torch.bfloat16)
        torch.cuda.empty_cache()
        row = row_of(output_of(command(program, inputs, B, T, accumulation, args.steps), args), inputs.loss, setup)
    lines.write(**row)
    print(f"llm.c: {row['status']}" if row["status"] != "ok" else step.told("llm.c", {"batch_size": B, **row}))
    return 0 if row["status"] == "ok" else 1


def output_of(command: list[str], args: argparse.Namespace) -> str:
    """What it printed, errors after; also where it was cut off or could not start."""
    try:
        done = subprocess.run(command, cwd=args.llmc, capture_output=True, text=True, timeout=args.timeout)
        return done.stdout + done.stderr
    except subprocess.TimeoutExpired as cut:
        text = cut.stdout or b""
        return text.decode() if isinstance(text, bytes) else text
    except OSError as problem:
        return str(problem)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
