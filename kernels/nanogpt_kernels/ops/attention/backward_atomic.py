"""Before and after the atomic form of attention's backward, where key tiles add to dQ in float32.

Before: delta = rowsum(o do), and zeros for dQ's sums. After: dQ scaled, rounded and written into packed dqkv, with its
sums over tokens. Programs own ROWS tokens of one head; launch rows are sized by D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import cdiv, launch, pick
from .tile_access import head_offsets, load_tile, store_tile, tile_at


@triton.jit
def _before_atomic_kernel(
    o_ptr,  # [B, T, H, D]
    do_ptr,  # [B, T, H, D]
    delta_ptr,  # [B, H, T] float32
    dq_ptr,  # [B, H, T, D] float32
    T,
    H,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    _, o_at, row_at, _ = head_offsets(tl.program_id(0), T, H, D)
    start = tl.program_id(1) * ROWS
    o = load_tile(o_ptr + o_at, start, H * D, T, ROWS, D, BLOCK_D, True).to(tl.float32)
    do = load_tile(do_ptr + o_at, start, H * D, T, ROWS, D, BLOCK_D, True).to(tl.float32)
    i = start + tl.arange(0, ROWS)
    tl.store(delta_ptr + row_at + i, tl.sum(o * do, axis=1), mask=i < T)
    at, inside = tile_at(dq_ptr + row_at * D, start, D, T, ROWS, D, BLOCK_D)
    tl.store(at, tl.zeros([ROWS, BLOCK_D], tl.float32), mask=inside)


@triton.jit
def _after_atomic_kernel(
    dq_ptr,  # [B, H, T, D] float32
    dqkv_ptr,  # [B, T, 3, H, D]
    sums_ptr,  # [B * tiles, H, D] float32, or [0, 0]
    T,
    H,
    scale,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUMS: tl.constexpr,
):
    head, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    qkv_at, _, row_at, _ = head_offsets(head, T, H, D)
    dq = load_tile(dq_ptr + row_at * D, tile * ROWS, D, T, ROWS, D, BLOCK_D, True) * scale
    sums_ptr += (((head // H).to(tl.int64) * tiles + tile) * H + head % H) * D
    store_tile(dqkv_ptr + qkv_at, sums_ptr, dq, tile * ROWS, 3 * H * D, T, ROWS, D, BLOCK_D, SUMS)


def delta_and_zeros(do: Tensor, o: Tensor, BLOCK_D: int) -> tuple[Tensor, Tensor]:
    """do, o [B, T, H, D] -> (delta [B, H, T] float32, dQ's sums [B, H, T, D] float32, all zero)."""
    B, T, H, D = o.shape
    delta = torch.empty(B, H, T, dtype=torch.float32, device=o.device)
    dq = torch.empty(B, H, T, D, dtype=torch.float32, device=o.device)
    row = pick("attention_bwd_rows", o, D)
    launch(
        "attention_bwd_rows", _before_atomic_kernel, (B * H, cdiv(T, row.blocks["ROWS"])),
        o, do, delta, dq, T, H, row=row, D=D, BLOCK_D=BLOCK_D,
    )  # fmt: skip
    return delta, dq


def write_dq(dq: Tensor, dqkv: Tensor, BLOCK_D: int, bias_grad: bool) -> Tensor:
    """dQ's sums [B, H, T, D] into dqkv [B, T, 3, H, D]; returns partial sums over tokens [n, H*D], or [0, 0]."""
    B, H, T, D = dq.shape
    row = pick("attention_bwd_rows", dqkv, D)
    tiles = cdiv(T, row.blocks["ROWS"])
    sums = torch.empty((B * tiles, H * D) if bias_grad else (0, 0), dtype=torch.float32, device=dq.device)
    launch(
        "attention_bwd_rows", _after_atomic_kernel, (B * H, tiles),
        dq, dqkv, sums, T, H, D**-0.5, row=row, D=D, BLOCK_D=BLOCK_D, SUMS=bias_grad,
    )  # fmt: skip
    return sums
