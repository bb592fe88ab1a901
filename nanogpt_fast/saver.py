"""Writes a run's checkpoints: rank 0 all of it, or every rank its share; at once, or beside the training from a copy.

The copy is taken between two steps, into host memory that is kept from one save to the next: 12 bytes a parameter that
the rank holds. One save is under way at a time.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt_fast.distributed import World
from nanogpt_fast.exchange import Exchange
from nanogpt_fast.optim import AdamW
from nanogpt_fast.run import checkpoint
from nanogpt_fast.run.rundir import meeting_point
from nanogpt_fast.run.shares import KINDS


class Saver:
    """save() begins a checkpoint, settle() says what became of it. Where ranks hold shares every one has to save alike:
    each its own file if all see out_dir, else rank 0 is sent all of it."""

    def __init__(
        self, out_dir: Path, world: World, exchange: Exchange, optimizer: AdamW, args: dict[str, Any], keep_last: int
    ):
        """args: the model's, as a checkpoint has them. keep_last: checkpoints to keep, 0 where none will be saved."""
        self.out_dir, self.world, self.exchange, self.optimizer = out_dir, world, exchange, optimizer
        self._args, self._keep_last = args, keep_last
        self._meeting = _meeting_of(out_dir, world) if exchange.sharded and keep_last else ""
        self._saves = 0
        self._copies: list[Tensor] = []
        self._pool: ThreadPoolExecutor | None = None
        self._writing: tuple[int, Future[Path]] | None = None

    @property
    def together(self) -> bool:
        """Whether a save needs collectives."""
        return self.exchange.sharded and not self._meeting

    def save(self, step: int, state: dict[str, Any], at_once: bool, patience: float) -> None:
        """Begin the checkpoint of so many steps; at_once: and end it. patience: seconds to wait for other ranks'."""
        self._saves += 1
        flat, optimizer, ranks = self.optimizer.flat, self.optimizer, None
        held, arrived = [flat.master, optimizer.m, optimizer.v], _already
        if self.together:
            held = [self.exchange.whole(buffer) for buffer in held]
        if not (self._meeting or self.world.is_main):
            return
        if not (at_once or self.together):
            arrived = self._copy(held)
            held = self._copies
        if self._meeting:
            process, _, number = self._meeting.rpartition("-")
            meeting = f"{process}-{(int(number, 16) + self._saves) % 2**32:08x}"  # a name of its own for each
            ranks = checkpoint.Ranks(self.world.rank, self.world.size, meeting, patience)
            runs = ((kind, run) for kind, buffer in zip(KINDS, held) for run in flat.runs(buffer, self.world.is_main))
            tensors = {f"{kind}.{name}@{first}": run for kind, (name, first, run) in runs}
            shapes = {name: list(shape) for name, shape in flat.shapes.items()}
            content = checkpoint.Checkpoint(step, self._args, tensors, {}, {**state, "shapes": shapes})
        else:
            master, m, v = held
            content = checkpoint.Checkpoint(step, self._args, flat.named(master), optimizer.state_dict(m, v)[0], state)
        work = partial(self._write, content, ranks, arrived)
        if at_once:
            done: Future[Path] = Future()
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)
        else:
            self._pool = self._pool or ThreadPoolExecutor(1, "save")
            done = self._pool.submit(work)
        self._writing = step, done

    def settle(self, wait: bool = False) -> tuple[int, Path] | None:
        """(step, path) of the save that has ended, once; wait: until it has. Raises as checkpoint.save."""
        if self._writing is None or not (wait or self._writing[1].done()):
            return None
        (step, done), self._writing = self._writing, None
        return step, done.result()

    def _write(
        self, content: checkpoint.Checkpoint, ranks: checkpoint.Ranks | None, arrived: Callable[[], None]
    ) -> Path:
        arrived()
        return checkpoint.save(self.out_dir, content, keep_last=self._keep_last, ranks=ranks)

    def _copy(self, held: list[Tensor]) -> Callable[[], None]:
        """Begin to copy to the host, in the order of the device's work; what is returned waits."""
        on_gpu = held[0].is_cuda
        if not self._copies:
            self._copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=on_gpu) for t in held]
        for copy, t in zip(self._copies, held):
            copy.copy_(t, non_blocking=True)
        if not on_gpu:
            return _already
        event = torch.cuda.Event()
        event.record()
        return event.synchronize


def _already() -> None: ...


def _meeting_of(out_dir: Path, world: World) -> str:
    """What names the directories that all ranks fill; "" where they do not all see out_dir."""
    meeting = world.main_object(meeting_point())
    sign = out_dir / f".ranks-{meeting}"
    if world.is_main:
        out_dir.mkdir(parents=True, exist_ok=True)
        sign.touch()
    world.any(False)  # now it is there
    seen = not world.any(not sign.exists())
    if world.is_main:
        sign.unlink()
    return meeting if seen else ""
