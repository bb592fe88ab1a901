"""Which link, rank or node is slow: arithmetic on measured figures alone, so that it is tested on made-up ones.

A link is a direction, rank -> rank: a bad cable or a shaped port is often slow one way only. Links are compared with
their like, inside a node or between nodes. What is usual is the lower quartile of the times, not the median: of three
nodes with one bad card, four links in six are slow, and a median would be that of the slow ones.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

LATE = 1e-3  # seconds above the usual that 4 bytes must need to be called late


class Link(NamedTuple):
    """What was measured from one rank to another."""

    source: int
    target: int
    seconds: float  # a message of `size` bytes
    latency: float  # one of 4 bytes
    size: int

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.size / self.seconds


@dataclass(frozen=True)
class Finding:
    """Something slow: `what` names it, `why` has the figures; the links that it stands for."""

    kind: str  # rank, node or link
    what: str
    why: str
    links: frozenset[tuple[int, int]] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


def bus_factor(ranks: int) -> float:
    """nccl-tests' busbw / algbw of an all-reduce: each byte crosses a link 2 (n - 1) / n times."""
    return 2 * (ranks - 1) / ranks


def usual(times: Collection[float]) -> float:
    """The lower quartile: a quarter of them are at least that quick."""
    return sorted(times)[(len(times) - 1) // 4]


# ---- who measures with whom ----


def rounds(nodes: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
    """Pairs of ranks that measure at the same time, every pair once, a rank at most once a round. nodes: their ranks.

    First inside the nodes, all nodes at once. Then node by node, all ranks of the two at once, as in training: in every
    such round as many ranks share a node's card, so their figures compare. Where time is short, the last are left out:
    after the first n - 1 of n nodes' rounds every node has met every other.
    """
    inside = [list(_tournament(ranks)) for ranks in nodes]
    found = [[pair for of in inside if k < len(of) for pair in of[k]] for k in range(max(map(len, inside)))]
    width = max(map(len, nodes))
    for shift in range(width):
        for meeting in _tournament(range(len(nodes))):
            found.append([pair for a, b in meeting for pair in _across(nodes[a], nodes[b], width, shift)])
    return [pairs for pairs in found if pairs]


def _tournament(names: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Round robin by the circle method: one stays, the others move on by a seat."""
    seats: list[int | None] = [*names, *([None] if len(names) % 2 else [])]
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        yield [(a, b) for a, b in zip(seats[:half], reversed(seats[half:])) if a is not None and b is not None]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def _across(left: Sequence[int], right: Sequence[int], width: int, shift: int) -> Iterator[tuple[int, int]]:
    for i in range(min(width, len(left))):
        if (i + shift) % width < len(right):
            yield left[i], right[(i + shift) % width]


# ---- what is slow ----


class Verdict(NamedTuple):
    """How a link does beside its like."""

    times: float  # so many times as slow as usual; 1 where a busy host may have caused the difference
    late: bool  # by its latency, not by its rate
    usual: float  # seconds
    own: float


def verdicts(links: Sequence[Link], node_of: Sequence[int], busy: float) -> dict[tuple[int, int], Verdict]:
    """Each link beside those of its kind, inside a node or between nodes. busy: seconds that a busy host may cost."""
    found: dict[tuple[int, int], Verdict] = {}
    for between in (False, True):
        alike = [link for link in links if (node_of[link.source] != node_of[link.target]) == between]
        if not alike:
            continue
        rate, latency = usual([link.seconds for link in alike]), usual([link.latency for link in alike])
        for link in alike:
            by_rate = link.seconds / rate if link.seconds - rate > busy else 1.0
            by_latency = link.latency / latency if link.latency - latency > max(LATE, busy) else 1.0
            late = by_latency > by_rate
            told = (by_latency, True, latency, link.latency) if late else (by_rate, False, rate, link.seconds)
            found[link.source, link.target] = Verdict(*told)
    return found


def slow_ranks(work: Sequence[float], node_of: Sequence[int], slow: float) -> dict[int, Finding]:
    """Ranks whose own work, without any network, takes `slow` times what is usual."""
    typical, found = usual(work), {}
    for rank, seconds in enumerate(work):
        if seconds > slow * typical:
            why = f"it computes {seconds / typical:.1f} times as slowly as usual here, without any network"
            found[rank] = Finding("rank", f"rank {rank} (node {node_of[rank]}) is slow in itself", why)
    return found


def blame(
    links: Sequence[Link], node_of: Sequence[int], slow: float, busy: float = 0.0, known: Collection[int] = ()
) -> list[Finding]:
    """What to look at, largest first: a node whose links to others are all slow, a rank all of whose links are, two
    nodes' link, a single one. known: ranks that are slow in themselves, whose links say nothing more."""
    judged = {pair: v for pair, v in verdicts(links, node_of, busy).items() if not set(known).intersection(pair)}
    left = {pair for pair, verdict in judged.items() if verdict.times > slow}
    found: list[Finding] = []

    def take(kind: str, what: str, candidates: Collection[tuple[int, int]]) -> bool:
        """Whether these links, all that there are of a sort, are slow; then they are one finding."""
        mine = frozenset(candidates)
        if not mine or any(judged[pair].times <= slow for pair in mine) or not mine & left:
            return False
        left.difference_update(mine)
        found.append(Finding(kind, what, _figures([judged[pair] for pair in mine], links, mine), mine))
        return True

    def crosses(pair: tuple[int, int]) -> bool:
        return node_of[pair[0]] != node_of[pair[1]]

    between = [pair for pair in judged if crosses(pair)]
    count = len(set(node_of))
    for node in sorted(set(node_of)) if count > 2 else []:
        out = [p for p in between if node_of[p[0]] == node]
        into = [p for p in between if node_of[p[1]] == node]
        name = f"node {node}"
        if not take("node", f"{name} is slow to and from every other node", out + into):
            take("node", f"{name} is slow to every other node", out)
            take("node", f"{name} is slow from every other node", into)
    for rank in sorted({end for pair in left for end in pair}):
        own = [pair for pair in judged if rank in pair]
        name = f"rank {rank} (node {node_of[rank]})"
        peers = {end for pair in own for end in pair} - {rank}
        if len(peers) > 1 and take("rank", f"{name} is slow in itself, all its links are", own):
            continue
        own = [pair for pair in own if crosses(pair)]
        if len({end for pair in own for end in pair}) > 2 and any(not crosses((rank, peer)) for peer in peers):
            take("rank", f"{name} is slow to and from every other node", own)
    for a, b in sorted({(node_of[s], node_of[t]) for s, t in left if crosses((s, t))}):
        one, other = ([p for p in between if (node_of[p[0]], node_of[p[1]]) == way] for way in ((a, b), (b, a)))
        if len(one) > 1 and not take("link", f"the link node {a} <-> node {b} is slow", one + other):
            take("link", f"the link node {a} -> node {b} is slow", one)
    for s, t in sorted(left):
        name = f"rank {s} (node {node_of[s]}) {{}} rank {t} (node {node_of[t]})"
        if not take("link", f"the link {name.format('<->')} is slow", [(s, t), (t, s)] if (t, s) in judged else []):
            take("link", f"the link {name.format('->')} is slow", [(s, t)])
    return found


def _figures(judged: Sequence[Verdict], links: Sequence[Link], mine: Collection[tuple[int, int]]) -> str:
    worst = max(judged, key=lambda verdict: verdict.times)
    if worst.late:
        return f"{worst.own * 1e3:.2f} ms a message, {worst.times:.1f} times as long as usual ({worst.usual * 1e3:.2f})"
    size = next(link.size for link in links if (link.source, link.target) in mine)
    rates = f"{gigabytes(size / worst.own)}, usual is {gigabytes(size / worst.usual)}"
    return f"{worst.times:.1f} times as slow as usual ({rates})"


def gigabytes(rate: float) -> str:
    """Bytes a second as GB/s, three digits of them."""
    figure = rate / 1e9
    return f"{figure:.0f} GB/s" if figure >= 100 else f"{figure:.3g} GB/s"
