"""apex's and Transformer Engine's FusedAdam, one interface, as a contestant of our adamw_ on flat buffers.

Not the same: it does not clip (the gradient is scaled beforehand, outside of the time, which is in its favour), and the
16-bit copy of the parameters, which training takes, is a second pass.
"""

from typing import Any

import torch
from harness import Bound, Contestant
from torch import Tensor


def contestant(FusedAdam: Any) -> Contestant:
    """FusedAdam: the optimizer's class."""

    def bind(
        p: Tensor | None, master: Tensor, m: Tensor, v: Tensor, g: Tensor, scalars: Tensor, segments: Any, *betas: float
    ) -> Bound:
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

    return Contestant(bind)
