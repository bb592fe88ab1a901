"""The ops a model is built from, as an argument: GPT(config, ops=REFERENCE). There is no global switch."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanogpt_kernels import reference
from nanogpt_kernels.reference import GRAD_NORM, LOSS_SCALE, LR, MAX_NORM, STEP  # slots of adamw_'s scalars

from nanogpt_fast.errors import ConfigError, did_you_mean

__all__ = ["GRAD_NORM", "LOSS_SCALE", "LR", "MAX_NORM", "OP_NAMES", "REFERENCE", "STEP", "Op", "Ops", "select_ops"]

Op = Callable[..., Any]


@dataclass(frozen=True)
class Ops:
    """One function an op; nanogpt_kernels.reference holds the signatures and what each computes."""

    embedding: Op
    norm: Op
    add_norm: Op
    qkv_attention: Op
    cached_attention: Op
    linear: Op
    mlp: Op
    linear_cross_entropy: Op
    grad_norm: Op
    adamw_: Op


OP_NAMES = tuple(f.name for f in dataclasses.fields(Ops))
REFERENCE = Ops(**{name: getattr(reference, name) for name in OP_NAMES})


def select_ops(spec: str, device_type: str) -> Ops:
    """The ops named by --kernels: auto | reference."""
    if spec in ("auto", "reference"):
        return REFERENCE
    raise ConfigError(
        f"unknown kernels {spec!r}{did_you_mean(spec, ['auto', 'reference'])}",
        where=f"--kernels={spec}",
        expected="auto or reference",
        hint="--kernels=reference; the Triton ops are not in this version yet (ARCHITECTURE.md, Missing)",
    )
