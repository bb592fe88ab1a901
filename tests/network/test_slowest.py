"""network/slowest.py on made-up figures: who measures with whom, and what is blamed for what."""

from itertools import combinations

import pytest

from nanogpt_fast.network.slowest import Link, blame, bus_factor, rounds, slow_ranks, usual, verdicts

SIZE = 1_000_000
NODES = {"2x2": [[0, 1], [2, 3]], "4x1": [[0], [1], [2], [3]], "3x2": [[0, 1], [2, 3], [4, 5]], "1x4": [[0, 1, 2, 3]]}


def node_of(nodes: list[list[int]]) -> list[int]:
    return [node for rank in range(sum(map(len, nodes))) for node, own in enumerate(nodes) if rank in own]


def links(nodes: list[list[int]], slow: dict[tuple[int, int], float], late: float = 0.0) -> list[Link]:
    """All links, 10 GB/s inside a node and 1 GB/s between nodes, those in `slow` so many times as slow, or as late."""
    at, found = node_of(nodes), []
    for a, b in combinations(range(len(at)), 2):
        for pair in ((a, b), (b, a)):
            seconds = 1e-4 if at[a] == at[b] else 1e-3
            times = slow.get(pair, 1.0)
            latency = 1e-5 + (late if pair in slow else 0.0)
            found.append(Link(*pair, seconds * (1 if late else times), latency, SIZE))
    return found


def named(shape: str, slow: set[tuple[int, int]], times: float = 10.0, **more: float) -> list[str]:
    nodes = NODES[shape]
    return [f.what for f in blame(links(nodes, dict.fromkeys(slow, times), **more), node_of(nodes), 3.0)]


def of(rank: int, count: int) -> set[tuple[int, int]]:
    """All links of a rank among so many."""
    return {pair for other in range(count) if other != rank for pair in ((rank, other), (other, rank))}


def test_bus_factor_is_that_of_nccl_tests():
    """doc/PERFORMANCE.md there: an all-reduce of n ranks moves 2 (n - 1) / n of its bytes over each link."""
    assert bus_factor(1) == 0 and bus_factor(2) == 1 and bus_factor(4) == 1.5 and bus_factor(8) == 1.75


@pytest.mark.parametrize("nodes", [*NODES.values(), [[0, 1, 2], [3], [4, 5]], [[0]], [[0, 2], [1, 3]]], ids=str)
def test_every_two_ranks_meet_once_and_none_is_in_two_places(nodes: list[list[int]]):
    plan, count = rounds(nodes), sum(map(len, nodes))
    met = [frozenset(pair) for pairs in plan for pair in pairs]
    assert sorted(map(sorted, met)) == sorted(map(list, combinations(range(count), 2)))
    for pairs in plan:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))


def test_each_round_is_inside_nodes_or_between_them_with_all_ranks_of_both():
    at = node_of(NODES["3x2"])
    for pairs in rounds(NODES["3x2"]):
        crossing = [at[a] != at[b] for a, b in pairs]
        assert all(crossing) or not any(crossing)
        between = [(at[a], at[b]) for a, b in pairs if at[a] != at[b]]
        assert all(between.count(way) == 2 for way in between), "their figures share a card in the same way"


@pytest.mark.parametrize("shape", NODES)
def test_nothing_is_blamed_where_links_are_alike(shape: str):
    """Also not the links between nodes for being ten times as slow as those inside."""
    assert named(shape, set()) == []
    assert named(shape, {(0, 1)}, times=2.9) == []


CASES = [  # shape, the slow links, what is to be read
    ("1x4", {(0, 2)}, ["the link rank 0 (node 0) -> rank 2 (node 0) is slow"]),
    ("1x4", {(0, 2), (2, 0)}, ["the link rank 0 (node 0) <-> rank 2 (node 0) is slow"]),
    ("1x4", of(3, 4), ["rank 3 (node 0) is slow in itself, all its links are"]),
    ("2x2", {(2, 0), (2, 1), (3, 0), (3, 1)}, ["the link node 1 -> node 0 is slow"]),
    ("2x2", {(1, 2)}, ["the link rank 1 (node 0) -> rank 2 (node 1) is slow"]),
    ("2x2", {(1, 2), (2, 1), (1, 3), (3, 1)}, ["rank 1 (node 0) is slow to and from every other node"]),
    ("4x1", of(2, 4), ["node 2 is slow to and from every other node"]),
    ("4x1", {(2, 0), (2, 1), (2, 3)}, ["node 2 is slow to every other node"]),
    ("4x1", {(0, 2), (1, 2), (3, 2)}, ["node 2 is slow from every other node"]),
    ("4x1", {(1, 3), (3, 1)}, ["the link rank 1 (node 1) <-> rank 3 (node 3) is slow"]),
    ("3x2", {(a, b) for a in (0, 1) for b in (4, 5)}, ["the link node 0 -> node 2 is slow"]),
    ("3x2", {p for a in (0, 1) for b in (4, 5) for p in ((a, b), (b, a))}, ["the link node 0 <-> node 2 is slow"]),
    ("3x2", {p for a in (4, 5) for b in range(4) for p in ((a, b), (b, a))},
     ["node 2 is slow to and from every other node"]),
    ("3x2", {(0, 1), (1, 0), (2, 4)},
     ["the link rank 0 (node 0) <-> rank 1 (node 0) is slow", "the link rank 2 (node 1) -> rank 4 (node 2) is slow"]),
]  # fmt: skip


def case_name(value: object) -> str:
    """The same in every process: a set's own order is not, where one compiled the file and another loaded it."""
    return str(sorted(value) if isinstance(value, set) else value)[:40]


@pytest.mark.parametrize(("shape", "slow", "expected"), CASES, ids=case_name)
def test_what_is_slow_is_named_as_largely_as_it_is(shape: str, slow: set[tuple[int, int]], expected: list[str]):
    assert named(shape, slow) == expected


def test_of_three_nodes_one_bad_card_is_found_though_most_links_are_slow():
    nodes = [[0], [1], [2]]
    found = blame(links(nodes, dict.fromkeys(of(1, 3), 20.0)), node_of(nodes), 3.0)
    assert [f.what for f in found] == ["node 1 is slow to and from every other node"]
    assert "20.0 times as slow as usual (0.05 GB/s, usual is 1 GB/s)" in found[0].why


def test_a_link_that_is_late_but_carries_enough():
    assert named("1x4", {(0, 2), (2, 0)}, late=0.02) == ["the link rank 0 (node 0) <-> rank 2 (node 0) is slow"]
    (found,) = blame(links(NODES["1x4"], {(0, 2): 1.0, (2, 0): 1.0}, late=0.02), [0] * 4, 3.0)
    assert found.why.startswith("20.01 ms a message")
    assert named("1x4", {(0, 2)}, late=5e-4) == [], "half a millisecond is nobody's fault"


def test_what_a_busy_host_may_cost_is_no_ones_fault():
    slow = links(NODES["1x4"], {(0, 2): 50.0})
    assert blame(slow, [0] * 4, 3.0) and not blame(slow, [0] * 4, 3.0, busy=0.01)
    assert verdicts(slow, [0] * 4, 0.01)[0, 2].times == 1.0


def test_a_rank_that_computes_slowly_is_told_apart_from_its_links():
    at = [0] * 4
    slow = slow_ranks([1e-3, 1.1e-3, 1e-3, 5e-3], at, 3.0)
    assert [f.what for f in slow.values()] == ["rank 3 (node 0) is slow in itself"]
    assert "5.0 times" in slow[3].why
    assert not blame(links(NODES["1x4"], dict.fromkeys(of(3, 4), 5.0)), at, 3.0, known=slow), "no word of its links"


def test_the_usual_is_the_lower_quartile():
    assert usual([5.0]) == 5.0 and usual([2.0, 1.0]) == 1.0
    assert usual([1.0, 9.0, 9.0, 9.0, 9.0]) == 9.0 and usual([1.0, 1.0, 9.0, 9.0, 9.0, 9.0]) == 1.0
