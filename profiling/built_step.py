"""A run's own training step on random tokens: the model, optimizer and batch that its configuration asks for."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanogpt_fast.data.dataset import read_meta
from nanogpt_fast.data.splits import dataset_folder
from nanogpt_fast.distributed import World, resolve_device, resolve_dtype
from nanogpt_fast.errors import DataError
from nanogpt_fast.hardware import capability_of
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import REFERENCE, Ops, expected, select_ops
from nanogpt_fast.optim import AdamW, FlatParameters
from nanogpt_fast.run import ranges, tracing
from nanogpt_fast.run.step_parts import Summary
from nanogpt_fast.settings.config import Config, GPTConfig
from nanogpt_fast.step import TrainStep


@dataclass(frozen=True)
class BuiltStep:
    """step(batch, i) trains once; facts are what a summary of it says."""

    config: Config
    step: TrainStep
    batch: Tensor  # [A, B, T + 1]
    device: torch.device
    dtype: torch.dtype
    facts: dict


def vocab_size_of(config: Config, without_data: int | None = None) -> int:
    """--vocab_size, else the dataset's, as train takes it. Where there is no dataset to ask: without_data, DataError
    if that is not given."""
    if config.model.vocab_size:
        return config.model.vocab_size
    from nanogpt_fast.weights.canonical import GPT2_PADDED  # which needs safetensors: not on every machine with a GPU

    folder = dataset_folder(config.data)
    if folder is None and without_data:
        return without_data
    if folder is None:
        raise DataError(
            "the vocabulary is not known: the dataset is not there",
            where=f"dataset = {config.data.dataset!r}, data_dir = {config.data.data_dir!r}",
            expected="a prepared folder, or --vocab_size",
            hint=f"python -m nanogpt_fast.prepare {config.data.dataset}, or --vocab_size=N (GPT-2: {GPT2_PADDED})",
        )
    meta = read_meta(folder)
    return GPT2_PADDED if meta is None or meta.tokenizer.get("kind") == "gpt2" else meta.vocab_size


def build(config: Config, learning_rate: float = 1e-4) -> BuiltStep:
    """On the device that the configuration names, compiled where train would compile."""
    vocab, device = vocab_size_of(config), resolve_device(config.system.device)
    dtype, shape = resolve_dtype(config.system.dtype, device), config.shape(vocab)
    ops = select_ops(config.system.kernels, device.type, expected(capability_of(device)))
    generator = torch.Generator().manual_seed(config.run.seed)
    step = assembled(config, shape, ops, dtype, device, generator)
    step.optimizer.set_lr(learning_rate)
    if config.system.compile and device.type == "cuda" and ops is REFERENCE:
        step.model.compile()
    size = (config.data.gradient_accumulation_steps, config.data.batch_size, shape.block_size + 1)
    batch = torch.randint(vocab, size, generator=generator)
    return BuiltStep(config, step, batch, device, dtype, tracing.facts_of(config, shape, device, dtype, ranks=1))


def assembled(
    config: Config, shape: GPTConfig, ops: Ops, dtype: torch.dtype, device: torch.device,
    generator: torch.Generator | None = None,
) -> TrainStep:  # fmt: skip
    """The step alone; without a generator the weights are not initialised."""
    wide = torch.float32 if config.system.residual_dtype == "float32" else None
    model = GPT(shape, ops, wide, config.system.recompute).train()
    if generator:
        model.init_weights(generator)
    optimizer = AdamW(FlatParameters(model, dtype, device), config.optim, ops, scale_loss=dtype == torch.float16)
    return TrainStep(model, optimizer, World(device=device), config.run.seed)


def traced(built: BuiltStep, steps: int, folder: Path) -> Summary:
    """Time `steps` steps, then trace as many into the folder; the summary says what tracing cost."""
    step, batch, seconds = built.step, built.batch, []
    for i in range(steps + 5):
        began = time.perf_counter()
        step(batch, i).loss.item()
        tracing.settle(built.device)
        seconds.append(time.perf_counter() - began)
    capture = tracing.Capture(built.device, step.model, built.facts)
    capture.start()
    for i in range(steps):
        with ranges.span(ranges.ITERATION):
            step(batch, i).loss.item()
    return capture.stop(folder, untraced_ms=statistics.median(seconds[5:]) * 1e3)
