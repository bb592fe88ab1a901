"""FlashAttention-3, CUDA C++ for Hopper, built from the folder hopper/ of its repository. Its packed form takes our
layout [B, T, 3, H, D] and gives the packed gradient; causal, scale 1 / sqrt(D). dq by atomics, so not the same bits
every time (ours: the same). It takes 16 bits only."""

from flash_attn_interface import flash_attn_qkvpacked_func
from harness import Contestant, plain
from torch import Tensor

REQUIRES = "python setup.py install in hopper/ of a checkout of Dao-AILab/flash-attention (written against 0251105a2f)"
OPS = ("attention",)


def _attention(qkv: Tensor, *dropout: object) -> Tensor:
    return flash_attn_qkvpacked_func(qkv, causal=True)


def contestants(op: str) -> dict[str, Contestant]:
    return {"FlashAttention-3": plain(_attention)} if op == "attention" else {}
