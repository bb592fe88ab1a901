"""An arm of bench/step.py made ready to be timed: in this process (a GPU's), or in one of its own (a CPU's)."""

import gc
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lineup
import machine
import step_arms
import torch
import turns
from step_arms import Arm, Missing, Setup

HALVINGS = 3  # batch sizes tried: 64, 32, 16
CHECKED = 2  # sequences of the first step


@dataclass
class Ready:
    """An arm that takes steps. facts: what a row says of it; seconds: of its steps alone."""

    arm: Arm
    batch: torch.Tensor
    facts: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def step(self, device: torch.device) -> float:
        """Wall time of one step until the device has finished, in seconds: what a user waits."""
        began, number = time.perf_counter(), next(self.numbers)
        self.loss = self.arm(self.batch, number).loss
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - began
        self.facts["loss_after"] = {"steps": number, "loss": self.loss}  # a tensor: read when the row is written
        return taken

    def time(self, device: torch.device, steps: int) -> list[float]:
        return [self.step(device) for _ in range(steps)]

    def state(self, device: torch.device) -> dict[str, Any]:
        """Clocks, temperature and power in the middle of one more step: an idle GPU's would say nothing."""
        if device.type != "cuda":
            return {}
        self.arm(self.batch, next(self.numbers))
        found = machine.gpu_state()
        torch.cuda.synchronize(device)
        return found

    def end(self) -> None:
        """Nothing to end: the memory goes with the last reference."""


class Apart:
    """The same in a process of its own: `python bench/step.py ... --serve`."""

    def __init__(self, name: str, argv: list[str], expected: tuple[float, float]):
        script = str(Path(__file__).with_name("step.py"))
        self.process = turns.Apart([sys.executable, script, *argv, "--serve", name, *map(repr, expected)])
        self.facts: dict[str, Any] = self.process.facts
        self.seconds: list[float] = []

    def time(self, device: torch.device, steps: int) -> list[float]:
        answer = self.process.turn(steps)
        self.facts |= {key: answer[key] for key in ("peak_gb", "loss_after")}
        return answer["seconds"]

    def state(self, device: torch.device) -> dict[str, Any]:
        return {}

    def end(self) -> None:
        self.process.end()


def serve(name: str, setup: Setup, expected: tuple[float, float], warmup: int) -> None:
    """The process's side of Apart."""

    def make() -> tuple[dict[str, Any], Callable[[], Any], Callable[[], dict[str, Any]]]:
        found = ready(name, setup, expected, warmup)
        call = lambda: found.step(setup.world.device)
        return said(found.facts), call, lambda: {"loss_after": said(found.facts)["loss_after"]}

    turns.serve(make, why)


def said(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts as a row has them: the loss after so many steps as a number."""
    after = facts.get("loss_after")
    return {**facts, "loss_after": {**after, "loss": float(after["loss"])}} if after else facts


def first_step(arm: Arm, setup: Setup) -> tuple[float, float]:
    """(loss, gradient norm) of a step of a few sequences."""
    size = (1, CHECKED, setup.shape.block_size + 1)
    batch = torch.randint(setup.shape.vocab_size, size, generator=torch.Generator().manual_seed(1))
    result = arm(batch, 0)
    return float(result.loss), float(result.grad_norm)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def ready(name: str, setup: Setup, expected: tuple[float, float], warmup: int) -> Ready:
    """Build an arm, check its first step and run its next ones; ValueError for one that computes something else.

    Out of memory it is built again with half the batch, so that nothing of the failed try is left."""
    A, B = setup.config.data.gradient_accumulation_steps, setup.config.data.batch_size
    tried = [b for b in (B >> i for i in range(HALVINGS)) if b and B % b == 0]
    for b in tried:
        arm = found = None
        free(setup.world.device)
        size = (A * (B // b), b, setup.shape.block_size + 1)
        batch = torch.randint(setup.shape.vocab_size, size, generator=torch.Generator().manual_seed(0))
        facts: dict[str, Any] = {"batch_size": b, "accumulation": A * (B // b)}
        try:
            arm = step_arms.make_arm(name, setup)
            loss, norm = first_step(arm, setup)
            if not (abs(loss - expected[0]) <= 1e-2 * expected[0] and abs(norm - expected[1]) <= 5e-2 * expected[1]):
                raise ValueError(f"WRONG: loss {loss:.5g}, norm {norm:.5g}; plain PyTorch has {expected}")
            found = Ready(arm, batch, {**facts, "loss": loss, "grad_norm": norm})
            found.time(setup.world.device, warmup)
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory at B={b}", flush=True)
            continue
        notes = [getattr(arm, "note", ""), f"out of memory at B={b * 2}" if b < B else ""]
        if any(notes):
            found.facts["note"] = "; ".join(filter(None, notes))
        if setup.world.device.type == "cuda":
            found.facts["peak_gb"] = torch.cuda.max_memory_allocated(setup.world.device) / 1e9
        return found
    raise torch.OutOfMemoryError(f"out of memory at B={', '.join(map(str, tried))}")


def why(problem: Exception) -> str:
    """The status of an arm that did not get through."""
    if isinstance(problem, turns.Failed):
        return str(problem)  # its process has worded it
    if isinstance(problem, Missing):
        return f"missing: {problem}"
    return str(problem) if isinstance(problem, ValueError) and "WRONG" in str(problem) else (
        f"failed: {lineup.first_line(problem)}"
    )  # fmt: skip
