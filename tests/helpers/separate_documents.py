"""What a document mask must give, without one: every document by a forward of its own."""

import torch
from torch import Tensor
from torch.func import functional_call

from nanogpt_fast.model import GPT


def separately(model: GPT, idx: Tensor, targets: Tensor, eot: int, grad_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(loss, nll [B*T]) of windows [B, T], a forward a document; its positions stay where they are in the window.

    A document ends with its `eot`.
    """
    wpe = model.transformer.wpe.weight
    losses, nlls = [], []
    for row, wanted in zip(idx, targets):
        ends = [i + 1 for i, token in enumerate(row.tolist()) if token == eot]
        for start, end in zip([0, *ends], [*ends, len(row)]):
            if start < end:
                positions = {"transformer.wpe.weight": wpe[start:end]}
                document = row[None, start:end], wanted[None, start:end], grad_scale
                loss, nll = functional_call(model, positions, document)
                losses.append(loss)
                nlls.append(nll)
    return torch.stack(losses).sum(), torch.cat(nlls)
