"""The clock of a run: what an iteration takes, the rate, MFU and the time left, as metrics.jsonl and the console say.

Time means training: evaluations, saves and what else is no training are kept out of an iteration's figures; the time
that is left counts the evaluations to come.
"""

import time

from nanogpt_fast.hardware import Peak, flops_per_token
from nanogpt_fast.schedule import BatchSchedule, learning_rate
from nanogpt_fast.settings.config import Config, GPTConfig
from nanogpt_fast.step import Report


class Meter:
    """Counts the iterations since the last logged one; start: iterations done before this process began."""

    def __init__(self, config: Config, shape: GPTConfig, world_size: int, peak: Peak, start: int):
        self.config, self.peak, self.start, self._ranks = config, peak, start, world_size
        self._batches = BatchSchedule.of(config.data)
        self._flops_per_token = flops_per_token(shape)
        self._flops_per_s: float | None = None  # nanoGPT's running value, a rank's; None until five iterations are done
        self._evaluating = self._evaluations = 0.0  # seconds, and how many
        self.restart()

    def restart(self) -> None:
        """Begin an interval here."""
        self._tick, self._since_log, self._clipped, self._traced = time.perf_counter(), 0, 0, False

    def leave_out(self, seconds: float) -> None:
        """So much of the interval was no training."""
        self._tick += seconds

    def evaluated(self, seconds: float) -> None:
        """An evaluation, with the save that follows it, took so long."""
        self._evaluating, self._evaluations = self._evaluating + seconds, self._evaluations + 1

    def count(self, report: Report, traced: bool) -> None:
        """One iteration more in the interval."""
        self._since_log += 1
        self._traced |= traced
        self._clipped += 0.0 < self.config.optim.grad_clip < report.grad_norm < float("inf")

    @property
    def mfu(self) -> float | None:
        """nanoGPT's running MFU in percent; None until there is one, or where no peak is known."""
        return _percent(self.peak.mfu(self._flops_per_s)) if self._flops_per_s else None

    def step_ms(self, iteration: int) -> float | None:
        """Milliseconds the iteration takes by nanoGPT's running mean of the rate; None until that has settled."""
        tokens = self._batches.tokens_before(iteration + 1) - self._batches.tokens_before(iteration)
        rate = self._flops_per_s
        return self._flops_per_token["nanogpt"] * tokens / self._ranks / rate * 1e3 if rate else None

    def figures(self, iteration: int, report: Report, waited: float) -> tuple[dict[str, float | None], str, str]:
        """({name in metrics.jsonl: value}, console line, the live line's words) of the interval that ends here.

        waited: seconds of it that the loop stood still for data.
        """
        now, n = time.perf_counter(), self._since_log
        span, traced, clipped = now - self._tick, self._traced, 100.0 * self._clipped / n
        self.restart()
        seconds, seen = span / n, self._batches.tokens_before(iteration + 1)
        tokens = (seen - self._batches.tokens_before(iteration + 1 - n)) / n
        tokens_per_s = tokens / seconds
        rates = {name: flops * tokens / seconds / self._ranks for name, flops in self._flops_per_token.items()}
        if iteration - self.start >= 5 and not traced:  # nanoGPT: let the loop settle first
            running, rate = self._flops_per_s, rates["nanogpt"]
            self._flops_per_s = rate if running is None else 0.9 * running + 0.1 * rate
        mfu = {name: None if traced else _percent(self.peak.mfu(rate)) for name, rate in rates.items()}
        figures: dict[str, float | None] = {
            "loss": report.loss,
            "lr": learning_rate(iteration, self.config.optim),
            "grad_norm": report.grad_norm,
            "clipped": clipped,
            "time_ms": seconds * 1e3,
            "tokens_per_s": tokens_per_s,
            "mfu": mfu["nanogpt"],
            "mfu_llmc": mfu["llmc"],
            "data_wait": waited / span * 100,
            "tokens": float(seen),
        }
        shown = "n/a" if self.mfu is None else f"{self.mfu:.2f}%"
        while_tracing = " (tracing)" if traced else ""  # slower than the run is: in no average, without an MFU
        line = (
            f"iter {iteration}: loss {report.loss:.4f}, time {seconds * 1e3:.2f}ms{while_tracing}, mfu {shown}, "
            f"grad norm {report.grad_norm:.3f}, {tokens_per_s / 1e3:,.1f}K tok/s, "
            f"data wait {waited / span * 100:.1f}%, eta {_clock(self._left(iteration, tokens_per_s))}"
        )
        return figures, line, f"loss {report.loss:.3f} {tokens_per_s / 1e3:,.1f}K tok/s"

    def _left(self, iteration: int, tokens_per_s: float) -> float:
        """Seconds until the end: the iterations to come at this rate, and their evaluations at the mean of those so
        far."""
        last, every = self.config.optim.max_iters, self.config.run.eval_interval
        left = self._batches.tokens_before(last + 1) - self._batches.tokens_before(iteration + 1)
        evaluations = last // every - iteration // every
        return left / tokens_per_s + evaluations * self._evaluating / max(self._evaluations, 1.0)


def _percent(share: float | None) -> float | None:
    return None if share is None else share * 100


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}" if minutes >= 60 else f"{minutes}:{s:02d}"
