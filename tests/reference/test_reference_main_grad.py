"""The main_grad branches add exactly the gradient that autograd returns, into float32, and give autograd None."""

from collections.abc import Callable

import pytest
import torch
from nanogpt_kernels import reference
from torch import Tensor

B, T, C, H, V = 2, 6, 16, 4, 20
SEED = torch.tensor([99])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def parameters(dtype: torch.dtype, bias: bool) -> dict[str, Tensor]:
    """A block's parameters: matrices in dtype, vectors float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"wte": (V, C), "wpe": (T, C), "qkv": (3 * C, C), "proj": (C, C), "fc": (4 * C, C), "out": (C, 4 * C)}
    named = {n: (torch.randn(s, generator=generator) * 0.3).to(dtype).requires_grad_() for n, s in shapes.items()}
    if bias:
        for name, size in (("qkv_b", 3 * C), ("fc_b", 4 * C), ("delta_b", C)):
            named[name] = torch.randn(size, generator=generator).requires_grad_()
    return named | {"ln": torch.randn(C, generator=generator).requires_grad_()}


def add_main_grads(named: dict[str, Tensor], value: float = 0.0) -> None:
    for tensor in named.values():
        tensor.main_grad = torch.full(tensor.shape, value)  # type: ignore[attr-defined]


def block_loss(w: dict[str, Tensor]) -> Tensor:
    """Every op that has a weight, in a model's order, with the head tied to the embedding, dropout on."""
    idx = torch.tensor([[1, 2, 2, 3, 19, 0], [2, 2, 2, 2, 5, 6]])
    r = reference.embedding(idx, w["wte"], w["wpe"], 0.2, SEED, 0)
    o = reference.qkv_attention(reference.norm(r, w["ln"], None), w["qkv"], w.get("qkv_b"), H, 0.2, SEED, 1)
    delta = reference.linear(o, w["proj"])
    r, y = reference.add_norm(r, delta, w.get("delta_b"), w["ln"], None, 1e-5, 0.2, SEED, 2)
    out = reference.mlp(y, w["fc"], w.get("fc_b"), w["out"])
    return reference.linear_cross_entropy(out, w["wte"], idx.roll(-1, 1), 1 / 12)[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_autograd(dtype: torch.dtype, bias: bool):
    """float32 to rounding. In low precision both round each product to dtype; the tied sum is then in float32."""
    plain, fused = parameters(dtype, bias), parameters(dtype, bias)
    add_main_grads(fused)
    want, got = block_loss(plain), block_loss(fused)
    assert torch.equal(want, got)
    want.backward()
    got.backward()
    epsilon = torch.finfo(dtype).eps
    for name, tensor in fused.items():
        reached = tensor.main_grad if tensor.dim() > 1 else tensor.grad  # type: ignore[attr-defined]
        expected = plain[name].grad
        assert reached is not None and expected is not None and reached.dtype == torch.float32
        tolerance = 4 * epsilon * expected.abs().max().item()
        torch.testing.assert_close(reached, expected.float(), rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
        assert tensor.dim() == 1 or tensor.grad is None, f"{name} also got a .grad"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_micro_batches_add_up(dtype: torch.dtype):
    """Each backward adds to what is there, the tied head and both embeddings included."""
    once, thrice = parameters(dtype, True), parameters(dtype, True)
    add_main_grads(once)
    add_main_grads(thrice, value=0.5)
    block_loss(once).backward()
    for _ in range(3):
        block_loss(thrice).backward()
    for name in ("wte", "wpe", "qkv", "proj", "fc", "out"):
        one, three = once[name].main_grad, thrice[name].main_grad  # type: ignore[attr-defined]
        torch.testing.assert_close(three, 0.5 + 3 * one, rtol=1e-5, atol=1e-6)


def test_tied_weight_receives_both_parts():
    """Without the head's part a row that no token names would stay zero; without the lookup's, rows 1 and 2 differ."""
    w = parameters(torch.float32, False)
    add_main_grads(w)
    block_loss(w).backward()
    tied = w["wte"].main_grad.clone()  # type: ignore[attr-defined]
    unused = 15
    assert (tied[unused] != 0).any()
    w["wte"].main_grad.zero_()  # type: ignore[attr-defined]
    idx = torch.tensor([[1, 2, 2, 3]])
    reference.embedding(idx, w["wte"], w["wpe"], 0.0, None, 0).sum().backward()
    counts = torch.bincount(idx.flatten(), minlength=V).float()
    torch.testing.assert_close(w["wte"].main_grad, counts[:, None].expand(V, C))  # type: ignore[attr-defined]


CALLS: list[tuple[str, Callable[[dict[str, Tensor]], Tensor]]] = [
    ("linear", lambda w: reference.linear(torch.ones(2, C), w["proj"])),
    ("embedding", lambda w: reference.embedding(torch.tensor([[1, 2]]), w["wte"], w["wpe"], 0.0, None, 0)),
    ("qkv_attention", lambda w: reference.qkv_attention(torch.ones(1, 2, C), w["qkv"], None, H, 0.0, None, 0)),
    ("mlp", lambda w: reference.mlp(torch.ones(2, C), w["fc"], None, w["out"])),
    ("loss", lambda w: reference.linear_cross_entropy(torch.ones(2, C), w["wte"], torch.tensor([1, 2]))[0]),
]


@pytest.mark.parametrize("call", [c[1] for c in CALLS], ids=[c[0] for c in CALLS])
def test_without_grad_mode_nothing_is_recorded_or_written(call: Callable[[dict[str, Tensor]], Tensor]):
    w = parameters(torch.float32, False)
    add_main_grads(w)
    recorded = call(w)
    with torch.no_grad():
        y = call(w)
    assert recorded.requires_grad and not y.requires_grad
    torch.testing.assert_close(y, recorded.detach())
    assert all((t.main_grad == 0).all() for t in w.values())  # type: ignore[attr-defined]


def test_input_that_needs_no_gradient():
    """The first layer of a frozen stack: dw is still added, no dx is computed."""
    w = parameters(torch.float32, True)
    add_main_grads(w)
    x = torch.randn(3, C)
    reference.linear(x, w["qkv"], w["qkv_b"]).sum().backward()
    torch.testing.assert_close(w["qkv"].main_grad, x.sum(0).expand(3 * C, C))  # type: ignore[attr-defined]
    assert x.grad is None and w["qkv_b"].grad is not None and (w["qkv_b"].grad == 3).all()


def test_bias_gradient_is_summed_in_float32():
    """4097 rows of 1: bfloat16 knows 4096 and 4128, and a running sum in it would stop at 256."""
    w = parameters(torch.bfloat16, True)
    add_main_grads(w)
    reference.linear(torch.zeros(4097, C, dtype=torch.bfloat16), w["qkv"], w["qkv_b"]).sum().backward()
    assert w["qkv_b"].grad is not None and (w["qkv_b"].grad == 4097).all()
