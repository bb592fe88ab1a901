"""What changes with the iteration: the learning rate, and how many micro-batches an iteration has. Pure arithmetic."""

import math
from dataclasses import dataclass

from nanogpt_fast.settings.config import DataConfig, OptimConfig


def learning_rate(it: int, config: OptimConfig) -> float:
    """The rate of iteration `it`: linear warm-up, then as config.schedule says; min_lr past lr_decay_iters.

    cosine: nanoGPT's get_lr, and as there no warm-up without decay_lr. linear: a line from the warm-up's end to
    lr_decay_iters. wsd (warm-up, stable, decay): constant, then a line over the last decay_ratio of lr_decay_iters.
    constant: learning_rate for ever.
    """
    peak, end = config.learning_rate, config.lr_decay_iters
    if not config.decay_lr:
        return peak
    if it < config.warmup_iters:
        return peak * (it + 1) / (config.warmup_iters + 1)
    if config.schedule == "constant":
        return peak
    if it > end:
        return config.min_lr
    begin = config.decay_begins if config.schedule == "wsd" else config.warmup_iters
    progress = max(0, it - begin) / max(1, end - begin)
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return config.min_lr + share * (peak - config.min_lr)


@dataclass(frozen=True)
class BatchSchedule:
    """The batch of every iteration in micro-batches of all ranks: start, then linearly up to full by iteration ramp.

    It grows in whole steps of gcd(start, full), so what divides both, as the number of ranks must, divides all between.
    """

    start: int
    full: int
    ramp: int  # iterations; 0: full from the first one on
    tokens_a_micro_batch: int = 1

    @classmethod
    def of(cls, data: DataConfig) -> "BatchSchedule":
        return cls(*data.ramp, data.batch_size * data.block_size)

    def accumulation_at(self, it: int) -> int:
        """Micro-batches of iteration `it`."""
        if it >= self.ramp:
            return self.full
        step = math.gcd(self.start, self.full)
        return self.start + step * (it * ((self.full - self.start) // step) // self.ramp)

    def micro_batches_before(self, it: int) -> int:
        """Micro-batches of the iterations 0 .. it - 1."""
        ramped, step = min(it, self.ramp), math.gcd(self.start, self.full)
        grown = _floor_sum(ramped, (self.full - self.start) // step, max(1, self.ramp))
        return self.start * ramped + step * grown + self.full * (it - ramped)

    def tokens_before(self, it: int) -> int:
        """Tokens that the iterations 0 .. it - 1 train on, over all ranks."""
        return self.micro_batches_before(it) * self.tokens_a_micro_batch


def _floor_sum(count: int, a: int, m: int, b: int = 0) -> int:
    """The sum of (a k + b) // m over 0 <= k < count, in as many steps as Euclid's algorithm takes for a and m.

    Whole multiples of m leave a and b; what remains counts lattice points under a line, which a swap of the axes turns
    into the same question with a and m exchanged.
    """
    total = count * (count - 1) // 2 * (a // m) + count * (b // m)
    rows, rest = divmod(a % m * count + b % m, m)
    return total + _floor_sum(rows, m, a % m, rest) if rows else total
