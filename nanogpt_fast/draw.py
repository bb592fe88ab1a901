"""How one token is drawn from a model's logits.

The steps are transformers' processors of these names in transformers' order, so that settings mean here what they mean
there: repetition_penalty, temperature, top_k, top_p, min_p, then one draw of the softmax. With the first, temperature
and top_k alone the draw is nanoGPT's, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# One for all rows of a batch, or one a row, so that a row's draws are its own; None: the row draws nothing now.
Generators = torch.Generator | Sequence[torch.Generator | None] | None


@dataclass(frozen=True)
class Draw:
    """The settings, each doing nothing by default. temperature 0 takes the likeliest; top_k None or 0 keeps all."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def ids(self, logits: Tensor, generator: Generators = None, seen: Tensor | None = None) -> Tensor:
        """One id a row [B, 1] from logits [B, V]. seen: bool [B, V], the ids of the text so far."""
        scores = self.penalised(logits, seen)
        if self.temperature == 0.0:
            return scores.argmax(-1, keepdim=True)
        probs = self.kept(scores / self.temperature).softmax(-1)
        if not isinstance(generator, Sequence):
            return torch.multinomial(probs, 1, generator=generator)
        ids = torch.zeros((len(probs), 1), dtype=torch.int64, device=probs.device)
        for row, own in enumerate(generator):
            if own is not None:
                ids[row] = torch.multinomial(probs[row], 1, generator=own)
        return ids

    def penalised(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """CTRL's rule (Keskar et al., 2019): what was seen becomes less likely, whatever its logit's sign."""
        if seen is None or self.repetition_penalty == 1.0:
            return logits
        less = torch.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
        return torch.where(seen, less, logits)

    def kept(self, scores: Tensor) -> Tensor:
        """Scores [B, V] with -inf at what is not drawn; the likeliest id always stays."""
        if self.top_k:
            kth = torch.topk(scores, min(self.top_k, scores.size(-1))).values[:, -1:]
            scores = scores.masked_fill(scores < kth, float("-inf"))
        if self.top_p < 1.0:  # drop the unlikeliest ids that together have at most 1 - top_p
            ascending, order = scores.sort(-1)
            dropped = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            dropped[:, -1] = False
            scores = scores.masked_fill(dropped.scatter(1, order, dropped), float("-inf"))
        if self.min_p > 0.0:
            probs = scores.softmax(-1)
            scores = scores.masked_fill(probs < self.min_p * probs.amax(-1, keepdim=True), float("-inf"))
        return scores


def seen_in(prompts: Sequence[Tensor], vocab_size: int, device: torch.device) -> Tensor:
    """bool [B, vocab_size]: the ids of each prompt [t]."""
    seen = torch.zeros((len(prompts), vocab_size), dtype=torch.bool, device=device)
    for row, ids in zip(seen, prompts):
        row[ids.to(device)] = True
    return seen
