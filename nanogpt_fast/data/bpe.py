"""Byte-level BPE as Hugging Face's GPT-2 tokenizers have it: any vocabulary, any merges, added tokens.

GPT-2's own vocabulary goes through tiktoken (tokenizer.py), which takes ids for ranks; here they may differ.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanogpt_fast.errors import DataError

EOT = "<|endoftext|>"
VOCAB_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# GPT-2's pre-tokenizer; the possessive forms match the same as the published ones and cannot backtrack.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Where a text may be cut without other tokens: a newline between visible characters is a token of its own, whatever
# surrounds it: cut after it. No token goes on over a space that follows one: cut before it. Python's \S is a part of
# PATTERN's.
BOUNDARY = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")
_SURROGATE = re.compile("[\ud800-\udfff]")


def gpt2_bytes() -> dict[str, int]:
    """{character: byte} in the order of ids: vocab.bpe writes a byte that prints as itself, then the others as the
    characters from 256 on."""
    shown = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


class BpeTokenizer:
    """vocab: {token: id}, bytes written as vocab.json does; merges: "left right" in order of rank; added: {text: id} of
    tokens that are found in a prompt as they stand, and are no bytes. Raises DataError for what is not of this form."""

    boundary = BOUNDARY

    def __init__(self, vocab: dict[str, int], merges: list[str], added: dict[str, int]):
        try:
            import regex  # tiktoken brings it
        except ImportError as error:
            raise DataError("BPE needs the package regex", hint="pip install 'nanogpt-fast[offline]'") from error
        ids = [*vocab.values(), *added.values()]
        pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else () for merge in merges]
        bad = [i for i in ids if type(i) is not int or not 0 <= i < 2**31]
        torn = [text for text in [*vocab, *added, *merges] if not isinstance(text, str) or _SURROGATE.search(text)]
        if not ids or bad or torn or any(len(pair) != 2 for pair in pairs):
            expected, found = "tokens of UTF-8 with ids, merges of two tokens", repr([*bad, *torn][:1])[:80]
            raise DataError("the BPE vocabulary is damaged", expected=expected, found=found)
        self.vocab, self.merges, self.added = vocab, merges, added
        self.vocab_size = max(ids) + 1
        self.eot = added.get(EOT, vocab.get(EOT))
        self._rank: dict[tuple[str, ...], int] = {pair: rank for rank, pair in enumerate(pairs)}
        self._char_of = {byte: char for char, byte in gpt2_bytes().items()}
        self._word: dict[str, list[int]] = {}  # a word's ids; texts repeat words
        self._pattern = regex.compile(PATTERN)
        longest_first = sorted(added, key=len, reverse=True)
        self._added_in = regex.compile("|".join(map(regex.escape, longest_first))) if added else None
        byte_of, self._bytes = gpt2_bytes(), {}
        for token, i in vocab.items():
            self._bytes[i] = bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode()
        self._bytes |= {i: text.encode() for text, i in added.items()}

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt; added tokens written in it count. Raises DataError for a byte without a token."""
        ids, end = [], 0
        for found in self._added_in.finditer(text) if self._added_in else ():
            ids += [*self._ordinary(text[end : found.start()]), self.added[found[0]]]
            end = found.end()
        return ids + self._ordinary(text[end:])

    def encode_ordinary(self, text: str) -> np.ndarray:
        """uint16 ids of text. Raises DataError where uint16 holds too little."""
        if self.vocab_size > 65536:
            raise DataError("token files of 16 bits hold no such ids", expected="65,536", found=f"{self.vocab_size:,}")
        return np.array(self._ordinary(text), dtype=np.uint16)

    def _ordinary(self, text: str) -> list[int]:
        return [i for word in self._pattern.findall(text) for i in self._ids_of(word)]

    def _ids_of(self, word: str) -> list[int]:
        if word not in self._word:
            parts = [self._char_of[byte] for byte in word.encode("utf-8", "replace")]
            while len(parts) > 1:
                ranks = [self._rank.get(pair, len(self._rank)) for pair in zip(parts, parts[1:])]
                best = min(ranks)
                if best == len(self._rank):
                    break
                at = ranks.index(best)
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            if missing := [part for part in parts if part not in self.vocab]:
                raise DataError(
                    "the vocabulary has no token for a part of the text", where=repr(word), found=missing[0]
                )
            self._word[word] = [self.vocab[part] for part in parts]
        return self._word[word]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; one that the vocabulary leaves out is U+FFFD."""
        return b"".join(self._bytes.get(int(i), "\ufffd".encode()) for i in ids).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray:
        """int64 [vocab_size], bytes of text behind each id; 0 for added ones."""
        sizes, special = np.zeros(self.vocab_size, dtype=np.int64), set(self.added.values())
        for i, text in self._bytes.items():
            sizes[i] = 0 if i in special else len(text)
        return sizes

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bpe", "vocab": self.vocab, "merges": self.merges, "added": self.added}


def extends_gpt2(value: dict[str, Any]) -> bool:
    """Whether a tokenizer of kind bpe is GPT-2's 50,257 tokens, by the merges that vocab.bpe lists, and maybe more."""
    vocab, merges, added = value.get("vocab") or (), value.get("merges") or (), value.get("added") or {}
    if value.get("kind") != "bpe" or len(vocab) != 50256 or dict(added).get(EOT) != 50256:
        return False
    text = "\n".join(["#version: 0.2", *map(str, merges), ""])
    return hashlib.sha256(text.encode()).hexdigest() == VOCAB_SHA256
