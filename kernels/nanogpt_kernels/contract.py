"""What an op demands of its operands, checked before anything is launched, and what it finds on them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LR, STEP, MAX_NORM, LOSS_SCALE, GRAD_NORM = range(5)  # slots of adamw_'s float64 [5] scalars, on exact_device

_checking_values = False


class ContractError(ValueError):
    """An op was given what it does not accept; the message names the op, the rule and every operand."""


def describe(operand: Any) -> str:
    """Shape, strides, dtype and device of a tensor, else its repr."""
    if not isinstance(operand, Tensor):
        return repr(operand)
    strides = "" if operand.is_contiguous() else f", strides {tuple(operand.stride())}"
    return f"{list(operand.shape)} {str(operand.dtype).removeprefix('torch.')} on {operand.device}{strides}"


def require(ok: bool, op: str, rule: str, **operands: Any) -> None:
    """Raise ContractError(op, rule, operands) unless ok."""
    if not ok:
        lines = [f"{op}: {rule}", *(f"  {name}: {describe(value)}" for name, value in operands.items())]
        raise ContractError("\n".join(lines))


def require_same_device(op: str, **operands: Tensor | None) -> None:
    devices = {t.device for t in operands.values() if t is not None}
    require(len(devices) <= 1, op, "operands lie on different devices", **operands)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def require_float(op: str, **operands: Tensor | None) -> None:
    """Every operand is float32, bfloat16 or float16."""
    for name, t in operands.items():
        if t is not None:
            require(t.dtype in FLOATS, op, f"{name} must be float32, bfloat16 or float16", **{name: t})


def require_one_dtype(op: str, **operands: Tensor) -> None:
    first, *rest = operands.values()
    if any(t.dtype != first.dtype for t in rest):
        *names, last = operands
        cast = f"torch.autocast casts nothing here: {last}.to({names[0]}.dtype)"
        require(False, op, f"{', '.join(names)} and {last} must have one dtype ({cast})", **operands)


def require_dropout(op: str, p: float, seed: Tensor | None) -> None:
    """p is a probability below 1; above 0 it needs a seed."""
    require(0.0 <= p < 1.0, op, "the dropout probability must be in [0, 1)", p=p)
    if p > 0.0:
        ok = seed is not None and seed.dtype == torch.int64 and seed.numel() == 1
        require(ok, op, "dropout needs a seed, one int64 on the device", p=p, seed=seed)


def require_addends(op: str, r: Tensor, delta: Tensor, delta_bias: Tensor | None) -> None:
    """delta can be added to the residual stream r without rounding it, and delta_bias to delta."""
    require_float(op, r=r, delta=delta, delta_bias=delta_bias)
    require(r.dim() > 0 and delta.shape == r.shape, op, "delta must have r's shape, [..., C]", r=r, delta=delta)
    ok = delta.dtype == r.dtype or r.dtype == torch.float32
    require(ok, op, "delta must have r's dtype, or r be float32", r=r, delta=delta)
    ok = delta_bias is None or delta_bias.shape == r.shape[-1:]
    require(ok, op, "delta_bias must be [C]", r=r, delta_bias=delta_bias)


def main_grad_of(w: Tensor) -> Tensor | None:
    """The float32 buffer that w's gradient is to be added to, if it has one."""
    return getattr(w, "main_grad", None)


_stood_for: str | None = None


@contextmanager
def stand_for(device_type: str) -> Iterator[None]:
    """Within it, tensors of device "meta" stand for ones of this device: ops take the path that they take there."""
    global _stood_for
    before, _stood_for = _stood_for, device_type
    try:
        yield
    finally:
        _stood_for = before


def device_type_of(t: Tensor) -> str:
    """ "cpu", "cuda", ...: of t, or of what it stands for."""
    return _stood_for if _stood_for and t.is_meta else t.device.type


@contextmanager
def checked() -> Iterator[None]:
    """Within it, ops also check values (ids, targets and positions on the device in range, incoming gradients of 1),
    waiting for the device.

    Outside it an id or target out of range reads nothing and gives NaN, so that it is noticed; a position on the device
    gives NaN, and nothing is written there.
    """
    global _checking_values
    before, _checking_values = _checking_values, True
    try:
        yield
    finally:
        _checking_values = before


def checking_values() -> bool:
    return _checking_values


def position_args(start: int | Tensor) -> tuple[int, Tensor | None]:
    """A first position as registered ops and kernels take it: (start, None), or (0, the int64 [1] that holds it)."""
    return (0, start) if isinstance(start, Tensor) else (start, None)


def require_position(op: str, rule: str, start: int, start_at: Tensor | None, last: int, **operands: Any) -> None:
    """0 <= start <= last. What start_at holds is seen in checked mode only."""
    require(0 <= start <= last, op, rule, start=start, **operands)
    if start_at is not None:
        ok = start_at.dtype == torch.int64 and start_at.numel() == 1
        require(ok, op, "start must be an int, or one int64 on the device", start=start_at)
        require_in_range(op, "start", start_at, last + 1)


def require_in_range(op: str, name: str, ids: Tensor, end: int, *, ignore: int | None = None) -> None:
    """In checked mode: every id is in [0, end), or `ignore`."""
    if not _checking_values or ids.device.type == "meta" or ids.numel() == 0:
        return
    wrong = (ids < 0) | (ids >= end)
    if ignore is not None:
        wrong &= ids != ignore
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise ContractError(f"{op}: {name} must be in [0, {end}), but {name}{list(at)} is {int(ids[at])}")
