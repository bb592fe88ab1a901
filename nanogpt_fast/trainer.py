"""The training loop: schedule, evaluate, save, step, log; nanoGPT's order of events and meanings."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanogpt_fast.command import out_of_memory
from nanogpt_fast.data.loader import Loader
from nanogpt_fast.data.tokens import TokenSource
from nanogpt_fast.distributed import World
from nanogpt_fast.errors import DeviceError, DivergedError
from nanogpt_fast.hardware import Peak, free_memory
from nanogpt_fast.keeper import Keeper, Position
from nanogpt_fast.memory import RESERVE, plan_of, relief
from nanogpt_fast.meter import Meter
from nanogpt_fast.run import checkpoint, ranges
from nanogpt_fast.run.log import RunLog
from nanogpt_fast.run.ranges import span
from nanogpt_fast.run.stopping import SAVING, StopSignals
from nanogpt_fast.run.tracing import Window
from nanogpt_fast.schedule import BatchSchedule, learning_rate
from nanogpt_fast.scoring import BrokenOff, Forward, estimate_loss
from nanogpt_fast.settings.config import Config
from nanogpt_fast.step import Reading, Report, TrainStep

log = logging.getLogger(__name__)


class Launched(NamedTuple):
    """An iteration whose work the device has been given."""

    iteration: int
    samples: range  # of the run's order, over all ranks
    traced: bool
    reading: Reading


@dataclass(kw_only=True)
class Trainer:
    """The parts of a run; run() trains. start: iterations done before this process began.

    Whatever ends it, what is held is saved first, where that is healthy (keeper.py).
    """

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
    saved_val_loss: float | None = None  # that the checkpoint resumed from carries
    window: Window = field(default_factory=Window)  # the iterations to trace, none unless --profile names some

    def __post_init__(self) -> None:
        self.window.say = self.log.line
        self.out_dir = Path(self.config.run.out_dir)
        self.model, self.optimizer = self.step.model, self.step.optimizer
        self.meter = Meter(self.config, self.model.config, self.world.size, self.peak, self.start)
        self._batches = BatchSchedule.of(self.config.data)
        self._launched: deque[Launched] = deque()
        self._lag = 1 if self.world.device.type == "cuda" else 0  # iterations whose figures the GPU still owes
        self._forward = Forward(self.model, self.step.eot, self.step.graphs)
        self._votes, self._save_votes = 0.0, 0.0  # to stop, and to save and go on; on all ranks alike
        facts = {"fingerprint": self.fingerprint, "tokenizer": self.tokenizer}
        line, elapsed = self.log.line, lambda: self.log.elapsed
        self.keeper = Keeper(self.config, self.world, self.step, self._position(self.start), facts, line, elapsed)
        self.keeper.best_val_loss = self.best_val_loss

    def run(self) -> int:
        """Train to max_iters; returns the exit code."""
        run, end = self.config.run, self.config.optim.max_iters + 1
        with StopSignals("leaving the evaluation" if run.eval_only else SAVING) as stop:
            self.log.start(self.start)
            self._restart_clock()
            try:
                if run.eval_only:
                    self._evaluate_and_save(self.start, stop)
                    return stop.exit_code
                with self.window as window:
                    for iteration in range(self.start, end):
                        if self.world.pulse:
                            self.world.pulse.at = f"iteration {iteration}"
                        if iteration % run.eval_interval == 0 or iteration in window.bounds:
                            self._settle()  # neither an evaluation nor a window counts the step before as its own
                        if iteration > self.start and self._asked(stop):
                            return self._leave(stop)
                        self.meter.leave_out(window.reach(iteration, self.meter.step_ms(iteration)))
                        with span(ranges.ITERATION):
                            if iteration % run.eval_interval == 0:
                                self._evaluate_and_save(iteration, stop)
                            if self.world.size == 1 and stop():  # within the evaluation
                                return self._leave(stop)
                            self._iterate(iteration, stop)
                    self._settle()
                    if self._asked(stop):
                        return self._leave(stop)
                self.step.exchange.complete()  # for the sample at the end
                self._finish(end)
            except Exception as error:
                if not (run.eval_only or isinstance(error, DivergedError)):
                    self.keeper.before_leaving(error)
                if out_of_memory(error):
                    raise self._out_of_memory(error) from error
                raise
        return 0

    def _asked(self, stop: StopSignals) -> bool:
        """Whether to stop here; on all ranks alike, by the votes that their steps have summed."""
        return self._votes > 0 if self.world.size > 1 else stop()

    def _leave(self, stop: StopSignals) -> int:
        """Save, say how to go on; the exit code."""
        self._settle()
        self.keeper.before_leaving(then=self.window.close)  # what to type next comes last
        return stop.exit_code or 143

    def _finish(self, end: int) -> None:
        """The run's last checkpoint; DivergedError where what it came to is not worth one."""
        self.keeper.settle(wait=True)
        always, saved = self.config.run.always_save_checkpoint, self.keeper.saved_step
        if self.start >= end:
            self.log.line(f"nothing to do: {self.start} iterations are done, --max_iters={end - 1}")
        elif not self.keeper.healthy or self.world.main_says(not math.isfinite((self.keeper.evaluated or (0, 0.0))[1])):
            raise self._diverged("the run ended in losses that are not finite", f"iteration {end - 1}")
        else:  # as nanoGPT, max_iters steps are enough
            self.keeper.offer(saved < end - 1 and (always or saved in (-1, self.start)), must=True)

    def _iterate(self, iteration: int, stop: StopSignals) -> None:
        """Step, and log what has come back."""
        save = stop.save_asked
        if save:
            stop.save_asked = False
        if self._save_votes > 0 if self.world.size > 1 else save:
            self._settle()
            self._save_votes = 0.0
            self.keeper.offer(self.keeper.unsaved > 0, f"iteration {iteration}: not saved, the losses are not finite")
            self._restart_clock()
        self.optimizer.set_lr(learning_rate(iteration, self.config.optim))
        first = self.loader.samples_seen
        with span(ranges.DATA):
            batch = next(self.loader)
        self.step(batch, iteration, stop(), save)
        self.keeper.position = self._position(iteration + 1)
        samples = range(first, self.loader.samples_seen)
        self._launched.append(Launched(iteration, samples, self.window.open, self.step.read()))
        if not self.window.open:  # a product in the window would pass for one of the step's
            self.meter.leave_out(self.peak.refine())
        with span(ranges.LOG):
            self._settle(self._lag)
            self.keeper.settle()

    def _position(self, step: int) -> Position:
        return Position(step, self.loader.samples_seen, self.loader.draws())

    def _settle(self, lag: int = 0) -> None:
        """Take in the figures of the iterations launched, but for the newest `lag`, which the GPU may be busy with."""
        while len(self._launched) > lag:
            launched = self._launched.popleft()
            self._take_in(launched, launched.reading.get())

    def _take_in(self, launched: Launched, report: Report) -> None:
        self._votes += report.stop
        self._save_votes += report.save
        self.keeper.bad_losses = 0 if math.isfinite(report.loss) else self.keeper.bad_losses + 1
        self.meter.count(report, launched.traced)
        if report.refused:
            self._say_refused(launched, report)
        if launched.iteration % self.config.run.log_interval == 0:
            figures, line, live = self.meter.figures(launched.iteration, report, self.loader.take_wait())
            self.log.train(launched.iteration, {**figures, "elapsed_s": self.log.elapsed}, line)
            self.log.progress(launched.iteration + 1, live)

    def _say_refused(self, launched: Launched, report: Report) -> None:
        """A line for an update that was not applied; DivergedError after max_bad_steps in a row."""
        iteration, in_a_row = launched.iteration, int(report.bad_steps)
        bad = [name for name, x in (("loss", report.loss), ("gradient", report.grad_norm)) if not math.isfinite(x)]
        why = f"not finite: the {' and the '.join(bad)}" if bad else "the loss spiked"
        samples = f"samples {launched.samples.start:,} to {launched.samples.stop - 1:,} of the run's order"
        figures = {"loss": report.loss, "grad_norm": report.grad_norm, "bad_steps": in_a_row}
        figures |= {"first_sample": launched.samples.start, "samples": len(launched.samples)}
        scale = f", loss scale now {report.loss_scale:g}" if self.optimizer.scale_loss else ""
        line = f"iter {iteration}: no update: {why} (loss {report.loss:.4f}, {samples}{scale}), {in_a_row} in a row"
        self.log.refused(iteration, figures, line)
        if in_a_row >= self.config.optim.max_bad_steps:
            where = f"iteration {iteration}, loss {report.loss}, gradient norm {report.grad_norm}; {samples}"
            raise self._diverged(f"no update in {in_a_row} iterations in a row, {why}", where)

    def _diverged(self, what: str, where: str) -> DivergedError:
        saved, best = checkpoint.list_steps(self.out_dir), checkpoint.best(self.out_dir)
        back = ""  # to before the loss went up, where that was saved
        if best and best != saved[max(saved)]:
            back = f" --resume_step={int(best.name.removeprefix('step_'))}"
        rate = f"--learning_rate={self.config.optim.learning_rate / 3:.2g}"
        return DivergedError(
            what,
            where=where,
            expected="finite losses and gradients, no spike; no such update was applied",
            found=f"the last good checkpoint is {best or saved[max(saved)]}" if saved else "no checkpoint yet",
            hint=f"{self.keeper.command(resume=bool(saved))}{back} {rate}",
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
            found=next(iter(str(error).splitlines()), type(error).__name__),
            hint=relief(plan, None if there is None else (1 - RESERVE) * there),
        )

    # ---- evaluation ----

    def _evaluate_and_save(self, iteration: int, stop: StopSignals) -> None:
        began, run, keeper = time.perf_counter(), self.config.run, self.keeper
        try:
            with span(ranges.EVALUATION):
                losses = self._estimate(iteration, stop)
        except BrokenOff:  # it says nothing
            return
        if losses is not None:
            self._report_evaluation(iteration, losses)
        val = losses.get("val") if losses else None
        improved = val is None or val < keeper.best_val_loss
        if val is not None and improved:
            keeper.best_val_loss = val
        keeper.evaluated = None if val is None else (iteration, val)
        due = improved or run.always_save_checkpoint
        if iteration == keeper.saved_step:  # what was loaded stands; only a loss that it lacks is news
            due = improved and val is not None and self.saved_val_loss is None
        refusal = f"iteration {iteration}: not saved, the losses are not finite (validation {val})"
        keeper.offer(iteration > 0 and due and not run.eval_only, refusal)
        self._restart_clock()  # neither evaluating nor saving counts as training time
        self.meter.evaluated(time.perf_counter() - began)

    def _estimate(self, iteration: int, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Mean losses by split; None without a validation split, and where this rank takes no part: every rank takes a
        share, but in nanoGPT's order rank 0 alone draws, as there. BrokenOff where a rank was asked to stop meanwhile.
        """
        run, data, world = self.config.run, self.config.data, self.world
        if "val" not in self.sources:
            return None
        self.step.exchange.complete()
        alone = self.generator is not None
        sharing = World() if alone else world
        seed = (run.seed << 20) + iteration * world.size + world.rank
        losses: dict[str, float] | None = None
        with suppress(BrokenOff):
            if world.is_main or not alone:
                losses = estimate_loss(
                    self.model,
                    self.sources,
                    eval_iters=-(-run.eval_iters // sharing.size),
                    batch_size=data.batch_size,
                    block_size=data.block_size,
                    generator=self.generator or torch.Generator().manual_seed(seed % 2**63),
                    mode=run.eval_mode,
                    forward=self._forward,
                    stop=stop,
                    world=sharing,
                )
        if self.world.main_says(losses is None) if alone else losses is None:
            raise BrokenOff
        return losses

    def _report_evaluation(self, iteration: int, losses: dict[str, float]) -> None:
        perplexity = math.exp(min(losses["val"], 50.0))
        figures: dict[str, float | None] = {
            "train_loss": losses["train"],
            "val_loss": losses["val"],
            "val_perplexity": perplexity,
            "lr": learning_rate(iteration, self.config.optim),
            "mfu": self.meter.mfu,
            "tokens": float(self._batches.tokens_before(iteration)),
            "elapsed_s": self.log.elapsed,
        }
        text = f"step {iteration}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"
        self.log.evaluation(iteration, figures, f"{text}, val perplexity {perplexity:.2f}")

    def _restart_clock(self) -> None:
        self.meter.restart()
        self.loader.take_wait()
