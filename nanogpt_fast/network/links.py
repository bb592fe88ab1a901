"""Measures what ranks do alone, between two, and all together: by CUDA's events under NCCL, by the clock under gloo."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt_fast.network.roll_call import GRACE, RollCall
from nanogpt_fast.network.slowest import Link, usual
from nanogpt_fast.network.watch import Watch

MESSAGE = {"cpu": 2**23, "cuda": 2**25}  # bytes from rank to rank
# Seconds by which a busy host may delay a message: four ranks on two cores are put aside for 4 ms at a time, all
# through a measurement, and links of 3 GB/s passed for 0.3.
BUSY = {"cpu": 0.01, "cuda": 2e-5}
BURST = {"cpu": 1, "cuda": 4}  # messages in a row, which hide the launches of a GPU
LARGEST = {"cpu": 2**26, "cuda": 2**28}  # bytes of the largest all-reduce
PRODUCT = {"cpu": 384, "cuda": 4096}  # n of the [n, n] product that each rank computes alone
STRETCH = {"cpu": 200, "cuda": 500}  # of them in a row
SAMPLES, PINGS, MOST = 8, 30, 20  # of a link; of its latency; repetitions of an all-reduce
ENOUGH = 1.0  # seconds of a link's direction after which no further sample is begun


@dataclass
class Meter:
    """The process group of a roll call, and measurements over it. Every rank calls the same ones in the same order."""

    call: RollCall
    device: torch.device
    watch: Watch

    def __post_init__(self) -> None:
        kind = self.kind = "cuda" if self.device.type == "cuda" else "cpu"
        self.backend = "nccl" if kind == "cuda" else "gloo"
        self.watch.at(f"connecting by {self.backend}")
        dist.init_process_group(
            self.backend,
            store=dist.PrefixStore("group", self.call.store),
            rank=self.call.rank,
            world_size=self.call.size,
            timeout=timedelta(seconds=2 * self.call.timeout + 2 * GRACE),  # the watch is quicker
            device_id=self.device if kind == "cuda" else None,
        )
        self._small, self._answer = torch.ones(1, device=self.device), torch.ones(1, device=self.device)  # 4 bytes
        self._message = torch.ones(MESSAGE[kind] // 4, device=self.device)
        self.mean([0.0])  # connects all with all, before anything is timed

    def close(self) -> None:
        dist.destroy_process_group()

    def mean(self, values: Sequence[float]) -> list[float]:
        """Over ranks, the same bits on all of them: what they decide by. Also a barrier."""
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared)
        return (shared / self.call.size).tolist()

    def seconds(self, work: Callable[[], object]) -> float:
        """That work takes, on the device."""
        if self.kind == "cpu":
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        work()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    # ---- alone ----

    def work(self) -> float:
        """Seconds of a matrix product, all ranks at once as in training: the best of a few stretches of 0.1 s and more.
        Single products would miss a rank that is held back for a part of the time, one stretch find a moment's load."""
        self.watch.at("computing alone")
        n = PRODUCT[self.kind]
        a = torch.ones(n, n, device=self.device, dtype=torch.bfloat16 if self.kind == "cuda" else torch.float32)
        product = a @ a
        self.mean([0.0])
        count = STRETCH[self.kind]
        return min(self.seconds(lambda: [torch.mm(a, a, out=product) for _ in range(count)]) for _ in range(3)) / count

    # ---- between two ----

    def links(self, rounds: Sequence[Sequence[tuple[int, int]]], until: float) -> tuple[list[Link], int]:
        """This rank's own links, as the sender, and how many rounds there was time for (time.monotonic()'s `until`)."""
        found: list[Link] = []
        for done, pairs in enumerate(rounds):
            over = self.mean([float(time.monotonic() > until)])[0]
            if over and done:
                return found, done
            for first, second in pairs:
                if self.call.rank in (first, second):
                    found.append(self._link(first, second))
        return found, len(rounds)

    def _link(self, first: int, second: int) -> Link:
        """Both directions, one after the other; the one from here."""
        rank = self.call.rank
        peer = second if rank == first else first
        self.watch.at(f"exchanging messages with rank {peer}")
        pings = [self._there_and_back(peer, rank == first) for _ in range(PINGS)]
        latency = min(pings[1:]) / 2  # the quickest: on a busy host most wait for a core, milliseconds for 0.1
        own = 0.0
        for source in (first, second):
            self.watch.at(f"{'sending to' if rank == source else 'receiving from'} rank {peer}")
            whole = self._one_way(peer, rank == source)
            if rank == source:
                own = max(whole - latency, whole / 2) / BURST[self.kind]  # without the answer's way back
        return Link(rank, peer, own, latency, self._message.nbytes)

    def _one_way(self, peer: int, sends: bool) -> float:
        """Seconds of a burst, the lower quartile of some."""
        times: list[float] = []
        began, go_on = time.monotonic(), True
        while go_on:
            if not sends:  # who receives decides, and says so in its answer
                self._answer.fill_(float(len(times) < SAMPLES and time.monotonic() - began < ENOUGH))
            times.append(self._burst(peer, sends))
            go_on = bool(self._answer.item())
        return usual(times[1:] or times)  # the first one has warmed up

    def _there_and_back(self, peer: int, first: bool) -> float:
        """Seconds of 4 bytes and their answer."""

        def exchange() -> None:
            for sends in (first, not first):
                self._send(self._small, peer) if sends else self._receive(self._small, peer)

        return self.seconds(exchange)

    def _burst(self, peer: int, sends: bool) -> float:
        """Seconds of the messages and an answer, which says that they have come."""

        def burst() -> None:
            for _ in range(BURST[self.kind]):
                self._send(self._message, peer) if sends else self._receive(self._message, peer)
            self._receive(self._answer, peer) if sends else self._send(self._answer, peer)

        return self.seconds(burst)

    def _send(self, message: Tensor, peer: int) -> None:
        self._alone(dist.isend, message, peer)

    def _receive(self, message: Tensor, peer: int) -> None:
        self._alone(dist.irecv, message, peer)

    def _alone(self, way: Callable, message: Tensor, peer: int) -> None:
        # Batched, NCCL takes the communicator of all; single calls would make one for every two ranks.
        for work in dist.batch_isend_irecv([dist.P2POp(way, message, peer)]):
            work.wait()

    # ---- all together ----

    def all_reduces(self, until: float) -> list[tuple[int, float]]:
        """(bytes, seconds) from 4 bytes on, each size four times the one before, as long as there is time."""
        found: list[tuple[int, float]] = []
        size = 4
        while size <= LARGEST[self.kind]:
            tensor = torch.zeros(size // 4, device=self.device)
            self._all_reduce(tensor, 1)
            once, left = self.mean([self._all_reduce(tensor, 1), until - time.monotonic()])
            took = self._all_reduce(tensor, max(1, min(MOST, int(left / 10 / once))))
            took, left = self.mean([took, until - time.monotonic()])
            found.append((size, took))
            if 3 * 4 * took > left:  # the next size: to warm up, to be timed, to be counted on
                break
            size *= 4
        return found

    def _all_reduce(self, tensor: Tensor, count: int) -> float:
        """Seconds of one of so many in a row, as nccl-tests counts them."""
        self.watch.at(f"{count} all-reduces of {tensor.nbytes:,} bytes")
        return self.seconds(lambda: [dist.all_reduce(tensor) for _ in range(count)]) / count
