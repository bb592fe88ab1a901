"""Of isoFLOP runs: the best size of each budget, the law through all of them, and what it foretold of the largest."""

from collections.abc import Sequence
from typing import Any


def text(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{row['arm']} seed {row['seed']}: {row.get('val_loss')}" for row in rows]


def listing(points: Sequence[Any]) -> list[str]:
    return [f"{one.budget:g} {one.shape} {one.params} {one.tokens} {one.flops:.4g}" for one in points]
