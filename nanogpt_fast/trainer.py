"""The training loop: schedule, evaluate, save, step, log; nanoGPT's order of events and meanings."""

import logging
import math
import shlex
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanogpt_fast.data.loader import Loader
from nanogpt_fast.data.tokens import TokenSource
from nanogpt_fast.distributed import World
from nanogpt_fast.errors import CheckpointError, DeviceError, DivergedError
from nanogpt_fast.hardware import Peak, flops_per_token, free_memory
from nanogpt_fast.memory import RESERVE, plan_of, relief
from nanogpt_fast.run import checkpoint, ranges
from nanogpt_fast.run.log import RunLog
from nanogpt_fast.run.ranges import span
from nanogpt_fast.run.stopping import StopSignals
from nanogpt_fast.run.tracing import Window
from nanogpt_fast.schedule import BatchSchedule, learning_rate
from nanogpt_fast.scoring import Forward, estimate_loss
from nanogpt_fast.settings.config import Config
from nanogpt_fast.step import Reading, Report, TrainStep

log = logging.getLogger(__name__)
MAX_FAILED_SAVES = 3


class Launched(NamedTuple):
    """An iteration whose work the device has been given."""

    iteration: int
    samples: range  # of the run's order, over all ranks
    traced: bool
    reading: Reading


@dataclass(kw_only=True)
class Trainer:
    """The parts of a run; run() trains. start: iterations done before this process began."""

    config: Config
    world: World
    step: TrainStep
    loader: Loader
    sources: dict[str, TokenSource]
    generator: torch.Generator | None  # nanoGPT's shared generator; None draws each evaluation from (seed, iteration)
    log: RunLog
    tokenizer: dict[str, Any]  # meta.json's `tokenizer`, kept with every checkpoint
    fingerprint: dict[str, Any]
    peak: Peak  # what MFU divides by
    start: int = 0
    best_val_loss: float = math.inf
    window: Window = field(default_factory=Window)  # the iterations to trace, none unless --profile names some

    def __post_init__(self) -> None:
        self.window.say = self.log.line
        self.out_dir = Path(self.config.run.out_dir)
        self.model, self.optimizer = self.step.model, self.step.optimizer
        self._batches = BatchSchedule.of(self.config.data)
        self._flops_per_token = flops_per_token(self.model.config)
        self._evaluated: tuple[int, float] | None = None  # (iteration, val loss) of the last evaluation
        self._failed_saves, self._saved_step = 0, -1
        self._launched: deque[Launched] = deque()
        self._lag = 1 if self.world.device.type == "cuda" else 0  # iterations whose figures the GPU still owes
        self._forward = Forward(self.model, self.step.eot, self.step.graphs)
        self._votes = 0.0  # to stop; on all ranks alike
        self._flops_per_s: float | None = None  # nanoGPT's running value, a rank's; None until five iterations are done

    def run(self) -> int:
        """Train to max_iters; returns the exit code."""
        run, end = self.config.run, self.config.optim.max_iters + 1
        with StopSignals() as stop:
            self.log.start(self.start)
            self._restart_clock()
            if run.eval_only:
                self._evaluate_and_save(self.start)
                return stop.exit_code
            try:
                with self.window as window:
                    for iteration in range(self.start, end):
                        if iteration % run.eval_interval == 0 or iteration in window.bounds:
                            self._settle()  # neither an evaluation nor a window counts the step before as its own
                        if iteration > self.start and self._asked(stop):
                            return self._leave(iteration, stop)
                        self._tick += window.reach(iteration, self._step_ms(iteration))
                        with span(ranges.ITERATION):
                            self._iterate(iteration, stop.received is not None)
                    self._settle()
                    if self._asked(stop):
                        return self._leave(end, stop)
            except RuntimeError as error:  # torch.OutOfMemoryError is one; MPS raises a plain one
                if not isinstance(error, torch.OutOfMemoryError) and "MPS backend out of memory" not in str(error):
                    raise
                raise self._out_of_memory(error) from error
        if self.start >= end:
            self.log.line(f"nothing to do: {self.start} iterations are done, --max_iters={end - 1}")
        elif self._saved_step < 0 or (run.always_save_checkpoint and self._saved_step < end - 1):
            self.save(end, must=True)
        return 0

    def _asked(self, stop: StopSignals) -> bool:
        """Whether to stop here; on all ranks alike, by the votes that their steps have summed."""
        return self._votes > 0 if self.world.size > 1 else stop.received is not None

    def _leave(self, step: int, stop: StopSignals) -> int:
        """Save after `step` iterations, say how to go on; the exit code."""
        self._settle()
        self.save(step, must=True)
        self.window.close()  # what to type next comes last
        self.log.line(self.resume_line(step))
        return stop.exit_code or 143

    def _iterate(self, iteration: int, stop: bool) -> None:
        """Schedule, evaluate and save where it is due, step, log what has come back."""
        run = self.config.run
        if iteration % run.eval_interval == 0:
            self._evaluate_and_save(iteration)
        self.optimizer.set_lr(learning_rate(iteration, self.config.optim))
        first = self.loader.samples_seen
        with span(ranges.DATA):
            batch = next(self.loader)
        self.step(batch, iteration, stop)
        samples = range(first, self.loader.samples_seen)
        self._launched.append(Launched(iteration, samples, self.window.open, self.step.read()))
        if not self.window.open:  # a product in the window would pass for one of the step's
            self._tick += self.peak.refine()
        with span(ranges.LOG):
            self._settle(self._lag)

    def _settle(self, lag: int = 0) -> None:
        """Take in the figures of the iterations launched, but for the newest `lag`, which the GPU may be busy with."""
        while len(self._launched) > lag:
            launched = self._launched.popleft()
            self._take_in(launched, launched.reading.get())

    def _take_in(self, launched: Launched, report: Report) -> None:
        self._votes += report.stop
        self._since_log += 1
        self._traced |= launched.traced
        self._clipped += 0.0 < self.config.optim.grad_clip < report.grad_norm < math.inf
        if report.refused:
            self._say_refused(launched, report)
        if launched.iteration % self.config.run.log_interval == 0:
            self._log_iteration(launched.iteration, report)

    def _say_refused(self, launched: Launched, report: Report) -> None:
        """A line for an update that was not applied; DivergedError after max_bad_steps in a row."""
        iteration, optim, in_a_row = launched.iteration, self.config.optim, int(report.bad_steps)
        bad = [name for name, x in (("loss", report.loss), ("gradient", report.grad_norm)) if not math.isfinite(x)]
        why = f"not finite: the {' and the '.join(bad)}" if bad else "the loss spiked"
        samples = f"samples {launched.samples.start:,} to {launched.samples.stop - 1:,} of the run's order"
        figures = {"loss": report.loss, "grad_norm": report.grad_norm, "bad_steps": in_a_row}
        figures |= {"first_sample": launched.samples.start, "samples": len(launched.samples)}
        scale = f", loss scale now {report.loss_scale:g}" if self.optimizer.scale_loss else ""
        line = f"iter {iteration}: no update: {why} (loss {report.loss:.4f}, {samples}{scale}), {in_a_row} in a row"
        self.log.refused(iteration, figures, line)
        if in_a_row < optim.max_bad_steps:
            return
        saved = checkpoint.list_steps(self.out_dir)
        raise DivergedError(
            f"no update in {in_a_row} iterations in a row, {why}",
            where=f"iteration {iteration}, loss {report.loss}, gradient norm {report.grad_norm}; {samples}",
            expected="finite losses and gradients, no spike; no such update was applied",
            found=f"the last good checkpoint is {saved[max(saved)]}" if saved else "no checkpoint yet",
            hint=f"{self._command(resume=bool(saved))} --learning_rate={optim.learning_rate / 3:.2g}",
        )

    def _out_of_memory(self, error: Exception) -> DeviceError:
        data, device = self.config.data, self.world.device
        dtype, model = self.optimizer.flat.params.dtype, self.model
        plan = plan_of(self.config, model.config, model.ops, dtype, device, self.world.size)
        there = free_memory(device)
        return DeviceError(
            "the device ran out of memory",
            where=f"{device}, batch_size = {data.batch_size}, block_size = {data.block_size}, "
            f"recompute = {plan.recompute!r}",
            found=str(error).splitlines()[0],
            hint=relief(plan, None if there is None else (1 - RESERVE) * there, self.world.size),
        )

    def resume_line(self, step: int) -> str:
        """What to type to go on from here."""
        return f"stopped after iteration {step - 1}. To continue:\n  {self._command(resume=True)}"

    def _command(self, resume: bool) -> str:
        words = ["python", "-m", "nanogpt_fast.train", "--config", str(self.out_dir / "config.toml")]
        return shlex.join([*words, "--init_from=resume"] if resume else words)

    # ---- evaluation and checkpoints ----

    def _evaluate_and_save(self, iteration: int) -> None:
        with span(ranges.EVALUATION):
            losses = self._estimate(iteration)
        if losses is not None:
            self._report_evaluation(iteration, losses)
        val = losses.get("val") if losses else None
        improved = val is None or val < self.best_val_loss
        if val is not None and improved:
            self.best_val_loss = val
        self._evaluated = None if val is None else (iteration, val)
        if iteration > 0 and not self.config.run.eval_only and (improved or self.config.run.always_save_checkpoint):
            self.save(iteration)
        self._restart_clock()  # neither evaluating nor saving counts as training time

    def _estimate(self, iteration: int) -> dict[str, float] | None:
        """Mean losses by split. Every rank takes a share, but in nanoGPT's order rank 0 alone draws, as there."""
        run, data, world = self.config.run, self.config.data, self.world
        if "val" not in self.sources:
            return None
        alone = self.generator is not None or run.eval_mode == "full"
        if alone and not world.is_main:
            return None
        iters = run.eval_iters if alone else -(-run.eval_iters // world.size)
        seed = (run.seed << 20) + iteration * world.size + world.rank
        losses = estimate_loss(
            self.model,
            self.sources,
            eval_iters=iters,
            batch_size=data.batch_size,
            block_size=data.block_size,
            generator=self.generator or torch.Generator().manual_seed(seed % 2**63),
            mode=run.eval_mode,
            forward=self._forward,
        )
        if not alone and world.size > 1:
            values = torch.tensor([losses[k] for k in sorted(losses)], dtype=torch.float64, device=world.device)
            world.all_reduce_(values)
            losses = dict(zip(sorted(losses), (values / world.size).tolist()))
        return losses

    def _report_evaluation(self, iteration: int, losses: dict[str, float]) -> None:
        perplexity = math.exp(min(losses["val"], 50.0))
        figures: dict[str, float | None] = {
            "train_loss": losses["train"],
            "val_loss": losses["val"],
            "val_perplexity": perplexity,
            "lr": learning_rate(iteration, self.config.optim),
            "mfu": _percent(self.peak.mfu(self._flops_per_s or 0.0)),
            "tokens": float(self._batches.tokens_before(iteration)),
            "elapsed_s": self.log.elapsed,
        }
        text = f"step {iteration}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"
        self.log.evaluation(iteration, figures, f"{text}, val perplexity {perplexity:.2f}")

    def save(self, step: int, must: bool = False) -> None:
        """Write the checkpoint of `step` completed iterations; a full disk is survived a few times, unless `must`."""
        if not self.world.is_main:
            return
        flat = self.optimizer.flat
        tensors, numbers = self.optimizer.state_dict()
        state = {
            **numbers,
            **self.step.guard.state_dict(),
            "samples_seen": self.loader.samples_seen,
            "best_val_loss": None if math.isinf(self.best_val_loss) else self.best_val_loss,
            "val_loss": self._evaluated[1] if self._evaluated and self._evaluated[0] == step else None,
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer,
            "config": self.config.flat(),
        }
        content = checkpoint.Checkpoint(step, asdict(self.model.config), flat.named(flat.master), tensors, state)
        try:
            with span(ranges.CHECKPOINT):
                path = checkpoint.save(self.out_dir, content, keep_last=self.config.run.keep_last)
        except CheckpointError as error:
            self._failed_saves += 1
            if must or self._failed_saves >= MAX_FAILED_SAVES:
                raise
            log.warning("%s\n  training goes on; the next evaluation tries again", error)
        else:
            self._failed_saves, self._saved_step = 0, step
            self.log.line(f"saving checkpoint to {path}")

    # ---- figures ----

    def _restart_clock(self) -> None:
        self._tick, self._since_log, self._clipped, self._traced = time.perf_counter(), 0, 0, False
        self.loader.take_wait()

    def _step_ms(self, iteration: int) -> float | None:
        """Milliseconds the iteration takes by nanoGPT's running mean of the rate; None until that has settled."""
        tokens = self._batches.tokens_before(iteration + 1) - self._batches.tokens_before(iteration)
        rate = self._flops_per_s
        return self._flops_per_token["nanogpt"] * tokens / self.world.size / rate * 1e3 if rate else None

    def _log_iteration(self, iteration: int, report: Report) -> None:
        loss, norm = report.loss, report.grad_norm
        now = time.perf_counter()
        seconds, clipped = (now - self._tick) / self._since_log, 100.0 * self._clipped / self._since_log
        seen = self._batches.tokens_before(iteration + 1)
        tokens = (seen - self._batches.tokens_before(iteration + 1 - self._since_log)) / self._since_log
        wait = self.loader.take_wait() / (now - self._tick)
        traced = self._traced
        self._tick, self._since_log, self._clipped, self._traced = now, 0, 0, False
        tokens_per_s = tokens / seconds
        rates = {name: flops * tokens / seconds / self.world.size for name, flops in self._flops_per_token.items()}
        if iteration - self.start >= 5 and not traced:  # nanoGPT: let the loop settle first
            running, rate = self._flops_per_s, rates["nanogpt"]
            self._flops_per_s = rate if running is None else 0.9 * running + 0.1 * rate
        mfu = {name: None if traced else _percent(self.peak.mfu(rate)) for name, rate in rates.items()}
        smooth = _percent(self.peak.mfu(self._flops_per_s)) if self._flops_per_s else -100.0  # nanoGPT's mark
        shown = "n/a" if smooth is None or self.peak.flops is None else f"{smooth:.2f}%"
        figures: dict[str, float | None] = {
            "loss": loss,
            "lr": learning_rate(iteration, self.config.optim),
            "grad_norm": norm,
            "clipped": clipped,
            "time_ms": seconds * 1e3,
            "tokens_per_s": tokens_per_s,
            "mfu": mfu["nanogpt"],
            "mfu_llmc": mfu["llmc"],
            "data_wait": wait * 100,
            "tokens": float(seen),
            "elapsed_s": self.log.elapsed,
        }
        eta = (self._batches.tokens_before(self.config.optim.max_iters + 1) - seen) / tokens_per_s
        rest = f"grad norm {norm:.3f}, {tokens_per_s / 1e3:,.1f}K tok/s, data wait {wait * 100:.1f}%, eta {_clock(eta)}"
        while_tracing = " (tracing)" if traced else ""  # slower than the run is: in no average, without an MFU
        line = f"iter {iteration}: loss {loss:.4f}, time {seconds * 1e3:.2f}ms{while_tracing}, mfu {shown}"
        self.log.train(iteration, figures, f"{line}, {rest}")
        self.log.progress(iteration + 1, f"loss {loss:.3f} {tokens_per_s / 1e3:,.1f}K tok/s")


def _percent(share: float | None) -> float | None:
    return None if share is None else share * 100


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}" if minutes >= 60 else f"{minutes}:{s:02d}"
