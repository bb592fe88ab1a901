"""attention_bwd in both its forms, apart from our own forward: o and lse come from float64, rounded once."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from attention_case import attention_same_dtype, documents, log_sums, seed_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import DEVICE, DTYPES, between_margins, guarded, randn
from nanogpt_kernels import launch
from nanogpt_kernels.contract import ContractError
from nanogpt_kernels.ops.attention import backward
from nanogpt_kernels.ops.attention.tile_access import head_offsets, tile_at
from nanogpt_kernels.registry import OPS
from parity import assert_parity
from torch import Tensor

FORMS = pytest.mark.parametrize("atomic", [False, True], ids=["deterministic", "atomic"])
SITE = 1  # Triton passes a 1 as a constant


@contextmanager
def form(atomic: bool, BLOCK_M: int = 16, BLOCK_N: int = 32) -> Iterator[None]:
    """Within it attention_bwd takes this form, in tiles so small that small T spans several."""
    with ExitStack() as stack:
        stack.enter_context(launch.override("attention_bwd", choices=dict(atomic=atomic)))
        stack.enter_context(launch.override("attention_bwd_rows", blocks=dict(ROWS=16)))
        for name in ("dq", "dkdv", "atomic"):
            for variant in ("", "_dropout_or_docs"):
                blocks = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
                stack.enter_context(launch.override(f"attention_bwd_{name}{variant}", blocks=blocks))
        yield


def forward(qkv: Tensor, p: float, seed: Tensor | None, doc_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """(o, lse) as attention_fwd gives them."""
    o = attention_same_dtype(qkv.double(), p, seed, SITE, doc_ids).to(qkv.dtype)
    return o.contiguous(), log_sums(qkv.double(), doc_ids).float()


def inputs(
    B: int, T: int, H: int, D: int, dtype: torch.dtype, p: float = 0.0, doc_ids: Tensor | None = None, seed: int = 0
) -> tuple:
    """attention_bwd's arguments, bias_grad apart."""
    qkv = randn(B, T, 3, H, D, dtype=dtype, seed=seed).detach()
    do = randn(B, T, H, D, dtype=dtype, seed=seed + 1).detach()
    seed_or_none = seed_tensor() if p > 0.0 else None
    return do, qkv, *forward(qkv, p, seed_or_none, doc_ids), p, seed_or_none, SITE, doc_ids


def attention_bwd(*args: Any) -> tuple[Tensor, Tensor]:
    """(dqkv, its sum over tokens [3*H*D]): backward.attention_bwd with its partial sums added up."""
    dqkv, dq_sums, dkdv_sums = backward.attention_bwd(*args)
    return dqkv, torch.cat((dq_sums.sum(0), dkdv_sums.sum(0)))


def gradients(qkv: Tensor, do: Tensor, p: float, seed: Tensor | None, doc_ids: Tensor | None) -> Tensor:
    """torch's dqkv, in qkv's dtype."""
    leaf = qkv.detach().requires_grad_()
    (dqkv,) = torch.autograd.grad(attention_same_dtype(leaf, p, seed, SITE, doc_ids), leaf, do)
    return dqkv


def assert_gradients(B: int, T: int, H: int, D: int, dtype: torch.dtype, p: float = 0.0, doc_ids: Tensor | None = None):
    do, qkv, o, lse, p, seed, site, doc_ids = inputs(B, T, H, D, dtype, p, doc_ids)
    with guarded():
        given_ = [between_margins(t) for t in (do, qkv, o, lse)]
        dqkv, db = attention_bwd(*given_, p, seed, site, doc_ids, True)
    same = gradients(qkv, do, p, seed, doc_ids)
    exact = gradients(qkv.double(), do.double(), p, seed, doc_ids)
    assert_parity(dqkv, same, exact, tiny=1e-6, what="dqkv")
    if T > 1:  # one key has no gradient: dq and dk are 0, which torch gets exactly, and dP - delta leaves a rounding
        for i, name in enumerate(("dq", "dk", "dv")):
            assert_parity(dqkv[:, :, i], same[:, :, i], exact[:, :, i], tiny=1e-6, what=name)
    # as one vector: db_k is 0 in exact arithmetic, which leaves torch no error to be measured by
    sums, exact_sums = same.sum((0, 1), dtype=torch.float32).flatten(), exact.sum((0, 1)).flatten()
    assert_parity(db, sums, exact_sums, tiny=1e-6, what="db")


# T: one row, less than a tile, one more than a tile, several of either; 64 fills its tiles. D: 16 and 64 fill theirs.
SHAPES = [(2, 1, 2, 16), (2, 2, 2, 20), (1, 17, 2, 64), (1, 33, 1, 80), (2, 64, 1, 16), (1, 65, 1, 64), (1, 100, 1, 20)]


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype, atomic: bool):
    with form(atomic):
        assert_gradients(*shape, dtype)


@FORMS
@pytest.mark.parametrize("blocks", [(32, 16), (16, 16), (64, 16)], ids=str)
@pytest.mark.parametrize("T", [65, 64])
def test_tiles_of_any_proportion(T: int, blocks: tuple[int, int], atomic: bool):
    with form(atomic, *blocks):
        assert_gradients(1, T, 1, 16, torch.float32)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 17, 2, 16), (1, 33, 1, 80), (1, 65, 1, 20)], ids=str)
def test_dropout(shape: tuple[int, int, int, int], dtype: torch.dtype, atomic: bool):
    with form(atomic):
        assert_gradients(*shape, dtype, p=0.3)


@FORMS
@pytest.mark.parametrize("dtype, p", [(torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.float16, 0.3)], ids=str)
def test_strewn_documents(dtype: torch.dtype, p: float, atomic: bool):
    with form(atomic):
        assert_gradients(2, 65, 1, 16, dtype, p, documents(2, 65, ordered=False))


@FORMS
def test_documents_in_int32_not_contiguous(atomic: bool):
    doc_ids = documents(1, 40, ordered=True)
    args = inputs(1, 40, 1, 16, torch.float32, doc_ids=doc_ids)
    narrow = torch.stack((doc_ids, doc_ids + 1), -1).int()[..., 0]
    with form(atomic):
        ours, want = attention_bwd(*args[:-1], narrow, False)[0], attention_bwd(*args, False)[0]
    assert_same(ours, want, atomic)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.sampled_from(DTYPES), st.integers(1, 2), st.integers(1, 50), st.integers(1, 2), st.integers(1, 40),
    st.sampled_from([0.0, 0.5, 0.9]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_shape(dtype: torch.dtype, B: int, T: int, H: int, D: int, p: float, docs: bool, atomic: bool):
    with form(atomic):
        assert_gradients(B, T, H, D, dtype, p, documents(B, T, ordered=False) if docs else None)


@pytest.mark.filterwarnings("ignore:overflow")  # of exponentials above the diagonal, which are not taken
@FORMS
def test_scores_of_ten_thousand(atomic: bool):
    """Far past what exp holds. float32 has lse of 1e4 to 2^-11, hence P to 1e-3; q k^T of these integers is exact."""
    do, qkv, *_ = inputs(1, 40, 1, 16, torch.float32)
    qkv = torch.cat(((qkv[:, :, :2] * 100).round(), qkv[:, :, 2:]), 2)
    o, lse = forward(qkv, 0.0, None, None)
    assert lse.abs().max() > 1e4
    with form(atomic):
        dqkv, _ = attention_bwd(do, qkv, o, lse, 0.0, None, SITE, None, False)
    exact = gradients(qkv.double(), do.double(), 0.0, None, None)
    torch.testing.assert_close(dqkv.double(), exact, rtol=0.0, atol=2e-3 * float(exact.abs().max()))


def assert_same(a: Tensor, b: Tensor, atomic: bool) -> None:
    """Bitwise; but on a GPU atomics add to dQ in any order."""
    if atomic and DEVICE.type == "cuda":
        assert torch.equal(a[:, :, 1:], b[:, :, 1:])
        torch.testing.assert_close(a, b)
    else:
        assert torch.equal(a, b)


def test_deterministic_form_repeats_its_bits():
    args = inputs(1, 40, 2, 64, torch.bfloat16, p=0.3)
    with form(False):
        first = attention_bwd(*args, True)
        for _ in range(1000 if DEVICE.type == "cuda" else 1):
            again = attention_bwd(*args, True)
            assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


@FORMS
def test_a_sequence_does_not_feel_the_batch(atomic: bool):
    do, qkv, o, lse, *rest = inputs(3, 40, 2, 16, torch.float16)
    with form(atomic):
        whole, _ = attention_bwd(do, qkv, o, lse, *rest, False)
        alone, _ = attention_bwd(do[1:2], qkv[1:2], o[1:2], lse[1:2], *rest, False)
    assert_same(whole[1:2], alone, atomic)


@FORMS
@pytest.mark.parametrize("which", ["q", "k", "v", "do"])
def test_nan_reaches_what_depends_on_it_and_no_other_head(which: str, atomic: bool):
    T, t = 40, 20
    do, qkv, o, lse, *rest = inputs(1, T, 2, 16, torch.float32)
    with form(atomic):
        clean, _ = attention_bwd(do, qkv, o, lse, *rest, False)
        if which == "do":
            do[0, t, 0, 3] = math.nan
        else:
            qkv[0, t, "qkv".index(which), 0, 3] = math.nan
        dqkv, db = attention_bwd(do, qkv, *forward(qkv, 0.0, None, None), *rest, True)
    assert_same(dqkv[:, :, :, 1:], clean[:, :, :, 1:], atomic)
    dq, dk, dv = dqkv[0, :, :, 0].isnan().all(-1).unbind(1)  # [T] each
    if which in ("q", "do"):  # one query's row: every key it sees
        assert dq.nonzero().tolist() == [[t]] and bool(dk[: t + 1].all())
        assert bool(dv[: t + 1].all()) if which == "q" else bool(dqkv[0, : t + 1, 2, 0, 3].isnan().all())
    else:  # the rows of all later queries, the last of which sees every key; but dv has no v in it
        assert bool(dq[t:].all() & dk.all()) and bool(dv.all()) == (which == "k")
    assert bool(db.view(3, 2, 16)[:2, 0].isnan().all()) and bool(db.view(3, 2, 16)[:, 1].isfinite().all())


@FORMS
def test_strided_and_misaligned_operands(atomic: bool):
    do, qkv, o, lse, *rest = inputs(2, 33, 2, 16, torch.bfloat16)
    do = do[:, :1].expand(-1, 33, -1, -1)  # a sum's gradient has stride 0
    storage = torch.empty(qkv.numel() + 1, dtype=qkv.dtype, device=DEVICE)
    misaligned = storage[1:].view(qkv.shape).copy_(qkv)
    transposed = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (o, lse)]
    with form(atomic):
        ours = attention_bwd(do, misaligned, *transposed, *rest, True)
        want = attention_bwd(do.contiguous(), qkv, o, lse, *rest, True)
    assert_same(ours[0], want[0], atomic)
    torch.testing.assert_close(ours[1], want[1])


@FORMS
@pytest.mark.parametrize("B, T", [(0, 5), (2, 0)])
def test_empty(B: int, T: int, atomic: bool):
    with form(atomic):
        dqkv, db = attention_bwd(*inputs(B, T, 2, 16, torch.float32), True)
    assert dqkv.shape == (B, T, 3, 2, 16) and torch.equal(db, torch.zeros(96, device=DEVICE))


@FORMS
def test_without_bias_grad_no_sums(atomic: bool):
    args = inputs(1, 20, 1, 16, torch.float16)
    with form(atomic):
        (dqkv, db), (same, _) = attention_bwd(*args, False), attention_bwd(*args, True)
    assert db.shape == (0,) and db.dtype == torch.float32
    assert_same(dqkv, same, atomic)


@pytest.mark.parametrize("rule, index, change", [
    ("qkv must be", 1, lambda qkv: qkv.flatten(2)),
    ("do must be", 0, lambda do: do[:, :-1]),
    ("do must be", 0, lambda do: do.half()),
    ("o must be", 2, lambda o: o.flatten(2)),
    ("lse must be", 3, lambda lse: lse.half()),
    ("lse must be", 3, lambda lse: lse.transpose(1, 2)),
    ("probability must be", 4, lambda p: 1.0),
    ("dropout needs a seed", 5, lambda seed: None),
    ("doc_ids must be", 7, lambda doc_ids: torch.zeros(1, 5, device=DEVICE)),
])  # fmt: skip
def test_contract(rule: str, index: int, change: Callable[[Any], Any]):
    args = list(inputs(1, 5, 2, 16, torch.float32, p=0.1))
    args[index] = change(args[index])
    with pytest.raises(ContractError, match=f"attention_bwd: .*{rule}"):
        attention_bwd(*args, True)


@pytest.mark.parametrize("atomic, p, docs", [(False, 0.0, False), (True, 0.3, True)])
def test_opcheck(atomic: bool, p: float, docs: bool):
    args = inputs(1, 18, 1, 16, torch.float32, p, documents(1, 18, ordered=True) if docs else None)
    with form(atomic):
        torch.library.opcheck(OPS.attention_bwd.default, (*args, True))


@triton.jit
def _offsets_kernel(x_ptr, out_ptr, head, start, stride, T, H, D: tl.constexpr):
    qkv_at, o_at, row_at, doc_at = head_offsets(tl.cast(head, tl.int32), T, H, D)
    at, _ = tile_at(x_ptr, start, stride, T, 2, D, D)
    tl.store(out_ptr, qkv_at)
    tl.store(out_ptr + 1, o_at)
    tl.store(out_ptr + 2, row_at)
    tl.store(out_ptr + 3, doc_at)
    tl.store(out_ptr + 4, tl.max(tl.max(at.to(tl.int64), 1), 0) - x_ptr.to(tl.int64))


def test_offsets_past_2_to_the_31():
    """Of B = 300,000 sequences of 65,536 tokens, and of the last rows of a matrix of 2^20 rows of 2^14."""
    T, H, D, b, h = 65536, 12, 16, 170_000, 7
    out, x = torch.zeros(5, dtype=torch.int64, device=DEVICE), torch.zeros(1, dtype=torch.int16, device=DEVICE)
    launch.launch("test", _offsets_kernel, (1,), x, out, b * H + h, 2**20 - 2, 2**14, T, H, D=D)
    tokens, last = b * T, (2**20 - 1) * 2**14 + D - 1
    assert out.tolist() == [tokens * 3 * H * D + h * D, tokens * H * D + h * D, (b * H + h) * T, tokens, 2 * last]
    assert min(out.tolist()) > 2**31
