"""Where one step's time goes on a GPU, a row a kernel, each of ours with the launch op whose rows decide its shape."""

from collections.abc import Callable
from typing import Any

import step_arms
import torch
from step_arms import Setup
from torch.profiler import ProfilerActivity, profile


def kernels(run: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """[{"kernel", "calls", "ms", "share"}] of what the device did meanwhile, dearest first; on the CPU torch's ops."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as trace:
        run()
    rows = []
    for event in trace.key_averages():
        if (event.device_type.name == "CUDA") == on_gpu and not getattr(event, "is_user_annotation", False):
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            rows.append({"kernel": event.key, "calls": event.count, "ms": own / 1e3})
    total = sum(row["ms"] for row in rows) or 1.0
    rows = sorted(({**row, "share": row["ms"] / total} for row in rows), key=lambda row: -row["ms"])
    return [row for row in rows if row["ms"] > 0.0]


def launch_ops(arm: str, setup: Setup) -> dict[str, str]:
    """{our kernel's name: the launch op that it belongs to}, {} for an arm without our kernels."""
    if not arm.startswith("triton"):
        return {}
    from compiled import row_of
    from nanogpt_kernels import launch

    calls = step_arms.recorded(arm, setup.config, setup.dtype, launch.architecture(setup.world.device))
    return {call.kernel.__name__: row_of(call.op) for call in calls}
