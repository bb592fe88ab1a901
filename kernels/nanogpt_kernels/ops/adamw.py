"""The gradient's norm and AdamW, over flat buffers; learning rate, clipping and loss scale are read on the device.

norm = sqrt(sum g^2): persistent programs each leave one partial sum, a last program adds those in float64.
AdamW: a one-program launch turns the scalars into float32 factors (in float64) and advances STEP; one launch over a
table of tiles, each inside one segment of constant weight decay, updates everything:
    w -= lr decay w;  m += (1 - beta1) (g - m);  v += (1 - beta2) (g^2 - v);  w -= step_size m / (sqrt(v) / root + eps)
with g clipped and unscaled, step_size = lr / (1 - beta1^t), root = sqrt(1 - beta2^t). 30 bytes a parameter (16-bit p).
Numerics: float32, division and root correctly rounded, the same additions in the same order on every run. A non-finite
norm masks every load and store. The host reads nothing: a CUDA graph can hold it, once a call has built the table.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..contract import (
    FLOATS,
    GRAD_NORM,
    LOSS_SCALE,
    LR,
    MAX_NORM,
    STEP,
    require,
    require_float,
    require_same_device,
)
from ..launch import cdiv, launch, persistent, pick
from ..registry import register

VECTOR = 16  # elements: tiles that begin and end at multiples of it are read 16 bytes at a time, in any dtype

# ---- the norm ----


@triton.jit
def _grad_norm_partial_kernel(
    g_ptr,  # [N]
    partial_ptr,  # [programs] float32
    N,
    BLOCK: tl.constexpr,
):
    # At 1.5e9 elements on an H100 a lane adds 721 squares; in float32 that left the sum of normal numbers 7e-9 off,
    # and of equal ones, whose roundings add up, 1.1e-5 at worst (simulated in numpy).
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, N, tl.num_programs(0).to(tl.int64) * BLOCK):
        g = tl.load(g_ptr + start + lane, mask=start + lane < N, other=0.0).to(tl.float32)
        squares += g * g
    tl.store(partial_ptr + tl.program_id(0), tl.sum(squares, axis=0))


@triton.jit
def _grad_norm_kernel(
    partial_ptr,  # [programs] float32
    norm_ptr,  # [] float32
    programs,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float64)  # one rounding for all the programs, and no overflow above theirs
    for start in range(0, programs, BLOCK):
        squares += tl.load(partial_ptr + start + lane, mask=start + lane < programs, other=0.0).to(tl.float64)
    tl.store(norm_ptr, tl.sqrt(tl.sum(squares, axis=0)).to(tl.float32))


# ---- the update ----


@triton.jit
def _adamw_factors_kernel(
    scalars_ptr,  # [5] float64
    factors_ptr,  # [5] float32: of the gradient, learning rate, step_size, 1 / root, 1 if the norm is finite
    log_beta1, log_beta2,
    LR: tl.constexpr, STEP: tl.constexpr, MAX_NORM: tl.constexpr, LOSS_SCALE: tl.constexpr, GRAD_NORM: tl.constexpr,
):  # fmt: skip
    lr, step = tl.load(scalars_ptr + LR), tl.load(scalars_ptr + STEP) + 1.0
    max_norm, loss_scale = tl.load(scalars_ptr + MAX_NORM), tl.load(scalars_ptr + LOSS_SCALE)
    norm = tl.load(scalars_ptr + GRAD_NORM)
    finite = tl.abs(norm) < float("inf")
    clip = max_norm / (norm / loss_scale + 1e-6)
    clip = tl.where((max_norm > 0.0) & (clip < 1.0), clip, 1.0)
    # logarithms, because Triton passes a Python float as float32: from beta2 = 0.999 itself, 1 - beta2 is 1.3e-5 off
    bias1, bias2 = 1.0 - tl.exp(step * log_beta1), 1.0 - tl.exp(step * log_beta2)
    tl.store(factors_ptr + 0, (clip / loss_scale).to(tl.float32))
    tl.store(factors_ptr + 1, lr.to(tl.float32))
    tl.store(factors_ptr + 2, (lr / bias1).to(tl.float32))
    tl.store(factors_ptr + 3, (1.0 / tl.sqrt(bias2)).to(tl.float32))
    tl.store(factors_ptr + 4, finite.to(tl.float32))
    tl.store(scalars_ptr + STEP, step, mask=finite)


@triton.jit
def _lerp(x, y, weight):
    """(1 - weight) x + weight y. In float32 0.999 and 0.001 add up to 1 + 1.3e-8, which over the 1000 steps that v
    remembers would be 1.3e-5 of it. So only one weight is used, the smaller: by the larger a y far below x is lost."""
    return tl.where(weight < 0.5, x + weight * (y - x), y - (1.0 - weight) * (y - x))


@triton.jit
def _adamw_kernel(
    p_ptr,  # [N], or None
    master_ptr,  # [N] float32
    m_ptr,  # [N] float32
    v_ptr,  # [N] float32
    g_ptr,  # [N] float32
    factors_ptr,  # [5] float32
    starts_ptr,  # [tiles] int64
    lengths_ptr,  # [tiles] int32, at most BLOCK
    decays_ptr,  # [tiles] float32
    one_minus_beta1, one_minus_beta2, eps,
    BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    tile, lane = tl.program_id(0), tl.arange(0, BLOCK)
    start = tl.multiple_of(tl.load(starts_ptr + tile), ALIGNMENT)
    length = tl.where(tl.load(factors_ptr + 4) > 0.0, tl.load(lengths_ptr + tile), 0)  # 0 masks every load and store
    g_scale, lr, step_size = tl.load(factors_ptr), tl.load(factors_ptr + 1), tl.load(factors_ptr + 2)
    inverse_root = tl.load(factors_ptr + 3)
    at, mask = start + lane, lane < tl.multiple_of(length, ALIGNMENT)
    g = tl.load(g_ptr + at, mask=mask, other=0.0) * g_scale
    m = tl.load(m_ptr + at, mask=mask, other=0.0)
    v = tl.load(v_ptr + at, mask=mask, other=0.0)
    w = tl.load(master_ptr + at, mask=mask, other=0.0)
    m, v = _lerp(m, g, one_minus_beta1), _lerp(v, g * g, one_minus_beta2)
    w -= lr * tl.load(decays_ptr + tile) * w
    w -= step_size * tl.div_rn(m, tl.sqrt_rn(v) * inverse_root + eps)
    tl.store(m_ptr + at, m, mask=mask)
    tl.store(v_ptr + at, v, mask=mask)
    tl.store(master_ptr + at, w, mask=mask)
    if p_ptr is not None:
        tl.store(p_ptr + at, w.to(p_ptr.dtype.element_ty), mask=mask)


# ---- launchers ----


@register("grad_norm(Tensor g) -> Tensor")
def _grad_norm(g: Tensor) -> Tensor:
    require_float("grad_norm", g=g)
    g = g.contiguous()
    N = g.numel()
    norm = torch.empty((), dtype=torch.float32, device=g.device)
    row = pick("grad_norm", g, N)
    tiles = cdiv(N, row.blocks["BLOCK"])
    programs = persistent(tiles, row.choices["programs_per_sm"], g.device)
    partial = torch.empty(programs, dtype=torch.float32, device=g.device)
    launch("grad_norm", _grad_norm_partial_kernel, (programs,), g, partial, N, row=row)
    launch("grad_norm", _grad_norm_kernel, (1,), partial, norm, programs, BLOCK=1024)
    return norm


def grad_norm(g: Tensor) -> Tensor:
    """The 2-norm of the flat gradient g [N], as a float32 scalar on its device; NaN and infinity come through.

    The partial sums of squares are float32, as torch's are, so elements from 1.8e19 on give infinity.
    """
    return _grad_norm(g)


@functools.cache  # kept forever: a captured graph holds these tensors' addresses
def _tile_table(segments: tuple[tuple[int, int, float], ...], block: int, device: torch.device) -> tuple[Tensor, ...]:
    """(starts int64, lengths int32, decays float32) of tiles of at most `block` elements, each inside one segment."""
    starts = [torch.arange(start, end, block) for start, end, _ in segments]
    lengths = [(end - at).clamp(max=block).int() for at, (_, end, _) in zip(starts, segments)]
    decays = [torch.full((len(at),), decay, dtype=torch.float32) for at, (_, _, decay) in zip(starts, segments)]
    empty = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.float32)
    return tuple(torch.cat([none, *parts]).to(device) for none, parts in zip(empty, (starts, lengths, decays)))


@register(
    "adamw_(Tensor(a!)? p, Tensor(b!) master, Tensor(c!) m, Tensor(d!) v, Tensor g, Tensor(e!) scalars, int[] starts, "
    "int[] ends, float[] decays, float beta1, float beta2, float eps) -> ()"
)
def _adamw_(
    p: Tensor | None, master: Tensor, m: Tensor, v: Tensor, g: Tensor, scalars: Tensor, starts: list[int],
    ends: list[int], decays: list[float], beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    _require_buffers(p, master, m, v, g, scalars)
    require(0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0, "adamw_", "betas must be in [0, 1)", beta1=beta1, beta2=beta2)
    segments = tuple(zip(starts, ends, decays))
    bounds = [0, *(bound for start, end, _ in sorted(segments) for bound in (start, end)), master.numel()]
    ok = all(a <= b for a, b in zip(bounds, bounds[1:]))
    require(ok, "adamw_", "segments must lie in the buffers and not overlap", segments=segments, master=master)

    factors = torch.empty(5, dtype=torch.float32, device=scalars.device)
    logs = (math.log(beta) if beta > 0.0 else -math.inf for beta in (beta1, beta2))
    launch(
        "adamw", _adamw_factors_kernel, (1,), scalars, factors, *logs,
        LR=LR, STEP=STEP, MAX_NORM=MAX_NORM, LOSS_SCALE=LOSS_SCALE, GRAD_NORM=GRAD_NORM,
    )  # fmt: skip
    row = pick("adamw", master, master.numel())
    make_table = _tile_table.__wrapped__ if isinstance(master, FakeTensor) else _tile_table
    table = make_table(segments, row.blocks["BLOCK"], master.device)
    aligned = all(bound % VECTOR == 0 for bound in bounds[1:-1])
    launch(
        "adamw", _adamw_kernel, (len(table[0]),), p, master, m, v, g, factors, *table, 1.0 - beta1, 1.0 - beta2, eps,
        row=row, ALIGNMENT=VECTOR if aligned else 1,
    )  # fmt: skip


def _require_buffers(p: Tensor | None, master: Tensor, m: Tensor, v: Tensor, g: Tensor, scalars: Tensor) -> None:
    buffers = {"master": master, "m": m, "v": v, "g": g} | ({} if p is None else {"p": p})
    ok = all(t.is_contiguous() and t.numel() == master.numel() for t in buffers.values())
    require(ok, "adamw_", "p, master, m, v and g must be contiguous and of one length", **buffers)
    ok = all(t.dtype == torch.float32 for t in (master, m, v, g)) and (p is None or p.dtype in FLOATS)
    require(ok, "adamw_", "master, m, v and g must be float32, p float32, bfloat16 or float16", **buffers)
    ok = scalars.dtype == torch.float64 and scalars.shape == (5,) and scalars.is_contiguous()
    require(ok, "adamw_", "scalars must be a contiguous float64 [5]", scalars=scalars)
    require_same_device("adamw_", scalars=scalars, **buffers)


def adamw_(
    p: Tensor | None,
    master: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    scalars: Tensor,
    segments: list[tuple[int, int, float]],
    beta1: float,
    beta2: float,
    eps: float = 1e-8,
) -> None:
    """One AdamW update, in place, of flat float32 buffers [N]; p, when given, receives master in its own dtype.

    scalars: float64 [5] on the device, by contract.py's slots: LR, STEP (this call adds 1), MAX_NORM (0 switches
    clipping off), LOSS_SCALE (g is multiplied by it), GRAD_NORM (of g as it stands). segments: (start, end, weight
    decay), apart from one another; elements in none of them are left alone, in p too. A non-finite GRAD_NORM writes
    nothing at all. Segments of bounds divisible by 16 are the fast ones.
    """
    starts, ends, decays = ([segment[i] for segment in segments] for i in range(3))
    _adamw_(p, master, m, v, g, scalars, starts, ends, decays, beta1, beta2, eps)
