"""FlashAttention-2 (PyPI: flash-attn), CUDA C++. Its packed form takes our layout [B, T, 3, H, D] and gives the packed
gradient; causal, scale 1 / sqrt(D), no dropout. dq by atomics, so not the same bits every time (ours: the same). It
takes 16 bits only."""

from flash_attn.flash_attn_interface import flash_attn_qkvpacked_func
from harness import Contestant, plain
from torch import Tensor

REQUIRES = "pip install --no-build-isolation flash-attn==2.8.3.post2"
OPS = ("attention",)


def _attention(qkv: Tensor, *dropout: object) -> Tensor:
    return flash_attn_qkvpacked_func(qkv, causal=True)


def contestants(op: str) -> dict[str, Contestant]:
    return {"FlashAttention-2": plain(_attention)} if op == "attention" else {}
