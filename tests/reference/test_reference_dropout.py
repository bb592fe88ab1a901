"""Dropout's random numbers: Philox4x32-10 to the published vectors, and the masks made from them."""

import math
from typing import Any

import pytest
import torch
from nanogpt_kernels import reference

MASK32 = 0xFFFFFFFF


def philox_in_python(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python integers, written from the paper, its round and its key schedule apart."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


# Random123's known-answer tests for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_python_philox_gives_the_published_words(counter: str, key: str, result: str):
    """Counter word 3 is always 0 in ours, so the vectors hold this model of it, and this holds ours below."""
    assert philox_in_python(words(counter), words(key)) == words(result)  # type: ignore[arg-type]


def test_philox_of_zeros_is_the_published_vector():
    got = reference.philox(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 0)
    assert [int(w) for w in got] == list(words(KNOWN_ANSWERS[0][2]))


@pytest.mark.parametrize("seed", [0, 1, (2**31 - 1) << 32, 0x299F31D0A4093822, 2**63 - 1, -1], ids=hex)
@pytest.mark.parametrize("site", [0, 1, 37, 2**32 - 1])
def test_philox_is_philox(seed: int, site: int):
    """Group numbers past 2^32 use the second counter word; -1 is the key of all ones."""
    groups = [0, 1, 5, 2**31, 2**32 - 1, 2**32, 0x85A308D3243F6A88 & (2**63 - 1)]
    got = torch.stack(reference.philox(torch.tensor([seed]), torch.tensor(groups), site), -1)
    want = [philox_in_python((g & MASK32, g >> 32, site, 0), (seed & MASK32, (seed >> 32) & MASK32)) for g in groups]
    assert got.tolist() == [list(w) for w in want]


@pytest.mark.parametrize("shape", [(3, 1), (3, 2), (5, 3), (2, 4), (3, 5), (2, 3, 7), (2, 2, 3, 9), (8,)], ids=str)
def test_mask_follows_the_documented_counter(shape: tuple[int, ...]):
    """Widths that are no multiple of 4 begin each row at a fresh group; higher dimensions are rows."""
    p, seed, site, N = 0.3, 77, 5, shape[-1]
    mask = reference.dropout_mask(shape, p, torch.tensor([seed]), site).reshape(-1, N)
    for m in range(mask.size(0)):
        for n in range(N):
            group = m * math.ceil(N / 4) + n // 4
            word = philox_in_python((group & MASK32, group >> 32, site, 0), (seed, 0))[n % 4]
            assert bool(mask[m, n]) == (word >= math.floor(p * 2**32)), (m, n)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_keep_rate(p: float):
    n = 400_000
    kept = reference.dropout_mask((400, 1000), p, torch.tensor([3]), 1).sum().item()
    assert abs(kept - n * (1 - p)) < 5 * math.sqrt(n * p * (1 - p))


NEIGHBOURS = [
    ("seed", dict(seed=torch.tensor([12])), dict(seed=torch.tensor([13]))),
    ("high half of the seed", dict(seed=torch.tensor([12])), dict(seed=torch.tensor([12 + 2**32]))),
    ("site", dict(site=4), dict(site=5)),
]


@pytest.mark.parametrize(("first", "second"), [n[1:] for n in NEIGHBOURS], ids=[n[0] for n in NEIGHBOURS])
def test_masks_of_neighbours_are_independent(first: dict, second: dict):
    p = 0.2
    common: dict[str, Any] = dict(seed=torch.tensor([12]), site=4)
    a, b = (reference.dropout_mask((300, 1001), p, **(common | part)) for part in (first, second))
    n, agree = a.numel(), (1 - p) ** 2 + p**2
    assert abs((a == b).sum().item() - n * agree) < 5 * math.sqrt(n * agree * (1 - agree))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 1000], ids=lambda lag: f"lag {lag}")
def test_elements_of_one_mask_are_independent(lag: int):
    p, agree = 0.5, 0.5
    mask = reference.dropout_mask((300, 1000), p, torch.tensor([9]), 0).flatten()
    n = mask.numel() - lag
    assert abs((mask[lag:] == mask[:-lag]).sum().item() - n * agree) < 5 * math.sqrt(n * agree * (1 - agree))


def test_fewer_rows_have_the_same_mask():
    """The mask does not depend on how many rows there are: a shorter batch draws a prefix."""
    seed = torch.tensor([5])
    assert torch.equal(
        reference.dropout_mask((7, 10), 0.4, seed, 2), reference.dropout_mask((20, 10), 0.4, seed, 2)[:7]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_drops_the_same_elements(dtype: torch.dtype):
    mask = reference.dropout_mask((6, 10), 0.5, torch.tensor([5]), 2)
    y = reference.dropout(torch.ones(6, 10, dtype=dtype), 0.5, torch.tensor([5]), 2)
    assert y.dtype == dtype and torch.equal(y, mask.to(dtype) * 2)


@pytest.mark.parametrize("seed", [torch.tensor([5]), torch.tensor(5)], ids=["shape [1]", "shape []"])
def test_what_is_kept_is_scaled_and_its_gradient_too(seed: torch.Tensor):
    p = 0.25
    x = torch.randn(50, 33, dtype=torch.float64, requires_grad=True)
    y, mask = reference.dropout(x, p, seed, 1), reference.dropout_mask((50, 33), p, seed, 1)
    torch.testing.assert_close(y.detach(), torch.where(mask, x.detach() / (1 - p), 0.0))
    (y * 3).sum().backward()
    torch.testing.assert_close(x.grad, mask.double() * 3 / (1 - p))


def test_dropped_elements_are_zero_even_where_they_were_not_finite():
    mask = reference.dropout_mask((4, 8), 0.5, torch.tensor([5]), 2)
    y = reference.dropout(torch.full((4, 8), torch.nan), 0.5, torch.tensor([5]), 2)
    assert torch.equal(y.isnan(), mask) and (y[~mask] == 0).all()


def test_no_dropout_is_the_identity_and_needs_no_seed():
    x = torch.randn(3, 4)
    assert reference.dropout(x, 0.0, None, 0) is x
    with pytest.raises(ValueError, match="needs a seed"):
        reference.dropout(x, 0.1, None, 0)
