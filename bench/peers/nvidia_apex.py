"""NVIDIA's apex: FusedLayerNorm and FusedAdam. PyPI's `apex` is a web toolkit, so ours is told by compiled modules."""

from typing import Any

import amp_C  # noqa: F401  (built with --cuda_ext)
import fused_layer_norm_cuda  # noqa: F401  (likewise)
import torch
from apex.normalization.fused_layer_norm import fused_layer_norm_affine
from apex.optimizers import FusedAdam
from harness import Bound, Contestant
from torch import Tensor


def _bind_norm(r: Tensor, w: Tensor, b: Tensor | None, eps: float = 1e-5) -> Bound:
    if b is None:
        raise ValueError("apex's LayerNorm needs a bias")
    narrow = [x.detach().to(r.dtype).requires_grad_() for x in (w, b)]  # its result has the weight's dtype

    def forward() -> Tensor:
        return fused_layer_norm_affine(r, *narrow, (r.size(-1),), eps)

    return Bound(forward, [r, *narrow])


def _bind_adamw(
    p: Any, master: Tensor, m: Tensor, v: Tensor, g: Tensor, scalars: Tensor, segments: Any, *betas
) -> Bound:
    """It does not clip: the gradient is scaled beforehand, outside of the time, which is in its favour."""
    lr, step, max_norm, _, norm = scalars.tolist()
    g.mul_(min(1.0, max_norm / (norm + 1e-6)))
    groups = []
    for start, end, decay in segments:
        parameter = torch.nn.Parameter(master[start:end])
        parameter.grad = g[start:end]
        groups.append({"params": [parameter], "weight_decay": decay})
    optimizer = FusedAdam(groups, lr=lr, betas=betas, eps=1e-8, adam_w_mode=True, capturable=True)
    for (start, end, _), group in zip(segments, optimizer.param_groups):
        group["step"] = torch.tensor([int(step)], dtype=torch.int, device=g.device)
        optimizer.state[group["params"][0]] = {"exp_avg": m[start:end], "exp_avg_sq": v[start:end]}

    def update() -> None:
        optimizer.step()
        if p is not None:
            p.copy_(master)

    return Bound(update, [])


def contestants(op: str) -> dict[str, Contestant]:
    binds = {"norm": _bind_norm, "adamw_": _bind_adamw}
    return {"apex": Contestant(binds[op])} if op in binds else {}
