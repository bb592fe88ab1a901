"""The second stage of vectors' gradients: column sums of partial matrices, and where they go."""

from typing import Any

import kernel_case
import pytest
import torch
from byte_counter import counting_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import DEVICE, DTYPES, between_margins, guarded, randn
from nanogpt_kernels import launch
from nanogpt_kernels.contract import ContractError
from nanogpt_kernels.ops import column_sums
from nanogpt_kernels.ops.column_sums import column_sums_, vector_grad_of, vector_grads
from nanogpt_kernels.ops.norm import add_norm
from nanogpt_kernels.registry import OPS
from parity import assert_parity
from torch import Tensor

SMALL = dict(ROWS=4, BLOCK_C=8)  # so that a handful of rows and columns make several tiles and programs
ABSENT = (None, [])


def partials_of(P: int, C: int, seed: int = 0) -> Tensor:
    return randn(P, C, seed=seed).detach()


def check(into: Tensor, parts: list[Tensor], before: Tensor | None, what: str) -> None:
    """into is what was before plus parts' column sums, in into's dtype, by the two-reference rule."""
    exact = torch.cat([part.double().sum(0) for part in parts])
    same = torch.cat([part.sum(0) for part in parts])
    if before is not None:
        exact, same = exact + before.double(), same + before.float()
    assert_parity(into, same.to(into.dtype), exact, tiny=1e-6, what=what)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    P=st.lists(st.integers(0, 19), min_size=1, max_size=3),
    C=st.integers(1, 35),
    dtype=st.sampled_from(DTYPES),
    accumulate=st.booleans(),
)
def test_any_shape(P: list[int], C: int, dtype: torch.dtype, accumulate: bool):
    """One to three matrices, of as many rows and columns as they like, one may have no rows; into poisoned memory."""
    parts = [partials_of(p, C + 5 * i, seed=i) for i, p in enumerate(P)]
    before = [randn(part.size(1), dtype=dtype, seed=9).detach() for part in parts]
    with launch.override("column_sums", blocks=SMALL), guarded():
        intos = [torch.empty(b.shape, dtype=dtype, device=DEVICE) for b in before]
        if accumulate:
            for into, b in zip(intos, before):
                into.copy_(b)
        operands: list[Any] = [x for into, part in zip(intos, parts) for x in (into, [between_margins(part)])]
        column_sums_(*operands, *ABSENT * (3 - len(parts)), accumulate)
    for i, (into, part, b) in enumerate(zip(intos, parts, before)):
        check(into, [part], b if accumulate else None, f"{i}: {tuple(part.shape)} {dtype}")


@pytest.mark.parametrize("C", [40, 2050])
@pytest.mark.parametrize("P", [127, 128, 129, 700])
def test_the_rows_that_ship(P: int, C: int):
    """Less than a tile, one, one more, and more tiles than the pipeline is deep; both rows of the table."""
    part, into = partials_of(P, C), torch.ones(C, device=DEVICE)
    with guarded():
        column_sums_(into, [between_margins(part)], *ABSENT, *ABSENT, True)
    check(into, [part], torch.ones(C, device=DEVICE), f"{P}x{C}")


def test_side_by_side():
    """Two matrices of different heights fill one vector, left and right; a third adds to a vector of its own."""
    left, right, alone = partials_of(9, 20), partials_of(5, 41, seed=1), partials_of(3, 7, seed=2)
    wide, own = torch.ones(61, device=DEVICE), torch.ones(7, device=DEVICE)
    with launch.override("column_sums", blocks=SMALL):
        column_sums_(wide, [left, right], own, [alone], *ABSENT, True)
    check(wide, [left, right], torch.ones(61, device=DEVICE), "wide")
    check(own, [alone], torch.ones(7, device=DEVICE), "own")


def test_neighbours_in_a_flat_buffer_are_left_alone():
    flat, part = torch.full((64,), 7.0, device=DEVICE), partials_of(6, 21)
    with launch.override("column_sums", blocks=SMALL):
        column_sums_(flat[11:32], [part], *ABSENT, *ABSENT, False)
    check(flat[11:32], [part], None, "within")
    assert bool((flat[:11] == 7.0).all() & (flat[32:] == 7.0).all())


def test_strided_and_misaligned_partials():
    part, want, got = partials_of(9, 24), torch.empty(24, device=DEVICE), torch.empty(24, device=DEVICE)
    column_sums_(want, [part], *ABSENT, *ABSENT, False)
    shifted = torch.empty(part.numel() + 1, device=DEVICE)[1:].view(part.shape).copy_(part)
    for view in (part.t().contiguous().t(), torch.stack([part, part], dim=1)[:, 0], shifted):
        column_sums_(got, [view], *ABSENT, *ABSENT, False)
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_non_finite_sums_stay_in_their_columns():
    part = partials_of(6, 9)
    part[1, 2], part[2, 4], part[3, 4], part[5, 6] = torch.nan, torch.inf, -torch.inf, torch.inf
    into = torch.empty(9, device=DEVICE)
    with launch.override("column_sums", blocks=SMALL):
        column_sums_(into, [part], *ABSENT, *ABSENT, False)
    torch.testing.assert_close(into, part.sum(0), equal_nan=True)


def test_two_runs_give_the_same_bits():
    """On a GPU: the interpreter runs programs one after the other."""
    part, (first, second) = partials_of(700, 40), torch.zeros(2, 40, device=DEVICE)
    for into in (first, second):
        column_sums_(into, [part], *ABSENT, *ABSENT, True)
    assert torch.equal(first, second)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter counts")
@pytest.mark.parametrize("accumulate", [False, True])
def test_bytes(accumulate: bool):
    """Partials once; what they are added to is read and written, else only written."""
    (P, C), into = (130, 40), torch.ones(40, dtype=torch.bfloat16, device=DEVICE)
    with counting_bytes() as counted:
        column_sums_(into, [partials_of(P, C)], *ABSENT, *ABSENT, accumulate)
    assert counted == {"load": P * C * 4 + accumulate * C * 2, "store": C * 2}


def test_contract():
    part, into = partials_of(3, 8), torch.empty(8, device=DEVICE)
    for given_, rule in [
        ((into, [part[0]], *ABSENT, *ABSENT), r"partials must be \[P, C\] float32"),
        ((into, [part.bfloat16()], *ABSENT, *ABSENT), r"partials must be \[P, C\] float32"),
        ((into[:7], [part], *ABSENT, *ABSENT), r"must be a contiguous \[C\]"),
        ((torch.empty(16, device=DEVICE)[::2], [part], *ABSENT, *ABSENT), r"must be a contiguous \[C\]"),
        ((into.double(), [part], *ABSENT, *ABSENT), "into must be float32, bfloat16 or float16"),
        ((into, [part.to("meta")], *ABSENT, *ABSENT), "different devices"),
        ((into, [part], None, [part], *ABSENT), "partials need a vector"),
        ((into, [part[:, i : i + 2] for i in range(0, 8, 2)], *ABSENT, *ABSENT), "one to three matrices"),
    ]:
        with pytest.raises(ContractError, match=f"column_sums: .*{rule}"):
            column_sums_(*given_, False)


@pytest.mark.parametrize("accumulate", [False, True])
def test_registration(accumulate: bool):
    operands = [torch.zeros(8, device=DEVICE), [partials_of(3, 8)], None, [],
                torch.zeros(13, device=DEVICE), [partials_of(2, 5), partials_of(4, 8)], accumulate]  # fmt: skip
    torch.library.opcheck(OPS.column_sums_.default, tuple(operands))


# ---- where gradients go ----


def vector(C: int, dtype: torch.dtype = torch.float32, main_grad: float | None = None) -> Tensor:
    v = torch.zeros(C, dtype=dtype, device=DEVICE, requires_grad=True)
    if main_grad is not None:
        v.main_grad = torch.full((C,), main_grad, device=DEVICE)  # type: ignore[attr-defined]
    return v


@pytest.mark.parametrize("adding", [(), (0,), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_each_gradient_goes_where_its_vector_says(adding: tuple[int, ...]):
    """One launch, or two where some are added and some returned; the same bits either way."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    vectors = [vector(10, dtypes[i], 0.5 if i in adding else None) for i in range(3)]
    parts = [partials_of(6, 10, seed=i) for i in range(3)]
    grads = vector_grads(parts, [True] * 3, [vector_grad_of("op", v) for v in vectors])
    with launch.recording(90) as calls:
        on_meta = [vector_grad_of("op", vector(10, main_grad=0.5 if i in adding else None)) for i in range(3)]
        moved = [v and v._replace(main_grad=None if v.main_grad is None else v.main_grad.to("meta")) for v in on_meta]
        vector_grads([part.to("meta") for part in parts], [True] * 3, moved)
    assert len(calls) == len({i in adding for i in range(3)})
    for i, (v, part, grad) in enumerate(zip(vectors, parts, grads)):
        alone = torch.empty(10, device=DEVICE)
        column_sums_(alone, [part], *ABSENT, *ABSENT, False)
        if i in adding:
            assert grad is None and torch.equal(v.main_grad, alone + 0.5)  # type: ignore[attr-defined]
        else:
            assert grad is not None and torch.equal(grad, alone.to(v.dtype))


def test_nothing_wanted_launches_nothing():
    """Whoever is not wanted has no partials, and one without a vector cannot be."""
    parts, v = partials_of(6, 10), vector(10, main_grad=0.5)
    with launch.override("column_sums", blocks=dict(BLOCK_C=0)):  # a launch would divide by it
        assert vector_grads([], [False, False], [vector_grad_of("op", v), None]) == [None, None]
    grads = vector_grads(
        [parts], [False, True, False], [vector_grad_of("op", v), vector_grad_of("op", vector(10)), None]
    )
    assert grads[0] is None and grads[2] is None and grads[1] is not None
    check(grads[1], [parts], None, "the one wanted")
    assert bool((v.main_grad == 0.5).all())  # type: ignore[attr-defined]


def test_no_rows():
    """No partials add nothing, and alone are zeros."""
    part, v = partials_of(0, 10), vector(10, main_grad=0.5)
    (grad,) = vector_grads([part], [True], [vector_grad_of("op", vector(10))])
    assert vector_grads([part], [True], [vector_grad_of("op", v)]) == [None]
    assert grad is not None and not grad.any() and bool((v.main_grad == 0.5).all())  # type: ignore[attr-defined]


def test_one_main_grad_of_two_vectors_takes_two_launches(monkeypatch: pytest.MonkeyPatch):
    """Within one, programs of both would read it before either has written."""
    v, parts, calls = vector(10, main_grad=0.5), [partials_of(6, 10, seed=i) for i in range(2)], []
    monkeypatch.setattr(column_sums, "column_sums_", lambda *args: calls.append(args) or column_sums_(*args))
    assert vector_grads(parts, [True, True], [vector_grad_of("op", v)] * 2) == [None, None]
    assert len(calls) == 2
    torch.testing.assert_close(v.main_grad, 0.5 + sum(part.sum(0) for part in parts))  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrong", [dict(dtype=torch.bfloat16), dict(size=(2, 5)), dict(device="meta")], ids=str)
def test_a_main_grad_that_sums_cannot_go_to_is_refused_in_forward(wrong: dict[str, Any]):
    v = vector(10)
    v.main_grad = torch.zeros(**dict(size=(10,), device=DEVICE) | wrong)  # type: ignore[attr-defined]
    w = vector(10)
    with pytest.raises(ContractError, match="add_norm: .*(main_grad|different devices)"):
        add_norm(randn(3, 10), randn(3, 10), v, w, None, 1e-5, 0.0, None, 0)


# ---- within an op that has three: add_norm ----


def add_norm_gradients(main_grads: tuple[int, ...], compiled: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of delta_bias, w and b after two backward passes, three main_grads being views of one flat buffer of ones."""
    r, delta, *vectors = randn(9, 24), randn(9, 24, seed=1), *(randn(24, seed=i, dtype=dtype) for i in (2, 3, 4))
    flat = torch.ones(3 * 32, device=DEVICE)
    for i in main_grads:
        vectors[i].main_grad = flat[32 * i : 32 * i + 24]  # type: ignore[attr-defined]

    def op(r: Tensor, delta: Tensor, delta_bias: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(r, delta, delta_bias, w, b, 1e-5, 0.2, torch.tensor([5], device=DEVICE), 1)

    if compiled:
        op = torch.compile(op, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.autograd.backward(
            op(r, delta, vectors[0], vectors[1], vectors[2]), [randn(9, 24, seed=s).detach() for s in (5, 6)]
        )
    for i, v in enumerate(vectors):
        assert (v.grad is None) == (i in main_grads) and (v.grad is None or v.grad.dtype == dtype)
        assert bool((flat[32 * i + 24 : 32 * i + 32] == 1.0).all()), "written past a main_grad's end"
    return [v.main_grad if i in main_grads else v.grad for i, v in enumerate(vectors)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("main_grads", [(0, 1, 2), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_in_an_op(compiled: bool, main_grads: tuple[int, ...]):
    """The same gradients with and without main_grad, or with one for some, added to what is there."""
    plain, got = add_norm_gradients((), False), add_norm_gradients(main_grads, compiled)
    for i, (want, grad) in enumerate(zip(plain, got)):
        if i in main_grads:
            torch.testing.assert_close(grad, 1.0 + want, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(grad, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_vectors_in_an_op(dtype: torch.dtype):
    """Two passes of a 16-bit .grad are rounded on their way; main_grad's float32 sum is not."""
    plain, got = add_norm_gradients((), False, dtype), add_norm_gradients((0, 1, 2), False, dtype)
    for want, grad in zip(plain, got):
        assert grad.dtype == torch.float32
        atol = 4 * torch.finfo(dtype).eps * want.abs().max().item()
        torch.testing.assert_close(grad - 1.0, want.float(), rtol=0, atol=atol)


def test_autocast_changes_nothing():
    with torch.autocast(kernel_case.DEVICE.type, dtype=torch.bfloat16):
        cast = add_norm_gradients((0, 2), False)
    assert all(torch.equal(a, b) for a, b in zip(cast, add_norm_gradients((0, 2), False)))


def test_without_grad_mode_and_to_frozen_vectors_nothing_is_added():
    w, r = vector(24, main_grad=0.0), randn(9, 24)
    with torch.no_grad():
        add_norm(r, r, None, w, None, 1e-5, 0.0, None, 0)
    w.requires_grad_(False)
    add_norm(r, r, None, w, None, 1e-5, 0.0, None, 0)[1].sum().backward()
    assert not w.main_grad.any()  # type: ignore[attr-defined]
