"""A capture of real steps on the CPU: the trace file, the ranges in it, and parts that add up to the clock's time."""

import json
from pathlib import Path

import pytest
import torch
from test_ranges import batches, training_step

from nanogpt_fast.errors import ConfigError, DataError
from nanogpt_fast.run import ranges, trace_events, tracing
from nanogpt_fast.run.step_parts import Summary
from nanogpt_fast.run.tracing import Capture, NsysCapture, Window

CPU = torch.device("cpu")
STEPS = 4


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Summary, Path]:
    folder, step = tmp_path_factory.mktemp("run") / "profile", training_step()
    batch = batches(1)[0]
    step(batch, 0)
    for _ in range(3):  # on a busy machine the process may lose its core between the two clocks
        capture = Capture(CPU, step.model, {"what": "a test"})
        capture.start()
        for i in range(STEPS):
            with ranges.span(ranges.ITERATION):
                step(batch, i).loss.item()
        summary = capture.stop(folder, untraced_ms=1.0)
        if abs(summary.traced_ms / summary.wall_ms - 1) < 0.05:
            break
    return summary, folder


def test_parts_add_up_to_the_clocks_time(captured: tuple[Summary, Path]):
    summary, _ = captured
    assert summary.steps == STEPS
    assert summary.traced_ms == pytest.approx(summary.wall_ms, rel=0.05)
    works = sum(ms for part, ms in summary.parts.items() if part != "Python, autograd, dispatch")
    assert works > 0.1 * summary.wall_ms, "operators were found, not only what lies between them"


def test_ranges_name_every_op_both_ways(captured: tuple[Summary, Path]):
    summary, _ = captured
    rows = {row["name"]: row for row in summary.ranges}
    for op in ("embedding", "qkv_attention", "linear", "add_norm", "mlp", "linear_cross_entropy"):
        assert rows[op]["forward_ms"] > 0 and rows[op]["backward_ms"] > 0, op
    assert rows["update"]["forward_ms"] > 0 and list(summary.layers) == ["h0", "h1"]
    assert sum(r["forward_ms"] + r["backward_ms"] for r in summary.ranges) == pytest.approx(summary.traced_ms)


def test_the_trace_holds_our_ranges_and_the_summary_is_on_the_disk(captured: tuple[Summary, Path]):
    summary, folder = captured
    names = [event.name for event in trace_events.read(folder / "trace.json.gz")]
    assert names.count("iteration") == STEPS and names.count("h1.mlp") == 2 * STEPS  # two micro-batches
    assert json.loads((folder / "summary.json").read_text()) == summary.as_json()
    assert summary.facts == {"what": "a test"} and summary.untraced_ms == 1.0


def test_what_is_said_names_the_parts_and_what_tracing_costs(captured: tuple[Summary, Path]):
    summary, folder = captured
    said = tracing.report(summary, folder)
    assert f"{STEPS} traced steps took" in said and "Tracing costs" in said and "https://ui.perfetto.dev" in said
    assert all(part in said for part in summary.parts) and "mlp" in said


def test_a_capture_without_an_iteration_is_an_error_not_a_summary(tmp_path: Path):
    capture = Capture(CPU, None, {})
    capture.start()
    with pytest.raises(DataError, match="no traced iterations"):
        capture.stop(tmp_path)


class Recorder:
    """A capture that only notes what is asked of it."""

    def __init__(self, error: Exception | None = None):
        self.calls: list[str] = []
        self.error = error

    def start(self) -> None:
        self.calls.append("start")

    def stop(self, folder: Path, untraced_ms: float | None = None) -> None:
        self.calls.append(f"stop {untraced_ms}")
        if self.error:
            raise self.error

    def abandon(self) -> None:
        self.calls.append("abandon")


def window(capture: Recorder, iterations: range = range(2, 4)) -> Window:
    return Window(iterations=iterations, capture=capture, say=lambda _: None)  # type: ignore[arg-type]


def test_a_window_opens_and_closes_once():
    capture = Recorder()
    with window(capture) as opened:
        states = [(opened.reach(i, float(i)) > 0, opened.open) for i in range(6)]
    assert states == [(False, False), (False, False), (True, True), (False, True), (True, False), (False, False)]
    assert capture.calls == ["start", "stop 2.0"]


def test_a_run_that_ends_inside_the_window_keeps_what_it_has():
    capture = Recorder()
    with window(capture, range(2, 40)) as opened:
        opened.reach(2)
    assert capture.calls == ["start", "stop None"]


def test_an_error_inside_the_window_passes_and_leaves_no_profiler_on():
    capture = Recorder()
    with pytest.raises(ZeroDivisionError), window(capture) as opened:
        opened.reach(2)
        raise ZeroDivisionError
    assert capture.calls == ["start", "abandon"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("kineto"), DataError("cut off")]
)
def test_a_trace_that_cannot_be_written_is_a_warning(error: Exception, caplog: pytest.LogCaptureFixture):
    with window(Recorder(error)) as opened:
        for i in range(6):
            opened.reach(i)
    assert "no trace was written" in caplog.text and "training goes on" in caplog.text


def test_under_nsys_only_nvtx_ranges_are_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    names: list[str] = []
    calls: list[str] = []

    class Range:
        def __init__(self, name: str):
            names.append(name)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(ranges, "nvtx_opener", lambda: Range)
    monkeypatch.setattr(tracing, "settle", lambda device: calls.append("settle"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("cudaProfilerStart"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("cudaProfilerStop"))
    step = training_step()
    capture = NsysCapture(torch.device("cuda"), step.model)
    capture.start()
    step(batches(1)[0], 0)
    capture.stop(tmp_path)
    assert names[:2] == ["window", "step"] and "h0.mlp" in names
    assert calls == ["settle", "cudaProfilerStart", "settle", "cudaProfilerStop"] and not list(tmp_path.iterdir())
    assert ranges.span("a") is ranges.span("b")


def test_nsys_without_cuda_or_nvtx_is_said_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "nvtx", None)
    with pytest.raises(ConfigError, match="--profiler=torch"):
        NsysCapture(CPU, None)
