"""GPT: nanoGPT's construction, GPT-2's function, and nothing computed outside the ops."""

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nanogpt_fast.model import GPT
from nanogpt_fast.ops import OP_NAMES, REFERENCE, Ops
from nanogpt_fast.settings.config import GPTConfig

TINY = GPTConfig(block_size=8, vocab_size=37, n_layer=3, n_head=2, n_embd=16, bias=True)


def build(config: GPTConfig = TINY, seed: int = 0, ops: Ops = REFERENCE) -> GPT:
    model = GPT(config, ops)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def tokens(*shape: int, seed: int = 0, vocab: int = 37) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---- construction ----


def built_like_nanogpt(c: GPTConfig) -> dict[str, Tensor]:
    """GPT-2 from nn.Embedding and nn.Linear, made and initialised in nanoGPT's order on the default generator."""

    def linear(n_in: int, n_out: int) -> nn.Linear:
        return nn.Linear(n_in, n_out, bias=c.bias)

    C, made = c.n_embd, {}
    made["transformer.wte"], made["transformer.wpe"] = nn.Embedding(c.vocab_size, C), nn.Embedding(c.block_size, C)
    for i in range(c.n_layer):
        made[f"transformer.h.{i}.attn.c_attn"], made[f"transformer.h.{i}.attn.c_proj"] = linear(C, 3 * C), linear(C, C)
        made[f"transformer.h.{i}.mlp.c_fc"], made[f"transformer.h.{i}.mlp.c_proj"] = linear(C, 4 * C), linear(4 * C, C)
    made["lm_head"] = nn.Linear(C, c.vocab_size, bias=False)
    if c.tie_word_embeddings:
        made["transformer.wte"].weight = made["lm_head"].weight
    for module in made.values():
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    for name, module in made.items():
        if name.endswith("c_proj"):
            nn.init.normal_(module.weight, mean=0.0, std=0.02 / math.sqrt(2 * c.n_layer))
    if c.tie_word_embeddings:
        del made["lm_head"]
    weights = {f"{n}.{k}": p.detach() for n, m in made.items() for k, p in m.named_parameters()}
    norms = [f"transformer.h.{i}.ln_{j}" for i in range(c.n_layer) for j in (1, 2)] + ["transformer.ln_f"]
    weights |= {f"{n}.weight": torch.ones(C) for n in norms}
    return weights | ({f"{n}.bias": torch.zeros(C) for n in norms} if c.bias or c.norm_bias else {})


# What a model may have beside GPT-2's biases in all layers and tied head.
VARIANTS: dict[str, dict[str, bool]] = {
    "GPT-2": {},
    "no biases": {"bias": False},
    "LayerNorm biases": {"bias": False, "norm_bias": True},
    "own head": {"tie_word_embeddings": False},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@variants
@pytest.mark.parametrize("n_embd", [2, 16], ids=["small tensors", "vectorised draws"])
def test_init_is_nanogpts_bit_for_bit(variant: dict[str, bool], n_embd: int):
    """torch draws tensors below 16 elements by another path; the generator's state after decides the data order."""
    config = dataclasses.replace(TINY, **variant, n_embd=n_embd)
    torch.manual_seed(1337)
    want = built_like_nanogpt(config)
    generator = torch.Generator().manual_seed(1337)
    model = GPT(config)
    model.init_weights(generator)
    got = dict(model.named_parameters())
    assert set(got) == set(want)
    assert [n for n in got if not torch.equal(got[n], want[n])] == []
    assert torch.equal(torch.randint(10**6, (50,), generator=generator), torch.randint(10**6, (50,)))


@variants
def test_parameters_come_in_the_documented_order(variant: dict[str, bool]):
    config = dataclasses.replace(TINY, **variant)
    assert {n: tuple(p.shape) for n, p in GPT(config).named_parameters()} == config.parameter_shapes()
    assert list(GPT(config).state_dict()) == list(config.parameter_shapes())


FIGURES = [  # shape, biases, vocabulary, parameters without and with positions
    ((12, 12, 768), False, 50304, 123_587_328, 124_373_760),
    ((12, 12, 768), True, 50257, 123_653_376, 124_439_808),
    ((24, 16, 1024), True, 50257, 353_774_592, 354_823_168),
    ((36, 20, 1280), True, 50257, 772_719_360, 774_030_080),
    ((48, 25, 1600), True, 50257, 1_555_972_800, 1_557_611_200),
]


@pytest.mark.parametrize(("shape", "bias", "vocab", "without", "total"), FIGURES, ids=lambda v: str(v))
def test_num_params_are_the_published_figures(shape: Any, bias: bool, vocab: int, without: int, total: int):
    n_layer, n_head, n_embd = shape
    config = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=bias, vocab_size=vocab)
    assert (config.num_params(), config.num_params(non_embedding=False)) == (without, total)


def test_num_params_counts_the_parameters():
    model = build()
    assert model.config.num_params(non_embedding=False) == sum(p.numel() for p in model.parameters())
    assert model.config.num_params() == model.config.num_params(non_embedding=False) - 8 * 16


# ---- the function ----


def gpt2_logits(p: dict[str, Tensor], c: GPTConfig, idx: Tensor) -> Tensor:
    """GPT-2 in float64, layer by layer, from its paper's description; p are a model's named parameters."""

    def norm(x: Tensor, name: str) -> Tensor:
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return y * p[f"{name}.weight"] + p.get(f"{name}.bias", 0.0)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)

    def gelu(x: Tensor) -> Tensor:
        if c.activation == "gelu":
            return x * 0.5 * (1 + torch.erf(x / 2**0.5))
        return x * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))

    p = {name: tensor.detach().double() for name, tensor in p.items()}
    B, T = idx.shape
    later = torch.ones(T, T).triu(1).bool()
    x = p["transformer.wte.weight"][idx] + p["transformer.wpe.weight"][:T]
    for i in range(c.n_layer):
        h = f"transformer.h.{i}"
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, dim=-1)
        heads = []
        for s in torch.arange(c.n_embd).chunk(c.n_head):
            scores = q[..., s] @ k[..., s].transpose(1, 2) / len(s) ** 0.5
            heads.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v[..., s])
        x = x + linear(torch.cat(heads, -1), f"{h}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    return linear(norm(x, "transformer.ln_f"), "transformer.wte" if c.tie_word_embeddings else "lm_head")


def randomised(config: GPTConfig) -> GPT:
    """Every parameter random and large, so that a swapped bias or a missing norm shows."""
    model, generator = GPT(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@variants
def test_logits_are_gpt2s(variant: dict[str, bool], activation: str):
    config = dataclasses.replace(TINY, **variant, activation=activation)
    model, idx = randomised(config).double().eval(), tokens(2, 8)
    want = gpt2_logits(dict(model.named_parameters()), config, idx)
    torch.testing.assert_close(model.logits(idx), want, rtol=1e-10, atol=1e-10)


@variants
def test_loss_is_the_cross_entropy_of_the_logits(variant: dict[str, bool]):
    config = dataclasses.replace(TINY, **variant)
    model, idx, targets = randomised(config).double().eval(), tokens(2, 8), tokens(2, 8, seed=1)
    targets[0, :3] = -1
    loss, nll = model(idx, targets, grad_scale=0.25)
    logp = gpt2_logits(dict(model.named_parameters()), config, idx).log_softmax(-1)
    want = torch.where(targets >= 0, -logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0], 0.0)
    torch.testing.assert_close(nll, want.flatten())
    torch.testing.assert_close(loss, want.sum() * 0.25)


def test_crop_block_size():
    model, idx = randomised(TINY).eval(), tokens(2, 5)
    before = model.logits(idx)
    model.crop_block_size(5)
    assert model.config.block_size == 5 and model.transformer.wpe.weight.shape == (5, 16)
    assert torch.equal(model.logits(idx), before)
    assert model.config.num_params(non_embedding=False) == sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="6 tokens, but block_size is 5"):
        model.logits(tokens(1, 6))
    with pytest.raises(ValueError, match="cannot crop block_size 5 to 6"):
        model.crop_block_size(6)


# ---- dropout ----


def test_dropout_acts_in_training_mode_only_and_follows_the_seed():
    model = randomised(dataclasses.replace(TINY, dropout=0.3))
    plain = randomised(TINY)
    idx, seed = tokens(2, 8), torch.tensor([4])
    assert torch.equal(model.eval().hidden(idx), plain.hidden(idx))
    model.train()
    assert torch.equal(model.hidden(idx, seed), model.hidden(idx, seed))
    assert not torch.equal(model.hidden(idx, seed), model.hidden(idx, seed + 1))
    assert not torch.equal(model.hidden(idx, seed), plain.hidden(idx))


def test_every_dropout_has_its_own_site():
    """One site used twice would drop the same elements in two places: 1 + 3 a layer must all differ."""
    sites: list[int] = []

    def spy(name: str) -> Any:
        op, at = getattr(REFERENCE, name), {"embedding": 5, "add_norm": 8, "qkv_attention": 6}[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            sites.append(args[at])
            return op(*args, **kwargs)

        return call

    ops = dataclasses.replace(REFERENCE, **{n: spy(n) for n in ("embedding", "add_norm", "qkv_attention")})
    build(dataclasses.replace(TINY, dropout=0.1), ops=ops).train().hidden(tokens(1, 4), torch.tensor([1]))
    assert sorted(sites) == list(range(1 + 3 * TINY.n_layer))


# ---- nothing but ops ----


class Outside(TorchFunctionMode):
    """Records the torch functions called while no op is running."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.seen, self.ops = 0, Counter[str](), Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.depth == 0:
            self.seen[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))

    def wrapped(self) -> Ops:
        def wrap(name: str) -> Any:
            def op(*args: Any, **kwargs: Any) -> Any:
                self.ops[name] += 1
                self.depth += 1
                try:
                    return getattr(REFERENCE, name)(*args, **kwargs)
                finally:
                    self.depth -= 1

            return op

        return Ops(**{name: wrap(name) for name in OP_NAMES})


def test_forward_computes_in_ops_alone():
    watch = Outside()
    model = build(dataclasses.replace(TINY, dropout=0.1), ops=watch.wrapped()).train()
    idx, targets, seed = tokens(2, 8), tokens(2, 8, seed=1), torch.tensor([1])
    with watch:
        model(idx, targets, 0.1, seed)
    L = TINY.n_layer
    assert watch.ops == {
        "embedding": 1, "norm": 1, "qkv_attention": L, "linear": L, "add_norm": 2 * L, "mlp": L,
        "linear_cross_entropy": 1,
    }  # fmt: skip
    assert set(watch.seen) <= {"size", "__get__"}, watch.seen  # __get__: the weights' dtype


def test_a_cached_token_computes_in_ops_alone():
    watch = Outside()
    model = build(ops=watch.wrapped())
    idx, cache = tokens(1, 3), torch.empty(TINY.n_layer, 2, 1, 2, 8, 8)
    with torch.no_grad(), watch:
        model._next_logits(idx, cache, 0)
    assert watch.ops["cached_attention"] == TINY.n_layer and watch.ops["qkv_attention"] == 0
    assert set(watch.seen) <= {"size", "__get__", "__getitem__"}, watch.seen
