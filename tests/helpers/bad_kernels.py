"""Kernels that break one rule of profiling/resources.py each, and some that break none; a process of its own compiles
them for sm_90 (the compiler and the interpreter cannot share one) and prints JSON: {"verdicts": {kernel: its verdict},
"untaken": rows of launch.TABLE that none of them took, "products": {kernel: multiply-adds in its machine code}}."""

import json

import torch
import triton
import triton.language as tl
from aot_compile import compile_all
from nanogpt_kernels.ahead import distinct
from nanogpt_kernels.launch import launch, recording
from resources import budget_key, untaken, verdict


@triton.jit
def spills(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """One warp keeps 64 KB in registers, across a sum over them: 512 a thread, of 255."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(y_ptr + tl.arange(0, BLOCK), x * tl.sum(x, axis=0))


@triton.jit
def multiplies(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b))


@triton.jit
def attends(q_ptr, k_ptr, v_ptr, o_ptr, first, T, C, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """Pointers carried from tile to tile, in three stages: ptxas serialises every wgmma; in two it does not."""
    rows, keys, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    q, at = tl.load(q_ptr + rows[:, None] * C + d[None, :]), keys[:, None] * C + d[None, :]
    acc, l = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32)
    for _ in range(0, first, N):
        p = tl.math.exp2(tl.dot(q, tl.trans(tl.load(k_ptr + at))))
        l = l * 0.5 + tl.sum(p, 1)
        acc = tl.dot(p.to(tl.bfloat16), tl.load(v_ptr + at), acc * 0.5)
        k_ptr += N * C
        v_ptr += N * C
    for j in range(first, T, N):
        s = tl.dot(q, tl.trans(tl.load(k_ptr + at)))
        p = tl.math.exp2(tl.where(rows[:, None] >= (keys + (j - first))[None, :], s, float("-inf")))
        l = l * 0.5 + tl.sum(p, 1)
        acc = tl.dot(p.to(tl.bfloat16), tl.load(v_ptr + at), acc * 0.5)
        k_ptr += N * C
        v_ptr += N * C
    tl.store(o_ptr + rows[:, None] * C + d[None, :], acc / l[:, None])


@triton.jit
def adds_up(x_ptr, y_ptr, n, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    """TWICE is the edit that its budget must notice: the same registers, a little more in each iteration."""
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(n):
        x = tl.load(x_ptr + i * BLOCK + tl.arange(0, BLOCK))
        total += x * x + x if TWICE else x
    tl.store(y_ptr + tl.arange(0, BLOCK), total)


@triton.jit
def wraps(x_ptr, C, BLOCK: tl.constexpr):
    at = tl.program_id(0) * C + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, at.to(tl.float32))


@triton.jit
def wraps_before_widening(x_ptr, C, BLOCK: tl.constexpr):
    tl.store(x_ptr + (tl.program_id(0) * C).to(tl.int64) + tl.arange(0, BLOCK), 0.0)


@triton.jit
def wraps_in_a_loop(x_ptr, rows, C, BLOCK: tl.constexpr):
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        tl.store(x_ptr + row * C + tl.arange(0, BLOCK), 0.0)


@triton.jit
def does_not_wrap(x_ptr, C, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.program_id(0).to(tl.int64) * C + tl.arange(0, BLOCK), 0.0)


def main() -> None:
    x, half = torch.empty(1, device="meta"), torch.empty(1, dtype=torch.bfloat16, device="meta")
    rows, C = 2**21, 1600  # 3.4e9 elements
    with recording(90) as calls:
        launch("test", spills, (1,), x, x, BLOCK=16384, num_warps=1)
        launch("test", multiplies, (1,), half, half, x, M=64, N=64, K=64, num_warps=4)
        launch("test", multiplies, (1,), half, half, x, M=16, N=64, K=64, num_warps=4)
        launch("test", multiplies, (1,), half, half, x, M=128, N=128, K=512, num_warps=8)
        for stages in (2, 3):
            launch("test", attends, (1,), half, half, half, x, 1024, 2048, 2304, M=128, N=64, D=64, num_warps=8,
                   num_stages=stages)  # fmt: skip
        for kernel in (wraps, wraps_before_widening, does_not_wrap):
            launch("test", kernel, (rows,), x, C, BLOCK=64)
        launch("test", wraps_in_a_loop, (132,), x, rows, C, BLOCK=64)
        for twice in (False, True):
            launch("test", adds_up, (1,), x, x, 1000, BLOCK=512, TWICE=twice)
    groups = distinct(calls, 90)
    *compiled, plain, edited = compile_all(groups, 90, count=range(len(groups)))
    verdicts = {f"{c.kernel} {c.constexprs}": verdict(c, 90, None) for c in compiled if c.kernel != "attends"}
    verdicts |= {f"attends in {c.num_stages}": verdict(c, 90, None) for c in compiled if c.kernel == "attends"}
    fine = next(c for c in compiled if c.kernel == "does_not_wrap")
    verdicts["over budget"] = verdict(fine, 90, {budget_key(fine): [fine.registers - 1, fine.shared, 0]})
    verdicts["within budget"] = verdict(fine, 90, {budget_key(fine): [fine.registers, fine.shared, 0]})
    verdicts["without budget"] = verdict(fine, 90, {})
    assert plain.sass is not None
    instructions = {budget_key(plain): plain.sass.budget}
    verdicts["unedited"], verdicts["edited"] = (verdict(c, 90, None, instructions) for c in (plain, edited))
    verdicts["without instructions"] = verdict(plain, 90, None, {})
    products = {
        c.constexprs: c.num_warps * c.sass.total["fma"] for c in compiled if c.sass and c.kernel == "multiplies"
    }
    print(json.dumps({"verdicts": verdicts, "untaken": untaken(calls, 90), "products": products}))


if __name__ == "__main__":
    main()
