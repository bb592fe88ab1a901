"""The reference ops in bfloat16 and float16 on the CPU are as close to float64 as torch: the two-reference rule."""

import pytest
import torch
import torch.nn.functional as F
from nanogpt_kernels import reference
from parity import assert_parity
from torch import Tensor

B, T, C, H = 2, 33, 48, 3
LOW = [torch.bfloat16, torch.float16]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sdpa(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def value_and_grads(op, *inputs: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = op(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


def test_parity_rule_accepts_and_refuses():
    ref = torch.linspace(1, 2, 100, dtype=torch.float64)
    torch_answer = ref.bfloat16()
    assert_parity(torch_answer, torch_answer, ref, tiny=0.0)
    off = ref.bfloat16()
    off[50] += 0.0625
    drift = (ref * 1.01).bfloat16()
    poisoned = ref.bfloat16()
    poisoned[3] = torch.nan
    for wrong, message in [
        (off, r"largest error .* worst at \(50,\)"),
        (drift, "error"),
        (poisoned, r"worst at \(3,\)"),
        (ref.float(), "float32"),
        (ref.bfloat16()[:1], "shapes"),
    ]:
        with pytest.raises(AssertionError, match=message):
            assert_parity(wrong, torch_answer, ref, tiny=0.0)
    exact = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="error"):  # torch is exact here, so only `tiny` of nothing is allowed
        assert_parity(torch.full((4,), 1e-9), torch.zeros(4), exact, tiny=1e-3)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0], ids=["flat softmax", "usual softmax", "peaked softmax"])
def test_attention(dtype: torch.dtype, scale: float):
    qkv = (draw(B, T, 3, H, C // H) * scale).to(dtype)
    dy = draw(B, T, H, C // H, seed=1).to(dtype)
    ours = value_and_grads(lambda x: reference.attention(x, 0.0, None, 0), qkv, dy=dy)
    same = value_and_grads(sdpa, qkv, dy=dy)
    ref64 = value_and_grads(sdpa, qkv.double(), dy=dy.double())
    for name, *three in zip(("o", "dqkv"), ours, same, ref64):
        assert_parity(*three, tiny=1e-6, what=name)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("rows", [33, 4000])
def test_norm_sums_its_float32_gradients_in_float32(dtype: torch.dtype, rows: int):
    """Many rows: a sum kept in bfloat16 goes wrong by whole percents (torch's own mixed-dtype kernel does)."""
    r, w, b, dy = draw(rows, C).to(dtype), draw(C, seed=1), draw(C, seed=2), draw(rows, C, seed=3).to(dtype)

    def in_one_dtype(r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(r.float(), w.shape, w, b).to(dtype)

    ours = value_and_grads(reference.norm, r, w, b, dy=dy)
    same = value_and_grads(in_one_dtype, r, w, b, dy=dy)
    ref64 = value_and_grads(reference.norm, r.double(), w.double(), b.double(), dy=dy.double())
    for name, *three in zip(("y", "dr", "dw", "db"), ours, same, ref64):
        assert_parity(*three, tiny=1e-6, what=name)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_linear_cross_entropy_has_float32_losses(dtype: torch.dtype):
    x, w, V = draw(40, C).to(dtype), draw(100, C, seed=1).to(dtype), 100
    targets = torch.arange(40) * 7 % V

    def in_torch(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, w)
        nll = F.cross_entropy(
            logits.double() if x.dtype == torch.float64 else logits.float(), targets, reduction="none"
        )
        return nll.sum() / 40, nll

    def gradients(op, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
        loss, nll = op(x, w)
        return nll.detach(), *torch.autograd.grad(loss, (x, w))

    ours = gradients(lambda x, w: reference.linear_cross_entropy(x, w, targets, 1 / 40), x, w)
    assert ours[0].dtype == torch.float32
    same, ref64 = gradients(in_torch, x, w), gradients(in_torch, x.double(), w.double())
    for name, *three in zip(("nll", "dx", "dw"), ours, same, ref64):
        assert_parity(*three, tiny=1e-6, what=name)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_ops_keep_the_activations_dtype(dtype: torch.dtype):
    y, seed = draw(B, T, C).to(dtype), torch.tensor([3])
    matrix, vector = draw(3 * C, C).to(dtype), draw(C)
    o = reference.qkv_attention(y, matrix, draw(3 * C), H, 0.1, seed, 1)
    r, normed = reference.add_norm(y, o, vector, vector, vector, 1e-5, 0.1, seed, 2)
    out = reference.mlp(normed, draw(4 * C, C).to(dtype), draw(4 * C), draw(C, 4 * C).to(dtype))
    r0 = reference.embedding(torch.zeros(1, 2, dtype=torch.int64), matrix, matrix, 0.1, seed, 0)
    cache = torch.zeros(2, B, H, T, C // H, dtype=dtype)
    cached = reference.cached_attention(y, matrix, draw(3 * C), H, cache, 0)
    assert {t.dtype for t in (o, r, normed, out, r0, cached)} == {dtype}
