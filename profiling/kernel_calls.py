"""Every way the product calls an op, on meta tensors: nothing is computed, and launch.recording keeps the launches.

Widths are GPT-2's four, in bfloat16, and the 124M in float32 and float16 too, each at B=8 T=1024 (as registers do not
depend on B or T); then the small models of configs/, heads of other sizes, a T that no tile divides, launch rows that
no GPT-2 takes, and tensors of more than 2^31 elements, whose addresses must not be computed in 32 bits.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import op_inputs
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
from op_inputs import GPT2, Setting, Shape, gpt2
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
META = torch.device("meta")

SMALLEST, *_, WIDEST = WIDTHS = [gpt2(size) for size in GPT2]
of_124m = partial(gpt2, "124m")
CHAR = of_124m(C=384, H=6, B=64, T=256, V=65)
QUICKSTART = of_124m(C=128, H=4, B=12, T=128)  # D=32
D_80, RAGGED, D_32, D_128 = of_124m(C=1280, H=16), of_124m(T=1000), of_124m(C=128, H=4), of_124m(C=1024, H=8)
HUGE = of_124m(B=4096)  # 3.2e9 elements in one [B, T, C]


@dataclass(frozen=True)
class Case:
    """One op called one way. `core` cases are the default test's; all of them are the slow test's. step: its kernels
    are those of a training step of GPT-2 124M without bias or dropout, whose instructions have budgets."""

    op: str
    label: str
    run: Callable[[], None]
    core: bool
    step: bool = False


def at(shape: Shape, dtype: torch.dtype, **options: Any) -> Setting:
    return Setting(shape, dtype, META, **options)


def case(
    op: Callable[..., Any],
    s: Setting,
    *more: int,
    core: bool = False,
    step: bool = False,
    train: bool = True,
    choices: dict[str, dict[str, bool]] | None = None,
    **options: Any,
) -> Case:
    """The op, and its backward if `train`. more: for its maker in op_inputs.py; options: for the op itself; choices of
    launch rows: {launch op: {name: value}}."""
    name, chosen = op.__name__, choices or {}

    def run() -> None:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(train))
            for launch_op, fields in chosen.items():
                stack.enter_context(launch.override(launch_op, choices=fields))
            out = op(*getattr(op_inputs, name)(s, *more), **options)
            if train:
                backward(out)

    return Case(name, " ".join(map(str, (s, *more, chosen, options))), run, core, step)


def backward(out: Tensor | tuple[Tensor, ...]) -> None:
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    torch.autograd.backward(outs, [torch.empty_like(o) for o in outs])


def optimizer_case(s: Setting, core: bool = False) -> Case:
    def run() -> None:
        grad_norm(*op_inputs.grad_norm(s))
        adamw_(*op_inputs.adamw_(s, multiple=1))  # unaligned too, by an odd N

    return Case("adamw", str(s), run, core, step=core)


def atomic(on: bool) -> dict[str, dict[str, bool]]:
    return {"attention_bwd": {"atomic": on}}


def fused(on: bool) -> dict[str, dict[str, bool]]:
    return {"mlp_fwd": {"fused": on}, "mlp_bwd": {"fused": on}}


# ---- the cases ----

KINDS = [(s, BF16) for s in WIDTHS] + [(SMALLEST, FP32), (SMALLEST, FP16), (CHAR, BF16), (QUICKSTART, FP32)]


def cases() -> list[Case]:
    return [*_plain_and_loaded(), *_every_option(), *_edges()]


def _plain_and_loaded() -> Iterator[Case]:
    """Every kind of model with every option off, and with all of them on."""
    for x, dtype in KINDS:
        main, single = x is SMALLEST and dtype is BF16, x is SMALLEST and dtype is FP32
        plain = at(x, dtype, bias=False)
        loaded = at(x, dtype, p=0.1, main_grad=True, activation="gelu_tanh")
        for s, on in ((plain, False), (loaded, True)):
            step = main and not on
            yield case(embedding, s, core=main or single, step=step)
            yield case(norm, s)
            yield case(add_norm, s, core=main or (not on and x in WIDTHS) or (single and on), step=step)
            yield case(dropout_add, s, core=main)
            for way in (False, True):
                masked = replace(s, documents=torch.int64 if on else None)
                yield case(qkv_attention, masked, choices=atomic(way), core=main or single, step=step and not way)
            yield case(linear, s, core=main)
            for way in (False, True) if dtype is not FP32 else (False,):
                core = main or (x is WIDEST and way and not on)
                yield case(mlp, s, recompute=on, choices=fused(way), core=core, step=step)
            core = main or (single and on)
            yield case(bias_gelu, replace(s, main_grad=False), core=core)  # the trainer's is inside mlp
            yield case(linear_cross_entropy, s, valid_vocab=x.valid, core=core, step=step)
        for new, start, in_memory in ((x.T // 2, 0, False), (1, x.T // 2, False), (1, 0, True)):
            yield case(cached_attention, plain, new, start, in_memory, train=False, core=main or single)
        start = torch.zeros(1, dtype=torch.int64, device=META)
        yield case(embedding, plain, train=False, start=start, core=main or single)
        yield case(linear_cross_entropy, plain, valid_vocab=x.valid, train=False, core=main)
        yield case(cross_entropy, plain, valid_vocab=x.valid, core=main)


def _every_option() -> Iterator[Case]:
    """GPT-2 124M in bfloat16, its options in every combination; a float32 residual stream."""
    yes_no, gelus, main = (False, True), ("gelu", "gelu_tanh"), partial(at, SMALLEST, BF16)
    for p, on in itertools.product((0.0, 0.1), yes_no):
        yield case(embedding, main(p=p, main_grad=on))
        for main_grad in yes_no:
            s = main(p=p, bias=on, main_grad=main_grad)
            yield case(add_norm, s)
            yield case(dropout_add, s)
        for documents, way in itertools.product((None, torch.int64), yes_no):
            s = main(p=p, bias=on, main_grad=on, documents=documents)
            yield case(qkv_attention, s, choices=atomic(way))
    for on, activation, way, recompute in itertools.product(yes_no, gelus, yes_no, yes_no):
        s = main(bias=on, activation=activation, main_grad=True)
        yield case(mlp, s, recompute=recompute, choices=fused(way))
    for on, activation in itertools.product(yes_no, gelus):
        yield case(bias_gelu, main(bias=on, activation=activation))
    for dtype in (BF16, FP16):
        s = at(SMALLEST, dtype, p=0.1, stream=FP32, main_grad=True)
        yield case(embedding, s, out_dtype=FP32)
        yield case(norm, s, out_dtype=dtype)
        for p in (0.0, 0.1):
            yield case(add_norm, replace(s, p=p))
            yield case(dropout_add, replace(s, p=p))


def _edges() -> Iterator[Case]:
    """Rows that no GPT-2 takes, odd head sizes, several sizes of the optimizer, addresses beyond 2^31."""
    for x, dtype in itertools.product((D_80, RAGGED, D_32, D_128), (BF16, FP16, FP32)):
        core = {D_80: dtype is not FP16, RAGGED: dtype is BF16, D_32: dtype is FP32}.get(x, False)
        for s in (at(x, dtype), at(x, dtype, p=0.1, documents=torch.int32)):
            for way in (False, True):
                yield case(attention, s, choices=atomic(way), core=core)
    for dtype in (BF16, FP16, FP32):
        yield case(norm, at(of_124m(C=2048), dtype))
        if dtype is not FP32:
            yield case(mlp, at(of_124m(C=2048), dtype), choices=fused(True))
        yield case(norm, at(of_124m(C=8192), dtype), core=dtype is FP32)
        yield case(cross_entropy, at(of_124m(V=4096), dtype), valid_vocab=4096, core=dtype is not FP16)
    for x in (SMALLEST, of_124m(N=2**32 + 16)):
        for dtype in (FP32, BF16, FP16):
            yield optimizer_case(at(x, dtype), core=x is SMALLEST and dtype is BF16)
    yield optimizer_case(at(of_124m(N=1001), BF16))
    plain, loaded = at(HUGE, BF16, bias=False), at(HUGE, BF16, p=0.1, main_grad=True, activation="gelu_tanh")
    for op in (embedding, norm, add_norm, dropout_add):
        yield case(op, loaded, core=True)
    for s in (plain, replace(loaded, documents=torch.int64)):
        for way in (False, True):
            yield case(qkv_attention, s, choices=atomic(way), core=True)
    for way in (False, True):
        yield case(mlp, loaded, recompute=True, choices=fused(way), core=True)
    yield case(cross_entropy, at(of_124m(B=64), BF16), valid_vocab=50257, core=True)
