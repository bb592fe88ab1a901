"""Device work that takes no arguments, replayed as a CUDA graph.

    graphs = Graphs(device, "auto")
    micro_step = graphs.replayed("the micro-step", function)
    micro_step()                      # twice as it stands, and that work counts; then captured once, and replayed

A graph repeats the launches that one call made: the same kernels, addresses and scalars. So what changes from call to
call must lie in tensors that stay, and the function may neither wait for the device nor keep a tensor that it made:
tests/test_replay.py records two successive steps and holds that they are one list. Off CUDA the function is called.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import torch

from nanogpt_fast.errors import DeviceError

log = logging.getLogger(__name__)
WARM_UP = 2  # calls before the capture: Triton compiles, cuBLAS allocates its workspace, autograd its accumulators
Mode = Literal["auto", "on", "off"]


class Graphs:
    """The graphs of one run: they share a stream and, since they replay in turn, one pool of memory.

    auto: captured on CUDA; a capture that fails is said once, and all goes on without. on: that is a DeviceError.
    """

    def __init__(self, device: torch.device, mode: Mode = "off"):
        if mode == "on" and device.type != "cuda":
            raise DeviceError(
                "CUDA graphs need a CUDA device",
                where="--cuda_graph=on",
                expected="cuda",
                found=str(device),
                hint="--cuda_graph=auto captures where it can",
            )
        self._index = device.index or 0
        self.active, self._must = device.type == "cuda" and mode != "off", mode == "on"
        self._newest: torch.cuda.CUDAGraph | None = None  # torch refuses a pool whose graphs are all gone
        if self.active:
            self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def replayed(self, name: str, work: Callable[[], None]) -> Callable[[], None]:
        """work() as a function that is captured after WARM_UP calls; name is what a failure calls it."""
        return _Replayed(self, name, work) if self.active else work

    def warm_up(self, work: Callable[[], None]) -> None:
        """Call work on the graphs' stream, where autograd's accumulators and library workspaces then belong."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def capture(self, name: str, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """The graph of work(), which does not run; None where that failed, and from then on for all."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads go on meanwhile, as NCCL's watchdog, which queries its events
        capturing = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), capturing:  # which does not restore it when it fails
                work()
        except RuntimeError as error:
            first: BaseException = error
            while first.__context__:  # ending a broken capture raises once more
                first = first.__context__
            why = (str(first).splitlines() or [type(first).__name__])[0]
            if self._must:
                raise DeviceError(
                    f"{name} cannot be captured as a CUDA graph",
                    where="--cuda_graph=on",
                    found=why,
                    hint="--cuda_graph=off, or auto, which goes on without",
                ) from error
            self.active = False
            with suppress(AttributeError, RuntimeError):  # torch leaves the allocator in a broken capture's pool
                torch._C._cuda_endAllocateToPool(self._index, self._pool)
            log.warning("going on without CUDA graphs: %s cannot be captured (%s)", name, why)
            return None
        self._newest = graph
        return graph


class _Replayed:
    def __init__(self, graphs: Graphs, name: str, work: Callable[[], None]):
        self._graphs, self._name, self._work = graphs, name, work
        self._calls, self._graph = 0, None

    def __call__(self) -> None:
        if self._graph is None and self._graphs.active:
            if self._calls < WARM_UP:
                self._calls += 1
                return self._graphs.warm_up(self._work)
            self._graph = self._graphs.capture(self._name, self._work)
        if self._graph is None:
            self._work()
        else:
            self._graph.replay()
