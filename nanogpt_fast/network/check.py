"""The order of the check: who is there, their clocks, each alone, each two, all together; then the verdict."""

import json
import time

import torch

from nanogpt_fast.distributed import resolve_device
from nanogpt_fast.errors import DeviceError, printable
from nanogpt_fast.network.identity import differences, facts_of
from nanogpt_fast.network.links import BUSY, Meter
from nanogpt_fast.network.roll_call import RollCall, SaidByRank0
from nanogpt_fast.network.slowest import Link, rounds, verdicts
from nanogpt_fast.network.tables import as_text, report_of
from nanogpt_fast.network.watch import Watch
from nanogpt_fast.privacy import private

AGAIN = 12  # rounds with something slow in them that are measured a second time


def check(device: str, *, seconds: float, slow: float, timeout: float, expect: float, as_json: bool) -> int:
    """Rank 0 prints; every rank returns 0, or 5 where something is wrong."""
    call = RollCall.of_environment(timeout)
    own = _own_device(resolve_device(device), call.local_rank)
    try:
        call.sign_in(facts_of(own))
        _must_agree(call)
        report = _measure(call, own, seconds, slow, expect)
    except SaidByRank0 as error:
        return error.exit_code
    broken = bool(report["problems"]) if call.is_main else None
    code = DeviceError.exit_code if call.publish("broken", broken) else 0
    if call.is_main:
        report = private(report)
        print(json.dumps(report, indent=1) if as_json else printable(as_text(report)), flush=True)
    call.leave()
    return code


def _own_device(device: torch.device, local_rank: int) -> torch.device:
    if device.type != "cuda":
        return torch.device("cpu")
    device = resolve_device(f"cuda:{local_rank}")
    torch.cuda.set_device(device)
    return device


def _must_agree(call: RollCall) -> None:
    """Different NCCLs or torches may wait for each other for ever: then nothing is measured."""
    problems, _ = differences(call.facts, call.node_of)
    if problems:
        call.leave()
        raise (DeviceError if call.is_main else SaidByRank0)(
            "the ranks do not run the same software",
            where="; ".join(problems),
            expected="one version of each on all ranks",
            hint="install the same on every node (pip install -c constraints.txt), then run it again",
        )


def _measure(call: RollCall, device: torch.device, seconds: float, slow: float, expect: float) -> dict:
    began = time.monotonic()
    plan = rounds(call.nodes())
    with Watch(call) as watch:
        watch.at("comparing clocks")
        clocks = call.clocks()
        meter = Meter(call, device, watch)
        work = call.gather("work", meter.work())
        own, done = meter.links(plan, began + seconds / 2)
        first = [Link(*link) for links in call.gather("links", own) for link in links]
        watch.at("choosing what to measure again")
        again = call.publish("again", _slow_rounds(first, plan[:done], call.node_of, slow, BUSY[meter.kind]))
        own, _ = meter.links([plan[index] for index in again], began + 0.75 * seconds)
        second = [Link(*link) for links in call.gather("links again", own) for link in links]
        all_reduces = meter.all_reduces(began + seconds)
        watch.at("the end")
        meter.close()
    if not call.is_main:
        return {"problems": []}
    links = _quicker(first, second)
    return report_of(
        call, meter.kind, work=work, clocks=clocks, links=links, rounds=(done, len(plan)), all_reduces=all_reduces,
        slow=slow, expect=expect,
    )  # fmt: skip


def _slow_rounds(
    links: list[Link], plan: list[list[tuple[int, int]]], node_of: list[int], slow: float, busy: float
) -> list[int]:
    """The rounds to repeat, in the company in which they were measured: alone, a link would have a shared card for
    itself. A moment's disturbance is then gone, a bad cable is not."""
    bad = {frozenset(pair) for pair, verdict in verdicts(links, node_of, busy).items() if verdict.times > slow}
    return [index for index, pairs in enumerate(plan) if any(frozenset(pair) in bad for pair in pairs)][:AGAIN]


def _quicker(first: list[Link], second: list[Link]) -> list[Link]:
    """Of a link that was measured twice, the better figures."""
    found = {(link.source, link.target): link for link in first}
    for link in second:
        old = found[link.source, link.target]
        found[link.source, link.target] = link._replace(
            seconds=min(link.seconds, old.seconds), latency=min(link.latency, old.latency)
        )
    return list(found.values())
