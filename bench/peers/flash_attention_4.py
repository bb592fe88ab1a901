"""FlashAttention-4 (PyPI: flash-attn-4), CuTe DSL, Hopper and Blackwell: compiles itself at the first call. It takes q,
k, v [B, T, H, D], causal, scale 1 / sqrt(D), and has no packed form: on our packed layout the gradient is put together
from three. dq by atomics, so not the same bits every time (ours: the same). It takes 16 bits only."""

from attention_forms import forms
from flash_attn.cute import flash_attn_func
from harness import Contestant
from torch import Tensor

REQUIRES = "pip install --pre 'flash-attn-4[cu13]==4.0.0b36' (without [cu13] beside CUDA 12)"
OPS = ("attention",)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, causal=True)[0]  # and the log of the sums


def contestants(op: str) -> dict[str, Contestant]:
    return forms("FlashAttention-4", _attention, heads_first=False) if op == "attention" else {}
