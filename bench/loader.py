"""Is the loader ever the bottleneck? By format, by order, and by who reads: next(), a thread, a process.

    python bench/loader.py [--quick] [--seconds 0.4] [--rounds 7] [--out DIR]

Three tables, variants interleaved, medians over the rounds:

  worker   for each batch shape: tokens/s of the loader alone; how long next() blocks beside a training-like step on
           the CPU (forward and backward of a small MLP); and what that step takes longer than on one fixed batch
  format   tokens/s alone and the wait beside a consumer of --consumer tokens/s, for each kind of file that a run takes
  order    the same for both orders

The consumer of the last two sleeps: a GPU computes, the CPU is free, as in training there. Files are in the page cache.
The process is a spawned one that fills a ring of shared tensors; it lives here, for the comparison only.
"""

import argparse
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import machine
import numpy as np
import torch
from turns import rotated

from nanogpt_fast.command import run_command
from nanogpt_fast.data.loader import Loader
from nanogpt_fast.data.orders import NanogptOrder, ShuffleOrder
from nanogpt_fast.data.token_format import LLMC_LAYOUTS, LLMC_UINT16, LLMC_UINT32
from nanogpt_fast.data.tokens import TokenSource

SHAPES = [(12, 64), (64, 256), (12, 1024), (64, 1024)]  # (batch, block)
GPT2 = (64, 1024)  # a micro-batch
VOCAB, WIDTH, TOKENS = 50304, 128, 1 << 25
RING = 4
SHARDS = 8
Source = Any  # an iterator over batches with close()


# ---- files ----


def write_files(folder: Path, tokens: int) -> dict[str, list[str]]:
    """{format: paths} of the same random ids of GPT-2."""
    ids = np.random.default_rng(1).integers(0, 50257, tokens, dtype=np.uint16)
    found = {name: [str(folder / file)] for name, file in (
        ("nanoGPT .bin, uint16", "train.bin"), ("llm.c .bin, uint16", "llmc.bin"), ("llm.c .bin, uint32", "wide.bin"),
        (".npy, uint16", "train.npy"))}  # fmt: skip
    ids.tofile(folder / "train.bin")
    _write_llmc(folder / "llmc.bin", LLMC_UINT16, ids)
    _write_llmc(folder / "wide.bin", LLMC_UINT32, ids)
    np.save(folder / "train.npy", ids)
    shards = [folder / f"shard_{i:06}.bin" for i in range(SHARDS)]
    for path, part in zip(shards, np.array_split(ids, SHARDS)):
        _write_llmc(path, LLMC_UINT16, part)
    return {**found, f"llm.c .bin, uint16, {SHARDS} shards": list(map(str, shards))}


def _write_llmc(path: Path, magic: int, ids: np.ndarray) -> None:
    version, dtype = LLMC_LAYOUTS[magic]
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    with path.open("wb") as file:
        header.tofile(file)
        ids.astype(dtype).tofile(file)


# ---- where batches come from ----


def loader_of(paths: list[str], batch: int, block: int, prefetch: int, order: str = "shuffle") -> Loader:
    source = TokenSource(paths)
    drawn = ShuffleOrder(source, block, seed=1)
    chosen = drawn if order == "shuffle" else NanogptOrder(source, block, torch.Generator().manual_seed(1))
    return Loader(chosen, batch_size=batch, accumulation=1, vocab_size=VOCAB, prefetch=prefetch)


def _serve(paths: list[str], batch: int, block: int, ring: list[torch.Tensor], empty, ready) -> None:
    with loader_of(paths, batch, block, prefetch=0) as loader:
        while (slot := empty.get()) is not None:
            ring[slot].copy_(next(loader))
            ready.put(slot)


class ProcessLoader:
    """The same batches from a spawned process, through shared memory; a batch is valid until the next next()."""

    def __init__(self, paths: list[str], batch: int, block: int):
        spawn = multiprocessing.get_context("spawn")
        self._ring = [torch.empty(1, batch, block + 1, dtype=torch.uint16).share_memory_() for _ in range(RING)]
        self._empty, self._ready, self._held = spawn.SimpleQueue(), spawn.SimpleQueue(), RING - 1
        for slot in range(RING - 1):
            self._empty.put(slot)
        self._process = spawn.Process(
            target=_serve, args=(paths, batch, block, self._ring, self._empty, self._ready), daemon=True
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


# ---- time ----


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
    while (began := time.perf_counter()) < end or not whole:
        batch = next(source)
        fetched = time.perf_counter()
        work(batch)
        whole.append(time.perf_counter() - began)
        fetch.append(fetched - began)
    return statistics.median(whole) * 1e6, statistics.median(fetch) * 1e6


def summary(values: list[float], name: str) -> dict[str, float]:
    """{name, name_q1, name_q3}"""
    found = harness.summary(values)
    return {name: found["ms"], f"{name}_q1": found["q1"], f"{name}_q3": found["q3"]}


def workers(paths: list[str], batch: int, block: int, step: Callable, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each place to read in."""
    sources: dict[str, Source] = {
        "none": loader_of(paths, batch, block, prefetch=0),
        "thread": loader_of(paths, batch, block, prefetch=2),
        "process": ProcessLoader(paths, batch, block),
    }
    fixed = itertools.repeat(next(sources["none"]).clone())
    figures: dict[str, list[tuple[float, ...]]] = {name: [] for name in sources}
    for turn in range(args.rounds):
        for name in rotated(list(sources), turn):
            floor, _ = timed(fixed, step, args.seconds)
            whole, fetch = timed(sources[name], step, args.seconds)
            alone, _ = timed(sources[name], lambda _: None, args.seconds)
            figures[name].append((alone, fetch, whole - floor, floor))
    rows = []
    for name, source in sources.items():
        alone, fetch, added, floor = (list(values) for values in zip(*figures[name]))
        row = {"worker": name, "batch_size": batch, "block_size": block, **summary(alone, "us_batch")}
        row |= {**summary(fetch, "wait_us"), **summary(added, "added_us"), "step_us": statistics.median(floor)}
        rows.append({**row, "tokens_per_s": batch * block / row["us_batch"] * 1e6})
        source.close()
    return rows


def fed(sources: dict[str, Source], shape: tuple[int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each source: alone, and beside a consumer that sleeps as long as it would compute."""
    batch, block = shape
    period = batch * block / args.consumer
    figures: dict[str, list[tuple[float, ...]]] = {name: [] for name in sources}
    for turn in range(args.rounds):
        for name in rotated(list(sources), turn):
            alone, _ = timed(sources[name], lambda _: None, args.seconds)
            _, fetch = timed(sources[name], lambda _: time.sleep(period), max(args.seconds, 3 * period))
            figures[name].append((alone, fetch))
    rows = []
    for name, source in sources.items():
        alone, fetch = (list(values) for values in zip(*figures[name]))
        row = {"batch_size": batch, "block_size": block, **summary(alone, "us_batch"), **summary(fetch, "wait_us")}
        row |= {"consumer_tokens_per_s": args.consumer, "data_wait": row["wait_us"] / (row["wait_us"] + period * 1e6)}
        rows.append({"name": name, **row, "tokens_per_s": batch * block / row["us_batch"] * 1e6})
        source.close()
    return rows


# ---- the run ----


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.4, help="of one slice")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--consumer", type=float, default=700e3, help="tokens/s of the simulated trainer")
    parser.add_argument("--work_rows", type=int, default=768, help="tokens that the training-like step works on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's")
    parser.add_argument("--quick", action="store_true", help="one batch shape, slices of 0.15 s, 3 rounds")
    parser.add_argument("--tiny", action="store_true", help="next to nothing: to see that this runs")
    parser.add_argument("--out", type=Path, help="append to DIR/loader.jsonl")
    args = parser.parse_args(argv)
    if args.quick or args.tiny:
        args.seconds, args.rounds = (0.001, 1) if args.tiny else (0.15, 3)
    shapes = [GPT2] if args.quick else [(2, 64)] if args.tiny else SHAPES
    fed_shape = shapes[-1]
    torch.set_num_threads(args.threads)
    facts = {**machine.machine_facts("cpu"), "threads": args.threads, "rounds": args.rounds}
    lines = machine.Lines(args.out and args.out / "loader.jsonl", bench="loader", status="ok", **facts)
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), TOKENS // (256 if args.tiny else 4 if args.quick else 1))
        step, plain = training_step(args.work_rows), next(iter(files))
        rows = []
        for shape in shapes:
            rows += workers(files[plain], *shape, step, args)
        for row in rows:
            lines.write(table="worker", format=plain, order="shuffle", **row)
        show("where batches are read, beside a step on the CPU", rows, "worker", "added_us", "step_us")
        by_format = fed(
            {name: loader_of(paths, *fed_shape, prefetch=2) for name, paths in files.items()}, fed_shape, args
        )
        for row in by_format:
            lines.write(table="format", order="shuffle", worker="thread", format=row.pop("name"), **row)
        by_order = fed({o: loader_of(files[plain], *fed_shape, 2, o) for o in ("shuffle", "nanogpt")}, fed_shape, args)
        for row in by_order:
            lines.write(table="order", format=plain, worker="thread", order=row.pop("name"), **row)
        labelled = [{"file": name, **row} for name, row in zip(files, by_format)]
        labelled += [{"file": f"order {name}", **row} for name, row in zip(("shuffle", "nanogpt"), by_order)]
        show(f"by the thread, beside a consumer of {args.consumer:,.0f} tokens/s", labelled, "file", "data_wait")
    return 0


def show(title: str, rows: list[dict[str, Any]], first: str, *more: str) -> None:
    cells = []
    for row in rows:
        rest = (f"{row[key]:.3%}" if key == "data_wait" else row[key] for key in more)
        shape, rate = f"{row['batch_size']}x{row['block_size']}", row["tokens_per_s"] / 1e6
        cells.append([row[first], shape, row["us_batch"], rate, row["wait_us"], *rest])
    print(f"{title}\n{machine.table([first, 'batch', 'us alone', 'M tokens/s', 'us in next()', *more], cells)}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
