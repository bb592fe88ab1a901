"""What torch itself has: attention by FlashAttention and cuDNN, the chunked linear_cross_entropy, the fused AdamW."""

from typing import Any

import torch
import torch.nn.functional as F
from attention_forms import Attention, forms
from harness import Bound, Contestant, plain
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

OPS = ("attention", "linear_cross_entropy", "adamw_", "grad_norm")


def _attention(backend: SDPBackend) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return attention


def _linear_cross_entropy() -> Contestant:
    nn: Any = torch.nn  # Any: type checkers beside an earlier torch do not know the names of 2.13
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise ImportError("linear_cross_entropy came with torch 2.13")

    def function(x: Tensor, w: Tensor, targets: Tensor, grad_scale: Tensor) -> Tensor:
        options = nn.LinearCrossEntropyOptions()
        total = nn.functional.linear_cross_entropy(
            x.flatten(0, -2), w, targets.flatten(), ignore_index=-1, reduction="sum", options=options
        )
        return total * grad_scale

    return plain(function)


def _adamw() -> Contestant:
    def bind(p, master, m, v, g, scalars, segments, beta1, beta2) -> Bound:
        lr, step, max_norm, _, norm = scalars.tolist()
        clip = min(1.0, max_norm / (norm + 1e-6))
        groups = []
        for start, end, decay in segments:
            parameter = torch.nn.Parameter(master[start:end])
            parameter.grad = g[start:end]
            groups.append({"params": [parameter], "weight_decay": decay})
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=1e-8, fused=True, capturable=True)
        for (start, end, _), group in zip(segments, groups):
            count = torch.tensor(step, device=g.device)
            state = {"step": count, "exp_avg": m[start:end], "exp_avg_sq": v[start:end]}
            optimizer.state[group["params"][0]] = state
        divisor = torch.tensor(
            1.0 / clip, device=g.device
        )  # clips, as GradScaler's scale does; it is written back to g
        vars(optimizer).update(grad_scale=divisor, found_inf=torch.zeros_like(divisor))

        def update() -> None:  # and the copy that training takes
            optimizer.step()
            if p is not None:
                p.copy_(master)

        return Bound(update, [])

    return Contestant(bind)


def contestants(op: str) -> dict[str, Contestant]:
    if op == "attention":
        backends = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
        found = [forms(name, _attention(backend), heads_first=True) for name, backend in backends.items()]
        return found[0] | found[1]
    if op == "linear_cross_entropy":
        return {"F.linear_cross_entropy": _linear_cross_entropy()}
    if op == "adamw_":
        return {"torch.optim.AdamW(fused)": _adamw()}
    if op == "grad_norm":
        return {"torch._foreach_norm": plain(lambda g: torch._foreach_norm([g])[0])}
    return {}
