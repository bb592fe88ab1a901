"""The MLP, gelu(y w_fc^T + b_fc) w_proj^T, and GELU of a biased tensor alone.

forward   pre = y w_fc^T + b_fc; act = gelu(pre); delta = act w_proj^T
backward  dact = ddelta w_proj; dpre = dact gelu'(pre); db_fc = column sums of dpre; dw_proj = ddelta^T act;
          dw_fc = dpre^T y; dy = dpre w_fc
launch_rows.py chooses how act and dpre are computed: by a persistent GEMM with GELU in its epilogue (gemm_gelu.py), or
by cuBLAS and one elementwise pass over tiles of rows and columns. That pass's backward works in place: each persistent
program strides over the rows of one block of columns and sums them; column_sums.py adds up the sums: no atomics.
pre is rounded once to its dtype, after cuBLAS's bias, which is rounded first; gelu and gelu' are those of the rounded
pre. All else is float32 until its store.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..contract import main_grad_of, require, require_float, require_one_dtype, require_same_device
from ..launch import Row, cdiv, describable, launch, persistent, pick
from ..primitives import gelu, gelu_derivative
from ..registry import differentiating, once, refuse_tangents, register
from .column_sums import column_sums_, vector_grad_of, vector_grads
from .gemm_gelu import gemm_gelu_bwd, gemm_gelu_fwd
from .linear import weight_grad


@triton.jit
def _bias_gelu_fwd_kernel(
    x_ptr,  # [M, N]
    b_ptr,  # [N], or None
    y_ptr,  # [M, N]
    M,
    N,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, tiles_n = tl.program_id(0).to(tl.int64), tl.cdiv(N, BLOCK_N)
    m = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    at = m[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if b_ptr is not None:
        x += tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    SHORT: tl.constexpr = y_ptr.dtype.element_ty.primitive_bitwidth == 16
    tl.store(y_ptr + at, gelu(x, TANH, SHORT).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gelu_bwd_kernel(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, N]
    b_ptr,  # [N], or None
    dx_ptr,  # [M, N], may be dy
    y_ptr,  # [M, N], or None: gelu(x + b) once more
    db_partial_ptr,  # [programs, N] float32, or None
    M,
    N,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    SHORT: tl.constexpr = dx_ptr.dtype.element_ty.primitive_bitwidth == 16
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :] if b_ptr is not None else None
    db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(program * BLOCK_M, M, programs * BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        at = m[:, None] * N + n[None, :]
        mask = (m < M)[:, None] & (n < N)[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if b_ptr is not None:
            x += b
        dx = (dy * gelu_derivative(x, TANH, SHORT)).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + at, dx, mask=mask)
        if y_ptr is not None:
            tl.store(y_ptr + at, gelu(x, TANH, SHORT).to(y_ptr.dtype.element_ty), mask=mask)
        if db_partial_ptr is not None:
            db += tl.where(mask, dx.to(tl.float32), 0.0)  # outside the mask an infinite bias gives NaN
    if db_partial_ptr is not None:
        tl.store(db_partial_ptr + program * N + n, tl.sum(db, axis=0), mask=n < N)


ACTIVATIONS = ("gelu", "gelu_tanh")


def _require_activation(op: str, activation: str) -> None:
    require(activation in ACTIVATIONS, op, f"activation must be one of {ACTIVATIONS}", activation=activation)


def _require_bias(op: str, b: Tensor | None, N: int, dtype: torch.dtype) -> None:
    if b is not None:
        require(b.shape == (N,) and b.dtype in (torch.float32, dtype), op, f"the bias must be float32 [{N}]", b=b)


@register("bias_gelu_fwd(Tensor x, Tensor? b, str activation) -> Tensor")
def bias_gelu_fwd(x: Tensor, b: Tensor | None, activation: str) -> Tensor:
    _require_activation("bias_gelu", activation)
    require_float("bias_gelu", x=x)
    require_same_device("bias_gelu", x=x, b=b)
    require(x.dim() > 0, "bias_gelu", "x must have a dimension", x=x)
    N = x.size(-1)
    _require_bias("bias_gelu", b, N, x.dtype)
    x, b = x.contiguous(), None if b is None else b.contiguous()
    y, row = torch.empty_like(x), pick("bias_gelu_fwd", x, N)
    M = math.prod(x.shape[:-1])
    tiles = cdiv(M, row.blocks["BLOCK_M"]) * cdiv(N, row.blocks["BLOCK_N"])
    launch("bias_gelu_fwd", _bias_gelu_fwd_kernel, (tiles,), x, b, y, M, N, row=row, TANH=activation == "gelu_tanh")
    return y


def _gelu_bwd(
    dy: Tensor, x: Tensor, b: Tensor | None, dx: Tensor, y: Tensor | None, activation: str, bias_grad: bool
) -> Tensor:
    """Writes dx (which may be dy) and, where given, y = gelu(x + b).

    Returns partial sums of db, [P, N] float32, [0, N] unless asked for."""
    N, row = x.size(-1), pick("bias_gelu_bwd", x, x.size(-1))
    M = math.prod(x.shape[:-1])
    # a smaller tile lies in several warps at once, and in place one may load what another has stored
    whole = dx is not dy or row.blocks["BLOCK_M"] * row.blocks["BLOCK_N"] >= 32 * row.num_warps
    require(whole, "mlp", "in place, a tile must have an element a thread", row=row)
    strips = cdiv(N, row.blocks["BLOCK_N"])
    tiles = cdiv(M, row.blocks["BLOCK_M"])
    per_sm = row.choices["summing_per_sm" if bias_grad else "programs_per_sm"]
    programs = persistent(tiles, per_sm, x.device, grid_columns=strips)
    partials = torch.empty(programs if bias_grad else 0, N, dtype=torch.float32, device=x.device)
    launch(
        "bias_gelu_bwd", _bias_gelu_bwd_kernel, (programs, strips),
        dy, x, b, dx, y, partials if bias_grad else None, M, N, row=row, TANH=activation == "gelu_tanh",
    )  # fmt: skip
    return partials


@register("bias_gelu_bwd(Tensor dy, Tensor x, Tensor? b, str activation, bool bias_grad) -> (Tensor, Tensor)")
def bias_gelu_bwd(dy: Tensor, x: Tensor, b: Tensor | None, activation: str, bias_grad: bool) -> tuple[Tensor, Tensor]:
    dy, x, b = dy.contiguous(), x.contiguous(), None if b is None else b.contiguous()
    dx = torch.empty_like(x)
    return dx, _gelu_bwd(dy, x, b, dx, None, activation, bias_grad)


def _fused(op: str, C: int, x: Tensor, *others: Tensor) -> Row | None:
    """The shape of the GEMM with GELU in its epilogue, or None where cuBLAS is to do it.

    Always so in float32, for few rows, whose tiles would leave most of the GPU idle, and where an operand cannot be
    described: without TMA the tiles for sm_90 spill registers, and elsewhere such operands are read by narrow loads.
    """
    row = pick(op, x, C) if x.element_size() == 2 else None
    if row is None or not row.choices["fused"] or x.size(0) < row.choices["least_rows"]:
        return None
    return row if all(map(describable, (x, *others))) else None


@register(
    "mlp_fwd(Tensor y, Tensor w_fc, Tensor? b_fc, Tensor w_proj, str activation, bool keep_pre, bool keep_act)"
    " -> (Tensor, Tensor, Tensor)"
)
def mlp_fwd(
    y: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, activation: str, keep_pre: bool, keep_act: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(delta, pre [M, F], act [M, F]); what is not to be kept is [0]."""
    operands = dict(y=y, w_fc=w_fc, w_proj=w_proj)
    _require_activation("mlp", activation)
    require_same_device("mlp", **operands, b_fc=b_fc)
    require_float("mlp", **operands)
    require_one_dtype("mlp", **operands)
    require(y.dim() > 0 and w_fc.dim() == 2 and w_proj.dim() == 2, "mlp", "the weights must be matrices", **operands)
    (F_, C), C_out = w_fc.shape, w_proj.size(0)
    shapes = y.size(-1) == C and w_proj.size(1) == F_ and C > 0 and F_ > 0
    require(shapes, "mlp", "y must be [..., C], w_fc [F, C], w_proj [C, F], none of them 0", **operands)
    _require_bias("mlp", b_fc, F_, y.dtype)
    y_rows = y.reshape(-1, C).contiguous()
    row = _fused("mlp_fwd", C, y_rows, w_fc, w_proj)
    if row is not None:
        pre, act = gemm_gelu_fwd(row, y_rows, w_fc, b_fc, activation == "gelu_tanh", keep_pre)
    else:
        pre = F.linear(y_rows, w_fc, None if b_fc is None else b_fc.to(y.dtype))
        act = bias_gelu_fwd(pre, None, activation)
    delta = (act @ w_proj.t()).view(*y.shape[:-1], C_out)
    return delta, pre if pre is not None and keep_pre else y.new_empty(0), act if keep_act else y.new_empty(0)


@register(
    "mlp_bwd(Tensor ddelta, Tensor w_proj, Tensor pre, str activation, Tensor(a!)? db, bool accumulate, "
    "bool rebuild_act) -> (Tensor, Tensor)"
)
def mlp_bwd(
    ddelta: Tensor,
    w_proj: Tensor,
    pre: Tensor,
    activation: str,
    db: Tensor | None,
    accumulate: bool,
    rebuild_act: bool,
) -> tuple[Tensor, Tensor]:
    """(dpre [M, F], act [M, F] or [0]) of ddelta [M, C]; db [F] receives b_fc's gradient, or is increased by it.

    Here, not after, as partial sums of it are as many as the path taken leaves, which fake tensors do not know.
    """
    ddelta = ddelta.contiguous()
    row = _fused("mlp_bwd", w_proj.size(0), ddelta, w_proj, pre)
    if row is not None:
        tanh = activation == "gelu_tanh"
        dpre, partials, act = gemm_gelu_bwd(row, ddelta, w_proj, pre, tanh, db is not None, rebuild_act)
    else:
        dpre, act = ddelta @ w_proj, torch.empty_like(pre) if rebuild_act else None
        partials = _gelu_bwd(dpre, pre, None, dpre, act, activation, db is not None)
    if db is not None:
        column_sums_(db, [partials], None, [], None, [], accumulate)
    return dpre, pre.new_empty(0) if act is None else act


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, b: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(x, b)
        ctx.activation, ctx.b = activation, vector_grad_of("bias_gelu", b)
        return bias_gelu_fwd(x, b, activation)

    @staticmethod
    @once
    def backward(ctx, *grads: Tensor):
        (dy,) = grads
        x, b = ctx.saved_tensors
        needs_b = ctx.needs_input_grad[1]
        dx, partials = bias_gelu_bwd(dy, x, b, ctx.activation, needs_b)
        (db,) = vector_grads([partials], [needs_b], [ctx.b])
        return dx, db, None


def bias_gelu(x: Tensor, b: Tensor | None, activation: str = "gelu") -> Tensor:
    """gelu(x + b); x [..., N], b [N]; activation "gelu" (by erf) or "gelu_tanh". Backward computes x + b again."""
    refuse_tangents("bias_gelu", x, b)
    return _BiasGelu.apply(x, b, activation)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, w_fc, b_fc, w_proj, activation: str, recompute: bool, differentiate: bool) -> Tensor:
        keep_act = differentiate and not recompute and w_proj.requires_grad
        delta, pre, act = mlp_fwd(y, w_fc, b_fc, w_proj, activation, differentiate, keep_act)
        ctx.save_for_backward(y, w_fc, w_proj, pre, act)
        ctx.main_grads, ctx.b_fc = (main_grad_of(w_fc), main_grad_of(w_proj)), vector_grad_of("mlp", b_fc)
        ctx.activation, ctx.recompute = activation, recompute
        return delta

    @staticmethod
    @once
    def backward(ctx, *grads: Tensor):
        y, w_fc, w_proj, pre, act = ctx.saved_tensors
        ddelta = grads[0].reshape(-1, w_proj.size(0))
        needs_y, needs_w_fc, needs_b, needs_w_proj = ctx.needs_input_grad[:4]
        rebuild = ctx.recompute and needs_w_proj
        dy = dw_fc = db_fc = dw_proj = None
        if needs_y or needs_w_fc or needs_b:
            into, db_fc, add = ctx.b_fc.destination(pre) if needs_b else (None, None, False)
            dpre, rebuilt = mlp_bwd(ddelta, w_proj, pre, ctx.activation, into, add, rebuild)
            act = rebuilt if rebuild else act
            dy = (dpre @ w_fc).view(y.shape) if needs_y else None
            dw_fc = weight_grad(dpre, y.reshape(-1, y.size(-1)), ctx.main_grads[0]) if needs_w_fc else None
        elif rebuild:
            act = bias_gelu_fwd(pre, None, ctx.activation)
        if needs_w_proj:
            dw_proj = weight_grad(ddelta, act, ctx.main_grads[1])
        return dy, dw_fc, db_fc, dw_proj, None, None, None


def mlp(
    y: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, activation: str = "gelu", recompute: bool = False
) -> Tensor:
    """gelu(y w_fc^T + b_fc) w_proj^T; y [..., C], w_fc [F, C], b_fc [F] float32, w_proj [C, F].

    activation: "gelu" (by erf) or "gelu_tanh". recompute: keep pre alone for backward, and rebuild act there, bit for
    bit, while pre is read anyway: 2 F bytes a token less in 16 bit, for one more pass of writing.
    """
    operands = (y, w_fc, b_fc, w_proj)
    return _MLP.apply(*operands, activation, recompute, differentiating("mlp", *operands))
