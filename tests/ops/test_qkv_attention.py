"""qkv_attention, the projection and attention as one node, and cached_attention, its form for generation."""

from collections.abc import Callable
from typing import Any

import kernel_case
import pytest
import torch
from attention_case import documents, qkv_attention_same_dtype, seed_tensor, tiles
from kernel_case import DEVICE, DTYPES, assert_op, randn
from nanogpt_kernels import launch, reference
from nanogpt_kernels.contract import ContractError
from nanogpt_kernels.ops.attention import cached_attention, qkv_attention
from nanogpt_kernels.ops.attention.decode import cached_attention_
from nanogpt_kernels.registry import OPS
from parity import assert_parity
from torch import Tensor

Operands = tuple[Any, Any, Any, Any]  # y, w_qkv, b_qkv, n_head


def operands(B: int, T: int, H: int, D: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> Operands:
    """Weights are small enough for scores of about 1; the bias is float32."""
    C = H * D
    w = randn(3 * C, C, dtype=dtype, seed=1, scale=C**-0.5)
    return randn(B, T, C, dtype=dtype), w, randn(3 * C, seed=2) if bias else None, H


def each_tensor(f: Callable[[Tensor], Tensor], inputs: Operands) -> Operands:
    y, w, b, H = inputs
    return f(y), f(w), None if b is None else f(b), H


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias, p, ordered", [(True, 0.0, None), (False, 0.0, None), (True, 0.3, True)])
def test_values_and_gradients(bias: bool, p: float, ordered: bool | None, dtype: torch.dtype):
    B, T, H, D = 2, 18, 3, 20
    doc_ids = None if ordered is None else documents(B, T, ordered=ordered)
    inputs = [*operands(B, T, H, D, dtype, bias), p, seed_tensor() if p else None, 1, doc_ids]
    with tiles():
        do = randn(B, T, H * D, seed=3).detach()
        assert_op(qkv_attention, qkv_attention_same_dtype, inputs, [do], what="qkv_attention")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_main_grad_accumulates(dtype: torch.dtype):
    y, w, b, H = operands(1, 5, 2, 16, dtype)
    do = randn(1, 5, 32, dtype=dtype, seed=3).detach()
    plain = torch.autograd.grad(qkv_attention(y, w, b, H, 0.0, None, 0), (y, w, b), do)
    w.main_grad, b.main_grad = torch.ones(w.shape, device=DEVICE), torch.ones(b.shape, device=DEVICE)
    for _ in range(2):
        qkv_attention(y, w, b, H, 0.0, None, 0).backward(do)
    assert w.grad is None and b.grad is None and torch.equal(y.grad, 2 * plain[0])
    assert torch.equal(b.main_grad, 1 + plain[2] + plain[2])
    atol = 8 * torch.finfo(dtype).eps * plain[1].abs().max().item()
    torch.testing.assert_close(w.main_grad, 1 + 2 * plain[1].float(), rtol=0, atol=atol)


@pytest.mark.parametrize("wanted", range(3), ids=["y", "w_qkv", "b_qkv"])
def test_only_what_is_asked_for(wanted: int):
    y, w, b, H = operands(1, 5, 2, 16)
    full = torch.autograd.grad(qkv_attention(y, w, b, H, 0.0, None, 0).square().sum(), (y, w, b))
    only: Any = [t.detach().requires_grad_(i == wanted) for i, t in enumerate((y, w, b))]
    for t in only[1:]:
        t.main_grad = torch.zeros(t.shape, device=DEVICE)
    o = qkv_attention(only[0], only[1], only[2], H, 0.0, None, 0)
    o.square().sum().backward()
    got = only[0].grad if wanted == 0 else only[wanted].main_grad
    torch.testing.assert_close(got, full[wanted], rtol=1e-6, atol=1e-6)
    assert (only[0].grad is not None) == (wanted == 0) and only[1].grad is None and only[2].grad is None
    assert [bool(t.main_grad.any()) for t in only[1:]] == [wanted == 1, wanted == 2]


def test_bias_gradient_needs_no_pass_over_dqkv():
    """A bias adds one launch: the same ones as without it leave its sums behind, which that one adds up."""
    launched = []
    for bias in (True, False):
        y, w, b, H = each_tensor(lambda t: t.detach().to("meta").requires_grad_(), operands(2, 8, 1, 16, bias=bias))
        with launch.recording(90) as calls:
            qkv_attention(y, w, b, H, 0.0, None, 0).sum().backward()
        launched.append([call.op for call in calls])
    assert launched[0] == [*launched[1], "column_sums"] and len(launched[1]) > 1


def test_non_contiguous_y_and_incoming_gradient():
    y, w, b, H = operands(2, 6, 2, 16)
    wide = torch.empty(2, 12, 32, device=DEVICE)[:, ::2].copy_(y.detach()).requires_grad_()
    do = randn(6, 2, 32, seed=3).detach().transpose(0, 1)
    expected = torch.autograd.grad(qkv_attention(y, w, b, H, 0.0, None, 0), (y, w, b), do.contiguous())
    got = torch.autograd.grad(qkv_attention(wide, w, b, H, 0.0, None, 0), (wide, w, b), do)
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_empty():
    y, w, b, H = operands(2, 0, 2, 16)
    o = qkv_attention(y, w, b, H, 0.0, None, 0)
    o.sum().backward()
    assert o.shape == (2, 0, 32) and y.grad.shape == y.shape and not w.grad.any() and not b.grad.any()


def test_contracts():
    y, w, b, H = operands(1, 4, 2, 16)
    cache = torch.zeros(2, 1, 2, 6, 16, device=DEVICE)
    cases: list[tuple[Operands, str]] = [
        ((y[0], w, b, H), r"y must be \[B, T, C\]"),
        ((y, w[:, :16], b, H), r"w_qkv must be \[3C, C\]"),
        ((y, w.bfloat16(), b, H), "y and w_qkv must have one dtype .torch.autocast casts nothing"),
        ((y, w, b[:32], H), r"b_qkv must be \[3C\]"),
        ((y, w, b.double(), H), "b_qkv must be float32, bfloat16 or float16"),
        ((y, w, b, 3), "n_head must divide C"),
    ]
    for wrong, rule in cases:
        with pytest.raises(ContractError, match=f"qkv_attention: {rule}"):
            qkv_attention(*wrong, 0.0, None, 0)
        with pytest.raises(ContractError, match=f"cached_attention: {rule}"):
            cached_attention(*wrong, cache, 0)
    for bad_cache, start, rule in [
        (cache, 3, r"start\.\.\.start \+ T must be within T_max"),
        (cache, -1, r"start\.\.\.start \+ T must be within T_max"),
        (cache.bfloat16(), 0, "in qkv's dtype"),
        (cache[:, :, :1], 0, r"cache must be \[2, B, H, T_max, D\]"),
    ]:
        with pytest.raises(ContractError, match=f"cached_attention: .*{rule}"):
            cached_attention(y, w, b, H, bad_cache, start)


@pytest.mark.parametrize("use_main_grad", [False, True])
def test_compiled_whole(use_main_grad: bool):
    compiled = torch.compile(qkv_attention, fullgraph=True, backend="aot_eager")
    do, results = randn(1, 6, 32, seed=3).detach(), []
    for f in (qkv_attention, compiled):
        y, w, b, H = operands(1, 6, 2, 16)
        if use_main_grad:
            w.main_grad, b.main_grad = torch.zeros(w.shape, device=DEVICE), torch.zeros(b.shape, device=DEVICE)
        o = f(y, w, b, H, 0.2, seed_tensor(), 1)
        o.backward(do)
        results.append((o, y.grad, *(t.main_grad if use_main_grad else t.grad for t in (w, b))))
        assert not use_main_grad or (w.grad is None and b.grad is None)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_twice_is_refused():
    y, w, b, H = operands(1, 4, 1, 16)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(qkv_attention(y, w, b, H, 0.0, None, 0).sum(), y, create_graph=True)


# ---- with a cache ----


def through_cache(
    inputs: tuple[Any, ...],
    chunks: list[int],
    keys_a_split: int,
    cache: Tensor,
    op: Callable[..., Tensor] = cached_attention,
) -> Tensor:
    """All tokens of the first input, so many at a time."""
    y, outs, start = inputs[0], [], 0
    blocks = dict(BLOCK_M=16, BLOCK_N=16)
    with launch.override("cached_attention", blocks=blocks, choices=dict(keys_a_split=keys_a_split)):
        for T in chunks:
            with kernel_case.guarded():
                outs.append(op(y[:, start : start + T], *inputs[1:], cache, start))
            start += T
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "chunks, keys_a_split",
    [([1] * 21, 8), ([21], 8), ([5, 1, 15], 4), ([19, 1, 1], 64)],
    ids=["ones", "all", "mixed", "prompt"],
)
def test_cached_equals_whole(chunks: list[int], keys_a_split: int, dtype: torch.dtype):
    """Token by token, the whole prompt at once, and mixed; the cache holds NaN where nothing was written yet."""
    B, T, H, D = 2, 21, 1, 20
    inputs = each_tensor(Tensor.detach, operands(B, T, H, D, dtype))
    cache = torch.full((2, B, H, 24, D), float("nan"), dtype=dtype, device=DEVICE)
    o = through_cache(inputs, chunks, keys_a_split, cache)
    exact = reference.qkv_attention(*each_tensor(Tensor.double, inputs), 0.0, None, 0)
    assert_parity(o, qkv_attention_same_dtype(*inputs, 0.0, None, 0), exact, tiny=1e-6, what="o")
    expected = torch.full_like(cache, float("nan"))
    through_cache(inputs, chunks, keys_a_split, expected, reference.cached_attention)
    assert torch.equal(cache[:, :, :, :T], expected[:, :, :, :T]) and cache[:, :, :, T:].isnan().all()


def test_cached_at_any_batch_is_the_same():
    """The kernel alone: the product before it promises no such thing (torch 2.14's on a CPU, one row against three)."""
    qkv = randn(3, 13, 3, 2, 16).detach()
    o = through_cache((qkv,), [12, 1], 4, torch.empty(2, 3, 2, 16, 16, device=DEVICE), cached_attention_)
    for b in range(3):
        cache = torch.empty(2, 1, 2, 16, 16, device=DEVICE)
        assert torch.equal(o[b : b + 1], through_cache((qkv[b : b + 1],), [12, 1], 4, cache, cached_attention_))


def test_cache_of_any_strides():
    inputs = each_tensor(Tensor.detach, operands(2, 9, 2, 16))
    plain = torch.zeros(2, 2, 2, 12, 16, device=DEVICE)
    strided = torch.zeros(16, 12, 2, 2, 4, device=DEVICE).permute(4, 3, 2, 1, 0)[1:3]
    expected = through_cache(inputs, [7, 1, 1], 4, plain)
    assert torch.equal(through_cache(inputs, [7, 1, 1], 4, strided), expected) and torch.equal(strided, plain)


def test_cached_nan_and_minus_infinity():
    """A NaN key makes NaN; a split in which every score is -inf weighs nothing."""
    y, w, b, H = each_tensor(Tensor.detach, operands(1, 1, 1, 16))
    cache = randn(2, 1, 1, 12, 16, seed=5).detach()
    q = (y @ w[:16].T + b[:16])[0, 0]
    cache[0, 0, 0, 4:8] = torch.where(q > 0, -torch.inf, torch.inf)
    with launch.override("cached_attention", choices=dict(keys_a_split=4)):
        o = cached_attention(y, w, b, H, cache, 10)
        torch.testing.assert_close(o, reference.cached_attention(y, w, b, H, cache.clone(), 10), rtol=1e-5, atol=1e-6)
        cache[0, 0, 0, 2, 3] = float("nan")
        assert cached_attention(y, w, b, H, cache, 10).isnan().all()


def test_cached_of_no_tokens_and_without_gradient():
    y, w, b, H = operands(2, 0, 1, 16)
    cache = torch.zeros(2, 2, 1, 4, 16, device=DEVICE)
    assert cached_attention(y, w, b, H, cache, 4).shape == (2, 0, 16) and not cache.any()
    assert not cached_attention(operands(2, 1, 1, 16)[0], w, b, H, cache, 0).requires_grad and cache.any()


def test_cached_opcheck():
    qkv, cache = randn(2, 3, 3, 1, 16).detach(), torch.zeros(2, 2, 1, 300, 16, device=DEVICE)
    for start in (0, 280):
        torch.library.opcheck(OPS.cached_attention_.default, (qkv, cache, start))
