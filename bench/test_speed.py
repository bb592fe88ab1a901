"""Ops and a training step as pytest-benchmark cases: `pytest bench`, or `pytest bench -k norm`.

They guard a working copy against getting slower without anyone looking: no time is asserted, --benchmark-compare-fail
does that. On a GPU ours, on a CPU the specification, at sizes that take milliseconds. Figures to publish come from
ops.py and step.py, whose contestants take turns.
"""

from collections.abc import Callable
from typing import Any

import cases
import harness
import machine
import pytest
import torch
from op_inputs import Setting

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SIZE = "race" if DEVICE.type == "cuda" else "cpu"


def waited(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call until the device has finished."""

    def run() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


def told(benchmark: Any, **facts: Any) -> None:
    names = ("device", "gpu", "cpu", "cores", "threads", "torch", "triton", "commit", "dirty", "tree")
    everywhere = {name: value for name, value in machine.machine_facts().items() if name in names}
    benchmark.extra_info.update(everywhere, dtype=str(DTYPE).removeprefix("torch."), **facts)


MODES = [
    (op, mode)
    for op in cases.CASES
    for mode in ("forward", "both")
    if mode == "forward" or cases.differentiable(op, cases.setting(op, SIZE, dtype=DTYPE, device=DEVICE))
]


@pytest.mark.parametrize(("op", "mode"), MODES)
def test_op(benchmark: Any, op: str, mode: str) -> None:
    at: Setting = cases.setting(op, SIZE, dtype=DTYPE, device=DEVICE)
    function = cases.ours(op) if DEVICE.type == "cuda" else cases.specification(op)
    bound = harness.plain(function).bind(*cases.CASES[op].inputs(at))
    call = bound.forward
    if mode == "both":
        douts = cases.douts_of(harness.outputs_of(bound.forward()), at)
        call = lambda: harness.both(bound, douts)
    told(benchmark, op=op, mode=mode, size=SIZE)
    benchmark(waited(call))


def test_step(benchmark: Any, request: pytest.FixtureRequest) -> None:
    from timed_step import make_step

    name: Any = request.config.getoption("--config")
    step = make_step(name, DEVICE.type, str(DTYPE).removeprefix("torch."))
    told(benchmark, config=name)
    benchmark(waited(step))
