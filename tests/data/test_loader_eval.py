"""Evaluation batches: nanoGPT's random ones, and the whole split in order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_fast.data.loader import full_split, random_batches
from nanogpt_fast.data.tokens import TokenSource
from nanogpt_fast.errors import DataError

T, B = 8, 3


def make_source(folder, *lengths) -> TokenSource:
    """Consecutive numbers over all files: the target after token i is i + 1."""
    paths, first = [], 0
    for index, length in enumerate(lengths):
        paths.append(str(folder / f"s_val_{index}.bin"))
        np.arange(first, first + length).astype("<u2").tofile(paths[-1])
        first += length
    return TokenSource(paths)


def batches(source, iters, stack=1, seed=1337, vocab_size=65536):
    generator = torch.Generator().manual_seed(seed)
    options = {"batch_size": B, "block_size": T, "iters": iters, "vocab_size": vocab_size}
    return list(random_batches(source, generator=generator, stack=stack, **options)), generator


def test_random_batches_are_nanogpt_s(tmp_path):
    ours, generator = batches(make_source(tmp_path, 500), 4)
    tokens = np.arange(500)
    with torch.random.fork_rng():
        torch.manual_seed(1337)
        theirs = [[tokens[i : i + T + 1].tolist() for i in torch.randint(500 - T, (B,))] for _ in range(4)]
        assert torch.equal(generator.get_state(), torch.get_rng_state())
    assert [batch.tolist() for batch in ours] == [[batch] for batch in theirs]
    assert ours[0].dtype == torch.uint16


@pytest.mark.parametrize(("iters", "stack", "sizes"), [(6, 3, [3, 3]), (7, 3, [3, 3, 1]), (2, 5, [2])])
def test_stacked_batches_are_the_same_draws(tmp_path, iters, stack, sizes):
    source = make_source(tmp_path, 500)
    stacks, stacked_generator = batches(source, iters, stack)
    singles, generator = batches(source, iters)
    assert [len(s) for s in stacks] == sizes and stacks[0].shape[1:] == (B, T + 1)
    assert torch.cat(stacks).tolist() == torch.cat(singles).tolist()
    assert torch.equal(generator.get_state(), stacked_generator.get_state())


def test_random_batches_of_several_files_stay_inside_and_reach_every_window(tmp_path):
    source = make_source(tmp_path, 20, 5, 12)
    rows = torch.cat(batches(source, 300)[0]).flatten(0, 1).int()
    assert (rows.diff() == 1).all()
    assert set(rows[:, 0].tolist()) == set(range(12)) | set(range(25, 29))  # the file of 5 tokens holds no window


def test_random_batches_check_the_vocabulary_and_the_length(tmp_path):
    with pytest.raises(DataError, match="outside the vocabulary"):
        batches(make_source(tmp_path, 100), 50, vocab_size=90)
    with pytest.raises(DataError, match="too few tokens"):
        batches(make_source(tmp_path, T), 1)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4), batch=st.integers(1, 5), block=st.integers(1, 20))
def test_full_split_gives_every_target_once_in_order(tmp_path_factory, lengths, batch, block):
    lengths[0] += 1
    source = make_source(tmp_path_factory.mktemp("shards"), *lengths)
    seen, expected, first = [], [], 0
    for tokens, valid in full_split(source, batch_size=batch, block_size=block, vocab_size=300):
        assert tokens.shape == (batch, block + 1) and tokens.dtype == torch.uint16 and valid.shape == (batch,)
        for row, count in zip(tokens.tolist(), valid.tolist()):
            assert all(b == a + 1 for a, b in zip(row[:count], row[1 : count + 1]))
            assert not any(row[count + 1 :])
            seen += row[1 : count + 1]
    for length in lengths:
        expected += range(first + 1, first + length)
        first += length
    assert seen == expected


@pytest.mark.parametrize("ranks", [2, 3, 40])
def test_ranks_take_every_target_once_between_them(tmp_path: Path, ranks: int):
    """21 windows: of 40 ranks some have none."""
    source, seen = make_source(tmp_path, 130, 33), []
    for rank in range(ranks):
        for tokens, valid in full_split(source, batch_size=2, block_size=8, vocab_size=300, rank=rank, ranks=ranks):
            for row, count in zip(tokens.tolist(), valid.tolist()):
                seen += row[1 : count + 1]
    assert sorted(seen) == [*range(1, 130), *range(131, 163)]


def test_full_split_without_a_target(tmp_path):
    with pytest.raises(DataError, match="no token to predict"):
        list(full_split(make_source(tmp_path, 1, 1), batch_size=2, block_size=4, vocab_size=300))


def test_full_split_checks_the_vocabulary(tmp_path):
    with pytest.raises(DataError, match="token 99 "):
        list(full_split(make_source(tmp_path, 100), batch_size=2, block_size=16, vocab_size=99))
