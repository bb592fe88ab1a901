"""The search for a better launch row: rows as points, their neighbours, and a walk from the present row to the best.

Who searches says what runs: an Arena compiles rows, holds them to what is right, and times them. bench/tune.py's is
one op of its cases, and ends in a row to paste; nanogpt_fast.tune's is a training run on the user's own GPU.
"""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from nanogpt_fast.errors import ConfigError

GAIN = 0.995  # a move needs this ratio: less is noise
MOST = 24  # candidates tried around a row before the search moves on
ROUNDS, LAST_ROUNDS = 7, 25  # of a search's step, and of the best against the present row at its end
LEAST_S = 5.0  # a step is not begun with less time left
COMPILING = 0.7  # of a step's time; the rest is to check and to time what was compiled

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
    return " ".join(f"{name}={value}" for name, value in point(row).items() if value is not None)


# ---- the walk ----


class Arena(Protocol):
    """Where rows of one launch op are tried."""

    launch_op: str
    present: Any  # its row as things stand

    def fitting(self, rows: list[Any], until: float) -> list[Any]:
        """Those that compile by time.monotonic() == until, and can be launched."""
        ...

    def right(self, row: Any) -> str:
        """ "" where the row computes what it should, else what is wrong."""
        ...

    def times(self, rows: Sequence[Any], rounds: int) -> list[list[float]]:
        """Milliseconds a call, a list a row, the rows interleaved; infinite for one that could not be timed."""
        ...

    def tell(self, row: Any, status: str, **figures: Any) -> None:
        """Something was found of a row: what is wrong with it; or it was "timed", or is the "best"."""
        ...


@dataclass
class Walk:
    """How far the search in an arena has come. ratio: the best row's time over the present one's, 1 for that itself;
    seen: the points decided, which a further walk leaves out; done: nothing near the best row is left to try."""

    best: Any
    ratio: float = 1.0
    seen: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False

    @property
    def tried(self) -> int:
        return max(0, len(self.seen) - 1)  # without the present row


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median over rounds of one row's time over another's."""
    return statistics.median(t / b for t, b in zip(times, base))


def ranked(
    arena: Arena, rows: list[Any], best: Any, rounds: int, until: float
) -> tuple[list[tuple[Any, float]], list[Any]]:
    """((row, its time over best's), quickest first, of those that compile and are right; those that there was no time
    to check by `until`)."""
    right, left = [], []
    for row in arena.fitting(rows, time.monotonic() + COMPILING * (until - time.monotonic())):
        if time.monotonic() > until:
            left.append(row)
        elif problem := arena.right(row):
            arena.tell(row, problem)
        else:
            right.append(row)
    base, *others = arena.times([best, *right], rounds) if right else ([],)
    found = sorted(zip(right, (ratio(t, base) for t in others)), key=lambda pair: pair[1])
    for row, r in found:
        arena.tell(row, "timed", ratio=r, ms=statistics.median(base) * r, centre=point(best))
    return found, left


def search(arena: Arena, until: float, most: int = MOST, walk: Walk | None = None) -> Walk:
    """Walk from the present row, or on from where an earlier walk ended, to the best of its neighbours for as long as
    one is quicker; then time the best against the present row once more: unless that is beaten by GAIN, the walk ends
    where it began."""
    walk = walk or Walk(arena.present, seen=[point(arena.present)])
    before, ratio_before = walk.best, walk.ratio
    while time.monotonic() + LEAST_S < until and not walk.done:
        around = (row for row in candidates(arena.launch_op, walk.best) if point(row) not in walk.seen)
        batch = list(itertools.islice(around, most))
        walk.done = not batch
        found, left = ranked(arena, batch, walk.best, ROUNDS, until)
        walk.seen += [point(row) for row in batch if row not in left]
        if not found or found[0][1] > GAIN:
            break
        walk.best = found[0][0]
    if walk.best != before:
        base, times = arena.times([arena.present, walk.best], LAST_ROUNDS)
        walk.ratio = ratio(times, base)
        if walk.ratio > GAIN:
            walk.best, walk.ratio = before, ratio_before
    arena.tell(walk.best, "best", ratio=walk.ratio, tried=walk.tried)
    return walk
