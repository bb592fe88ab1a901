"""Scores of splits as a table or JSON lines, nanoGPT's published losses beside them."""

import json
from typing import Any, NamedTuple

from nanogpt_fast.columns import columns
from nanogpt_fast.scoring import Score

# Losses on OpenWebText that nanoGPT's README publishes for OpenAI's weights, by nanoGPT's random batches.
PUBLISHED = {
    "gpt2": {"train": 3.11, "val": 3.12},
    "gpt2-medium": {"train": 2.85, "val": 2.84},
    "gpt2-large": {"train": 2.66, "val": 2.67},
    "gpt2-xl": {"train": 2.56, "val": 2.54},
}


class Row(NamedTuple):
    """One line of the report."""

    split: str
    score: Score
    seconds: float


def json_lines(facts: dict[str, Any], rows: list[Row], published: dict[str, float]) -> list[str]:
    """One JSON object a split."""
    lines = []
    for split, result, seconds in rows:
        figures = {
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "tokens": result.tokens,
            "text_bytes": result.text_bytes or None,
            "published_loss": published.get(split),
            "seconds": seconds,
        }
        lines.append(json.dumps({"split": split, **facts, **figures}))
    return lines


def table(facts: dict[str, Any], rows: list[Row], published: dict[str, float]) -> list[str]:
    """What was evaluated, then a line a split."""
    order = "random batches" if facts["mode"] == "random" else "every token once, in order"
    windows = f"windows of {facts['block_size']}" + (
        f", {facts['stride']} apart" if facts["stride"] < facts["block_size"] else ""
    )
    windows += ", attention inside documents" * facts["document_mask"]
    lines = [
        f"model   {facts['model']}",
        f"data    {facts['data']}: {order}, {windows}",
        f"device  {facts['device']}, {facts['dtype']}",
        "",
    ]
    header = ["split", "loss", "perplexity", "bits/byte", "tokens", "tokens/s"] + ["published loss"] * bool(published)
    cells = [header]
    for split, result, seconds in rows:
        bits = result.bits_per_byte
        cells.append(
            [
                split,
                f"{result.loss:.4f}",
                f"{result.perplexity:,.3f}",
                "n/a" if bits is None else f"{bits:.4f}",
                f"{result.tokens:,}",
                f"{result.tokens / seconds:,.0f}",
            ]
            + [f"{published[split]:.2f}" if split in published else "n/a"] * bool(published)
        )
    return lines + columns(cells, left=0) + ["published: nanoGPT's README, by its random batches"] * bool(published)
