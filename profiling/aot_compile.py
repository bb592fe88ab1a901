"""Compile recorded launches ahead of time, without a GPU, and read off what the compiler made of them.

`launch.recording(arch)` collects launches on meta tensors; `JITFunction.warmup` compiles one as a launch would, with
Triton's own specialisation of its arguments (divisibility by 16, integers equal to 1, None), as long as a driver names
the target. A compile keeps one core busy, so several processes share the work: forked ones here, which the recorded
launches need not be pickled for; bench/compiled.py spawns its own, because its parent may hold a GPU.
"""

import concurrent.futures
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

import triton
from nanogpt_kernels.ahead import compile_call, compile_for
from nanogpt_kernels.launch import Call
from nanogpt_kernels.launch_rows import ARCHITECTURES
from offset_ranges import wrapping_offsets
from sass import Sass, code_of, counted
from triton import knobs

TRITON_MINOR = ".".join(triton.__version__.split(".")[:2])  # "3.7": what register counts depend on


SYSTEM_SHARED = 1024  # bytes of shared memory a block; cuobjdump counts them as static from sm_90 on
TENSOR_MEMORY_COLUMNS = 512  # that sm_100 has
SPILL = {90: 0}  # our rule: bytes a thread, elsewhere 64; rows are chosen for sm_90 first


@dataclass(frozen=True)
class Usage:
    """What a kernel takes of an SM."""

    registers: int = 0  # a thread
    spilled: int = 0  # bytes a thread of stack and local memory
    shared: int = 0  # bytes a block, static and dynamic, without the system's
    tensor_memory: int = 0  # columns, sm_100

    def misfits(self, arch: int) -> list[str]:
        """The rules on it that it breaks on sm_`arch`, or on the nearest listed one below."""
        listed = max(known for known in ARCHITECTURES if known <= arch)
        allowed, broken = ARCHITECTURES[listed].block_shared, []
        if self.spilled > SPILL.get(listed, 64):
            broken.append(f"SPILL {self.spilled} bytes")
        if self.shared > allowed:
            broken.append(f"SMEM over {allowed // 1024} KB")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            broken.append(f"TMEM {self.tensor_memory} columns")
        return broken


@dataclass(frozen=True, kw_only=True)
class Compiled(Usage):
    """One compiled kernel."""

    op: str
    kernel: str
    types: str  # of its pointers, floats only, in order of appearance
    constexprs: str
    num_warps: int
    num_stages: int
    products: dict[str, int]  # instructions in the PTX: {"wgmma": n, "mma": n, "tcgen05": n}
    load_bytes: int  # widest global load of a thread
    store_bytes: int
    dots16: bool  # multiplies 16-bit tiles
    serialised: bool  # ptxas made each wgmma wait for the one before
    wraps: tuple[str, ...]  # 32-bit arithmetic of addresses that can overflow at some recorded launch (TTIR lines)
    sass: Sass | None = None  # its machine code, where compile_all was to count it


# ---- what to compile ----


def compile_all(
    groups: list[list[Call]], arch: int, jobs: int | None = None, count: Collection[int] = ()
) -> list[Compiled]:
    """Compile each group's kernel for sm_arch in `jobs` processes (default: one a core). count: groups whose machine
    code is counted, which takes as long again where Triton's cache is warm."""
    global _groups
    compile_for(arch)
    _groups = groups
    jobs = min(jobs or os.cpu_count() or 1, len(groups))
    if jobs <= 1:
        found = [_compile(i) for i in range(len(groups))]
    else:
        # forked, because calls hold jit functions and meta tensors, which do not pickle
        with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
            found = list(pool.map(_compile, range(len(groups))))
    counts = dict(zip(count, counted([found[i][1] for i in count], arch)))
    return [replace(kernel, sass=counts.get(i)) for i, (kernel, _) in enumerate(found)]


_groups: list[list[Call]] = []


def _compile(i: int) -> tuple[Compiled, bytes]:
    """The kernel, and its machine code."""
    compiled = compile_call(_groups[i][0])
    return read_off(_groups[i], compiled), code_of(compiled.asm["cubin"])


# ---- what came out ----


def read_off(same: list[Call], compiled: Any) -> Compiled:
    """The figures of the compiled kernel of some calls, from its TTIR, PTX and cubin; without its machine code."""
    call, metadata = same[0], compiled.metadata
    ttir, ptx = compiled.asm["ttir"], compiled.asm["ptx"]
    given = _arguments(call)
    constexprs = {p.name: given[p.name] for p in call.kernel.params if p.is_constexpr and p.name in given}
    loads, stores = global_accesses(ptx)
    return Compiled(
        **asdict(usage(compiled)),
        op=call.op,
        kernel=call.kernel.__name__,
        types=" ".join(dict.fromkeys(re.findall(r"!tt\.(?:ptr|tensordesc)<[^>]*?(bf16|f16|f32)>", _signature(ttir)))),
        constexprs=" ".join([f"{name}={_short(v)}" for name, v in constexprs.items()] + _absent(call)),
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        products={
            "wgmma": len(re.findall(r"\bwgmma\.mma_async", ptx)),
            "mma": len(re.findall(r"\bmma\.sync", ptx)),
            "tcgen05": len(re.findall(r"\btcgen05\.mma", ptx)),
        },
        load_bytes=max(loads, default=0),
        store_bytes=max(stores, default=0),
        dots16=bool(re.search(r"tt\.dot .*: tensor<[0-9x]+x(?:bf16|f16)> \*", ttir)),
        serialised="wgmma" in ptx and serialises_wgmma(ptx),
        wraps=tuple(dict.fromkeys(line for c in same for line in wrapping_offsets(ttir, _integers(c), c.grid))),
    )


def usage(compiled: Any) -> Usage:
    """Registers and bytes, from the cuobjdump that Triton's wheel carries."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = text.strip().splitlines()[-1]
    used = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)}
    return Usage(
        registers=used["REG"],
        spilled=used["STACK"] + used["LOCAL"],
        shared=max(0, used["SHARED"] - SYSTEM_SHARED) + compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
    )


def serialises_wgmma(ptx: str) -> bool:
    """Whether ptxas says so (C7510 to C7519) of a kernel for sm_90."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.search(r"\(C751\d\)", said) is not None


def global_accesses(ptx: str) -> tuple[list[int], list[int]]:
    """Bytes that one thread moves in each global load and store instruction; TMA copies count as 16."""
    sizes: dict[str, list[int]] = {"ld": [], "st": []}
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)", ptx):
        sizes[kind].append(int(vector or 1) * int(bits) // 8)
    sizes["ld"] += [int(n, 0) for n in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (0x\w+|\d+)", ptx)]
    if "cp.async.bulk.tensor" in ptx:
        sizes["ld"] += [16] * bool(re.search(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx))
        sizes["st"] += [16] * bool(re.search(r"cp\.async\.bulk\.tensor\.\dd\.global", ptx))
    return sizes["ld"], sizes["st"]


def _arguments(call: Call) -> dict[str, Any]:
    names = [p.name for p in call.kernel.params]
    return dict(zip(names, call.args)) | {name: v for name, v in call.options.items() if name in names}


def _integers(call: Call) -> dict[str, int]:
    return {name: v for name, v in _arguments(call).items() if isinstance(v, int)}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(int(value) if isinstance(value, bool) else value)


def _absent(call: Call) -> list[str]:
    """["no b"]: pointers given as None, by which Triton specialises too."""
    names = [p.name.removesuffix("_ptr") for p in call.kernel.params if _arguments(call).get(p.name, 0) is None]
    return ["no " + ", ".join(names)] if names else []


def _signature(ttir: str) -> str:
    return next(line for line in ttir.splitlines() if "tt.func public" in line)
