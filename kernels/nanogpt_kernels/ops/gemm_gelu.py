"""The MLP's first product with its activation, forward and backward, as one persistent GEMM each.

forward   pre = y w^T + b; act = gelu(pre)
backward  dact = ddelta w; dpre = dact gelu'(pre); db partials = column sums of dpre over each row tile

Persistent programs stride over the output tiles, in bands of GROUP_M row tiles (operands stay in L2). FLATTEN: the K
loop is flattened into the loop over tiles, so that the next tile's loads overlap this one's epilogue; for two programs
an SM, each of which covers the other's epilogue, it only costs 60 instructions a step on sm_90. Without it backward
reads its tile of pre before the K loop, which covers the wait. From sm_90 on, operands are read by TMA descriptors made
on the host, where bases and rows are 16-byte aligned, and results written by them or, TMA_STORE=False, by pointers,
which wait for no buffer; else all goes by pointers.
Products of 16-bit operands are summed in float32 in an order that depends on K alone: a row does not depend on M.
pre is rounded to its dtype once, and gelu and gelu' are taken of the rounded pre, as an elementwise pass would.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import Row, architecture, cdiv, describable, launch, persistent
from ..primitives import gelu, gelu_derivative


@triton.jit
def _tile_at(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row tile, column tile) of the tile-th one: column by column within bands of GROUP_M row tiles."""
    band_tiles = GROUP_M * tiles_n
    first = tile // band_tiles * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % band_tiles % height, tile % band_tiles // height


@triton.jit
def _load(x, i, j, rows, columns, I: tl.constexpr, J: tl.constexpr, TMA: tl.constexpr):
    """[I, J] of x [rows, columns] from (i, j) on, 0 outside."""
    if TMA:
        tile = x.load([i, j])
    else:
        down, across = tl.arange(0, I), tl.arange(0, J)
        at = x + tl.cast(i, tl.int64) * columns + (down[:, None] * columns + (j + across)[None, :])
        tile = tl.load(at, mask=(i + down < rows)[:, None] & (j + across < columns)[None, :], other=0.0)
    return tile


@triton.jit
def _store(x, tile, i, j, rows, columns, I: tl.constexpr, J: tl.constexpr, TMA: tl.constexpr):
    """x[i : i + I, j : j + J] = tile, inside x [rows, columns]."""
    if TMA:
        x.store([i, j], tile)
    else:
        down, across = tl.arange(0, I), tl.arange(0, J)
        at = x + tl.cast(i, tl.int64) * columns + (down[:, None] * columns + (j + across)[None, :])
        tl.store(at, tile, mask=(i + down < rows)[:, None] & (j + across < columns)[None, :])


@triton.jit
def _halves(acc, I: tl.constexpr, J: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(acc, (I, 2, J)), (0, 2, 1)))


@triton.jit
def _parts(acc, I: tl.constexpr, J: tl.constexpr, PARTS: tl.constexpr):
    """[I, PARTS * J] as 2 or 4 of [I, J], from left to right: of the whole, neither the registers of an epilogue nor
    the shared memory of a store would fit."""
    left, right = _halves(acc, I, PARTS // 2 * J)
    if PARTS == 4:
        left, right = _halves(left, I, J), _halves(right, I, J)
        parts = (left[0], left[1], right[0], right[1])
    else:
        parts = (left, right)
    return parts


@triton.jit
def _finish_fwd(
    acc, b_ptr, pre_ptr, act_ptr, i, j, M, N,
    TANH: tl.constexpr, WRITE_PRE: tl.constexpr, TMA: tl.constexpr, I: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    if b_ptr is not None:
        n = j + tl.arange(0, J)
        acc += tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    pre = acc.to(act_ptr.dtype if TMA else act_ptr.dtype.element_ty)
    if WRITE_PRE:
        _store(pre_ptr, pre, i, j, M, N, I, J, TMA)
    _store(act_ptr, gelu(pre.to(tl.float32), TANH, True).to(pre.dtype), i, j, M, N, I, J, TMA)


@triton.jit
def _gemm_gelu_fwd_kernel(
    y_ptr,  # [M, K]; it and w are descriptors where TMA, results where TMA_STORE too
    w_ptr,  # [N, K]
    b_ptr,  # [N], or None
    pre_ptr,  # [M, N], or None
    act_ptr,  # [M, N]
    M,
    N,
    K,
    TANH: tl.constexpr,
    WRITE_PRE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
    TMA_STORE: tl.constexpr,
):
    PART_N: tl.constexpr = BLOCK_N // PARTS
    tiles_m, tiles_n, steps = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tl.assume(steps > 0)  # or the compiler adds a second loop, for K = 0
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = _tile_at(tile, tiles_m, tiles_n, GROUP_M)
        i, j = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(steps):
            y = _load(y_ptr, i, step * BLOCK_K, M, K, BLOCK_M, BLOCK_K, TMA)
            w = _load(w_ptr, j, step * BLOCK_K, N, K, BLOCK_N, BLOCK_K, TMA)
            acc = tl.dot(y, w.T, acc)
        parts = _parts(acc, BLOCK_M, PART_N, PARTS)
        for p in tl.static_range(PARTS):
            _finish_fwd(
                parts[p], b_ptr, pre_ptr, act_ptr, i, j + p * PART_N, M, N,
                TANH, WRITE_PRE, TMA and TMA_STORE, BLOCK_M, PART_N,
            )  # fmt: skip


@triton.jit
def _finish_bwd(
    dact, stored, dpre_ptr, act_ptr, db_partial_ptr, i, j, tile_m, M, N,
    TANH: tl.constexpr, BIAS_GRAD: tl.constexpr, WRITE_ACT: tl.constexpr, TMA: tl.constexpr,
    I: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    pre = stored.to(tl.float32)
    dpre = (dact * gelu_derivative(pre, TANH, True)).to(stored.dtype)
    _store(dpre_ptr, dpre, i, j, M, N, I, J, TMA)
    if BIAS_GRAD:
        n, inside = j + tl.arange(0, J), i + tl.arange(0, I) < M  # outside, an infinite weight times 0 is NaN
        db = tl.sum(tl.where(inside[:, None], dpre.to(tl.float32), 0.0), axis=0)
        tl.store(db_partial_ptr + tile_m.to(tl.int64) * N + n, db, mask=n < N)
    if WRITE_ACT:
        _store(act_ptr, gelu(pre, TANH, True).to(stored.dtype), i, j, M, N, I, J, TMA)


@triton.jit
def _gemm_gelu_bwd_kernel(
    ddelta_ptr,  # [M, K]; it and w are descriptors where TMA, results where TMA_STORE too
    w_ptr,  # [K, N]
    pre_ptr,  # [M, N]; a pointer without FLATTEN
    dpre_ptr,  # [M, N]
    act_ptr,  # [M, N], or None
    db_partial_ptr,  # [tiles_m, N] float32, or None
    M,
    N,
    K,
    TANH: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    WRITE_ACT: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
    TMA_STORE: tl.constexpr,
):
    PART_N: tl.constexpr = BLOCK_N // PARTS
    tiles_m, tiles_n, steps = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tl.assume(steps > 0)  # or the compiler adds a second loop, for K = 0
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = _tile_at(tile, tiles_m, tiles_n, GROUP_M)
        i, j = tile_m * BLOCK_M, tile_n * BLOCK_N
        pres = ()
        if not FLATTEN:
            for p in tl.static_range(PARTS):
                pres += (_load(pre_ptr, i, j + p * PART_N, M, N, BLOCK_M, PART_N, False),)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(steps):
            ddelta = _load(ddelta_ptr, i, step * BLOCK_K, M, K, BLOCK_M, BLOCK_K, TMA)
            w = _load(w_ptr, step * BLOCK_K, j, K, N, BLOCK_K, BLOCK_N, TMA)
            acc = tl.dot(ddelta, w, acc)
        parts = _parts(acc, BLOCK_M, PART_N, PARTS)
        for p in tl.static_range(PARTS):
            pre = _load(pre_ptr, i, j + p * PART_N, M, N, BLOCK_M, PART_N, TMA) if FLATTEN else pres[p]
            _finish_bwd(
                parts[p], pre, dpre_ptr, act_ptr, db_partial_ptr, i, j + p * PART_N, tile_m, M, N,
                TANH, BIAS_GRAD, WRITE_ACT, TMA and TMA_STORE, BLOCK_M, PART_N,
            )  # fmt: skip


def _operands(tensors_and_tiles: list[tuple[Tensor | None, list[int] | None]]) -> tuple[bool, list[Any]]:
    """Whether all of them can be described, and they as descriptors of such tiles if so; as they are without a tile."""
    given = [t for t, _ in tensors_and_tiles if t is not None]
    if architecture(given[0].device) < 90 or not all(describable(t) for t in given):
        return False, [t for t, _ in tensors_and_tiles]
    return True, [
        t if t is None or tile is None else TensorDescriptor.from_tensor(t, tile) for t, tile in tensors_and_tiles
    ]


def _part(row: Row) -> list[int]:
    """The tile of an epilogue's part."""
    return [row.blocks["BLOCK_M"], row.blocks["BLOCK_N"] // row.blocks["PARTS"]]


def _persistent_grid(row: Row, M: int, N: int, device: torch.device) -> tuple[Any]:
    tiles = cdiv(M, row.blocks["BLOCK_M"]) * cdiv(N, row.blocks["BLOCK_N"])
    return (persistent(tiles, row.choices["programs_per_sm"], device),)


def gemm_gelu_fwd(
    row: Row, y: Tensor, w: Tensor, b: Tensor | None, tanh: bool, keep_pre: bool
) -> tuple[Tensor | None, Tensor]:
    """(pre or None, act), each [M, N], of y [M, K] and w [N, K] in one 16-bit dtype, and b [N]."""
    y, w, b = y.contiguous(), w.contiguous(), None if b is None else b.contiguous()
    (M, K), N = y.shape, w.size(0)
    act = torch.empty(M, N, dtype=y.dtype, device=y.device)
    pre = torch.empty_like(act) if keep_pre else None
    block_m, block_n, block_k = (row.blocks[f"BLOCK_{letter}"] for letter in "MNK")
    result = _part(row) if row.blocks["TMA_STORE"] else None
    tma, (y_, w_, pre_, act_) = _operands(
        [(y, [block_m, block_k]), (w, [block_n, block_k]), (pre, result), (act, result)]
    )
    launch(
        "mlp_fwd", _gemm_gelu_fwd_kernel, _persistent_grid(row, M, N, y.device),
        y_, w_, b, pre_, act_, M, N, K, row=row, TANH=tanh, WRITE_PRE=keep_pre, TMA=tma,
    )  # fmt: skip
    return pre, act


def gemm_gelu_bwd(
    row: Row, ddelta: Tensor, w: Tensor, pre: Tensor, tanh: bool, bias_grad: bool, rebuild_act: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dpre [M, N], partial sums of db [P, N] float32, act [M, N] or None) of ddelta [M, K], w [K, N] and pre [M, N].

    P is 0 unless bias_grad."""
    if rebuild_act:
        row = replace(row, blocks=row.blocks | dict(PARTS=4, FLATTEN=True))  # else registers spill
    ddelta, w = ddelta.contiguous(), w.contiguous()
    (M, K), N = ddelta.shape, w.size(1)
    dpre, act = torch.empty_like(pre), torch.empty_like(pre) if rebuild_act else None
    block_m, block_n, block_k = (row.blocks[f"BLOCK_{letter}"] for letter in "MNK")
    tiles_m = cdiv(M, block_m)
    partials = torch.empty(tiles_m if bias_grad else 0, N, dtype=torch.float32, device=pre.device)
    read = _part(row) if row.blocks["FLATTEN"] else None
    result = _part(row) if row.blocks["TMA_STORE"] else None
    tma, (ddelta_, w_, pre_, dpre_, act_) = _operands(
        [(ddelta, [block_m, block_k]), (w, [block_k, block_n]), (pre, read), (dpre, result), (act, result)]
    )
    launch(
        "mlp_bwd", _gemm_gelu_bwd_kernel, _persistent_grid(row, M, N, pre.device),
        ddelta_, w_, pre_, dpre_, act_, partials if bias_grad else None, M, N, K,
        row=row, TANH=tanh, BIAS_GRAD=bias_grad, WRITE_ACT=rebuild_act, TMA=tma,
    )  # fmt: skip
    return dpre, partials, act
