"""The ops as benchmark cases: where ours is, its inputs (profiling/op_inputs.py's), the work that they are, and torch's
own contestant.

Bytes are compulsory ones (each input read once, each output written once), so a floor is a floor; FLOPs are those of
the products, causal attention counted as half.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import harness
import op_inputs
import torch
import torch.nn.functional as F
from nanogpt_kernels import reference
from op_inputs import Setting, Shape, gpt2
from torch import Tensor
from work import (
    Work,
    adamw_bytes,
    add_norm_bytes,
    attention_bytes,
    embedding_bytes,
    gelu_bytes,
    grad_norm_bytes,
    norm_bytes,
)

SHAPES = {
    "tiny": Shape(B=2, T=17, C=128, H=2, V=96, N=5000),  # for checks: ragged tiles, D = 64, seconds when interpreted
    "race": gpt2("124m", N=8_000_000),
    "124m": gpt2("124m", B=64),
    "1558m": gpt2("1558m", B=16),
    "cpu": Shape(B=12, T=64, C=128, H=4, V=65, N=804_096),  # configs/shakespeare_char_cpu.toml on Tiny Shakespeare
    "cpu-124m": gpt2("124m", B=1, T=64, V=4096, N=4_000_000),  # GPT-2's width, few tokens and words: milliseconds
}
SIZES = {"cuda": ["124m", "1558m"], "cpu": ["cpu", "cpu-124m"]}  # that ops.py takes by default


@dataclass(frozen=True)
class Case:
    """One op. work: (forward, backward) of a shape and an element size; no backward: the op is not differentiable.
    What it `mutates` (positions of its arguments) is part of its result."""

    files: tuple[str, ...]  # of nanogpt_kernels/ops, where the function may live
    inputs: Callable[[Setting], tuple[Any, ...]]
    work: Callable[[Shape, int], tuple[Work, Work | None]]
    mutates: tuple[int, ...] = ()
    at_most: int = 1 << 62  # sequences: torch's own needs several times the memory
    syncs: bool = False  # torch's own waits for the device
    specified_by: Callable[..., Any] | None = None  # None: the function of that name in nanogpt_kernels/reference.py


def _torch_dropout_add(r: Tensor, delta: Tensor, b: Tensor | None, p: float, seed: Tensor, site: int) -> Tensor:
    return r + reference.dropout(delta if b is None else delta + b.to(delta.dtype), p, seed, site)


def _torch_bias_gelu(x: Tensor, b: Tensor | None, activation: str) -> Tensor:
    return F.gelu(x if b is None else x + b.to(x.dtype), approximate="tanh" if activation == "gelu_tanh" else "none")


def _rows_work(count: Callable[..., int], wider: int = 1) -> Callable[[Shape, int], tuple[Work, Work | None]]:
    """Of an op that passes over [M, C] tensors, or so many times wider ones: `count` is work.py's."""

    def work(x: Shape, size: int) -> tuple[Work, Work | None]:
        forward, backward = (Work(bytes=count(x.M, wider * x.C, size, backward=b)) for b in (False, True))
        return forward, backward

    return work


def _dropout_add_bytes(M: int, C: int, size: int, *, backward: bool) -> int:
    """r, delta -> r'; or dr' -> ddelta."""
    return (2 if backward else 3) * size * M * C


def _embedding_work(x: Shape, size: int) -> tuple[Work, Work]:
    forward, backward = (embedding_bytes(x.M, x.C, size, backward=b) + 8 * x.M for b in (False, True))
    return Work(bytes=forward), Work(bytes=backward + (x.V + x.T) * x.C * size)  # and the tables' gradients


def _attention_work(x: Shape, size: int) -> tuple[Work, Work]:
    products, exps = 2.0 * x.M * x.T * x.C, x.B * x.H * x.T * x.T / 2
    moved = [attention_bytes(x.M, x.C, size, backward=b) for b in (False, True)]
    return Work(products, moved[0], exps), Work(2.5 * products, moved[1], exps)


def _gemm(rows: int, inner: int, columns: int) -> float:
    return 2.0 * rows * inner * columns


def _qkv_attention_work(x: Shape, size: int) -> tuple[Work, Work]:
    attention, gemm = _attention_work(x, size), _gemm(x.M, x.C, 3 * x.C)
    rows, w = x.M * x.C * size, 3 * x.C * x.C * size
    return (
        Work(attention[0].flops + gemm, 2 * rows + w, attention[0].exps),
        Work(attention[1].flops + 2 * gemm, 3 * rows + 2 * w, attention[1].exps),
    )


def _cached_attention_work(x: Shape, size: int) -> tuple[Work, None]:
    return Work(_gemm(x.B, x.C, 3 * x.C) + 4.0 * x.M * x.C, (2 * x.M * x.C + 3 * x.C * x.C) * size), None


def _mlp_work(x: Shape, size: int) -> tuple[Work, Work]:
    gemms, rows, w = 2 * _gemm(x.M, x.C, 4 * x.C), x.M * x.C * size, 8 * x.C * x.C * size
    return Work(gemms, 2 * rows + w), Work(2 * gemms, 3 * rows + 2 * w)


def _linear_cross_entropy_work(x: Shape, size: int) -> tuple[Work, Work]:
    gemm, rows, w = _gemm(x.M, x.C, x.V), x.M * x.C * size, x.V * x.C * size
    return Work(gemm, rows + w), Work(2 * gemm, rows + w)


def _adamw_work(x: Shape, size: int) -> tuple[Work, None]:
    return Work(bytes=adamw_bytes(x.N, size)), None


CASES: dict[str, Case] = {
    "attention": Case(("attention",), op_inputs.attention, _attention_work),
    "linear_cross_entropy": Case(
        ("linear_cross_entropy", "cross_entropy"),
        op_inputs.linear_cross_entropy,
        _linear_cross_entropy_work,
        at_most=16,
    ),
    "add_norm": Case(("norm",), op_inputs.add_norm, _rows_work(add_norm_bytes)),
    "mlp": Case(("mlp",), op_inputs.mlp, _mlp_work),
    "bias_gelu": Case(("mlp",), op_inputs.bias_gelu, _rows_work(gelu_bytes, 4), specified_by=_torch_bias_gelu),
    "adamw_": Case(("adamw",), op_inputs.adamw_, _adamw_work, mutates=(0, 1, 2, 3), syncs=True),
    "norm": Case(("norm",), op_inputs.norm, _rows_work(norm_bytes)),
    "qkv_attention": Case(("attention",), op_inputs.qkv_attention, _qkv_attention_work),
    "embedding": Case(("embedding",), op_inputs.embedding, _embedding_work),
    "dropout_add": Case(
        ("residual",), op_inputs.dropout_add, _rows_work(_dropout_add_bytes), specified_by=_torch_dropout_add
    ),
    "cached_attention": Case(
        ("attention",), op_inputs.cached_attention, _cached_attention_work, mutates=(4,), at_most=16
    ),
    "grad_norm": Case(("adamw",), op_inputs.grad_norm, lambda x, size: (Work(bytes=grad_norm_bytes(x.N)), None)),
}


def ours(op: str) -> Callable[..., Any]:
    """Our function of that name; ImportError where there is none."""
    problems = []
    for file in CASES[op].files:
        try:
            module = importlib.import_module(f"nanogpt_kernels.ops.{file}")
        except ModuleNotFoundError as problem:
            problems.append(str(problem))
            continue
        if hasattr(module, op):
            return getattr(module, op)
        problems.append(f"nanogpt_kernels.ops.{file} has no {op}")
    raise ImportError("; ".join(problems))


def specification(op: str) -> Callable[..., Any]:
    """The op in plain PyTorch."""
    return CASES[op].specified_by or getattr(reference, op)


def differentiable(op: str, at: Setting) -> bool:
    return CASES[op].work(at.shape, at.dtype.itemsize)[1] is not None


def setting(op: str, size: str, **options: Any) -> Setting:
    shape = SHAPES[size]
    return Setting(replace(shape, B=min(shape.B, CASES[op].at_most)), **options)


def douts_of(outs: list[Any], at: Setting) -> list[Tensor]:
    """Incoming gradients: random for tensors, 1 for scalars (linear_cross_entropy demands it)."""
    drawn = replace(at, seed=at.seed + 17)
    return [torch.ones_like(o) if o.dim() == 0 else drawn.normal(*o.shape, dtype=o.dtype, grad=False) for o in outs]


@contextmanager
def overridden(overrides: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Several launch.override at once: {launch op: fields}."""
    from nanogpt_kernels import launch

    with ExitStack() as stack:
        for launch_op, fields in overrides.items():
            stack.enter_context(launch.override(launch_op, **fields))
        yield


def recorded(op: str, at: Setting, arch: int, backward: bool) -> Any:
    """The launches of our op on sm_`arch`, forward or forward and backward, without running anything; `.rows` are the
    (launch op, row) pairs it asked for."""
    from nanogpt_kernels import launch

    at = replace(at, device=torch.device("meta"))
    with launch.recording(max(listed for listed in launch.ARCHITECTURES if listed <= arch)) as calls:
        bound = harness.plain(ours(op)).bind(*CASES[op].inputs(at))
        outs = harness.outputs_of(bound.forward())
        if backward and differentiable(op, at):
            wanted = [o for o in outs if o is not None and o.requires_grad]
            torch.autograd.grad(wanted, bound.leaves, [torch.empty_like(o) for o in wanted])
    return calls
