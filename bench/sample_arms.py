"""Greedy continuation as the sampling benchmark times it: ours, stock nanoGPT's and Hugging Face's, with and without a
cache of keys and values.

ours            nanogpt_fast's generate: cached up to block_size tokens, on CUDA a token's step a replayed graph
ours, no cache  our model over the whole text for every token
nanogpt         stock nanoGPT: no cache; its generate draws from the probabilities, so its forward, which computes the
                last position's logits, is driven here by its own rule: the last block_size tokens, every token
hf              generate of transformers' GPT2LMHeadModel, do_sample off, cached
hf, no cache    the same with use_cache off

Every arm is a call (ids [B, t] on the device, new_tokens) -> ids [B, t + new_tokens], from Setup.weights, and all give
the same ids (to rounding, in 16 bits). ours and hf hold their parameters in Setup.dtype; nanogpt has float32 ones under
autocast, as its sample.py does, and on a CPU computes in float32.
"""

from collections.abc import Callable

import torch
import trainers
from step_arms import Setup
from torch import Tensor

from nanogpt_fast.errors import ConfigError, did_you_mean
from nanogpt_fast.graphs import Graphs
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import select_ops

Sampler = Callable[[Tensor, int], Tensor]
ARMS = ("ours", "ours, no cache", "nanogpt", "hf", "hf, no cache")


def make_sampler(name: str, setup: Setup, kernels: str = "reference") -> Sampler:
    """The arm of that name on the device; `kernels` as --kernels, of ours.

    ConfigError for a name nobody knows, Missing where the machine lacks something."""
    makers = {"ours": lambda: ours(setup, kernels), "nanogpt": lambda: nanogpt(setup), "hf": lambda: hf(setup)}
    makers |= {"ours, no cache": lambda: ours(setup, kernels, False), "hf, no cache": lambda: hf(setup, False)}
    if name not in makers:
        raise ConfigError(f"unknown arm {name!r}{did_you_mean(name, makers)}", expected="; ".join(ARMS))
    return makers[name]()


def cached(name: str) -> bool:
    """Whether an arm keeps keys and values."""
    return name in ("ours", "hf")


def ours(setup: Setup, kernels: str, cache: bool = True) -> Sampler:
    model = GPT(setup.shape, select_ops(kernels, setup.world.device.type))
    model.load_state_dict(setup.weights)
    model.to(setup.world.device, setup.dtype).eval()
    for parameter in model.parameters():  # vectors stay float32, as everywhere in ours
        if parameter.dim() == 1:
            parameter.data = parameter.data.float()
    if cache:
        graphs = Graphs(setup.world.device, "auto")
        return lambda ids, new_tokens: model.generate(ids, new_tokens, temperature=0.0, graphs=graphs)
    return recomputing(lambda ids: model.logits(ids)[:, -1], setup.shape.block_size)


def nanogpt(setup: Setup) -> Sampler:
    """Without the optimizer that a step's arm has."""
    model, autocast = trainers.nanogpt_model(setup).eval(), trainers.autocast_of(setup)

    def last_logits(ids: Tensor) -> Tensor:
        with autocast:
            return model(ids)[0][:, -1]

    return recomputing(last_logits, setup.shape.block_size)


def recomputing(last_logits: Callable[[Tensor], Tensor], block_size: int) -> Sampler:
    """A forward over the last block_size tokens for every new one. last_logits: ids [B, t] -> [B, V]."""

    @torch.no_grad()
    def sample(ids: Tensor, new_tokens: int) -> Tensor:
        for _ in range(new_tokens):
            ids = torch.cat((ids, last_logits(ids[:, -block_size:]).argmax(-1, keepdim=True)), dim=1)
        return ids

    return sample


def hf(setup: Setup, cache: bool = True) -> Sampler:
    """Its generate refuses to pass block_size: the arm raises ConfigError there."""
    model, _ = trainers.huggingface_model(setup)
    model = model.to(setup.dtype).eval()
    most = setup.shape.block_size

    def sample(ids: Tensor, new_tokens: int) -> Tensor:
        if ids.size(1) + new_tokens > most:
            raise ConfigError(
                "Hugging Face's generate has no positions past the block",
                expected=f"prompt and new tokens together at most {most}",
                found=str(ids.size(1) + new_tokens),
            )
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            use_cache=cache,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )

    return sample
