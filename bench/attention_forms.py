"""A peer's attention on q, k and v as a contestant of our `attention`, whose qkv is packed: [B, T, 3, H, D].

packed    on views of it, as nanoGPT's are: the gradient is put together from three, which is part of the time
separate  on tensors that lie apart, in the layout that the peer likes best: its kernels alone
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import Bound, Contestant, plain
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # three of one layout -> [B, T, H, D]


def forms(name: str, attention: Attention, heads_first: bool) -> dict[str, Contestant]:
    """Both. heads_first: attention takes [B, H, T, D] rather than [B, T, H, D]."""
    return {name: packed(attention, heads_first), f"{name}, q k v apart": separate(attention, heads_first)}


def packed(attention: Attention, heads_first: bool) -> Contestant:
    return plain(lambda qkv, *dropout: attention(*_three(qkv, heads_first)))


def separate(attention: Attention, heads_first: bool) -> Contestant:
    def bind(qkv: Tensor, *dropout: Any) -> Bound:
        leaves = [x.contiguous().requires_grad_() for x in _three(qkv.detach(), heads_first)]

        def packed_gradient(grads: Any) -> list[Tensor]:
            return [torch.stack([g.transpose(1, 2) if heads_first else g for g in grads], dim=2)] if grads else []

        return Bound(lambda: attention(*leaves), leaves, packed_gradient)

    return Contestant(bind)


def _three(qkv: Tensor, heads_first: bool) -> list[Tensor]:
    return list(qkv.permute(2, 0, 3, 1, 4) if heads_first else qkv.permute(2, 0, 1, 3, 4))
