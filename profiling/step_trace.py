"""Where a training step's time goes: torch.profiler over some steps, as a table by kind of work and a Chrome trace.

    python profiling/step_trace.py --config shakespeare_char_cpu [--steps 30] [--trace out.json.gz] [--flag=value ...]

Random tokens, the preset's shapes, the trainer's own TrainStep. The dataset is not read: give --vocab_size (65 for
shakespeare_char), or it is GPT-2's padded 50304. Open the trace in https://ui.perfetto.dev.
"""

import argparse
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from nanogpt_fast.distributed import World, resolve_device, resolve_dtype
from nanogpt_fast.hardware import flops_per_token, resolve_peak
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import select_ops
from nanogpt_fast.optim import AdamW, FlatParameters
from nanogpt_fast.settings.cli import load_config
from nanogpt_fast.step import TrainStep

KINDS = {  # the first whose words occur in an operator's name
    "matrix products": ("mm", "linear"),
    "attention": ("attention", "softmax_backward"),
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm",),
    "cross-entropy": ("log_softmax", "nll_loss"),
    "embedding": ("embedding", "index", "scatter"),
    "AdamW, norm, zeroing": ("adamw", "vector_norm", "zero_", "fill_"),
    "casts and copies": ("copy_", "to_copy", "cat", "contiguous"),
    "other elementwise": ("add", "mul", "sub", "div", "sum", "where", "masked"),
}


def kind_of(name: str) -> str:
    """The row an operator is counted in; Python, autograd and the rest are overhead."""
    if not name.startswith("aten::"):
        return "Python, autograd, dispatch"
    return next((k for k, words in KINDS.items() if any(w in name for w in words)), "Python, autograd, dispatch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--trace", help="write a Chrome trace here")
    args, rest = parser.parse_known_args()
    config = load_config(rest)
    device = resolve_device(config.system.device)
    dtype = resolve_dtype(config.system.dtype, device)
    vocab = config.model.vocab_size or 50304
    shape = config.shape(vocab)
    model = GPT(shape, select_ops(config.system.kernels, device.type)).train()
    generator = torch.Generator().manual_seed(config.run.seed)
    model.init_weights(generator)
    optimizer = AdamW(FlatParameters(model, dtype, device), config.optim, model.ops)
    step = TrainStep(model, optimizer, World(device=device), config.run.seed)
    size = (config.data.gradient_accumulation_steps, config.data.batch_size, shape.block_size + 1)
    batch = torch.randint(vocab, size, generator=generator)
    seconds = []
    for i in range(args.steps + 5):
        began = time.perf_counter()
        step(batch, i).loss.item()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[5:])
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as trace:
        for i in range(args.steps):
            step(batch, i).loss.item()
    if args.trace:
        trace.export_chrome_trace(args.trace)
    spent: dict[str, float] = {}
    for event in trace.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        spent[kind_of(event.key)] = spent.get(kind_of(event.key), 0.0) + own
    total = sum(spent.values())
    print(f"{device}, {str(dtype).removeprefix('torch.')}: {median * 1e3:.2f} ms a step, not profiled (median)")
    for kind, own in sorted(spent.items(), key=lambda row: -row[1]):
        print(f"  {kind:<28}{own / total:>7.1%}{own / total * median * 1e3:>9.2f} ms")
    peak, source = resolve_peak(device, dtype)
    if peak:
        flops = flops_per_token(shape)["nanogpt"] * config.tokens_per_iter
        print(f"  {flops / 1e9:.2f} GFLOP a step: {flops / peak * 1e3:.2f} ms at the peak ({source})")


if __name__ == "__main__":
    main()
