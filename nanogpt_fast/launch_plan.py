"""Which launch rows a training run reaches, through which calls of its ops: seen on tensors without data.

A row is kept for one architecture, element size and size (launch.Key); what reaches it is a call of a public op, at the
run's rows, widths and dtype. The update is as wide as the model has parameters, so it is seen at the run's depth; all
else at one block.
"""

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanogpt_fast.ops import OP_NAMES, REFERENCE, Ops, rows_asked
from nanogpt_fast.proof import ROWS, Block, Held, Setup, built, rehearse

BY_PARAMETERS = ("grad_norm", "adamw")  # launch ops whose size is the model's number of parameters
META = torch.device("meta")


class Notes:
    """Ops that note each call, and go on with `ours`. calls: {what it is known by: the call, the first of its kind};
    counts: how many of its kind there were."""

    def __init__(self, ours: Ops):
        self.ours, self.differentiate = ours, True
        self.calls: dict[str, Held] = {}
        self.counts: dict[str, int] = {}

    @property
    def ops(self) -> Ops:
        return Ops(**{name: partial(self._called, name) for name in OP_NAMES})

    def _called(self, name: str, *args: Any, **kwargs: Any) -> Any:
        known_by = name_of(name, args, kwargs)
        self.calls.setdefault(known_by, Held(name, args, kwargs, self.differentiate))
        self.counts[known_by] = self.counts.get(known_by, 0) + 1
        return getattr(self.ours, name)(*args, **kwargs)

    def block(self, setup: Setup, device: torch.device, rows: int, n_layer: int = 1) -> None:
        """The forward pass of a micro-batch of so many rows; Held differentiates each call by itself."""
        block = Block.of(setup, self.ops, device, rows, n_layer)
        with torch.no_grad():
            block.forward()

    def update(self, setup: Setup, device: torch.device) -> None:
        """The update of the whole model, of made-up parameters and gradients."""
        model, optimizer = built(setup, self.ops, device, None, setup.shape.n_layer)
        flat, made_up = optimizer.flat, device.type != "meta"
        generator = torch.Generator(device).manual_seed(1) if made_up else None
        if made_up:
            flat.master.normal_(0.0, 0.02, generator=generator)
            flat.params.copy_(flat.master)
            flat.grad.normal_(generator=generator)
        self.differentiate = False
        optimizer.set_lr(1e-3)
        with torch.no_grad():
            optimizer.step()
        if made_up:
            flat.grad.normal_(generator=generator)  # the step has cleared it, and it is the calls' own


def name_of(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What a call is known by, whatever its tensors hold or lie on; a dropout's site is no difference."""
    names = inspect.signature(getattr(REFERENCE, op)).parameters

    def described(x: Any) -> Any:
        return (tuple(x.shape), str(x.dtype), hasattr(x, "main_grad")) if isinstance(x, Tensor) else x

    given = {name: described(x) for name, x in (dict(zip(names, args)) | kwargs).items() if name != "site"}
    return f"{op} {hashlib.sha256(repr(sorted(given.items())).encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Case:
    """A call of an op as a run makes it. calls: of its kind in an iteration; forward, backward: {launch.Key: row} that
    each way asks for, backward without what forward has asked for."""

    known_by: str
    op: str
    calls: int
    forward: Mapping[Any, Any]
    backward: Mapping[Any, Any]
    held: Held = field(repr=False, compare=False)  # on "meta"

    @property
    def keys(self) -> set[Any]:
        return {*self.forward, *self.backward}


def cases_of(setup: Setup, ours: Ops, capability: int, micro_batches: int = 1) -> list[Case]:
    """What an iteration of so many micro-batches calls of `ours`: the step, and the update at the run's depth."""
    step, update = Notes(ours), Notes(ours)
    step.block(setup, META, setup.rows, setup.shape.n_layer)
    update.update(setup, META)
    found: list[Case] = []
    for count, notes in ((micro_batches, step), (1, update)):
        for known_by, held in notes.calls.items():
            op = getattr(ours, held.name)
            whole = rows_asked(partial(held.results, op), capability)
            forward = rows_asked(partial(held.results, op, backward=False), capability)
            backward = {key: row for key, row in whole.items() if key not in forward}
            found.append(Case(known_by, held.name, count * notes.counts[known_by], forward, backward, held))
    return found


def proven(setup: Setup) -> Setup:
    """What is held to float64 in its place: fewer rows, one block."""
    return replace(setup, shape=replace(setup.shape, n_layer=1), rows=min(setup.rows, ROWS))


def as_proven(rows: Mapping[Any, Any], asked: Iterable[Any]) -> dict[Any, Any]:
    """The rows, and those of the update also for the fewer parameters whose update is proven: asked are its keys."""
    same = [(key, small) for key in rows for small in asked if key.op in BY_PARAMETERS and small[:3] == key[:3]]
    return {**rows, **{small: rows[key] for key, small in same}}


def reached(setup: Setup, ours: Ops, capability: int) -> set[Any]:
    """The keys that a run of this setup asks for, its evaluations and a token's step too."""
    rehearsed = rows_asked(partial(rehearse, setup, ours), capability)
    updated = rows_asked(partial(Notes(ours).update, setup, META), capability)
    return {*updated, *(key for key in rehearsed if key.op not in BY_PARAMETERS)}
