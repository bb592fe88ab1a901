"""PyTorch's own sample inputs (OpInfo) for the functions our ops stand for: cases that we did not write.

A sample outside an op's contract (class probabilities, an attention mask, ...) is left out by name; each test counts
what it ran, so that leaving all out fails.
"""

from collections.abc import Iterator
from typing import Any

import kernel_case
import pytest
import torch
import torch.nn.functional as F
from attention_case import attention_same_dtype
from kernel_case import DEVICE, DTYPES
from nanogpt_kernels.ops.attention import attention
from nanogpt_kernels.ops.cross_entropy import cross_entropy
from nanogpt_kernels.ops.embedding import embedding
from nanogpt_kernels.ops.mlp import bias_gelu
from nanogpt_kernels.ops.norm import norm
from torch import Tensor

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def samples(name: str, dtype: torch.dtype) -> Iterator[Any]:
    """PyTorch's samples of torch.nn.functional.`name`, on the device, inputs requiring gradients."""
    common = pytest.importorskip("torch.testing._internal.common_methods_invocations", reason="needs expecttest")
    (info,) = [op for op in common.op_db if op.name == f"nn.functional.{name}"]
    torch.manual_seed(0)
    return info.sample_inputs(DEVICE, dtype, requires_grad=True)


def compare(ours: Any, reference: Any, inputs: list[Any], what: str) -> None:
    kernel_case.assert_op(ours, reference, inputs, what=what, tiny=1e-6)


def test_layer_norm(dtype: torch.dtype):
    ran = 0
    for sample in samples("layer_norm", dtype):
        arguments: list[Any] = [*sample.args, None, None]
        shape, w, b = arguments[:3]
        if w is None or sample.kwargs.get("eps", 1e-5) < 0:  # a negative eps is a test of torch's own NaN
            continue
        N = torch.Size(shape).numel()
        x = sample.input.detach().requires_grad_()
        w, b = (t if t is None else t.detach().float().requires_grad_() for t in (w, b))
        eps = sample.kwargs.get("eps", 1e-5)

        def ours(x: Tensor, w: Tensor, b: Tensor | None, shape: Any = shape, N: int = N, eps: float = eps) -> Tensor:
            flat = norm(x.flatten(x.dim() - len(shape)), w.view(N), b if b is None else b.view(N), eps)
            return flat.view(x.shape)

        def theirs(x: Tensor, w: Tensor, b: Tensor | None, shape: Any = shape, eps: float = eps) -> Tensor:
            return F.layer_norm(x.to(w.dtype), shape, w, b, eps).to(x.dtype)

        compare(ours, theirs, [x, w, b], f"layer_norm {tuple(x.shape)}")
        ran += 1
    assert ran >= 4


def test_gelu(dtype: torch.dtype):
    ran = 0
    for sample in samples("gelu", dtype):
        approximate = sample.kwargs["approximate"]
        activation = "gelu_tanh" if approximate == "tanh" else "gelu"
        b = torch.zeros(sample.input.size(-1), device=DEVICE)
        compare(
            lambda x, b=b, activation=activation: bias_gelu(x, b, activation),
            lambda x, approximate=approximate: F.gelu(x, approximate=approximate),
            [sample.input.detach().requires_grad_()],
            f"gelu {approximate}",
        )
        ran += 1
    assert ran >= 2


def test_cross_entropy(dtype: torch.dtype):
    """Class dimension moved last; the mean is sum / counted, as grad_scale."""
    ran = 0
    for sample in samples("cross_entropy", dtype):
        (target,), options = sample.args, sample.kwargs
        reduction = options.get("reduction", "mean")
        if target.is_floating_point() or "weight" in options or reduction == "none" or options.get("label_smoothing"):
            continue
        ignored = options.get("ignore_index", -100)
        count = int((target != ignored).sum())
        scale = 1.0 / count if reduction == "mean" and count else 1.0

        def ours(x: Tensor, target: Tensor = target, ignored: int = ignored, scale: float = scale) -> Tensor:
            rows = x.movedim(1, -1).flatten(0, -2)
            return cross_entropy(rows, target.flatten(), scale, ignored)[0]

        def theirs(x: Tensor, target: Tensor = target, options: Any = options) -> Tensor:
            return F.cross_entropy(x if x.dtype == torch.float64 else x.float(), target, **options)

        x = sample.input.detach().requires_grad_()
        compare(ours, theirs, [x], f"cross_entropy {tuple(x.shape)} {options}")
        ran += 1
    assert ran >= 6


def test_scaled_dot_product_attention(dtype: torch.dtype):
    """Causal samples: keys past the last query are never seen, so they may be cut off to pack q, k, v."""
    ran = 0
    for sample in samples("scaled_dot_product_attention", dtype):
        q, k, v = (t.detach() for t in (sample.input, *sample.args))
        options = {name: value for name, value in sample.kwargs.items() if name not in ("is_causal", "dropout_p")}
        if not sample.kwargs["is_causal"] or sample.kwargs["dropout_p"] > 0 or any(options.values()):
            continue
        if q.shape[:-2] != k.shape[:-2]:  # broadcast heads
            continue
        q, k, v = (t[..., : q.size(-2), :] for t in (q, k, v))
        packed = torch.stack([t.view(-1, t.size(-3), *t.shape[-2:]) for t in (q, k, v)])  # [3, B, H, T, D]
        qkv = packed.permute(1, 3, 0, 2, 4).contiguous().requires_grad_()

        def theirs(qkv: Tensor) -> Tensor:
            return attention_same_dtype(qkv, 0.0, None, 0)

        compare(lambda qkv: attention(qkv, 0.0, None, 0), theirs, [qkv], f"attention {tuple(qkv.shape)}")
        ran += 1
    assert ran >= 2


def test_embedding(dtype: torch.dtype):
    ran = 0
    for sample in samples("embedding", dtype):
        (idx,) = sample.args
        if sample.kwargs.get("max_norm") or sample.kwargs.get("scale_grad_by_freq") or "padding_idx" in sample.kwargs:
            continue
        table = sample.input.detach().requires_grad_()
        idx = idx.reshape(1, -1) if idx.dim() < 2 else idx
        wpe = torch.zeros(idx.size(1), table.size(1), dtype=dtype, device=DEVICE)
        compare(
            lambda table, idx=idx, wpe=wpe: embedding(idx, table, wpe, 0.0, None, 0),
            lambda table, idx=idx: F.embedding(idx, table),
            [table],
            f"embedding {tuple(idx.shape)}",
        )
        ran += 1
    assert ran >= 2
