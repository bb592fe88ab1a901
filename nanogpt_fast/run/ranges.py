"""Named ranges for profilers: which part of a run, and which layer's op, a piece of time belongs to.

    with span("forward"):
        ...

Unless `on(...)` is in force nothing is opened, and a span costs one comparison and an empty context. What it opens is
on()'s argument: torch.profiler's record_function, or an NVTX range for Nsight Systems. on(..., model) also puts a range
around each op that the model calls, named by its layer (h3.mlp), by swapping the model's ops meanwhile; a compiled
model keeps its ops, for another set would compile it anew.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch.autograd.profiler import record_function

from nanogpt_fast.errors import ConfigError

T = TypeVar("T")
Opener = Callable[[str], AbstractContextManager[Any]]

# The names that the trainer gives, which run/step_parts.py reads; an op's are h3.mlp, or embedding where no layer is.
WINDOW, ITERATION, DATA, STEP, FORWARD, BACKWARD = "window", "iteration", "data", "step", "forward", "backward"
ALL_REDUCE, GRAD_NORM, UPDATE = "all-reduce", "gradient norm", "update"
EVALUATION, CHECKPOINT, LOG = "evaluation", "checkpoint", "log"
OUTSIDE_LAYERS = ("embedding", "linear_cross_entropy", "grad_norm", "adamw_")


class _Nothing:
    """A context manager that does nothing, and the only one that exists while ranges are off."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        return None


_NOTHING = _Nothing()
_opener: Opener | None = None


def span(name: str) -> AbstractContextManager[Any]:
    """A range called `name` around the block; nothing while ranges are off."""
    return _NOTHING if _opener is None else _opener(name)


@contextmanager
def on(opener: Opener = record_function, model: Any = None) -> Iterator[None]:
    """Spans open `opener(name)` meanwhile; with a model, its ops get ranges too (not those of a compiled one)."""
    global _opener
    before = _opener
    plain = [] if model is None or getattr(model, "_compiled_call_impl", None) else [model]
    ops = [model.ops for model in plain]
    for model in plain:
        model.ops = named(model.ops)
    _opener = opener
    try:
        yield
    finally:
        _opener = before
        for model, own in zip(plain, ops):
            model.ops = own


def named(ops: T) -> T:
    """A dataclass of ops, each in a range named by its layer: that of the newest `site` which an op was called with
    (model.py: 0 for the embedding, 1 + 3i and on for block i), since not every op takes one."""
    layer = ""

    def ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(function).parameters)
        at = parameters.index("site") if "site" in parameters else len(parameters)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal layer
            site = kwargs.get("site", args[at] if at < len(args) else None)
            if site is not None:
                layer = f"h{(site - 1) // 3}." if site else ""
            with span(name if name in OUTSIDE_LAYERS else layer + name):
                return function(*args, **kwargs)

        return call

    fields = dataclasses.fields(ops)  # type: ignore[arg-type]
    return dataclasses.replace(ops, **{f.name: ranged(f.name, getattr(ops, f.name)) for f in fields})  # type: ignore[type-var]


def nvtx_opener() -> Opener:
    """What opens NVTX ranges: torch's own binding where there is CUDA, else the package nvtx. ConfigError without."""
    if torch.cuda.is_available():
        return torch.cuda.nvtx.range
    try:
        from nvtx import annotate
    except ImportError:
        raise ConfigError(
            "NVTX ranges need a CUDA build of torch with a GPU, or the package nvtx",
            where="--profiler=nsys",
            hint="pip install nvtx, or --profiler=torch",
        ) from None
    return annotate
