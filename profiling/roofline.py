"""The least time that a training step could take on a GPU, op by op: FLOPs, fewest bytes, and the datasheet's peaks.

    python profiling/roofline.py [--gpu h100 ...] [--model 124m] [--batch 64] [--ledger]
    python profiling/roofline.py [--gpu h100 ...] --config NAME|FILE [--flag=value ...] [--gelu inside]
    python profiling/roofline.py --gpu h100 --config NAME|FILE --compiled [--measured FILE.jsonl]
    python profiling/roofline.py [--gpu h100 ...] --config NAME|FILE --world [N ...] [--link ib] [--parallel zero1]
    python profiling/roofline.py --published

It needs the trainer's package: `pip install -e .`, or PYTHONPATH=.:kernels from the repository's root; no GPU, and
nothing runs. floor = max(compute, memory) of each op, as if nothing else were in its way:

    compute   matrix products at the dense bfloat16 peak. In attention, whole 128 x 128 tiles on the diagonal, and the
              exponentials after the products: 16 a clock and SM (CUDA C++ Programming Guide, arithmetic throughput),
              which at head size 64 take as long; only overlapping the two would beat it.
    memory    every operand read once and every result written once at the data sheet's bandwidth; float32 weight
              gradients are read and written once a micro-step, the optimizer's buffers once a step.

The forms are those of nanogpt_kernels: residual and LayerNorm in one pass, GELU in its product's epilogue, logits in
place, packed qkv. --config shows instead what a step of that configuration launches, with the Triton ops and the GPU's
launch rows (step_launches.py): the floor of each launch, and the bytes beside those planned (byte_plan.py). Several
GPUs are set side by side. --compiled compiles the step's kernels and says what their machine code predicts of each
(compiled_step.py). --world plays the step on N GPUs: what of the communication hides, tokens/s, MFU, memory a rank,
hours and kWh of a budget, where it bends and why (scaling.py); --published sets that model beside others' figures.
--ledger also counts, in Triton's interpreter, the bytes that the memory-bound kernels load and store, and compares them
with the fewest (profiling/ledger.py).
"""

import argparse
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from measured_roof import Roof, sheet_roof
from op_inputs import GPT2
from work import (
    FULL,
    HALF,
    Work,
    adamw_bytes,
    add_norm_bytes,
    attention_bytes,
    causal_pairs,
    cross_entropy_bytes,
    embedding_bytes,
    grad_norm_bytes,
    norm_bytes,
)

from nanogpt_fast.columns import columns
from nanogpt_fast.command import run_command
from nanogpt_fast.errors import ConfigError
from nanogpt_fast.gpus import CHOICES, GPUS
from nanogpt_fast.hardware import flops_per_token
from nanogpt_fast.settings.config import GPTConfig

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
    tiled = causal_pairs(batch * H, T) * layers
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


def floor_of(work: Work, roof: Roof) -> tuple[float, str]:
    """(seconds that the work takes at least, what binds)."""
    assert roof.flops and roof.bandwidth, roof
    compute, memory = compute_and_memory(work, roof.flops, roof.bandwidth, roof.exp_rate)
    bound = "memory" if memory > compute else "exponentials and products" if work.exps else "products"
    return max(compute, memory), bound


# ---- a model's ops ----


def print_step(works: dict[str, Work], roof: Roof) -> float:
    """The table; returns its total in seconds."""
    assert roof.flops and roof.bandwidth, roof
    total = sum(floor_of(work, roof)[0] for work in works.values())
    print(f"{'op':<36}{'TFLOP':>9}{'GB':>9}{'compute ms':>12}{'memory ms':>11}{'floor ms':>10}{'share':>8}  bound")
    for op, work in works.items():
        compute, memory = compute_and_memory(work, roof.flops, roof.bandwidth, roof.exp_rate)
        floor, bound = floor_of(work, roof)
        print(f"{op:<36}{work.flops / 1e12:>9.1f}{work.bytes / 1e9:>9.1f}{compute * 1e3:>12.2f}"
              f"{memory * 1e3:>11.2f}{floor * 1e3:>10.2f}{floor / total:>8.1%}  {bound}")  # fmt: skip
    flops, moved = sum(w.flops for w in works.values()) / 1e12, sum(w.bytes for w in works.values()) / 1e9
    print(f"{'total':<36}{flops:>9.1f}{moved:>9.1f}{'':>23}{total * 1e3:>10.2f}")
    return total


def show_model(args: argparse.Namespace) -> None:
    """--model: the ops of a step in their best form."""
    config, batch = MODELS[args.model], args.batch or 64
    micro_steps = math.ceil((args.tokens or 2**19) / (batch * config.block_size))
    tokens = micro_steps * batch * config.block_size
    rows = []
    for gpu in args.gpu:
        roof = supposed_roof(CHOICES[gpu], args)
        print(f"{args.model} on {rates(CHOICES[gpu], roof, args)}; "
              f"{micro_steps} x {batch} x {config.block_size} = {tokens:,} tokens a step\n")  # fmt: skip
        works = step_work(config, batch, micro_steps, deterministic=args.deterministic)
        total = print_step(works, roof)
        print(f"\n{speed(config, tokens, total, gpu)}. A bound, not a measurement.")
        rows.append([gpu, f"{total * 1e3:.2f}", *speed_cells(config, tokens, total, gpu)])
        if len(args.gpu) > 1:
            print()
    if len(args.gpu) > 1:
        print_beside(["GPU", "floor ms", *SPEED], rows)


# ---- a GPU's rates, and what a time makes of them ----

SPEED = ("K tokens/s", "MFU nanogpt", "MFU llmc")


def supposed_roof(name: str, args: argparse.Namespace) -> Roof:
    """The data sheet's rates, or those that --tflops and --bandwidth suppose."""
    roof = sheet_roof(name, "bfloat16")
    assert roof is not None, name
    given = {"flops": args.tflops, "bandwidth": args.bandwidth}
    return replace(roof, **{field: rate * 1e12 for field, rate in given.items() if rate})


def rates(name: str, roof: Roof, args: argparse.Namespace) -> str:
    assert roof.flops and roof.bandwidth, roof
    return (
        f"{name}: {roof.flops / 1e12:.0f} TFLOP/s{' (supposed)' if args.tflops else ''}, "
        f"{roof.bandwidth / 1e12:.3g} TB/s{' (supposed)' if args.bandwidth else ''}, "
        f"{roof.exp_rate / 1e12:.2f}T exponentials/s"
    )


def speed_cells(config: GPTConfig, tokens: int, seconds: float, gpu: str) -> list[str]:
    """Thousands of tokens a second, and the MFU by both counts, at the data sheet's peak."""
    peak, flops = GPUS[CHOICES[gpu]].tflops * 1e12, flops_per_token(config)
    mfu = [f"{flops[name] * tokens / seconds / peak:.1%}" for name in ("nanogpt", "llmc")]
    return [f"{tokens / seconds / 1e3:,.0f}", *mfu]


def speed(config: GPTConfig, tokens: int, seconds: float, gpu: str) -> str:
    rate, nanogpt, llmc = speed_cells(config, tokens, seconds, gpu)
    return f"{rate}K tokens/s; MFU {nanogpt} (nanogpt), {llmc} (llmc)"


def print_beside(header: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as they must be: the first one left, the others right."""
    print("\n".join(columns([header, *rows])))


def add_world_flags(parser: argparse.ArgumentParser) -> list[str]:
    """Those of --world; returns their names but its own."""
    group = parser.add_argument_group("of --config, on several GPUs")
    group.add_argument("--world", nargs="*", metavar="N", help="numbers of GPUs; none named: 1, 2, 4, ... 1,024")
    added = [
        group.add_argument("--link", help="what joins nodes: ib (default), ethernet; nvlink: one node only"),
        group.add_argument("--nic", type=float, metavar="GBITS", help="Gbit/s of network a GPU, not the usual card's"),
        group.add_argument("--parallel", choices=("ddp", "zero1"), help="default ddp"),
        group.add_argument("--reduce_dtype", choices=("float32", "bfloat16"), help="of gradients sent; float32"),
        group.add_argument("--bucket_mb", type=float, metavar="MB", help="of float32 gradients; default 25"),
        group.add_argument("--scaling", choices=("strong", "weak"), help="default both: one batch shared, or one each"),
        group.add_argument("--budget", type=float, metavar="TOKENS", help="default: those of the configuration's run"),
        group.add_argument("--mfu", help="of one GPU, as 0.5; floor; default measured: as an H100 was"),
        group.add_argument("--overhead", type=float, metavar="X", help="energy over the GPUs'; 1.5, an assumption"),
        group.add_argument("--plot", metavar="PNG", help="draw tokens/s and efficiency"),
    ]
    return [action.dest for action in added]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=CHOICES, nargs="+", default=["h100"], metavar="GPU", help=", ".join(CHOICES))
    parser.add_argument("--model", choices=MODELS, default=None, help="default 124m")
    parser.add_argument("--config", metavar="NAME|FILE", help="a preset or file, as train takes it, and its flags")
    parser.add_argument("--batch", type=int, help="of --model: sequences a micro-step (default 64)")
    parser.add_argument("--tokens", type=int, help="of --model: a step (default 524,288, rounded up to micro-steps)")
    parser.add_argument("--tflops", type=float, help="rate of matrix products to suppose instead of the peak")
    parser.add_argument("--bandwidth", type=float, help="TB/s to suppose instead of the data sheet's")
    parser.add_argument(
        "--deterministic", action="store_true", help="of --model: attention backward without atomics, 7 products, not 5"
    )
    parser.add_argument(
        "--gelu", choices=("inside", "apart"), help="of --config: of the MLP's products, not as the rows say"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="of --config, on one GPU: what its kernels' code predicts"
    )
    parser.add_argument("--measured", metavar="FILE", help="of --compiled: a results file of bench/, shown beside it")
    parser.add_argument("--ledger", action="store_true", help="count bytes in the interpreter as well")
    parser.add_argument("--published", action="store_true", help="the model of --world beside published rows")
    of_world = add_world_flags(parser)
    args, flags = parser.parse_known_args(argv)
    if args.config:
        of_model = [name for name in ("model", "batch", "tokens", "deterministic") if getattr(args, name)]
        if of_model:
            raise ConfigError(
                f"--config does not go with --{of_model[0]}", hint="a flag of train's, as --batch_size=64"
            )
        if args.measured and not args.compiled or args.compiled and len(args.gpu) > 1:
            parser.error("--compiled is of one GPU, --measured goes with it")
        if args.world is not None:
            if args.gelu or args.compiled or args.measured:
                parser.error("--world takes no --gelu, --compiled, --measured")
            from scaling_table import show_world  # which needs Triton, as config_roofline does

            show_world(args, flags)
        elif given := [name for name in of_world if getattr(args, name) is not None]:
            parser.error(f"only with --world: --{given[0]}")
        else:
            from config_roofline import show_config  # which needs Triton; the rest of this file does not

            show_config(args, flags)
    elif given := [name for name in ("world", *of_world) if getattr(args, name) is not None]:
        parser.error(f"only with --config: --{given[0]}")
    elif args.published:
        from scaling_published import show_published

        show_published()
    elif flags or args.gelu or args.compiled:
        parser.error(f"only with --config: {' '.join(flags) or ('--gelu' if args.gelu else '--compiled')}")
    else:
        args.model = args.model or "124m"
        show_model(args)
    if args.ledger:
        print(flush=True)
        return subprocess.run([sys.executable, str(Path(__file__).with_name("ledger.py"))]).returncode
    return 0


if __name__ == "__main__":
    run_command(main)
