"""LayerNorm."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanogpt_kernels.contract import require
from nanogpt_kernels.launch import launch, pick, sm_count
from nanogpt_kernels.registry import once, register


@triton.jit
def _layernorm_fwd_kernel(
    r_ptr,  # [M, C]
    w_ptr,  # [C] float32
    b_ptr,  # [C] float32, or None
    y_ptr,  # [M, C]
    mean_ptr,  # [M] float32
    rstd_ptr,  # [M] float32
    M,
    C,
    eps,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    at = m[:, None] * C + c[None, :]
    mask = (m < M)[:, None] & (c < C)[None, :]
    r = tl.load(r_ptr + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(r, axis=1) / C
    centred = tl.where(mask, r - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    y = centred * rstd[:, None] * tl.load(w_ptr + c, mask=c < C, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(b_ptr + c, mask=c < C, other=0.0)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + m, mean, mask=m < M)
    tl.store(rstd_ptr + m, rstd, mask=m < M)


@triton.jit
def _layernorm_bwd_kernel(
    dy_ptr, r_ptr, mean_ptr, rstd_ptr, w_ptr, dr_ptr, dw_partial_ptr, db_partial_ptr, M, C,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    c = tl.arange(0, BLOCK_C)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0)
    dw = tl.zeros([ROWS, BLOCK_C], tl.float32)
    db = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(program * ROWS, M, programs * ROWS):
        m = start + tl.arange(0, ROWS)
        mask = (m < M)[:, None] & (c < C)[None, :]
        at = m[:, None] * C + c[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + at, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + m, mask=m < M, other=0.0)
        rstd = tl.load(rstd_ptr + m, mask=m < M, other=0.0)
        normed = tl.where(mask, (r - mean[:, None]) * rstd[:, None], 0.0)
        dw += dy * normed
        if HAS_BIAS:
            db += dy
        dnormed = dy * w[None, :]
        along = tl.sum(dnormed * normed, axis=1) / C
        dr = (dnormed - tl.sum(dnormed, axis=1)[:, None] / C - normed * along[:, None]) * rstd[:, None]
        tl.store(dr_ptr + at, dr.to(dr_ptr.dtype.element_ty), mask=mask)
    tl.store(dw_partial_ptr + program * C + c, tl.sum(dw, axis=0), mask=c < C)
    if HAS_BIAS:
        tl.store(db_partial_ptr + program * C + c, tl.sum(db, axis=0), mask=c < C)


@register("layernorm_fwd(Tensor r, Tensor w, Tensor? b, float eps) -> (Tensor, Tensor, Tensor)")
def layernorm_fwd(r: Tensor, w: Tensor, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    C = w.numel()
    require(r.size(-1) == C, "norm", "the last dimension of r must be w's", r=r, w=w)
    r = r.contiguous()
    M = r.numel() // max(C, 1)
    y, mean = torch.empty_like(r), torch.empty(M, dtype=torch.float32, device=r.device)
    rstd = torch.empty_like(mean)
    row = pick("layernorm_fwd", r, C)
    launch(
        "layernorm_fwd", _layernorm_fwd_kernel, (triton.cdiv(M, row.blocks["ROWS"]),),
        r, w, b, y, mean, rstd, M, C, eps, row=row, BLOCK_C=triton.next_power_of_2(C), HAS_BIAS=b is not None,
    )  # fmt: skip
    return y, mean, rstd


@register(
    "layernorm_bwd(Tensor dy, Tensor r, Tensor mean, Tensor rstd, Tensor w, bool has_bias) -> (Tensor, Tensor, Tensor)"
)
def layernorm_bwd(dy: Tensor, r: Tensor, mean: Tensor, rstd: Tensor, w: Tensor, has_bias: bool):
    C, M = w.numel(), mean.numel()
    dy, r = dy.contiguous(), r.contiguous()
    row = pick("layernorm_bwd", r, C)
    programs = row.choices["programs_per_sm"] * sm_count(r.device)
    dr = torch.empty_like(r)
    dw = torch.empty(programs, C, dtype=torch.float32, device=r.device)
    db = torch.empty(programs if has_bias else 0, C, dtype=torch.float32, device=r.device)
    launch(
        "layernorm_bwd", _layernorm_bwd_kernel, (programs,),
        dy, r, mean, rstd, w, dr, dw, db, M, C, row=row, BLOCK_C=triton.next_power_of_2(C), HAS_BIAS=has_bias,
    )  # fmt: skip
    return dr, dw.sum(0), db.sum(0)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, w, b, eps):
        y, mean, rstd = layernorm_fwd(r, w, b, eps)
        ctx.save_for_backward(r, w, mean, rstd)
        ctx.has_bias = b is not None
        return y

    @staticmethod
    @once
    def backward(ctx, *grads):
        (dy,) = grads
        r, w, mean, rstd = ctx.saved_tensors
        dr, dw, db = layernorm_bwd(dy, r, mean, rstd, w, ctx.has_bias)
        return dr, dw, db if ctx.has_bias else None, None


def norm(r: Tensor, w: Tensor, b: Tensor | None, eps: float = 1e-5) -> Tensor:
    return _Norm.apply(r, w, b, eps)
