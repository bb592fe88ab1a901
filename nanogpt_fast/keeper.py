"""What a run holds and what of it is on the disk: one place decides whether it is worth keeping, and saves it.

Held between two steps: the parameters, the moments, and where the run stands in its order (Position). It is kept at
evaluations, at signals, and before any error ends the run, unless it is not healthy.
"""

import logging
import math
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanogpt_fast.data.loader import Draws
from nanogpt_fast.distributed import World
from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.pulse import RankLost
from nanogpt_fast.run import checkpoint, ranges
from nanogpt_fast.run.ranges import span
from nanogpt_fast.saver import Saver
from nanogpt_fast.settings.config import Config
from nanogpt_fast.step import TrainStep

log = logging.getLogger(__name__)
MAX_FAILED_SAVES = 3
PATIENCE, LOST_PATIENCE = 600.0, 15.0  # seconds to wait for other ranks' shares; torchrun kills 30 s after its SIGTERM


class Position(NamedTuple):
    """Where the run stands between two steps: what a checkpoint says of it, and a resume begins with."""

    step: int  # iterations whose updates the parameters have behind them
    samples: int  # handed out to all ranks until there
    draws: Draws | None  # of nanoGPT's order: the generator's state, and the micro-batch drawn in advance


class Keeper:
    """Saves the state to out_dir, which rank 0 does; where ranks hold shares of it, all of them have to ask alike.

    facts: what every checkpoint says of the run (fingerprint, tokenizer). say, elapsed: the run's log.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        step: TrainStep,
        position: Position,
        facts: dict[str, Any],
        say: Callable[[str], None],
        elapsed: Callable[[], float],
    ):
        self.config, self.world, self.step, self.position, self.facts = config, world, step, position, facts
        self._say, self._elapsed, keep_last = say, elapsed, 0 if config.run.eval_only else config.run.keep_last
        args = asdict(step.model.config)
        self._saver = Saver(self._out_dir, world, step.exchange, step.optimizer, args, keep_last)
        there = config.run.init_from == "resume" and position.step in checkpoint.readable_steps(self._out_dir)
        self.saved_step = position.step if there else -1  # -1: nothing of this run
        self.bad_losses = 0  # steps in a row, up to the newest, whose loss was not finite
        self.evaluated: tuple[int, float] | None = None  # (iteration, val loss) of the last evaluation
        self.best_val_loss = math.inf
        self._failed = 0

    @property
    def healthy(self) -> bool:
        """Whether what all ranks hold is worth keeping; every one that holds a share has to ask."""
        good = self._healthy
        return not self.world.any(not good) if self.step.exchange.sharded else good

    @property
    def _healthy(self) -> bool:
        """Whole (no update was broken off), finite, and so is the loss that it comes to: of its own evaluation where
        there is one, else not of two steps in a row (one alone may be the fault of its batch; its update was refused).
        """
        good = self.bad_losses < 2
        if self.evaluated and self.evaluated[0] == self.position.step:
            good = math.isfinite(self.evaluated[1])
        return good and self.step.whole and bool(torch.isfinite(self.step.optimizer.flat.master.sum()))

    @property
    def unsaved(self) -> int:
        """Steps since the last checkpoint."""
        return self.position.step - max(self.saved_step, 0)

    def offer(self, wanted: bool, refusal: str = "", must: bool = False) -> None:
        """Save what is held if that is wanted, by rank 0's account, and healthy; else warn of the refusal."""
        if self.step.exchange.sharded:
            wanted = self.world.main_says(wanted)
        elif not self.world.is_main:
            return
        if wanted and self.healthy:
            self._save(must)
        elif wanted and refusal:
            log.warning(refusal)

    def _save(self, must: bool, patience: float = PATIENCE) -> None:
        """Save the steps done; a full disk is survived a few times, unless `must`."""
        self.settle(wait=True)
        step, samples, draws = self.position
        state = {
            **self.step.optimizer.numbers(),
            **self.step.guard.state_dict(),
            "samples_seen": samples,
            "best_val_loss": None if math.isinf(self.best_val_loss) else self.best_val_loss,
            "val_loss": self.evaluated[1] if self.evaluated and self.evaluated[0] == step else None,
            "elapsed_s": self._elapsed(),
            **self.facts,
            "config": self.config.flat(),
        }
        if draws is not None and self.world.size == 1:  # the other ranks have generators of their own
            state["draws"] = draws.to_json()
        at_once = must or not self.config.run.async_save
        with span(ranges.CHECKPOINT):
            self._saver.save(step, state, at_once, patience)
        self.settle(at_once, must)

    def settle(self, wait: bool = False, must: bool = False) -> None:
        """Take in what became of a save that was under way; wait: until it has ended. must: raise where it failed."""
        try:
            ended = self._saver.settle(wait)
        except CheckpointError as error:
            self._failed += 1
            if must or self._failed >= MAX_FAILED_SAVES:
                raise
            log.warning("%s\n  training goes on; the next evaluation tries again", error)
        else:
            if ended:
                self._failed, (self.saved_step, path) = 0, ended
                self._say(f"saving checkpoint to {path}")

    def before_leaving(self, error: Exception | None = None, then: Callable[[], None] = lambda: None) -> None:
        """The run ends here: save the steps since the last checkpoint if they are healthy, then(), say how to go on.

        error: what ends it, on this rank at least; that a save fails too is then only warned of.
        """
        try:
            self.settle(wait=True)
            if error is None or not self.step.exchange.sharded:
                self.offer(self.unsaved > 0, must=True)
            elif self.unsaved and (self._saver.together or (isinstance(error, RankLost) and error.silent)):
                log.warning("the last %d steps are lost: a rank that ended held its share of them", self.unsaved)
            elif self.unsaved and self._healthy:
                self._save(must=True, patience=LOST_PATIENCE)
        except Exception as another:  # the device is gone, or the disk
            if error is None:
                raise
            log.warning("the last %d steps could not be saved: %s", self.unsaved, str(another).partition("\n")[0])
        then()
        if not self.world.is_main:
            return
        done, saved = self.position.step, self.saved_step
        kept = "" if not self.unsaved else f"; saved until iteration {saved - 1}" if saved > 0 else "; nothing is saved"
        if not done:
            self._say("stopped before the first step: there is nothing to save")
        else:
            self._say(f"stopped after iteration {done - 1}{kept}. To continue:\n  {self.command(resume=saved >= 0)}")

    def command(self, resume: bool) -> str:
        """What to type to go on with this run, or to start it again."""
        words = ["python", "-m", "nanogpt_fast.train", "--config", str(self._out_dir / "config.toml")]
        return shlex.join([*words, "--init_from=resume"] if resume else words)

    @property
    def _out_dir(self) -> Path:
        return Path(self.config.run.out_dir)
