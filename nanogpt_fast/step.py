"""One optimisation step: forward and backward over the micro-batches, all-reduce, clip, AdamW.

Two pieces of it take no arguments, the micro-step and the update; on CUDA each is replayed as a graph. All that varies
from one step to the next is written beforehand into tensors that stay: the micro-batch, the dropout counter, the
gradient's scale, the learning rate.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanogpt_fast.distributed import World
from nanogpt_fast.graphs import Graphs
from nanogpt_fast.guards import LossGuard
from nanogpt_fast.model import GPT, document_ids
from nanogpt_fast.ops import exact_device
from nanogpt_fast.optim import AdamW
from nanogpt_fast.run.ranges import ALL_REDUCE, BACKWARD, FORWARD, STEP, span
from nanogpt_fast.schedule import BatchSchedule

LOSS, STOP, GRAD_NORM, REFUSED, BAD_STEPS, LOSS_SCALE = range(6)  # slots of a step's report
SHARED = slice(LOSS, GRAD_NORM)  # those that are summed over the ranks


class StepResult(NamedTuple):
    """What a step leaves on the device; reading a value synchronises."""

    loss: Tensor  # mean negative log-likelihood of all ranks' micro-batches, nats a token
    grad_norm: Tensor  # global norm before clipping


class Report(NamedTuple):
    """A step's figures on the host."""

    loss: float
    stop: float  # ranks that asked to stop
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
    ):
        self.model, self.optimizer, self.world, self.batches, self.eot = model, optimizer, world, batches, eot
        self.base = (seed % 2**31) << 32
        self.device = optimizer.m.device
        exact = exact_device(self.device)
        self.guard = guard or LossGuard(0.0, 0, exact)
        self.graphs = graphs or Graphs(self.device)
        self._tokens = torch.empty(0, device=exact)  # the micro-batch [B, T + 1], in the batch's dtype
        self.counter = torch.zeros(1, dtype=torch.int64, device=exact)
        self._grad_scale = torch.zeros((), device=self.device)
        self._loss = torch.zeros((), device=self.device)  # summed over the micro-batches
        self._report = torch.zeros(len(Report._fields), dtype=torch.float64, device=exact)
        self._update = self.graphs.replayed("the update", self._apply)
        self.whole = True  # False while an update is under way: what an error leaves then is no step's state

    def __call__(self, batch: Tensor, iteration: int, stop: bool = False) -> StepResult:
        """Train on the batch; `stop` is this rank's vote, whose sum the report carries."""
        with span(STEP):
            return self._step(batch, iteration, stop)

    def read(self) -> Reading:
        """The newest step's figures, without waiting for them."""
        return Reading(self._figures)

    def _step(self, batch: Tensor, iteration: int, stop: bool) -> StepResult:
        A, B, T = batch.size(0), batch.size(1), batch.size(2) - 1
        world, report = self.world, self._report
        micro_batches = A * world.size
        if self._tokens.shape != batch.shape[1:] or self._tokens.dtype != batch.dtype:
            self._tokens = torch.empty(batch.shape[1:], dtype=batch.dtype, device=self.counter.device)
            self._micro_step = self.graphs.replayed("the micro-step", self._accumulate)
        before = self.batches.micro_batches_before(iteration) if self.batches else iteration * micro_batches
        self.counter.fill_(self.base + before + world.rank * A)
        self._grad_scale.copy_((self.optimizer.loss_scale / (micro_batches * B * T)).float())  # MPS knows no float64
        self._loss.zero_()
        for micro_batch in batch:
            self._tokens.copy_(micro_batch, non_blocking=True)
            self._micro_step()
        report[LOSS] = (self._loss / A).to(report.device)
        report[STOP].fill_(float(stop))  # an assignment would wait
        with span(ALL_REDUCE):
            world.all_reduce_(self.optimizer.flat.grad)
            world.all_reduce_(report[SHARED])
        report[LOSS] /= world.size
        self.whole = False
        self._update()
        self.whole = True
        self._figures = report.clone()  # the next step writes over the report
        return StepResult(self._figures[LOSS], self._figures[GRAD_NORM])

    def _accumulate(self) -> None:
        """Forward and backward of the micro-batch in place, added to the flat gradient and to the loss."""
        tokens = self._tokens.to(torch.int64).to(self.device)
        idx, targets = tokens[:, :-1], tokens[:, 1:]
        with span(FORWARD):
            doc_ids = None if self.eot is None else document_ids(idx, self.eot)
            loss, nll = self.model(idx, targets, self._grad_scale, self.counter, doc_ids)
        with span(BACKWARD):
            loss.backward()
        self._loss += nll.mean()
        self.counter += 1

    def _apply(self) -> None:
        """Guards, clipping and AdamW, on what the micro-steps have left."""
        report, optimizer, loss = self._report, self.optimizer, self._report[LOSS]
        report[GRAD_NORM] = optimizer.step(self.guard.refuses(loss))
        refused = optimizer.bad_steps > 0
        self.guard.add(loss, refused)
        for slot, value in ((REFUSED, refused), (BAD_STEPS, optimizer.bad_steps), (LOSS_SCALE, optimizer.loss_scale)):
            report[slot].copy_(value)
