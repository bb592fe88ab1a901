"""A small run whose launch rows are tuned in this process: interpreted kernels, and a clock that reads the rows."""

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
from nanogpt_kernels import launch

from nanogpt_fast import launch_search, ops, tuning
from nanogpt_fast.launch_race import Race, raced
from nanogpt_fast.ops import Ops, row_as_json, row_from_json
from nanogpt_fast.proof import Setup
from nanogpt_fast.settings.config import GPTConfig
from nanogpt_fast.tuning import Remote, Target, Tuning

CPU = torch.device("cpu")
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=48, bias=False)
SETUP = Setup(SHAPE, "float32", rows=16)
FACTS = {"gpu": "A GPU", "driver": "1", "torch": "2", "triton": "3", "ptxas": "13", "kernels": "k"}
OP = "grad_norm"  # the quickest one to interpret; its present row has BLOCK=4096


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Rows differ in tiles alone, and are called few times; the user's cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "TRIED", 1)
    monkeypatch.setattr(tuning, "REPEATS", 2)
    near = launch_search._near
    monkeypatch.setattr(launch_search, "axes", lambda op, row: {name: near(n) for name, n in row.blocks.items()})
    yield
    launch.keep({})


def block_of(rows: Any) -> int:
    """Of the update's row, 0 for the shipped one."""
    return next((row.blocks["BLOCK"] for key, row in rows.items() if key.op == OP), 0)


def clock(rows: Sequence[Any], calls: Any, rounds: int, began: Callable[[int], None]) -> list[list[float]]:
    """Tiles of 1024 are quickest, 512 are a little slower, and then the larger the slower."""
    for i in range(len(rows)):
        began(i)
    return [[{0: 4.0, 512: 1.1, 1024: 1.0}.get(block_of(kept), block_of(kept) / 1024)] * rounds for kept in rows]


@functools.cache
def one_race() -> Race:
    return Race(SETUP, CPU, ops.TRITON, clock)


class Here(Remote):
    """The child's work in this process, by way of JSON all the same."""

    def __init__(self, ours: Ops):
        self.race, self.asked = one_race(), []
        self.race.ours = ours

    def ask(self, what: str, sets: Sequence[dict[Any, Any]], within_s: float = 0.0, **details: Any) -> Any:
        self.asked.append(what)
        if what == "compile":
            return True
        sent = json.loads(json.dumps([[row_as_json(*pair) for pair in kept.items()] for kept in sets]))
        return raced(self.race, {"ask": what, **details}, [dict(map(row_from_json, s)) for s in sent], lambda i: None)


def tuning_of(ours: Ops, remote: Remote | None = None) -> tuple[Tuning, list[str]]:
    interpreter.install()
    said: list[str] = []
    there = remote or Here(ours)
    return Tuning(SETUP, ours, 90, 1, there, there, said.append), said


def target_of(tuning: Tuning) -> Target:
    """OP's, every way of every call taking as long."""
    tuning.costs.update({case.known_by: [1.0, 2.0] for case in tuning.cases})
    return next(target for target in targets_of(tuning) if target.key.op == OP)


def targets_of(some: Tuning) -> list[Target]:
    return tuning.targets_of(some.cases, some.costs, some.small)


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds
