"""What an op must do at least, and how long a machine needs for it.

Bytes are compulsory ones: every operand read once and every result written once, in the forms of nanogpt_kernels
(residual and LayerNorm in one pass, logits in place, packed qkv). M rows of C, F or V elements of `size` bytes.
"""

from dataclasses import dataclass

HALF, FULL = 2, 4  # bytes of bfloat16, float32
TILE = 128  # edge of attention's tiles: what lies above the diagonal in them is computed too
EXPONENTIALS_A_CLOCK = 16  # of one SM, 8.0 to 12.0 (CUDA C++ Programming Guide, arithmetic throughput)


@dataclass(frozen=True)
class Work:
    """Floating-point operations of products, bytes moved, exponentials."""

    flops: float = 0.0
    bytes: float = 0.0
    exps: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.exps + other.exps)

    def seconds(self, peak: float, bandwidth: float, exp_rate: float) -> dict[str, float]:
        """{"flops", "bytes", "exps"}: what each alone takes, at so many a second."""
        return {"flops": self.flops / peak, "bytes": self.bytes / bandwidth, "exps": self.exps / exp_rate}


def causal_pairs(heads: int, T: int) -> float:
    """(query, key) pairs that attention computes: those below the diagonal in whole tiles; at most the whole square."""
    return heads * T * T / 2 * min(1 + TILE / T, 2.0)


def norm_bytes(M: int, C: int, size: int = HALF, *, backward: bool) -> int:
    """r -> y; or dy, r -> dr."""
    return (3 if backward else 2) * size * M * C


def add_norm_bytes(M: int, C: int, size: int = HALF, *, backward: bool, dropout: bool = False) -> int:
    """r, delta -> r', y; or dy, dr', r' -> dr, which is ddelta too unless dropout changes it."""
    return (5 if backward and dropout else 4) * size * M * C


def attention_bytes(M: int, C: int, size: int = HALF, *, backward: bool) -> int:
    """q, k, v -> o; or do, o, q, k, v -> dq, dk, dv."""
    return (8 if backward else 4) * size * M * C


def cross_entropy_bytes(M: int, V: int, size: int = HALF, *, passes: int) -> int:
    """Logits read and overwritten by their gradient: 2 passes through memory, 3 with the second read that hits L2."""
    return passes * size * M * V


def embedding_bytes(M: int, C: int, size: int = HALF, *, backward: bool) -> int:
    """Rows of wte -> r; or dr."""
    return (1 if backward else 2) * size * M * C


def gelu_bytes(M: int, F: int, size: int = HALF, *, backward: bool) -> int:
    """pre -> act; or dact, pre -> dpre."""
    return (3 if backward else 2) * size * M * F


def adamw_bytes(N: int, size: int = HALF) -> int:
    """master, m, v in and out, g in, the parameters out where they are not the masters."""
    return (3 * 2 * FULL + FULL + (size if size < FULL else 0)) * N


def grad_norm_bytes(N: int) -> int:
    return FULL * N
