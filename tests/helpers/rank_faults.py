"""What goes wrong on one rank of a test's (ranks.py), as variables of its environment say.

DATA_DIRS=A,B            rank 0 takes --data_dir=A, rank 1 B
OUT_OF_MEMORY_AT=1:12    on rank 1 memory runs out in iteration 12
HANGS_AT=1:12            rank 1 hangs before iteration 12
CLOCK_AHEAD=1:3600       rank 1's clock is an hour ahead
RUN_FIRST=1:CODE         rank 1 runs this code before the command
"""

import os
import sys
import time
from typing import Any

from nanogpt_fast import pulse
from nanogpt_fast.step import TrainStep


def plant() -> None:
    pulse.BEAT, pulse.SILENT = 0.3, 1.2  # a test's ranks are heard sooner
    rank = os.environ.get("RANK", "0")
    if folders := os.environ.get("DATA_DIRS"):
        sys.argv.append(f"--data_dir={folders.split(',')[int(rank)]}")
    whose, _, code = os.environ.get("RUN_FIRST", "").partition(":")
    if whose == rank:
        exec(code, {})
    whose, _, seconds = os.environ.get("CLOCK_AHEAD", "").partition(":")
    if whose == rank:
        clock = time.time
        time.time = lambda: clock() + float(seconds)
    real = TrainStep.__call__

    def at(name: str, iteration: int) -> bool:
        return os.environ.get(name) == f"{rank}:{iteration}"

    def call(self: TrainStep, batch: Any, iteration: int, *votes: bool) -> Any:
        if at("OUT_OF_MEMORY_AT", iteration):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        if at("HANGS_AT", iteration):
            time.sleep(600)
        return real(self, batch, iteration, *votes)

    TrainStep.__call__ = call  # type: ignore[method-assign]
