"""A training run, from its configuration to its last line: the parts in order, then the loop."""

import dataclasses
import logging
import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from nanogpt_fast import __version__, distributed, parts
from nanogpt_fast.data.loader import Loader
from nanogpt_fast.data.tokenizer import end_of_text, from_json
from nanogpt_fast.distributed import World
from nanogpt_fast.errors import NanogptError, printable
from nanogpt_fast.files import write_atomic
from nanogpt_fast.generate import sample_text
from nanogpt_fast.graphs import Graphs
from nanogpt_fast.guards import LossGuard
from nanogpt_fast.hardware import Peak, training_peak
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import REFERENCE, kept_rows, row_as_json
from nanogpt_fast.restore import shape_of
from nanogpt_fast.run import checkpoint, tracing
from nanogpt_fast.run.log import RunLog, set_rows_aside
from nanogpt_fast.run.rundir import RunLock, clean_stale, probe_writable
from nanogpt_fast.schedule import BatchSchedule
from nanogpt_fast.settings.cli import to_toml
from nanogpt_fast.settings.config import Config, GPTConfig
from nanogpt_fast.step import TrainStep
from nanogpt_fast.trainer import Trainer
from nanogpt_fast.verdict import check_kernels, ops_of_run, setup_of

log = logging.getLogger(__name__)


def train(config: Config) -> int:
    """Build the parts in order, then train. Returns the exit code."""
    with ExitStack() as stack:
        data, batches, system = config.data, BatchSchedule.of(config.data), config.system
        world = distributed.join(
            system.device, system.backend, batches.full, batches.start, system.tf32, system.timeout
        )
        stack.push(lambda _, error, __: world.close("" if error is None else in_a_line(error)))
        graphs = Graphs(world.device, system.cuda_graph)
        say = (lambda text: print(printable(text))) if world.is_main else lambda _: None
        logging.getLogger("nanogpt_fast").setLevel(logging.WARNING if world.is_main else logging.ERROR)
        check_kernels(config, world.device.type)  # a wrong flag ends here, before any work
        say(f"tokens per iteration will be: {config.tokens_per_iter:,}")
        if data.batch_ramp:
            say(f"from iteration {batches.ramp} on; the first one has {batches.tokens_before(1):,}")
        sources, vocab_size, tokenizer = parts.open_data(config, stack, say)
        config = parts.to_go_on(config, world, say)
        claim_out_dir(config, world, stack)
        restored = None if config.run.init_from == "scratch" else parts.load_weights(config, world, say)
        shape = shape_of(config, restored, vocab_size, say)
        eot = end_of_text(tokenizer, shape.vocab_size) if data.document_mask else None
        if restored and restored.tokenizer_json not in (None, tokenizer):
            log.warning("the data were made with another tokenizer than the one these weights were trained with")
        generator = torch.Generator().manual_seed(config.run.seed + world.rank)
        dtype = distributed.resolve_dtype(config.system.dtype, world.device)
        ops = ops_of_run(system.kernels, setup_of(config, shape, dtype), world, say, rows=system.rows)
        if config.system.micro_batch == "auto" and not config.run.eval_only:  # whose batches are batch_size's
            config = parts.fit_micro_batch(config, shape, ops, dtype, world, say)
            data, batches = config.data, BatchSchedule.of(config.data)
        model = parts.build_model(config, shape, restored, generator, ops, say)
        optimizer = parts.build_optimizer(config, model, restored, dtype, world, say)
        if config.system.compile and world.device.type == "cuda" and ops is REFERENCE:
            say("compiling the model... (takes a ~minute)")
            model.compile()
        resumed = restored if config.run.init_from == "resume" else None
        if restored:
            restored.model, restored.optimizer = {}, None  # mapped files: let go of their disk blocks
        parts.agree_on_data(world, sources["train"].fingerprint())
        order, fingerprint = parts.order_data(config, sources["train"], resumed, generator)
        draws = parts.draws_of(resumed, order, data.batch_size, world)
        start = resumed.step if resumed else 0
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
                draws=draws,
                pin_memory=world.device.type == "cuda",
            )
        )
        guard = LossGuard(config.optim.skip_step_sigma, config.optim.skip_step_window, optimizer.scalars.device)
        guard.load_state_dict(resumed.state if resumed else {})
        sums = getattr(torch, system.reduce_dtype)
        step = TrainStep(model, optimizer, world, config.run.seed, batches, eot, graphs, guard, sums)
        peak = training_peak(world.device, dtype) if world.is_main else Peak(None, "")
        say(f"device {world.device}, dtype {str(dtype).removeprefix('torch.')}, peak for MFU: {peak.source}")
        run_log = RunLog(
            Path(config.run.out_dir),
            config.log,
            config.flat(),
            total=config.optim.max_iters + 1,
            enabled=world.is_main,
            elapsed=resumed.state.get("elapsed_s", 0.0) if resumed else 0.0,
        )
        stack.callback(run_log.close)
        facts = tracing.facts_of(config, model.config, world.device, dtype, world.size) if world.is_main else {}
        facts["micro_steps"] = batches.accumulation_at(config.system.window.start) // world.size
        window = tracing.window_of_run(config, start, world.device, model, facts) if world.is_main else tracing.Window()
        trainer = Trainer(
            config=config,
            world=world,
            step=step,
            loader=loader,
            sources=sources,
            generator=generator if data.data_order == "nanogpt" else None,
            log=run_log,
            tokenizer=tokenizer,
            fingerprint=fingerprint,
            peak=peak,
            start=start,
            best_val_loss=parts.best_val_loss_of(resumed),
            saved_val_loss=resumed.state.get("val_loss") if resumed else None,
            window=window,
        )
        if world.is_main and not config.run.eval_only:
            begin_out_dir(config, shape, start)
        run_log.open_rows(must=not config.run.eval_only)
        if not config.run.eval_only:  # an evaluation adds a line to the run's metrics, it is no new run
            run_log.run(**run_facts(config, shape, start, dtype, peak.source))
        code = trainer.run()
        run_log.close()
        if code == 0 and world.is_main and not config.run.eval_only:
            finish(config, model, tokenizer, graphs, trainer.keeper.saved_step)
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
    """Once nothing can fail before the first step: is there room, move what an abandoned future left aside."""
    out_dir, continues = Path(config.run.out_dir), start if config.run.init_from == "resume" else -1
    count = config.run.keep_last + 2  # the best one, and the one being written
    probe_writable(out_dir, 12 * shape.num_params(non_embedding=False), count)
    if moved := checkpoint.set_aside_later(out_dir, continues):
        print(f"checkpoints of an earlier run, which this one does not continue, are now in {moved}")
    evaluates = continues % config.run.eval_interval == 0
    if kept := set_rows_aside(out_dir / "metrics.jsonl", continues, evaluates):
        print(f"figures that this run does not continue are now in {kept}")
    if run_id := os.environ.get("TORCHELASTIC_RUN_ID"):
        write_atomic(out_dir / parts.ELASTIC_RUN, run_id.encode())
    write_atomic(out_dir / "config.toml", to_toml(config.replace(dry_run=False, profile="", resume_step=0)).encode())


# ---- what is said before and after ----


def in_a_line(error: BaseException) -> str:
    """What ended this rank, for the others."""
    ours = isinstance(error, NanogptError)
    said = [error.what, error.where, error.found] if ours else [type(error).__name__, *str(error).splitlines()[:1]]
    return ", ".join(filter(None, said))[:400]


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


def finish(config: Config, model: GPT, tokenizer: dict[str, Any], graphs: Graphs, saved_step: int) -> None:
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
                print(printable(piece), end="", flush=True)
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
    if saved_step < config.optim.max_iters:
        print(f"  (from iteration {saved_step}: always_save_checkpoint = False keeps improvements only)")
