"""--dry_run: the resolved configuration, and what a run of it asks for."""

from dataclasses import replace

import torch

from nanogpt_fast import distributed
from nanogpt_fast.data.dataset import read_meta
from nanogpt_fast.data.splits import dataset_folder, open_split
from nanogpt_fast.errors import ConfigError, NanogptError, did_you_mean, printable
from nanogpt_fast.gpus import CHOICES, GPU, GPUS
from nanogpt_fast.hardware import capability_of, flops_per_token, free_memory, peak_flops, resolve_peak
from nanogpt_fast.memory import RESERVE, Plan, batch_flags, largest_batch, peak, plan_of, readable, relief
from nanogpt_fast.ops import expected, select_ops
from nanogpt_fast.restore import restore, shape_of
from nanogpt_fast.schedule import BatchSchedule
from nanogpt_fast.settings.cli import to_toml
from nanogpt_fast.settings.config import Config
from nanogpt_fast.weights.canonical import GPT2_PADDED


def describe(config: Config) -> str:
    """--dry_run: the resolved configuration, and what it asks for."""
    folder = dataset_folder(config.data)
    meta = read_meta(folder, config.model.vocab_size) if folder else None
    known = meta.vocab_size if meta and meta.tokenizer.get("kind") != "gpt2" else GPT2_PADDED
    shape, model = config.shape(config.model.vocab_size or known), "a new model"
    if config.run.init_from != "scratch":
        run = config.run
        restored = restore(run.init_from, run.out_dir, config.data.data_dir, run.resume_step, optimizer=False)
        shape = shape_of(config, restored, None, lambda _: None)
        model = restored.source
    if config.system.on:
        name = gpu_named(config.system.on)
        device = GPUS[name]
        there, capacity = name, device.gib * 2**30
        ops = select_ops(config.system.kernels, "cuda", expected(device.capability))
        dtype = dtype_on(device, config.system.dtype)
        rated = peak_flops(name, _plain(dtype))
        flops_there, source = rated or (None, f"unknown: {name} has no {_plain(dtype)} peak in gpus.py")
    else:
        device = distributed.resolve_device(config.system.device)
        there, capacity = str(device), free_memory(device)
        ops = select_ops(config.system.kernels, device.type, expected(capability_of(device)))
        dtype = distributed.resolve_dtype(config.system.dtype, device)
        flops_there, source = resolve_peak(device, dtype)
    ranks, batches = max(1, config.system.world), BatchSchedule.of(config.data)
    distributed.require_shares(ranks, batches.full, batches.start)
    plan = plan_of(config, shape, ops, dtype, device, ranks)
    memory = peak(plan)
    rows = [
        f"model           {model}: {shape.num_params() / 1e6:,.2f}M parameters, vocab_size {shape.vocab_size:,}",
        f"memory          {readable(sum(memory.values()))} at the peak, predicted: "
        + ", ".join(f"{part} {held / 2**30:.2f}" for part, held in memory.items()),
        f"device          {there}, {_plain(dtype)}, peak {source}",
        f"dataset         {printable(_what_is_there(config))}",
    ]
    if not config.run.eval_only:
        rows.append(f"micro-batch     {_what_fits(plan, capacity, 'in all' if config.system.on else 'free')}")
        flops = flops_per_token(shape)["nanogpt"]
        tokens, first = batches.tokens_before(config.optim.max_iters + 1), batches.tokens_before(1)
        ramp = f"{first:,}, growing to " if config.data.batch_ramp else ""
        rows.append(f"tokens          {ramp}{config.tokens_per_iter:,} an iteration, {tokens:,} in all")
        rows.append(f"compute         {flops / 1e9:.3f} GFLOP a token, {flops * tokens / 1e15:,.3f} PFLOP in all")
        if flops_there:
            rows.append(f"time            {span(flops * tokens / flops_there)} at least on one such device (MFU 100%)")
        if config.system.world:
            rows += _over_ranks(config, plan)
    return to_toml(config.replace(dry_run=False, on="", world=0)) + "\n" + "\n".join(f"# {row}" for row in rows)


def _what_is_there(config: Config) -> str:
    """The tokens of the dataset, how often the run sees them, or why it cannot be read and what to do."""
    data = config.data
    try:
        with open_split(data, "train") as train:
            count = sum(file.n_tokens for file in train.files)
    except NanogptError as error:
        return f"{error.what}: {error.hint or error.where}"
    seen = BatchSchedule.of(data).tokens_before(config.optim.max_iters + 1)
    epochs = "" if config.run.eval_only or not count else f", seen {seen / count:,.3g} times"
    return f"{data.dataset}, {count:,} tokens to train on{epochs}"


def span(seconds: float) -> str:
    """A time as people say it: 42 s, 3.5 hours, 12 days, 151 years."""
    for size, unit in ((365.25 * 86400, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.3g} s"


def _over_ranks(config: Config, plan: Plan) -> list[str]:
    """A row for 1, 2, 4, ... ranks up to --world: what each holds at the peak, and the micro-batches that it takes."""
    world, batches = plan.ranks, BatchSchedule.of(config.data)
    counts = sorted({*(2**i for i in range(world.bit_length()) if 2**i <= world), world})
    rows = [f"{'ranks':<15} {'ddp, GiB a rank':>15} {'zero1':>9} {'micro-batches each':>19}"]
    for ranks in counts:
        divides = batches.full % ranks == 0 == batches.start % ranks
        each = str(batches.full // ranks) if divides else f"{batches.full} do not divide"
        plans = [replace(plan, ranks=ranks, parallel=parallel) for parallel in ("ddp", "zero1")]
        held = [sum(peak(each).values()) / 2**30 for each in plans]
        rows.append(f"{ranks:<15,} {held[0]:>15.2f} {held[1]:>9.2f} {each:>19}")
    return rows


def _what_fits(plan: Plan, capacity: int | None, which: str) -> str:
    """The largest micro-batch, and its flags."""
    if capacity is None:
        return "how much memory is free is not known here"
    room = f"{readable(capacity)} {which} less {RESERVE:.0%}"
    fits = largest_batch(plan, (1 - RESERVE) * capacity)
    if fits is None:
        one = readable(sum(peak(plan.with_batch(1)).values()))
        return f"not even one sequence, {one}, fits into {room}: {relief(plan.with_batch(1), (1 - RESERVE) * capacity)}"
    held = sum(peak(plan.with_batch(fits)).values())
    return f"{fits} sequences at most fit into {room}, {readable(held)}: {batch_flags(plan, fits)}"


def gpu_named(name: str, flag: str = "on") -> str:
    """A key of gpus.GPUS, by itself or by its short name, as a flag has it."""
    known = {**{gpu: gpu for gpu in GPUS}, **CHOICES}
    if name not in known:
        raise ConfigError(
            f"unknown GPU {name!r}{did_you_mean(name, known)}",
            where=f"--{flag}={name}",
            expected=f"one of {', '.join(CHOICES)}, or a name in gpus.py as the driver gives it",
        )
    return known[name]


def dtype_on(gpu: GPU, name: str) -> torch.dtype:
    """--dtype as distributed.resolve_dtype takes it where such a GPU is there."""
    return getattr(torch, ("bfloat16" if gpu.bfloat16 else "float16") if name == "auto" else name)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
