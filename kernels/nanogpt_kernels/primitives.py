"""What two or more ops share in device code: the dropout mask, a position in memory, rows in pieces, GELU."""

import triton
import triton.language as tl
from torch import Tensor


def dropout_args(p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """What kernels take for dropout with probability p: (seed, or None where p is 0; keep_mask's threshold; the scale
    1 / (1 - p) of what is kept)."""
    return seed if p > 0.0 else None, int(p * 2**32), 1.0 / (1.0 - p)


@triton.jit
def keep_mask(seed, site, threshold, m, n, groups_a_row, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout's keep-mask, bool [BLOCK_M, BLOCK_N], of a tensor seen as [M, N]; reference.dropout_mask is its twin.

    seed: int64 scalar. m: rows, int64 [BLOCK_M]. n: first column, a multiple of 4. groups_a_row: ceil(N / 4).
    One Philox call makes four neighbouring columns.
    """
    group = m[:, None] * groups_a_row + (n // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    site_word = tl.full(low.shape, site, tl.uint32)  # not site.to(): Triton makes an argument of 1 a Python int
    w0, w1, w2, w3 = tl.philox(seed, low, high, site_word, tl.zeros_like(low))  # type: ignore[misc]
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words >= tl.full(words.shape, threshold, tl.uint32)


@triton.jit
def position_at(start_ptr, last):
    """(the int64 at start_ptr as an int32 in 0...last, whether it was one): what leads to an address must stay one."""
    asked = tl.load(start_ptr)
    start = tl.minimum(tl.maximum(asked, 0), last)
    return start.to(tl.int32), asked == start


@triton.jit
def vector_pieces(ptr, C: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr):
    """The vector [C] at ptr in float32, as PIECES pieces [1, BLOCK_C] with zeros past its end; () for None."""
    pieces = ()
    if ptr is not None:
        for i in tl.static_range(PIECES):  # type: ignore[misc]
            c = i * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
            pieces += (tl.load(ptr + c, mask=c < C, other=0.0).to(tl.float32),)
    return pieces


@triton.jit
def zero_pieces(ROWS: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr):
    """PIECES float32 pieces [ROWS, BLOCK_C] of zeros: a sum over rows."""
    pieces = ()
    for _ in tl.static_range(PIECES):  # type: ignore[misc]
        pieces += (tl.zeros([ROWS, BLOCK_C], tl.float32),)
    return pieces


@triton.jit
def piece(m, M, i, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets [ROWS, BLOCK_C] of piece i of rows m, and which of them exist."""
    c = i * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return m[:, None] * C + c, (m < M)[:, None] & (c < C)


@triton.jit
def row_pieces(ptr, m, M, C: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr):
    """Rows m of the tensor [M, C] at ptr, as PIECES pieces [ROWS, BLOCK_C] with zeros outside; () for None.

    All loads of a tile are made before its first store: the compiler moves no load over a store, and one after the
    other each piece would wait for memory.
    """
    pieces = ()
    if ptr is not None:
        for i in tl.static_range(PIECES):  # type: ignore[misc]
            at, inside = piece(m, M, i, C, BLOCK_C)  # type: ignore[misc]
            pieces += (tl.load(ptr + at, mask=inside, other=0.0),)
    return pieces


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """x Phi(x), by erf, or by GPT-2's tanh: 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)."""
    if TANH:
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x, TANH: tl.constexpr):
    """d gelu(x) / dx: s + x s (1 - s) (2u)', or Phi(x) + x phi(x)."""
    if TANH:
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * (1.5957691216057308 + 0.21406444881780076 * x * x)
    else:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
