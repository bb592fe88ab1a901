"""Every way the product calls an op, on meta tensors: nothing is computed, and launch.recording keeps the launches.

Widths are GPT-2's four, in bfloat16, and the 124M in float32 and float16 too, each at B=8 T=1024 (as registers do not
depend on B or T); then the small models of configs/, heads of other sizes, a T that no tile divides, launch rows that
no GPT-2 takes, and tensors of more than 2^31 elements, whose addresses must not be computed in 32 bits.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from nanogpt_kernels import launch
from nanogpt_kernels.ops.adamw import adamw_, grad_norm
from nanogpt_kernels.ops.attention import attention, cached_attention, qkv_attention
from nanogpt_kernels.ops.cross_entropy import cross_entropy
from nanogpt_kernels.ops.embedding import embedding
from nanogpt_kernels.ops.linear import linear
from nanogpt_kernels.ops.linear_cross_entropy import linear_cross_entropy
from nanogpt_kernels.ops.mlp import bias_gelu, mlp
from nanogpt_kernels.ops.norm import add_norm, norm
from nanogpt_kernels.ops.residual import dropout_add
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SITE, EPS = 7, 1e-5


@dataclass(frozen=True)
class Shape:
    """A model's shape: B sequences of T tokens, C channels in H heads, V words."""

    name: str
    C: int
    H: int
    B: int = 8
    T: int = 1024
    V: int = 50304
    valid: int = 50257


GPT2 = Shape("124m", 768, 12)
WIDTHS = [GPT2, Shape("350m", 1024, 16), Shape("774m", 1280, 20), Shape("1558m", 1600, 25)]
CHAR = Shape("char", 384, 6, B=64, T=256, V=65, valid=65)
ODD_HEAD = Shape("D=80", 1280, 16)
RAGGED = Shape("T=1000", 768, 12, T=1000)
NARROW = Shape("D=32", 128, 4)
ATTENTIONS = [ODD_HEAD, RAGGED, NARROW, Shape("D=128", 1024, 8)]
SMALL = Shape("quickstart", 128, 4, B=12, T=128)  # D=32
HUGE = Shape("huge", 768, 12, B=4096)  # 3.2e9 elements in one [B, T, C]


@dataclass(frozen=True)
class Case:
    """One op called one way. `core` cases are the default test's; all of them are the slow test's."""

    op: str
    label: str
    run: Callable[[], None]
    core: bool


def meta(*shape: int, dtype: torch.dtype = FP32, grad: bool = True, main_grad: bool = False) -> Tensor:
    t = torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad and dtype.is_floating_point)
    if main_grad:
        t.main_grad = torch.empty(shape, dtype=FP32, device="meta")  # type: ignore[attr-defined]
    return t


def bias_of(n: int, bias: bool, main_grad: bool) -> Tensor | None:
    return meta(n, main_grad=main_grad) if bias else None


def meta_ids(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return meta(*shape, dtype=dtype)


def seed_for(p: float) -> Tensor | None:
    return meta_ids(1) if p else None


def backward(out: Tensor | tuple[Tensor, ...]) -> None:
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    torch.autograd.backward(outs, [torch.empty_like(o) for o in outs])


@contextmanager
def choosing(**choices: Any) -> Iterator[None]:
    """launch.override of host choices: choosing(attention_bwd=dict(atomic=True))."""
    ((op, chosen),) = choices.items()
    with launch.override(op, choices=chosen):
        yield


# ---- one function an op: everything it depends on is an argument ----


def call_embedding(s: Shape, dtype: torch.dtype, p: float, main_grad: bool, out: torch.dtype | None = None) -> None:
    wte, wpe = (meta(rows, s.C, dtype=dtype, main_grad=main_grad) for rows in (s.V, s.T))
    backward(embedding(meta_ids(s.B, s.T), wte, wpe, p, seed_for(p), SITE, out_dtype=out))


def call_norm(s: Shape, dtype: torch.dtype, bias: bool, main_grad: bool, out: torch.dtype | None = None) -> None:
    w, b = meta(s.C, main_grad=main_grad), bias_of(s.C, bias, main_grad)
    backward(norm(meta(s.B, s.T, s.C, dtype=dtype), w, b, EPS, out))


def call_add_norm(
    s: Shape, dtype: torch.dtype, bias: bool, main_grad: bool, p: float, stream: torch.dtype | None = None
) -> None:
    r, delta = meta(s.B, s.T, s.C, dtype=stream or dtype), meta(s.B, s.T, s.C, dtype=dtype)
    w, (delta_bias, b) = meta(s.C, main_grad=main_grad), (bias_of(s.C, bias, main_grad) for _ in range(2))
    backward(add_norm(r, delta, delta_bias, w, b, EPS, p, seed_for(p), SITE))


def call_dropout_add(
    s: Shape, dtype: torch.dtype, bias: bool, main_grad: bool, p: float, stream: torch.dtype | None = None
) -> None:
    r, delta = meta(s.B, s.T, s.C, dtype=stream or dtype), meta(s.B, s.T, s.C, dtype=dtype)
    backward(dropout_add(r, delta, bias_of(s.C, bias, main_grad), p, seed_for(p), SITE))


def call_attention(s: Shape, dtype: torch.dtype, p: float, docs: torch.dtype | None, atomic: bool) -> None:
    doc_ids = None if docs is None else meta_ids(s.B, s.T, dtype=docs)
    with choosing(attention_bwd=dict(atomic=atomic)):
        backward(attention(meta(s.B, s.T, 3, s.H, s.C // s.H, dtype=dtype), p, seed_for(p), SITE, doc_ids))


def call_qkv_attention(s: Shape, dtype: torch.dtype, bias: bool, main_grad: bool, p: float, docs: bool, atomic: bool):
    w = meta(3 * s.C, s.C, dtype=dtype, main_grad=main_grad)
    doc_ids = meta_ids(s.B, s.T) if docs else None
    with choosing(attention_bwd=dict(atomic=atomic)):
        y, b = meta(s.B, s.T, s.C, dtype=dtype), bias_of(3 * s.C, bias, main_grad)
        backward(qkv_attention(y, w, b, s.H, p, seed_for(p), SITE, doc_ids))


def call_cached_attention(s: Shape, dtype: torch.dtype, bias: bool, T: int, start: int) -> None:
    cache = meta(2, s.B, s.H, s.T, s.C // s.H, dtype=dtype, grad=False)
    w, b = meta(3 * s.C, s.C, dtype=dtype, grad=False), meta(3 * s.C, grad=False) if bias else None
    with torch.no_grad():
        cached_attention(meta(s.B, T, s.C, dtype=dtype, grad=False), w, b, s.H, cache, start)


def call_linear(s: Shape, dtype: torch.dtype, bias: bool, main_grad: bool) -> None:
    w = meta(s.C, s.C, dtype=dtype, main_grad=main_grad)
    backward(linear(meta(s.B, s.T, s.C, dtype=dtype), w, meta(s.C) if bias else None))


def call_mlp(
    s: Shape, dtype: torch.dtype, bias: bool, activation: str, fused: bool, recompute: bool, main_grad: bool
) -> None:
    w_fc, w_proj = (meta(*shape, dtype=dtype, main_grad=main_grad) for shape in ((4 * s.C, s.C), (s.C, 4 * s.C)))
    y, b_fc = meta(s.B, s.T, s.C, dtype=dtype), bias_of(4 * s.C, bias, main_grad)
    with choosing(mlp_fwd=dict(fused=fused)), choosing(mlp_bwd=dict(fused=fused)):
        backward(mlp(y, w_fc, b_fc, w_proj, activation, recompute))


def call_bias_gelu(s: Shape, dtype: torch.dtype, bias: bool, activation: str) -> None:
    backward(bias_gelu(meta(s.B, s.T, 4 * s.C, dtype=dtype), meta(4 * s.C) if bias else None, activation))


def call_linear_cross_entropy(s: Shape, dtype: torch.dtype, main_grad: bool, train: bool) -> None:
    x, w = meta(s.B, s.T, s.C, dtype=dtype), meta(s.V, s.C, dtype=dtype, main_grad=main_grad)
    with torch.set_grad_enabled(train):
        loss, _ = linear_cross_entropy(x, w, meta_ids(s.B, s.T), meta(grad=False), valid_vocab=s.valid)
    if train:
        loss.backward()


def call_cross_entropy(s: Shape, dtype: torch.dtype, valid: int) -> None:
    M = s.B * s.T
    backward(cross_entropy(meta(M, s.V, dtype=dtype), meta_ids(M), meta(grad=False), valid_vocab=valid))


def call_optimizer(N: int, dtype: torch.dtype | None) -> None:
    p = None if dtype is None else meta(N, dtype=dtype, grad=False)
    master, m, v, g = (meta(N, grad=False) for _ in range(4))
    grad_norm(g)
    scalars = meta(5, dtype=torch.float64, grad=False)
    adamw_(p, master, m, v, g, scalars, [(0, N // 2, 0.1), (N // 2, N, 0.0)], 0.9, 0.95)


# ---- the cases ----

KINDS = [(s, BF16) for s in WIDTHS] + [(GPT2, FP32), (GPT2, FP16), (CHAR, BF16), (SMALL, FP32)]


def cases() -> list[Case]:
    return [*_plain_and_loaded(), *_every_option(), *_edges()]


def case(op: str, call: Callable[..., None], s: Shape | int, *args: Any, core: bool = False) -> Case:
    said = [getattr(a, "name", str(a).removeprefix("torch.")) for a in (s, *args)]
    return Case(op, " ".join(said), lambda: call(s, *args), core)


def _plain_and_loaded() -> Iterator[Case]:
    """Every kind of model with every option off, and with all of them on."""
    for s, dtype in KINDS:
        main, widest = s is GPT2 and dtype is BF16, s is WIDTHS[-1]
        single = s is GPT2 and dtype is FP32
        for on, p in ((False, 0.0), (True, 0.1)):
            yield case("embedding", call_embedding, s, dtype, p, on, core=main)
            yield case("norm", call_norm, s, dtype, on, on)
            core = main or (not on and s in WIDTHS) or (single and on)
            yield case("add_norm", call_add_norm, s, dtype, on, on, p, core=core)
            yield case("dropout_add", call_dropout_add, s, dtype, on, on, p, core=main)
            for atomic in (False, True):
                core = main or single
                yield case("qkv_attention", call_qkv_attention, s, dtype, on, on, p, on, atomic, core=core)
            yield case("linear", call_linear, s, dtype, on, on, core=main)
            activation = "gelu_tanh" if on else "gelu"
            for fused in (False, True) if dtype is not FP32 else (False,):
                core = main or (widest and fused and not on)
                yield case("mlp", call_mlp, s, dtype, on, activation, fused, on, on, core=core)
            core = main or (single and on)
            yield case("bias_gelu", call_bias_gelu, s, dtype, on, activation, core=core)
            yield case("linear_cross_entropy", call_linear_cross_entropy, s, dtype, on, True, core=core)
        for T, start in ((s.T // 2, 0), (1, s.T // 2)):
            yield case("cached_attention", call_cached_attention, s, dtype, False, T, start, core=main or single)
        yield case("linear_cross_entropy", call_linear_cross_entropy, s, dtype, False, False, core=main)
        yield case("cross_entropy", call_cross_entropy, s, dtype, s.valid, core=main)


def _every_option() -> Iterator[Case]:
    """GPT-2 124M in bfloat16, its options in every combination; a float32 residual stream."""
    yes_no = (False, True)
    for p, on in itertools.product((0.0, 0.1), yes_no):
        yield case("embedding", call_embedding, GPT2, BF16, p, on)
        for main_grad in yes_no:
            yield case("add_norm", call_add_norm, GPT2, BF16, on, main_grad, p)
            yield case("dropout_add", call_dropout_add, GPT2, BF16, on, main_grad, p)
        for docs, atomic in itertools.product(yes_no, yes_no):
            yield case("qkv_attention", call_qkv_attention, GPT2, BF16, on, on, p, docs, atomic)
    for on, activation, fused, recompute in itertools.product(yes_no, ("gelu", "gelu_tanh"), yes_no, yes_no):
        yield case("mlp", call_mlp, GPT2, BF16, on, activation, fused, recompute, True)
    for on, activation in itertools.product(yes_no, ("gelu", "gelu_tanh")):
        yield case("bias_gelu", call_bias_gelu, GPT2, BF16, on, activation)
    for dtype in (BF16, FP16):
        yield case("embedding", call_embedding, GPT2, dtype, 0.1, True, FP32)
        yield case("norm", call_norm, GPT2, FP32, True, True, dtype)
        for p in (0.0, 0.1):
            yield case("add_norm", call_add_norm, GPT2, dtype, True, True, p, FP32)
            yield case("dropout_add", call_dropout_add, GPT2, dtype, True, True, p, FP32)


def _edges() -> Iterator[Case]:
    """Rows that no GPT-2 takes, odd head sizes, several sizes of the optimizer, addresses beyond 2^31."""
    for s, dtype in itertools.product(ATTENTIONS, (BF16, FP16, FP32)):
        for (docs, p), atomic in itertools.product(((None, 0.0), (torch.int32, 0.1)), (False, True)):
            core = {ODD_HEAD: dtype is not FP16, RAGGED: dtype is BF16, NARROW: dtype is FP32}.get(s, False)
            yield case("attention", call_attention, s, dtype, p, docs, atomic, core=core)
    for dtype in (BF16, FP16, FP32):
        yield case("norm", call_norm, Shape("C=2048", 2048, 32), dtype, True, False)
        yield case("norm", call_norm, Shape("C=8192", 8192, 64), dtype, True, False, core=dtype is FP32)
        few = Shape("V=4096", 768, 12, V=4096)
        yield case("cross_entropy", call_cross_entropy, few, dtype, 4096, core=dtype is not FP16)
    for N in (124_475_904, 2**32 + 16):
        for dtype in (None, BF16, FP16):
            yield case("adamw", call_optimizer, N, dtype, core=N < 2**31 and dtype is BF16)
    yield case("adamw", call_optimizer, 1001, BF16)
    yield case("embedding", call_embedding, HUGE, BF16, 0.1, True, core=True)
    yield case("norm", call_norm, HUGE, BF16, True, True, core=True)
    yield case("add_norm", call_add_norm, HUGE, BF16, True, True, 0.1, core=True)
    yield case("dropout_add", call_dropout_add, HUGE, BF16, True, True, 0.1, core=True)
    for on, atomic in itertools.product((False, True), (False, True)):
        yield case("qkv_attention", call_qkv_attention, HUGE, BF16, on, on, 0.1 * on, on, atomic, core=True)
    for fused in (False, True):
        yield case("mlp", call_mlp, HUGE, BF16, True, "gelu_tanh", fused, True, True, core=True)
    yield case("cross_entropy", call_cross_entropy, Shape("huge", 768, 12, B=64), BF16, 50257, core=True)
