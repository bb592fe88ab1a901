"""attention with dropout and with documents."""

import kernel_case
import pytest
import torch
from attention_case import attention_same_dtype, documents, seed_tensor, tiles
from kernel_case import DEVICE, DTYPES, assert_op, randn
from nanogpt_kernels import reference
from nanogpt_kernels.ops.attention import attention
from nanogpt_kernels.ops.attention.forward import attention_fwd
from nanogpt_kernels.registry import OPS
from parity import assert_parity


@pytest.mark.parametrize("T, BLOCK_M, BLOCK_N", [(1, 16, 16), (34, 16, 16), (45, 16, 32), (37, 32, 16)])
def test_mask_is_the_reference_s(T: int, BLOCK_M: int, BLOCK_N: int):
    """Seen through attention itself: equal scores and values that spell out the key make every probability readable."""
    B, H, D, p, site = 2, 3, 64, 0.3, 1  # Triton passes a 1 as a constant
    qkv = torch.zeros(B, T, 3, H, D, device=DEVICE)
    qkv[:, :, 2] = torch.eye(T, D, device=DEVICE)[:, None, :]  # v of token j is the unit vector j
    with tiles(BLOCK_M, BLOCK_N):
        o, _ = attention_fwd(qkv, p, seed_tensor(), site, None)
    kept = o.transpose(1, 2)[..., :T] > 0.0  # [B, H, T, T]
    causal = torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril()
    assert torch.equal(kept, reference.dropout_mask((B, H, T, T), p, seed_tensor(), site) & causal)


MASKS = [
    pytest.param(0.3, None, id="dropout"),
    pytest.param(0.0, False, id="strewn documents"),
    pytest.param(0.3, True, id="dropout and documents"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p, ordered", MASKS)
def test_values_and_gradients(p: float, ordered: bool | None, dtype: torch.dtype):
    B, T, H, D = 2, 19, 1, 20
    doc_ids = None if ordered is None else documents(B, T, ordered=ordered)
    inputs = [randn(B, T, 3, H, D, dtype=dtype), p, seed_tensor() if p else None, 5, doc_ids]
    with tiles():
        assert_op(attention, attention_same_dtype, inputs, [randn(B, T, H, D, seed=1).detach()], what="attention")


@pytest.mark.parametrize("T, D, BLOCK_M, BLOCK_N", [(15, 32, 16, 16), (63, 16, 32, 16), (65, 20, 16, 32)])
def test_values_of_several_tiles(T: int, D: int, BLOCK_M: int, BLOCK_N: int):
    qkv, doc_ids = randn(1, T, 3, 2, D).detach(), documents(1, T, ordered=False)
    for p in (0.0, 0.3):
        with tiles(BLOCK_M, BLOCK_N), kernel_case.guarded():
            o, _ = attention_fwd(kernel_case.between_margins(qkv), p, seed_tensor(), 2, doc_ids)
        same, exact = (attention_same_dtype(x, p, seed_tensor(), 2, doc_ids) for x in (qkv, qkv.double()))
        assert_parity(o, same, exact, tiny=1e-6, what=f"p={p}")


def test_documents_attend_like_sequences_of_their_own():
    qkv = randn(1, 40, 3, 2, 16).detach()
    doc_ids = torch.tensor([[3] * 23 + [-1] * 17], device=DEVICE)
    with tiles():
        packed, _ = attention_fwd(qkv, 0.0, None, 0, doc_ids)
        first, second = (attention_fwd(part, 0.0, None, 0, None)[0] for part in (qkv[:, :23], qkv[:, 23:]))
        narrow, _ = attention_fwd(qkv, 0.0, None, 0, doc_ids.to(torch.int32))
    torch.testing.assert_close(packed, torch.cat([first, second], 1), rtol=1e-5, atol=1e-6)
    assert torch.equal(narrow, packed)


def test_ids_of_64_bits_differ_in_their_high_halves():
    qkv = randn(1, 20, 3, 1, 16).detach()
    doc_ids = torch.tensor([[7] * 10 + [7 + 2**32] * 10], device=DEVICE)
    o = attention(qkv, 0.0, None, 0, doc_ids)
    assert torch.equal(o[:, 10], qkv[:, 10, 2])  # the first of its document sees itself alone


def test_one_document_is_no_mask():
    qkv = randn(2, 33, 3, 1, 16).detach()
    with tiles():
        plain, _ = attention_fwd(qkv, 0.0, None, 0, None)
        masked, _ = attention_fwd(qkv, 0.0, None, 0, torch.full((2, 33), 9, device=DEVICE))
    assert torch.equal(plain, masked)


def test_mask_depends_on_seed_and_site_and_on_nothing_else():
    qkv = randn(2, 20, 3, 2, 16).detach()
    with tiles():
        o = attention(qkv, 0.3, seed_tensor(1), 4)
        assert torch.equal(o, attention(qkv, 0.3, seed_tensor(1), 4))
        for seed, site in ((2, 4), (1, 5)):
            assert not torch.equal(o, attention(qkv, 0.3, seed_tensor(seed), site))
        assert torch.equal(o[:1], attention(qkv[:1], 0.3, seed_tensor(1), 4))
    with tiles(32, 32):
        torch.testing.assert_close(o, attention(qkv, 0.3, seed_tensor(1), 4), rtol=1e-5, atol=1e-6)


def test_a_poisoned_key_of_another_document_is_not_seen():
    qkv, doc_ids = randn(1, 40, 3, 1, 16).detach(), torch.tensor([[0] * 20 + [1] * 20], device=DEVICE)
    qkv[0, 3, 1] = float("nan")
    with tiles():
        o, _ = attention_fwd(qkv, 0.0, None, 0, doc_ids)
    assert o[0, 3:20].isnan().all() and o[0, :3].isfinite().all() and o[0, 20:].isfinite().all()


def test_opcheck():
    qkv, doc_ids = randn(1, 5, 3, 2, 16).detach(), documents(1, 5, ordered=True)
    op = OPS.attention_fwd.default
    torch.library.opcheck(op, (qkv, 0.3, seed_tensor(), 1, doc_ids))
