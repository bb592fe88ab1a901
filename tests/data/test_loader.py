"""The loader: what each rank sees and in which order, resuming, failures that must not hang."""

import os
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from nanogpt_fast.data import loader as data_module
from nanogpt_fast.data.loader import Loader
from nanogpt_fast.data.orders import NanogptOrder, ShuffleOrder
from nanogpt_fast.data.tokens import TokenSource
from nanogpt_fast.errors import DataError
from nanogpt_fast.schedule import BatchSchedule

T, B = 8, 3


@pytest.fixture(autouse=True)
def short_plans(monkeypatch):
    """Plan a few steps at a time, so that these short runs cross from one plan to the next."""
    monkeypatch.setattr(data_module, "PLAN_ROWS", 30)


def write(folder, count=3000, name="train.bin", dtype="<u2") -> str:
    """Tokens that are their own positions."""
    path = str(folder / name)
    np.save(path, np.arange(count).astype(dtype)) if name.endswith("npy") else np.arange(count).astype(dtype).tofile(
        path
    )
    return path


def shuffled(path, **options: Any) -> Loader:
    options = {"batch_size": B, "accumulation": 4, "vocab_size": 65536, **options}
    return Loader(ShuffleOrder(TokenSource([path]), T, seed=1337), **options)


def take(loader, count) -> list[list]:
    with loader:
        return [next(loader).tolist() for _ in range(count)]


def test_batches_are_the_order_s_windows(tmp_path):
    path = write(tmp_path)
    order = ShuffleOrder(TokenSource([path]), T, seed=1337)
    with shuffled(path) as loader:
        for step in range(5):
            batch = next(loader)
            assert batch.shape == (4, B, T + 1) and batch.dtype == torch.uint16
            _, starts = order.windows(np.arange(12) + 12 * step)
            np.testing.assert_array_equal(batch.numpy().reshape(12, T + 1), starts[:, None] + np.arange(T + 1))


def test_four_byte_tokens_come_as_int32(tmp_path):
    with shuffled(write(tmp_path, name="train.npy", dtype="<u4")) as loader:
        assert next(loader).dtype == torch.int32


@pytest.mark.parametrize("prefetch", [0, 1, 2, 7])
def test_prefetch_changes_nothing(tmp_path, prefetch):
    path = write(tmp_path)
    assert take(shuffled(path, prefetch=prefetch), 40) == take(shuffled(path, prefetch=3), 40)


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_sees_one_order(tmp_path, world_size):
    path, steps = write(tmp_path), 40  # past an epoch of 374 samples, 12 a step
    alone = take(shuffled(path), steps)
    ranks = [take(shuffled(path, rank=r, world_size=world_size), steps) for r in range(world_size)]
    assert [sum(parts, []) for parts in zip(*ranks)] == alone
    with shuffled(path, rank=world_size - 1, world_size=world_size) as loader:
        next(loader)
        assert loader.samples_seen == 12, "of all ranks: any number of them goes on there"


@pytest.mark.parametrize("stop", [1, 7, 31, 32])
def test_resume_continues_the_order(tmp_path, stop):
    path = write(tmp_path)
    straight = take(shuffled(path), 60)
    with shuffled(path) as loader:
        for _ in range(stop):
            next(loader)
        time.sleep(0.01)  # the worker is ahead now: what it read must not count
        seen = loader.samples_seen
    assert seen == stop * 12
    resumed = shuffled(path, start_sample=seen)
    assert resumed.samples_seen == seen
    assert take(resumed, 60 - stop) == straight[stop:]


# ---- a growing batch ----

RAMP = BatchSchedule(4, 12, 20)  # 4 micro-batches, 8 from iteration 10 on, 12 from 20 on


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_growing_batch_takes_the_same_samples_in_order(tmp_path, prefetch):
    path = write(tmp_path)
    flat = [row for batch in take(shuffled(path, accumulation=1), 400) for micro in batch for row in micro]
    batches = take(shuffled(path, accumulation=RAMP.accumulation_at, prefetch=prefetch), 40)
    assert [len(batch) for batch in batches] == [4] * 10 + [8] * 10 + [12] * 20
    grown = [row for batch in batches for micro in batch for row in micro]
    assert grown == flat[: len(grown)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_sees_one_order_while_it_grows(tmp_path, world_size):
    path, steps = write(tmp_path), 30
    alone = take(shuffled(path, accumulation=RAMP.accumulation_at), steps)
    shares = dict(accumulation=RAMP.accumulation_at, world_size=world_size)
    ranks = [take(shuffled(path, rank=r, **shares), steps) for r in range(world_size)]
    assert [sum(parts, []) for parts in zip(*ranks)] == alone


@pytest.mark.parametrize("stop", [1, 9, 10, 15, 25])
def test_resume_in_the_middle_of_the_growth(tmp_path, stop):
    path = write(tmp_path)
    straight = take(shuffled(path, accumulation=RAMP.accumulation_at), 30)
    with shuffled(path, accumulation=RAMP.accumulation_at) as loader:
        for _ in range(stop):
            next(loader)
        seen = loader.samples_seen
    assert seen == RAMP.micro_batches_before(stop) * B
    resumed = shuffled(path, accumulation=RAMP.accumulation_at, start_sample=seen, start_iteration=stop)
    assert take(resumed, 30 - stop) == straight[stop:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a CUDA device")
def test_pinned_batches_survive_a_copy_that_lags_behind(tmp_path):
    path = write(tmp_path)
    expected = take(shuffled(path), 50)
    with shuffled(path, pin_memory=True) as loader:
        copies = []
        for _ in range(50):
            batch = next(loader)
            assert batch.is_pinned()
            torch.cuda._sleep(1_000_000)  # the copies queue up behind this while the worker runs ahead
            copies.append(batch.to("cuda", non_blocking=True))
            del batch
    assert [copy.cpu().tolist() for copy in copies] == expected


def test_a_held_batch_is_never_written_again(tmp_path):
    with shuffled(write(tmp_path)) as loader:
        held = [next(loader) for _ in range(20)]
        copies = [batch.clone() for batch in held]
        for _ in range(20):
            next(loader)
        assert all(torch.equal(a.int(), b.int()) for a, b in zip(held, copies))


def test_wait_is_the_time_spent_in_next(tmp_path, monkeypatch):
    read = data_module.read_windows

    def slow(*args):
        time.sleep(0.05)
        read(*args)

    monkeypatch.setattr(data_module, "read_windows", slow)
    with shuffled(write(tmp_path), prefetch=1) as loader:
        next(loader)
        assert 0.04 < loader.take_wait() < 1.0
        assert loader.take_wait() == 0.0
        time.sleep(0.2)
        next(loader)
        assert loader.take_wait() < 0.03  # it was read while we slept


# ---- nanoGPT's order ----


def nanogpt_batches(tokens: np.ndarray, accumulation_at, steps, eval_every, eval_draws):
    """What nanoGPT's loop trains on: [steps, accumulation, B, T+1], on the global generator, seeded before."""

    def get_batch():
        ix = torch.randint(len(tokens) - T, (B,))
        return [tokens[i : i + T + 1].tolist() for i in ix]

    batch, out = get_batch(), []
    for step in range(steps):
        if step % eval_every == 0:
            for _ in range(eval_draws):
                get_batch()
        out.append([])
        for _ in range(accumulation_at(step)):
            out[-1].append(batch)
            batch = get_batch()
    return out


@pytest.mark.parametrize("accumulation", [1, 2, 5, "ramp"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_nanogpt_order_is_nanogpt_s(tmp_path, accumulation, prefetch):
    path, steps, eval_every, eval_draws = write(tmp_path), 12, 4, 6
    ramp = BatchSchedule(1, 5, 10) if accumulation == "ramp" else BatchSchedule(accumulation, accumulation, 0)
    accumulation = ramp.accumulation_at if accumulation == "ramp" else accumulation
    with torch.random.fork_rng():
        torch.manual_seed(1337)
        torch.nn.Linear(4, 4)  # the initialisation draws first
        expected = nanogpt_batches(np.fromfile(path, "<u2"), ramp.accumulation_at, steps, eval_every, eval_draws)
        state_after = torch.get_rng_state()

        torch.manual_seed(1337)
        torch.nn.Linear(4, 4)
        generator = torch.default_generator
        order = NanogptOrder(TokenSource([path]), T, generator)
        with Loader(order, batch_size=B, accumulation=accumulation, vocab_size=65536, prefetch=prefetch) as loader:
            for step in range(steps):
                if step % eval_every == 0:
                    for _ in range(eval_draws):
                        torch.randint(3000 - T, (B,), generator=generator)
                assert next(loader).tolist() == expected[step]
            assert loader.samples_seen == ramp.micro_batches_before(steps) * B
        assert torch.equal(torch.get_rng_state(), state_after)


# ---- Failures ----


def drain(loader, limit=50) -> None:
    """Batches until next() raises; the test's time-out is short, so a hang fails."""
    for _ in range(limit):
        next(loader)
    pytest.fail(f"{limit} batches and no error")


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.timeout(20)
def test_id_outside_the_vocabulary(tmp_path, prefetch):
    path = write(tmp_path)
    tokens = np.fromfile(path, "<u2") % 65
    tokens[1500] = 65
    tokens.tofile(path)
    with shuffled(path, vocab_size=65, prefetch=prefetch) as loader, pytest.raises(DataError) as caught:
        drain(loader)
    error = caught.value
    assert error.where == f"{path}, token 1,500 (byte 3000)" and error.found == "65" and "65" in error.expected
    assert "tokenizer" in error.hint


def test_negative_id(tmp_path):
    path = str(tmp_path / "train.npy")
    np.save(path, np.where(np.arange(300) == 200, -1, 5).astype("<i4"))
    with shuffled(path, vocab_size=65) as loader, pytest.raises(DataError, match="outside the vocabulary"):
        drain(loader)


@pytest.mark.timeout(20)
def test_file_truncated_under_the_worker(tmp_path):
    path = write(tmp_path, 60_000)
    with shuffled(path) as loader:
        next(loader)
        os.truncate(path, 40_000)
        with pytest.raises(DataError, match="became shorter") as caught:
            drain(loader)
        with pytest.raises(DataError) as again:
            next(loader)
    assert again.value is caught.value and "--init_from=resume" in caught.value.hint


@pytest.mark.timeout(20)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_file_deleted_under_the_worker(tmp_path, monkeypatch, prefetch):
    monkeypatch.setattr(TokenSource.check_unchanged, "__defaults__", (0.0,))  # look each time
    path = write(tmp_path)
    with shuffled(path, prefetch=prefetch) as loader:
        next(loader)
        os.unlink(path)
        with pytest.raises(DataError, match="is gone"):
            drain(loader, limit=prefetch + 2)


@pytest.mark.timeout(20)
def test_batches_read_before_the_error_are_handed_out(tmp_path):
    path = write(tmp_path)
    with shuffled(path, prefetch=3) as loader:
        deadline = time.monotonic() + 5
        while loader._ready.qsize() < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        os.truncate(path, 0)
        for _ in range(3):
            next(loader)
        with pytest.raises(DataError, match="became shorter"):
            next(loader)
        assert loader.samples_seen == 3 * 12


@pytest.mark.timeout(20)
def test_worker_that_dies_silently_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(Loader, "_work", lambda self: None)
    with shuffled(write(tmp_path)) as loader, pytest.raises(DataError, match="worker stopped"):
        next(loader)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["shuffle", "nanogpt"])
def test_close_ends_the_worker(tmp_path, kind):
    source = TokenSource([write(tmp_path)])
    order = ShuffleOrder(source, T, 0) if kind == "shuffle" else NanogptOrder(source, T, torch.Generator())
    before = threading.active_count()
    loader = Loader(order, batch_size=B, accumulation=2, vocab_size=65536)
    next(loader)
    assert threading.active_count() == before + 1
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        next(loader)
