"""LayerNorm over the last dimension, alone or with what the residual stream does before it.

norm:      y = (r - mean(r)) / sqrt(var(r) + eps) * w + b
add_norm:  r' = r + dropout(delta + delta_bias), y = norm(r')
Backward:  dr = rstd (g - mean(g) - n mean(g n)) + dr', with g = dy w, n = (r' - mean) rstd; ddelta = dropout'(dr)
A fixed number of programs stride over tiles of ROWS rows, w and b in registers. A row lies in PIECES pieces of BLOCK_C
columns, read once: its mean, then its centred variance, come from registers. The gradients of w, b and delta_bias are
float32 sums in each program's registers, written once a program; column_sums.py adds the programs' rows.
Numerics: float32, rounded once at each store; y's statistics are those of r' as stored. Every row's result depends on
that row and the launch row alone; nothing is atomic, so repeated runs agree bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import (
    FLOATS,
    require,
    require_addends,
    require_dropout,
    require_float,
    require_same_device,
)
from ..launch import Row, cdiv, launch, persistent, pick
from ..primitives import dropout_args, keep_mask, piece, row_pieces, vector_pieces, zero_pieces
from ..registry import differentiating, number, once, register
from .column_sums import vector_grad_of, vector_grads


@triton.jit(do_not_specialize=["M", "threshold", "site"])
def _norm_fwd_kernel(
    r_ptr,  # [M, C]
    delta_ptr,  # [M, C], or None: r' is r
    delta_bias_ptr,  # [C], or None
    w_ptr,  # [C]
    b_ptr,  # [C], or None
    seed_ptr,  # [1] int64, or None: no dropout
    r_out_ptr,  # [M, C] for r', or None where delta is
    y_ptr,  # [M, C]
    mean_ptr,  # [M] float32, or None: nothing is differentiated
    rstd_ptr,  # [M] float32, or None with mean
    M,
    eps,
    keep_scale,
    threshold,
    site,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PIECES: tl.constexpr,
):
    w, b = vector_pieces(w_ptr, C, BLOCK_C, PIECES), vector_pieces(b_ptr, C, BLOCK_C, PIECES)
    delta_bias = vector_pieces(delta_bias_ptr, C, BLOCK_C, PIECES)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start in range(tl.program_id(0).to(tl.int64) * ROWS, M, tl.num_programs(0) * ROWS):
        m = start + tl.arange(0, ROWS).to(tl.int64)
        r_in, deltas = row_pieces(r_ptr, m, M, C, BLOCK_C, PIECES), row_pieces(delta_ptr, m, M, C, BLOCK_C, PIECES)
        rs = ()
        total = tl.zeros([ROWS, BLOCK_C], tl.float32)
        for i in tl.static_range(PIECES):
            r = r_in[i].to(tl.float32)
            if delta_ptr is not None:
                delta = deltas[i].to(tl.float32)
                if delta_bias_ptr is not None:
                    delta += delta_bias[i]
                if seed_ptr is not None:
                    keep = keep_mask(seed, site, threshold, m, i * BLOCK_C, tl.cdiv(C, 4), ROWS, BLOCK_C)
                    delta = tl.where(keep, delta * keep_scale, 0.0)
                at, inside = piece(m, M, i, C, BLOCK_C)
                stored = (r + delta).to(r_out_ptr.dtype.element_ty)
                tl.store(r_out_ptr + at, stored, mask=inside)
                r = stored.to(tl.float32)
            rs += (r,)
            total += r
        mean = tl.sum(total, axis=1, keep_dims=True) / C
        squares = tl.zeros([ROWS, BLOCK_C], tl.float32)
        for i in tl.static_range(PIECES):
            centred = rs[i] - mean
            if (i + 1) * BLOCK_C > C:
                centred = tl.where(i * BLOCK_C + tl.arange(0, BLOCK_C)[None, :] < C, centred, 0.0)
            squares += centred * centred
        rstd = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / C + eps)
        for i in tl.static_range(PIECES):
            at, inside = piece(m, M, i, C, BLOCK_C)
            y = (rs[i] - mean) * rstd * w[i]
            if b_ptr is not None:
                y += b[i]
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
        if mean_ptr is not None:
            tl.store(mean_ptr + m[:, None], mean, mask=(m < M)[:, None])
            tl.store(rstd_ptr + m[:, None], rstd, mask=(m < M)[:, None])


@triton.jit(do_not_specialize=["M", "threshold", "site"])
def _norm_bwd_kernel(
    dy_ptr,  # [M, C], or None: y was not used
    dres_ptr,  # [M, C] gradient arriving at r', or None: r' was not used
    r_ptr,  # [M, C] r'
    mean_ptr,  # [M] float32
    rstd_ptr,  # [M] float32
    w_ptr,  # [C]
    seed_ptr,  # [1] int64, or None: no dropout
    dr_ptr,  # [M, C], or None: not wanted
    ddelta_ptr,  # [M, C], or None: not wanted, or dr serves
    dw_ptr,  # [programs, C] float32, or None: not wanted
    db_ptr,  # [programs, C] float32, or None
    d_delta_bias_ptr,  # [programs, C] float32, or None
    M,
    keep_scale,
    threshold,
    site,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PIECES: tl.constexpr,
    DRES_LATE: tl.constexpr,
):
    w = vector_pieces(w_ptr, C, BLOCK_C, PIECES)
    zeros = zero_pieces(ROWS, BLOCK_C, PIECES)
    dw, db, d_delta_bias = zeros, zeros, zeros
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start in range(tl.program_id(0).to(tl.int64) * ROWS, M, tl.num_programs(0) * ROWS):
        m = start + tl.arange(0, ROWS).to(tl.int64)
        if not DRES_LATE:
            drs = row_pieces(dres_ptr, m, M, C, BLOCK_C, PIECES)
        if dy_ptr is not None:
            dys, rs = row_pieces(dy_ptr, m, M, C, BLOCK_C, PIECES), row_pieces(r_ptr, m, M, C, BLOCK_C, PIECES)
            # a row's layout, then a column: loaded as a column, each thread reads every row's eight times over
            mean = tl.load(mean_ptr + m, mask=m < M, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + m, mask=m < M, other=0.0)[:, None]
            sum_g, sum_gn = tl.zeros([ROWS, BLOCK_C], tl.float32), tl.zeros([ROWS, BLOCK_C], tl.float32)
            gs, ns, next_dw, next_db = (), (), (), ()
            for i in tl.static_range(PIECES):
                dy = dys[i].to(tl.float32)
                n = (rs[i].to(tl.float32) - mean) * rstd  # not 0 in lanes past a row's end, but dy is
                g = dy * w[i]
                sum_g += g
                sum_gn += g * n
                gs, ns = gs + (g,), ns + (n,)
                next_dw, next_db = next_dw + (dw[i] + dy * n,), next_db + (db[i] + dy,)
            dw, db = next_dw, next_db
            mean_g, mean_gn = tl.sum(sum_g, axis=1, keep_dims=True) / C, tl.sum(sum_gn, axis=1, keep_dims=True) / C
        if DRES_LATE:
            drs = row_pieces(dres_ptr, m, M, C, BLOCK_C, PIECES)
        next_d_delta_bias = ()
        for i in tl.static_range(PIECES):  # type: ignore[misc]
            at, inside = piece(m, M, i, C, BLOCK_C)
            if dy_ptr is None:
                dr = drs[i].to(tl.float32)
            else:
                dr = (gs[i] - mean_g - ns[i] * mean_gn) * rstd  # type: ignore[misc]
                if dres_ptr is not None:
                    dr += drs[i].to(tl.float32)
            if dr_ptr is not None:
                tl.store(dr_ptr + at, dr.to(dr_ptr.dtype.element_ty), mask=inside)
            if seed_ptr is not None:
                keep = keep_mask(seed, site, threshold, m, i * BLOCK_C, tl.cdiv(C, 4), ROWS, BLOCK_C)
                dr = tl.where(keep, dr * keep_scale, 0.0)
            if ddelta_ptr is not None:
                tl.store(ddelta_ptr + at, dr.to(ddelta_ptr.dtype.element_ty), mask=inside)
            next_d_delta_bias += (d_delta_bias[i] + dr,)
        d_delta_bias = next_d_delta_bias
    at_program = tl.program_id(0).to(tl.int64) * C
    for i in tl.static_range(PIECES):  # type: ignore[misc]
        c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        if dw_ptr is not None:
            tl.store(dw_ptr + at_program + c, tl.sum(dw[i], axis=0), mask=c < C)
        if db_ptr is not None:
            tl.store(db_ptr + at_program + c, tl.sum(db[i], axis=0), mask=c < C)
        if d_delta_bias_ptr is not None:
            tl.store(d_delta_bias_ptr + at_program + c, tl.sum(d_delta_bias[i], axis=0), mask=c < C)


def _tile(row: Row, C: int) -> dict[str, int]:
    """The launch row's tile cut to C: where C is narrow, its lanes go to more rows."""
    BLOCK_C = min(row.blocks["BLOCK_C"], max(4, 1 << (C - 1).bit_length()))
    return dict(
        C=C, ROWS=row.blocks["ROWS"] * row.blocks["BLOCK_C"] // BLOCK_C, BLOCK_C=BLOCK_C, PIECES=cdiv(C, BLOCK_C)
    )


@register("norm_fwd(Tensor r, Tensor? delta, Tensor? delta_bias, Tensor w, Tensor? b, float eps, float p, Tensor? seed,"
          " int site, ScalarType y_dtype, bool statistics) -> (Tensor, Tensor, Tensor, Tensor)")  # fmt: skip
def norm_fwd(
    r: Tensor,
    delta: Tensor | None,
    delta_bias: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
    y_dtype: torch.dtype,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r', y, mean [M], rstd [M]): r' is empty where delta is None, the statistics unless they are asked for."""
    op = "norm" if delta is None else "add_norm"
    require(r.dim() > 0 and w.dim() == 1 and w.numel() > 0, op, "r must be [..., C], w [C], C at least 1", r=r, w=w)
    require(r.size(-1) == w.numel(), op, "the last dimension of r must be w's", r=r, w=w)
    require(b is None or b.shape == w.shape, op, "b must have w's shape", w=w, b=b)
    require_float(op, r=r, w=w, b=b)
    require_same_device(op, r=r, delta=delta, delta_bias=delta_bias, w=w, b=b, seed=seed)
    if delta is not None:
        require_addends(op, r, delta, delta_bias)
        require_dropout(op, p, seed)
    require(y_dtype in FLOATS, op, "out_dtype must be float32, bfloat16 or float16", out_dtype=y_dtype)
    r, w = r.contiguous(), w.contiguous()
    delta, delta_bias, b = (None if t is None else t.contiguous() for t in (delta, delta_bias, b))
    C = w.numel()
    M = r.numel() // C
    r_out = torch.empty(0 if delta is None else r.shape, dtype=r.dtype, device=r.device)
    y = torch.empty(r.shape, dtype=y_dtype, device=r.device)
    mean, rstd = (torch.empty(M if statistics else 0, dtype=torch.float32, device=r.device) for _ in range(2))
    seed, threshold, keep_scale = dropout_args(p, seed)
    row = pick("norm_fwd", r, C)
    tile = _tile(row, C)
    programs = persistent(cdiv(M, tile["ROWS"]), row.choices["programs_per_sm"], r.device)
    launch(
        "norm_fwd", _norm_fwd_kernel, (programs,),
        r, delta, delta_bias, w, b, seed, None if delta is None else r_out, y,
        mean if statistics else None, rstd if statistics else None, M, eps, keep_scale, threshold, site,
        row=row, **tile,
    )  # fmt: skip
    return r_out, y, mean, rstd


@register("norm_bwd(Tensor? dy, Tensor? dres, Tensor r, Tensor mean, Tensor rstd, Tensor w, Tensor? seed, float p, "
          "int site, ScalarType? ddelta_dtype, bool wants_dr, bool wants_dw, bool wants_db, bool wants_d_delta_bias)"
          " -> (Tensor, Tensor, Tensor)")  # fmt: skip
def norm_bwd(
    dy: Tensor | None, dres: Tensor | None, r: Tensor, mean: Tensor, rstd: Tensor, w: Tensor, seed: Tensor | None,
    p: float, site: int, ddelta_dtype: torch.dtype | None,
    wants_dr: bool, wants_dw: bool, wants_db: bool, wants_d_delta_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dr, ddelta, partials [0 to 3, programs, C] float32: of dw, db and d_delta_bias, those that are wanted).

    What is not wanted is empty; of ddelta, ddelta_dtype None says so."""
    C = w.numel()
    M = r.numel() // C
    r, w = r.contiguous(), w.contiguous()
    dy, dres = (None if t is None else t.contiguous() for t in (dy, dres))
    seed, threshold, keep_scale = dropout_args(p, seed)
    row = pick("norm_bwd", r, C)
    tile = _tile(row, C)
    programs = persistent(cdiv(M, tile["ROWS"]), row.choices["programs_per_sm"], r.device)
    dr = torch.empty(r.shape if wants_dr else 0, dtype=r.dtype, device=r.device)
    ddelta = torch.empty(0 if ddelta_dtype is None else r.shape, dtype=ddelta_dtype or r.dtype, device=r.device)
    wanted = wants_dw, wants_db, wants_d_delta_bias
    partials = torch.empty(sum(wanted), programs, C, dtype=torch.float32, device=r.device)
    slots = iter(partials)
    late_above = row.choices.get("float32_dres_late_above", C)  # never, where the launch row has none
    late = late_above < C and dy is not None and dy.element_size() == 4
    launch(
        "norm_bwd", _norm_bwd_kernel, (programs,),
        dy, dres, r, mean, rstd, w, seed, dr if wants_dr else None,
        None if ddelta_dtype is None else ddelta, *(next(slots) if want else None for want in wanted),
        M, keep_scale, threshold, site, row=row, **tile, DRES_LATE=late,
    )  # fmt: skip
    return dr, ddelta, partials


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r: Tensor, w: Tensor, b: Tensor | None, eps: float, out_dtype: torch.dtype):
        _, y, mean, rstd = norm_fwd(r, None, None, w, b, eps, 0.0, None, 0, out_dtype, True)
        ctx.save_for_backward(r, w, mean, rstd)
        ctx.vectors = [vector_grad_of("norm", v) for v in (w, b)]
        return y

    @staticmethod
    @once
    def backward(ctx, *grads: Tensor):
        r, w, mean, rstd = ctx.saved_tensors
        wants_r, wants_w, wants_b = ctx.needs_input_grad[:3]
        dr, _, partials = norm_bwd(
            grads[0], None, r, mean, rstd, w, None, 0.0, 0, None,
            wants_dr=wants_r, wants_dw=wants_w, wants_db=wants_b, wants_d_delta_bias=False,
        )  # fmt: skip
        dw, db = vector_grads(partials, (wants_w, wants_b), ctx.vectors)
        return dr if wants_r else None, dw, db, None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, delta, delta_bias, w, b, eps, p, seed, site):
        r_out, y, mean, rstd = norm_fwd(r, delta, delta_bias, w, b, eps, p, seed, site, delta.dtype, True)
        ctx.save_for_backward(r_out, w, mean, rstd, seed)
        ctx.vectors = [vector_grad_of("add_norm", v) for v in (w, b, delta_bias)]
        ctx.set_materialize_grads(False)
        ctx.p, ctx.site, ctx.delta_dtype = p, site, delta.dtype
        return r_out, y

    @staticmethod
    @once
    def backward(ctx, *grads: Tensor | None):
        dres, dy = grads
        if dres is None and dy is None:
            return (None,) * 9
        r, w, mean, rstd, seed = ctx.saved_tensors
        wants_r, wants_delta, wants_delta_bias, wants_w, wants_b = ctx.needs_input_grad[:5]
        wants_w, wants_b = wants_w and dy is not None, wants_b and dy is not None
        separate_ddelta = ctx.p > 0.0 or ctx.delta_dtype != r.dtype  # else dr and ddelta are one tensor
        ddelta_dtype = ctx.delta_dtype if wants_delta and separate_ddelta else None
        dr, ddelta, partials = norm_bwd(
            dy, dres, r, mean, rstd, w, seed, ctx.p, ctx.site, ddelta_dtype,
            wants_dr=wants_r or (wants_delta and not separate_ddelta), wants_dw=wants_w, wants_db=wants_b,
            wants_d_delta_bias=wants_delta_bias,
        )  # fmt: skip
        dw, db, d_delta_bias = vector_grads(partials, (wants_w, wants_b, wants_delta_bias), ctx.vectors)
        ddelta = ddelta if separate_ddelta else dr
        return (dr if wants_r else None, ddelta if wants_delta else None, d_delta_bias, dw, db, *[None] * 4)


def norm(r: Tensor, w: Tensor, b: Tensor | None, eps: float = 1e-5, out_dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm of r [..., C] over its last dimension, with weight w [C] and bias b [C] or None, in out_dtype (r's)."""
    if differentiating("norm", r, w, b):
        return _Norm.apply(r, w, b, number(eps), out_dtype or r.dtype)
    return norm_fwd(r, None, None, w, b, eps, 0.0, None, 0, out_dtype or r.dtype, False)[1]


layernorm = norm  # the name people look for


def add_norm(
    r: Tensor,
    delta: Tensor,
    delta_bias: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    """r' = r + dropout(delta + delta_bias) in r's dtype and y = norm(r') in delta's; all [..., C], vectors [C].

    delta has r's dtype, or r is float32. Dropout with probability p takes its mask from (seed, site), seed int64 [1].
    """
    if differentiating("add_norm", r, delta, delta_bias, w, b):
        return _AddNorm.apply(r, delta, delta_bias, w, b, number(eps), number(p), seed, site)
    return norm_fwd(r, delta, delta_bias, w, b, eps, p, seed, site, delta.dtype, False)[:2]
