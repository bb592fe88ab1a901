"""What ranks give one another in a step: gradients while the backward pass goes on, parameters while the next forward.

    ddp      every bucket of the gradient (optim.Bucket) is all-reduced; every rank updates everything
    zero1    every bucket is reduce-scattered; a rank updates its share of each, and what it has made of the parameters
             is all-gathered, in the compute dtype, in the order in which the next forward asks for them

On the wire a rank sends 2 (N - 1) / N of the gradient's bytes in ddp; in zero1 (N - 1) / N of them and of the
parameters'. A bucket starts when the backward pass has left its lowest block: that of a head of its own at once, the
embeddings' at last, and nothing hides it. Both reduce the same runs in the same order, and take the gradient's norm
from the same shares, so where a library's reduce-scatter has its all-reduce's bits (gloo's has) they train the same
parameters bit for bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nanogpt_fast.distributed import World
from nanogpt_fast.ops import Ops
from nanogpt_fast.optim import EMBEDDINGS, Bucket, FlatParameters

Wait = Callable[[], None]


class Exchange:
    """The collectives of one run's steps, over its flat buffers. Alone, each does nothing.

    reduce_dtype: what gradients are summed in on the way; parameters travel in their own dtype.
    """

    def __init__(self, flat: FlatParameters, world: World, reduce_dtype: torch.dtype = torch.float32):
        self.flat, self.world, self.reduce_dtype = flat, world, reduce_dtype
        self.sharded = flat.sharded
        self.stale = False  # whether other ranks' shares of params are still those of the step before
        self._arriving: list[tuple[Bucket, Wait]] = []  # gathers under way, in the forward's order
        self._due: list[Bucket] = []  # of which no reduction is under way yet, in the forward's order
        self._reducing: list[Wait] = []

    # ---- parameters ----

    def gather(self) -> None:
        """Start to gather the parameters; wait_for() waits."""
        if self.sharded:
            params, (rank, ranks) = self.flat.params, (self.world.rank, self.world.size)
            self._arriving = [
                (b, self.world.all_gather(params[b.start : b.end], params[b.share(rank, ranks)]))
                for b in self.flat.buckets
            ]

    def wait_for(self, block: int) -> None:
        """The parameters of a block, and of those below it, are there."""
        while self._arriving and self._arriving[0][0].first <= block:
            self._arriving.pop(0)[1]()

    def complete(self) -> None:
        """All parameters are there, for whoever reads them between steps: every rank has to ask."""
        if self.stale:
            self.gather()
            self.wait_for(len(self.flat.slices))
            self.stale = False

    # ---- gradients ----

    def begin(self) -> None:
        """A backward pass begins whose end leaves the step's whole gradient."""
        self._due = list(self.flat.buckets)

    def reduce_from(self, block: int) -> None:
        """Start to sum the gradients of the buckets whose blocks the backward pass has left, `block` being the last."""
        while self._due and self._due[-1].first >= block:
            self._reducing.append(self._reduce(self._due.pop()))

    def finish(self) -> None:
        """The rest of the gradient, and wait for all of it."""
        self.reduce_from(EMBEDDINGS)
        self._reducing.append(self.world.all_reduce(self.flat.grad[self.flat.vectors]))
        while self._reducing:
            self._reducing.pop(0)()

    def _reduce(self, bucket: Bucket) -> Wait:
        world, grad = self.world, self.flat.grad[bucket.start : bucket.end]
        share = bucket.share(world.rank, world.size)
        mine = slice(share.start - bucket.start, share.stop - bucket.start) if self.sharded else slice(None)
        sent = grad if self.reduce_dtype == grad.dtype else grad.to(self.reduce_dtype)
        wait = world.reduce_scatter(sent[mine], sent) if self.sharded else world.all_reduce(sent)
        if sent is grad:
            return wait

        def arrive() -> None:
            wait()
            grad[mine].copy_(sent[mine])

        return arrive

    def squares(self, ops: Ops) -> Tensor:
        """The sum of squares, float64 [], of this rank's share of every bucket."""
        norms = [ops.grad_norm(self.flat.grad[b.share(self.world.rank, self.world.size)]) for b in self.flat.buckets]
        return torch.stack(norms).double().square().sum()

    def norm(self, squares: Tensor, ops: Ops) -> Tensor:
        """The gradient's norm, float64 [], from the squares of all ranks."""
        return (squares + ops.grad_norm(self.flat.grad[self.flat.vectors]).double().square()).sqrt()

    # ---- state ----

    def whole(self, held: Tensor) -> Tensor:
        """A whole flat buffer on the host of what the ranks hold, master or moments, on rank 0; nothing on the others.
        Every rank has to ask. Where all is held, that."""
        if not self.sharded:
            return held
        flat, world = self.flat, self.world
        full = torch.zeros(len(flat.grad) if world.is_main else 0, dtype=held.dtype)
        for bucket, piece in zip(flat.buckets, flat.pieces):
            run = torch.empty(bucket.end - bucket.start, dtype=held.dtype, device=held.device)
            world.all_gather(run, held[piece.held])()
            if world.is_main:
                full[bucket.start : bucket.end] = run
        if world.is_main:
            full[flat.vectors] = held[flat.pieces[-1].held]
        return full
