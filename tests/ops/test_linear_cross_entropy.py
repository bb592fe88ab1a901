"""The linear head and cross-entropy in one op, in chunks of rows, against reference.linear_cross_entropy."""

import math
from typing import Any

import kernel_case
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import DEVICE, DTYPES, randn
from nanogpt_kernels import launch, reference
from nanogpt_kernels.contract import ContractError, checked
from nanogpt_kernels.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_fwd
from nanogpt_kernels.registry import OPS
from parity import assert_parity
from torch import Tensor

C = 24


@pytest.fixture(autouse=True)
def small_tiles():
    with launch.override("cross_entropy", blocks=dict(BLOCK_V=64), num_warps=4, choices=dict(chunk_rows=5)):
        yield


def draw_targets(*shape: int, V: int, ignored: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    targets = torch.randint(V, shape, generator=generator)
    return targets.where(torch.rand(shape, generator=generator) >= ignored, -1).to(DEVICE)


def with_main_grad(w: Tensor, value: float = 0.0) -> Tensor:
    """A leaf of w's values whose main_grad is filled with `value`."""
    w = w.detach().clone().requires_grad_()
    w.main_grad = torch.full(w.shape, value, device=DEVICE)  # type: ignore[attr-defined]
    return w


def results(op, x: Tensor, w: Tensor, *rest) -> list[Tensor]:
    """loss, nll, dx, and dw from wherever it went."""
    x = x.detach().requires_grad_()
    loss, nll = op(x, w, *rest)
    if hasattr(w, "main_grad"):
        return [loss.detach(), nll, *torch.autograd.grad(loss, [x]), w.main_grad.clone()]  # type: ignore[attr-defined]
    return [loss.detach(), nll, *torch.autograd.grad(loss, [x, w])]


def test_targets_that_are_not_contiguous():
    x, w, targets = randn(6, C), randn(65, C, seed=1), draw_targets(3, 4, V=65)[:, ::2]
    inputs = x, w.requires_grad_(), targets, 1 / 6
    found = results(linear_cross_entropy, *inputs)
    for ours, theirs in zip(found, results(linear_cross_entropy, x, w, targets.contiguous(), 1 / 6)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "V", "valid"),
    [
        (1, 1, None),
        (5, 65, None),  # one chunk, whole
        (11, 65, None),  # two chunks and a row
        (6, 192, 129),  # a padded vocabulary
    ],
)
def test_values_and_gradients(M: int, V: int, valid: int | None, dtype: torch.dtype):
    inputs = [randn(M, C, dtype=dtype), randn(V, C, dtype=dtype, seed=1), draw_targets(M, V=valid or V), 1 / M, -1]
    kernel_case.assert_op(
        linear_cross_entropy, reference.linear_cross_entropy, [*inputs, valid], [torch.tensor(2.0)], what="head"
    )


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_ignore_index_is_the_callers(ignore_index: int):
    """torch's own -100; and 0, an id that is in the vocabulary."""
    targets = draw_targets(11, V=65)
    targets = targets.where(targets >= 0, ignore_index)
    inputs = [randn(11, C), randn(65, C, seed=1), targets, 1 / 11, ignore_index]
    nll = linear_cross_entropy(*inputs)[1]
    assert bool((nll[targets == ignore_index] == 0).all()) and bool((nll[targets != ignore_index] > 0).all())
    kernel_case.assert_op(linear_cross_entropy, reference.linear_cross_entropy, inputs, what="head")


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(1,), (7,), (2, 3), (2, 1, 4)]),
    V=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "offset", "expanded"]),
)
def test_any_shape_and_layout(shape: tuple[int, ...], V: int, dtype: torch.dtype, layout: str):
    x, w = randn(*shape, C, dtype=dtype).detach(), randn(V, C, dtype=dtype, seed=1).detach()
    if layout == "transposed":
        x, w = x.transpose(0, -1).contiguous().transpose(0, -1), w.t().contiguous().t()
    elif layout == "offset":
        x, w = (
            torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
            torch.cat([w[0, :1], w.flatten()])[1:].view(V, C),
        )
    elif layout == "expanded":
        x = x[:1].expand(x.shape)
    inputs = [x.requires_grad_(), w.requires_grad_(), draw_targets(*shape, V=V), 0.5]
    kernel_case.assert_op(linear_cross_entropy, reference.linear_cross_entropy, inputs, what=f"{layout} {shape}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_main_grad_receives_the_gradient_in_forward(dtype: torch.dtype):
    """And accumulates over calls, while autograd has nothing to add."""
    x, targets = randn(11, C, dtype=dtype), draw_targets(11, V=70)
    w = with_main_grad(randn(70, C, dtype=dtype, seed=1), 0.5)
    once = results(linear_cross_entropy, x, w, targets, 0.1)
    loss, _ = linear_cross_entropy(x, w, targets, 0.1)
    twice = w.main_grad.clone()  # type: ignore[attr-defined]
    loss.backward()
    assert w.grad is None and torch.equal(twice, w.main_grad) and x.grad is not None  # type: ignore[attr-defined]
    assert torch.equal(x.grad, once[2])
    plain = results(linear_cross_entropy, x, w.detach().requires_grad_(), targets, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(once[:3], plain[:3]))
    same, exact = (
        results(reference.linear_cross_entropy, x.to(t), w.detach().to(t).requires_grad_(), targets, 0.1)[3]
        for t in (dtype, torch.float64)
    )
    assert_parity(once[3] - 0.5, same.float(), exact, tiny=1e-6, what="main_grad")
    assert_parity(twice - 0.5, 2.0 * same.float(), 2.0 * exact, tiny=1e-6, what="main_grad of two calls")


@pytest.mark.parametrize("without", ["no_grad", "inference_mode", "requires_grad"])
def test_without_gradients_nothing_is_written(without: str):
    x, w, targets = randn(7, C), with_main_grad(randn(70, C), 0.5), draw_targets(7, V=70)
    loss, nll = linear_cross_entropy(x, w, targets)
    after = w.main_grad.clone()  # type: ignore[attr-defined]
    if without == "requires_grad":
        quiet = linear_cross_entropy(x.detach(), w.requires_grad_(False), targets)
    else:
        with getattr(torch, without)():
            quiet = linear_cross_entropy(x, w, targets)
    assert torch.equal(quiet[0], loss) and torch.equal(quiet[1], nll) and not quiet[0].requires_grad
    assert torch.equal(after, w.main_grad)  # type: ignore[attr-defined]


def test_autocast_changes_nothing():
    """Products stay in the operands' dtype: the trainer's parameters are stored in the compute dtype."""
    x, w, targets = randn(7, C), randn(70, C, seed=1), draw_targets(7, V=70)
    plain = results(linear_cross_entropy, x, w, targets)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        cast = results(linear_cross_entropy, x, w, targets)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, cast))


def test_only_what_is_wanted_is_computed():
    """A frozen head gives dx and leaves main_grad; a frozen input gives dw; each is what both together give."""
    x, targets = randn(7, C), draw_targets(7, V=70)
    w = with_main_grad(randn(70, C, seed=1), 0.0)
    _, _, dx, main_grad = results(linear_cross_entropy, x, w, targets)
    linear_cross_entropy(x.detach(), w, targets)[0].backward()
    twice = w.main_grad.clone()  # type: ignore[attr-defined]
    torch.testing.assert_close(twice, 2 * main_grad, rtol=1e-6, atol=1e-6)  # added to a chunk at a time, so it rounds
    loss, _ = linear_cross_entropy(x, w.requires_grad_(False), targets)
    assert torch.equal(torch.autograd.grad(3 * loss, x)[0], 3 * dx)
    assert torch.equal(w.main_grad, twice)  # type: ignore[attr-defined]
    scale, free = torch.tensor(1.0, device=DEVICE), w.detach()
    _, _, no_dx, dw = linear_cross_entropy_fwd(x.detach(), free, targets, scale, None, -1, 70, False, True)
    assert no_dx.numel() == 0 and torch.equal(dw, main_grad)


def test_a_gradient_other_than_1_is_refused_with_main_grad():
    x, w, targets = randn(7, C), with_main_grad(randn(70, C)), draw_targets(7, V=70)
    with checked():
        linear_cross_entropy(x, w, targets)[0].backward()
        with pytest.raises(ContractError, match="the loss's gradient must be 1 where w has main_grad, not 2.0"):
            (2 * linear_cross_entropy(x, w, targets)[0]).backward()


def test_all_ignored():
    x, w = randn(7, C), randn(70, C)
    loss, nll, dx, dw = results(linear_cross_entropy, x, w, torch.full((7,), -1, device=DEVICE))
    assert loss == 0 and not nll.any() and not dx.any() and not dw.any()


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("fill", [math.nan, math.inf, 1e4])
def test_unusual_activations_are_torch_s(fill: float):
    x, w, targets = randn(7, C).detach(), randn(70, C, seed=1), draw_targets(7, V=70, ignored=0.0)
    x[2, 3] = fill
    theirs = results(reference.linear_cross_entropy, x, w, targets)
    for a, b in zip(results(linear_cross_entropy, x, w, targets), theirs):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_a_target_out_of_range_gives_nan_in_its_row_alone():
    x, w, targets = randn(7, C), randn(70, C), draw_targets(7, V=65)
    targets[4] = 66
    _, nll, dx, _ = results(linear_cross_entropy, x, w, targets, 1.0, -1, 65)
    others = torch.arange(7, device=DEVICE) != 4
    assert nll[4].isnan() and dx[4].isnan().all() and nll[others].isfinite().all() and dx[others].isfinite().all()
    with checked(), pytest.raises(ContractError, match=r"targets must be in \[0, 65\), but targets\[4\] is 66"):
        linear_cross_entropy(x, w, targets, 1.0, -1, 65)


def test_repeats_bitwise_and_rows_do_not_depend_on_their_chunk_mates():
    x, w, targets = randn(7, C), randn(70, C), draw_targets(7, V=70)
    first, again = (results(linear_cross_entropy, x, w, targets) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    zeroed = x.detach().clone()
    zeroed[:2] = 0  # the product's shape stays: what cuBLAS does with other shapes is its own
    other = results(linear_cross_entropy, zeroed, w, targets)
    assert torch.equal(first[1][2:], other[1][2:]) and torch.equal(first[2][2:], other[2][2:])


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_no_rows(shape: tuple[int, ...]):
    w = with_main_grad(randn(70, C), 0.5)
    targets = torch.empty(shape, dtype=torch.int64, device=DEVICE)
    loss, nll, dx, main_grad = results(linear_cross_entropy, randn(*shape, C), w, targets)
    assert loss == 0 and nll.shape == (0,) and dx.shape == (*shape, C) and (main_grad == 0.5).all()


def test_contract():
    x, w, targets = randn(2, 3, C), randn(70, C), draw_targets(2, 3, V=70)
    half = with_main_grad(w)
    half.main_grad = half.main_grad.half()  # type: ignore[attr-defined]
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((x.bfloat16(), w, targets), "x and w must have one dtype"),
        ((x.double(), w.double(), targets), "x must be float32, bfloat16 or float16"),
        ((x[..., 1:], w, targets), r"x is \[..., C\] and w \[V, C\]"),
        ((x[0, 0], w, targets[0, :1]), r"x is \[..., C\] and w \[V, C\]"),
        ((x, w, targets[:1]), "one target for each of 6 rows"),
        ((x, w, targets.int()), "targets must be int64"),
        ((x, w, targets, torch.ones(2, device=DEVICE)), "grad_scale must be one number"),
        ((x, w, targets, 1.0, -1, 0), r"valid_vocab must be in \[1, 70\]"),
        ((x, half, targets), "main_grad must be float32 of w's shape"),
        ((x, w, targets.to("meta")), "operands lie on different devices"),
    ]
    for inputs, rule in cases:
        with pytest.raises(ContractError, match=f"linear_cross_entropy: .*{rule}"):
            linear_cross_entropy(*inputs)


def test_no_second_derivative():
    x = randn(2, C)
    loss, nll = linear_cross_entropy(x, randn(70, C), draw_targets(2, V=70))
    assert not nll.requires_grad
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("main_grad", [False, True])
def test_registration(main_grad: bool):
    x, w, scale = randn(7, C).detach(), randn(70, C).detach(), torch.tensor(0.5, device=DEVICE)
    buffer = torch.zeros(70, C, device=DEVICE) if main_grad else None
    inputs = (x, w, draw_targets(7, V=65), scale, buffer, -1, 65, True, True)
    torch.library.opcheck(OPS.linear_cross_entropy_fwd, inputs)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("main_grad", [False, True])
def test_compiled_whole(backend: str, main_grad: bool):
    """Two calls without a graph break, the second with other rows; main_grad accumulates; no_grad leaves it."""

    def model(h: Tensor, w: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        loss, nll = linear_cross_entropy(torch.tanh(h), w, targets, scale, valid_vocab=65)
        return loss + 0.0 * nll.detach().sum()

    def run(f) -> list[Tensor]:
        w, scale = randn(70, C, seed=1), torch.tensor(0.25, device=DEVICE)
        if main_grad:
            w = with_main_grad(w, 0.5)
        seen = []
        for rows in (7, 12):
            h = randn(rows, C)
            loss = f(h, w, draw_targets(rows, V=65), scale)
            loss.backward()
            with torch.no_grad():
                quiet = f(h, w, draw_targets(rows, V=65), scale)
            assert h.grad is not None
            seen += [loss.detach(), quiet, h.grad]
        reached = w.main_grad if main_grad else w.grad  # type: ignore[attr-defined]
        assert main_grad == (w.grad is None) and reached is not None
        return [*seen, reached]

    torch.compiler.reset()
    for ours, eager in zip(run(torch.compile(model, fullgraph=True, backend=backend)), run(model)):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
        assert eager.any()
