"""nanoGPT's algorithm written a second time with torch.nn and torch.optim alone, for tests to compare with.

One generator (torch's global one, seeded with `seed`) gives the initial weights, the batches and the evaluations, in
nanoGPT's order: construction, first batch, then per iteration the evaluation when due and the next batch.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_fast.settings.config import GPTConfig


class Block(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        C = c.n_embd
        self.n_head = c.n_head
        self.ln_1 = nn.LayerNorm(C, bias=c.bias)
        self.c_attn, self.attn_proj = nn.Linear(C, 3 * C, c.bias), nn.Linear(C, C, c.bias)
        self.ln_2 = nn.LayerNorm(C, bias=c.bias)
        self.c_fc, self.mlp_proj = nn.Linear(C, 4 * C, c.bias), nn.Linear(4 * C, C, c.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).split(C, 2))
        scores = q @ k.transpose(2, 3) / math.sqrt(C // self.n_head)
        causal = torch.full((T, T), -torch.inf, dtype=x.dtype).triu(1)
        x = x + self.attn_proj(((scores + causal).softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class Twin(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.config = c
        self.wte, self.wpe = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd, bias=c.bias)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.wte.weight = self.head.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0.0, 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("_proj.weight"):
                nn.init.normal_(parameter, 0.0, 0.02 / math.sqrt(2 * c.n_layer))

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe.weight[: idx.size(1)]
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.head(self.ln_f(x)).flatten(0, 1), targets.flatten(), ignore_index=-1)

    def named(self) -> dict[str, Tensor]:
        """Parameters by nanoGPT's names, without the tied head."""
        places = {"attn_proj": "attn.c_proj", "mlp_proj": "mlp.c_proj", "c_attn": "attn.c_attn", "c_fc": "mlp.c_fc"}
        out = {}
        for name, parameter in self.named_parameters():
            for ours, theirs in places.items():
                name = name.replace(f".{ours}.", f".{theirs}.")
            out[f"transformer.{name}"] = parameter
        return out


def train_twin(
    c: GPTConfig, splits: dict[str, np.ndarray], *, batch_size: int, iterations: int, accumulation: int = 1,
    lr: Any, eval_interval: int, eval_iters: int, seed: int = 1337, betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1, grad_clip: float = 1.0,
) -> tuple[Twin, list[list[float]], dict[int, dict[str, float]]]:  # fmt: skip
    """(model, losses [iteration][micro-batch], {iteration: {split: mean loss}}); lr maps an iteration to its rate."""
    torch.manual_seed(seed)
    model, T = Twin(c), c.block_size

    def batch(split: str) -> tuple[Tensor, Tensor]:
        data = splits[split]
        starts = torch.randint(len(data) - T, (batch_size,))
        rows = torch.stack([torch.from_numpy(data[i : i + T + 1].astype(np.int64)) for i in starts.tolist()])
        return rows[:, :-1], rows[:, 1:]

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=lr(0), betas=betas)
    losses: list[list[float]] = []
    evals: dict[int, dict[str, float]] = {}
    x, y = batch("train")
    for iteration in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = lr(iteration)
        if iteration % eval_interval == 0:
            with torch.no_grad():
                evals[iteration] = {
                    split: float(np.mean([model(*batch(split)).item() for _ in range(eval_iters)]))
                    for split in ("train", "val")
                }
        losses.append([])
        for _ in range(accumulation):
            loss = model(x, y) / accumulation
            losses[-1].append(loss.item() * accumulation)
            x, y = batch("train")
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model, losses, evals
