"""What an op demands of its operands, checked before anything is launched."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

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


@contextmanager
def checked() -> Iterator[None]:
    """Within it, ops also check values (ids and targets in range, incoming gradients of 1), waiting for the device.

    Outside it an id or target out of range reads nothing and gives NaN, so that it cannot pass unseen.
    """
    global _checking_values
    before, _checking_values = _checking_values, True
    try:
        yield
    finally:
        _checking_values = before


def checking_values() -> bool:
    return _checking_values


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
