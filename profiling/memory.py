"""Who holds the memory of a training step: a timeline by kind, and the holders at its peak by kind, op and layer.

    python profiling/memory.py --config shakespeare_char_cpu [--steps 3] [--out DIR] [--flag=value ...]

Everything is counted from before the model is built, so the table adds up to what is allocated. Allocations come from
torch.profiler's memory events; a block is named by what it is (parameters, gradients, optimizer: by address) or by the
range of ours that it was allocated in. DIR gets memory.png and holders.json, and on CUDA snapshot.pickle for
https://pytorch.org/memory_viz. CUDA's side has not run on a GPU.
"""

import argparse
import contextlib
import gzip
import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import built_step
import torch
from torch.profiler import ProfilerActivity, profile

from nanogpt_fast.command import run_command
from nanogpt_fast.distributed import resolve_device
from nanogpt_fast.errors import DataError, DeviceError
from nanogpt_fast.memory import peak, plan_of
from nanogpt_fast.run import ranges, trace_events, tracing
from nanogpt_fast.run.trace_events import OPS, Event, Places, nest, split_name
from nanogpt_fast.settings.cli import load_config

KINDS: tuple[str, ...] = ("parameters", "gradients", "optimizer", "activations", "backward", "update", "other")
COLORS = ("#3b6ea5", "#7aa6c2", "#a9c5a0", "#e08a3c", "#c0504d", "#8064a2", "#999999")
DEVICE_TYPE = {"cpu": 0, "cuda": 1}  # of a memory event: c10's numbers


@dataclass(frozen=True)
class Holder:
    """Who holds a block: its kind, the op and the layer ("" where there is none)."""

    kind: str
    op: str = ""
    layer: str = ""


@dataclass(frozen=True)
class Change:
    """Bytes that are allocated (or freed, then negative) at an address; time in microseconds."""

    time: float
    address: int
    bytes: int
    total: int  # allocated then, as the allocator counts, since before the first
    holder: Holder


@dataclass(frozen=True)
class Timeline:
    """Bytes held by each kind after each change, and every holder's at the peak."""

    times: list[float]
    held: dict[str, list[int]]
    peak: int
    peak_total: int  # at that moment, by the allocator's own count
    holders: dict[Holder, int]


def changes(records: Iterable[dict[str, Any]], device_type: int, persistent: dict[int, str]) -> list[Change]:
    """The memory events of a trace's `traceEvents`, each with its holder. persistent: {address: kind}."""
    records = list(records)
    tree = nest(trace_events.parse(records))
    where = Places(tree)
    tracks: dict[str, list[Event]] = defaultdict(list)
    for event in tree:
        tracks[event.track].append(event)
    starts = {track: [e.start for e in events] for track, events in tracks.items()}
    found, holders, before = [], {}, None
    for record in sorted((r for r in records if r.get("name") == "[memory]"), key=lambda r: r["args"].get("Ev Idx", 0)):
        args, track = record["args"], f"{record['pid']}/{record['tid']}"
        if args["Device Type"] != device_type:
            continue
        size, address = int(args["Bytes"]), int(args["Addr"])
        if before is None:  # what an earlier trace of this process has left in the count
            before = int(args["Total Allocated"]) - size
        if size > 0:
            at = bisect_right(starts.get(track, []), record["ts"]) - 1
            event = next((e for e in tracks[track][at].around() if e.end >= record["ts"]), None) if at >= 0 else None
            known = persistent.get(address)
            holders[address] = Holder(known) if known else _holder(*where.place(event))
        holder = holders.get(address, Holder("other"))
        found.append(Change(float(record["ts"]), address, size, int(args["Total Allocated"]) - before, holder))
    return found


def _holder(place: str, backward: bool) -> Holder:
    layer, op = split_name(place)
    if backward:
        return Holder("backward", op if op in OPS else "", layer)
    if op in OPS or op == ranges.FORWARD:
        return Holder("activations", op if op in OPS else "", layer)
    return Holder("update" if op in (ranges.GRAD_NORM, ranges.UPDATE) else "other")


def timeline(found: Iterable[Change]) -> Timeline:
    """The changes added up. DataError where there is none."""
    times: list[float] = []
    held: dict[str, list[int]] = {kind: [] for kind in KINDS}
    now: dict[str, int] = dict.fromkeys(KINDS, 0)
    live: dict[int, Change] = {}
    at_peak: dict[int, Change] = {}
    peak, peak_total = -1, 0
    for change in found:
        if change.bytes > 0:
            live[change.address] = change
            now[change.holder.kind] += change.bytes
        elif (block := live.pop(change.address, None)) is not None:
            now[block.holder.kind] -= block.bytes
        times.append(change.time)
        for kind in KINDS:
            held[kind].append(now[kind])
        if (total := sum(now.values())) > peak:
            peak, peak_total, at_peak = total, change.total, dict(live)
    if not times:
        raise DataError("the trace holds no memory events", expected="profile_memory=True, and a step that allocates")
    holders: dict[Holder, int] = defaultdict(int)
    for block in at_peak.values():
        holders[block.holder] += block.bytes
    return Timeline(times, held, peak, peak_total, dict(holders))


def table(line: Timeline) -> str:
    """Holders at the peak: kinds, then activations and the backward's blocks by op, layers added up."""
    kinds: dict[str, int] = defaultdict(int)
    ops: dict[tuple[str, str], list[int]] = defaultdict(list)
    for holder, size in line.holders.items():
        kinds[holder.kind] += size
        if holder.op:
            ops[holder.kind, holder.op].append(size)
    rows = [f"{'held at the peak':<34}{'MB':>10}{'share':>8}"]
    for kind in sorted(kinds, key=lambda kind: -kinds[kind]):
        rows.append(f"{kind:<34}{kinds[kind] / 1e6:>10.2f}{kinds[kind] / line.peak:>8.1%}")
        for (of, op), sizes in sorted(ops.items(), key=lambda row: -sum(row[1])):
            if of == kind:
                layers = f" ({len(sizes)} layers)" if len(sizes) > 1 else ""
                rows.append(f"  {op + layers:<32}{sum(sizes) / 1e6:>10.2f}{sum(sizes) / line.peak:>8.1%}")
    rows.append(f"{'all':<34}{line.peak / 1e6:>10.2f}   the allocator counts {line.peak_total / 1e6:.2f}")
    return "\n".join(rows)


def as_json(line: Timeline) -> dict[str, Any]:
    holders = sorted(line.holders.items(), key=lambda row: -row[1])
    rows = [{"kind": h.kind, "op": h.op, "layer": h.layer, "bytes": size} for h, size in holders]
    return {"format": 1, "peak_bytes": line.peak, "allocator_bytes": line.peak_total, "holders": rows}


def plot(line: Timeline, path: Path, title: str) -> None:
    """The timeline, kinds stacked. ImportError without matplotlib."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in KINDS if any(line.held[kind])]
    # Each total holds until the next change: steps, for time without changes is time too.
    times = [(time - line.times[0]) / 1e3 for time in line.times for _ in (0, 1)][1:]
    bands = [[size / 1e6 for size in line.held[kind] for _ in (0, 1)][:-1] for kind in kinds]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(times, bands, labels=kinds, colors=[COLORS[KINDS.index(kind)] for kind in kinds])
    axes.axhline(line.peak / 1e6, color="#444444", linewidth=0.8, linestyle="--")
    axes.text(times[-1], line.peak / 1e6, f"peak {line.peak / 1e6:.4g} MB ", ha="right", va="bottom", fontsize=9)
    axes.set(xlim=(0, times[-1]), ylim=(0, 1.12 * line.peak / 1e6), xlabel="ms since the first allocation", ylabel="MB")
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right upper", frameon=False)
    axes.set_title(title, loc="left", fontsize=11)
    figure.savefig(path, dpi=130)


# ---- the run ----


def recorded(flags: list[str], steps: int, folder: Path) -> tuple[Timeline, built_step.BuiltStep]:
    """Build the step that the flags ask for and run it, counting from before; CUDA's snapshot goes to the folder."""
    config = load_config(flags, prog="python profiling/memory.py")
    device = resolve_device(config.system.device)
    if device.type not in DEVICE_TYPE:
        raise DeviceError(
            "torch.profiler has no memory events of this device", where=str(device), expected="cpu or cuda"
        )
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities, profile_memory=True) as profiler:
        built = built_step.build(config)
        with ranges.on(model=built.step.model):
            for i in range(steps):
                with ranges.span(ranges.ITERATION):
                    built.step(built.batch, i)
        tracing.settle(device)
    if on_gpu:
        torch.cuda.memory._dump_snapshot(str(folder / "snapshot.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    optimizer, flat = built.step.optimizer, built.step.optimizer.flat
    persistent = {flat.params.data_ptr(): "parameters", flat.master.data_ptr(): "parameters"}
    persistent |= {flat.grad.data_ptr(): "gradients", optimizer.m.data_ptr(): "optimizer"}
    persistent |= {optimizer.v.data_ptr(): "optimizer"}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / tracing.TRACE
        profiler.export_chrome_trace(str(path))
        records = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return timeline(changes(records, DEVICE_TYPE[device.type], persistent)), built


def estimate(built: built_step.BuiltStep) -> int:
    """Bytes that --dry_run foretells for the same step."""
    model, device = built.step.model, built.device
    found = plan_of(built.config, model.config, model.ops, built.dtype, device)
    return sum(peak(found).values())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, help="keep memory.png, holders.json and CUDA's snapshot.pickle there")
    args, rest = parser.parse_known_args(argv)
    if args.steps < 1:
        parser.error("--steps: at least 1")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        line, built = recorded(rest, args.steps, folder)
        facts = built.facts
        print(f"{facts['device']} ({facts['device_name']}), {facts['dtype']}, {args.steps} steps")
        print(f"{table(line)}\n--dry_run foretells {estimate(built) / 1e6:.2f} MB")
        if not args.out:
            print("--out DIR keeps a plot")
            return
        (folder / "holders.json").write_text(json.dumps(as_json(line), indent=1) + "\n")
        try:
            plot(line, folder / "memory.png", f"Memory of {args.steps} steps, {facts['device']}, {facts['dtype']}")
        except ImportError:
            print("no picture: pip install 'nanogpt-fast[plot]'")
        print(f"written to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


if __name__ == "__main__":
    run_command(main)
