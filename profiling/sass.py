"""The machine code of compiled kernels, counted: what a warp issues, in which loop, and what of an SM each takes.

All kernels of one architecture are disassembled by one call of the nvdisasm in Triton's wheel, as raw code side by
side: a call costs 0.7 s and 30 us an instruction.

A loop is a natural loop of the control flow graph: a branch back to a block that every path to it passes. Of each, the
blocks of its own, without those of loops inside it, are of two sorts: `always` are those that every iteration passes
(they dominate the branch back), `sometimes` all others: the mask of tiles on the diagonal, the epilogue of a flattened
K loop. The hot loop is the innermost one with the most instructions that are always passed. Loops that only wait for a
barrier are none, and paths for threads of a warp that have diverged (BRA.DIV) are left out of loops.

Counts are static and of one warp; a predicated instruction takes its issue slot either way. So they are the same in
every run, for one Triton and its ptxas.
"""

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from triton import knobs

# {one of KINDS: instructions of it}, all "instructions", and "fma": multiply-adds of products of 16-bit operands (of
# float32 ones by TF32, at half the rate, each counts twice); "shared_bytes" read or written in shared memory, wgmma's
# operands and cp.async's results too; "asked_bytes" of global memory, by loads and stores of all threads, without TMA's
Counts = Counter[str]

# By the first word of the mnemonic; what nothing matches is "integer" (on the ALU), if it starts with U "uniform".
KINDS = {
    "tensor": r"HGMMA|[HIBDQO]MMA|UTC\w*MMA",
    "special": r"MUFU|F2F|F2I|I2F|FRND|POPC|FLO",  # 16 a clock: exponentials, and conversions one at a time
    "convert": r"F2FP|I2FP|F2IP",
    "float": r"FADD|FMUL|FFMA|FADD2|FMUL2|FFMA2|FCHK|FSWZADD|H(ADD|MUL|FMA)2|D(ADD|MUL|FMA)",
    "compare": r"FMNMX3?|FSEL|FSETP?|H(MNMX|SETP?)2|DSETP",  # of floats, on the ALU
    "multiply": r"IMAD|IMUL|IDP",  # integers, on the FMA pipe
    "shared": r"LDS|STS|LDSM|STSM|ATOMS",
    "shuffle": r"SHFL",
    "global": r"LDG|STG|LDGSTS|RED|REDG|ATOM|ATOMG|UTMA\w+|UBLKCP|LDL|STL",
    "control": r"BRA|BRX|BSSY|BSYNC|EXIT|CALL|RET|BAR|DEPBAR|LDGDEPBAR|SYNCS|WARPSYNC|WARPGROUP|MEMBAR|NOP|NANOSLEEP|"
    r"ELECT|YIELD|BREAK|BMOV|ERRBAR|CCTL|FENCE|KILL|BPT|UCGABAR\w*|ARRIVES|PREEXIT|ACQBULK",
    "uniform": r"U\w+|R2UR|S2UR|VOTEU",
    "integer": r"\w+",
}
_KIND = [(kind, re.compile(pattern)) for kind, pattern in KINDS.items()]
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/ +(.*?) *;")
_NEVER = re.compile(r"@!U?PT ")
_BRANCH = re.compile(r"(BRA\S*) (.*, )?(0x[0-9a-f]+)$")
LANES, WARPGROUP = 32, 4
INSTRUCTION = 16  # bytes


@dataclass(frozen=True)
class Loop:
    """Without the loops inside it. at: address of its first block; outer: index of the loop around it."""

    at: int
    always: Counts
    sometimes: Counts
    outer: int | None = None


@dataclass(frozen=True)
class Sass:
    """A kernel: all of it, what no loop has, and its loops by address."""

    total: Counts
    straight: Counts
    loops: tuple[Loop, ...] = ()

    @property
    def hot(self) -> Loop | None:
        around = {loop.outer for loop in self.loops}
        inner = [loop for i, loop in enumerate(self.loops) if i not in around]
        return max(inner, key=lambda loop: loop.always["instructions"], default=None)

    @property
    def budget(self) -> list[int]:
        """[instructions of the hot loop that are always passed, all instructions]."""
        return [self.hot.always["instructions"] if self.hot else 0, self.total["instructions"]]


# ---- from bytes to text ----


def code_of(cubin: bytes) -> bytes:
    """The one section of code of a cubin (a 64-bit ELF file)."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(number)]
    strings = sections[names][4]
    found = []
    for name, _, _, _, offset, length in sections:
        at = strings + name
        if cubin[at : cubin.index(b"\0", at)].startswith(b".text."):
            found.append(cubin[offset : offset + length])
    if len(found) != 1:
        raise ValueError(f"{len(found)} sections of code in a cubin, expected 1")
    return found[0]


def disassemble(codes: list[bytes], arch: int) -> list[list[str]]:
    """The instructions of each kernel's code for sm_`arch`, without addresses; branches name addresses from 0 on."""
    name = f"SM{arch}a" if arch in (90, 100, 120) else f"SM{arch}"
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-b", name, "-c", "-ndf", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = _LINE.findall(said)
    if len(lines) * INSTRUCTION != sum(map(len, codes)):
        raise ValueError(f"nvdisasm shows {len(lines)} instructions of {sum(map(len, codes)) // INSTRUCTION}")
    kernels, start = [], 0
    for code in codes:
        number = len(code) // INSTRUCTION
        kernels.append([_moved(text, start * INSTRUCTION) for _, text in lines[start : start + number]])
        start += number
    return kernels


def _moved(text: str, by: int) -> str:
    found = _BRANCH.search(text) if by else None
    return f"{text[: found.start(3)]}{int(found[3], 16) - by:#x}" if found else text


def counted(codes: list[bytes], arch: int) -> list[Sass]:
    return [read_sass(text) for text in disassemble(codes, arch)] if codes else []


# ---- from text to counts ----


def _split(text: str) -> tuple[str, str]:
    """(mnemonic, operands) without the predicate."""
    words = re.sub(r"^@!?U?P\w+ +", "", text).split(None, 1)
    return words[0], words[1] if len(words) > 1 else ""


def kind_of(mnemonic: str) -> str:
    word = mnemonic.split(".")[0]
    return next(kind for kind, pattern in _KIND if pattern.fullmatch(word))


def _width(mnemonic: str) -> int:
    """Bytes that a thread moves."""
    found = re.search(r"\.(128|64|[US]?16|[US]?8)\b", mnemonic)
    return int(found[1].lstrip("US")) // 8 if found else 4


def count(text: str) -> Counts:
    """Of one instruction of a warp."""
    mnemonic, operands = _split(text)
    if _NEVER.match(text):  # as the loads of nothing that keep an order
        return Counts({"instructions": 1, "control": 1})
    return _count(mnemonic, re.search(r", R\d+\S*, gdesc", operands) is not None)


@cache
def _count(mnemonic: str, from_registers: bool) -> Counts:
    """from_registers: a wgmma's first operand."""
    kind, word = kind_of(mnemonic), mnemonic.split(".")[0]
    counts = Counts({"instructions": 1, kind: 1})
    if kind == "tensor":
        counts.update(_product(mnemonic, from_registers))
    elif word in ("LDSM", "STSM"):  # 8 x 8 matrices of 16 bits
        counts["shared_bytes"] = 128 * int(mnemonic[-1] if mnemonic[-2:] in (".2", ".4") else 1)
    elif kind == "shared":
        counts["shared_bytes"] = LANES * _width(mnemonic)
    elif kind == "global" and word[:2] != "UT" and word not in ("LDL", "STL"):
        counts["asked_bytes"] = LANES * _width(mnemonic)
        if word == "LDGSTS":
            counts["shared_bytes"] = counts["asked_bytes"]
    return counts


def _product(mnemonic: str, from_registers: bool) -> Counts:
    """A warp's part. HGMMA's shape is MxNxK by four warps, B and perhaps A from shared memory (rows of 32 bytes a K
    step of any type); HMMA's is of one warp, as 16816. UTCHMMA does not name its shape: nothing is counted."""
    twice = 2 if "TF32" in mnemonic else 1  # at half the rate
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", mnemonic):
        m, n, k = map(int, found.groups())
        a = 0 if from_registers else m
        return Counts({"fma": m * n * k * twice // WARPGROUP, "shared_bytes": (a + n) * 32 // WARPGROUP})
    if found := re.match(r"HMMA\.(16)(8)(16|8|4)\b", mnemonic):
        m, n, k = map(int, found.groups())
        return Counts({"fma": m * n * k * twice})
    return Counts()


def read_sass(instructions: list[str]) -> Sass:
    """Of a kernel's instructions, 16 bytes apart from address 0 on; without the NOPs that fill up its end."""
    length = max((i + 1 for i, text in enumerate(instructions) if text != "NOP"), default=0)
    instructions = instructions[:length]
    blocks, follows = _blocks(instructions)
    counts = [_added(count(instructions[i]) for i in block) for block in blocks]
    dominators = _dominators(follows)
    latches: dict[int, list[int]] = {}
    for block, nexts in enumerate(follows):
        for header in nexts:
            if dominators[block] >> header & 1:
                latches.setdefault(header, []).append(block)
    before: list[list[int]] = [[] for _ in blocks]
    for block, nexts in enumerate(follows):
        for after in nexts:
            before[after].append(block)
    bodies = {header: _body(header, ends, before) for header, ends in sorted(latches.items())}
    only_waits = {h for h, body in bodies.items() if not any(_works(instructions[i]) for b in body for i in blocks[b])}
    bodies = {header: body for header, body in bodies.items() if header not in only_waits}
    headers, loops, inside = list(bodies), [], set[int]()
    for header, body in bodies.items():
        own = body - {b for h, inner in bodies.items() if h != header and h in body for b in inner}
        ends = [dominators[end] for end in latches[header]]
        always = {b for b in own if all(end >> b & 1 for end in ends)}
        around = [h for h, outer in bodies.items() if h != header and header in outer]
        outer = min(around, key=lambda h: len(bodies[h]), default=None)
        loops.append(Loop(blocks[header][0] * INSTRUCTION, _sum(counts, always), _sum(counts, own - always),
                          None if outer is None else headers.index(outer)))  # fmt: skip
        inside |= body
    reached = {b for b in range(len(blocks)) if dominators[b]}
    return Sass(_added(counts), _sum(counts, reached - inside), tuple(loops))


def _works(text: str) -> bool:
    return _split(text)[0].split(".")[0] not in ("SYNCS", "BRA", "NANOSLEEP", "NOP")


def _added(counts: Iterable[Counts]) -> Counts:
    total = Counts()
    for one in counts:
        total.update(one)
    return total


def _sum(counts: list[Counts], blocks: set[int]) -> Counts:
    return _added(counts[b] for b in blocks)


def _blocks(instructions: list[str]) -> tuple[list[range], list[list[int]]]:
    """(basic blocks as ranges of instructions, which blocks follow each)."""
    targets: dict[int, int] = {}  # of branches; -1: the path ends there
    for i, text in enumerate(instructions):
        mnemonic, operands = _split(text)
        word = mnemonic.split(".")[0]
        if found := _BRANCH.match(f"{mnemonic} {operands}"):
            targets[i] = int(found[3], 16) // INSTRUCTION
        elif word in ("EXIT", "RET", "BRX", "KILL"):
            targets[i] = -1
    starts = {0, *(i + 1 for i in targets), *(t for t in targets.values() if t >= 0)}
    edges = [*sorted(s for s in starts if s < len(instructions)), len(instructions)]
    blocks = [range(a, b) for a, b in zip(edges, edges[1:])]
    index = {block.start: b for b, block in enumerate(blocks)}
    follows: list[list[int]] = []
    for block in blocks:
        last = block[-1]
        text, nexts = instructions[last], set[int]()
        goes, (mnemonic, operands) = targets.get(last), _split(text)
        may_stay = text.startswith("@") or "," in operands or ".DIV" in mnemonic
        if goes is None or may_stay:
            nexts |= {index[block.stop]} if block.stop in index else set()
        if goes is not None and goes >= 0 and ".DIV" not in mnemonic:
            nexts.add(index[goes])
        follows.append(sorted(nexts))
    return blocks, follows


def _dominators(follows: list[list[int]]) -> list[int]:
    """Bit sets: the blocks that every path from block 0 to each block passes; 0 for what no path reaches."""
    everything = (1 << len(follows)) - 1
    found = [1, *[everything] * (len(follows) - 1)]
    reached, waiting = {0}, [0]
    while waiting:
        block = waiting.pop()
        for after in follows[block]:
            new = found[after] & (found[block] | 1 << after) if after else 1
            if new != found[after] or after not in reached:
                found[after] = new
                reached.add(after)
                waiting.append(after)
    return [bits if b in reached else 0 for b, bits in enumerate(found)]


def _body(header: int, latches: list[int], before: list[list[int]]) -> set[int]:
    """The blocks of a natural loop: all from which its ends are reached without its header."""
    body, waiting = {header}, list(latches)
    while waiting:
        block = waiting.pop()
        if block not in body:
            body.add(block)
            waiting += before[block]
    return body
