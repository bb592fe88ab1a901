"""The README.md of an exported model: what it is, what it was trained on, how to load it.

It is meant to be published, so it holds nothing of the machine: no paths, no names of hosts or users.
"""

import math
import re
from typing import Any

from nanogpt_fast.weights.canonical import Weights
from nanogpt_fast.weights.destination import CARD_MARK

_HEADER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- nanogpt_fast
---
"""

_USE = """\
```python
from transformers import {imports}

model = AutoModelForCausalLM.from_pretrained("FOLDER")
{tokenizer}```
"""

_GGUF = """\
Readers of GGUF compute GPT-2's GELU in its tanh form whatever `activation_function` says; this model was trained with
the exact one, so there its logits come out slightly different (by 3e-4 on a small model).
"""


def model_card(weights: Weights, has_tokenizer: bool) -> str:
    """Markdown. Rows whose values are not known are left out."""
    c = weights.model_args
    shape = [
        ("parameters", f"{c.num_params():,} (position embedding not counted)"),
        ("layers, heads, width", f"{c.n_layer}, {c.n_head}, {c.n_embd}"),
        ("context", f"{c.block_size} tokens"),
        ("vocabulary", f"{weights.used_vocab} tokens"),
        ("activation", {"gelu": "GELU, exact (erf)", "gelu_tanh": "GELU, tanh form"}[c.activation]),
        ("biases", "yes" if c.bias else "in LayerNorm (others: zeros)" if c.norm_bias else "none (stored as zeros)"),
    ]
    if not c.tie_word_embeddings:
        shape.append(("output head", "a weight of its own, not the token embedding"))
    if has_tokenizer:
        imports, tokenizer, note = (
            "AutoModelForCausalLM, AutoTokenizer",
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n',
            "",
        )
    else:
        imports, tokenizer, note = "AutoModelForCausalLM", "", _no_tokenizer(weights)
    parts = [
        _HEADER,
        f"# GPT, {c.num_params() / 1e6:.1f}M parameters\n",
        f"{CARD_MARK}; loads as `GPT2LMHeadModel`.\n",
        _table(shape),
        "## Training\n",
        _table(_training(weights)) if _training(weights) else "Nothing about the training is known.\n",
        "## Use\n",
        _USE.format(imports=imports, tokenizer=tokenizer) + note,
    ]
    if c.activation == "gelu":
        parts.append(_GGUF)
    return "\n".join(parts)


def _training(weights: Weights) -> list[tuple[str, str]]:
    run: dict[str, Any] = weights.config
    rows = []
    if re.fullmatch(r"[\w.-]+", str(run.get("dataset", ""))):  # a name; a glob of shards would tell where they lie
        rows.append(("dataset", str(run["dataset"])))
    if weights.step:
        rows.append(("iterations", f"{weights.step:,}"))
    batch = [run.get(key) for key in ("gradient_accumulation_steps", "batch_size", "block_size")]
    if all(isinstance(n, int) for n in batch):
        tokens = math.prod(batch)  # type: ignore[arg-type]
        rows.append(("tokens an iteration", f"{tokens:,}"))
        if weights.step:
            samples = weights.state.get("samples_seen")  # ours counted them, and a batch ramp with them
            seen = samples * run["block_size"] if isinstance(samples, int) else tokens * weights.step
            rows.append(("tokens seen", f"{seen:,}"))
    # nanoGPT starts its best at 1e9: such a value was never measured
    if math.isfinite(weights.best_val_loss) and weights.best_val_loss < 1e9:
        rows.append(("best validation loss", f"{weights.best_val_loss:.4f}"))
    numbers = ("learning_rate", "weight_decay", "beta1", "beta2", "dropout")
    rows += [(key, str(run[key])) for key in numbers if isinstance(run.get(key), (int, float))]
    return rows


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]) + "\n"


def _no_tokenizer(weights: Weights) -> str:
    if weights.tokenizer and weights.tokenizer.get("kind") == "char":
        return (
            "\nThere is no transformers tokenizer here: this model reads characters, one of which UTF-8 cannot hold.\n"
            "`meta.json` lists them: `itos[id]` is the character of an id.\n"
        )
    return "\nThere is no tokenizer here; use the one whose ids the model was trained on.\n"
