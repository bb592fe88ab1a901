"""Device functions on tiles of packed tensors: which tile a program takes, where it lies, loads and stores."""

import triton
import triton.language as tl


@triton.jit
def query_tile(pid, heads, T, D: tl.constexpr, BLOCK_M: tl.constexpr, ITEMSIZE: tl.constexpr):
    """(head, query tile) of a program: the longest tiles first, so that short ones fill the last wave.

    Heads come in groups whose keys and values take 16 MB together, about a third of an H100's L2 (50 MB) and less than
    half of an A100's (40 MB): every query tile of a head reads them again.
    """
    tiles = tl.cdiv(T, BLOCK_M)
    group_size = tl.minimum(tl.maximum(16777216 // (2 * T * D * ITEMSIZE), 1), heads)
    first = pid // (group_size * tiles) * group_size
    size = tl.minimum(heads - first, group_size)
    within = pid - first * tiles
    return first + within % size, tiles - 1 - within // size


@triton.jit
def head_offsets(head, T, H, D: tl.constexpr):
    """Where head `head` of all B*H begins, int64, in [B, T, 3, H, D], in [B, T, H, D], in [B, H, T] and in [B, T]."""
    b, h = head.to(tl.int64) // H, head.to(tl.int64) % H
    return b * T * (3 * H * D) + h * D, b * T * (H * D) + h * D, head.to(tl.int64) * T, b * T


@triton.jit
def tile_at(x_ptr, start, stride, T, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers [ROWS, BLOCK_D] to rows start... of a [T, D] matrix of rows `stride` apart, and which of them exist.

    Only the first row's offset needs 64 bits; those within a tile are kept in 32, for registers.
    """
    r, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    first_ptr = x_ptr + tl.cast(start, tl.int64) * stride
    return first_ptr + (r[:, None] * stride + d[None, :]), (r < T - start)[:, None] & (d < D)[None, :]


@triton.jit
def _causal(x, ahead, other, QUERIES: tl.constexpr, KEYS: tl.constexpr, KEYS_FIRST: tl.constexpr):
    queries, keys = tl.arange(0, QUERIES), tl.arange(0, KEYS) + ahead
    if KEYS_FIRST:
        x = tl.where(queries[None, :] >= keys[:, None], x, other)
    else:
        x = tl.where(queries[:, None] >= keys[None, :], x, other)
    return x


@triton.jit
def causal(
    x,  # [QUERIES, KEYS], or [KEYS, QUERIES] if KEYS_FIRST
    n,  # the first key
    m,  # the first query
    other,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """x with `other` where a key comes after a query. BRANCH: below the diagonal nothing is compared; beside dropout or
    documents such a branch makes ptxas serialise every wgmma."""
    if BRANCH:
        if n + KEYS > m:
            x = _causal(x, n - m, other, QUERIES, KEYS, KEYS_FIRST)
    else:
        x = _causal(x, n - m, other, QUERIES, KEYS, KEYS_FIRST)
    return x


@triton.jit
def load_where(at, inside, MASKED: tl.constexpr):
    """A load at pointers, with zeros where not `inside` if there may be such: a mask costs registers."""
    if MASKED:
        return tl.load(at, mask=inside, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def load_row(x_ptr, i, T, other, RAGGED: tl.constexpr):
    """x [T] at i, `other` beyond T where RAGGED says that there may be such."""
    if RAGGED:
        return tl.load(x_ptr + i, mask=i < T, other=other)
    else:
        return tl.load(x_ptr + i)


@triton.jit
def load_tile(
    x_ptr,  # [T, D]
    start,
    stride,
    T,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Rows start..., [ROWS, BLOCK_D], zeros beyond D, and beyond T where RAGGED says that there may be such rows."""
    at, inside = tile_at(x_ptr, start, stride, T, ROWS, D, BLOCK_D)
    return load_where(at, inside, RAGGED or D < BLOCK_D)


@triton.jit
def store_tile(
    x_ptr,  # [T, D]
    sums_ptr,  # [D] float32
    x,  # float32 [ROWS, BLOCK_D], zeros beyond T
    start,
    stride,
    T,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUMS: tl.constexpr,
):
    """x at rows start..., and where SUMS asks for them the float32 sums of its columns before rounding."""
    at, inside = tile_at(x_ptr, start, stride, T, ROWS, D, BLOCK_D)
    tl.store(at, x.to(x_ptr.dtype.element_ty), mask=inside)
    if SUMS:
        d = tl.arange(0, BLOCK_D)
        tl.store(sums_ptr + d, tl.sum(x, axis=0), mask=d < D)
