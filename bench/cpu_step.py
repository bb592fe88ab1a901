"""A float32 step of nanoGPT README's CPU job: stock nanoGPT's, ours, and the parts that no rewriting in torch removes.

    python bench/cpu_step.py --nanogpt DIR [--rounds 30] [--steps 8]

DIR is a checkout of karpathy/nanoGPT. Every arm is a process of its own; they take turns of a few steps, each round
begun by another, and a ratio is of two medians within one round: a machine that drifts, drifts under both.

Parts: the step's matrix products alone; torch's attention and GELU, forward and backward; LayerNorm likewise; update:
the gradient's norm, AdamW, zeroing; residual: the additions of the residual stream, both ways, and the cross-entropy.
All write to memory that is there already. dispatch is our whole step on 4 tokens, 16 channels wide: what Python,
autograd and torch's dispatcher take when there is next to nothing to compute.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import step_arms
import torch
import torch.nn.functional as F
import turns

from nanogpt_fast.distributed import World, join
from nanogpt_fast.settings.cli import load_config

B, T, C, H, V, LAYERS = 12, 64, 128, 4, 65, 4  # configs/shakespeare_char_cpu.toml on Tiny Shakespeare
WEIGHTS = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)]  # (out, in), of a layer


def training_step(arm: str, nanogpt: Path, batch: tuple[int, int] = (B, T), width: int = C) -> Callable[[], object]:
    config = load_config(
        ["--config", "shakespeare_char_cpu", "--dtype=float32", f"--vocab_size={V}", f"--n_embd={width}"]
    )
    world = World() if arm == "nanogpt" else join("cpu", "gloo", 1)  # join keeps freed memory, which is ours alone
    setup = step_arms.Setup(config, torch.float32, world, step_arms.initial_weights(config), nanogpt)
    step, tokens = step_arms.make_arm(arm, setup), torch.randint(V, (1, batch[0], batch[1] + 1))
    return lambda: step(tokens, 0).loss.item()


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
    join("cpu", "gloo", 1)  # keeps freed memory
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


def layer_norm() -> Callable[[], object]:
    join("cpu", "gloo", 1)
    norms = [(torch.randn(B, T, C), torch.randn(C)) for _ in range(2 * LAYERS + 1)]
    dy, shape = torch.randn(B, T, C), [C]

    def step() -> None:
        for x, w in norms:
            _, mean, rstd = torch.ops.aten.native_layer_norm(x, shape, w, None, 1e-5)
            torch.ops.aten.native_layer_norm_backward(dy, x, shape, mean, rstd, w, None, [True, True, False])

    return step


def update() -> Callable[[], object]:
    p, g, m, v = (torch.rand(LAYERS * 12 * C * C + (V + T) * C) for _ in range(4))
    steps = torch.ones(())

    def step() -> None:
        torch.linalg.vector_norm(g)
        torch._fused_adamw_(
            [p], [g], [m], [v], [], [steps], lr=1e-3, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        g.zero_()

    return step


def residual() -> Callable[[], object]:
    join("cpu", "gloo", 1)
    stream = [torch.randn(B, T, C) for _ in range(2 * LAYERS + 1)]
    logits, targets = torch.randn(B * T, V, requires_grad=True), torch.randint(V, (B * T,))

    def step() -> None:
        for r, delta in [*zip(stream, stream[1:])] * 2:  # forward, and the gradients of both branches
            torch.add(r, delta)
        torch.autograd.grad(F.cross_entropy(logits, targets), logits)

    return step


PARTS: dict[str, Callable[[], Callable[[], object]]] = {
    "products": products,
    "attention": attention,
    "GELU": gelu,
    "LayerNorm": layer_norm,
    "update": update,
    "residual": residual,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="checkout of karpathy/nanoGPT")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=8, help="of an arm's turn")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.nanogpt / "model.py").is_file():
        parser.error(f"--nanogpt: {args.nanogpt} holds no model.py: name a checkout of karpathy/nanoGPT")
    makers = {
        "nanogpt": lambda: training_step("nanogpt", args.nanogpt),
        "ours": lambda: training_step("reference", args.nanogpt),
        **PARTS,
        "dispatch": lambda: training_step("reference", args.nanogpt, (1, 4), 16),
    }
    if args.arm:
        turns.serve(lambda: ({}, makers[args.arm](), dict))
        return
    command = [sys.executable, __file__, "--nanogpt", str(args.nanogpt), "--arm"]
    arms = {name: turns.Apart([*command, name]) for name in makers}
    for arm in arms.values():
        arm.turn(5)
    rounds: list[dict[str, float]] = []
    for i in range(args.rounds):
        figures = {
            name: statistics.median(arms[name].turn(args.steps)["seconds"]) * 1e3
            for name in turns.rotated(list(arms), i)
        }
        figures["parts but dispatch"] = sum(figures[name] for name in PARTS)
        rounds.append(figures)
        print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
    print(f"{'':<20}{'ms, median':>11}   of nanoGPT, round by round: median (quartiles)")
    for name in [*makers, "parts but dispatch"]:
        low, middle, high = statistics.quantiles([figures[name] / figures["nanogpt"] for figures in rounds], n=4)
        ms = statistics.median(figures[name] for figures in rounds)
        print(f"{name:<20}{ms:>11.2f}   {middle:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
