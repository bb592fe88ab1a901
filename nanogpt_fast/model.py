"""GPT-2, exactly: learned positions, pre-LayerNorm, tied head unless asked. Every computation is an op of `ops`.

A block carries (r, delta): the residual stream r and a branch's output delta that the next add_norm adds to it,
so that residual, bias, dropout and LayerNorm are one op. Modules and parameter names are nanoGPT's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanogpt_fast.draw import Draw, Generators, seen_in
from nanogpt_fast.graphs import Graphs
from nanogpt_fast.ops import REFERENCE, Ops, exact_device
from nanogpt_fast.settings.config import GPTConfig

EPS = 1e-5  # LayerNorm's; GPT-2's own


class _Affine(nn.Module):
    """Holder of a weight and perhaps a bias; the ops do the computing."""

    bias: nn.Parameter | None

    def __init__(self, *shape: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[0])) if bias else None)


class _Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = _Affine(3 * config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj = _Affine(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self,
        ops: Ops,
        y: Tensor,
        p: float,
        seed: Tensor | None,
        site: int,
        doc_ids: Tensor | None,
        cache: Tensor | None,
        start: int | Tensor,
        last_only: bool,
    ) -> Tensor:
        """y [B, T, C] -> delta [B, T or 1, C], without c_proj's bias, which the next add_norm adds."""
        projection = self.c_attn.weight, self.c_attn.bias, self.n_head
        if cache is None:
            o = ops.qkv_attention(y, *projection, p, seed, site, doc_ids)
        else:
            o = ops.cached_attention(y, *projection, cache, start)
        return ops.linear(o[:, -1:] if last_only else o, self.c_proj.weight)


class _MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = config.activation
        self.c_fc = _Affine(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj = _Affine(config.n_embd, 4 * config.n_embd, bias=config.bias)

    def forward(self, ops: Ops, y: Tensor, recompute: bool) -> Tensor:
        """y [B, T, C] -> delta [B, T, C], without c_proj's bias, which the next add_norm adds."""
        return ops.mlp(y, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.activation, recompute)


class _Block(nn.Module):
    def __init__(self, config: GPTConfig, index: int):
        super().__init__()
        self.site = 1 + 3 * index  # of its three dropouts' first
        self.ln_1 = _Affine(config.n_embd, bias=config.bias or config.norm_bias)
        self.attn = _Attention(config)
        self.ln_2 = _Affine(config.n_embd, bias=config.bias or config.norm_bias)
        self.mlp = _MLP(config)

    def forward(
        self,
        ops: Ops,
        r: Tensor,
        y: Tensor,
        ln: _Affine,
        p: float = 0.0,
        seed: Tensor | None = None,
        doc_ids: Tensor | None = None,
        recompute_mlp: bool = False,
        cache: Tensor | None = None,
        start: int | Tensor = 0,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream r and its norm y, [B, T, C] each, here -> at the next block, whose ln_1 is ln.

        last_only: of the last position alone, [B, 1, C], for which the others matter as keys and values only."""
        sites = (self.site, self.site + 1, self.site + 2) if cache is None else (0, 0, 0)
        delta = self.attn(ops, y, p, seed, sites[0], doc_ids, cache, start, last_only)
        r = r[:, -1:] if last_only else r
        r, y = ops.add_norm(r, delta, self.attn.c_proj.bias, self.ln_2.weight, self.ln_2.bias, EPS, p, seed, sites[1])
        delta = self.mlp(ops, y, recompute_mlp)
        return ops.add_norm(r, delta, self.mlp.c_proj.bias, ln.weight, ln.bias, EPS, p, seed, sites[2])


class _Transformer(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = _Affine(config.vocab_size, config.n_embd)
        self.wpe = _Affine(config.block_size, config.n_embd)
        self.h = nn.ModuleList(_Block(config, i) for i in range(config.n_layer))
        self.ln_f = _Affine(config.n_embd, bias=config.bias or config.norm_bias)


class GPT(nn.Module):
    """GPT(config, ops): forward gives (loss, nll), logits() the logits, generate() a continuation.

    Parameters are uninitialised until init_weights or load_state_dict; .train() switches dropout on.
    residual_dtype: of the residual stream, by default the parameters'. recompute: what backward rebuilds rather than
    keeps, "none", "mlp" (GELU's output) or "block" (all but each block's residual stream); no result changes by a bit.
    """

    def __init__(
        self,
        config: GPTConfig,
        ops: Ops = REFERENCE,
        residual_dtype: torch.dtype | None = None,
        recompute: str = "none",
    ):
        super().__init__()
        self.config, self.ops, self.residual_dtype, self.recompute = config, ops, residual_dtype, recompute
        self.transformer = _Transformer(config)
        if not config.tie_word_embeddings:
            self.lm_head = _Affine(config.vocab_size, config.n_embd)
        self.blocks: list[_Block] = list(self.transformer.h)  # type: ignore[arg-type]
        self.at_block: Callable[[int, Tensor], None] | None = None  # before block i, or the head, with its y: step.py's

    @property
    def head(self) -> Tensor:
        """The weight [V, C] that makes logits: the token embedding's, where the head is tied to it."""
        return (self.transformer.wte if self.config.tie_word_embeddings else self.lm_head).weight

    def init_weights(self, generator: torch.Generator) -> None:
        """N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 n_layer)), biases 0, LayerNorm weights 1.

        Draws what nanoGPT's construction draws, in its order: each layer's default initialisation is drawn and
        dropped, then every layer again, then the residual projections once more. So one seed gives both
        programs the same weights, and leaves the generator in the same state for the data order.
        """
        named, head, std = dict(self.transformer.named_parameters()), self.head, 0.02
        matrices = [name for name, parameter in named.items() if parameter.dim() > 1]

        def normal(parameter: Tensor, std: float) -> None:
            parameter.copy_(torch.normal(0.0, std, parameter.shape, generator=generator))

        def draw_linear_default(parameter: Tensor, bias: bool) -> None:
            torch.empty(parameter.shape).uniform_(generator=generator)
            if bias:
                torch.empty(parameter.shape[0]).uniform_(generator=generator)

        with torch.no_grad():
            for name, parameter in named.items():
                if parameter.dim() < 2:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            for name in matrices:  # the default initialisation of nn.Embedding and nn.Linear, as nanoGPT builds them
                if name.endswith(("wte.weight", "wpe.weight")):
                    normal(named[name], 1.0)
                else:
                    draw_linear_default(named[name], self.config.bias)
            draw_linear_default(head, bias=False)
            for parameter in (*(named[name] for name in matrices), head):  # tied, the head shares wte's storage
                normal(parameter, std)
            for name in matrices:
                if name.endswith("c_proj.weight"):
                    normal(named[name], std / math.sqrt(2 * self.config.n_layer))

    def crop_block_size(self, block_size: int) -> None:
        """Drop positions from block_size on, in place; the parameter becomes a new, smaller one."""
        if block_size > self.config.block_size:
            raise ValueError(f"cannot crop block_size {self.config.block_size} to {block_size}")
        self.config = replace(self.config, block_size=block_size)
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    def hidden(self, idx: Tensor, seed: Tensor | None = None, doc_ids: Tensor | None = None) -> Tensor:
        """Token ids [B, T] int64 -> the final LayerNorm's output [B, T, C]. seed: int64 [1], for dropout."""
        ops, t = self.ops, self.transformer
        if idx.size(1) > self.config.block_size:
            raise ValueError(f"sequence of {idx.size(1)} tokens, but block_size is {self.config.block_size}")
        p = self.config.dropout if self.training else 0.0
        r = ops.embedding(idx, t.wte.weight, t.wpe.weight, p, seed, 0, out_dtype=self.residual_dtype)
        y = ops.norm(r, self.blocks[0].ln_1.weight, self.blocks[0].ln_1.bias, EPS, t.wte.weight.dtype)
        rebuilt = self.recompute == "block" and torch.is_grad_enabled()
        for i in range(len(self.blocks)):
            if self.at_block is not None:
                self.at_block(i, y)
            r, y = (self._rebuilt_block if rebuilt else self._block)(i, r, y, p, seed, doc_ids)
        return y

    def _block(self, i: int, r: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return self.blocks[i](self.ops, r, y, self._norm_after(i), *rest, self.recompute == "mlp")

    def _rebuilt_block(self, i: int, r: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """_block, of which r alone is kept: backward runs it once more, on y = norm(r), which has the same bits."""
        if torch.compiler.is_compiling():  # which lets no function change `given`: y is kept too
            return checkpoint(self._block, i, r, y, *rest, use_reentrant=False, preserve_rng_state=False)
        given, ln = [y], self.blocks[i].ln_1

        def run(r: Tensor) -> tuple[Tensor, Tensor]:
            if given:
                return self._block(i, r, given.pop(), *rest)
            with torch.no_grad():
                y = self.ops.norm(r, ln.weight, ln.bias, EPS, self.transformer.wte.weight.dtype)
            return self._block(i, r, y.requires_grad_(), *rest)

        return checkpoint(run, r, use_reentrant=False, preserve_rng_state=False)

    def _norm_after(self, i: int) -> _Affine:
        return self.blocks[i + 1].ln_1 if i + 1 < len(self.blocks) else self.transformer.ln_f

    def forward(
        self,
        idx: Tensor,
        targets: Tensor,
        grad_scale: Tensor | float = 1.0,
        seed: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(loss = grad_scale * sum of nll, nll [B*T] float32, 0 where targets is -1); idx, targets [B, T] int64."""
        y = self.hidden(idx, seed, doc_ids)
        if self.at_block is not None:
            self.at_block(len(self.blocks), y)
        return self.ops.linear_cross_entropy(y, self.head, targets, grad_scale)

    def logits(self, idx: Tensor) -> Tensor:
        """[B, T] -> logits [B, T, V] in the parameters' dtype."""
        return self.ops.linear(self.hidden(idx), self.head)

    def cached_hidden(self, idx: Tensor, cache: Tensor, start: int | Tensor, last_only: bool = False) -> Tensor:
        """hidden() of idx [B, t] at positions start..., against the keys and values of those before them: cache
        [n_layer, 2, B, n_head, positions, n_embd / n_head], which receives theirs. No gradient. last_only: [B, 1, C]
        of the last position, the only one for which the last block's projection and MLP are computed."""
        ops, t = self.ops, self.transformer
        r = ops.embedding(idx, t.wte.weight, t.wpe.weight, 0.0, None, 0, start, self.residual_dtype)
        y = ops.norm(r, self.blocks[0].ln_1.weight, self.blocks[0].ln_1.bias, EPS, t.wte.weight.dtype)
        for i, block in enumerate(self.blocks):
            last = last_only and i + 1 == len(self.blocks)
            r, y = block(ops, r, y, self._norm_after(i), cache=cache[i], start=start, last_only=last)
        return y

    def _next_logits(self, idx: Tensor, cache: Tensor, start: int | Tensor) -> Tensor:
        return self.ops.linear(self.cached_hidden(idx, cache, start, True)[:, -1], self.head)

    @torch.no_grad()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: Generators = None,
        valid_vocab: int | None = None,
        graphs: Graphs | None = None,
        *,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        lengths: Sequence[int] | None = None,
        logprobs: list[Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Continue idx [B, t >= 1]: yields [B, 1] new ids, max_new_tokens times. temperature 0 takes the likeliest.

        Keys and values are cached up to block_size tokens. Past that every position moves, as learned positions
        must, so each token costs a forward over the last block_size tokens: nanoGPT's own rule. Ids from
        valid_vocab on (a padded vocabulary's) are never drawn. The generator lives on exact_device of the model's;
        with one a row, a row's ids are those it has alone. graphs replay the step of one new token; the prompt, and
        all that moves, is fed as it stands. top_p, min_p, repetition_penalty: draw.Draw's.

        lengths: tokens of each row of idx, at most block_size, the rest of it being padding. All rows stand at one
        position at any time, which learned positions, the cache and graphs want: the shortest prompt's end first,
        and then a row takes its prompt's next token while it has one. So max(lengths) - min(lengths) more steps
        are yielded, a generator a row is needed, and no row has a mask or a position that it has not alone.
        logprobs, when given, receives each yield's log-probabilities, by the model's logits as they are."""
        c, w = self.config, self.transformer.wte.weight
        shape = (c.n_layer, 2, idx.size(0), c.n_head, c.block_size, c.n_embd // c.n_head)
        cache = torch.empty(shape, dtype=w.dtype, device=w.device)
        decode = _decoding_step(self, cache.zero_(), graphs) if graphs and graphs.active else None
        draw, home = Draw(temperature, top_k, top_p, min_p, repetition_penalty), exact_device(w.device)
        own, prompts, seen = list(lengths or [idx.size(1)] * idx.size(0)), idx, None
        if repetition_penalty != 1.0:
            rows = [row[:length] for row, length in zip(idx, own)]
            seen = seen_in(rows, min(valid_vocab or w.size(0), w.size(0)), home)
        idx, cached = idx[:, : min(own)][:, -c.block_size :], 0
        for at in range(min(own), max(own) + max_new_tokens):
            if decode and cached:
                logits = decode(idx[:, cached:], cached).float()
            else:
                logits = self._next_logits(idx[:, cached:], cache, cached).float()
            logits = logits[:, :valid_vocab].to(home)
            ready = generator
            if isinstance(generator, Sequence):
                ready = [g if length <= at else None for g, length in zip(generator, own)]
            drawn = draw.ids(logits, ready, seen)
            if at < max(own):
                waiting = torch.tensor([[length > at] for length in own], device=home)
                drawn = torch.where(waiting, prompts[:, at : at + 1].to(home), drawn)
            if seen is not None:
                seen.scatter_(1, drawn, True)
            if logprobs is not None:
                logprobs.append(logits.log_softmax(-1).gather(1, drawn))
            yield (drawn := drawn.to(idx.device))
            cached = idx.size(1)
            idx = torch.cat((idx, drawn), dim=1)
            if idx.size(1) > c.block_size:
                idx, cached = idx[:, 1:], 0

    def generate(self, idx: Tensor, max_new_tokens: int, *args: Any, **kwargs: Any) -> Tensor:
        """idx [B, t] with the tokens of `stream`, whose arguments these are, appended: [B, t + max_new_tokens]."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, *args, **kwargs)], dim=1)


def _decoding_step(model: GPT, cache: Tensor, graphs: Graphs) -> Callable[[Tensor, int], Tensor]:
    """(a token [B, 1], its position) -> logits [B, V], which the next call writes over. One replayed piece: all that
    varies lies in tensors that stay, as long as the function does."""
    w, B = model.transformer.wte.weight, cache.size(2)
    token = torch.zeros((B, 1), dtype=torch.int64, device=w.device)
    position = torch.zeros(1, dtype=torch.int64, device=w.device)
    logits = torch.empty((B, w.size(0)), dtype=w.dtype, device=w.device)

    def step() -> None:
        logits.copy_(model._next_logits(token, cache, position))

    replayed = graphs.replayed("the decoding step", step)

    def decode(new: Tensor, start: int) -> Tensor:
        token.copy_(new)
        position.fill_(start)
        replayed()
        return logits

    return decode


def document_ids(idx: Tensor, eot: int) -> Tensor:
    """doc_ids, int32 [B, T], of the documents in each window of idx [B, T]: they ascend from 0, and the end-of-text
    token `eot` belongs to the document that it ends."""
    ends = (idx == eot).to(torch.int32)
    return ends.cumsum(-1, dtype=torch.int32) - ends
