"""What the ops are called with: GPT-2's sizes, and the arguments of each op at a size, in a dtype, on a device.

bench/cases.py takes them full of random numbers to time the ops, kernel_calls.py on "meta", where a tensor has a shape
and nothing else, to record what they launch. One function an op, of its name: Setting -> its positional arguments.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nanogpt_fast.settings.config import GPTConfig

GPT2 = {
    "124m": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "350m": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "774m": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "1558m": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
GPT2_IDS = 50257  # that occur; the vocabulary is padded


@dataclass(frozen=True)
class Shape:
    """A batch through a model: B sequences of T tokens, C channels in H heads, V words, N parameters."""

    B: int
    T: int
    C: int
    H: int
    V: int
    N: int

    @property
    def M(self) -> int:
        return self.B * self.T

    @property
    def valid(self) -> int:
        """Words that are no padding."""
        return min(self.V, GPT2_IDS)


def gpt2(size: str, B: int = 8, **changes: int) -> Shape:
    """B sequences through a GPT-2, all its parameters counted; `changes` replace fields."""
    model = GPT2[size]
    count = model.num_params(non_embedding=False)
    shape = Shape(B, model.block_size, model.n_embd, model.n_head, model.vocab_size, count)
    return replace(shape, **changes)


@dataclass(frozen=True)
class Setting:
    """What an op is called at. stream: dtype of the residual stream, None for `dtype`. main_grad: weights have the
    float32 buffer that the trainer accumulates in. documents: integer dtype of doc_ids, None for calls without."""

    shape: Shape
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    p: float = 0.0
    bias: bool = True
    seed: int = 0
    stream: torch.dtype | None = None
    main_grad: bool = False
    documents: torch.dtype | None = None
    activation: str = "gelu"

    def normal(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
        """Random on the device; on "meta" of that shape only."""
        if self.device.type == "meta":
            return torch.empty(size, dtype=dtype or self.dtype, device="meta", requires_grad=grad)
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + sum(size))
        x = torch.randn(size, generator=generator, device=self.device)
        return (x * scale).to(dtype or self.dtype).requires_grad_(grad)

    def residual(self) -> Tensor:
        """[B, T, C] of the residual stream."""
        return self.normal(self.shape.B, self.shape.T, self.shape.C, dtype=self.stream)

    def rows(self, wider: int = 1) -> Tensor:
        """[B, T, wider * C] of a branch."""
        return self.normal(self.shape.B, self.shape.T, wider * self.shape.C)

    def weight(self, *size: int, scale: float) -> Tensor:
        return self._accumulating(self.normal(*size, scale=scale))

    def vector(self, size: int, around: float = 0.0) -> Tensor:
        """A one-dimensional parameter: float32."""
        x = self.normal(size, scale=0.1, dtype=torch.float32, grad=False)
        return self._accumulating((x + around).requires_grad_())

    def bias_of(self, size: int) -> Tensor | None:
        return self.vector(size) if self.bias else None

    def _accumulating(self, parameter: Tensor) -> Tensor:
        if self.main_grad:
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
        return parameter

    def ids(self, *size: int) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(size, dtype=torch.int64, device="meta")
        generator = torch.Generator(self.device).manual_seed(self.seed)
        return torch.randint(self.shape.V, size, generator=generator, device=self.device)

    def grad_scale(self) -> Tensor:
        return torch.full((), 1.0 / self.shape.M, device=self.device)

    @property
    def dropout(self) -> tuple[float, Tensor | None, int]:
        """(p, seed, site) as the ops take them."""
        return self.p, torch.tensor([7], device=self.device) if self.p else None, 3

    @property
    def doc_ids(self) -> tuple[Tensor, ...]:
        """Attention's last argument, [B, T], four documents a sequence; or none."""
        if self.documents is None:
            return ()
        ids = torch.arange(self.shape.T, device=self.device) * 4 // self.shape.T
        return (ids.to(self.documents).repeat(self.shape.B, 1),)


def embedding(s: Setting) -> tuple[Any, ...]:
    x = s.shape
    return s.ids(x.B, x.T), s.weight(x.V, x.C, scale=0.02), s.weight(x.T, x.C, scale=0.02), *s.dropout


def norm(s: Setting) -> tuple[Any, ...]:
    return s.residual(), s.vector(s.shape.C, 1.0), s.bias_of(s.shape.C)


def add_norm(s: Setting) -> tuple[Any, ...]:
    C = s.shape.C
    return *dropout_add(s)[:3], s.vector(C, 1.0), s.bias_of(C), 1e-5, *s.dropout


def dropout_add(s: Setting) -> tuple[Any, ...]:
    return s.residual(), replace(s, seed=s.seed + 1).rows(), s.bias_of(s.shape.C), *s.dropout


def attention(s: Setting) -> tuple[Any, ...]:
    x = s.shape
    return s.normal(x.B, x.T, 3, x.H, x.C // x.H), *s.dropout, *s.doc_ids


def qkv_attention(s: Setting) -> tuple[Any, ...]:
    C, H = s.shape.C, s.shape.H
    w_qkv = s.weight(3 * C, C, scale=C**-0.5)
    return s.rows(), w_qkv, s.bias_of(3 * C), H, *s.dropout, *s.doc_ids


def cached_attention(s: Setting, new: int = 1, start: int | None = None, in_memory: bool = False) -> tuple[Any, ...]:
    """`new` tokens at position `start` of a cache of T; by default the last token of a full one: sampling's usual
    step. in_memory: the position lies on the device, as a CUDA graph's does."""
    x = s.shape
    cache = s.normal(2, x.B, x.H, x.T, x.C // x.H, grad=False)
    w_qkv = s.normal(3 * x.C, x.C, scale=x.C**-0.5, grad=False)
    bias = s.bias_of(3 * x.C)
    y = s.normal(x.B, new, x.C, grad=False)
    start = x.T - new if start is None else start
    at = torch.tensor([start], device=s.device) if in_memory else start
    return y, w_qkv, None if bias is None else bias.detach(), x.H, cache, at


def linear(s: Setting) -> tuple[Any, ...]:
    C = s.shape.C
    return s.rows(), s.weight(C, C, scale=C**-0.5), s.bias_of(C)


def mlp(s: Setting) -> tuple[Any, ...]:
    C, F = s.shape.C, 4 * s.shape.C
    w_fc, w_proj = s.weight(F, C, scale=C**-0.5), s.weight(C, F, scale=F**-0.5)
    return s.rows(), w_fc, s.bias_of(F), w_proj, s.activation


def bias_gelu(s: Setting) -> tuple[Any, ...]:
    return s.rows(wider=4), s.bias_of(4 * s.shape.C), s.activation


def linear_cross_entropy(s: Setting) -> tuple[Any, ...]:
    x = s.shape
    return s.rows(), s.weight(x.V, x.C, scale=x.C**-0.5), s.ids(x.B, x.T), s.grad_scale()


def cross_entropy(s: Setting) -> tuple[Any, ...]:
    return s.normal(s.shape.M, s.shape.V), s.ids(s.shape.M), s.grad_scale()


def grad_norm(s: Setting) -> tuple[Any, ...]:
    return (s.normal(s.shape.N, dtype=torch.float32, grad=False),)


def adamw_(s: Setting, multiple: int = 128) -> tuple[Any, ...]:
    """Half of the buffers decay; `multiple` divides where they stop, which aligns loads or does not."""
    N = s.shape.N
    flat = [replace(s, seed=i).normal(N, dtype=torch.float32, grad=False) for i in range(4)]
    master, m, v, g = flat[0], flat[1] * 0.01, flat[2].square() * 1e-4, flat[3]
    p = None if s.dtype == torch.float32 else master.to(s.dtype)
    # clipped a little: what divides the gradient in place would soon have none left
    scalars = torch.tensor([1e-3, 10.0, 1.0, 1.0, 1.001], dtype=torch.float64, device=s.device)
    half = N // 2 // multiple * multiple
    return p, master, m, v, g, scalars, [(0, half, 0.1), (half, N, 0.0)], 0.9, 0.95
