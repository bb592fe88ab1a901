"""Ranks train what one alone does, with all of the optimizer's state on each or a share; what they send, and when."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.ranks import Ranks

from nanogpt_fast.distributed import World
from nanogpt_fast.exchange import Exchange
from nanogpt_fast.model import GPT
from nanogpt_fast.optim import EMBEDDINGS, FlatParameters
from nanogpt_fast.settings.config import GPTConfig


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_ranks_agree(results: list[dict[str, Any]]) -> None:
    first, *others = results
    for other in others:
        for key in ("losses", "norms", "votes", "report", "steps"):
            assert other[key] == first[key], key
        assert same(other["params"], first["params"])


# ---- one run, however it is shared ----


SIZES = [(3, 6, 20), *(pytest.param(n, 24, 50, marks=pytest.mark.slow) for n in (2, 3, 4, 8))]


@functools.cache
def alone_with(ranks: Ranks, accumulation: int, iterations: int) -> dict[str, Any]:
    return ranks.run(0, "train", accumulation=accumulation, iterations=iterations)[0]


@pytest.mark.parametrize(("size", "accumulation", "iterations"), SIZES)
def test_ranks_train_what_one_does(ranks: Ranks, size: int, accumulation: int, iterations: int):
    """20 steps, slowly 50, dropout on: losses within 1e-5; zero1's bits are ddp's."""
    settings = {"accumulation": accumulation, "iterations": iterations}
    alone = alone_with(ranks, accumulation, iterations)
    ddp, zero1 = (ranks.run(size, "train", sharded=sharded, **settings) for sharded in (False, True))
    for results in (ddp, zero1):
        assert_ranks_agree(results)
        assert results[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        assert results[0]["norms"][0] == pytest.approx(alone["norms"][0], rel=1e-5)
        assert results[0]["norms"] == pytest.approx(alone["norms"], rel=1e-3)
        assert results[0]["steps"] == iterations
    assert ddp[0]["losses"] == zero1[0]["losses"] and ddp[0]["norms"] == zero1[0]["norms"]
    for kind in ("master", "m", "v"):
        assert same(ddp[0]["whole"][kind], zero1[0]["whole"][kind]), kind
        assert zero1[1]["whole"][kind] == {}, "rank 0 has it"
    assert same(ddp[0]["params"], zero1[0]["params"])
    assert zero1[0]["held"] < ddp[0]["held"] * (1 / size + 0.05)


CASES = {
    "bfloat16": {"dtype": "bfloat16"},
    "summed in bfloat16": {"dtype": "bfloat16", "reduce_dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "blocks recomputed": {"recompute": "block"},
    "one bucket of all blocks": {"bucket_mb": 25.0},
    "biases, a head of its own": {"bias": True, "tied": False},
    "one micro-batch each": {"accumulation": 3},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_share_of_the_state_trains_the_same_bits(ranks: Ranks, changes: dict[str, Any]):
    settings = {"accumulation": 6, "iterations": 4, "lr": 1e-2, **changes}
    ddp, zero1 = (ranks.run(3, "train", sharded=sharded, **settings) for sharded in (False, True))
    assert_ranks_agree(ddp)
    assert_ranks_agree(zero1)
    assert ddp[0]["losses"] == zero1[0]["losses"] and same(ddp[0]["whole"]["master"], zero1[0]["whole"]["master"])
    assert same(ddp[0]["params"], zero1[0]["params"])
    assert len(set(ddp[0]["losses"])) == 4, "it trains"


def test_sums_in_bfloat16_are_near(ranks: Ranks):
    exact, rounded = (ranks.run(2, "train", iterations=10, reduce_dtype=kind) for kind in ("float32", "bfloat16"))
    assert rounded[0]["losses"] == pytest.approx(exact[0]["losses"], abs=2e-3)
    assert rounded[0]["norms"] != exact[0]["norms"]
    assert rounded[0]["norms"] == pytest.approx(exact[0]["norms"], rel=2e-2)


def test_votes_and_reports_are_shared(ranks: Ranks):
    """Rank 0 votes to stop, the others to save."""
    results = ranks.run(3, "train", accumulation=3)
    assert all(r["votes"] == [False, True, False] for r in results)
    assert results[0]["report"]["stop"] == 1.0 and results[0]["report"]["save"] == 2.0


def test_one_rank_of_torchrun_is_alone(ranks: Ranks):
    (alone,), (one,) = ranks.run(0, "train"), ranks.run(1, "train", sharded=True)
    assert one["losses"] == alone["losses"] and same(one["params"], alone["params"])


# ---- what is sent, and when ----


def on_the_wire(calls: list[tuple[str, int]], size: int) -> float:
    """Bytes that a rank sends by the ring algorithm: Thakur, Rabenseifner and Gropp, IJHPCA 19(1), 2005."""
    passes = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
    count = {kind: sum(size for name, size in calls if name.startswith(kind)) for kind in passes}
    return sum(passes[kind] * count[kind] for kind in passes) * (size - 1) / size


@pytest.mark.parametrize(("sharded", "dtype"), [(False, "float32"), (True, "float32"), (True, "bfloat16")])
def test_no_byte_is_sent_that_need_not(ranks: Ranks, sharded: bool, dtype: str):
    """ddp: 2 (N - 1) / N of the gradient; zero1: (N - 1) / N of it and of the parameters. Vectors are summed, and so
    is one report of 32 bytes. Accumulation adds nothing."""
    size = 3
    for accumulation in (3, 9):
        found = ranks.run(size, "sent", accumulation=accumulation, dtype=dtype, sharded=sharded)[0]
        once = found["gradient"] + (found["parameters"] if sharded else found["gradient"])
        expected = (size - 1) / size * (once + 2 * (found["vectors"] + found["report"]))
        assert on_the_wire(found["calls"], size) == pytest.approx(expected, rel=1e-12)
        assert len(found["calls"]) == (5 + 5 if sharded else 5) + 2


def test_summing_in_bfloat16_halves_the_gradients_bytes(ranks: Ranks):
    found = [ranks.run(2, "sent", reduce_dtype=kind)[0] for kind in ("float32", "bfloat16")]
    small = on_the_wire([("all_reduce", found[0]["vectors"] + found[0]["report"])], 2)
    full, half = (on_the_wire(f["calls"], 2) - small for f in found)
    assert half == full / 2


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "zero1"])
def test_sums_begin_before_the_backward_pass_has_ended(ranks: Ranks, sharded: bool):
    """A trace of two micro-batches: an own head and blocks are summed in the second's backward, the rest after it."""
    events = ranks.run(2, "traced", accumulation=4, sharded=sharded, tied=False)[0]
    _, (begins, ends) = [(begin, end) for name, begin, end in events if name == "backward"]
    sums = [begin for name, begin, _ in events if name.startswith("c10d::") and "reduce" in name]
    assert len(sums) == 8, "six buckets, the vectors, the report"
    assert [begins < begin < ends for begin in sums] == [True] * 5 + [False] * 3
    ((waits, _),) = [(begin, end) for name, begin, end in events if name == "all-reduce"]
    assert ends < waits < sums[5], "the rest, and the wait for all"


def test_parameters_are_on_their_way_before_the_first_forward_pass(ranks: Ranks):
    """And not gathered again for the second micro-batch; a block waits for its own, and a head of its own."""
    events = ranks.run(2, "traced", accumulation=4, sharded=True, tied=False)[0]
    first, second = [begin for name, begin, _ in events if name == "forward"]
    gathers = [begin for name, begin, _ in events if "allgather" in name]
    assert len(gathers) == 6 and max(gathers) < first < second


# ---- the order of it, without other ranks ----


class Noted(World):
    """A rank whose collectives are noted; each is done when it is waited for."""

    def __new__(cls, *_: Any) -> "Noted":
        made = super().__new__(cls)
        object.__setattr__(made, "notes", [])
        return made

    def _started(self, name: str, *tensors: torch.Tensor, **settings: int) -> Any:
        notes: list[str] = self.notes  # type: ignore[attr-defined]
        what = f"{name} {max(len(t) for t in tensors)}"
        notes.append(what)
        return lambda: notes.append(f"{what} is waited for")


SMALL = GPTConfig(block_size=8, vocab_size=32, n_layer=3, n_head=2, n_embd=32, bias=False)


def exchange(sharded: bool = False, tied: bool = True) -> tuple[Exchange, list[str], FlatParameters]:
    world, model = Noted(1, 4, torch.device("cpu")), GPT(replace(SMALL, tie_word_embeddings=tied))
    flat = FlatParameters(model, torch.float32, world.device, world, sharded=sharded, bucket_mb=0.01)
    world.notes.clear()  # type: ignore[attr-defined]  # of how the ranks began alike
    return Exchange(flat, world), world.notes, flat  # type: ignore[attr-defined]


def test_buckets_go_as_the_backward_pass_leaves_their_blocks():
    ours, notes, flat = exchange()
    assert [b.first for b in flat.buckets] == [EMBEDDINGS, 0, 1, 2]
    ours.reduce_from(0)
    assert notes == [], "no step's last backward pass has begun"
    ours.begin()
    for block, so_far in ((2, 1), (1, 2), (1, 2), (0, 3)):
        ours.reduce_from(block)
        assert len(notes) == so_far
    ours.finish()
    lengths = [b.end - b.start for b in reversed(flat.buckets)] + [len(flat.grad[flat.vectors])]
    assert notes == [*(f"all_reduce {n}" for n in lengths), *(f"all_reduce {n} is waited for" for n in lengths)]


def test_a_head_of_its_own_goes_first():
    ours, notes, flat = exchange(tied=False)
    assert [b.first for b in flat.buckets] == [EMBEDDINGS, 0, 1, 2, 3]
    (start, end), head = flat.slices["lm_head.weight"], flat.buckets[-1]
    assert (head.start, head.end) == (start, end) and end == flat.vectors.start
    ours.begin()
    ours.reduce_from(3)
    assert notes == [f"all_reduce {end - start}"]


def test_what_goes_when_the_backward_pass_leaves_a_block_or_the_head_is_final():
    model = GPT(replace(SMALL, tie_word_embeddings=False))
    model.init_weights(torch.Generator().manual_seed(0))
    flat, left = FlatParameters(model.train(), torch.float32, torch.device("cpu"), bucket_mb=0.01), []

    def leave(block: int, _: torch.Tensor) -> None:
        left.append((block, [(b, flat.grad[b.start : b.end].clone()) for b in flat.buckets if b.first >= block]))

    model.at_block = lambda block, y: y.register_hook(functools.partial(leave, block))  # type: ignore[assignment]
    idx = torch.arange(16).view(2, 8)
    model(idx, idx + 1)[0].backward()
    assert [block for block, _ in left] == [3, 2, 1, 0]
    for block, gradients in left:
        assert len(gradients) == 4 - block
        assert all(g.any() and torch.equal(g, flat.grad[b.start : b.end]) for b, g in gradients), block


def test_a_block_waits_for_its_own_parameters():
    ours, notes, flat = exchange(sharded=True, tied=False)
    ours.gather()
    assert len(notes) == 5 and notes[0] == f"all_gather_single {flat.buckets[0].end}"
    for block, so_far in ((EMBEDDINGS, 1), (0, 2), (0, 2), (2, 4), (3, 5)):
        ours.wait_for(block)
        assert len(notes) - 5 == so_far
    ours.complete()
    assert len(notes) == 10, "they are there"
    ours.stale = True
    ours.complete()
    assert len(notes) == 20 and not ours.stale
