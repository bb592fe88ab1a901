"""One optimisation step: forward and backward over the micro-batches, all-reduce, clip, AdamW."""

from typing import NamedTuple

import torch
from torch import Tensor

from nanogpt_fast.distributed import World
from nanogpt_fast.model import GPT, document_ids
from nanogpt_fast.ops import exact_device
from nanogpt_fast.optim import AdamW
from nanogpt_fast.run.ranges import ALL_REDUCE, BACKWARD, FORWARD, STEP, span
from nanogpt_fast.schedule import BatchSchedule


class StepResult(NamedTuple):
    """What a step leaves on the device; reading a value synchronises."""

    loss: Tensor  # mean negative log-likelihood of this rank's micro-batches, nats a token
    grad_norm: Tensor  # global norm before clipping; non-finite when the update was not applied


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
    ):
        self.model, self.optimizer, self.world, self.batches, self.eot = model, optimizer, world, batches, eot
        self.base = (seed % 2**31) << 32
        self.device = optimizer.m.device
        self.counter = torch.zeros(1, dtype=torch.int64, device=exact_device(self.device))

    def __call__(self, batch: Tensor, iteration: int) -> StepResult:
        with span(STEP):
            return self._step(batch, iteration)

    def _step(self, batch: Tensor, iteration: int) -> StepResult:
        A, B, T = batch.size(0), batch.size(1), batch.size(2) - 1
        world, optimizer, model = self.world, self.optimizer, self.model
        micro_batches = A * world.size
        before = self.batches.micro_batches_before(iteration) if self.batches else iteration * micro_batches
        self.counter.fill_(self.base + before + world.rank * A)
        tokens = batch.to(self.counter.device, non_blocking=True).to(torch.int64).to(self.device)
        grad_scale = (optimizer.loss_scale / (micro_batches * B * T)).float().to(self.device)
        total = torch.zeros((), device=self.device)
        for micro in tokens:
            with span(FORWARD):
                idx, targets = micro[:, :-1], micro[:, 1:]
                doc_ids = None if self.eot is None else document_ids(idx, self.eot)
                loss, nll = model(idx, targets, grad_scale, self.counter, doc_ids)
            with span(BACKWARD):
                loss.backward()
            total += nll.mean()
            self.counter += 1
        with span(ALL_REDUCE):
            world.all_reduce_(optimizer.flat.grad)
        return StepResult(total / A, optimizer.step())
