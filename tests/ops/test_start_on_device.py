"""A first position that lies on the device, as a replayed CUDA graph needs it: embedding and cached_attention."""

from typing import Any

import pytest
import torch
from helpers.replay_ledger import Pieces
from kernel_case import DEVICE, guarded, randn
from nanogpt_kernels import contract, launch, reference
from nanogpt_kernels.contract import ContractError
from nanogpt_kernels.ops.attention import cached_attention
from nanogpt_kernels.ops.embedding import embedding
from nanogpt_kernels.registry import OPS
from parity import assert_parity
from torch import Tensor

from nanogpt_fast.model import GPT
from nanogpt_fast.ops import TRITON
from nanogpt_fast.settings.config import GPTConfig

DTYPES = [torch.float32, torch.bfloat16]
T_MAX, H, D = 23, 3, 20


def at(start: int) -> Tensor:
    return torch.tensor([start], device=DEVICE)


def token_operands(B: int, T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, int]:
    """y, w_qkv, b_qkv, n_head."""
    C = H * D
    w = randn(3 * C, C, dtype=dtype, seed=1, scale=C**-0.5).detach()
    return randn(B, T, C, dtype=dtype).detach(), w, randn(3 * C, seed=2).detach(), H


def filled(B: int, start: int, dtype: torch.dtype, rest: float) -> Tensor:
    """A cache with keys and values before `start`, and `rest` from there on."""
    cache = randn(2, B, H, T_MAX, D, dtype=dtype, seed=3).detach()
    cache[:, :, :, start:] = rest
    return cache


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start, T", [(0, 1), (8, 1), (9, 1), (T_MAX - 1, 1), (0, 5), (T_MAX - 5, 5)])
@pytest.mark.parametrize("keys_a_split", [8, 32], ids=["splits", "one split"])
def test_cached_attention(keys_a_split: int, start: int, T: int, dtype: torch.dtype):
    """The bits of the same start as an int, and of the cache; no key from start on is read but the new ones."""
    inputs = token_operands(2, T, dtype)
    cache, expected = (filled(2, start, dtype, float("nan")) for _ in range(2))
    blocks = dict(BLOCK_M=16, BLOCK_N=16)
    with launch.override("cached_attention", blocks=blocks, choices=dict(keys_a_split=keys_a_split)), guarded():
        o = cached_attention(*inputs, cache, at(start))
        assert torch.equal(o, cached_attention(*inputs, expected, start))
    assert torch.equal(cache.nan_to_num(7.0), expected.nan_to_num(7.0))
    y, w, b, _ = inputs
    in64 = filled(2, start, dtype, 0.0).double()
    exact = reference.cached_attention(y.double(), w.double(), b.double(), H, in64, start)
    theirs = reference.cached_attention(*inputs, filled(2, start, dtype, 0.0), start)
    masked = reference.cached_attention(*inputs, filled(2, start, dtype, 9.0), at(start))
    assert_parity(o, theirs, exact, tiny=1e-6, what="ours")
    assert_parity(masked, theirs, exact, tiny=1e-6, what="the reference, masked")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start, T", [(0, 1), (6, 1), (0, 4), (3, 4)])
def test_embedding(start: int, T: int, dtype: torch.dtype):
    wte, wpe = (randn(n, 19, dtype=dtype, seed=n).detach() for n in (11, 7))
    idx = torch.randint(0, 11, (5, T), generator=torch.Generator().manual_seed(T)).to(DEVICE)
    with launch.override("embedding_fwd", blocks=dict(SEQUENCES=2, BLOCK_C=16)), guarded():
        r = embedding(idx, wte, wpe, 0.0, None, 0, at(start))
        assert torch.equal(r, embedding(idx, wte, wpe, 0.0, None, 0, start))
    same, exact = (reference.embedding(idx, wte.to(t), wpe.to(t), 0.0, None, 0, start) for t in (dtype, torch.float64))
    assert_parity(r, same, exact, tiny=1e-6)
    assert torch.equal(same, reference.embedding(idx, wte, wpe, 0.0, None, 0, at(start)))


@pytest.mark.parametrize("keys_a_split", [8, 32], ids=["splits", "one split"])
@pytest.mark.parametrize("wrong", [-1, T_MAX, 2**31, -(2**40)])
def test_out_of_range(wrong: int, keys_a_split: int):
    """NaN, and nothing written; within checked() it is said."""
    inputs, cache = token_operands(2, 1, torch.float32), filled(2, 4, torch.float32, 0.0)
    before, wte, wpe = cache.clone(), randn(5, 16).detach(), randn(T_MAX, 16).detach()
    idx = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    with launch.override("cached_attention", choices=dict(keys_a_split=keys_a_split)):
        assert cached_attention(*inputs, cache, at(wrong)).isnan().all() and torch.equal(cache, before)
    assert embedding(idx, wte, wpe, 0.0, None, 0, at(wrong)).isnan().all()
    with contract.checked():
        for op, args in ((cached_attention, (*inputs, cache)), (embedding, (idx, wte, wpe, 0.0, None, 0))):
            with pytest.raises(ContractError, match=rf"start must be in \[0, {T_MAX}\), but start\[0\] is {wrong}"):
                op(*args, at(wrong))  # type: ignore[operator]
            op(*args, at(T_MAX - 1))  # type: ignore[operator]


def test_contracts():
    inputs, cache = token_operands(1, 2, torch.float32), filled(1, 4, torch.float32, 0.0)
    wte, wpe = randn(5, 16), randn(T_MAX, 16)
    idx = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    cases: list[tuple[Any, str]] = [
        (at(0).int(), "an int, or one int64 on the device"),
        (at(0).repeat(2), "an int, or one int64 on the device"),
        (at(0).to("meta"), "different devices"),
    ]
    for start, rule in cases:
        with pytest.raises(ContractError, match=f"cached_attention: .*{rule}"):
            cached_attention(*inputs, cache, start)
        with pytest.raises(ContractError, match=f"embedding: .*{rule}"), torch.no_grad():
            embedding(idx, wte, wpe, 0.0, None, 0, start)
    with pytest.raises(ContractError, match="must be within T_max"):
        cached_attention(*inputs, cache[:, :, :, :1], at(0))
    with pytest.raises(ContractError, match="has no gradient"):
        embedding(idx, wte, wpe, 0.0, None, 0, at(0))


def test_registration():
    qkv, cache = randn(2, 1, 3, 1, 16).detach(), torch.zeros(2, 2, 1, 300, 16, device=DEVICE)
    torch.library.opcheck(OPS.cached_attention_.default, (qkv, cache, 0, at(280)))
    idx, wte, wpe = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), randn(5, 16).detach(), randn(9, 16).detach()
    torch.library.opcheck(OPS.embedding_fwd.default, (idx, wte, wpe, 0.0, None, 0, 0, None, at(3)))


def test_a_model_generates_the_same():
    """Every token's logits bit for bit, to the end of the block, over several splits."""
    shape = GPTConfig(n_layer=1, n_head=2, n_embd=40, block_size=11, vocab_size=67, bias=True)
    model = GPT(shape, TRITON)
    model.init_weights(torch.Generator().manual_seed(0))
    model = model.to(DEVICE).eval()
    idx = torch.randint(67, (2, 7), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    seen: list[list[Tensor]] = []
    step = model._next_logits

    def noted(*args: Any) -> Tensor:
        logits = step(*args)
        seen[-1].append(logits)
        return logits

    model._next_logits = noted  # type: ignore[method-assign]
    with launch.override("cached_attention", choices=dict(keys_a_split=4)):
        for graphs in (None, Pieces()):
            seen.append([])
            model.generate(idx, 5, temperature=0.0, graphs=graphs)
    plain, static = seen
    assert len(plain) == 5 and all(torch.equal(a, b) for a, b in zip(plain, static, strict=True))
