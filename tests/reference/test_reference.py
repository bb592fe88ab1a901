"""The reference ops against independent float64 formulas, and their gradients against finite differences."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nanogpt_kernels import reference
from torch import Tensor

SEED = torch.tensor([2**40 + 17])
B, T, C, H, V = 2, 5, 12, 3, 11


def draw(*shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
    """A float64 leaf; the generator is seeded by the shape, so a test does not depend on its neighbours."""
    generator = torch.Generator().manual_seed(sum(shape) + 31 * len(shape))
    return (torch.randn(shape, dtype=torch.float64, generator=generator) * scale).requires_grad_(grad)


def gradcheck(op: Callable[..., Any], inputs: Any) -> bool:
    """torch's, against finite differences along random directions: 10 times as fast as element by element."""
    return torch.autograd.gradcheck(op, inputs, fast_mode=True)


def layernorm64(r: Tensor, w: Tensor, b: Tensor | None, eps: float = 1e-5) -> Tensor:
    centred = r - r.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w
    return y if b is None else y + b


def attention64(qkv: Tensor, doc_ids: Tensor | None = None, mask: Tensor | None = None, p: float = 0.0) -> Tensor:
    """One query at a time, in loops."""
    B, T, _, H, D = qkv.shape
    out = torch.zeros(B, T, H, D, dtype=qkv.dtype)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = [s for s in range(t + 1) if doc_ids is None or doc_ids[b, s] == doc_ids[b, t]]
                scores = [torch.dot(qkv[b, t, 0, h], qkv[b, s, 1, h]) / math.sqrt(D) for s in seen]
                weights = torch.stack(scores).exp()
                weights = weights / weights.sum()
                for weight, s in zip(weights, seen):
                    kept = 1.0 if mask is None else float(mask[b, h, t, s]) / (1.0 - p)
                    out[b, t, h] += weight * kept * qkv[b, s, 2, h]
    return out


def gelu64(x: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_embedding(p: float, start: int):
    idx = torch.tensor([[1, 3, 3, 0, 10], [2, 2, 9, 1, 1]])
    wte, wpe = draw(V, C), draw(T + 3, C)
    want = torch.stack([torch.stack([wte[i] + wpe[start + t] for t, i in enumerate(row)]) for row in idx])
    if p:
        want = want * reference.dropout_mask(want.shape, p, SEED, 0) / (1 - p)
    torch.testing.assert_close(reference.embedding(idx, wte, wpe, p, SEED, 0, start), want)
    assert gradcheck(lambda a, b: reference.embedding(idx, a, b, p, SEED, 0, start), (wte, wpe))


@pytest.mark.parametrize("bias", [True, False])
def test_norm(bias: bool):
    r, w, b = draw(B, T, C, scale=3.0), draw(C), draw(C + 1)[:C] if bias else None
    torch.testing.assert_close(reference.norm(r, w, b), layernorm64(r, w, b))
    assert gradcheck(reference.norm, (r, w, b))


def test_norm_of_a_constant_row_is_the_bias():
    """Variance 0: eps alone stands under the root."""
    r, w, b = torch.full((1, C), 7.0, dtype=torch.float64), draw(C), draw(C)
    torch.testing.assert_close(reference.norm(r, w, b)[0], b)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_add_norm(p: float, bias: bool):
    r, delta, w = draw(B, T, C), draw(B, T, C, scale=2.0), draw(C)
    delta_bias, b = (draw(C, scale=0.5), draw(C, scale=0.1)) if bias else (None, None)

    def op(r: Tensor, delta: Tensor, delta_bias: Tensor | None, w: Tensor, b: Tensor | None):
        return reference.add_norm(r, delta, delta_bias, w, b, 1e-5, p, SEED, 6)

    branch = delta if delta_bias is None else delta + delta_bias
    if p:
        branch = branch * reference.dropout_mask(branch.shape, p, SEED, 6) / (1 - p)
    got_r, got_y = op(r, delta, delta_bias, w, b)
    torch.testing.assert_close(got_r, r + branch)
    torch.testing.assert_close(got_y, layernorm64(r + branch, w, b))
    assert gradcheck(op, (r, delta, delta_bias, w, b))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("documents", [False, True])
def test_attention(p: float, documents: bool):
    qkv = draw(B, T, 3, H, C // H, scale=1.5)
    doc_ids = torch.tensor([[0, 0, 1, 1, 1], [4, 4, 4, 4, 2]]) if documents else None
    mask = reference.dropout_mask((B, H, T, T), p, SEED, 2) if p else None
    got = reference.attention(qkv, p, SEED, 2, doc_ids)
    torch.testing.assert_close(got, attention64(qkv, doc_ids, mask, p))
    assert gradcheck(lambda x: reference.attention(x, p, SEED, 2, doc_ids), (qkv,))


def test_documents_in_one_row_equal_documents_apart():
    """Packing changes nothing for a document but its positions, which attention does not know."""
    first, second = draw(1, 4, 3, H, 4, grad=False), draw(1, 6, 3, H, 4, grad=False)
    doc_ids = torch.tensor([[0] * 4 + [1] * 6])
    packed = reference.attention(torch.cat((first, second), 1), 0.0, None, 0, doc_ids)
    apart = [reference.attention(x, 0.0, None, 0) for x in (first, second)]
    torch.testing.assert_close(packed, torch.cat(apart, 1))


@pytest.mark.parametrize("bias", [True, False])
def test_qkv_attention(bias: bool):
    y, w, b = draw(B, T, C), draw(3 * C, C, scale=0.4), draw(3 * C) if bias else None
    qkv = torch.einsum("btc,kc->btk", y, w) + (0.0 if b is None else b)
    want = attention64(qkv.view(B, T, 3, H, C // H)).reshape(B, T, C)
    torch.testing.assert_close(reference.qkv_attention(y, w, b, H, 0.0, None, 0), want)
    assert gradcheck(lambda y, w, b: reference.qkv_attention(y, w, b, H, 0.2, SEED, 1), (y, w, b))


@pytest.mark.parametrize("pieces", [[1] * 7, [3, 1, 1, 2], [7], [1, 6]], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("on_device", [False, True], ids=["an int", "a tensor"])
def test_cached_attention_equals_the_whole_sequence(pieces: list[int], bias: bool, on_device: bool):
    """The cache starts as NaN: reading a position that was not written shows. A start on the device reads it all, and
    weighs with 0 what must be finite."""
    T = sum(pieces)
    y, w = draw(B, T, C, grad=False), draw(3 * C, C, scale=0.4, grad=False)
    b = draw(3 * C, grad=False) if bias else None
    unwritten = 1e30 if on_device else torch.nan
    cache = torch.full((2, B, H, T + 4, C // H), unwritten, dtype=torch.float64)
    outputs, start = [], 0
    for n in pieces:
        first = torch.tensor([start]) if on_device else start
        outputs.append(reference.cached_attention(y[:, start : start + n], w, b, H, cache, first))
        start += n
    torch.testing.assert_close(torch.cat(outputs, 1), reference.qkv_attention(y, w, b, H, 0.0, None, 0))
    rest = cache[:, :, :, T:]
    assert (rest.isnan() | (rest == unwritten)).all(), "wrote past the given tokens"


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp(activation: str, bias: bool):
    y, w_fc, w_proj = draw(B, T, C), draw(4 * C, C), draw(C, 4 * C)
    b_fc = draw(4 * C) if bias else None
    pre = torch.einsum("btc,fc->btf", y, w_fc) + (0.0 if b_fc is None else b_fc)
    want = torch.einsum("btf,cf->btc", gelu64(pre, activation), w_proj)
    torch.testing.assert_close(reference.mlp(y, w_fc, b_fc, w_proj, activation), want)
    assert gradcheck(lambda y, fc, b, proj: reference.mlp(y, fc, b, proj, activation), (y, w_fc, b_fc, w_proj))


def test_the_two_gelus_differ():
    """Their difference, at most 4.7e-4, is far above float64's error: the tests above tell them apart."""
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    assert 4e-4 < (gelu64(x, "gelu") - gelu64(x, "gelu_tanh")).abs().max() < 5e-4


@pytest.mark.parametrize("valid_vocab", [None, V, 8])
@pytest.mark.parametrize("grad_scale", [1.0, 0.01, torch.tensor(3.0)], ids=["1", "0.01", "tensor"])
def test_linear_cross_entropy(valid_vocab: int | None, grad_scale: Tensor | float):
    x, w, targets = draw(B, T, C), draw(V, C), torch.tensor([[1, 0, 7, -1, 3], [-1, 2, 2, 6, 5]])
    logits = torch.einsum("btc,vc->btv", x, w)[..., :valid_vocab]
    rows = [
        0.0 * logits[b, t, 0] if targets[b, t] == -1 else logits[b, t].exp().sum().log() - logits[b, t, targets[b, t]]
        for b in range(B)
        for t in range(T)
    ]
    loss, nll = reference.linear_cross_entropy(x, w, targets, grad_scale, valid_vocab=valid_vocab)
    torch.testing.assert_close(nll, torch.stack(rows).detach())
    torch.testing.assert_close(loss, torch.stack(rows).sum() * grad_scale)
    assert not nll.requires_grad and nll[3] == nll[5] == 0.0

    def op(x: Tensor, w: Tensor) -> Tensor:
        return reference.linear_cross_entropy(x, w, targets, grad_scale, valid_vocab=valid_vocab)[0]

    assert gradcheck(op, (x, w))
    if valid_vocab == 8:
        dw = torch.autograd.grad(op(x, w), w)[0]
        assert (dw[8:] == 0).all() and (dw[:8] != 0).any()


def test_ignore_index_can_be_another():
    x, w = draw(4, C), draw(V, C)
    _, nll = reference.linear_cross_entropy(x, w, torch.tensor([0, 5, 0, 7]), ignore_index=0)
    assert (nll == 0).tolist() == [True, False, True, False]


def test_a_batch_of_ignored_targets_costs_nothing():
    x, w = draw(4, C), draw(V, C)
    loss, nll = reference.linear_cross_entropy(x, w, torch.full((4,), -1))
    assert loss.item() == 0.0 and (nll == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, w)))


def test_half_precision_gradient_does_not_underflow():
    """1 / (2^19 tokens) is below float16's smallest number: the loss scale must come in before the logits' gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, C, generator=generator).half().requires_grad_()
    w = torch.randn(V, C, generator=generator).half()
    targets = torch.arange(8)
    loss, _ = reference.linear_cross_entropy(x, w, targets, torch.tensor(65536.0 / 2**19))
    x64 = x.detach().double().requires_grad_()
    want = torch.autograd.grad(reference.linear_cross_entropy(x64, w.double(), targets, 0.125)[0], x64)[0]
    got = torch.autograd.grad(loss, x)[0]
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-3 * want.abs().max().item())


def test_grad_norm():
    g = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    norm = reference.grad_norm(g)
    assert norm.shape == () and norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), g.double().square().sum().sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_grad_norm_shows_one_bad_element(bad: float):
    g = torch.zeros(1001)
    g[777] = bad
    assert not torch.isfinite(reference.grad_norm(g))
