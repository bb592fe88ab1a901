"""One optimisation step: forward and backward over the micro-batches, all-reduce, clip, AdamW.

Two pieces of it take no arguments, the micro-step and the update; on CUDA each is replayed as a graph. All that varies
from one step to the next is written beforehand into tensors that stay: the micro-batch, the dropout counter, the
gradient's scale, the learning rate. With several ranks the last micro-step, which reduces the gradient while its
backward pass goes on, is a piece of its own, and where parameters are to be gathered so is the first.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nanogpt_fast.distributed import World
from nanogpt_fast.exchange import Exchange
from nanogpt_fast.graphs import Graphs
from nanogpt_fast.guards import LossGuard
from nanogpt_fast.model import GPT, document_ids
from nanogpt_fast.ops import exact_device
from nanogpt_fast.optim import EMBEDDINGS, AdamW
from nanogpt_fast.run.ranges import ALL_REDUCE, BACKWARD, FORWARD, STEP, span
from nanogpt_fast.schedule import BatchSchedule

LOSS, STOP, SAVE, GRAD_NORM, REFUSED, BAD_STEPS, LOSS_SCALE = range(7)  # slots of a step's report
SHARED = slice(LOSS, GRAD_NORM + 1)  # those that are summed over the ranks, GRAD_NORM while it holds squares


class StepResult(NamedTuple):
    """What a step leaves on the device; reading a value synchronises."""

    loss: Tensor  # mean negative log-likelihood of all ranks' micro-batches, nats a token
    grad_norm: Tensor  # global norm before clipping


class Report(NamedTuple):
    """A step's figures on the host."""

    loss: float
    stop: float  # ranks that asked to stop
    save: float  # ranks that asked to save and go on
    grad_norm: float
    refused: float  # 1: the update was not applied
    bad_steps: float  # refused in a row, this one included
    loss_scale: float  # for the next step


class Reading:
    """A step's Report on its way to the host; only get() waits for it."""

    def __init__(self, report: Tensor):
        self._copied = torch.cuda.Event() if report.is_cuda else None
        self._host = report.to("cpu", non_blocking=True)  # from CUDA into pinned memory
        if self._copied:
            self._copied.record()

    def get(self) -> Report:
        if self._copied:
            self._copied.synchronize()
        return Report(*self._host.tolist())


class TrainStep:
    """step(batch, iteration) -> StepResult; batch [A, B, T + 1] token ids, A this rank's micro-batches.

    The dropout counter of a micro-batch is its global index, iteration * A_global + rank * A + i, beside the seed: so
    a mask does not depend on how many ranks there are, and a resumed run draws the same ones. batches: counts the
    micro-batches of earlier iterations where their number changes. eot: the token that ends a document, where
    attention is to stay inside documents.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: AdamW,
        world: World,
        seed: int,
        batches: BatchSchedule | None = None,
        eot: int | None = None,
        graphs: Graphs | None = None,
        guard: LossGuard | None = None,
        reduce_dtype: torch.dtype = torch.float32,
    ):
        self.model, self.optimizer, self.world, self.batches, self.eot = model, optimizer, world, batches, eot
        self.base = (seed % 2**31) << 32
        self.device = optimizer.m.device
        exact = exact_device(self.device)
        self.guard = guard or LossGuard(0.0, 0, exact)
        self.graphs = graphs or Graphs(self.device)
        self.exchange = Exchange(optimizer.flat, world, reduce_dtype)
        self._tokens = torch.empty(0, device=exact)  # the micro-batch [B, T + 1], in the batch's dtype
        self.counter = torch.zeros(1, dtype=torch.int64, device=exact)
        self._grad_scale = torch.zeros((), device=self.device)
        self._loss = torch.zeros((), device=self.device)  # summed over the micro-batches
        self._report = torch.zeros(len(Report._fields), dtype=torch.float64, device=exact)
        self._update = self.graphs.replayed("the update", self._apply)
        self.whole = True  # False while an update is under way: what an error leaves then is no step's state

    def __call__(self, batch: Tensor, iteration: int, stop: bool = False, save: bool = False) -> StepResult:
        """Train on the batch; `stop` and `save` are this rank's votes, whose sums the report carries."""
        with span(STEP):
            return self._step(batch, iteration, stop, save)

    def read(self) -> Reading:
        """The newest step's figures, without waiting for them."""
        return Reading(self._figures)

    def _step(self, batch: Tensor, iteration: int, stop: bool, save: bool) -> StepResult:
        A, B, T = batch.size(0), batch.size(1), batch.size(2) - 1
        world, report = self.world, self._report
        micro_batches = A * world.size
        if self._tokens.shape != batch.shape[1:] or self._tokens.dtype != batch.dtype:
            self._tokens = torch.empty(batch.shape[1:], dtype=batch.dtype, device=self.counter.device)
            self._pieces: dict[tuple[bool, bool], Callable[[], None]] = {}
        before = self.batches.micro_batches_before(iteration) if self.batches else iteration * micro_batches
        self.counter.fill_(self.base + before + world.rank * A)
        self._grad_scale.copy_((self.optimizer.loss_scale / (micro_batches * B * T)).float())  # MPS knows no float64
        self._loss.zero_()
        for i, micro_batch in enumerate(batch):
            self._tokens.copy_(micro_batch, non_blocking=True)
            self._micro_step(gathers=i == 0 and self.exchange.sharded, reduces=i == A - 1 and not world.alone)()
        report[LOSS] = (self._loss / (A * world.size)).to(report.device)
        report[STOP].fill_(float(stop))  # an assignment would wait
        report[SAVE].fill_(float(save))
        self.whole = not self.graphs.active  # a replay does not say where it broke off
        self._update()
        self.whole = True
        self.exchange.stale = self.exchange.sharded
        self._figures = report.clone()  # the next step writes over the report
        return StepResult(self._figures[LOSS], self._figures[GRAD_NORM])

    def _micro_step(self, gathers: bool, reduces: bool) -> Callable[[], None]:
        """The piece that also gathers the parameters first, or reduces the gradient at last."""
        if (gathers, reduces) not in self._pieces:
            which = "the " + ", ".join(["first"] * gathers + ["last"] * reduces) + " " * (gathers or reduces)
            work = partial(self._accumulate, gathers, reduces)
            self._pieces[gathers, reduces] = self.graphs.replayed(f"{which}micro-step", work)
        return self._pieces[gathers, reduces]

    def _accumulate(self, gathers: bool, reduces: bool) -> None:
        """Forward and backward of the micro-batch in place, added to the flat gradient and to the loss."""
        exchange, model = self.exchange, self.model
        if gathers:
            exchange.gather()
            exchange.wait_for(EMBEDDINGS)
        if reduces:
            exchange.begin()
        if getattr(model, "_compiled_call_impl", None):  # one piece, which stops nowhere
            exchange.wait_for(len(model.blocks))
        elif gathers or reduces:
            model.at_block = partial(self._at_block, reduces)
        tokens = self._tokens.to(torch.int64).to(self.device)
        idx, targets = tokens[:, :-1], tokens[:, 1:]
        with span(FORWARD):
            doc_ids = None if self.eot is None else document_ids(idx, self.eot)
            loss, nll = model(idx, targets, self._grad_scale, self.counter, doc_ids)
        model.at_block = None
        with span(BACKWARD):
            loss.backward()
        if reduces:
            with span(ALL_REDUCE):
                exchange.finish()
        self._loss += nll.mean()
        self.counter += 1

    def _at_block(self, reduces: bool, block: int, y: Tensor) -> None:
        """Before a block, or the head, of input y: whose gradient is there when the backward pass has left it."""
        self.exchange.wait_for(block)
        if reduces:
            y.register_hook(lambda _: self.exchange.reduce_from(block))

    def _apply(self) -> None:
        """Guards, clipping and AdamW, on what the micro-steps have left."""
        report, optimizer, exchange, norm = self._report, self.optimizer, self.exchange, None
        if not self.world.alone:
            report[GRAD_NORM].copy_(exchange.squares(optimizer.ops))
            self.world.all_reduce_(report[SHARED])
            norm = partial(exchange.norm, report[GRAD_NORM], optimizer.ops)
        self.whole, loss = False, report[LOSS]
        report[GRAD_NORM] = optimizer.step(self.guard.refuses(loss), norm)
        refused = optimizer.bad_steps > 0
        self.guard.add(loss, refused)
        for slot, value in ((REFUSED, refused), (BAD_STEPS, optimizer.bad_steps), (LOSS_SCALE, optimizer.loss_scale)):
            report[slot].copy_(value)
