"""Flat parameters and AdamW over them.

Every parameter is a view into one flat buffer, so that the gradient norm, the update and zeroing are each one pass over
one tensor, and a collective moves a whole run of it.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanogpt_fast.distributed import World
from nanogpt_fast.ops import GRAD_NORM, LOSS_SCALE, LR, MAX_NORM, STEP, Ops, exact_device
from nanogpt_fast.run import ranges
from nanogpt_fast.settings.config import OptimConfig

ALIGNMENT = 128  # elements: 256 bytes of the narrowest dtype
BUCKET = 25.0  # MB of float32 gradient at least, as torch's DistributedDataParallel (bucket_cap_mb)
EMBEDDINGS = -1  # a bucket's `first` where it holds the embeddings


@dataclass(frozen=True)
class Bucket:
    """A run of the flat buffers that one collective moves: the embeddings, the matrices of whole blocks, or a head of
    its own."""

    start: int
    end: int
    first: int  # its lowest block; the head's is the number of blocks

    def share(self, rank: int, ranks: int) -> slice:
        """The part of it that one of so many ranks updates."""
        size = (self.end - self.start) // ranks
        return slice(self.start + rank * size, self.start + (rank + 1) * size)


@dataclass(frozen=True)
class Piece:
    """Elements whose master and moments this rank holds: where they are in the flat buffers, and in what it holds."""

    flat: slice
    held: slice


class FlatParameters:
    """The buffers behind a model's parameters, all of one layout: embeddings, block 0, 1, ..., a head of its own, then
    all vectors.

    master, grad: float32. params: the compute dtype; the same tensor as master when that is float32. Parameters of two
    and more dimensions are views of params, one-dimensional ones of master. Each carries `main_grad`, its view of
    grad; float32 ones have it as .grad too, so plain autograd accumulates into the same memory.

    Every rank of world begins with rank 0's values. sharded: of several ranks each holds in master only its share of
    every bucket, and the vectors, which are few; params and grad stay whole. frozen: for evaluations alone each holds
    in master the vectors, and no gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        world: World | None = None,
        *,
        sharded: bool = False,
        frozen: bool = False,
        bucket_mb: float = BUCKET,
    ):
        world, named = world or World(), dict(model.named_parameters())
        self.sharded = sharded and not world.alone and not frozen
        self.shapes = {name: parameter.shape for name, parameter in named.items()}
        self.slices, self.buckets = _layout(self.shapes, ALIGNMENT * world.size, bucket_mb * 1e6 / 4)
        start = self.buckets[-1].end
        self.vectors = slice(start, max([start, *(_up(end, ALIGNMENT) for _, end in self.slices.values())]))
        held = [slice(0, self.vectors.stop)]
        if self.sharded:
            held = [*(bucket.share(world.rank, world.size) for bucket in self.buckets), self.vectors]
        elif frozen:
            held = [self.vectors]
        self.pieces = _held(held)
        if frozen:
            self.params = self._filled(named, 0, dtype, device, world)
            self.master = self._filled(named, self.vectors.start, torch.float32, device, world)
        else:
            self.master = self._filled(named, 0, torch.float32, device, world)
            self.params = self.master if dtype == torch.float32 else self.master.to(dtype)
        if self.sharded:
            self.master = torch.cat([self.master[piece.flat] for piece in self.pieces])
        size = 0 if frozen else self.vectors.stop
        self.grad = torch.zeros(size, dtype=torch.float32, device=device)  # once that room is free
        moved = self.pieces[-1].held.stop - self.vectors.stop
        for name, parameter in named.items():
            (start, end), shape = self.slices[name], parameter.shape
            vector = parameter.dim() <= 1
            parameter.data = (self.master[start + moved : end + moved] if vector else self.params[start:end]).view(
                shape
            )
            if not frozen:
                parameter.main_grad = main_grad = self.view(self.grad, name)  # type: ignore[attr-defined]
                parameter.grad = main_grad if parameter.dtype == torch.float32 else None

    def _filled(
        self, named: dict[str, nn.Parameter], first: int, dtype: torch.dtype, device: torch.device, world: World
    ) -> Tensor:
        """A flat buffer from element `first` on, with rank 0's values of the parameters that are there."""
        buffer = torch.zeros(self.vectors.stop - first, dtype=dtype, device=device)
        for name, parameter in named.items():
            start, end = self.slices[name]
            if start >= first:
                buffer[start - first : end - first].view(parameter.shape).copy_(parameter.data)
        world.broadcast_(buffer)
        return buffer

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """The part of a whole flat buffer that belongs to a parameter, in its shape."""
        start, end = self.slices[name]
        return buffer[start:end].view(self.shapes[name])

    def named(self, buffer: Tensor) -> dict[str, Tensor]:
        """{name: view} of a whole flat buffer."""
        return {name: self.view(buffer, name) for name in self.slices}

    def put(self, held: Tensor, name: str, value: Tensor) -> None:
        """Copy what this rank holds of a parameter's value, [shape], into a buffer laid out as master."""
        value = value.reshape(-1)
        for start, run in self._runs_of(held, name):
            run.copy_(value[start : start + len(run)])

    def runs(self, held: Tensor, vectors: bool = True) -> Iterator[tuple[str, int, Tensor]]:
        """(parameter, its first element, the elements from there on that this rank holds) of a buffer laid out as
        master; vectors: whether those too, which every rank holds."""
        for name, (start, _) in self.slices.items():
            if vectors or start < self.vectors.start:
                for first, run in self._runs_of(held, name):
                    yield name, first, run

    def _runs_of(self, held: Tensor, name: str) -> Iterator[tuple[int, Tensor]]:
        start, end = self.slices[name]
        for piece in self.pieces:
            low, high = max(start, piece.flat.start), min(end, piece.flat.stop)
            if low < high:
                at = piece.held.start + low - piece.flat.start
                yield low - start, held[at : at + high - low]

    def decay_segments(self, weight_decay: float) -> list[tuple[int, int, float]]:
        """(start, end, decay) runs covering the buffers; matrices and embeddings decay, vectors do not."""
        start, end = self.vectors.start, self.vectors.stop
        return [(0, start, weight_decay), (start, end, 0.0)] if weight_decay else [(0, end, 0.0)]


def _held(spans: list[slice]) -> list[Piece]:
    """These parts of the flat buffers, held one behind the other."""
    ends = list(itertools.accumulate(span.stop - span.start for span in spans))
    return [Piece(span, slice(start, end)) for span, start, end in zip(spans, [0, *ends], ends)]


def _up(count: int, unit: int) -> int:
    return math.ceil(count / unit) * unit


def joined_blocks(sizes: Sequence[int], least: float) -> list[range]:
    """The blocks, of so many elements, that are reduced together, in the order of the backward pass: joined from the
    last one down to `least` elements and more, but for what is left over at the first."""
    found, high = [], len(sizes)
    for low in reversed(range(len(sizes))):
        if sum(sizes[low:high]) >= least or low == 0:
            found.append(range(low, high))
            high = low
    return found


def _layout(shapes: dict[str, torch.Size], unit: int, bucket: float) -> tuple[dict[str, tuple[int, int]], list[Bucket]]:
    """({name: (start, end)} in the order of shapes, the buckets in that of the buffers).

    A bucket has `bucket` elements and more, and is a multiple of `unit` long. Vectors are in none.
    """
    places: dict[int, list[str]] = {EMBEDDINGS: []}
    head = [name for name in shapes if name.startswith("lm_head.")]
    for name, shape in shapes.items():
        if len(shape) > 1 and name not in head:
            block = re.search(r"\bh\.(\d+)\.", name)
            places.setdefault(int(block[1]) if block else EMBEDDINGS, []).append(name)
    sizes = [sum(shapes[name].numel() for name in places[block]) for block in range(len(places) - 1)]
    groups = [[EMBEDDINGS], *reversed(joined_blocks(sizes, bucket))]
    if head:
        places[len(sizes)] = head
        groups.append([len(sizes)])
    slices: dict[str, tuple[int, int]] = {}
    buckets: list[Bucket] = []
    end = 0

    def add(name: str) -> int:
        start = _up(end, ALIGNMENT)
        slices[name] = start, start + shapes[name].numel()
        return slices[name][1]

    for group in groups:
        start = end
        for place in group:
            for name in places[place]:
                end = add(name)
        end = start + _up(end - start, unit)
        buckets.append(Bucket(start, end, group[0]))
    for name, shape in shapes.items():
        if len(shape) <= 1:
            end = add(name)
    return {name: slices[name] for name in shapes}, buckets


class AdamW:
    """AdamW with global-norm clipping and, for float16, a dynamic loss scale; its state lies on the device, numbers
    on exact_device of it. Of a sharded flat.master it holds, and updates, as much.

    Loss scale: starts at 2^16, doubles after 2000 applied updates in a row, halves when a gradient is not finite
    (torch.amp.GradScaler's rule).
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, flat: FlatParameters, config: OptimConfig, ops: Ops, scale_loss: bool = False):
        self.flat, self.ops, self.config, self.scale_loss = flat, ops, config, scale_loss
        self.m, self.v = torch.zeros_like(flat.master), torch.zeros_like(flat.master)
        self.segments = [_within(flat.decay_segments(config.weight_decay), piece.flat) for piece in flat.pieces]
        exact = exact_device(flat.grad.device)
        self.scalars = torch.zeros(5, dtype=torch.float64, device=exact)
        self.scalars[MAX_NORM] = config.grad_clip
        self.scalars[LOSS_SCALE] = 65536.0 if scale_loss else 1.0
        self.good_steps = torch.zeros((), dtype=torch.int64, device=exact)  # applied, since the scale grew
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=exact)  # refused, in a row

    @property
    def loss_scale(self) -> Tensor:
        return self.scalars[LOSS_SCALE]

    def step(self, refused: Tensor | None = None, norm: Callable[[], Tensor] | None = None) -> Tensor:
        """Clip, update, zero the gradient. Returns the norm before clipping; where that is not finite, or `refused`
        (bool []) says so, nothing was updated. Nothing here waits for the device, or varies but by what lies on it.
        norm: gives the gradient's, of all ranks, where flat.grad is not all of it."""
        flat, scalars = self.flat, self.scalars
        with ranges.span(ranges.GRAD_NORM):
            scaled = (norm() if norm else self.ops.grad_norm(flat.grad)).to(scalars.device).double()
            norm_before = scaled / scalars[LOSS_SCALE]
            overflow = ~torch.isfinite(norm_before)
            refused = overflow if refused is None else overflow | refused
            scalars[GRAD_NORM].copy_(scaled.masked_fill(refused, math.nan))
        with ranges.span(ranges.UPDATE):
            self._update()
            flat.grad.zero_()
            self.bad_steps.add_(1).masked_fill_(~refused, 0)
            if self.scale_loss:
                self._update_loss_scale(overflow)
        return norm_before

    def _update(self) -> None:
        """adamw_ of each piece that is held, as one update."""
        flat, scalars = self.flat, self.scalars
        step = scalars[STEP].clone() if len(flat.pieces) > 1 else None
        for piece, segments in zip(flat.pieces, self.segments):
            if step is not None:
                scalars[STEP].copy_(step)  # each call counts one
            params = None if flat.params is flat.master else flat.params[piece.flat]
            state = (held[piece.held] for held in (flat.master, self.m, self.v))
            betas = self.config.beta1, self.config.beta2
            self.ops.adamw_(params, *state, flat.grad[piece.flat], scalars, segments, *betas)

    def set_lr(self, lr: float) -> None:
        self.scalars[LR].fill_(lr)  # an assignment would copy from the host, and wait for the GPU

    def _update_loss_scale(self, overflow: Tensor) -> None:
        self.good_steps.add_(1).masked_fill_(overflow, 0)
        grow = self.good_steps == self.GROWTH_INTERVAL
        self.scalars[LOSS_SCALE].mul_(1.0 + grow.double() - 0.5 * overflow.double())
        self.good_steps.masked_fill_(grow, 0)

    def state_dict(
        self, m: Tensor | None = None, v: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(tensors `exp_avg.NAME` and `exp_avg_sq.NAME` as views, JSON numbers). m, v: whole flat buffers, in the place
        of this optimizer's."""
        tensors = {f"exp_avg.{name}": t for name, t in self.flat.named(self.m if m is None else m).items()}
        tensors |= {f"exp_avg_sq.{name}": t for name, t in self.flat.named(self.v if v is None else v).items()}
        return tensors, self.numbers()

    def numbers(self) -> dict[str, float]:
        """The state beside the moments, as JSON."""
        found: dict[str, float] = {"optimizer_step": int(self.scalars[STEP])}
        if self.scale_loss:
            found |= {"good_steps": int(self.good_steps), "loss_scale": float(self.loss_scale)}
        return found

    def load_state_dict(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """The inverse of state_dict."""
        for name in self.flat.slices:
            self.load_moments(name, tensors[f"exp_avg.{name}"], tensors[f"exp_avg_sq.{name}"])
        self.load_numbers(numbers)

    def load_moments(self, name: str, m: Tensor, v: Tensor) -> None:
        """Take what this rank holds of a parameter's moments."""
        self.flat.put(self.m, name, m)
        self.flat.put(self.v, name, v)

    def load_numbers(self, numbers: dict[str, float]) -> None:
        """The inverse of numbers(); a loss scale is taken only where this run scales its loss."""
        self.scalars[STEP] = numbers["optimizer_step"]
        if self.scale_loss:
            self.scalars[LOSS_SCALE] = numbers.get("loss_scale", 65536.0)
            self.good_steps.fill_(int(numbers.get("good_steps", 0)))


def _within(segments: list[tuple[int, int, float]], span: slice) -> list[tuple[int, int, float]]:
    """The segments' parts in the span, counted from its start."""
    cut = [(max(a, span.start) - span.start, min(b, span.stop) - span.start, decay) for a, b, decay in segments]
    return [(a, b, decay) for a, b, decay in cut if a < b]
