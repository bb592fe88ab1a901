"""The orders of the samples: a shuffle without replacement, and nanoGPT's draws."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_fast.data.orders import ROUNDS, NanogptOrder, ShuffleOrder, _keys, permute
from nanogpt_fast.data.tokens import TokenSource
from nanogpt_fast.errors import ConfigError, DataError


def make_source(folder, *lengths) -> TokenSource:
    """Files whose tokens are their own positions, so that a window tells where it was read."""
    paths = []
    for index, length in enumerate(lengths):
        paths.append(str(folder / f"s_train_{index}.bin"))
        np.arange(length).astype("<u2").tofile(paths[-1])
    return TokenSource(paths)


# ---- The permutation ----


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 17, 97, 100, 1009, 1024, 1025, 4096, 65537])
@pytest.mark.parametrize("epoch", [0, 1, 12345])
def test_permutation_is_a_bijection(size, epoch):
    out = permute(np.arange(size), size, _keys(1337, epoch, ROUNDS))
    np.testing.assert_array_equal(np.sort(out), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
def test_permutation_is_a_bijection_for_any_key(size, seed, epoch):
    out = permute(np.arange(size), size, _keys(seed, epoch, ROUNDS))
    np.testing.assert_array_equal(np.sort(out), np.arange(size))


def test_permutation_of_a_huge_range_stays_inside_and_is_injective():
    size = 9_035_582_198  # OpenWebText's tokens: every one a window
    position = np.concatenate([np.arange(5000), size - 1 - np.arange(5000)])
    out = permute(position, size, _keys(0, 0, ROUNDS))
    assert out.min() >= 0 and out.max() < size and len(np.unique(out)) == len(out)


@pytest.mark.parametrize("size", [100, 1024, 65537])
def test_permutation_looks_uniform(size):
    """Chi-squared over (position, image) cells, and neighbours' distances, for 40 keys; bounds are 5 sigma."""
    cells, n_keys = 10, 40
    counts, near, position = np.zeros((cells, cells)), 0, np.arange(size)
    for epoch in range(n_keys):
        out = permute(position, size, _keys(7, epoch, ROUNDS))
        np.add.at(counts, (position * cells // size, out * cells // size), 1)
        near += np.count_nonzero(np.abs(np.diff(out)) == 1)
    expected = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
    chi2, freedom = ((counts - expected) ** 2 / expected).sum(), (cells - 1) ** 2
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)
    assert near < 2 * n_keys + 5 * np.sqrt(2 * n_keys)  # 2 (size - 1) / size neighbours stay neighbours, a key


def test_small_permutations_all_occur():
    seen = {tuple(permute(np.arange(3), 3, _keys(seed, 0, ROUNDS))) for seed in range(200)}
    assert len(seen) == 6


def test_order_is_frozen():
    """A resumed run must see the order of the version that it started with: never change these numbers."""
    assert permute(np.arange(10), 10, _keys(1337, 0, ROUNDS)).tolist() == [6, 7, 5, 8, 4, 2, 1, 9, 0, 3]
    assert _keys(1337, 1, 2) == [8834218917083470737, 4125467674982112739]


# ---- Shuffle ----


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    block=st.integers(1, 32),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
)
def test_each_target_at_most_once_an_epoch_and_almost_all_at_least_once(tmp_path_factory, lengths, block, seed, epoch):
    lengths.append(block + 1 + lengths[0])  # one file at least is long enough
    source = make_source(tmp_path_factory.mktemp("shards"), *lengths)
    order = ShuffleOrder(source, block, seed)
    count = order.samples_per_epoch
    files, starts = order.windows(np.arange(count) + epoch * count)
    for index, length in enumerate(lengths):
        mine = starts[files == index]
        assert (mine >= 0).all() and (mine + block + 1 <= length).all()  # no window leaves its file
        targets = (mine[:, None] + 1 + np.arange(block)).ravel()
        assert len(np.unique(targets)) == len(targets)
        assert length <= block or length - 1 - len(targets) < 2 * block


def test_epochs_differ_in_order_and_in_cuts(tmp_path):
    order = ShuffleOrder(make_source(tmp_path, 5000, 3000), 16, seed=1337)
    count = order.samples_per_epoch
    assert count == 5000 // 16 - 1 + 3000 // 16 - 1
    epochs = [order.windows(np.arange(count) + e * count) for e in range(200)]
    assert len({tuple(np.concatenate(epoch).tolist()) for epoch in epochs}) == 200
    phases = {int(starts[files == 0].min()) for files, starts in epochs}
    assert phases == set(range(16 + 5000 % 16))
    everything = np.unique(np.concatenate([s[f == 0][:, None] + 1 + np.arange(16) for f, s in epochs]))
    assert everything.tolist() == list(range(1, 5000))  # what one epoch leaves out another brings


def test_order_is_a_pure_function_of_seed_and_index(tmp_path):
    source = make_source(tmp_path, 2000, 40, 700)
    order, indices = ShuffleOrder(source, 8, seed=5), np.array([9000, 3, 77, 3, 123456789])
    files, starts = order.windows(indices)
    for i, index in enumerate(indices):
        file, start = ShuffleOrder(source, 8, seed=5).windows(np.array([index]))
        assert (file[0], start[0]) == (files[i], starts[i])
    other = ShuffleOrder(source, 8, seed=6).windows(np.arange(100))
    assert not np.array_equal(other[1], order.windows(np.arange(100))[1])


def test_shards_too_short_for_a_window_are_passed_over(tmp_path):
    order = ShuffleOrder(make_source(tmp_path, 3, 50, 8, 9), 8, seed=0)
    files, _ = order.windows(np.arange(order.samples_per_epoch))
    assert sorted(files.tolist()) == [1] * (50 // 8 - 1) + [3]


@pytest.mark.parametrize("kind", [ShuffleOrder, NanogptOrder])
def test_too_few_tokens(tmp_path, kind):
    last: Any = torch.Generator() if kind is NanogptOrder else 0
    with pytest.raises(DataError, match="too few tokens") as caught:
        kind(make_source(tmp_path, 10), 1024, last)
    error = caught.value
    assert "1025 tokens" in error.expected and error.found == "10 tokens" and error.hint == "--block_size=9"
    kind(make_source(tmp_path, 10), 9, last)
    with pytest.raises(DataError, match="too few tokens"):  # the last target is one token further
        kind(make_source(tmp_path, 10), 10, last)


# ---- nanoGPT ----


def test_draws_are_those_of_the_global_generator(tmp_path):
    order = NanogptOrder(make_source(tmp_path, 5000), 64, torch.Generator().manual_seed(1337))
    ours = [order.draw(12) for _ in range(5)]
    state = torch.get_rng_state()
    torch.manual_seed(1337)
    theirs = [torch.randint(5000 - 64, (12,)) for _ in range(5)]
    torch.set_rng_state(state)
    for a, b in zip(ours, theirs):
        assert a.tolist() == b.tolist()


def test_nanogpt_order_reads_a_single_file(tmp_path):
    with pytest.raises(ConfigError, match="single file"):
        NanogptOrder(make_source(tmp_path, 100, 100), 8, torch.Generator())
