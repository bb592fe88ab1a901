"""Fill docs/memory.md with its figures, each by the predictor that --dry_run uses (nanogpt_fast/memory.py).

    python profiling/memory_page.py [--check] [--only NAME]

The page is written by hand but for its blocks, `<!-- figures: NAME ARGUMENTS -->` to `<!-- end -->`, made here:

  state                  bytes a parameter, by precision
  kept MODEL             bytes that a layer keeps of a token, by ops, precision and --recompute
  head MODEL             bytes a token of the head at the peak, and what it holds of the logits
  cost MODEL ...         FLOPs that --recompute=block adds
  fits MODEL GIB ...     the largest micro-batch by ops and --recompute

--check changes nothing; exit code 1 where the page is not what this would write. --only looks at blocks of that NAME.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import page_blocks
import torch
from op_inputs import GPT2

from nanogpt_fast.command import run_command
from nanogpt_fast.hardware import flops_per_token
from nanogpt_fast.memory import RECOMPUTE, RESERVE, Plan, peak
from nanogpt_fast.ops import REFERENCE, TRITON
from nanogpt_fast.settings.config import GPTConfig

PAGE = Path(__file__).resolve().parent.parent / "docs/memory.md"
MODELS = {name: replace(shape, bias=False) for name, shape in GPT2.items()}
OPS = {"reference": REFERENCE, "triton": TRITON}
PRECISIONS = {  # {name: (dtype, residual_dtype)}
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16, residual float32": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, None),
}
SEQUENCES = 512  # an iteration's: 524,288 tokens


def plan(shape: GPTConfig, ops: str = "reference", precision: str = "bfloat16", recompute: str = "none") -> Plan:
    """On an sm_90, one sequence of SEQUENCES at a time."""
    dtype, residual = PRECISIONS[precision]
    return Plan(shape=shape, ops=OPS[ops], dtype=dtype, residual_dtype=residual, recompute=recompute, batch_size=1,
                micro_batches=SEQUENCES, device_type="cuda", capability=90)  # fmt: skip


@cache
def parts(of: Plan) -> dict[str, int]:
    return peak(of)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def state() -> str:
    shape, names = MODELS["124m"], ("parameters", "gradients", "optimizer")
    n, rows = shape.num_params(non_embedding=False), []
    for precision in PRECISIONS:
        found = parts(plan(shape, precision=precision))
        sizes = [round(found[name] / n) for name in names]
        rows.append([precision, *map(str, sizes), str(sum(sizes))])
    return table(["precision", *names, "bytes a parameter"], rows)


def kept(model: str) -> str:
    """Of the fourth layer of a model with a vocabulary so large that the peak is at the head, 16 sequences at once."""
    shape, rows = replace(MODELS[model], vocab_size=200_000), []
    for ops in OPS:
        for precision in PRECISIONS:
            cells = []
            for recompute in RECOMPUTE:
                of = [plan(replace(shape, n_layer=n), ops, precision, recompute).with_batch(16) for n in (3, 4)]
                added = parts(of[1])["activations"] - parts(of[0])["activations"]
                cells.append(f"{added / (16 * shape.block_size):,.0f}")
            rows.append([ops, precision, *cells])
    return table(["ops", "precision", *(f"--recompute={name}" for name in RECOMPUTE)], rows)


def head(model: str) -> str:
    shape, rows = replace(MODELS[model], n_layer=1), []
    for ops in OPS:
        for precision in ("float32", "bfloat16"):
            cells = []
            for batch_size in (8, 32):
                held = parts(plan(shape, ops, precision, "block").with_batch(batch_size))["logits and workspace"]
                cells.append(f"{held / 2**30:.2f}")
            rows.append([ops, precision, *cells])
    return table(["ops", "precision", "GiB at 8 sequences", "at 32"], rows)


def cost(*models: str) -> str:
    rows = []
    for model in models:
        shape = MODELS[model]
        L, C, T = shape.n_layer, shape.n_embd, shape.block_size
        forward, all_of_it = 24.0 * L * C * C + 4.0 * L * C * T, flops_per_token(shape)["nanogpt"]
        rows.append([f"GPT-2 {model}", f"{all_of_it / 1e9:.2f}", f"{forward / 1e9:.2f}", f"{forward / all_of_it:.0%}"])
    return table(["model", "GFLOP a token", "the blocks' forward once more", "more"], rows)


def largest(of: Plan, budget: float) -> int:
    """memory.largest_batch, for powers of two and from below, so that cards share predictions; 0 where none fits."""
    found = 0
    while (n := found * 2 or 1) <= SEQUENCES and sum(parts(of.with_batch(n)).values()) <= budget:
        found = n
    return found


def fits(model: str, *sizes: str) -> str:
    rows = []
    for ops in OPS:
        for recompute in RECOMPUTE:
            of = plan(MODELS[model], ops, recompute=recompute)
            cells = [largest(of, (1 - RESERVE) * int(size) * 2**30) for size in sizes]
            rows.append([ops, recompute, *(str(n) if n else "none" for n in cells)])
    parameters = MODELS[model].num_params(non_embedding=False) / 1e6
    caption = f"GPT-2 {model}, {parameters:,.1f}M parameters:\n\n"
    return caption + table(["ops", "--recompute", *(f"{size} GiB" for size in sizes)], rows)


MAKERS: dict[str, Callable[..., str]] = {"state": state, "kept": kept, "head": head, "cost": cost, "fits": fits}


def main(argv: list[str]) -> int:
    return page_blocks.main(argv, __doc__, PAGE, MAKERS, "profiling/memory_page.py")


if __name__ == "__main__":
    run_command(main)
