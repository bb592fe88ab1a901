"""Machine code counted: kinds, loops and what they take of an SM, against code whose answer is read off by hand; how
often launches pass their loops, in closed form."""

from types import SimpleNamespace
from typing import Any

import pytest

sass = pytest.importorskip("sass", reason="needs Triton")
import bounds  # noqa: E402  # after Triton is known to be there

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


def code(text: str) -> list[str]:
    """The instructions of lines "ADDRESS INSTRUCTION", whose addresses count up by 16."""
    lines = [line.split(None, 1) for line in text.strip().splitlines()]
    assert [int(at, 16) for at, _ in lines] == [16 * i for i in range(len(lines))]
    return [instruction.strip() for _, instruction in lines]


# Rows (0x20 to 0x110), in each a loop over keys (0x30 to 0xc0) with a mask for some (0x60, 0x70), a wait for a barrier
# (0x90, 0xa0), a path for warps that have diverged (0x120); after the end a jump to itself, and what fills it up.
TWO_LOOPS = code("""
00  S2R R1, SR_CTAID.X
10  MOV R2, RZ
20  LDG.E.128 R4, desc[UR4][R2.64]
30  LDGSTS.E.BYPASS.128 [R8], desc[UR4][R6.64], P1
40  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
50  @P0 BRA 0x80
60  FSEL R24, R24, -INF , !P2
70  ISETP.GE.AND P2, PT, R3, R9, PT
80  MUFU.EX2 R25, R25
90  SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR4], R9
a0  @!P3 BRA 0x90
b0  HGMMA.64x64x16.F32.BF16 R56, R88, gdesc[UR8].tnspB, R56
c0  @!P4 BRA 0x30
d0  BRA.DIV UR4, 0x120
e0  SHFL.BFLY PT, R3, R3, 0x10, 0x1f
f0  LDS.64 R10, [R8+0x100]
100 UIADD3 UR4, UR4, 0x1, URZ
110 @P5 BRA 0x20
120 STG.E.64 desc[UR4][R2.64], R4
130 EXIT
140 BRA 0x140
150 NOP
160 NOP
""")


def test_two_loops_one_inside_the_other():
    found = sass.read_sass(TWO_LOOPS)
    outer, inner = found.loops
    assert (outer.at, inner.at, outer.outer, inner.outer) == (0x20, 0x30, None, 0)
    assert found.hot is inner and found.budget == [8, 21]
    assert inner.sometimes == {"instructions": 2, "compare": 1, "integer": 1}
    # of a warp: a copy of 32 x 16 bytes; A and B, then B alone, of 64 rows of 32 bytes, shared by four warps
    assert inner.always == {
        "instructions": 8, "tensor": 2, "fma": 2 * 64 * 64 * 16 // 4, "special": 1, "control": 4, "global": 1,
        "asked_bytes": 512, "shared_bytes": 512 + (64 + 64) * 32 // 4 + 64 * 32 // 4,
    }  # fmt: skip
    assert outer.always == {
        "instructions": 6, "global": 1, "asked_bytes": 512, "shuffle": 1, "shared": 1, "shared_bytes": 256,
        "uniform": 1, "control": 2,
    }  # fmt: skip
    assert found.straight["instructions"] == 4 and found.total["instructions"] == 0x150 // 16


def test_code_side_by_side_keeps_its_own_addresses():
    assert sass._moved("@!P5 BRA !P4, 0xfb0", 0xF00) == "@!P5 BRA !P4, 0xb0"
    assert sass._moved("IADD3 R1, R1, 0xfb0, RZ", 0xF00) == "IADD3 R1, R1, 0xfb0, RZ"


@pytest.mark.parametrize(
    ("instruction", "kind", "figures"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "tensor", {"fma": 16 * 8 * 16}),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", "tensor", {"fma": 2 * 16 * 8 * 8}),  # at half the rate
        ("HGMMA.64x32x8.F32.TF32 R4, R8, gdesc[UR8], R4", "tensor", {"fma": 64 * 32 * 8 * 2 // 4, "shared_bytes": 256}),
        ("UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4], tmem[UR6], idesc[UR7], UP0", "tensor", {}),
        ("@P0 FFMA R1, R2, R3, R4", "float", {}),
        ("FMNMX R1, R2, R3, !PT", "compare", {}),
        ("IMAD.MOV.U32 R1, RZ, RZ, R2", "multiply", {}),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "convert", {}),
        ("F2F.BF16.F32 R1, R2", "special", {}),
        ("LDSM.16.M88.4 R8, [R4]", "shared", {"shared_bytes": 512}),
        ("STSM.16.M88 [R4], R8", "shared", {"shared_bytes": 128}),
        ("@!P1 STS.U16 [R4], R8", "shared", {"shared_bytes": 64}),
        ("@!PT LDS RZ, [RZ]", "control", {}),  # nobody does it
        ("LDG.E.EF.128 R8, desc[UR4][R2.64]", "global", {"asked_bytes": 512}),
        ("UTMALDG.2D [UR8], [UR4], desc[UR6]", "global", {}),
        ("UTMACMDFLUSH", "global", {}),
        ("STL.64 [R1], R2", "global", {}),
        ("R2UR UR4, R2", "uniform", {}),
        ("USHF.R.S32.HI UR4, URZ, 0x1f, UR5", "uniform", {}),
        ("LOP3.LUT R0, R6, 0x1000000, RZ, 0x3c, !PT", "integer", {}),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "control", {}),
    ],
)
def test_what_an_instruction_is(instruction: str, kind: str, figures: dict[str, int]):
    assert sass.count(instruction) == {"instructions": 1, kind: 1} | figures


# ---- bounds ----


def test_clocks_of_attention_by_hand():
    """Forward by 64x64 tiles and 4 warps, one iteration: 8 wgmma of 64x64x16; half of them read both operands from
    shared memory, half one; keys and values come in; 34 exponentials of a warp; 302 instructions."""
    counts = sass.Counts(fma=8 * 64 * 64 * 16 // 4, shared_bytes=(4 * 4096 + 4 * 2048 + 2 * 64 * 64 * 2) // 4,
                         special=34, float=104, instructions=302, tensor=8)  # fmt: skip
    assert bounds.clocks(counts, 4, H100) == {
        "tensor": 8 * 64 * 64 * 16 / 2048,  # 256
        "shared": (24576 + 16384) / 128,  # 320
        "special": 34 * 32 * 4 / 16,  # 272
        "float": 104 * 32 * 4 / 128,
        "issue": 302,
    }
    assert bounds.clocks(counts, 4, A100)["tensor"] == 2 * 256 and bounds.clocks(counts, 4, A100)["float"] == 208
    unknown = bounds.clocks(sass.Counts(tensor=1, instructions=8), 4, "NVIDIA B200")
    assert unknown["tensor"] != unknown["tensor"] and bounds.largest(unknown) == ("issue", 8)


def call(name: str, grid: tuple[int, ...], **arguments: object) -> Any:
    kernel = SimpleNamespace(__name__=name, params=[])
    return SimpleNamespace(kernel=kernel, grid=grid, args=(), options=arguments)


def loops(number: int = 1) -> Any:
    return sass.Sass(sass.Counts(), sass.Counts(), (sass.Loop(0, sass.Counts(), sass.Counts()),) * number)


@pytest.mark.parametrize(("M", "N"), [(64, 64), (128, 64), (64, 32), (64, 128)])
def test_tiles_of_attention_are_those_up_to_the_diagonal(M: int, N: int):
    """Counted one by one: 5 heads of 256 queries; some of a masked tile's keys come after some of its queries."""
    T, tiles = 256, [(i, j) for i in range(0, 256, M) for j in range(0, 256, N)]
    seen = [(i, j) for i, j in tiles if j < i + M]
    masked = [(i, j) for i, j in seen if j + N > i + 1]
    shape = dict(heads=5, T=T, BLOCK_M=M, BLOCK_N=N, D=64, ITEMSIZE=2)
    for name, by_tma in (("_attention_fwd_kernel", True), ("_attention_bwd_dkdv_kernel", False)):
        (found,) = bounds.trips_of(call(name, (1,), **shape, TMA=by_tma), loops()) or []
        assert (found.always, found.sometimes) == (5 * len(seen), 5 * len(masked))
        assert found.copied == by_tma * 2 * N * 64 * 2
    assert bounds.trips_of(call("_attention_fwd_kernel", (1,), **shape, DOCUMENTS=True), loops()) is None
    assert bounds.trips_of(call("_attention_fwd_kernel", (1,), **shape), loops(number=2)) is None


def test_a_products_loop_hides_its_instructions_and_others_wait():
    """A flattened GEMM of 2 x 3 tiles in 4 steps: a step's 10 instructions are hidden, the epilogue's 100 are not."""
    step = sass.Counts(instructions=10, tensor=1, fma=1024)
    epilogue = sass.Counts(instructions=100, float=50)
    kernel = sass.Sass(sass.Counts(), sass.Counts(instructions=7), (sass.Loop(0, step, epilogue),))
    shape = dict(M=200, N=300, K=256, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, TMA=True, FLATTEN=True)
    done = bounds.executed(call("_gemm_gelu_fwd_kernel", (6,), **shape), kernel, 4)
    assert done is not None and done.counts["instructions"] == 4 * (24 * 10 + 6 * 100 + 6 * 7)
    assert done.dependent == 4 * (6 * 100 + 6 * 7) and done.copied == 24 * 2 * 128 * 64 * 2
    at = bounds.MEASURED[H100]
    parts = bounds.seconds(done, 2.0, H100, 1e6)
    tensor = 4 * 24 * 1024 / 2048 / 132 / at.clock
    assert parts["tensor"] == pytest.approx(tensor) and parts["memory"] == pytest.approx(1e6 / 2.95e12)
    assert parts["serial"] == pytest.approx(tensor + done.dependent / 4 * (at.warp_clocks / 2) / 132 / at.clock)
    full = bounds.seconds(done, 16.0, H100, 1e6)["serial"]
    assert full == pytest.approx(tensor + done.dependent / 4 / 132 / at.clock)  # nobody waits
    assert "serial" not in bounds.seconds(done, 2.0, A100, 1e6)  # not measured there


def test_rows_of_logits():
    shape = dict(M=10, valid_vocab=50257, width=50304, BLOCK_V=8192, LANES=512, VEC=8)
    found = bounds.trips_of(call("_cross_entropy_fwd_kernel", (4,), **shape), loops(number=6))
    assert found is not None and [n.always for n in found] == [10, 60, 10, 0, 10, 60]
