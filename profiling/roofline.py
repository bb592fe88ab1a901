"""The least time that a training step could take on a GPU, op by op: FLOPs, fewest bytes, and the datasheet's peaks.

    python profiling/roofline.py [--gpu h100] [--model 124m] [--batch 64] [--ledger]

It needs the trainer's package: `pip install -e .`, or PYTHONPATH=.:kernels from the repository's root; no GPU, and
nothing runs. floor = max(compute, memory) of each op, as if nothing else were in its way:

    compute   matrix products at the dense bfloat16 peak. In attention, whole 128 x 128 tiles on the diagonal, and the
              exponentials after the products: 16 a clock and SM (CUDA C++ Programming Guide, arithmetic throughput),
              which at head size 64 take as long; only overlapping the two would beat it.
    memory    every operand read once and every result written once at the data sheet's bandwidth; float32 weight
              gradients are read and written once a micro-step, the optimizer's buffers once a step.

The forms are those of nanogpt_kernels: residual and LayerNorm in one pass, GELU in its product's epilogue, logits in
place, packed qkv. --ledger also counts, in Triton's interpreter, the bytes that the memory-bound kernels load and
store, and compares them with the fewest (profiling/ledger.py).
"""

import argparse
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from op_inputs import GPT2
from work import (
    EXPONENTIALS_A_CLOCK,
    FULL,
    HALF,
    Work,
    adamw_bytes,
    add_norm_bytes,
    attention_bytes,
    cross_entropy_bytes,
    embedding_bytes,
    grad_norm_bytes,
    norm_bytes,
)

from nanogpt_fast.gpus import CHOICES, GPUS
from nanogpt_fast.hardware import flops_per_token
from nanogpt_fast.settings.config import GPTConfig

TILE = 128  # edge of attention's tiles: what lies above the diagonal in them is computed too

MODELS = {name: replace(config, bias=False) for name, config in GPT2.items()}  # as nanoGPT trains them


def product(M: int, K: int, N: int, rounds: int, extra: int = 0, size: int = HALF) -> Work:
    """[M, K] times [K, N], `rounds` times a step; extra: elements that its epilogue reads or writes besides."""
    return Work(2.0 * M * K * N * rounds, float(size * (M * K + K * N + M * N + extra) * rounds))


def weight_gradient(M: int, K: int, N: int, rounds: int, size: int = HALF) -> Work:
    """[N, M] times [M, K] added into float32."""
    return Work(2.0 * M * K * N * rounds, float((size * (M * K + M * N) + 2 * FULL * K * N) * rounds))


def step_work(
    config: GPTConfig, batch: int, micro_steps: int, *, deterministic: bool = False, size: int = HALF
) -> dict[str, Work]:
    """{op: its work} in a training step of micro_steps x batch sequences, in a compute dtype of `size` bytes."""
    L, H, C, T, V = config.n_layer, config.n_head, config.n_embd, config.block_size, config.vocab_size
    M, F, D, N = batch * T, 4 * C, C // H, config.num_params(non_embedding=False)
    layers = L * micro_steps
    pairs = batch * H * T * T / 2 * layers  # (query, key) below the diagonal
    tiled = pairs * min(1 + TILE / T, 2.0)  # the whole square at most
    products, exps = (7, 2) if deterministic else (5, 1)  # the deterministic form rebuilds the scores for dQ
    matmul = 2.0 * D * tiled
    norms = [  # forward, backward; the first norm has nothing to add
        micro_steps * norm_bytes(M, C, size, backward=b) + 2 * layers * add_norm_bytes(M, C, size, backward=b)
        for b in (False, True)
    ]
    embeddings = micro_steps * sum(embedding_bytes(M, C, size, backward=b) for b in (False, True))
    return {
        "qkv": product(M, C, 3 * C, layers, size=size),
        "qkv, dgrad": product(M, 3 * C, C, layers, size=size),
        "qkv, wgrad": weight_gradient(M, C, 3 * C, layers, size=size),
        "attention": Work(2 * matmul, float(attention_bytes(M, C, size, backward=False) * layers), tiled),
        f"attention backward, {products} products": Work(
            products * matmul, float(attention_bytes(M, C, size, backward=True) * layers), exps * tiled
        ),
        "attention projection": product(M, C, C, layers, size=size),
        "attention projection, dgrad": product(M, C, C, layers, size=size),
        "attention projection, wgrad": weight_gradient(M, C, C, layers, size=size),
        "fc + GELU": product(M, C, F, layers, extra=M * F, size=size),
        "fc, dgrad": product(M, F, C, layers, size=size),
        "fc, wgrad": weight_gradient(M, C, F, layers, size=size),
        "MLP projection": product(M, F, C, layers, size=size),
        "MLP projection, dgrad + dGELU": product(M, C, F, layers, extra=M * F, size=size),
        "MLP projection, wgrad": weight_gradient(M, F, C, layers, size=size),
        "head": product(M, C, V, micro_steps, size=size),
        "head, dgrad": product(M, V, C, micro_steps, size=size),
        "head, wgrad": weight_gradient(M, C, V, micro_steps, size=size),
        "cross-entropy in place": Work(bytes=float(cross_entropy_bytes(M, V, size, passes=2) * micro_steps)),
        "residual + LayerNorm": Work(bytes=float(norms[0])),
        "residual + LayerNorm, backward": Work(bytes=float(norms[1])),
        "embedding, both ways": Work(bytes=float(embeddings)),
        "gradient norm, AdamW, zeroing": Work(bytes=float(grad_norm_bytes(N) + adamw_bytes(N, size) + FULL * N)),
    }


def compute_and_memory(work: Work, peak: float, bandwidth: float, exp_rate: float) -> tuple[float, float]:
    """Seconds of each: exponentials come after the products, as the kernels have them (an overlap would hide some)."""
    seconds = work.seconds(peak, bandwidth, exp_rate)
    return seconds["flops"] + seconds["exps"], seconds["bytes"]


def print_step(works: dict[str, Work], peak: float, bandwidth: float, exp_rate: float) -> float:
    """The table; returns its total in seconds."""
    times = [compute_and_memory(work, peak, bandwidth, exp_rate) for work in works.values()]
    total = sum(map(max, times))
    print(f"{'op':<36}{'TFLOP':>9}{'GB':>9}{'compute ms':>12}{'memory ms':>11}{'floor ms':>10}{'share':>8}  bound")
    for (op, work), (compute, memory) in zip(works.items(), times):
        bound = "memory" if memory > compute else "exponentials and products" if work.exps else "products"
        floor = max(compute, memory)
        print(f"{op:<36}{work.flops / 1e12:>9.1f}{work.bytes / 1e9:>9.1f}{compute * 1e3:>12.2f}"
              f"{memory * 1e3:>11.2f}{floor * 1e3:>10.2f}{floor / total:>8.1%}  {bound}")  # fmt: skip
    flops, moved = sum(w.flops for w in works.values()) / 1e12, sum(w.bytes for w in works.values()) / 1e9
    print(f"{'total':<36}{flops:>9.1f}{moved:>9.1f}{'':>23}{total * 1e3:>10.2f}")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=CHOICES, default="h100")
    parser.add_argument("--model", choices=MODELS, default="124m")
    parser.add_argument("--batch", type=int, default=64, help="sequences a micro-step (default 64)")
    parser.add_argument("--tokens", type=int, default=2**19, help="a step (default 524,288, rounded up to micro-steps)")
    parser.add_argument("--tflops", type=float, help="rate of matrix products to suppose instead of the peak")
    parser.add_argument("--bandwidth", type=float, help="TB/s to suppose instead of the data sheet's")
    parser.add_argument(
        "--deterministic", action="store_true", help="attention backward without atomics: 7 products, not 5"
    )
    parser.add_argument("--ledger", action="store_true", help="count bytes in the interpreter as well")
    args = parser.parse_args()
    name, gpu, config = CHOICES[args.gpu], GPUS[CHOICES[args.gpu]], MODELS[args.model]
    datasheet = gpu.tflops * 1e12
    peak, bandwidth = (args.tflops or gpu.tflops) * 1e12, (args.bandwidth or gpu.gbps / 1e3) * 1e12
    assert gpu.flops_a_clock is not None, name  # at the clock of the data sheet's peak:
    exp_rate = datasheet / gpu.flops_a_clock * EXPONENTIALS_A_CLOCK
    micro_steps = math.ceil(args.tokens / (args.batch * config.block_size))
    tokens = micro_steps * args.batch * config.block_size
    print(f"{args.model} on {name}: {peak / 1e12:.0f} TFLOP/s{' (supposed)' if args.tflops else ''}, "
          f"{bandwidth / 1e12:.3g} TB/s{' (supposed)' if args.bandwidth else ''}, "
          f"{exp_rate / 1e12:.2f}T exponentials/s; "
          f"{micro_steps} x {args.batch} x {config.block_size} = {tokens:,} tokens a step\n")  # fmt: skip
    works = step_work(config, args.batch, micro_steps, deterministic=args.deterministic)
    total = print_step(works, peak, bandwidth, exp_rate)
    flops = flops_per_token(config)
    mfu = ", ".join(f"{flops[name] * tokens / total / datasheet:.1%} ({name})" for name in flops)
    print(f"\n{tokens / total / 1e3:,.0f}K tokens/s; MFU {mfu}. A bound, not a measurement.")
    if args.ledger:
        print(flush=True)
        sys.exit(subprocess.run([sys.executable, str(Path(__file__).with_name("ledger.py"))]).returncode)


if __name__ == "__main__":
    main()
