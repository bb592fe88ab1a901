"""The parts of a run, from its configuration: data, weights, model, optimizer, order. training.py joins them."""

import dataclasses
import logging
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt_fast.data.dataset import read_meta
from nanogpt_fast.data.loader import Draws
from nanogpt_fast.data.orders import NanogptOrder, ShuffleOrder
from nanogpt_fast.data.preparation import ensure
from nanogpt_fast.data.splits import dataset_folder, open_split, warn_of_few_ids
from nanogpt_fast.data.tokens import TokenSource, check_fingerprint
from nanogpt_fast.distributed import World
from nanogpt_fast.errors import DataError, DeviceError
from nanogpt_fast.files import read_small
from nanogpt_fast.hardware import free_memory
from nanogpt_fast.memory import RESERVE, largest_batch, peak, plan_of, readable, relief
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import Ops
from nanogpt_fast.optim import AdamW, FlatParameters
from nanogpt_fast.restore import Restored, restore
from nanogpt_fast.run import checkpoint
from nanogpt_fast.settings.config import Config, GPTConfig

log = logging.getLogger(__name__)
ELASTIC_RUN = ".elastic_run"  # of out_dir: torchrun's name of the run there, so that its restarts know it


def open_data(config: Config, stack: ExitStack, say: Any) -> tuple[dict[str, TokenSource], int | None, dict[str, Any]]:
    """(sources by split, the dataset's vocabulary if it says one, its tokenizer)."""
    ensure(config.data.dataset, config.data.data_dir)
    train = stack.enter_context(open_split(config.data, "train"))
    val = open_split(config.data, "val", required=True) if config.run.eval_only else open_split(config.data, "val")
    sources = {"train": train}
    if val is not None:
        sources["val"] = stack.enter_context(val)
    meta = read_meta(folder, config.model.vocab_size) if (folder := dataset_folder(config.data)) else None
    warn_of_few_ids(meta, train, config.model.vocab_size)
    if meta is None or meta.tokenizer.get("kind") == "gpt2":
        return sources, None, {"kind": "gpt2"}
    say(f"found vocab_size = {meta.vocab_size} (inside {folder})")
    return sources, meta.vocab_size, meta.tokenizer


def to_go_on(config: Config, world: World, say: Any) -> Config:
    """The configuration that resumes the run in out_dir, where --auto_resume asks for it or torchrun has started the
    ranks again, and rank 0 sees a checkpoint to resume; else as it is."""
    out_dir, again = Path(config.run.out_dir), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) or 0)
    ours = config.run.auto_resume or (again and elastic_run(out_dir) == os.environ.get("TORCHELASTIC_RUN_ID", ""))
    if not world.main_says(bool(ours and checkpoint.readable_steps(out_dir))):
        return config
    if again:
        say(f"started again by torchrun, time {again}")
    return config.replace(init_from="resume", resume_step=0 if again else config.run.resume_step)


def elastic_run(out_dir: Path) -> str:
    """torchrun's name of the run that out_dir was last begun for; "" where there was none."""
    try:
        return read_small(out_dir / ELASTIC_RUN).decode(errors="replace")
    except OSError:
        return ""


def load_weights(config: Config, world: World, say: Any) -> Restored:
    """The weights that --init_from names. Rank 0 reads them, so that one node's disk is enough; the others get all but
    the tensors, which are sent once they have a place (build_optimizer), and here stand without data."""
    if world.size == 1:
        return _read_weights(config, say)
    found = _read_weights(config, say) if world.is_main else None
    shared = found and dataclasses.replace(found, model=_shells(found.model), optimizer=_shells(found.optimizer))
    told = world.main_object(shared)
    assert told is not None
    return found or told


def _shells(tensors: dict[str, Tensor] | None) -> Any:
    return None if tensors is None else {name: torch.empty(t.shape, device="meta") for name, t in tensors.items()}


def _read_weights(config: Config, say: Any) -> Restored:
    run = config.run
    restored = restore(run.init_from, run.out_dir, config.data.data_dir, run.resume_step, optimizer=not run.eval_only)
    if config.run.init_from != "resume":
        say(f"Initializing from {restored.source}")
        return restored
    say(f"Resuming training from {restored.source}")
    then, place = restored.run_config, {"init_from", "resume_step", "out_dir", "data_dir", "eval_only", "debug"}
    place |= {"profile", "profiler", *vars(config.model)}
    changed = {k: v for k, v in config.flat().items() if k in then and then[k] != v and k not in place}
    if changed:
        say("changed since the checkpoint: " + ", ".join(f"{k} {then[k]} -> {v}" for k, v in changed.items()))
    return restored


def fit_micro_batch(config: Config, shape: GPTConfig, ops: Ops, dtype: torch.dtype, world: World, say: Any) -> Config:
    """The configuration with the largest micro-batch that fits on every rank, its tokens an iteration as they were."""
    plan = plan_of(config, shape, ops, dtype, world.device, world.size)
    free = free_memory(world.device)
    if free is None:
        raise DeviceError(
            "how much memory is free is not known here, so --micro_batch=auto cannot choose",
            where=str(world.device),
            expected="CUDA, MPS, or Linux",
            hint="leave --micro_batch out, and set --batch_size",
        )
    fits = torch.zeros(world.size, dtype=torch.int64, device=world.device)
    fits[world.rank] = largest_batch(plan, (1 - RESERVE) * free) or 0
    world.all_reduce_(fits)
    batch_size = int(fits.min())
    if not batch_size:
        one = plan.with_batch(1)
        raise DeviceError(
            "not even one sequence a micro-batch fits",
            where=f"{world.device}, block_size = {config.data.block_size}, recompute = {plan.recompute!r}",
            expected=f"{readable(sum(peak(one).values()))}, by prediction",
            found=f"{readable(free)} free, of which {RESERVE:.0%} are kept back",
            hint=relief(one, (1 - RESERVE) * free),
        )
    resolved = plan.with_batch(batch_size)
    say(
        f"micro-batch of {batch_size} sequences, {resolved.micro_batches} a rank and iteration: the largest whose "
        f"predicted peak, {readable(sum(peak(resolved).values()))}, fits into {readable(free)} free less {RESERVE:.0%}"
    )
    first, full = (n * world.size // batch_size for n in (plan.first, plan.sequences))
    ramp = f"{first}:{plan.ramp}" if plan.ramp else ""
    return config.replace(batch_size=batch_size, gradient_accumulation_steps=full, batch_ramp=ramp, micro_batch="")


def build_model(
    config: Config, shape: GPTConfig, restored: Restored | None, generator: torch.Generator, ops: Ops, say: Any
) -> GPT:
    """The model on the CPU in float32, initialised or loaded, in training mode."""
    loaded_shape = restored.config if restored else shape
    wide = torch.float32 if config.system.residual_dtype == "float32" else None
    model = GPT(dataclasses.replace(loaded_shape, dropout=shape.dropout), ops, wide, config.system.recompute)
    if restored is None or config.data.data_order == "nanogpt":  # nanoGPT draws the weights even to overwrite them
        model.init_weights(generator)
    if restored is not None and not any(tensor.is_meta for tensor in restored.model.values()):
        model.load_state_dict(restored.model)
    say(f"number of parameters: {model.config.num_params() / 1e6:.2f}M")
    if shape.block_size < model.config.block_size:
        model.crop_block_size(shape.block_size)
        say(f"positions cropped from {loaded_shape.block_size} to {shape.block_size}")
    return model.train()


def build_optimizer(
    config: Config, model: GPT, restored: Restored | None, dtype: torch.dtype, world: World, say: Any
) -> AdamW:
    """Move the parameters into flat buffers on the device, and AdamW over them, its state restored on resume; for an
    evaluation alone, which trains nothing, the parameters are all of it."""
    sharded, frozen, bucket_mb = config.system.parallel == "zero1", config.run.eval_only, config.system.bucket_mb
    flat = FlatParameters(model, dtype, world.device, world, sharded=sharded, frozen=frozen, bucket_mb=bucket_mb)
    optimizer = AdamW(flat, config.optim, model.ops, scale_loss=dtype == torch.float16)
    for text, wanted in (("decayed", True), ("non-decayed", False)):
        shapes = [shape for shape in flat.shapes.values() if (len(shape) > 1) == wanted]
        say(f"num {text} parameter tensors: {len(shapes)}, with {sum(s.numel() for s in shapes):,} parameters")
    if frozen or config.run.init_from != "resume" or restored is None:
        return optimizer
    if not restored.optimizer:
        log.warning("the checkpoint has no optimizer state; AdamW starts anew")
        return optimizer
    rows, moments = model.config.block_size, restored.optimizer

    def sent(name: str) -> Tensor:
        moment = moments[name][:rows] if name.endswith("wpe.weight") else moments[name]
        if world.size > 1:
            moment = torch.empty_like(moment, device=world.device) if moment.is_meta else moment.to(world.device)
            world.broadcast_(moment)
        return moment

    for name in flat.slices:
        optimizer.load_moments(name, sent(f"exp_avg.{name}"), sent(f"exp_avg_sq.{name}"))
    optimizer.load_numbers({"optimizer_step": restored.step, **restored.state})
    return optimizer


def agree_on_data(world: World, fingerprint: dict[str, Any]) -> None:
    """DataError where this rank's training data are not rank 0's: every node has its own disk, or should see one."""
    first = world.main_object(fingerprint)
    others = world.any(first != fingerprint)
    if first != fingerprint:
        what, where = "the training data are not rank 0's", f"rank {world.rank} of {world.size}: "
        check_fingerprint(first, fingerprint, what, where, "see that --data_dir has the same files on every node")
    if others:
        raise DataError(
            "another rank found other training data, and says which",
            where=f"rank {world.rank} of {world.size}",
            expected="the same files on every node",
        )


def best_val_loss_of(resumed: Restored | None) -> float:
    """The lowest validation loss so far; infinity where none is known, or an older version saved NaN."""
    saved = resumed.state.get("best_val_loss") if resumed else None
    return saved if saved is not None and math.isfinite(saved) else math.inf


def draws_of(
    resumed: Restored | None, order: ShuffleOrder | NanogptOrder, batch_size: int, world: World
) -> Draws | None:
    """Where nanoGPT's order goes on; None where it begins anew: a run that is not resumed, a nanoGPT checkpoint (which
    has no generator in it), another batch_size, several ranks (of which one alone is saved)."""
    if resumed is None or world.size > 1 or not isinstance(order, NanogptOrder):
        return None
    starts = order.source.files[0].n_tokens - order.block_size
    draws = Draws.from_json(resumed.state.get("draws"), batch_size, starts)
    if draws is None:
        log.warning("the checkpoint does not say where nanoGPT's order goes on: its draws begin anew, as nanoGPT's do")
    return draws


def order_data(
    config: Config, source: TokenSource, resumed: Restored | None, generator: torch.Generator
) -> tuple[ShuffleOrder | NanogptOrder, dict[str, Any]]:
    """(the order samples come in, the data's fingerprint, which on resume must be the checkpoint's)."""
    fingerprint = source.fingerprint()
    saved = resumed.state.get("fingerprint") if resumed else None
    if saved and not config.data.ignore_fingerprint:
        check_fingerprint(saved, fingerprint)
    if config.data.data_order == "nanogpt":
        return NanogptOrder(source, config.data.block_size, generator), fingerprint
    return ShuffleOrder(source, config.data.block_size, config.run.seed), fingerprint
