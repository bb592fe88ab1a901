"""The report of the ranks: JSON-ready figures, and the same for people."""

from collections.abc import Sequence
from typing import Any

from nanogpt_fast.network.identity import differences, spans
from nanogpt_fast.network.links import BUSY, PRODUCT
from nanogpt_fast.network.roll_call import RollCall
from nanogpt_fast.network.slowest import Link, blame, bus_factor, gigabytes, slow_ranks, usual, verdicts
from nanogpt_fast.settings.config import GPTConfig

CLOCK = 1.0  # seconds of difference that are worth a word: logs and files of several nodes are read side by side


def report_of(
    call: RollCall,
    kind: str,
    *,
    work: Sequence[float],
    clocks: dict[int, tuple[float, float]],
    links: Sequence[Link],
    rounds: tuple[int, int],
    all_reduces: Sequence[tuple[int, float]],
    slow: float,
    expect: float,
) -> dict[str, Any]:
    """What was measured, and what is wrong by it. rounds: done, of so many; expect: GB/s between two nodes, 0: any."""
    node_of, nodes = call.node_of, call.nodes()
    problems, notes = differences(call.facts, node_of)
    slow_alone = slow_ranks(work, node_of, slow)
    findings = [*slow_alone.values(), *blame(links, node_of, slow, BUSY[kind], slow_alone)]
    problems += map(str, findings)
    judged = verdicts(links, node_of, BUSY[kind])
    between = [link for link in links if node_of[link.source] != node_of[link.target]]
    together = min(map(len, nodes)) * between[0].size / usual([link.seconds for link in between]) if between else 0.0
    if between and together < expect * 1e9:
        problems.append(f"all ranks of two nodes together exchange {gigabytes(together)}, expected {expect:g} GB/s")
    if len(nodes) == 2:
        notes.append(
            "a single link between nodes compares with its way back alone: --expect=GB/s says what it should do"
        )
    notes += [
        f"the clock of node {node} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} node 0's"
        for node, (ahead, wrong) in clocks.items() if abs(ahead) - wrong > CLOCK
    ]  # fmt: skip
    if rounds[0] < rounds[1]:
        notes.append(f"{rounds[0]} of {rounds[1]} rounds of links were measured: --seconds allows for more")
    factor = bus_factor(call.size)
    return {
        "ranks": {"ranks": call.size, "nodes": nodes, "backend": "nccl" if kind == "cuda" else "gloo"},
        "versions": call.facts[0],
        "clocks": [{"node": node, "ahead_s": a, "within_s": within} for node, (a, within) in clocks.items()],
        "work": {"product": PRODUCT[kind], "seconds": list(work)},
        "links": [
            {"from": link.source, "to": link.target, "bytes": link.size, "seconds": link.seconds,
             "latency_s": link.latency, "times": judged[link.source, link.target].times}
            for link in links
        ],
        "all_reduce": [
            {"bytes": size, "seconds": took, "algbw": size / took / 1e9, "busbw": factor * size / took / 1e9}
            for size, took in all_reduces
        ],
        "findings": [{"kind": f.kind, "what": f.what, "why": f.why} for f in findings],
        "notes": notes,
        "problems": problems,
    }  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    """Tables, then notes and problems."""
    ranks, nodes = report["ranks"], report["ranks"]["nodes"]
    node_of = {rank: node for node, own in enumerate(nodes) for rank in own}
    lines = ["ranks"]
    lines += [f"  node {node}: {spans(own)}" for node, own in list(enumerate(nodes))[:16]]
    lines += [f"  ... {len(nodes)} nodes"] if len(nodes) > 16 else []
    lines += [f"  by {ranks['backend']}, {report['versions']['device']}", "", "versions, of rank 0"]
    facts = [(key, value) for key, value in report["versions"].items() if value != "none"]
    lines += [f"  {key:<12}  {value}" for key, value in facts if key != "device"]
    lines += ["", "clocks, beside node 0's"] if report["clocks"] else []
    for clock in report["clocks"][:16]:
        lines.append(f"  node {clock['node']:<7}  {1e3 * clock['ahead_s']:+.2f} ms, to {1e3 * clock['within_s']:.2f}")
    seconds = report["work"]["seconds"]
    worst, typical = max(range(len(seconds)), key=seconds.__getitem__), usual(seconds)
    lines += ["", f"each rank alone: a product of {report['work']['product']}", f"  usual         {_time(typical)}"]
    lines.append(f"  slowest       {_time(seconds[worst])}, {seconds[worst] / typical:.2f} times, rank {worst}")
    lines += _links(report["links"], node_of)
    lines += _all_reduces(report["all_reduce"], len(node_of))
    lines += ["", *(f"note: {line}" for line in report["notes"])] if report["notes"] else [""]
    return "\n".join(lines + ([f"PROBLEM: {line}" for line in report["problems"]] or ["no problems found"]))


def _links(links: Sequence[dict[str, Any]], node_of: dict[int, int]) -> list[str]:
    """A row for those inside nodes, one for those between."""
    lines = ["", f"from rank to rank, {_size(links[0]['bytes'])} a message"] if links else []
    for name, crosses in (("inside a node", False), ("between nodes", True)):
        alike = [link for link in links if (node_of[link["from"]] != node_of[link["to"]]) == crosses]
        if not alike:
            continue
        typical, late = usual([link["seconds"] for link in alike]), usual([link["latency_s"] for link in alike])
        worst, latest = (max(alike, key=lambda link: link[key]) for key in ("seconds", "latency_s"))
        lines += [
            f"  {name:<13}  {len(alike)} links, usual {gigabytes(worst['bytes'] / typical)}, 4 bytes in {_time(late)}",
            f"    slowest      {gigabytes(worst['bytes'] / worst['seconds'])}, {worst['seconds'] / typical:.1f} times: "
            f"{_named(worst, node_of)}",
            f"    latest       {_time(latest['latency_s'])}: {_named(latest, node_of)}",
        ]
    return lines


def _named(link: dict[str, Any], node_of: dict[int, int]) -> str:
    return " -> ".join(f"rank {rank} (node {node_of[rank]})" for rank in (link["from"], link["to"]))


def _all_reduces(rows: Sequence[dict[str, Any]], ranks: int) -> list[str]:
    """nccl-tests' columns, and what a step of GPT-2 124M would wait for."""
    if not rows:
        return []
    lines = ["", "all-reduce          time   algbw GB/s   busbw GB/s"]
    for row in rows:
        lines.append(
            f"  {_size(row['bytes']):>8}  {_time(row['seconds']):>12}  {row['algbw']:>11.3g}  {row['busbw']:>11.3g}"
        )
    gradient = 4 * GPTConfig().num_params(non_embedding=False)
    took = gradient / 1e9 / rows[-1]["algbw"]
    lines.append(
        f"  so GPT-2 124M's float32 gradients, {_size(gradient)}, take about {_time(took)}, if nothing hides them"
    )
    return lines


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:g} B"


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
