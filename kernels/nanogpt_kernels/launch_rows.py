"""The launch shapes: frozen rows by op, architecture, element size and problem size, each with what measured it; before
them the architectures that they are chosen for.

Rows are chosen by launch.pick, and nothing is tuned while training: autotuning breaks graph capture, and picks
differently on each rank. `python bench/tune.py OP` searches offline and prints rows to paste here; launch.keep puts
rows that were measured elsewhere before them.
"""

from dataclasses import dataclass, field
from typing import Any

UNMEASURED = "from resources, unmeasured"


@dataclass(frozen=True)
class Architecture:
    """Of one SM, and how many a card has. Source: CUDA C++ Programming Guide, "Technical Specifications per Compute
    Capability"; 1 KB of shared memory a block is the system's (CUDA occupancy calculator)."""

    sms: int  # of the card that is named: what launches are sized for where there is no GPU
    shared_kb: int
    warps: int
    blocks: int
    wgmma: bool = False  # products by four warps from shared memory; sm_100 has tcgen05, the others mma.sync
    registers: int = 65536

    @property
    def block_shared(self) -> int:
        """Bytes of shared memory that one block may have."""
        return (self.shared_kb - 1) * 1024


ARCHITECTURES = {
    80: Architecture(sms=108, shared_kb=164, warps=64, blocks=32),  # A100
    86: Architecture(sms=84, shared_kb=100, warps=48, blocks=16),  # A40, A6000
    89: Architecture(sms=128, shared_kb=100, warps=48, blocks=24),  # RTX 4090
    90: Architecture(sms=132, shared_kb=228, warps=64, blocks=32, wgmma=True),  # H100 SXM
    100: Architecture(sms=148, shared_kb=228, warps=64, blocks=32),  # B200
    120: Architecture(sms=170, shared_kb=100, warps=48, blocks=24),  # RTX 5090
}


@dataclass(frozen=True)
class Row:
    """A launch row: one launch shape. It serves `arch` and later ones up to the next listed, elements up to `itemsize`
    bytes and problems up to `up_to` (the comment above an op's rows says what it counts)."""

    arch: int
    blocks: dict[str, int]
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None  # a thread (PTX .maxnreg); None leaves it to the assembler
    itemsize: int = 4
    up_to: int = 2**62
    choices: dict[str, Any] = field(default_factory=dict)  # of the host: which path, how many programs an SM
    source: str = UNMEASURED


_GEMM_128 = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, PARTS=4, FLATTEN=True, TMA_STORE=True)
_GEMM_256 = _GEMM_128 | dict(BLOCK_N=256)
_GEMM_PAIR = _GEMM_128 | dict(FLATTEN=False)  # of programs that share an SM
_GEMM_MMA = _GEMM_128 | dict(BLOCK_K=32)  # as those, by mma.sync; unflattened, backward spills 168 bytes on sm_80
_MMA_PAIR = _GEMM_MMA | dict(FLATTEN=False)  # forward by TMA on sm_120: 194 registers for 231
_STRIP = dict(BLOCK_M=4, BLOCK_N=256)
_CUBLAS = dict(fused=False, programs_per_sm=1, least_rows=2048)
_PAIR = dict(programs_per_sm=2)
_FUSED = dict(fused=True, least_rows=2048) | _PAIR
# with dy in float32 and C above this, dres is loaded late: loaded with dy, it spilled 40 bytes a thread at C = 8192
_WIDE_NORM_BWD = dict(programs_per_sm=1, float32_dres_late_above=4096)
_ROWS = dict(chunk_rows=8192, programs_per_sm=2, backwards=True, evict_first=True)
_SPLIT = dict(keys_a_split=128)  # one token of GPT-2 124M at position 1023 has 12 heads: 96 programs
_POINTERS = dict(tma=False)  # or keys and values by TMA, where T is whole tiles

# What a clock chose, in bfloat16 at C = 768, 65,536 rows, V = 50304, D = 64, T = 1024, by bench/tune.py (rows tried are
# in bench/results/h100): the source says by how much.
_H100 = "measured on NVIDIA H100 80GB HBM3, 2026-11-27, by ptxas 13.5: "

# GELU's own passes beside its product, the floors of each at C = 768 (1600): profiling/roofline.py --gelu apart
_MMA_FWD = "reasoned: GELU is 0.40 of the product's time on A100, 0.43 on RTX 4090, 0.30 on RTX 5090 (0.19, 0.20, 0.15)"
_MMA_BWD = "reasoned: GELU is 0.60 of the product's time on A100, 0.64 on RTX 4090, 0.46 on RTX 5090 (0.29, 0.31, 0.22)"

# fmt: off
TABLE: dict[str, tuple[Row, ...]] = {
    # the optimizer: up_to is the number of parameters; BLOCK elements a tile
    "grad_norm": (Row(80, dict(BLOCK=4096), num_warps=8, choices=dict(programs_per_sm=4)),),
    "adamw": (Row(80, dict(BLOCK=2048), num_warps=8),),
    # embedding: up_to is C; SEQUENCES of the batch, RUN sorted rows or PIECES of them a tile
    "embedding_fwd": (Row(80, dict(SEQUENCES=8, BLOCK_C=256), num_warps=4),),
    "embedding_bwd": (
        Row(80, dict(RUN=64, BLOCK_C=64), num_warps=8),
        # of 32x32 by 2 warps 0.737, but with float16 those spill
        Row(90, dict(RUN=16, BLOCK_C=64), num_warps=8, itemsize=2, source=_H100 + "embedding 0.761 of 64x64"),
    ),
    "embedding_bwd_pieces": (Row(80, dict(PIECES=16, BLOCK_C=128), num_warps=4),),
    "embedding_bwd_positions": (Row(80, dict(SEQUENCES=8, BLOCK_C=256), num_warps=4),),
    # norm and add_norm: up_to is C; a row in pieces of BLOCK_C columns, ROWS rows a tile (more where C < BLOCK_C).
    # Pieces, not a power of two: at C = 768 on sm_90 add_norm takes 398 warp instructions a row (884 with 1024 lanes),
    # backward 484 (960); with dropout 887 (1604) and 1008 (1696). At 3.35 TB/s an H100 has time for about 1,700.
    "norm_fwd": (
        Row(80, dict(ROWS=1, BLOCK_C=256), num_warps=1, itemsize=2, up_to=768, choices=dict(programs_per_sm=12)),
        Row(90, dict(ROWS=1, BLOCK_C=256), num_warps=1, itemsize=2, up_to=768, choices=dict(programs_per_sm=32),
            source=_H100 + "add_norm forward 0.980 of 12 programs an SM"),
        Row(100, dict(ROWS=1, BLOCK_C=256), num_warps=1, itemsize=2, up_to=768, choices=dict(programs_per_sm=12)),
        Row(80, dict(ROWS=1, BLOCK_C=256), num_warps=1, up_to=768, choices=dict(programs_per_sm=12)),
        Row(80, dict(ROWS=1, BLOCK_C=512), num_warps=2, itemsize=2, up_to=1024, choices=dict(programs_per_sm=10)),
        Row(80, dict(ROWS=1, BLOCK_C=256), num_warps=2, up_to=1280, choices=dict(programs_per_sm=8)),
        Row(80, dict(ROWS=1, BLOCK_C=256), num_warps=2, up_to=2048, choices=dict(programs_per_sm=6)),
        Row(80, dict(ROWS=1, BLOCK_C=2048), num_warps=16, up_to=8192, choices=dict(programs_per_sm=1)),
    ),
    "norm_bwd": (
        Row(80, dict(ROWS=4, BLOCK_C=256), num_warps=4, up_to=768, choices=dict(programs_per_sm=2)),
        Row(90, dict(ROWS=1, BLOCK_C=256), num_warps=1, itemsize=2, up_to=768, choices=dict(programs_per_sm=12),
            source=_H100 + "add_norm both ways 0.931 of 4 rows by 4 warps, 2 programs an SM"),
        Row(80, dict(ROWS=2, BLOCK_C=256), num_warps=4, up_to=1280, choices=dict(programs_per_sm=2)),
        Row(80, dict(ROWS=1, BLOCK_C=512), num_warps=4, up_to=2048, choices=dict(programs_per_sm=3)),
        Row(80, dict(ROWS=1, BLOCK_C=2048), num_warps=8, up_to=8192, choices=_WIDE_NORM_BWD),
    ),
    # column_sums: up_to is the longest vector's C. About a program an SM (144 for the norm's three of GPT-2 124M), its
    # first 384 or 192 rows in flight at once: latency bounds such a launch, not its 2.4 MB from L2
    "column_sums": (
        Row(80, dict(ROWS=128, BLOCK_C=16), num_warps=8, num_stages=4, up_to=2048),
        Row(80, dict(ROWS=64, BLOCK_C=32), num_warps=4, num_stages=4),
    ),
    # dropout_add: up_to is C
    "dropout_add": (Row(80, dict(ROWS=8, BLOCK_C=256), num_warps=4, choices=dict(programs_per_sm=8)),),
    # bias_gelu: up_to is N. Of 16-bit elements a thread has two vectors of 16 bytes forward, one of dy and one of x
    # backward, loaded before the arithmetic: of twice as many ptxas loads the later ones after the arithmetic of the
    # first, one wait after another, to save registers. 31 of them forward on sm_90, 19 instructions an element
    "bias_gelu_fwd": (Row(80, dict(BLOCK_M=8, BLOCK_N=256), num_warps=4),),
    # backward 32, 25 instructions, where nothing is summed, else up to 48 (of 32-bit elements 48 and 56): programs that
    # are resident at once, 12 being as many as sm_86, sm_89 and sm_120 have warps for
    "bias_gelu_bwd": (
        Row(80, _STRIP, num_warps=4, itemsize=2, choices=dict(programs_per_sm=12, summing_per_sm=10)),
        Row(80, _STRIP, num_warps=4, itemsize=4, choices=dict(programs_per_sm=10, summing_per_sm=9)),
    ),
    # mlp: up_to is C. fused: the GEMM with GELU in its epilogue, from least_rows rows on, not cuBLAS and an elementwise
    # pass, of which it saves one over [M, F] forward and two backward. 128x256 tiles by 8 warps are alone on an SM, so
    # nothing covers their epilogue (forward 1.08 of cuBLAS and GELU, measured); of 128x128 by 4 warps two share an SM,
    # on sm_90 at most 80% of the peak, as shared memory feeds them. Not flattened, a step of their K loop has 93
    # instructions there (160), an epilogue 2,050 forward and 2,700 backward, and backward waits for no pre. By mma.sync
    # each of 4 warps has 64x64 of a tile, so shared memory is busy for 0.75 of an A100's tensor clocks (8 warps: 1.0)
    # and issue slots for 0.60 forward, 0.73 backward; K in steps of 32 spills on sm_120 alone, 48 bytes at most.
    "mlp_fwd": (
        Row(80, _GEMM_MMA, num_warps=4, num_stages=4, itemsize=2, choices=_CUBLAS | _PAIR),
        Row(80, _GEMM_MMA, num_warps=4, num_stages=4, itemsize=2, up_to=1600, choices=_FUSED, source=_MMA_FWD),
        Row(86, _GEMM_MMA, num_warps=4, num_stages=3, itemsize=2, choices=_CUBLAS | _PAIR),
        Row(86, _GEMM_MMA, num_warps=4, num_stages=3, itemsize=2, up_to=1600, choices=_FUSED, source=_MMA_FWD),
        Row(90, _GEMM_128, num_warps=4, num_stages=3, itemsize=2, choices=_CUBLAS | _PAIR),
        Row(90, _GEMM_128, num_warps=4, num_stages=3, itemsize=2, up_to=768, choices=_FUSED,
            source=_H100 + "mlp forward 0.943 of cuBLAS and GELU; 1.019 unflattened in two parts"),
        Row(100, _GEMM_256, num_warps=8, num_stages=3, itemsize=2, choices=_CUBLAS),
        Row(120, _MMA_PAIR, num_warps=4, num_stages=3, itemsize=2, choices=_CUBLAS | _PAIR),
        Row(120, _MMA_PAIR, num_warps=4, num_stages=3, itemsize=2, up_to=1600, choices=_FUSED, source=_MMA_FWD),
    ),
    "mlp_bwd": (
        Row(80, _GEMM_MMA, num_warps=4, num_stages=4, itemsize=2, choices=_CUBLAS | _PAIR),
        Row(80, _GEMM_MMA, num_warps=4, num_stages=4, itemsize=2, up_to=1600, choices=_FUSED, source=_MMA_BWD),
        Row(86, _GEMM_MMA, num_warps=4, num_stages=3, itemsize=2, choices=_CUBLAS | _PAIR),
        Row(86, _GEMM_MMA, num_warps=4, num_stages=3, itemsize=2, up_to=1600, choices=_FUSED, source=_MMA_BWD),
        Row(90, _GEMM_PAIR, num_warps=4, num_stages=3, itemsize=2, choices=_CUBLAS | _PAIR),
        Row(90, _GEMM_PAIR, num_warps=4, num_stages=3, itemsize=2, up_to=768, choices=_FUSED,
            source=_H100 + "mlp both ways 0.962 of cuBLAS and GELU; 0.967 in two parts, 0.984 flattened"),
        Row(100, _GEMM_256, num_warps=8, num_stages=3, itemsize=2, choices=_CUBLAS),
        Row(120, _GEMM_MMA, num_warps=4, num_stages=3, itemsize=2, choices=_CUBLAS | _PAIR),
        Row(120, _GEMM_MMA, num_warps=4, num_stages=3, itemsize=2, up_to=1600, choices=_FUSED, source=_MMA_BWD),
    ),
    # cross_entropy: up_to is V; a program takes a row in tiles of BLOCK_V; chunk_rows rows of logits exist at a time.
    # Programs an SM are rows in flight, not what fits: two of 100 KB on each of an H100's SMs are 26 MB of its 50 MB of
    # L2, which serves the second read. That read goes backwards from the tiles read last, or in order; what it has read
    # and written is not asked for again, so it may be evicted first
    "cross_entropy": (
        Row(80, dict(BLOCK_V=1024), num_warps=4, itemsize=2, up_to=4096, choices=_ROWS | dict(programs_per_sm=12)),
        Row(80, dict(BLOCK_V=8192), num_warps=16, itemsize=2, choices=_ROWS),
        Row(90, dict(BLOCK_V=1024), num_warps=4, itemsize=2, up_to=4096, choices=_ROWS | dict(programs_per_sm=12)),
        Row(90, dict(BLOCK_V=8192), num_warps=16, itemsize=2, choices=_ROWS | dict(chunk_rows=16384),
            source=_H100 + "linear_cross_entropy 0.980 of chunks of 8192; in order, or evicting nothing first, 1.020"),
        Row(100, dict(BLOCK_V=1024), num_warps=4, itemsize=2, up_to=4096, choices=_ROWS | dict(programs_per_sm=12)),
        Row(100, dict(BLOCK_V=8192), num_warps=16, itemsize=2, choices=_ROWS),
        Row(80, dict(BLOCK_V=1024), num_warps=4, up_to=4096, choices=_ROWS | dict(programs_per_sm=12)),
        Row(80, dict(BLOCK_V=4096), num_warps=16, choices=_ROWS),
    ),
    # attention: up_to is D; with dropout or documents, which take registers, it has launch rows of its own. On sm_90
    # each 4 warps have 64 queries (in dK, dV: keys): two groups of 4 that share 64 both compute all of QK^T and dP
    "attention_fwd": (
        Row(80, dict(BLOCK_M=64, BLOCK_N=32), num_warps=8, num_stages=2, up_to=64),
        Row(80, dict(BLOCK_M=32, BLOCK_N=16), num_warps=8, num_stages=2, up_to=128),
        Row(80, dict(BLOCK_M=128, BLOCK_N=64), num_warps=4, num_stages=3, itemsize=2, up_to=64),
        Row(80, dict(BLOCK_M=128, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(86, dict(BLOCK_M=64, BLOCK_N=64), num_warps=4, num_stages=3, itemsize=2, up_to=64),
        Row(86, dict(BLOCK_M=128, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        # four programs an SM, so that exponentials of one run under products of the others
        Row(90, dict(BLOCK_M=64, BLOCK_N=64), num_warps=4, num_stages=3, itemsize=2, up_to=64, choices=_POINTERS,
            source=_H100 + "forward 0.933 of 128x64 by 8 warps; by TMA 0.961"),
        Row(90, dict(BLOCK_M=128, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128, choices=_POINTERS),
        Row(100, dict(BLOCK_M=128, BLOCK_N=64), num_warps=4, num_stages=3, itemsize=2, up_to=64),
        Row(100, dict(BLOCK_M=128, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(120, dict(BLOCK_M=64, BLOCK_N=64), num_warps=4, num_stages=3, itemsize=2, up_to=64),
        Row(120, dict(BLOCK_M=128, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
    ),
    "attention_fwd_dropout_or_docs": (
        Row(80, dict(BLOCK_M=32, BLOCK_N=32), num_warps=4, num_stages=2, up_to=64),
        Row(80, dict(BLOCK_M=32, BLOCK_N=16), num_warps=8, up_to=128),
        Row(80, dict(BLOCK_M=64, BLOCK_N=64), num_warps=4, num_stages=3, itemsize=2, up_to=64),
        Row(80, dict(BLOCK_M=64, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(90, dict(BLOCK_M=64, BLOCK_N=64), num_warps=4, num_stages=3, itemsize=2, up_to=64),
        Row(90, dict(BLOCK_M=128, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(100, dict(BLOCK_M=64, BLOCK_N=32), num_warps=4, num_stages=3, itemsize=2, up_to=64),
        Row(100, dict(BLOCK_M=64, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
    ),
    # attention_bwd: up_to is D. Its form is a choice of the first row: atomic has 5 products, not 7, but clears, adds
    # to and reads a float32 dQ [B, H, T, D]. On an H100 both ways take 1.26 of the deterministic form's time.
    "attention_bwd": (Row(80, {}, num_warps=4, choices=dict(atomic=False)),),
    "attention_bwd_rows": (Row(80, dict(ROWS=64), num_warps=4),),
    "attention_bwd_dq": (
        Row(80, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, up_to=64),
        Row(80, dict(BLOCK_M=16, BLOCK_N=16), num_warps=8, up_to=128),
        Row(80, dict(BLOCK_M=128, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(80, dict(BLOCK_M=64, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(90, dict(BLOCK_M=64, BLOCK_N=32), num_warps=4, num_stages=3, itemsize=2, up_to=64,
            source=_H100 + "both ways 0.985 of 64x64; 128x64 by 8 warps in 128 registers 1.008"),
        Row(90, dict(BLOCK_M=64, BLOCK_N=64), num_warps=4, num_stages=2, itemsize=2, up_to=128),
        Row(100, dict(BLOCK_M=128, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(100, dict(BLOCK_M=64, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
    ),
    "attention_bwd_dq_dropout_or_docs": (
        Row(80, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, up_to=64),
        Row(80, dict(BLOCK_M=16, BLOCK_N=16), num_warps=8, up_to=128),
        Row(80, dict(BLOCK_M=128, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(80, dict(BLOCK_M=64, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(90, dict(BLOCK_M=128, BLOCK_N=32), num_warps=8, num_stages=3, itemsize=2, up_to=64),
        Row(90, dict(BLOCK_M=128, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(120, dict(BLOCK_M=128, BLOCK_N=32), num_warps=8, itemsize=2, up_to=64),
        Row(120, dict(BLOCK_M=64, BLOCK_N=32), num_warps=8, itemsize=2, up_to=128),
    ),
    "attention_bwd_dkdv": (
        Row(80, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, up_to=64),
        Row(80, dict(BLOCK_M=16, BLOCK_N=32), num_warps=8, up_to=128),
        Row(80, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(80, dict(BLOCK_M=32, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(90, dict(BLOCK_M=64, BLOCK_N=64), num_warps=4, num_stages=3, itemsize=2, up_to=64,
            source=_H100 + "both ways 0.890 of 64x128 by 8 warps; 32x64 0.897, 32x128 in 128 registers 0.916"),
        # 32x128 reads shared memory less, but by Triton 3.6 spills 16 bytes where T is ragged: to be timed
        Row(90, dict(BLOCK_M=16, BLOCK_N=128), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(120, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(120, dict(BLOCK_M=32, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
    ),
    "attention_bwd_dkdv_dropout_or_docs": (
        Row(80, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, up_to=64),
        Row(80, dict(BLOCK_M=32, BLOCK_N=16), num_warps=4, up_to=128),
        Row(80, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, itemsize=2, up_to=64),
        Row(80, dict(BLOCK_M=32, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(90, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, num_stages=3, itemsize=2, up_to=64),
        Row(90, dict(BLOCK_M=16, BLOCK_N=128), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(100, dict(BLOCK_M=64, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(100, dict(BLOCK_M=16, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(120, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, itemsize=2, up_to=64),
        Row(120, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
    ),
    "attention_bwd_atomic": (
        Row(80, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, up_to=64),
        Row(80, dict(BLOCK_M=16, BLOCK_N=32), num_warps=8, up_to=128),
        Row(80, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(80, dict(BLOCK_M=32, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        # 64, not 32: wgmma for dQ too, and 429 instructions for 64 queries, not twice 298
        Row(90, dict(BLOCK_M=64, BLOCK_N=128), num_warps=8, num_stages=3, itemsize=2, up_to=64),
        Row(90, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(120, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(120, dict(BLOCK_M=32, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),
    ),
    "attention_bwd_atomic_dropout_or_docs": (
        Row(80, dict(BLOCK_M=16, BLOCK_N=32), num_warps=8, up_to=128),
        Row(80, dict(BLOCK_M=32, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(80, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
        Row(90, dict(BLOCK_M=32, BLOCK_N=128), num_warps=8, num_stages=3, itemsize=2, up_to=64),
        Row(90, dict(BLOCK_M=16, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=128),  # twice: others spill
        Row(120, dict(BLOCK_M=32, BLOCK_N=64), num_warps=8, num_stages=2, itemsize=2, up_to=64),
        Row(120, dict(BLOCK_M=32, BLOCK_N=32), num_warps=8, num_stages=2, itemsize=2, up_to=128),
    ),
    # cached_attention: up_to is T, the new tokens; a program takes keys_a_split of the cached keys
    "cached_attention": (
        Row(80, dict(BLOCK_M=16, BLOCK_N=16), num_warps=8, choices=_SPLIT),
        Row(80, dict(BLOCK_M=16, BLOCK_N=32), num_warps=4, num_stages=4, itemsize=2, up_to=16, choices=_SPLIT),
        Row(80, dict(BLOCK_M=64, BLOCK_N=32), num_warps=4, num_stages=2, itemsize=2, choices=_SPLIT),
    ),
}
# fmt: on
