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
            at, inside = piece(m, M, i, C, BLOCK_C)
            pieces += (tl.load(ptr + at, mask=inside, other=0.0),)
    return pieces


@triton.jit
def _normal_tail(x):
    """(z, Q(z)): z = |x| up to 14.5, where Q is 0 in float32, and Q(z) = 1 - Phi(z) = 2^polynomial(z): no division.

    A weighted minimax fit of log2 Q: relative error 1.6e-5 up to z = 5.8, where fp16's x Q(x) ends, 2e-4 up to 8 and
    5e-3, a bf16 step, up to 13.2, where bf16's ends. 0.5 (1 + erf), by cancellation, has 1.4e-5 at -3, 5e-2 at -5.
    """
    z = tl.minimum(tl.abs(x), 14.5, propagate_nan=tl.PropagateNan.ALL)
    e = 4.9527077550237664e-08 * z - 2.7962983040197287e-06
    e = e * z + 6.772905180696398e-05
    e = e * z - 0.0009384231525473297
    e = e * z + 0.00843983143568039
    e = e * z - 0.053667809814214706
    e = e * z - 0.4588733911514282
    e = e * z - 1.1510686874389648
    return z, tl.exp2(e * z - 1.0)


@triton.jit
def _sigmoid_of_twice(x, square, SHORT: tl.constexpr):
    """sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), square = x^2. A root's reciprocal squared is shorter than 1 / y,
    but errs by two roundings, which 1 - sigmoid takes over."""
    if SHORT:
        root = tl.rsqrt(1.0 + tl.exp2(x * (-2.302208198144325 - 0.1029432395800235 * square)))
        return root * root
    else:
        return tl.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * square))


@triton.jit
def gelu(x, TANH: tl.constexpr, SHORT: tl.constexpr):
    """x Phi(x), by erf, or by GPT-2's tanh: 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).

    x: float32. SHORT: for results of 16 bits, Phi to about 1e-5, in a third of the instructions; by erf then with its
    limits at +-inf, where else -inf gives NaN."""
    if TANH:
        return x * _sigmoid_of_twice(x, x * x, SHORT)
    elif SHORT:
        z, tail = _normal_tail(x)
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - z * tail
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x, TANH: tl.constexpr, SHORT: tl.constexpr):
    """d gelu(x) / dx: s + x s (1 - s) (2u)', or Phi(x) + x phi(x)."""
    if TANH:
        square = x * x
        s = _sigmoid_of_twice(x, square, SHORT)
        return s + s * (x * (1.0 - s) * (1.5957691216057308 + 0.21406444881780076 * square))
    elif SHORT:
        z, tail = _normal_tail(x)
        # log2 of phi: -z^2 / 2 log2(e) - log2(sqrt(2 pi))
        beyond = z * tl.exp2(z * (z * -0.7213475204444817) - 1.3257480647361595) - tail
        return tl.where(x < 0.0, -beyond, 1.0 + beyond)
    else:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
