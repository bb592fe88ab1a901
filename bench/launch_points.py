"""Launch rows as points of a search: their axes, their neighbours, and a row as launch_rows.py has it."""

import datetime
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import machine  # noqa: F401  (first: it makes the packages importable)
import torch

from nanogpt_fast.errors import ConfigError

# Axes wider than the neighbours of the present value, for launch ops where a far value may win: {op: {axis: values}}.
# An axis is a block's name, a choice's name, num_warps, num_stages or max_registers.
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "adamw": {"BLOCK": (512, 1024, 2048, 4096, 8192), "num_warps": (4, 8, 16)},
    "grad_norm": {"BLOCK": (1024, 2048, 4096, 8192), "programs_per_sm": (1, 2, 4, 8)},
    "norm_fwd": {"ROWS": (1, 2, 4), "num_warps": (1, 2, 4, 8), "programs_per_sm": (2, 4, 6, 8, 12, 16, 24)},
    "norm_bwd": {"ROWS": (1, 2, 4, 8), "num_warps": (2, 4, 8, 16), "programs_per_sm": (1, 2, 3, 4, 6)},
    "cross_entropy": {
        "BLOCK_V": (2048, 4096, 8192, 16384),
        "num_warps": (4, 8, 16, 32),
        "programs_per_sm": (1, 2, 3, 4, 6, 8),
        "chunk_rows": (4096, 8192, 16384, 32768, 65536),
    },
    "bias_gelu_fwd": {"BLOCK_M": (2, 4, 8, 16, 32), "BLOCK_N": (256, 512, 1024), "num_warps": (4, 8)},
    "bias_gelu_bwd": {
        "BLOCK_M": (1, 2, 4, 8, 16),
        "BLOCK_N": (256, 512, 1024),
        "num_warps": (4, 8),
        "programs_per_sm": (4, 6, 8, 12, 16, 1024),  # the last: one tile a program
    },
    "embedding_bwd": {"RUN": (16, 32, 64, 128, 256)},
    # of 128 registers an SM holds two sets of 8 warps, of 168 three of 4
    "attention_fwd": {"max_registers": (None, 128, 168)},
    "attention_bwd_dq": {"max_registers": (None, 128, 168)},
    "attention_bwd_dkdv": {"max_registers": (None, 128, 168)},
}
SHAPE = ("num_warps", "num_stages", "max_registers")  # a row's fields that are axes, beside its blocks and choices
CHANGES = 2  # axes that a candidate may change at once


def axes(launch_op: str, row: Any) -> dict[str, tuple[Any, ...]]:
    """{axis: values to try, the row's own among them}: half and double of a number, both of a switch, or GRIDS'."""
    found: dict[str, tuple[Any, ...]] = {name: _near(value) for name, value in (row.blocks | row.choices).items()}
    found["num_warps"] = tuple(w for w in _near(row.num_warps) if w <= 32)
    found["num_stages"] = tuple(s for s in range(row.num_stages - 1, row.num_stages + 2) if s >= 1)
    found["max_registers"] = (row.max_registers,)
    wide = GRIDS.get(launch_op, {})
    return {name: tuple(dict.fromkeys((*wide.get(name, ()), *values))) for name, values in found.items()}


def _near(value: Any) -> tuple[Any, ...]:
    if isinstance(value, bool):
        return (value, not value)
    return tuple(v for v in (value // 2, value, value * 2) if v >= 1) if isinstance(value, int) else (value,)


def point(row: Any) -> dict[str, Any]:
    """A row as {axis: value}."""
    return row.blocks | row.choices | {name: getattr(row, name) for name in SHAPE}


def moved(row: Any, changes: dict[str, Any]) -> Any:
    """The row with some axes changed. ConfigError for one that it has not."""
    for name in changes.keys() - point(row).keys():
        raise ConfigError(f"this launch row has no {name!r}", expected=", ".join(point(row)))
    blocks = row.blocks | {k: v for k, v in changes.items() if k in row.blocks}
    choices = row.choices | {k: v for k, v in changes.items() if k in row.choices}
    rest = {k: v for k, v in changes.items() if k in SHAPE}
    return replace(row, blocks=blocks, choices=choices, **rest)


def candidates(launch_op: str, centre: Any) -> Iterator[Any]:
    """Rows around the centre, nearest first: one axis changed, then two."""
    around = {name: [v for v in values if v != point(centre)[name]] for name, values in axes(launch_op, centre).items()}
    for count in range(1, CHANGES + 1):
        for names in itertools.combinations(around, count):
            for values in itertools.product(*(around[name] for name in names)):
                yield moved(centre, dict(zip(names, values)))


def shown(row: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in point(row).items())


def pasted(row: Any, target: Any, outcome: str) -> str:
    """As launch_rows.py has it, for this architecture and element size."""
    at = target.at
    what = f"{target.op} {target.mode}, B={at.shape.B} T={at.shape.T} C={at.shape.C}"
    dtype, day = str(at.dtype).removeprefix("torch."), datetime.date.today().isoformat()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"sm_{target.arch}"
    parts = [str(target.arch), _dict(row.blocks), f"num_warps={row.num_warps}", f"num_stages={row.num_stages}",
             f"itemsize={at.dtype.itemsize}"]  # fmt: skip
    parts += [f"max_registers={row.max_registers}"] * (row.max_registers is not None)
    parts += [f"up_to={row.up_to}"] * (row.up_to < 2**62) + [f"choices={_dict(row.choices)}"] * bool(row.choices)
    warning = (
        "# gives up reproducible sums\n" if row.choices.get("atomic") and not target.present.choices["atomic"] else ""
    )
    return f'{warning}Row({", ".join(parts)},\n    source="measured on {gpu}, {day}, {what} {dtype}: {outcome}"),'


def _dict(values: dict[str, Any]) -> str:
    return f"dict({', '.join(f'{name}={value!r}' for name, value in values.items())})"
