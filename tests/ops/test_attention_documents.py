"""attention of packed documents: ids of any order, and tiles of other documents, which are skipped."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from attention_case import attention_same_dtype, seed_tensor, tiles
from kernel_case import DEVICE, assert_op, randn
from nanogpt_kernels import launch
from nanogpt_kernels.ops.attention import attention
from nanogpt_kernels.ops.attention.backward import attention_bwd
from nanogpt_kernels.ops.attention.documents import document_spans
from nanogpt_kernels.ops.attention.forward import attention_fwd
from torch import Tensor
from triton.runtime import interpreter

FORMS = pytest.mark.parametrize("atomic", [False, True], ids=["deterministic", "atomic"])
T = 50


def any_ids(T: int) -> Tensor:
    """A row of each kind, int64 [6, T]."""
    ascending = torch.arange(T) * 7 // T
    return torch.stack([
        ascending,
        -ascending,  # descending, negative
        torch.full((T,), 5),
        ascending % 3,  # a document goes on after others
        ascending * 2**33 - 2**40,  # the same in its low 32 bits
        torch.randint(-4, 4, (T,), generator=torch.Generator().manual_seed(0)),
    ]).to(DEVICE)  # fmt: skip


@pytest.mark.parametrize("T, ROWS", [(T, 16), (1, 16), (1100, 256)])  # 1100: ids are read 1024 at a time
def test_spans_are_safe_and_of_ascending_ids_exact(T: int, ROWS: int):
    ids = any_ids(T)
    for given in (ids, ids.int()):
        first, end = document_spans(given, ROWS)
        assert first is not None and end is not None and first.shape == end.shape == (len(ids), -(-T // ROWS))
        for b, row in enumerate(given):
            for tile, own in enumerate(row.split(ROWS)):
                met = torch.isin(row, own).nonzero().flatten()  # every token that shares an id with the tile
                low, high = int(met[0]), int(met[-1]) + 1
                assert first[b, tile] <= low and end[b, tile] >= high
                if (row.diff() >= 0).all():
                    assert (first[b, tile], end[b, tile]) == (low, high)


@pytest.mark.parametrize("p, atomic", [(0.0, False), (0.3, True)], ids=["deterministic", "atomic, dropout"])
def test_ids_of_any_order(p: float, atomic: bool):
    ids = any_ids(T)
    inputs = [randn(len(ids), T, 3, 1, 16), p, seed_tensor() if p else None, 1, ids]
    do = randn(len(ids), T, 1, 16, seed=1).detach()
    with launch.override("attention_bwd", choices=dict(atomic=atomic)), tiles(16, 32):
        assert_op(attention, attention_same_dtype, inputs, [do], what="attention")


def everything(qkv: Tensor, do: Tensor, p: float, doc_ids: Tensor) -> list[Tensor]:
    """o, lse and dqkv."""
    o, lse = attention_fwd(qkv, p, seed_tensor(), 1, doc_ids)
    return [o, lse, attention_bwd(do, qkv, o, lse, p, seed_tensor(), 1, doc_ids, False)[0]]


@pytest.mark.parametrize("blocks", [(16, 32), (32, 16)], ids=str)
def test_skipping_changes_no_bit(blocks: tuple[int, int]):
    """Of descending ids no tile is skipped, of the same documents in ascending order all that can be; the dropout mask
    stays where it is."""
    qkv, do = randn(1, T, 3, 1, 16).detach(), randn(1, T, 1, 16, seed=1).detach()
    ids = any_ids(T)[:1]
    with tiles(*blocks):
        for skipping, whole in zip(everything(qkv, do, 0.3, ids), everything(qkv, do, 0.3, -ids)):
            assert torch.equal(skipping, whole)


@FORMS
def test_nan_of_another_document_s_tiles_is_never_read(atomic: bool):
    """0 * NaN is NaN: only a tile that is not computed keeps it out. Documents are two tiles long."""
    qkv, do = randn(1, 96, 3, 1, 16).detach(), randn(1, 96, 1, 16, seed=1).detach()
    ids = (torch.arange(96, device=DEVICE) // 32)[None]
    with launch.override("attention_bwd", choices=dict(atomic=atomic)), tiles():
        clean = everything(qkv, do, 0.0, ids)
        for part in (qkv[:, :32], do[:, 64:]):  # keys and values of the first document, gradients of the last
            part.fill_(torch.nan)
        o, lse, dqkv = everything(qkv, do, 0.0, ids)
    assert o[:, :32].isnan().all() and dqkv[:, :32].isnan().all() and dqkv[:, 64:].isnan().all()
    assert torch.equal(o[:, 32:], clean[0][:, 32:]) and torch.equal(lse[..., 32:], clean[1][..., 32:])
    assert torch.equal(dqkv[:, 32:64], clean[2][:, 32:64])


@contextmanager
def counting_products() -> Iterator[list[int]]:
    """Within it, the products of tiles that the interpreter makes: [how many]."""
    count, product = [0], interpreter.InterpreterBuilder.create_dot

    def counted(*args, **kwargs):
        count[0] += 1
        return product(*args, **kwargs)

    interpreter.InterpreterBuilder.create_dot = counted
    try:
        yield count
    finally:
        interpreter.InterpreterBuilder.create_dot = product


@pytest.mark.skipif(DEVICE.type == "cuda", reason="it is the interpreter that counts")
@pytest.mark.parametrize("atomic, products", [(False, 2 + 3 + 4), (True, 2 + 5)], ids=["deterministic", "atomic"])
def test_work_is_that_of_the_documents_alone(atomic: bool, products: int):
    """8 documents of 16 tokens, in tiles of 16: a pair of tiles each, of the 36 pairs of one document."""
    qkv, do = randn(1, 128, 3, 1, 16).detach(), randn(1, 128, 1, 16, seed=1).detach()
    ids = (torch.arange(128) // 16)[None]
    with launch.override("attention_bwd", choices=dict(atomic=atomic)), tiles():
        for doc_ids, pairs in ((ids, 8), (ids * 0, 36)):
            with counting_products() as count:
                everything(qkv, do, 0.0, doc_ids)
            assert count == [products * pairs]


def test_compiled_whole_for_any_length():
    """One graph serves every T, ragged or not, with documents and dropout: no guard asks what T is."""
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for length, stance in ((20, "default"), (32, "fail_on_recompile")):
        ids, results = (torch.arange(length, device=DEVICE) // 9).repeat(3, 1), []
        for f in (attention, compiled):
            qkv = randn(3, length, 3, 1, 16)
            with tiles(), torch.compiler.set_stance(stance):
                o = f(qkv, 0.3, seed_tensor(), 1, ids)
                results.append((o, *torch.autograd.grad(o.square().sum(), qkv)))
        assert all(torch.equal(a, b) for a, b in zip(*results))
