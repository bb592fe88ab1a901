"""A float32 step of nanoGPT README's CPU job: stock nanoGPT's, ours, and the parts that no rewriting in torch removes.

    python bench/cpu_step.py --nanogpt DIR [--rounds 5] [--steps 60]

DIR is a checkout of karpathy/nanoGPT. Every arm is a process of its own, in turn, and prints its median step; ratios
are pair by pair within a round. products: the step's matrix products alone; attention and GELU: those kernels of torch,
forward and backward. All write to memory that is there already.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from nanogpt_fast import distributed
from nanogpt_fast.model import GPT
from nanogpt_fast.optim import AdamW, FlatParameters
from nanogpt_fast.settings.cli import load_config
from nanogpt_fast.step import TrainStep

B, T, C, H, V, LAYERS = 12, 64, 128, 4, 65, 4  # configs/shakespeare_char_cpu.toml on Tiny Shakespeare
ARMS = ("nanogpt", "ours", "products", "attention", "GELU")
WEIGHTS = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)]  # (out, in), of a layer


def nanogpt_step(folder: Path) -> Callable[[], object]:
    """train.py's step: forward, backward, clip, AdamW, as --device=cpu --compile=False runs it."""
    sys.path.insert(0, str(folder))
    from model import GPT as Stock
    from model import GPTConfig as StockConfig

    sizes = dict(block_size=T, vocab_size=V, n_layer=LAYERS, n_head=H, n_embd=C, dropout=0.0, bias=False)
    model = Stock(StockConfig(**sizes)).train()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    tokens = torch.randint(V, (B, T + 1))

    def step() -> float:
        _, loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def our_step() -> Callable[[], object]:
    config = load_config(["--config", "shakespeare_char_cpu", "--dtype=float32"])
    world = distributed.join("cpu", "gloo", 1)
    model = GPT(config.shape(V)).train()
    model.init_weights(torch.Generator().manual_seed(1))
    optimizer = AdamW(FlatParameters(model, torch.float32, world.device), config.optim, model.ops)
    optimizer.set_lr(1e-3)
    step, batch = TrainStep(model, optimizer, world, 1), torch.randint(V, (1, B, T + 1))
    return lambda: step(batch, 0).loss.item()


def products() -> Callable[[], object]:
    """y = x w^T, dx = dy w, dw = dy^T x of every weight."""
    operands = []
    for out, into in [*WEIGHTS * LAYERS, (V, C)]:
        x, w, dy = torch.randn(B * T, into), torch.randn(out, into), torch.randn(B * T, out)
        operands += [(x, w.t(), torch.empty_like(dy)), (dy, w, torch.empty_like(x)), (dy.t(), x, torch.empty_like(w))]

    def step() -> None:
        for a, b, result in operands:
            torch.mm(a, b, out=result)

    return step


def attention() -> Callable[[], object]:
    distributed.join("cpu", "gloo", 1)  # keeps freed memory
    layers = [torch.randn(B, T, 3, H, C // H, requires_grad=True) for _ in range(LAYERS)]
    d_out = torch.randn(B, H, T, C // H)

    def step() -> None:
        for qkv in layers:
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), d_out)

    return step


def gelu() -> Callable[[], object]:
    layers = [[torch.randn(B * T, 4 * C) for _ in range(3)] for _ in range(LAYERS)]

    def step() -> None:
        for pre, act, grad in layers:
            torch.ops.aten.gelu.out(pre, out=act)
            torch.ops.aten.gelu_backward.grad_input(act, pre, grad_input=grad)

    return step


def median_ms(step: Callable[[], object], steps: int) -> float:
    seconds = []
    for _ in range(steps + 5):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[5:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="checkout of karpathy/nanoGPT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--arm", choices=ARMS, help="only this one, in this process: prints its milliseconds")
    args = parser.parse_args()
    if args.arm:
        make = {"ours": our_step, "products": products, "attention": attention, "GELU": gelu}
        step = make[args.arm]() if args.arm in make else nanogpt_step(args.nanogpt)
        print(median_ms(step, args.steps))
        return
    rounds = []
    for _ in range(args.rounds):
        figures = {}
        for arm in ARMS:
            done = subprocess.run([sys.executable, *sys.argv, "--arm", arm], capture_output=True, text=True, check=True)
            figures[arm] = float(done.stdout.split()[-1])
        rounds.append(figures)
        print({arm: round(ms, 2) for arm, ms in figures.items()}, flush=True)
    print(f"\n{'':<12}{'ms, median':>11}{'of nanoGPT, pair by pair':>26}")
    for arm in ARMS:
        ratios = sorted(figures[arm] / figures["nanogpt"] for figures in rounds)
        ms = statistics.median(figures[arm] for figures in rounds)
        print(f"{arm:<12}{ms:>11.2f}{statistics.median(ratios):>12.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
