"""Cross-entropy of logits in Triton, against torch's."""

import math
from typing import Any

import kernel_case
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import DEVICE, DTYPES, randn
from nanogpt_kernels import launch
from nanogpt_kernels.contract import ContractError, checked
from nanogpt_kernels.ops.cross_entropy import cross_entropy, cross_entropy_bwd, cross_entropy_fwd
from nanogpt_kernels.registry import OPS
from torch import Tensor

NAN, INF = math.nan, math.inf
TILE = 64  # columns in these tests, so that small rows have several tiles


@pytest.fixture(autouse=True)
def small_tiles():
    with launch.override("cross_entropy", blocks=dict(BLOCK_V=TILE), num_warps=4):
        yield


def in_torch(
    logits: Tensor, targets: Tensor, grad_scale: Tensor | float = 1.0, ignore_index: int = -1, valid: int | None = None
) -> tuple[Tensor, Tensor]:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    nll = F.cross_entropy(wide[:, :valid], targets, ignore_index=ignore_index, reduction="none")
    return (nll * grad_scale).sum(), nll.detach()


def draw_targets(M: int, V: int, ignored: float = 0.2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(V, (M,), generator=generator)
    return targets.where(torch.rand(M, generator=generator) >= ignored, -1).to(DEVICE)


def with_gradient(logits: Tensor, *rest, op=cross_entropy) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    loss, nll = op(logits, *rest)
    return loss.detach(), nll, torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "V", "valid"),
    [
        (1, 1, None),  # a class alone: nll and gradient are 0
        (3, 65, None),  # Shakespeare's characters: one full tile and one of a single column
        (5, 127, None),  # odd: rows are not aligned to vectors
        (4, 192, 129),  # padded vocabulary: the last tile half, the one before it nearly out
        (2, 256, 64),  # whole tiles of padding
    ],
)
def test_values_and_gradient(M: int, V: int, valid: int | None, dtype: torch.dtype):
    inputs = [randn(M, V, dtype=dtype, scale=3.0), draw_targets(M, valid or V), 0.37, -1, valid]
    kernel_case.assert_op(cross_entropy, in_torch, inputs, [torch.tensor(2.0)], tiny=1e-6, what="cross_entropy")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    M=st.integers(1, 4),
    V=st.integers(1, 150),
    padding=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    layout=st.sampled_from(["rows", "columns", "offset", "expanded"]),
    ignore_index=st.sampled_from([-1, -100, 0]),
)
def test_any_shape_and_layout(M: int, V: int, padding: int, dtype, scale: float, layout: str, ignore_index: int):
    width = V + padding
    z = randn(M * width + 1, dtype=dtype, scale=scale, seed=V).detach()
    logits = {
        "rows": z[:-1].view(M, width)[:, :V],  # a slice of padded logits: rows further apart than they are long
        "columns": z[: M * V].view(V, M).t(),
        "offset": z[1:].view(M, width),  # not aligned to 16 bytes
        "expanded": z[:width].expand(M, width),
    }[layout].requires_grad_()
    targets = draw_targets(M, V, seed=M)
    targets = targets.where(targets >= 0, ignore_index)
    inputs = [logits, targets, 0.5, ignore_index, V]
    kernel_case.assert_op(cross_entropy, in_torch, inputs, tiny=1e-6, what=f"{layout} {logits.shape}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpt2_s_vocabulary_by_the_shipped_tiles(dtype: torch.dtype):
    inputs = [randn(2, 50304, dtype=dtype, scale=2.0), draw_targets(2, 50257, ignored=0.0), 0.5, -1, 50257]
    with launch.override("cross_entropy"):
        kernel_case.assert_op(cross_entropy, in_torch, inputs, what="GPT-2")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backwards", [True, False])
def test_rows_in_turn_and_loads_in_turn(backwards: bool, dtype: torch.dtype):
    """Programs take a second row; a thread has four vectors of a tile, whose second pass goes either way."""
    inputs = [randn(11, 1304, dtype=dtype, scale=3.0), draw_targets(11, 1290), 0.5, -1, 1290]
    tile = 32 * 4 * (16 // dtype.itemsize)
    choices = dict(programs_per_sm=1, backwards=backwards, evict_first=backwards)
    with launch.override("cross_entropy", blocks=dict(BLOCK_V=tile), num_warps=1, choices=choices):
        kernel_case.assert_op(cross_entropy, in_torch, inputs, tiny=1e-6, what="rows in turn")


def test_logits_stay_as_they_are():
    logits = randn(3, 100)
    before = logits.detach().clone()
    cross_entropy(logits, draw_targets(3, 100))[0].backward()
    assert torch.equal(logits.detach(), before)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize(
    ("name", "fill", "at"),
    [
        ("NaN first", NAN, 0),
        ("NaN last", NAN, 149),
        ("+inf", INF, 70),
        ("-inf beside the target", -INF, 70),
        ("-inf at the target", -INF, 5),
        ("all -inf", -INF, slice(None)),
        ("all +inf", INF, slice(None)),
        ("lowest float", -3.4028234663852886e38, 3),
        ("huge", 1e4, 70),
        ("huge at the target", 1e4, 5),
        ("all huge", 1e4, slice(None)),
        ("all hugely negative", -1e4, slice(None)),
        ("huge spread", 3e38, slice(0, 75)),
    ],
)
def test_unusual_logits_are_torch_s(name: str, fill: float, at: int | slice):
    """NaN where torch has it, in nll and gradient; and the other row does not notice."""
    logits = randn(2, 150).detach()
    logits[0, at] = fill
    targets = torch.tensor([5, 7], device=DEVICE)
    for ours, theirs in zip(with_gradient(logits, targets), with_gradient(logits, targets, op=in_torch)):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=2e-6, atol=1e-7)


def test_huge_logits_keep_their_differences():
    """At 1e4 a log-sum-exp held in one float32 is 5e-4 off; maximum and sum apart are not."""
    logits = (randn(4, 100) * 0.01 + 1e4).detach().requires_grad_()
    kernel_case.assert_op(cross_entropy, in_torch, [logits, draw_targets(4, 100, ignored=0.0)], tiny=1e-7, what="huge")


def test_ignored_rows_are_not_read():
    logits = torch.full((3, 100), NAN, device=DEVICE)
    targets = torch.full((3,), -1, device=DEVICE)
    loss, nll, dlogits = with_gradient(logits, targets)
    assert loss == 0 and not nll.any() and not dlogits.any()


@pytest.mark.parametrize("target", [-2, 90, 100, 2**62, -(2**62)])
def test_a_target_out_of_range_gives_nan_in_its_row_alone(target: int):
    """90 lies in the padding; the larger ones, read, would fault."""
    logits = randn(2, 100)
    targets = torch.tensor([target, 3], device=DEVICE)
    _, nll, dlogits = with_gradient(logits, targets, 1.0, -1, 90)
    assert nll[0].isnan() and dlogits[0, :90].isnan().all() and not dlogits[0, 90:].any()
    assert nll[1].isfinite() and dlogits[1].isfinite().all()
    with checked(), pytest.raises(ContractError, match=r"targets must be in \[0, 90\), but targets\[0\] is"):
        cross_entropy(logits, targets, 1.0, -1, 90)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(0.25).double()])
def test_grad_scale_is_a_number_or_a_tensor(scale: Tensor | float):
    logits, targets = randn(3, 70), draw_targets(3, 70)
    on_device = scale.to(DEVICE) if isinstance(scale, Tensor) else scale
    for ours, theirs in zip(with_gradient(logits, targets, on_device), with_gradient(logits, targets, 0.25)):
        assert torch.equal(ours, theirs)


def test_float16_gradients_do_not_underflow_with_a_loss_scale():
    """Entries near 1 / (V tokens) vanish below float16's 6e-8: the scale must come before the rounding."""
    logits, targets = randn(2, 200, dtype=torch.float16, scale=0.1), torch.tensor([1, 2], device=DEVICE)
    unscaled = with_gradient(logits, targets, 1 / 2**19)[2]
    scaled = with_gradient(logits, targets, 65536.0 / 2**19)[2]
    assert (unscaled == 0).any() and (scaled != 0).all()
    kernel_case.assert_op(cross_entropy, in_torch, [logits, targets, 65536.0 / 2**19], what="scaled")


def test_repeats_bitwise_and_rows_do_not_depend_on_each_other():
    logits, targets = randn(5, 150, dtype=torch.bfloat16), draw_targets(5, 150)
    first, again = with_gradient(logits, targets), with_gradient(logits, targets)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    alone = with_gradient(logits[3:4], targets[3:4])
    assert torch.equal(alone[1], first[1][3:4]) and torch.equal(alone[2], first[2][3:4])


def test_targets_that_are_not_contiguous():
    logits, targets = randn(6, 50), draw_targets(12, 50)[::2]
    for ours, theirs in zip(with_gradient(logits, targets), with_gradient(logits, targets.contiguous())):
        assert torch.equal(ours, theirs)


def test_no_rows():
    loss, nll, dlogits = with_gradient(randn(0, 50), torch.empty(0, dtype=torch.int64, device=DEVICE))
    assert loss == 0 and nll.shape == (0,) and dlogits.shape == (0, 50)


def test_more_elements_than_int32_counts():
    """Row 2 starts past 2^31 elements, at a stride below; the gaps are never touched, so take no memory on a CPU."""
    V, stride = 40, 2**30 + 8
    logits = torch.empty(2 * stride + V, dtype=torch.float16, device=DEVICE).as_strided((3, V), (stride, 1))
    near = randn(3, V, dtype=torch.float16).detach()
    for far, row in zip(logits, near):
        far.copy_(row)
    targets = torch.tensor([3, 39, 0], device=DEVICE)
    scale = torch.tensor(1.0, device=DEVICE)
    _, nll, peak, total = cross_entropy_fwd(logits, targets, scale, -1, V)
    assert torch.equal(nll, cross_entropy(near, targets)[1])
    dlogits = cross_entropy_bwd(logits, targets, scale, peak, total, -1, V)
    assert torch.equal(dlogits, with_gradient(near, targets)[2])


def test_contract():
    logits, targets = randn(3, 50), draw_targets(3, 50)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((logits, targets.int()), "targets must be int64"),
        ((logits, targets[:2]), "one target for each of 3 rows"),
        ((logits[0], targets), r"logits must be \[M, V\]"),
        ((logits.double(), targets), "logits must be float32, bfloat16 or float16"),
        ((logits, targets, torch.ones(2, device=DEVICE)), "grad_scale must be one number"),
        ((logits, targets, torch.ones((), device=DEVICE, requires_grad=True)), "grad_scale must be one number"),
        ((logits, targets, 1.0, -1, 0), r"valid_vocab must be in \[1, 50\]"),
    ]
    for inputs, rule in cases:
        with pytest.raises(ContractError, match=f"cross_entropy: .*{rule}"):
            cross_entropy(*inputs)
    assert torch.equal(cross_entropy(logits, targets, valid_vocab=99)[1], cross_entropy(logits, targets)[1])


def test_no_second_derivative():
    logits = randn(2, 10)
    loss, nll = cross_entropy(logits, draw_targets(2, 10))
    assert not nll.requires_grad
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_nothing_is_kept_without_gradients():
    logits, targets = randn(2, 10), draw_targets(2, 10)
    with torch.no_grad():
        loss, _ = cross_entropy(logits, targets)
    assert not loss.requires_grad and not cross_entropy(logits.detach(), targets)[0].requires_grad


def test_registration():
    logits, targets, scale = randn(3, 70), draw_targets(3, 70), torch.tensor(0.5, device=DEVICE)
    _, _, peak, total = cross_entropy_fwd(logits.detach(), targets, scale, -1, 65)
    torch.library.opcheck(OPS.cross_entropy_fwd, (logits.detach(), targets, scale, -1, 65))
    torch.library.opcheck(OPS.cross_entropy_bwd, (logits.detach(), targets, scale, peak, total, -1, 65))


def test_compiled_whole():
    logits, targets = randn(3, 70), draw_targets(3, 70)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(with_gradient(logits, targets, 0.5, op=compiled), with_gradient(logits, targets, 0.5)):
        assert torch.equal(ours, theirs)
