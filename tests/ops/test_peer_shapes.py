"""The shapes that other kernels' own tests take, by our rule: values and every gradient against float64.

    flash-attention   tests/test_flash_attn.py, test_flash_attn_qkvpacked: head sizes up to 128, causal
    Liger Kernel      test/transformers: test_layer_norm.py, test_cross_entropy.py, test_fused_linear_cross_entropy.py,
                      test_embedding.py
    QuACK             tests: test_layernorm.py (up to the 8192 columns that ours take), test_cross_entropy.py,
                      test_linear_cross_entropy.py
    cut-cross-entropy tests/test_cce_loss_forward.py, test_cce_loss_backward.py
As they stood in November 2026. Interpreted, one sequence and head, and fewer rows, since programs are alike.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from attention_case import attention_same_dtype, seed_tensor
from kernel_case import DEVICE, DTYPES, assert_op, randn
from nanogpt_kernels import attention, cross_entropy, embedding, linear_cross_entropy, norm, reference
from torch import Tensor

pytestmark = pytest.mark.slow
SHORT = [torch.bfloat16, torch.float16]
ON_GPU = DEVICE.type == "cuda"
IGNORED = -100


def targets(rows: int, V: int, ignored: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(V, (rows,), generator=generator)
    return ids.masked_fill_(torch.rand(rows, generator=generator) < ignored, IGNORED).to(DEVICE)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.17])
@pytest.mark.parametrize("T", [97, 128, 200, 257, 384, 512, 768, 1024, 1025, *[2048] * ON_GPU])
@pytest.mark.parametrize("D", [32, 40, 59, 64, 80, 96, 111, 128])
def test_attention_of_flash_attention(D: int, T: int, p: float, dtype: torch.dtype):
    shape = (4, T, 3, 9, D) if ON_GPU else (1, T, 3, 1, D)
    qkv, do = randn(*shape, dtype=dtype), randn(*shape[:2], *shape[3:], seed=1).detach()
    inputs = [qkv, p, seed_tensor() if p else None, 3]
    assert_op(attention, attention_same_dtype, inputs, [do], tiny=1e-5, what=f"attention of T={T}, D={D}")


LIGER_ROWS = [(16, 64), (64, 128), (1, 1023), (21, 256), (1, 1500), (1536 if ON_GPU else 100, 128)]
QUACK_ROWS = itertools.product([1, 37, 199, 4096] if ON_GPU else [1, 37], [256, 512, 760, 1024, 1128, 2048, 4096, 8192])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("M, C", [*LIGER_ROWS, *QUACK_ROWS])
def test_layernorm_of_liger_and_quack(M: int, C: int, bias: bool, dtype: torch.dtype):
    operands = [randn(M, C, dtype=dtype), randn(C, seed=1), randn(C, seed=2) if bias else None, 1e-6]
    assert_op(norm, reference.norm, operands, [randn(M, C, seed=3).detach()], what=f"norm of [{M}, {C}]")


def in_torch(logits: Tensor, targets: Tensor, scale: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    nll = F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="none")
    return (nll * scale).sum(), nll.detach()


LIGER_LOGITS = [(8192 if ON_GPU else 64, 32000), (1269 if ON_GPU else 47, 32000), (4, 8), (63, 41)]
QUACK_LOGITS = itertools.product([1, 289 if ON_GPU else 37], [192, 668, 1024, 1128, 4096, 32768, 128256, 262144])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("M, V", [*LIGER_LOGITS, *QUACK_LOGITS])
def test_cross_entropy_of_liger_and_quack(M: int, V: int, ignored: float, dtype: torch.dtype):
    inputs = [randn(M, V, dtype=dtype, scale=0.1), targets(M, V, ignored), 1 / M, IGNORED]
    douts = [torch.tensor(1.0, device=DEVICE)]
    assert_op(cross_entropy, in_torch, inputs, douts, what=f"cross_entropy of [{M}, {V}]")


CCE = [(N, V, C) for N, V, C in [(256, 512, 128), (252, 507, 128), (252, 507, 123)]]
LIGER_HEAD = [(1024 if ON_GPU else 64, 4096, 1024), (188, 123, 31), (4, 8, 8), (63, 41, 41)]
QUACK_HEAD = [
    *((N, V, C) for N, C in ((8, 768), (24, 1024)) for V in (32000, 50264, 128256)),
    *((N, V, C) for N in (128, 600) for C in (512, 768) for V in (1536, 2048)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.15])
@pytest.mark.parametrize("M, V, C", [*CCE, *LIGER_HEAD, *QUACK_HEAD])
def test_linear_cross_entropy_of_cce_liger_and_quack(M: int, V: int, C: int, ignored: float, dtype: torch.dtype):
    x, w = randn(M, C, dtype=dtype, scale=0.1), randn(V, C, dtype=dtype, seed=1, scale=C**-0.5)
    inputs, douts = [x, w, targets(M, V, ignored), 1 / M, IGNORED], [torch.tensor(1.0, device=DEVICE)]
    what = f"linear_cross_entropy of {M} rows, [{V}, {C}]"
    assert_op(linear_cross_entropy, reference.linear_cross_entropy, inputs, douts, what=what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V, C", [(100, 64), (1000, 128), (100, 60), (1000, 120), (1000, 500), (30522, 768)])
def test_embedding_of_liger(V: int, C: int, dtype: torch.dtype):
    idx = torch.randint(V, (32, 10), generator=torch.Generator().manual_seed(V)).to(DEVICE)
    inputs = [idx, randn(V, C, dtype=dtype), randn(10, C, dtype=dtype, seed=1), 0.0, None, 0]
    douts = [randn(32, 10, C, seed=2).detach()]
    assert_op(embedding, reference.embedding, inputs, douts, what=f"embedding of [{V}, {C}]")
