"""The bytes that the memory-bound kernels load and store, counted in Triton's interpreter, over the fewest possible.

    python profiling/ledger.py [--rows 4096]

No GPU is needed, and TRITON_INTERPRET is set here. Widths are GPT-2 124M's in bfloat16; persistent kernels run as 16
programs. The fewest are each operand read and each result written once (profiling/work.py); for cross-entropy, its
plan: two reads, the second of which finds its row in L2, and one write. A count over its limit makes the exit code 1.
Backward's partial sums are counted as they are written and as column_sums.py reads them. No limit is held where many
programs read a small operand again, from L2 (bias_gelu's bias, embedding's positions); embedding's backward is left
out, as its bytes depend on which ids repeat.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

if __name__ == "__main__":  # before Triton is imported, which nothing but this process may notice
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import work
from byte_counter import counting_bytes, mend_interpreter
from nanogpt_kernels import launch
from nanogpt_kernels.contract import GRAD_NORM, LOSS_SCALE, LR
from nanogpt_kernels.ops.adamw import adamw_, grad_norm
from nanogpt_kernels.ops.cross_entropy import cross_entropy_in_place
from nanogpt_kernels.ops.embedding import embedding
from nanogpt_kernels.ops.mlp import bias_gelu
from nanogpt_kernels.ops.norm import add_norm, norm
from op_inputs import gpt2
from torch import Tensor

SHAPE = gpt2("124m")
C, F, V, VALID = SHAPE.C, 4 * SHAPE.C, SHAPE.V, SHAPE.valid
PROGRAMS = 16


@dataclass(frozen=True)
class Entry:
    """What one direction of an op moved. limit: of counted / fewest; None: told, not held."""

    op: str
    loaded: int
    stored: int
    fewest: int
    limit: float | None

    @property
    def ratio(self) -> float:
        return (self.loaded + self.stored) / self.fewest

    @property
    def too_many(self) -> bool:
        return self.limit is not None and self.ratio > self.limit


def count(op: str, run: Callable[[], object], fewest: int, limit: float | None = None) -> Entry:
    with counting_bytes() as counted:
        run()
    return Entry(op, counted["load"], counted["store"], fewest, limit)


def random(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().requires_grad_()


def vector(n: int) -> Tensor:
    return torch.ones(n).requires_grad_()


def both_ways(
    op: str, run: Callable[[], tuple[Tensor, ...]], fewest: list[int], limits: tuple[float | None, float | None]
) -> Iterator[Entry]:
    """An entry each for run() and for the backward pass of what it returns."""
    outs: list[Tensor] = []
    yield count(op, lambda: outs.extend(run()), fewest[0], limits[0])
    grads = [torch.randn_like(o) for o in outs]
    yield count(f"{op}, backward", lambda: torch.autograd.backward(outs, grads), fewest[1], limits[1])


def entries(rows: int) -> Iterator[Entry]:
    """Everything, at so many rows."""
    # Taller tiles than launch_rows.py's change no byte, and the interpreter's time from minutes to seconds.
    choices = dict(programs_per_sm=PROGRAMS // launch.INTERPRETER_SMS)
    with ExitStack() as stack:
        for op, blocks in {"norm_fwd": dict(ROWS=64), "norm_bwd": dict(ROWS=64), "grad_norm": {}}.items():
            stack.enter_context(launch.override(op, blocks=blocks, choices=choices))
        yield from norms(rows)
        yield from activations(rows)
        yield from optimizer(rows * C)


def norms(M: int) -> Iterator[Entry]:
    def run_add_norm(p: float) -> tuple[Tensor, Tensor]:
        return add_norm(random(M, C), random(M, C), vector(C), vector(C), vector(C), 1e-5, p, torch.tensor([1]), 3)

    limits, ways = (1.05, 1.15), (False, True)
    fewest = [work.norm_bytes(M, C, backward=b) for b in ways]
    yield from both_ways("norm", lambda: (norm(random(M, C), vector(C), vector(C)),), fewest, limits)
    for p in (0.0, 0.1):
        fewest = [work.add_norm_bytes(M, C, backward=b, dropout=p > 0.0) for b in ways]
        yield from both_ways(f"add_norm, p={p}", functools.partial(run_add_norm, p), fewest, limits)


def activations(M: int) -> Iterator[Entry]:
    idx, wte, wpe = torch.randint(VALID, (8, M // 8)), random(VALID, C), random(M // 8, C)
    fewest = work.embedding_bytes(M, C, backward=False)
    yield count("embedding", lambda: embedding(idx, wte, wpe, 0.0, None, 0), fewest)
    few = M // 16  # of the long rows
    gelu = [work.gelu_bytes(few, F, backward=b) for b in (False, True)]
    run = lambda: (bias_gelu(random(few, F), vector(F), "gelu_tanh"),)
    yield from both_ways("bias_gelu, tanh", run, gelu, (None, 1.05))
    few = M // 32
    logits, targets, nll = torch.randn(few, V).bfloat16(), torch.randint(VALID, (few,)), torch.empty(few)
    run_in_place = lambda: cross_entropy_in_place(logits, V, targets, torch.ones(1), nll, -1, VALID)
    yield count("cross_entropy in place", run_in_place, work.cross_entropy_bytes(few, V, passes=3), 1.05)


def optimizer(N: int) -> Iterator[Entry]:
    scalars = torch.zeros(5, dtype=torch.float64)
    scalars[LR], scalars[LOSS_SCALE], scalars[GRAD_NORM] = 1e-3, 1.0, 1.0
    master, m, v, g = (torch.zeros(N) for _ in range(4))
    segments = [(0, N - 4 * C, 0.1), (N - 4 * C, N, 0.0)]
    yield count("grad_norm", lambda: grad_norm(g), work.grad_norm_bytes(N), 1.02)
    update = lambda: adamw_(master.bfloat16(), master, m, v, g, scalars, segments, 0.9, 0.95)
    yield count("adamw", update, work.adamw_bytes(N), 1.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="tokens (default 4096)")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"bytes of kernels, bfloat16, C = {C}, V = {V}, {args.rows} rows, {PROGRAMS} programs where persistent\n")
    print(f"{'op':<26}{'loaded':>14}{'stored':>14}{'fewest':>14}{'ratio':>8}{'limit':>8}")
    wrong, began = 0, time.perf_counter()
    for e in entries(args.rows):
        limit = "-" if e.limit is None else f"{e.limit:.2f}"
        print(f"{e.op:<26}{e.loaded:>14,}{e.stored:>14,}{e.fewest:>14,}{e.ratio:>8.3f}{limit:>8}"
              f"{'  TOO MANY' if e.too_many else ''}", flush=True)  # fmt: skip
        wrong += e.too_many
    print(f"\n{wrong or 'none'} over the limit; {time.perf_counter() - began:.0f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    mend_interpreter()
    main()
