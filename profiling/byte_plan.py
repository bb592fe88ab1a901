"""The bytes that a training step was planned to move, op by op, to hold what it launches against.

A plan of the best form: every activation in and out once, in bfloat16; GELU in its products' epilogues, logits
overwritten in place, bias gradients within passes that are made anyway. Weights and their gradients do not count: at
65,536 tokens a micro-step they are 2% of it.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

from step_launches import Launch

from nanogpt_fast.settings.config import GPTConfig

LIMIT = 1.15  # of the plan's total: what a step may move


@dataclass(frozen=True)
class Planned:
    """One op. gb: in a step of 2^19 tokens of GPT-2 124M; the rest derives it: passes over [tokens, C] in every layer
    and once, over [tokens, V], and bytes a parameter. group: of launches that it is compared with."""

    group: str
    gb: float
    layer: int = 0
    once: int = 0
    logits: int = 0
    parameter: int = 0


PRODUCTS, ATTENTION, NORM, LOSS = "products and GELU", "attention", "residual + LayerNorm", "cross-entropy"
EMBEDDING, OPTIMIZER, REST = "embedding", "gradient norm, AdamW, zeroing", "the rest"
PLAN = {
    "qkv, and its two gradients": Planned(PRODUCTS, 116.0, layer=3 * 4),  # one row in, three out, or as many
    "attention projection, and its two": Planned(PRODUCTS, 58.0, layer=3 * 2),
    "fc with GELU": Planned(PRODUCTS, 87.0, layer=1 + 4 + 4),  # y; pre is kept, act goes on
    "fc, its two gradients": Planned(PRODUCTS, 96.6, layer=2 * 5),
    "MLP projection, and the weight's gradient": Planned(PRODUCTS, 96.6, layer=2 * 5),
    "MLP projection, dgrad with dGELU": Planned(PRODUCTS, 87.0, layer=1 + 4 + 4),  # ddelta, pre; dpre
    "head, and its two gradients": Planned(PRODUCTS, 160.7, once=3, logits=3),
    "attention": Planned(ATTENTION, 38.7, layer=4),  # q, k, v; o
    "attention, backward": Planned(ATTENTION, 77.3, layer=8),  # do, o, q, k, v; dq, dk, dv
    "residual + LayerNorm": Planned(NORM, 78.9, layer=2 * 4, once=2),  # r, delta; r', y; the first adds nothing
    "residual + LayerNorm, backward": Planned(NORM, 79.7, layer=2 * 4, once=3),  # dy, dr', r'; dr
    "cross-entropy": Planned(LOSS, 105.5, logits=2),  # the logits; their gradient in their place
    "embedding, both ways": Planned(EMBEDDING, 2.4, once=3),  # a row of wte, r; dr
    "gradient norm and AdamW": Planned(OPTIMIZER, 4.0, parameter=32),  # master, m, v in and out; the gradient twice
}
GROUP_OF = {  # {first word of a Triton launch's op: group}
    "bias": PRODUCTS, "mlp": PRODUCTS, "attention": ATTENTION, "norm": NORM, "column": NORM, "cross": LOSS,
    "embedding": EMBEDDING, "grad": OPTIMIZER, "adamw": OPTIMIZER,
}  # fmt: skip


def planned_bytes(op: str, shape: GPTConfig, tokens: int, size: int = 2) -> float:
    """Of an op of PLAN, in a step of so many tokens; size: bytes of an activation."""
    plan, C = PLAN[op], shape.n_embd
    a_token = (plan.layer * shape.n_layer + plan.once) * C + plan.logits * shape.vocab_size
    return float(size * a_token * tokens + plan.parameter * shape.num_params(non_embedding=False))


def group_of(one: Launch) -> str:
    """The group of the plan that a launch belongs to."""
    if one.kind == "torch":
        return OPTIMIZER if one.name == "zero_" else REST
    return PRODUCTS if one.kind == "product" else GROUP_OF[one.name.split("_")[0]]


def compared(step: Counter[Launch], shape: GPTConfig, tokens: int, size: int = 2) -> dict[str, tuple[float, float]]:
    """{group: (bytes of a step's launches, bytes planned)}, and the total at the end."""
    launched, planned = defaultdict[str, float](float), defaultdict[str, float](float)
    for one, times in step.items():
        launched[group_of(one)] += one.work.bytes * times
    for op, plan in PLAN.items():
        planned[plan.group] += planned_bytes(op, shape, tokens, size)
    groups = (PRODUCTS, ATTENTION, NORM, LOSS, EMBEDDING, OPTIMIZER, REST)
    found = {group: (launched[group], planned[group]) for group in groups}
    return found | {"total": (sum(a for a, _ in found.values()), sum(b for _, b in found.values()))}
