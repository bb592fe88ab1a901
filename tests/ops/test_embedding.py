"""The embedding against the reference: gather, sorted segment sums, and gradients that touch only their rows."""

import math
from collections.abc import Iterator
from contextlib import ExitStack

import kernel_case
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import counting_bytes
from kernel_case import DEVICE, DTYPES, assert_op, guarded, randn
from nanogpt_kernels import contract, launch, reference
from nanogpt_kernels.contract import ContractError
from nanogpt_kernels.ops.embedding import embedding
from nanogpt_kernels.registry import OPS
from parity import assert_parity
from torch import Tensor

SEED, SITE = torch.tensor([(3 << 32) + 5], device=DEVICE), 1  # a site of 1, which Triton would specialise on
SMALL = {
    "embedding_fwd": dict(SEQUENCES=2, BLOCK_C=16),
    "embedding_bwd": dict(RUN=4, BLOCK_C=16),
    "embedding_bwd_pieces": dict(PIECES=2, BLOCK_C=16),
    "embedding_bwd_positions": dict(SEQUENCES=2, BLOCK_C=16),
}


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """Several tiles in every dimension, and segments of several runs, from few tokens."""
    with ExitStack() as stack:
        for op, blocks in SMALL.items():
            stack.enter_context(launch.override(op, blocks=blocks))
        yield


def tokens(B: int, T: int, V: int) -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(B + T)).to(DEVICE)


def weights(V: int, positions: int, C: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return randn(V, C, dtype=dtype), randn(positions, C, dtype=dtype, seed=1)


def with_main_grads(*ws: Tensor) -> list[Tensor]:
    """Sets and returns main_grad of each, filled with noise (of float64 weights: in float64)."""
    grads = []
    for i, w in enumerate(ws):
        dtype = torch.promote_types(w.dtype, torch.float32)
        w.main_grad = randn(*w.shape, seed=9 + i).detach().to(dtype)  # type: ignore[attr-defined]
        grads.append(w.main_grad)  # type: ignore[attr-defined]
    return grads


def check(idx: Tensor, C: int, V: int, dtype: torch.dtype, p: float, start: int = 0) -> None:
    wte, wpe = weights(V, start + idx.size(1) + 1, C, dtype)
    assert_op(
        lambda a, b: embedding(idx, a, b, p, SEED, SITE, start),
        lambda a, b: reference.embedding(idx, a, b, p, SEED, SITE, start),
        [wte, wpe],
        [randn(*idx.shape, C, seed=3).detach()],
        what="embedding",
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients(dtype: torch.dtype, p: float):
    check(tokens(3, 5, 11), 40, 11, dtype, p, start=2)


@pytest.mark.parametrize(
    ("B", "T", "C", "V"),
    [(1, 1, 1, 5), (2, 3, 19, 100), (1, 21, 6, 1), (13, 1, 3, 2)],
    ids=["one token", "V above M, C no multiple of 4", "one id in six runs", "long segments"],
)
def test_shapes(B: int, T: int, C: int, V: int):
    check(tokens(B, T, V), C, V, torch.float32, 0.2)


def test_all_distinct():
    check(
        torch.randperm(18, generator=torch.Generator().manual_seed(1)).view(2, 9).to(DEVICE), 5, 18, torch.float32, 0.0
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    ids=st.lists(st.sampled_from([0, 1, 1, 2, 2, 2, 2, 2, 6]), min_size=1, max_size=30),
    run=st.sampled_from([2, 4, 8]),
    pieces=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from(DTYPES),
)
def test_segments(ids: list[int], run: int, pieces: int, dtype: torch.dtype):
    """Any lengths of segments, cut by runs anywhere, over any number of pieces."""
    with (
        launch.override("embedding_bwd", blocks=dict(RUN=run, BLOCK_C=16)),
        launch.override("embedding_bwd_pieces", blocks=dict(PIECES=pieces, BLOCK_C=16)),
    ):
        check(torch.tensor([ids], device=DEVICE), 4, 7, dtype, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_main_grad(dtype: torch.dtype):
    """Added to what is there, in float32; rows of other tokens and positions keep every bit; autograd gets None."""
    B, T, C, V, start = 3, 5, 20, 12, 2
    idx, dr = tokens(B, T, V) // 2 * 2, randn(B, T, C, seed=3).detach()
    results = []
    for f, cast in ((embedding, dtype), (reference.embedding, dtype), (reference.embedding, torch.float64)):
        wte, wpe = (w.detach().to(cast).requires_grad_() for w in weights(V, 9, C, dtype))
        grads = with_main_grads(wte, wpe)
        before = [g.clone() for g in grads]
        f(idx, wte, wpe, 0.3, SEED, SITE, start).backward(dr.to(dtype).to(cast))
        assert wte.grad is None and wpe.grad is None
        results.append((before, grads))
    (before, ours), (_, same), (_, exact) = results
    for i, (a, b, c) in enumerate(zip(ours, same, exact)):
        assert_parity(a, b, c.double(), tiny=1e-6, what=f"main_grad[{i}]")
    unused = [i for i in range(V) if i not in idx.tolist()[0] + idx.tolist()[1] + idx.tolist()[2]]
    assert len(unused) >= V // 2 and torch.equal(ours[0][unused], before[0][unused])
    kept = [0, 1, 7, 8]
    assert torch.equal(ours[1][kept], before[1][kept])


def test_float32_residual_over_bfloat16_weights():
    idx, (wte, wpe) = tokens(2, 3, 7), weights(7, 3, 20, torch.bfloat16)
    assert_op(
        lambda a, b: embedding(idx, a, b, 0.2, SEED, SITE, out_dtype=torch.float32),
        lambda a, b: reference.embedding(idx, a, b, 0.2, SEED, SITE, out_dtype=torch.float32),
        [wte, wpe],
        [randn(2, 3, 20, seed=3).detach()],
    )
    r = embedding(idx, wte, wpe, 0.0, None, 0, out_dtype=torch.float32)
    assert torch.equal(r, wte[idx].float() + wpe.float())


@pytest.mark.parametrize("wrong", [-1, 7, 10**6, -(2**40), 2**32 + 1])
def test_ids_out_of_range(wrong: int):
    """A row of NaN, dropped elements too; in backward the row counts nowhere, even where its gradient is NaN."""
    idx, (wte, wpe) = tokens(3, 3, 7), weights(7, 3, 20)
    idx[1, 2] = wrong
    with guarded():
        r = embedding(idx, wte, wpe, 0.5, SEED, SITE)
    good = torch.ones(3, 3, dtype=torch.bool, device=DEVICE)
    good[1, 2] = False
    assert r[1, 2].isnan().all() and r[good].isfinite().all()
    dr = randn(3, 3, 20, seed=3).detach()
    dr[1, 2] = math.nan
    got = torch.autograd.grad(r, (wte, wpe), dr)
    idx[1, 2], dr[1, 2] = 0, 0.0
    want = torch.autograd.grad(reference.embedding(idx, wte, wpe, 0.5, SEED, SITE), (wte, wpe), dr)
    torch.testing.assert_close(got, want)
    idx[1, 2] = wrong
    with (
        contract.checked(),
        pytest.raises(ContractError, match=rf"idx must be in \[0, 7\), but idx\[1, 2\] is {wrong}"),
    ):
        embedding(idx, wte, wpe, 0.0, None, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_stays_in_its_row(bad: float):
    """A run holds all segments, so that a scan which added 0 times its neighbour would be seen."""
    idx, (wte, wpe) = tokens(3, 5, 4), weights(4, 5, 20)
    dr = randn(3, 5, 20, seed=3).detach()
    idx[1, 3] = 0
    dr[1, 3, 7] = bad
    with launch.override("embedding_bwd", blocks=dict(RUN=16, BLOCK_C=32)):
        dwte, dwpe = torch.autograd.grad(embedding(idx, wte, wpe, 0.0, None, 0), (wte, wpe), dr)
    assert len(idx.unique()) == 4 and dwte.isfinite().logical_not().nonzero().tolist() == [[0, 7]]
    assert dwpe.isfinite().logical_not().nonzero().tolist() == [[3, 7]]
    with torch.no_grad():
        wte[2, 5] = bad
    r = embedding(idx, wte, wpe, 0.0, None, 0)
    assert torch.equal(r.isfinite().logical_not().nonzero()[:, :2], (idx == 2).nonzero())


def test_layouts():
    """A batch without its last column (the trainer's), int32 ids, transposed weights and gradients, odd addresses."""
    long, (wte, wpe) = tokens(3, 6, 7), weights(7, 5, 20)
    idx, dr = long[:, :-1], randn(3, 5, 20, seed=3).detach()

    def run(idx: Tensor, wte: Tensor, wpe: Tensor, dr: Tensor) -> list[Tensor]:
        return kernel_case.gradients(lambda a, b: embedding(idx, a, b, 0.3, SEED, SITE), [wte, wpe], [dr])

    def odd(x: Tensor) -> Tensor:
        return torch.zeros(x.numel() + 1, device=DEVICE)[1:].view(x.shape).copy_(x.detach()).requires_grad_()

    def turned(x: Tensor) -> Tensor:
        return x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()

    want = run(idx.contiguous(), wte, wpe, dr)
    for got in (
        run(idx, wte, wpe, dr),
        run(idx.t().contiguous().t().int(), wte, wpe, turned(dr)),
        run(idx, turned(wte), turned(wpe), dr),
        run(idx, odd(wte), odd(wpe), odd(dr)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    expanded = dr[:, :1].expand(3, 5, 20)
    pairs = zip(run(idx, wte, wpe, expanded), run(idx, wte, wpe, expanded.contiguous()))
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_empty(shape: tuple[int, int]):
    wte, wpe = weights(7, 4, 20)
    r = embedding(torch.zeros(shape, dtype=torch.int64, device=DEVICE), wte, wpe, 0.0, None, 0)
    assert r.shape == (*shape, 20)
    assert all((g == 0).all() for g in torch.autograd.grad(r.sum(), (wte, wpe)))


def test_same_bits_twice_and_in_any_batch():
    idx, (wte, wpe) = tokens(5, 4, 3), weights(3, 4, 20, torch.bfloat16)
    dr = randn(5, 4, 20, seed=3).detach()
    first, second = (
        kernel_case.gradients(lambda a, b: embedding(idx, a, b, 0.3, SEED, SITE), [wte, wpe], [dr]) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[0][:3], embedding(idx[:3], wte, wpe, 0.3, SEED, SITE))  # the first rows of [M, C] alone
    whole = embedding(idx, wte, wpe, 0.0, None, 0)
    assert torch.equal(whole[3:4], embedding(idx[3:4], wte, wpe, 0.0, None, 0))


def test_gradients_only_where_asked():
    idx, (wte, wpe) = tokens(2, 3, 7), weights(7, 3, 20)
    with_main_grads(wte)
    frozen = wpe.detach()
    main_grad = wte.main_grad.clone()  # type: ignore[attr-defined]
    with torch.no_grad():
        assert not embedding(idx, wte, wpe, 0.0, None, 0).requires_grad
    assert not embedding(idx, wte.detach(), frozen, 0.0, None, 0).requires_grad
    wte.requires_grad_(False)
    (dwpe,) = torch.autograd.grad(embedding(idx, wte, wpe, 0.0, None, 0).sum(), [wpe])
    assert (dwpe == 2).all() and torch.equal(wte.main_grad, main_grad)  # type: ignore[attr-defined]
    wte.requires_grad_()
    embedding(idx, wte, frozen, 0.0, None, 0).sum().backward()
    counts = torch.bincount(idx.flatten(), minlength=7).float()[:, None]
    torch.testing.assert_close(wte.main_grad, main_grad + counts)  # type: ignore[attr-defined]


def test_second_derivative_is_refused():
    wte, wpe = weights(7, 3, 4)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(embedding(tokens(2, 3, 7), wte, wpe, 0.0, None, 0).sum(), wte, create_graph=True)


def wrong_cases() -> dict[str, tuple[dict[str, object], str]]:
    return {
        "idx dtype": (dict(idx=torch.zeros(2, 3, device=DEVICE)), "int64 or int32"),
        "idx shape": (dict(idx=torch.zeros(3, dtype=torch.int64, device=DEVICE)), r"\[B, T\]"),
        "mixed": (dict(wpe=torch.zeros(3, 20, dtype=torch.bfloat16, device=DEVICE)), "one dtype"),
        "columns": (dict(wpe=torch.zeros(3, 21, device=DEVICE)), r"\[positions, C\]"),
        "integers": (
            dict(wte=torch.zeros(7, 20, dtype=torch.int32), wpe=torch.zeros(3, 20, dtype=torch.int32)), "wte must be"
        ),
        "device": (dict(wte=torch.zeros(7, 20, device="meta")), "different devices"),
        "past the end": (dict(start=1), "must be rows of wpe"),
        "before the start": (dict(start=-1), "must be rows of wpe"),
        "p": (dict(p=1.0), r"probability must be in \[0, 1\)"),
        "no seed": (dict(p=0.1, seed=None), "needs a seed"),
        "out_dtype": (dict(out_dtype=torch.float64), "r must be"),
    }  # fmt: skip


@pytest.mark.parametrize("case", wrong_cases())
def test_contract(case: str):
    changes, message = wrong_cases()[case]
    wte, wpe = weights(7, 3, 20)
    arguments = dict(idx=tokens(2, 3, 7), wte=wte, wpe=wpe, p=0.0, seed=None, site=0) | changes
    with pytest.raises(ContractError, match=message):
        embedding(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_registration(p: float):
    idx, (wte, wpe) = tokens(2, 3, 7), (w.detach() for w in weights(7, 3, 20))
    dr = torch.randn(2, 3, 20, device=DEVICE)
    torch.library.opcheck(OPS.embedding_fwd.default, (idx, wte, wpe, p, SEED, SITE, 0, torch.bfloat16))
    torch.library.opcheck(OPS.embedding_bwd_tokens_.default, (wte, dr, idx, p, SEED, SITE, True))
    torch.library.opcheck(OPS.embedding_bwd_positions_.default, (wpe, dr, idx, 7, p, SEED, SITE, 0, False))


@pytest.mark.parametrize("main_grad", [False, True])
def test_compiled(main_grad: bool):
    idx, dr = tokens(2, 3, 7), randn(2, 3, 20, seed=3).detach()
    results = []
    for f in (embedding, torch.compile(embedding, fullgraph=True, backend="aot_eager")):
        ws = weights(7, 4, 20)
        grads = with_main_grads(*ws) if main_grad else None
        r = f(idx, *ws, 0.3, SEED, SITE, 1)
        r.backward(dr)
        results.append([r, *(grads or [w.grad for w in ws])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_captured():
    """Sorting included, forward and backward make a graph, which follows new ids."""
    idx, (wte, wpe), dr = tokens(3, 5, 7), weights(7, 5, 20), randn(3, 5, 20, seed=3).detach()
    grads = with_main_grads(wte, wpe)

    def step() -> Tensor:
        r = embedding(idx, wte, wpe, 0.3, SEED, SITE)
        r.backward(dr)
        return r

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    idx.copy_(tokens(3, 5, 6))
    results = []
    for run in (step, graph.replay):
        torch._foreach_zero_(grads)
        eager = run()
        results.append([(captured if eager is None else eager).detach().clone(), *(g.clone() for g in grads)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter counts")
def test_bytes():
    """With the rows of TABLE, one token in four new: forward reads and writes a row a token, wpe's once for 8
    sequences; backward reads dr for each of its two sums, and adds to the rows it touches."""
    B, T, C, V = 8, 32, 64, 300
    wte, wpe = weights(V, T, C, torch.bfloat16)
    with_main_grads(wte, wpe)
    idx = (torch.arange(B * T, device=DEVICE) * 7 % (B * T // 4)).view(B, T)
    row, table = 2 * C, {op: launch.TABLE[op][0].blocks for op in SMALL}
    with ExitStack() as stack:
        for op, blocks in table.items():
            stack.enter_context(launch.override(op, blocks=blocks))
        with counting_bytes() as fwd:
            r = embedding(idx, wte, wpe, 0.0, None, 0)
        with counting_bytes() as bwd:
            r.backward(torch.zeros_like(r))
    M = B * T
    assert fwd["store"] == M * row
    assert fwd["load"] == M * row + T * row + M * 8
    touched = (M // 4 + T) * 2 * row  # of float32 gradient, read and written
    assert touched <= bwd["store"] <= 1.2 * touched
    assert 2 * M * row + touched <= bwd["load"] <= 1.35 * (2 * M * row + touched)
