"""attention: values, lse, gradients, and special inputs. Dropout and documents have a file of their own."""

import math
from contextlib import nullcontext

import kernel_case
import pytest
import torch
import triton
import triton.language as tl
from attention_case import attention_same_dtype, log_sums, tiles
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import DEVICE, DTYPES, assert_op, between_margins, guarded, randn
from nanogpt_kernels import launch, reference
from nanogpt_kernels.contract import ContractError
from nanogpt_kernels.ops.attention import attention, forward, op, qkv_attention
from nanogpt_kernels.ops.attention.forward import attention_fwd
from nanogpt_kernels.ops.attention.tile_access import query_tile
from nanogpt_kernels.registry import OPS
from parity import assert_parity
from triton.tools.tensor_descriptor import TensorDescriptor

# B, T, H, D, BLOCK_M, BLOCK_N
SHAPES = [
    (3, 1, 1, 16, 16, 16),  # one token attends to itself
    (1, 2, 3, 32, 16, 16),
    (1, 15, 1, 20, 16, 16),  # less than a tile, D no power of two
    (1, 16, 1, 80, 16, 16),  # exactly one tile
    (1, 17, 3, 20, 16, 16),  # a last tile of one query
    (2, 63, 1, 16, 32, 16),  # two key tiles on the diagonal
    (1, 65, 1, 64, 16, 32),  # key tiles longer than query tiles: the diagonal begins inside one
    (1, 100, 1, 128, 32, 16),
    (1, 130, 1, 32, 32, 32),
    (1, 5, 2, 7, 16, 16),  # D below 16, rows at odd addresses
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_lse(shape: tuple[int, ...], dtype: torch.dtype):
    B, T, H, D, BLOCK_M, BLOCK_N = shape
    qkv = randn(B, T, 3, H, D, dtype=dtype).detach()
    with tiles(BLOCK_M, BLOCK_N), guarded():
        o, lse = attention_fwd(between_margins(qkv), 0.0, None, 0, None)
    exact = reference.attention(qkv.double(), 0.0, None, 0)
    assert_parity(o, attention_same_dtype(qkv, 0.0, None, 0), exact, tiny=1e-6, what="o")
    # float32 whatever qkv is; tiny, because a GPU's exp2 and log2 are good to 2^-22
    assert_parity(lse, log_sums(qkv.float(), None), log_sums(qkv.double(), None), tiny=1e-6, what="lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 17, 3, 20), (1, 49, 1, 16), (1, 33, 1, 80)], ids=str)
def test_gradients(shape: tuple[int, ...], dtype: torch.dtype):
    B, T, H, D = shape
    inputs, do = [randn(B, T, 3, H, D, dtype=dtype), 0.0, None, 0], randn(B, T, H, D, seed=1).detach()
    with tiles():
        assert_op(attention, attention_same_dtype, inputs, [do], what="attention")


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2), T=st.integers(1, 40), H=st.integers(1, 3), D=st.integers(1, 40), dtype=st.sampled_from(DTYPES),
    BLOCK_M=st.sampled_from([16, 32]), BLOCK_N=st.sampled_from([16, 32]),
    layout=st.sampled_from(["packed", "sliced", "odd"]),
)  # fmt: skip
def test_any_shape_and_stride(
    B: int, T: int, H: int, D: int, dtype: torch.dtype, BLOCK_M: int, BLOCK_N: int, layout: str
):
    qkv = randn(B, T, 3, H, D, dtype=dtype).detach()
    if layout == "sliced":  # every second token of a longer tensor
        given_qkv = torch.empty(B, 2 * T, 3, H, D, dtype=dtype, device=DEVICE)[:, ::2].copy_(qkv)
    elif layout == "odd":  # one element past an aligned address
        given_qkv = torch.empty(qkv.numel() + 1, dtype=dtype, device=DEVICE)[1:].view(qkv.shape).copy_(qkv)
    else:
        given_qkv = qkv
    with tiles(BLOCK_M, BLOCK_N), guarded():
        o, _ = attention_fwd(given_qkv, 0.0, None, 0, None)
    assert_parity(
        o, attention_same_dtype(qkv, 0.0, None, 0), reference.attention(qkv.double(), 0.0, None, 0), tiny=1e-6
    )


def test_huge_logits():
    """Scores of 1e4 and more overflow exp; the largest decides."""
    for dtype in (torch.float32, torch.bfloat16):
        qkv = randn(1, 33, 3, 1, 16, dtype=dtype, scale=100.0).detach()
        with tiles():
            o, lse = attention_fwd(qkv, 0.0, None, 0, None)
        assert lse.max() > 1e4 and lse.isfinite().all()
        exact = reference.attention(qkv.double(), 0.0, None, 0)
        assert_parity(o, attention_same_dtype(qkv, 0.0, None, 0), exact, tiny=1e-6)


Q, K, V = range(3)


@pytest.mark.parametrize("part", [Q, K, V], ids="qkv")
def test_nan_and_infinity_stay_where_they_belong(part: int):
    """A poisoned token 20 shows in the rows that see it, and earlier tiles' rows keep their bits."""
    clean = randn(1, 40, 3, 2, 16).detach()
    with tiles():
        expected, _ = attention_fwd(clean, 0.0, None, 0, None)
        for poison in (math.nan, math.inf):
            qkv = clean.clone()
            qkv[0, 20, part, 0, 3] = poison
            o, lse = attention_fwd(qkv, 0.0, None, 0, None)
            assert torch.equal(o[:, :16], expected[:, :16]) and torch.equal(o[:, :, 1], expected[:, :, 1])
            ours, theirs = o[0, :, 0], reference.attention(qkv.double(), 0.0, None, 0)[0, :, 0]
            if part == Q:  # its own row alone
                assert ours[20].isnan().all() and lse[0, 0, 20].isnan()
                assert torch.equal(ours[21:], expected[0, 21:, 0]) and torch.equal(ours[:20], expected[0, :20, 0])
            elif part == K:  # rows from 20 on; +inf gives scores of either sign
                assert torch.equal(ours[:20], expected[0, :20, 0])
                assert torch.equal(ours.isnan(), theirs.isnan()) and ours.isnan().any()
            else:  # column 3 of those rows; 0 * inf in the rest of its tile, as in a plain product
                assert not ours[20:, 3].isfinite().any()
                ours[:, 3] = expected[0, :, 0, 3]
                assert torch.equal(ours, expected[0, :, 0])


def test_a_row_without_a_finite_score():
    """All scores -inf: NaN, as torch.softmax says."""
    qkv = randn(1, 20, 3, 1, 16).detach().abs()
    qkv[0, 17, Q] = -math.inf
    with tiles():
        o, _ = attention_fwd(qkv, 0.0, None, 0, None)
    assert o[0, 17].isnan().all()
    qkv[0, 17, K] = -1.0  # its own key now scores +inf
    assert attention_fwd(qkv, 0.0, None, 0, None)[0][0, 17].isnan().all()
    qkv[0, 17, Q], qkv[0, 2, K] = 1.0, -math.inf  # one key of score -inf weighs nothing
    with tiles():
        o, _ = attention_fwd(qkv, 0.0, None, 0, None)
    assert_parity(o[:, 3:], *(reference.attention(q, 0.0, None, 0)[:, 3:] for q in (qkv, qkv.double())), tiny=1e-6)


def test_batch_invariance_and_determinism():
    qkv = randn(2, 33, 3, 2, 16, dtype=torch.bfloat16)
    with tiles():
        once, again = attention(qkv, 0.0, None, 0), attention(qkv, 0.0, None, 0)
        (grad,), (grad_again,) = (torch.autograd.grad(o.float().square().sum(), qkv) for o in (once, again))
        assert torch.equal(once, again) and torch.equal(grad, grad_again)
        for b in range(2):
            assert torch.equal(attention(qkv[b : b + 1], 0.0, None, 0), once[b : b + 1])


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 16), (2, 0, 3, 2, 16)], ids=str)
def test_empty(shape: tuple[int, ...]):
    qkv = randn(*shape)
    o = attention(qkv, 0.0, None, 0)
    assert o.shape == (shape[0], shape[1], 2, 16)
    o.sum().backward()
    assert qkv.grad is not None and qkv.grad.shape == shape


def test_contracts():
    qkv, seed = randn(1, 4, 3, 2, 16).detach(), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for wrong, rule in [
        ((qkv[:, :, :2], 0.0, None, 0), r"qkv must be \[B, T, 3, H, D\]"),
        ((qkv[0], 0.0, None, 0), r"qkv must be \[B, T, 3, H, D\]"),
        ((qkv.double(), 0.0, None, 0), "float32, bfloat16 or float16"),
        ((torch.zeros(1, 4, 3, 2, 129, device=DEVICE), 0.0, None, 0), r"D must be in 1\.\.\.128"),
        ((qkv, 1.0, seed, 0), r"dropout probability must be in \[0, 1\)"),
        ((qkv, 0.1, None, 0), "dropout needs a seed, one int64"),
        ((qkv, 0.1, seed.float(), 0), "dropout needs a seed, one int64"),
        ((qkv, 0.0, None, 0, torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)), "doc_ids must be int32 or int64"),
        ((qkv, 0.0, None, 0, torch.zeros(1, 4, device=DEVICE)), "doc_ids must be int32 or int64"),
        ((qkv, 0.0, None, 0, torch.zeros(1, 4, dtype=torch.int64, device="meta")), "different devices"),
    ]:
        with pytest.raises(ContractError, match=f"attention: .*{rule}"):
            attention(*wrong)


def test_without_gradient_no_node_is_made(monkeypatch: pytest.MonkeyPatch):
    qkv, w = randn(1, 4, 3, 1, 16), randn(48, 16)
    expected = attention(qkv, 0.0, None, 0), qkv_attention(qkv[:, :, 0, 0], w, None, 1, 0.0, None, 0)
    for node in (op._Attention, op._QKVAttention):
        monkeypatch.setattr(node, "forward", None)
    for context, x in ((torch.no_grad(), qkv), (nullcontext(), qkv.detach())):
        with context:
            assert torch.equal(attention(x, 0.0, None, 0), expected[0])
            o = qkv_attention(x[:, :, 0, 0], w if x is qkv else w.detach(), None, 1, 0.0, None, 0)
            assert torch.equal(o, expected[1])


def test_twice_is_refused():
    qkv = randn(1, 4, 3, 1, 16)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(attention(qkv, 0.0, None, 0).sum(), qkv, create_graph=True)


def test_opcheck():
    qkv = randn(2, 5, 3, 2, 16).detach()
    torch.library.opcheck(OPS.attention_fwd.default, (qkv, 0.0, None, 0, None))


@triton.jit
def _query_tile_kernel(head_ptr, tile_ptr, heads, T, D: tl.constexpr, BLOCK_M: tl.constexpr):
    head, tile = query_tile(tl.program_id(0), heads, T, D, BLOCK_M, 2)
    tl.store(head_ptr + tl.program_id(0), head)
    tl.store(tile_ptr + tl.program_id(0), tile)


@pytest.mark.parametrize("heads, T, group", [(7, 8192, 4), (3, 100, 3), (2, 2**18, 1)])
def test_order_of_programs(heads: int, T: int, group: int):
    """Every tile of every head once, in groups of heads of 16 MB of keys and values, a group's longest tiles first."""
    BLOCK_M = max(16, T // 4)
    programs = heads * -(-T // BLOCK_M)
    head, tile = (torch.full((programs,), -1, dtype=torch.int32, device=DEVICE) for _ in range(2))
    launch.launch("test", _query_tile_kernel, (programs,), head, tile, heads, T, D=128, BLOCK_M=BLOCK_M)
    order = list(zip((head // group).tolist(), (-tile).tolist(), (head % group).tolist()))
    assert order == sorted(order) and len(set(order)) == programs
    assert head.min() == 0 and head.max() == heads - 1 and tile.min() == 0 and (tile.max() + 1) * heads == programs


def test_guards_see_what_lies_beyond():
    """The margins around inputs are NaN: a load past T would show."""
    qkv = between_margins(randn(1, 17, 3, 1, 16).detach())
    with tiles(32, 32), kernel_case.guarded():
        assert attention_fwd(qkv, 0.0, None, 0, None)[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pointers_and_descriptors_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    seen, stock = [], forward.launch

    def watching(op, kernel, grid, *args, **options):
        seen.append((options["TMA"], isinstance(args[1], TensorDescriptor)))
        stock(op, kernel, grid, *args, **options)

    monkeypatch.setattr(forward, "launch", watching)
    odd = lambda t: torch.empty(t.numel() + 1, dtype=t.dtype, device=DEVICE)[1:].view(t.shape).copy_(t)
    for T, D, BLOCK_M, BLOCK_N in [(64, 16, 32, 16), (64, 64, 16, 32)]:
        qkv = randn(2, T, 3, 3, D, dtype=dtype).detach()
        with tiles(BLOCK_M, BLOCK_N):
            expected = attention_fwd(qkv, 0.0, None, 0, None)
            with launch.override("attention_fwd", choices=dict(tma=True)):
                for x in (qkv, odd(qkv)):  # the second's address suits no descriptor
                    assert all(map(torch.equal, attention_fwd(x, 0.0, None, 0, None), expected))
    described = launch.architecture(DEVICE) >= 90
    assert seen == [(False, False), (described, described), (False, False)] * 2


@pytest.mark.parametrize(
    "arch, T, D, described",
    [(90, 128, 64, True), (100, 128, 128, True), (89, 128, 64, False), (90, 130, 64, False), (90, 128, 80, False)],
)
def test_where_descriptors_are_made(arch: int, T: int, D: int, described: bool):
    """From sm_90 on, of whole tiles."""
    with launch.recording(arch) as calls, launch.override("attention_fwd", choices=dict(tma=True)):
        attention_fwd(torch.empty(2, T, 3, 2, D, dtype=torch.bfloat16, device="meta"), 0.0, None, 0, None)
    (call,) = calls
    found = [a for a in call.args if isinstance(a, TensorDescriptor)]
    assert [a.block_shape for a in found] == [[call.options["BLOCK_N"], D]] * described
    assert call.options["TMA"] is described and all(list(a.shape) == [2 * T, 6 * D] for a in found)
