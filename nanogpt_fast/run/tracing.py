"""Traces some iterations with torch.profiler: a trace for Perfetto with our ranges in it, and where a step went.

    Capture(device, model, facts)     start() ... stop(folder) -> Summary: what train, bench and profiling share
    Window(...)                       --profile=10:15 of a run; with --profiler=nsys its NVTX ranges alone

CUPTI serves one subscriber at a time: under Nsight Systems torch.profiler would find no kernels, so there a window only
opens NVTX ranges, between cudaProfilerStart and cudaProfilerStop.
"""

import logging
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from nanogpt_fast.errors import ConfigError, NanogptError
from nanogpt_fast.files import cpu_name, write_json
from nanogpt_fast.run import ranges, trace_events
from nanogpt_fast.run.step_parts import Summary, summarise
from nanogpt_fast.settings.config import Config, GPTConfig

log = logging.getLogger(__name__)
TRACE, SUMMARY = "trace.json.gz", "summary.json"


def facts_of(config: Config, shape: GPTConfig, device: torch.device, dtype: torch.dtype, ranks: int) -> dict[str, Any]:
    """What a summary says of its run: enough to compute the step's floor."""
    return {
        "shape": asdict(shape),
        "batch_size": config.data.batch_size,
        "micro_steps": config.data.gradient_accumulation_steps // ranks,  # a step and rank
        "dtype": str(dtype).removeprefix("torch."),
        "residual_dtype": config.system.residual_dtype,
        "kernels": config.system.kernels,
        "compile": config.system.compile and device.type == "cuda",
        "ranks": ranks,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


class Capture:
    """torch.profiler over some steps, each in a range `iteration` that the caller opens."""

    def __init__(self, device: torch.device, model: Any, facts: dict[str, Any]):
        self.device, self.model, self.facts = device, model, facts
        self._stack = ExitStack()

    def start(self) -> None:
        """Ranges on, the device idle, the clock running."""
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])
        self._profiler = profile(activities=activities)
        self._profiler.start()
        self._stack.callback(self._profiler.stop)
        self._stack.enter_context(ranges.on(model=self.model))
        settle(self.device)
        self._began = time.perf_counter()
        self._stack.enter_context(ranges.span(ranges.WINDOW))

    def stop(self, folder: Path, untraced_ms: float | None = None) -> Summary:
        """Once the device is done: writes folder/trace.json.gz and folder/summary.json. untraced_ms: a step's time
        while nothing traced it. Raises OSError, and DataError where no iteration was traced."""
        settle(self.device)
        wall_ms = (time.perf_counter() - self._began) * 1e3
        self._stack.close()
        folder.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(folder / TRACE))
        events = trace_events.read(folder / TRACE)
        summary = summarise(events, wall_ms=wall_ms, facts=self.facts, untraced_ms=untraced_ms)
        write_json(folder / SUMMARY, summary.as_json())
        if self.device.type == "cuda" and summary.device != "cuda":
            log.warning("the trace has no kernels: does another profiler hold CUPTI? (--profiler=nsys under nsys)")
        return summary

    def abandon(self) -> None:
        """Stop without a trace."""
        self._stack.close()


class NsysCapture:
    """Ranges by NVTX between cudaProfilerStart and cudaProfilerStop: what --capture-range=cudaProfilerApi waits for."""

    def __init__(self, device: torch.device, model: Any):
        self.device, self.model, self._opener = device, model, ranges.nvtx_opener()
        self._stack = ExitStack()

    def start(self) -> None:
        settle(self.device)
        if self.device.type == "cuda":
            torch.cuda.profiler.start()
            self._stack.callback(torch.cuda.profiler.stop)
        self._stack.enter_context(ranges.on(self._opener, self.model))
        self._stack.enter_context(ranges.span(ranges.WINDOW))

    def stop(self, folder: Path, untraced_ms: float | None = None) -> None:
        settle(self.device)
        self._stack.close()

    def abandon(self) -> None:
        self._stack.close()


@dataclass(kw_only=True)
class Window:
    """The iterations of a run that --profile names; as a context it ends with the run, and writes what it has."""

    iterations: range = range(0)
    capture: Capture | NsysCapture | None = None
    folder: Path = Path("profile")
    say: Callable[[str], None] = print
    open: bool = field(default=False, init=False)
    _untraced_ms: float | None = field(default=None, init=False)

    @property
    def bounds(self) -> tuple[int, ...]:
        """The iterations before which it opens and closes."""
        return (self.iterations.start, self.iterations.stop) if self.iterations else ()

    def reach(self, iteration: int, untraced_ms: float | None = None) -> float:
        """Before each iteration: opens or closes the window where that is due. The seconds it took are no training."""
        began = time.perf_counter()
        if self.open and iteration == self.iterations.stop:
            self.close()
        elif self.capture is not None and iteration == self.iterations.start:
            self._untraced_ms = untraced_ms
            self.capture.start()
            self.open = True
        else:
            return 0.0
        return time.perf_counter() - began

    def close(self) -> None:
        """Write and tell what was traced; a trace that cannot be written is a warning, for training goes on."""
        if not self.open or self.capture is None:
            return
        self.open = False
        try:
            summary = self.capture.stop(self.folder, self._untraced_ms)
        except (OSError, RuntimeError, NanogptError) as error:
            log.warning("no trace was written to %s: %s\n  training goes on", self.folder, error)
        else:
            self.say(report(summary, self.folder) if summary else "nsys: the window is over")

    def __enter__(self) -> "Window":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self.open and self.capture is not None:
            self.open = False
            self.capture.abandon()


def window_of_run(config: Config, start: int, device: torch.device, model: Any, facts: dict[str, Any]) -> Window:
    """The window that --profile asks for in a run that begins at iteration `start`; ConfigError where it is before."""
    iterations = config.system.window
    if not iterations:
        return Window()
    if iterations.start < start:
        raise ConfigError(
            "--profile begins before this run does",
            where=f"profile = {config.system.profile!r}",
            expected=f"START >= {start}, the iteration that this run begins with",
            hint=f"--profile={start + 5}:{start + 10}",
        )
    nsys = config.system.profiler == "nsys"
    capture = NsysCapture(device, model) if nsys else Capture(device, model, facts)
    return Window(iterations=iterations, capture=capture, folder=Path(config.run.out_dir) / "profile")


def settle(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# ---- what is said ----


def table(summary: Summary) -> str:
    """A row a part, dearest first; then the dearest ops by our ranges."""
    total = summary.traced_ms
    rows = [f"{'part':<28}{'ms a step':>11}{'share':>8}"]
    rows += [f"{part:<28}{ms:>11.3f}{ms / total:>8.1%}" for part, ms in by_size(summary.parts)]
    rows.append(f"{'a traced step':<28}{total:>11.3f}   by the clock {summary.wall_ms:.3f}")
    rows += ["", f"{'range':<28}{'forward':>11}{'backward':>11}"]
    rows += [f"{r['name']:<28}{r['forward_ms']:>11.3f}{r['backward_ms']:>11.3f}" for r in summary.ranges[:12]]
    return "\n".join(rows)


def paragraph(summary: Summary) -> str:
    """In words: how long, on what, how sure."""
    total, shown = summary.traced_ms, by_size(summary.parts)[:4]
    parts = ", ".join(f"{part} {ms / total:.0%}" for part, ms in shown)
    text = f"{summary.steps} traced steps took {total:.2f} ms each: {parts}."
    if summary.untraced_ms:
        text += f" Those before took {summary.untraced_ms:.2f} ms."
        if total > 1.02 * summary.untraced_ms:
            text += f" Tracing costs {total / summary.untraced_ms - 1:.0%}, most of it in Python and dispatch."
    if summary.top:
        first = summary.top[0]
        text += f" Dearest: {first['name'][:60]}, {first['ms']:.2f} ms in {first['calls']:g} calls."
    if summary.gaps:
        text += f" {summary.gaps['count'] / summary.steps:.0f} gaps a step, median {summary.gaps['median_us']:.1f} us."
    return text


def report(summary: Summary, folder: Path) -> str:
    """The table, the paragraph and what to type next."""
    where = shlex.quote(str(folder))
    return (
        f"{table(summary)}\n\n{paragraph(summary)}\nnext:\n"
        f"  open {where}/{TRACE} in https://ui.perfetto.dev (docs/profiling.md says how to read it)\n"
        f"  python profiling/explain.py {where}    # in a checkout: the floor of each part, a chart, what to do first"
    )


def by_size(parts: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(parts.items(), key=lambda row: -row[1])
