"""From token files to batches: the worker that reads ahead, and the batches of an evaluation.

A sample is a window of block_size + 1 tokens: inputs, and the same shifted by one as targets. A step's batch is one
tensor [accumulation, B, T+1] of uint16 (int32 for four-byte tokens), allocated anew for each step: it stays valid for
as long as the caller holds it, and a pinned one goes back to torch's caching host allocator, which reuses it only when
the copies from it are done. No ring of buffers, so nothing that a slow GPU could still be reading is overwritten.

Why a thread: bench/loader.py on 2 EPYC cores, files in the page cache: microseconds a batch when nothing else runs,
and microseconds that next() blocks beside a step of torch on both cores:

    batch      in next()      thread         process
    12x64       26, 144       60, 49         42, 166
    64x256     122, 321      164, 338       149, 456
    12x1024     29, 151       59, 129        49, 296
    64x1024    129, 276      162, 60        169, 571

Beside training a process blocks longest, and it takes 3 s to start and a second copy of torch. On an overloaded CPU
waking a thread can cost the consumer its time slice: at a load of 8 on 2 cores next() took 0.09 ms in the median and
9 ms in the slowest tenth, against 0.36 and 0.72 ms when it read by itself (prefetch=0).
"""

import base64
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanogpt_fast.data.orders import NanogptOrder, ShuffleOrder, draw_starts, require_window
from nanogpt_fast.data.tokens import TokenSource
from nanogpt_fast.errors import DataError

PLAN_ROWS = 4096  # windows planned at once: numpy's cost a call is spread over many steps
POLL_SECONDS = 1.0  # how often a waiting consumer asks whether the worker lives

# ---- Training batches ----


@dataclass(frozen=True)
class Draws:
    """How far order nanogpt has drawn: where its generator stands, and the micro-batch that is drawn in advance."""

    generator: torch.Tensor  # its state, uint8
    ahead: np.ndarray  # first tokens of that micro-batch, int64 [B]

    def to_json(self) -> dict[str, Any]:
        return {"generator": base64.b64encode(self.generator.numpy().tobytes()).decode(), "ahead": self.ahead.tolist()}

    @classmethod
    def from_json(cls, value: Any, batch_size: int, starts: int) -> "Draws | None":
        """The inverse; None where it is not there, holds something else, or was drawn for another batch_size or for
        data with fewer possible first tokens."""
        try:
            state = np.frombuffer(base64.b64decode(value["generator"], validate=True), np.uint8)
            draws = cls(torch.from_numpy(state.copy()), np.array(value["ahead"], np.int64))
            torch.Generator().set_state(draws.generator)
        except (TypeError, KeyError, ValueError, RuntimeError, OverflowError):
            return None
        fits = draws.ahead.shape == (batch_size,) and draws.ahead.min() >= 0 and draws.ahead.max() < starts
        return draws if fits else None


class Loader:
    """Iterator over steps' batches [A / world_size, B, T+1], read ahead by a worker thread.

    accumulation: A, or a function that gives each iteration's; the first step is that of start_iteration. A step is the
    next A B samples after start_sample; rank r takes the micro-batches r A/W .. (r+1) A/W - 1 of it, so any number of
    ranks sees one global order. draws: where order nanogpt goes on, as draws() gave it. prefetch=0 reads in next(),
    without a worker. Order nanogpt knows a step's last micro-batch one step ahead only: with accumulation 1 it is read
    ahead, else next() waits for the read. An error of the worker (DataError) comes out of next() after the batches
    that were read before it.
    """

    def __init__(
        self,
        order: ShuffleOrder | NanogptOrder,
        *,
        batch_size: int,
        accumulation: int | Callable[[int], int],
        vocab_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_sample: int = 0,
        start_iteration: int = 0,
        draws: Draws | None = None,
        pin_memory: bool = False,
        prefetch: int = 2,
    ):
        self.order, self.samples_seen = order, start_sample  # samples handed out by all ranks, not those read ahead
        self._batch_size, self._vocab_size, self._pin = batch_size, vocab_size, pin_memory
        self._accumulation = accumulation if callable(accumulation) else lambda _: accumulation
        self._rank, self._world_size = rank, world_size
        self._iteration = start_iteration  # of the next batch to be handed out,
        self._allocated_for = start_iteration  # allocated,
        self._drawn_for = start_iteration  # and, in order nanogpt, drawn
        self._dtype = torch.uint16 if order.source.dtype == np.uint16 else torch.int32
        self._wait = 0.0
        self._failure: BaseException | None = None
        self._pending: list[np.ndarray] = []  # micro-batches drawn, not yet a whole step
        self._drawn: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        if isinstance(order, NanogptOrder):
            self._plans = self._drawn_plans()
            if draws is None:
                self._draw(1)
            else:
                order.generator.set_state(draws.generator)
                self._queue([draws.ahead])
        else:
            self._plans = self._shuffled_plans(order, start_sample, start_iteration)
        self._empty: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()  # consumer -> worker
        self._ready: queue.SimpleQueue[torch.Tensor | BaseException] = queue.SimpleQueue()  # worker -> consumer
        self._thread = threading.Thread(target=self._work, name="data worker", daemon=True) if prefetch else None
        if self._thread:
            for _ in range(prefetch):
                self._empty.put(self._allocate())
            self._thread.start()

    def __iter__(self) -> "Loader":
        return self

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> torch.Tensor:
        if self._failure:
            raise self._failure
        if isinstance(self.order, NanogptOrder):
            self._draw(self._micro_batches(self._iteration))
        began = time.perf_counter()
        batch = self._take() if self._thread else self._fill(self._allocate())
        self._wait += time.perf_counter() - began
        self.samples_seen += self._accumulation(self._iteration) * self._batch_size
        self._iteration += 1
        return batch

    def draws(self) -> Draws | None:
        """Order nanogpt's state between two steps, for a resume; None for an order that needs none."""
        if not isinstance(self.order, NanogptOrder):
            return None
        return Draws(self.order.generator.get_state(), self._ahead)

    def take_wait(self) -> float:
        """Seconds that next() was blocked since this was last asked."""
        wait, self._wait = self._wait, 0.0
        return wait

    def close(self) -> None:
        """Stop the worker; the source stays open, it belongs to the caller."""
        self._failure = ValueError("the loader is closed")
        self._empty.put(None)
        self._drawn.put(None)
        if self._thread:
            self._thread.join()

    def _micro_batches(self, iteration: int) -> int:
        """This rank's."""
        whole, rest = divmod(self._accumulation(iteration), self._world_size)
        assert rest == 0, "distributed.join sees to it"
        return whole

    def _draw(self, micro_batches: int) -> None:
        assert isinstance(self.order, NanogptOrder)
        self._queue([self.order.draw(self._batch_size) for _ in range(micro_batches)])

    def _queue(self, drawn: list[np.ndarray]) -> None:
        self._ahead = drawn[-1]  # the only one that the next step's draws do not hand out
        self._pending += drawn
        while len(self._pending) >= (count := self._micro_batches(self._drawn_for)):
            self._drawn.put(np.concatenate(self._pending[:count]))
            del self._pending[:count]
            self._drawn_for += 1

    def _drawn_plans(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while (starts := self._drawn.get()) is not None:
            yield np.zeros_like(starts), starts

    def _shuffled_plans(
        self, order: ShuffleOrder, sample: int, iteration: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while True:
            mine, ends = [], [0]
            while ends[-1] < PLAN_ROWS:
                rows = self._micro_batches(iteration) * self._batch_size
                mine.append(np.arange(rows) + (sample + self._rank * rows))
                ends.append(ends[-1] + rows)
                sample += rows * self._world_size
                iteration += 1
            files, starts = order.windows(np.concatenate(mine))
            yield from ((files[a:b], starts[a:b]) for a, b in itertools.pairwise(ends))

    def _allocate(self) -> torch.Tensor:
        """Room for the next batch that has none."""
        shape = (self._micro_batches(self._allocated_for), self._batch_size, self.order.block_size + 1)
        self._allocated_for += 1
        return torch.empty(shape, dtype=self._dtype, pin_memory=self._pin)

    def _fill(self, batch: torch.Tensor) -> torch.Tensor:
        self.order.source.check_unchanged()
        files, starts = next(self._plans)
        read_windows(self.order.source, files, starts, batch.numpy().reshape(len(files), -1), self._vocab_size)
        return batch

    def _work(self) -> None:
        try:
            while (batch := self._empty.get()) is not None and self._failure is None:
                self._ready.put(self._fill(batch))
        except StopIteration:  # closed while it waited for a draw
            pass
        except BaseException as error:
            self._ready.put(error)

    def _take(self) -> torch.Tensor:
        while True:
            try:
                item = self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                assert self._thread is not None
                if self._thread.is_alive() or not self._ready.empty():
                    continue
                item = DataError("the data worker stopped without an error", hint="--init_from=resume continues")
            if isinstance(item, BaseException):
                self._failure = item
                raise item
            self._empty.put(self._allocate())
            return item


def read_windows(source: TokenSource, files: np.ndarray, starts: np.ndarray, out: np.ndarray, vocab_size: int) -> None:
    """Fill out [rows, T+1] with these windows; DataError for an id that the model has no embedding for."""
    source.read_rows(files.tolist(), starts.tolist(), out)
    ids = out if out.dtype == np.uint16 else out.view(np.uint32)  # a negative int32 is a huge id
    if ids.max() < vocab_size:
        return
    row, column = np.argwhere(ids >= vocab_size)[0].tolist()
    file, token = source.files[int(files[row])], int(starts[row]) + column
    raise DataError(
        "a token id is outside the vocabulary",
        where=f"{file.path}, token {token:,} (byte {file.offset + token * out.itemsize})",
        expected=f"ids below vocab_size = {vocab_size}",
        found=str(ids[row, column]),
        hint="the data were prepared with another tokenizer than the model's: check --dataset, or set --vocab_size",
    )


# ---- Evaluation batches ----


def random_batches(
    source: TokenSource,
    *,
    batch_size: int,
    block_size: int,
    iters: int,
    generator: torch.Generator,
    vocab_size: int,
    stack: int = 1,
) -> Iterator[torch.Tensor]:
    """`iters` random batches by nanoGPT's draws, as [stack, B, T+1]; the last stack holds what is left of iters."""
    require_window(source, block_size)
    ends = np.cumsum([max(0, file.n_tokens - block_size) for file in source.files])
    for first in range(0, iters, stack):
        count = min(stack, iters - first)
        drawn = np.concatenate([draw_starts(source, block_size, batch_size, generator) for _ in range(count)])
        files = np.searchsorted(ends, drawn, side="right")
        starts = drawn - np.concatenate([[0], ends])[files]
        out = np.empty((count * batch_size, block_size + 1), source.dtype)
        read_windows(source, files, starts, out, vocab_size)
        yield torch.from_numpy(out).view(count, batch_size, block_size + 1)


def full_split(
    source: TokenSource, *, batch_size: int, block_size: int, vocab_size: int, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every target of the split once, in order: (tokens [B, T+1], valid targets of each row, int64 [B]).

    Of several ranks each takes every so many-th window, perhaps none. All batches have B rows. Row b predicts
    tokens[b, 1 : 1 + valid[b]]; what is behind that is zeros to be ignored.
    """
    files, starts, valid = [], [], []
    for index, file in enumerate(source.files):
        first = np.arange(0, file.n_tokens - 1, block_size)
        files.append(np.full_like(first, index))
        starts.append(first)
        valid.append(np.minimum(block_size, file.n_tokens - 1 - first))
    files, starts, valid = (np.concatenate(parts) for parts in (files, starts, valid))
    if not len(files):
        raise DataError(
            "no token to predict", where=source.files[0].path, expected="2 tokens", hint="prepare more text"
        )
    files, starts, valid = (part[rank::ranks] for part in (files, starts, valid))
    for at in range(0, len(files), batch_size):
        lengths = valid[at : at + batch_size]
        tokens = np.zeros((batch_size, block_size + 1), source.dtype)
        for length in np.unique(lengths).tolist():  # one read for the whole windows, one for a file's last part
            rows = np.flatnonzero(lengths == length)
            part = np.empty((len(rows), length + 1), source.dtype)
            read_windows(source, files[at + rows], starts[at + rows], part, vocab_size)
            tokens[rows, : length + 1] = part
        yield torch.from_numpy(tokens), torch.from_numpy(np.pad(lengths, (0, batch_size - len(lengths))))
