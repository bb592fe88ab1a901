"""The model of a step on many GPUs: closed forms in its limits, a small case by hand, where it bends."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import scaling
import torch
from fabrics import plain
from interconnect import Fabric, fabric
from roofline import MODELS, step_work
from scaling import GATHER, LAST, QUEUE, REPORT, Compute, Rate, Share, buckets, compute_of, play, strong_share
from scaling_published import roof_of
from scaling_table import SMALL, UPDATE, Run, table_of

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.memory import Plan, peak
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import REFERENCE
from nanogpt_fast.optim import FlatParameters
from nanogpt_fast.settings.config import GPTConfig

ROOT = Path(__file__).resolve().parents[2]
ROOF = roof_of("h100")
SMALL_GPT = GPTConfig(block_size=8, vocab_size=10, n_layer=3, n_head=1, n_embd=4, bias=False)
BLOCK, EMBEDDINGS, VECTORS, HEAD = 12 * 16, 18 * 4, 7 * 4, 10 * 4  # its elements, those of a head of its own
WORK = Compute(embed=1.0, block=2.0, head=3.0, block_backward=4.0, embed_backward=5.0, layers=3)


def run(gpu: str = "h100", model: str = "124m", batch: int = 64, accumulation: int = 8, **changes: object) -> Run:
    found = Run(gpu=gpu, shape=MODELS[model], batch=batch, accumulation=accumulation, roof=ROOF,
                rate=scaling.MEASURED, fabric=fabric("ib", gpu))  # fmt: skip
    return replace(found, **changes)


# ---- a step ----


def test_buckets_are_whole_blocks_from_the_last_to_the_first():
    assert buckets(SMALL_GPT, 4 * BLOCK / 1e6) == [range(2, 3), range(1, 2), range(0, 1)]
    assert buckets(SMALL_GPT, 4 * BLOCK / 1e6 + 1e-9) == [range(1, 3), range(0, 1)]  # what is left over is one too
    assert buckets(SMALL_GPT) == [range(0, 3)]
    assert len(buckets(MODELS["124m"])) == 12  # 28 MB each
    groups = buckets(GPTConfig(n_layer=12, n_embd=384))
    assert [i for group in groups for i in reversed(group)] == list(reversed(range(12)))
    assert [len(group) for group in groups] == [4, 4, 4]  # 7 MB each


def test_what_is_counted_is_what_the_flat_buffer_holds():
    for shape in (SMALL_GPT, replace(SMALL_GPT, bias=True, tie_word_embeddings=False)):
        named = shape.parameter_shapes()
        vectors = sum(math.prod(s) for s in named.values() if len(s) == 1)
        assert scaling.vector_elements(shape) == vectors
        assert scaling.matrix_elements(shape) == sum(math.prod(s) for s in named.values()) - vectors
    assert (scaling.embedding_elements(SMALL_GPT), scaling.vector_elements(SMALL_GPT)) == (EMBEDDINGS, VECTORS)


def test_a_small_step_by_hand():
    """Two ranks at 4 bytes/s and float32: an all-reduce of n elements takes n seconds. Backward of a block takes 4 s,
    a bucket 192 s: the first begins 4 s into the backward, and the stream is late from there."""
    step = play(WORK, 7.0, SMALL_GPT, plain(4.0), 2, micro_steps=2, bucket_mb=4 * BLOCK / 1e6)
    micro = 1 + 3 * 2 + 3 + 3 * 4 + 5
    assert step.compute == 2 * micro
    backward_ends, first = 2 * micro, micro + 1 + 6 + 3 + 4
    assert step.bare[QUEUE] == first + 3 * BLOCK - backward_ends
    assert step.bare[LAST] == EMBEDDINGS + VECTORS
    assert step.bare[REPORT] == 32 / 4 and step.bare[GATHER] == 0.0
    assert step.seconds == first + 3 * BLOCK + EMBEDDINGS + VECTORS + 8 + 7
    assert step.hidden == pytest.approx(backward_ends - first)
    half = play(WORK, 7.0, SMALL_GPT, plain(4.0), 2, 2, reduce_bytes=2, bucket_mb=4 * BLOCK / 1e6)
    assert half.bare[LAST] == EMBEDDINGS / 2 + VECTORS, "vectors stay in float32"


def test_buckets_hide_behind_the_rest_of_the_backward():
    """A bucket of 3 s behind each block's 4: none is late, and the last block's has the embedding's backward."""
    step = play(WORK, 0.0, SMALL_GPT, plain(4.0 * BLOCK / 3), 2, 1, bucket_mb=4 * BLOCK / 1e6)
    assert step.bare[QUEUE] == 0.0
    assert step.hidden == pytest.approx(3 * 3.0)
    joined = play(WORK, 0.0, SMALL_GPT, plain(4.0 * BLOCK / 3), 2, 1)  # one bucket of 9 s, behind 5 of the embedding
    assert joined.bare[QUEUE] == pytest.approx(4.0)


def test_a_head_of_its_own_goes_first():
    """As above: its gradient is there before the blocks'; its parameters come last, and its product waits for them."""
    shape, first = replace(SMALL_GPT, tie_word_embeddings=False), WORK.micro_step + 1 + 6 + 3
    step = play(WORK, 7.0, shape, plain(4.0), 2, micro_steps=2, bucket_mb=4 * BLOCK / 1e6)
    assert step.bare[QUEUE] == first + HEAD + 3 * BLOCK - 2 * WORK.micro_step
    assert step.bare[LAST] == EMBEDDINGS + VECTORS
    shared = play(WORK, 0.0, shape, plain(1.0), 2, 1, "zero1", bucket_mb=4 * BLOCK / 1e6)
    assert shared.bare[GATHER] == EMBEDDINGS + 3 * BLOCK + HEAD - (1 + 3 * 2)


def test_zero1_gathers_beside_the_first_forward_pass():
    """Two ranks at 1 byte/s: a gather of n 16-bit elements takes n seconds, half of what a float32 scatter does.
    Forward takes 1 + 3 x 2; embeddings, then blocks 0, 1, 2 arrive one after another."""
    step = play(WORK, 0.0, SMALL_GPT, plain(1.0), 2, 1, "zero1", bucket_mb=4 * BLOCK / 1e6)
    arrives = [EMBEDDINGS, *(EMBEDDINGS + BLOCK * i for i in (1, 2, 3))]
    assert step.bare[GATHER] == arrives[-1] - (1 + 2 * 2)  # block 2 waits last, behind embedding and two blocks
    assert step.bare[LAST] == 2 * EMBEDDINGS + 4 * VECTORS  # scattered, and all-reduced
    two = play(WORK, 0.0, SMALL_GPT, plain(1.0), 2, 2, "zero1", bucket_mb=4 * BLOCK / 1e6)
    assert two.seconds == step.seconds + WORK.micro_step  # the second forward pass waits for nothing
    quick = play(WORK, 0.0, SMALL_GPT, plain(1e9), 2, 1, "zero1", bucket_mb=4 * BLOCK / 1e6)
    assert quick.bare[GATHER] == pytest.approx(EMBEDDINGS / 1e9)


@pytest.mark.parametrize("parallel", ["ddp", "zero1"])
def test_limits(parallel: str):
    shape = MODELS["124m"]
    compute = compute_of(shape, 4, ROOF, Rate())
    alone = play(compute, 0.0, shape, fabric("ib", "h100"), 1, 2, parallel)
    assert alone.communication == alone.sent == 0.0 and alone.seconds == pytest.approx(alone.compute)
    free = play(compute, 0.0, shape, plain(math.inf), 64, 2, parallel)
    assert free.communication == 0.0 and free.seconds == pytest.approx(free.compute) and free.sent > 0
    nothing = play(Compute(0, 0, 0, 0, 0, 12), 0.0, shape, fabric("ib", "h100"), 64, 2, parallel)
    assert nothing.hidden == pytest.approx(0.0, abs=1e-12) and nothing.seconds == pytest.approx(nothing.communication)
    for step in (alone, free, nothing):
        assert step.seconds == pytest.approx(step.compute + step.update + sum(step.bare.values()))


@pytest.mark.parametrize("ranks", [2, 8, 1024])
def test_bytes_a_rank_sends(ranks: int):
    """ddp: 2 (N - 1)/N of the gradient. zero1: half of that for matrices and a gather of 16-bit ones; of float32 ones
    it would be the same."""
    shape, ring = MODELS["124m"], (ranks - 1) / ranks
    N, vectors = shape.num_params(non_embedding=False), scaling.vector_elements(shape)
    compute = compute_of(shape, 4, ROOF, Rate())
    sent = {p: play(compute, 0.0, shape, plain(1e9), ranks, 1, p).sent - 2 * ring * 32 for p in ("ddp", "zero1")}
    assert sent["ddp"] == pytest.approx(2 * ring * 4 * N)
    assert sent["zero1"] == pytest.approx(ring * (4 + 2) * (N - vectors) + 2 * ring * 4 * vectors)
    assert sent["zero1"] + ring * 2 * (N - vectors) == pytest.approx(sent["ddp"])
    in_half = play(compute, 0.0, shape, plain(1e9), ranks, 1, "ddp", 2).sent - 2 * ring * 32
    assert in_half == pytest.approx(ring * 4 * (N - vectors) + 2 * ring * 4 * vectors)


def test_more_bandwidth_is_never_slower_and_more_latency_never_faster():
    shape = MODELS["124m"]
    compute = compute_of(shape, 2, ROOF, Rate())
    for parallel in ("ddp", "zero1"):
        by_bandwidth = [play(compute, 0.0, shape, plain(b, 1e-6), 64, 1, parallel).seconds for b in (1e9, 1e10, 1e11)]
        assert by_bandwidth == sorted(by_bandwidth, reverse=True) and by_bandwidth[0] > by_bandwidth[-1]
        by_latency = [play(compute, 0.0, shape, plain(1e11, a), 64, 1, parallel).seconds for a in (0.0, 1e-5, 1e-3)]
        assert by_latency == sorted(by_latency) and by_latency[0] < by_latency[-1]


# ---- compute ----


def test_a_micro_step_is_the_floor_of_all_its_ops():
    works = step_work(MODELS["124m"], 8, 1, deterministic=True)
    parts = scaling.phases(works)
    assert sorted(map(id, works.values())) == sorted(id(w) for part in parts.values() for w in part)
    assert set(works) > scaling.FORWARD | scaling.HEAD and len(parts["once"]) == 1
    floors = sum(scaling.floor_of(w, ROOF)[0] for name, part in parts.items() if name != "once" for w in part)
    found = compute_of(MODELS["124m"], 8, ROOF, Rate())
    assert found.micro_step == pytest.approx(floors)
    assert 1.9 < found.block_backward / found.block < 2.6  # two products for one, attention's seven for two
    again = compute_of(MODELS["124m"], 8, ROOF, Rate(), "block")
    assert again.micro_step == pytest.approx(floors + 12 * found.block)


def test_the_measured_rate_is_what_an_h100_took():
    """Steps in a row, at each micro-batch of bench/results."""
    rows = (ROOT / "bench/results/h100/2026-11-27-3849647.jsonl").read_text().splitlines()
    for batch in (64, 32, 4):
        line = next(r for r in rows if f'"batch_size": {batch},' in r and '"how": "alone"' in r and "triton+graph" in r)
        measured = float(re.findall(r'"ms_s": ([\d.]+)', line)[0])
        found = run(batch=batch, accumulation=512 // batch).row(1, Share(batch, 512 // batch)).step.seconds
        assert found == pytest.approx(measured, rel=0.01), batch


def test_a_supposed_mfu_is_the_mfu_of_one_gpu():
    shape = MODELS["350m"]
    rate = scaling.rate_of_mfu(0.45, shape, 16, 4, ROOF)
    row = run(model="350m", batch=16, accumulation=4, rate=rate).row(1, Share(16, 4))
    assert row.mfu == pytest.approx(0.45)
    with pytest.raises(ConfigError, match=r"no step is so fast[\s\S]*at most 0\.8"):
        scaling.rate_of_mfu(0.95, shape, 16, 4, ROOF)


def test_the_update_is_a_share_of_the_matrices_in_zero1():
    shape = MODELS["1558m"]
    whole = scaling.update_seconds(shape, 8, ROOF)
    assert whole == pytest.approx(38 * shape.num_params(non_embedding=False) / 2.95e12)
    own = scaling.update_seconds(shape, 8, ROOF, "zero1")
    assert own == pytest.approx(whole * (4 + 34 / 8) / 38, rel=1e-3)
    assert scaling.update_seconds(shape, 1, ROOF, "zero1") == pytest.approx(whole)


# ---- shares, memory, where it bends ----


def test_how_ranks_share_a_batch():
    assert strong_share(12, 40, 8) == Share(12, 5)
    assert strong_share(12, 40, 16) == Share(10, 3, "--batch_size=10 --gradient_accumulation_steps=48")
    assert strong_share(12, 40, 480) == Share(1, 1, "--batch_size=1 --gradient_accumulation_steps=480")
    with pytest.raises(ConfigError, match=r"480 sequences .* 64 ranks[\s\S]*60 or 80 ranks[\s\S]*steps=64"):
        strong_share(12, 40, 64)
    with pytest.raises(ConfigError, match=r"480 or.*another batch|expected:\s+480 ranks"):
        strong_share(12, 40, 1024)
    assert scaling.weak_share(12, 40, 8) == Share(12, 5)
    with pytest.raises(ConfigError, match=r"must divide[\s\S]*multiple of 16[\s\S]*steps=48"):
        scaling.weak_share(12, 40, 16)


def test_memory_of_a_rank():
    plan = Plan(shape=SMALL_GPT, ops=REFERENCE, dtype=torch.bfloat16, residual_dtype=None, recompute="none",
                batch_size=4, micro_batches=1, device_type="cpu")  # fmt: skip
    held = {n: [scaling.rank_memory(plan, Share(2, 1), n, parallel) for parallel in scaling.PARALLEL] for n in (1, 4)}
    assert held[1][0] == held[1][1] == held[4][0] == sum(peak(replace(plan, batch_size=2)).values())
    assert held[4][1] == sum(peak(replace(plan, batch_size=2, ranks=4, parallel="zero1")).values())


@pytest.mark.parametrize("model", ["124m", "350m"])
@pytest.mark.parametrize("bucket_mb", [25.0, 60.0, 1e6])
def test_buckets_are_the_trainers(model: str, bucket_mb: float):
    shape = MODELS[model]
    with torch.device("meta"):
        network = GPT(shape, REFERENCE)
    flat = FlatParameters(network, torch.float32, torch.device("meta"), bucket_mb=bucket_mb)
    assert [b.first for b in reversed(flat.buckets)] == [*(group[0] for group in buckets(shape, bucket_mb)), -1]


WORLDS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def test_strong_scaling_bends_and_weak_scaling_holds():
    strong, weak = table_of(run(), WORLDS, "strong"), table_of(run(), WORLDS, "weak")
    found = [row.efficiency(strong.rows[0]) for row in strong.rows]
    assert found == sorted(found, reverse=True) and found[0] == 1.0 and found[-1] < 0.5
    assert strong.bend is not None and strong.bend.ranks == 32  # 28 ms of compute there, 3 of update and bare
    assert len({row.tokens for row in strong.rows}) == 1
    assert weak.bend is None and weak.rows[-1].tokens == 512 * weak.rows[0].tokens
    assert all(row.share == Share(64, 1) for row in weak.rows)  # as eight ranks share the 8 micro-batches


def test_a_slower_network_bends_earlier_and_says_bandwidth():
    slow = table_of(run(fabric=fabric("ethernet", "h100")), WORLDS, "strong")
    assert slow.bend is not None and slow.bend.ranks == 16  # the first world with two nodes
    assert slow.bend.binds(slow.rows[0]).endswith("bandwidth")
    assert all(row.binds(slow.rows[0]) == "compute" for row in slow.rows[:3])


def test_what_binds():
    """Each reason alone: a step of which everything else takes no time."""

    def bound(fast: Fabric, rate: Rate, parallel: str = "ddp", batch: int = 64, ranks: int = 64) -> str:
        of = run(batch=batch, accumulation=8 * 64 // batch, fabric=fast, rate=rate, parallel=parallel)
        first, last = of.row(1, Share(64, 8)), of.row(ranks, Share(8, 1))
        return last.binds(first)

    assert bound(plain(math.inf), Rate()) == UPDATE
    assert bound(plain(math.inf), Rate(1.0, 1e-3)) == SMALL
    assert bound(plain(1e9), Rate()) == f"{QUEUE}, bandwidth"
    assert bound(plain(1e12, 1e-4), Rate()) == f"{QUEUE}, latency"
    assert bound(plain(5e10), Rate(8.0)) == f"{LAST}, bandwidth"
    assert bound(plain(1e12, 5e-6), Rate(), "zero1") == f"{GATHER}, latency"  # forward is the shorter pass to hide in
    assert bound(plain(math.inf), Rate(1000.0)) == "compute"


def test_hours_and_energy_by_hand():
    row = run().row(8, Share(64, 1))
    hours = 1e10 / row.speed / 3600
    assert row.hours(1e10) == pytest.approx(hours)
    assert row.kwh(1e10, 1.5) == pytest.approx(hours * 8 * 0.7 * 1.5)
    assert not replace(row, memory=75 * 2**30).fits and replace(row, memory=70 * 2**30).fits
