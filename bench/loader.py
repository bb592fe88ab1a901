"""Where should batches be read: in the training loop, in a thread, or in a process?

    python bench/loader.py [--seconds 0.4] [--rounds 7] [--work_rows 768]

It needs the package: `pip install -e .`, or PYTHONPATH=. from the repository's root.

Three figures for each batch shape: tokens/s of the loader alone; how long next() blocks beside a training-like step
(forward and backward of a small MLP on the CPU); and what that step takes longer than on one fixed batch. Variants are
interleaved and medians taken over the rounds. The process is a spawned one that fills a ring of shared tensors; it
lives here, for the comparison only.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from nanogpt_fast.data.loader import Loader
from nanogpt_fast.data.orders import ShuffleOrder
from nanogpt_fast.data.tokens import TokenSource

SHAPES = [(12, 64), (64, 256), (12, 1024), (64, 1024)]  # (batch, block)
VOCAB, WIDTH, TOKENS = 50304, 128, 1 << 25
RING = 4


def loader_of(path: str, batch: int, block: int, prefetch: int) -> Loader:
    order = ShuffleOrder(TokenSource([path]), block, seed=1)
    return Loader(order, batch_size=batch, accumulation=1, vocab_size=VOCAB, prefetch=prefetch)


def _serve(path: str, batch: int, block: int, ring: list[torch.Tensor], empty, ready) -> None:
    with loader_of(path, batch, block, prefetch=0) as loader:
        while (slot := empty.get()) is not None:
            ring[slot].copy_(next(loader))
            ready.put(slot)


class ProcessLoader:
    """The same batches from a spawned process, through shared memory; a batch is valid until the next next()."""

    def __init__(self, path: str, batch: int, block: int):
        spawn = multiprocessing.get_context("spawn")
        self._ring = [torch.empty(1, batch, block + 1, dtype=torch.uint16).share_memory_() for _ in range(RING)]
        self._empty, self._ready, self._held = spawn.SimpleQueue(), spawn.SimpleQueue(), RING - 1
        for slot in range(RING - 1):
            self._empty.put(slot)
        self._process = spawn.Process(
            target=_serve, args=(path, batch, block, self._ring, self._empty, self._ready), daemon=True
        )
        self._process.start()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        slot = self._ready.get()
        self._empty.put(self._held)
        self._held = slot
        return self._ring[slot]

    def close(self) -> None:
        self._empty.put(None)
        self._process.join()


def training_step(rows: int) -> Callable[[torch.Tensor], None]:
    """Forward and backward of an embedding and six matmuls over the first `rows` tokens of a batch."""
    table = torch.randn(VOCAB, WIDTH)
    weights = [torch.randn(WIDTH, WIDTH).mul_(WIDTH**-0.5).requires_grad_() for _ in range(6)]

    def step(batch: torch.Tensor) -> None:
        x = table[batch.view(-1)[:rows].long()]
        for weight in weights:
            x = torch.nn.functional.gelu(x @ weight)
        x.square().mean().backward()

    return step


def timed(
    source: Iterator[torch.Tensor], work: Callable[[torch.Tensor], object], seconds: float
) -> tuple[float, float]:
    """(microseconds a round of next() and work, those in next()): medians over a slice of `seconds`."""
    work(next(source))
    whole, fetch, end = [], [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        batch = next(source)
        fetched = time.perf_counter()
        work(batch)
        whole.append(time.perf_counter() - began)
        fetch.append(fetched - began)
    return statistics.median(whole) * 1e6, statistics.median(fetch) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.4, help="of one slice")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work_rows", type=int, default=768, help="tokens that the training-like step works on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {os.cpu_count()} cores")
    print(f"{'batch':>9} {'from':<8} {'alone us':>9} {'M tokens/s':>11} {'next() us':>10} {'added us':>9} {'of us':>7}")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "train.bin")
        np.random.default_rng(1).integers(0, 50257, TOKENS, dtype=np.uint16).tofile(path)
        step = training_step(args.work_rows)
        for batch, block in SHAPES:
            compare(path, batch, block, step, args.seconds, args.rounds)


def compare(path: str, batch: int, block: int, step: Callable, seconds: float, rounds: int) -> None:
    sources = {
        "none": loader_of(path, batch, block, prefetch=0),
        "thread": loader_of(path, batch, block, prefetch=2),
        "process": ProcessLoader(path, batch, block),
    }
    fixed = itertools.repeat(next(sources["none"]).clone())
    figures: dict[str, list[tuple[float, ...]]] = {name: [] for name in sources}
    for _ in range(rounds):
        for name, source in sources.items():
            floor, _ = timed(fixed, step, seconds)
            whole, fetch = timed(source, step, seconds)
            alone, _ = timed(source, lambda _: None, seconds)
            figures[name].append((alone, fetch, whole - floor, floor))
    for name, source in sources.items():
        alone, fetch, added, floor = map(statistics.median, zip(*figures[name]))
        rate = batch * block / alone
        print(f"{batch:>4}x{block:<4} {name:<8} {alone:9.1f} {rate:11.1f} {fetch:10.1f} {added:9.0f} {floor:7.0f}")
        source.close()


if __name__ == "__main__":
    main()
