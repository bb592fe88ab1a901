"""Registration of ops with PyTorch, so that torch.compile sees each as one node.

A Python function on tensors becomes `OPS.NAME`, in torch.ops: one dispatcher entry for CPU (the interpreter) and CUDA,
and the same function as its own fake implementation, since `launch` launches nothing on tensors without data. So shapes
and contracts exist once. Derivatives are autograd.Functions over these ops, their backward marked `once`.
(torch.library.custom_op and triton_op cost twice as much a call, and break under the interpreter: measured.)
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import __version__


def namespace_of(package: str, version: str) -> str:
    """Where in torch.ops the ops are of a copy of this package imported as `package`: that name, with the version if it
    has none. Two copies in a process have two names, so both register: torch lets a namespace be defined once."""
    name, version = package.replace(".", "_"), version.replace(".", "_")
    return name if version in name else f"{name}_{version}"


NAMESPACE = namespace_of(__package__ or "", __version__)
OPS = getattr(torch.ops, NAMESPACE)
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
FUNCTIONS: dict[str, Callable[..., Any]] = {}  # by qualified name: what sees an op's inside calls them


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: torch.autocast changes nothing inside, where dtypes are those of the operands."""

    @functools.wraps(function)
    def plainly(*args: Any, **kwargs: Any) -> Any:
        if not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")):
            return function(*args, **kwargs)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return plainly


def below_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: torch's own ops inside are not differentiated, whoever calls: an exported program calls registered ops
    with gradients on, not from within an autograd.Function, where they are off."""

    @functools.wraps(function)
    def below(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return function(*args, **kwargs)

    return below


def register(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: define `schema` ("name(Tensor x, ...) -> Tensor") and implement it by the function below it.

    Mutated arguments carry their alias annotation, "Tensor(a!) main_grad"; outputs never alias inputs.
    """

    def implement(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(", 1)[0]
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, without_autocast(below_autograd(function)), key)
        FUNCTIONS[f"{NAMESPACE}::{name}"] = function
        torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=LIBRARY)
        return getattr(OPS, name).default

    return implement


def differentiating(op: str, *operands: Tensor | None) -> bool:
    """Whether autograd will want the gradient of an op on these: otherwise nothing is saved for it."""
    refuse_tangents(op, *operands)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)


def refuse_tangents(op: str, *operands: Tensor | None) -> None:
    """RuntimeError for an operand with a tangent (forward-mode AD), which torch drops silently without gradients."""
    if forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in operands):
        raise RuntimeError(f"{op}: the Triton ops have no forward-mode derivative; use nanogpt_kernels.reference")


def number(value: float) -> float:
    """A number on its way into an autograd.Function: torch.compile(dynamic=True) of torch 2.13 fails on a global or a
    module's that reaches two of them ("lift_tracked_freevar_to_input"), but not on what was computed of it."""
    return value * 1.0 if torch.compiler.is_compiling() else value


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of an autograd.Function's backward that has no derivative: differentiating twice is refused.

    torch's once_differentiable lets create_graph=True through, and the second derivative is silently missing.
    """

    @functools.wraps(backward)
    def refuse_twice(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{backward.__qualname__}: the Triton ops have no second derivative (create_graph=True asked for one); "
                "use nanogpt_kernels.reference"
            )
        return without_autocast(backward)(ctx, *grads)

    return refuse_twice
