"""Graphs: called as it stands, captured once, replayed; what happens when a capture fails. CUDA itself is stood in for
here (no GPU in these tests); tests/test_step_gpu.py has the real one."""

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nanogpt_fast.errors import DeviceError
from nanogpt_fast.graphs import WARM_UP, Graphs

CUDA = torch.device("cuda")


class Cuda:
    """Stands for torch.cuda: while a graph is captured the work runs, but `launches` says that nothing was executed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.log: list[str] = []
        self.capturing: Any = None
        cuda = self

        class Stream:
            def __init__(self, device: object = None): ...

            def wait_stream(self, other: object) -> None:
                cuda.log.append("wait")

        class Graph:
            def __init__(self) -> None:
                self.work: list[Callable[[], None]] = []

            def replay(self) -> None:
                for launch in self.work:
                    launch()

        @contextlib.contextmanager
        def graph(into: Graph, *, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local" and pool == "the pool" and isinstance(stream, Stream)
            cuda.capturing = into
            try:
                yield
            except RuntimeError:
                raise RuntimeError("operation failed due to a previous error during capture") from None  # as CUDA does
            finally:
                cuda.capturing = None

        fakes = dict(Stream=Stream, CUDAGraph=Graph, graph=graph, graph_pool_handle=lambda: "the pool")
        fakes |= dict(current_stream=Stream, stream=lambda _: contextlib.nullcontext())
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def launch(self, kernel: Callable[[], None]) -> None:
        if self.capturing is None:
            kernel()
        else:
            self.capturing.work.append(kernel)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def counter(cuda: Cuda) -> tuple[list[int], list[str], Callable[[], None]]:
    """(what the device counted, how often Python came by, the work)."""
    device, host = [0], []

    def kernel() -> None:
        device[0] += 1

    def work() -> None:
        host.append("capture" if cuda.capturing else "eager")
        cuda.launch(kernel)

    return device, host, work


def test_every_call_counts_and_python_comes_by_no_more_after_the_capture(cuda: Cuda):
    device, host, work = counter(cuda)
    replayed = Graphs(CUDA, "auto").replayed("it", work)
    for call in range(7):
        replayed()
        assert device[0] == call + 1
    assert host == ["eager"] * WARM_UP + ["capture"]
    assert cuda.log == ["wait", "wait"] * WARM_UP, "the warm-up waits for the stream before, and that one for it"


@pytest.mark.parametrize(
    ("device", "mode"), [(CUDA, "off"), (torch.device("cpu"), "auto"), (torch.device("mps"), "auto")]
)
def test_elsewhere_it_is_the_function(device: torch.device, mode: Any):
    def work() -> None: ...

    assert Graphs(device, mode).replayed("it", work) is work


def test_a_graph_is_held_for_the_pool_until_the_next_is_captured(cuda: Cuda):
    """torch refuses a capture into a pool that had graphs and has none: samples capture one after the other."""
    graphs, graph = Graphs(CUDA, "auto"), None
    for _ in range(2):
        replayed: Any = graphs.replayed("it", counter(cuda)[2])
        for _ in range(WARM_UP + 1):
            replayed()
        assert graph is None or graph() is None, "of two, the older one"
        graph = weakref.ref(replayed._graph)
        del replayed
        assert graph() is not None


def failing(cuda: Cuda) -> tuple[list[int], Callable[[], None]]:
    device, _, work = counter(cuda)

    def fails() -> None:
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        work()

    return device, fails


def test_a_capture_that_fails_is_said_once_and_all_goes_on_without(cuda: Cuda, caplog: pytest.LogCaptureFixture):
    graphs = Graphs(CUDA, "auto")
    (first_count, first), (second_count, _, second) = failing(cuda), counter(cuda)
    pieces = graphs.replayed("the micro-step", first), graphs.replayed("the update", second)
    with caplog.at_level(logging.WARNING):
        for _ in range(6):
            for piece in pieces:
                piece()
    assert (first_count[0], second_count[0]) == (6, 6), "no call is lost, and none counts twice"
    (line,) = caplog.messages
    assert "the micro-step cannot be captured (operation not permitted when stream is capturing)" in line


def test_on_demands_it(cuda: Cuda):
    _, work = failing(cuda)
    replayed = Graphs(CUDA, "on").replayed("the micro-step", work)
    for _ in range(WARM_UP):
        replayed()
    with pytest.raises(DeviceError, match="--cuda_graph=off"):
        replayed()
    with pytest.raises(DeviceError, match="need a CUDA device"):
        Graphs(torch.device("cpu"), "on")
