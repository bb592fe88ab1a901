"""Train or finetune a GPT: `python -m nanogpt_fast.train --config NAME [--flag=value ...]`. Flags are nanoGPT's."""

import dataclasses
import logging
import math
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from nanogpt_fast import __version__, distributed
from nanogpt_fast.command import run_command
from nanogpt_fast.data.dataset import read_meta
from nanogpt_fast.data.loader import Loader
from nanogpt_fast.data.orders import NanogptOrder, ShuffleOrder
from nanogpt_fast.data.preparation import ensure
from nanogpt_fast.data.splits import dataset_folder, open_split
from nanogpt_fast.data.tokenizer import end_of_text, from_json
from nanogpt_fast.data.tokens import TokenSource, check_fingerprint
from nanogpt_fast.distributed import World
from nanogpt_fast.dry_run import describe
from nanogpt_fast.errors import CheckpointError, DeviceError, NanogptError
from nanogpt_fast.files import write_atomic
from nanogpt_fast.generate import sample_text
from nanogpt_fast.graphs import Graphs
from nanogpt_fast.guards import LossGuard
from nanogpt_fast.hardware import Peak, free_memory, training_peak
from nanogpt_fast.memory import RESERVE, largest_batch, peak, plan_of, readable, relief
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import REFERENCE, Ops, kept_rows, row_as_json
from nanogpt_fast.optim import AdamW, FlatParameters
from nanogpt_fast.restore import Restored, restore, shape_of
from nanogpt_fast.run import checkpoint, tracing
from nanogpt_fast.run.log import RunLog
from nanogpt_fast.run.rundir import RunLock, clean_stale, probe_writable
from nanogpt_fast.schedule import BatchSchedule
from nanogpt_fast.settings.cli import load_config, to_toml
from nanogpt_fast.settings.config import Config, GPTConfig
from nanogpt_fast.step import TrainStep
from nanogpt_fast.trainer import Trainer
from nanogpt_fast.verdict import check_kernels, ops_of_run, setup_of

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Build the parts in order, then train. Returns the exit code."""
    config = load_config(argv)
    if config.system.dry_run:
        print(describe(config))
        return 0
    with ExitStack() as stack:
        data, batches, system = config.data, BatchSchedule.of(config.data), config.system
        world = distributed.join(system.device, system.backend, batches.full, batches.start, system.tf32)
        stack.callback(world.close)
        graphs = Graphs(world.device, system.cuda_graph)
        say = print if world.is_main else lambda *_: None
        logging.getLogger("nanogpt_fast").setLevel(logging.WARNING if world.is_main else logging.ERROR)
        check_kernels(config, world.device.type)  # a wrong flag ends here, before any work
        say(f"tokens per iteration will be: {config.tokens_per_iter:,}")
        if data.batch_ramp:
            say(f"from iteration {batches.ramp} on; the first one has {batches.tokens_before(1):,}")
        sources, vocab_size, tokenizer = open_data(config, stack, say)
        claim_out_dir(config, world, stack)
        restored = None if config.run.init_from == "scratch" else load_weights(config, say)
        shape = shape_of(config, restored, vocab_size, say)
        eot = end_of_text(tokenizer, shape.vocab_size) if data.document_mask else None
        if restored and restored.tokenizer_json not in (None, tokenizer):
            log.warning("the data were made with another tokenizer than the one these weights were trained with")
        generator = torch.Generator().manual_seed(config.run.seed + world.rank)
        dtype = distributed.resolve_dtype(config.system.dtype, world.device)
        ops = ops_of_run(system.kernels, setup_of(config, shape, dtype), world, say, rows=system.rows)
        if config.system.micro_batch == "auto":
            config = fit_micro_batch(config, shape, ops, dtype, world, say)
            data, batches = config.data, BatchSchedule.of(config.data)
        model = build_model(config, shape, restored, generator, ops, say)
        optimizer = build_optimizer(config, model, restored, dtype, world, say)
        if config.system.compile and world.device.type == "cuda" and ops is REFERENCE:
            say("compiling the model... (takes a ~minute)")
            model.compile()
        resumed = restored if config.run.init_from == "resume" else None
        if restored:
            restored.model, restored.optimizer = {}, None  # mapped files: let go of their disk blocks
        order, fingerprint = order_data(config, sources["train"], resumed, generator)
        start = resumed.step if resumed else 0
        agree_on_start(world, start)
        samples = batches.micro_batches_before(start) * data.batch_size
        loader = stack.enter_context(
            Loader(
                order,
                batch_size=data.batch_size,
                accumulation=batches.accumulation_at,
                vocab_size=shape.vocab_size,
                rank=world.rank,
                world_size=world.size,
                start_sample=resumed.state.get("samples_seen", samples) if resumed else 0,
                start_iteration=start,
                pin_memory=world.device.type == "cuda",
            )
        )
        guard = LossGuard(config.optim.skip_step_sigma, config.optim.skip_step_window, optimizer.scalars.device)
        guard.load_state_dict(resumed.state if resumed else {})
        peak = training_peak(world.device, dtype) if world.is_main else Peak(None, "")
        say(f"device {world.device}, dtype {str(dtype).removeprefix('torch.')}, peak for MFU: {peak.source}")
        run_log = RunLog(
            Path(config.run.out_dir), config.log, config.flat(), total=config.optim.max_iters + 1, enabled=world.is_main
        )
        stack.callback(run_log.close)
        if not config.run.eval_only:  # an evaluation adds a line to the run's metrics, it is no new run
            run_log.run(**run_facts(config, shape, start, dtype, peak.source))
        facts = tracing.facts_of(config, model.config, world.device, dtype, world.size) if world.is_main else {}
        facts["micro_steps"] = batches.accumulation_at(config.system.window.start) // world.size
        window = tracing.window_of_run(config, start, world.device, model, facts) if world.is_main else tracing.Window()
        trainer = Trainer(
            config=config,
            world=world,
            step=TrainStep(model, optimizer, world, config.run.seed, batches, eot, graphs, guard),
            loader=loader,
            sources=sources,
            generator=generator if data.data_order == "nanogpt" else None,
            log=run_log,
            tokenizer=tokenizer,
            fingerprint=fingerprint,
            peak=peak,
            start=start,
            best_val_loss=best_val_loss_of(resumed),
            window=window,
        )
        if world.is_main and not config.run.eval_only:
            begin_out_dir(config, shape, start)
        code = trainer.run()
        run_log.close()
        if code == 0 and world.is_main and not config.run.eval_only:
            finish(config, model, tokenizer, graphs)
    return code


# ---- the parts ----


def claim_out_dir(config: Config, world: World, stack: ExitStack) -> None:
    """Prove that the output directory can be written, lock it, and sweep up after a killed run."""
    out_dir = Path(config.run.out_dir)
    nothing_there = config.run.init_from == "resume" and not out_dir.is_dir()  # load_weights will say so
    if not world.is_main or config.run.eval_only or nothing_there:
        return
    probe_writable(out_dir)
    stack.enter_context(RunLock(out_dir))
    for line in clean_stale(out_dir / "checkpoints"):
        print(line)


def begin_out_dir(config: Config, shape: GPTConfig, start: int) -> None:
    """Once nothing can fail before the first step: is there room, move checkpoints of an abandoned future aside."""
    out_dir = Path(config.run.out_dir)
    probe_writable(out_dir, need_bytes=12 * shape.num_params(non_embedding=False))
    if moved := checkpoint.set_aside_later(out_dir, start if config.run.init_from == "resume" else -1):
        print(f"checkpoints of an earlier run, which this one does not continue, are now in {moved}")
    write_atomic(out_dir / "config.toml", to_toml(config.replace(dry_run=False, profile="")).encode())


def load_weights(config: Config, say: Any) -> Restored:
    """The weights that --init_from names."""
    restored = restore(config.run.init_from, config.run.out_dir, config.data.data_dir)
    if config.run.init_from != "resume":
        say(f"Initializing from {restored.source}")
        return restored
    say(f"Resuming training from {restored.source}")
    then, place = restored.run_config, {"init_from", "out_dir", "data_dir", "eval_only", "debug"}
    place |= {"profile", "profiler", *vars(config.model)}
    changed = {k: v for k, v in config.flat().items() if k in then and then[k] != v and k not in place}
    if changed:
        say("changed since the checkpoint: " + ", ".join(f"{k} {then[k]} -> {v}" for k, v in changed.items()))
    return restored


def open_data(config: Config, stack: ExitStack, say: Any) -> tuple[dict[str, TokenSource], int | None, dict[str, Any]]:
    """(sources by split, the dataset's vocabulary if it says one, its tokenizer)."""
    ensure(config.data.dataset, config.data.data_dir)
    train = stack.enter_context(open_split(config.data, "train"))
    val = open_split(config.data, "val", required=True) if config.run.eval_only else open_split(config.data, "val")
    sources = {"train": train}
    if val is not None:
        sources["val"] = stack.enter_context(val)
    folder = dataset_folder(config.data)
    meta = read_meta(folder) if folder else None
    if meta is None or meta.tokenizer.get("kind") == "gpt2":
        return sources, None, {"kind": "gpt2"}
    say(f"found vocab_size = {meta.vocab_size} (inside {folder})")
    return sources, meta.vocab_size, meta.tokenizer


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
    if restored is not None:
        model.load_state_dict(restored.model)
    say(f"number of parameters: {model.num_params() / 1e6:.2f}M")
    if shape.block_size < model.config.block_size:
        model.crop_block_size(shape.block_size)
        say(f"positions cropped from {loaded_shape.block_size} to {shape.block_size}")
    return model.train()


def build_optimizer(
    config: Config, model: GPT, restored: Restored | None, dtype: torch.dtype, world: World, say: Any
) -> AdamW:
    """Move the parameters into flat buffers on the device, and AdamW over them, its state restored on resume."""
    flat = FlatParameters(model, dtype, world.device)
    world.broadcast_(flat.master)
    if flat.params is not flat.master:
        flat.params.copy_(flat.master)
    optimizer = AdamW(flat, config.optim, model.ops, scale_loss=dtype == torch.float16)
    for text, wanted in (("decayed", True), ("non-decayed", False)):
        shapes = [shape for shape in flat.shapes.values() if (len(shape) > 1) == wanted]
        say(f"num {text} parameter tensors: {len(shapes)}, with {sum(s.numel() for s in shapes):,} parameters")
    if config.run.init_from == "resume" and restored is not None and not restored.optimizer:
        log.warning("the checkpoint has no optimizer state; AdamW starts anew")
    elif config.run.init_from == "resume" and restored is not None and restored.optimizer:
        rows = model.config.block_size
        cropped = {k: t[:rows] if k.endswith("wpe.weight") else t for k, t in restored.optimizer.items()}
        optimizer.load_state_dict(cropped, {"optimizer_step": restored.step, **restored.state})
    return optimizer


def agree_on_start(world: World, start: int) -> None:
    """Ranks read checkpoints by themselves; on a slow shared disk they could see different ones."""
    first = torch.tensor([start], device=world.device)
    world.broadcast_(first)
    if world.any(int(first) != start):
        raise CheckpointError(
            "the ranks found different checkpoints",
            where=f"rank {world.rank}",
            expected=f"iteration {int(first)}, as rank 0",
            found=f"iteration {start}",
            hint="see that every node reads the same --out_dir, then start again",
        )


def best_val_loss_of(resumed: Restored | None) -> float:
    """The lowest validation loss so far; infinity where none is known, or an older version saved NaN."""
    saved = resumed.state.get("best_val_loss") if resumed else None
    return saved if saved is not None and math.isfinite(saved) else math.inf


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


# ---- what is said before and after ----


def run_facts(config: Config, shape: GPTConfig, start: int, dtype: torch.dtype, peak: str) -> dict[str, Any]:
    """The header of metrics.jsonl."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "model_args": dataclasses.asdict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "peak": peak,
        "launch_rows": [row_as_json(*pair) for pair in kept_rows().items()],  # tuned ones, beside the shipped
        "start": start,
        "config": config.flat(),
    }


def finish(config: Config, model: GPT, tokenizer: dict[str, Any], graphs: Graphs) -> None:
    """After the last iteration: a sample, and what to type next."""
    run, out_dir = config.run, shlex.quote(config.run.out_dir)
    if run.sample_at_end:
        print("---------------")
        try:
            pieces = sample_text(
                model.eval(),
                from_json(tokenizer),
                "\n",
                max_new_tokens=run.sample_at_end,
                seed=run.seed,
                graphs=graphs,
            )
            for piece in pieces:
                print(piece, end="", flush=True)
        except NanogptError as error:  # no tokenizer at hand: the run is good all the same
            print(f"no sample: {error}", end="")
        print("\n---------------")
    print(
        "next:\n"
        f"  python -m nanogpt_fast.sample --out_dir={out_dir}\n"
        f"  python -m nanogpt_fast.plot {out_dir}\n"
        f"  python -m nanogpt_fast.evaluate --out_dir={out_dir} --data_dir={shlex.quote(config.data.data_dir)}\n"
        f"  python -m nanogpt_fast.train --config {out_dir}/config.toml --init_from=resume"
        f" --max_iters={2 * config.optim.max_iters}"
    )


if __name__ == "__main__":
    run_command(main)
