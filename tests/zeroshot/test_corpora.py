"""Perplexities by every convention, of models whose probabilities are known; what is read of a file."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from known_model import known_model
from task_texts import write_task_texts

from nanogpt_fast.data.tokenizer import CharTokenizer
from nanogpt_fast.errors import DataError
from nanogpt_fast.zeroshot import corpora
from nanogpt_fast.zeroshot.corpora import CORPORA, Text, figures, losses_of, read, total
from nanogpt_fast.zeroshot.likelihood import Loss
from nanogpt_fast.zeroshot.task_files import Found

V = 32
TOKENIZER = CharTokenizer(["\n", *" abcdefghijklmnopqrstuvwxyz'<>.,"][:V])


def found(task: str, path: Path) -> Found:
    return Found(CORPORA[task].wanted, path)


def told(done: int, of: int) -> None: ...


@pytest.mark.parametrize("task", ["ptb", "1bw", "text8", "enwik8"])
def test_a_uniform_model_pays_log_v_a_token(task: str, tmp_path: Path):
    """So whatever the loss is divided by, the figure is V to the power of tokens over that."""
    (tmp_path / "x").write_text("a cat did n't sit .\nthe cats ' house\n")
    text = read(CORPORA[task], found(task, tmp_path / "x"))
    losses = losses_of(text.documents, known_model(V), TOKENIZER, block_size=16, stride=16, told=told)
    by_metric = {figure.metric: figure for figure in figures(task, text, losses)}
    original = "a cat did n't sit .\nthe cats ' house\n"
    joined = {
        "ptb": "a cat didn't sit .\nthe cats' house",
        "1bw": "a cat did n't sit.the cats' house",  # two documents: the end of line is in neither
    }.get(task, original)
    tokens = len(joined)
    assert by_metric["perplexity/token"].value == pytest.approx(V, rel=1e-5)
    if task in ("ptb", "1bw"):
        words = 6 + 4
        assert by_metric["perplexity/word"].value == pytest.approx(V ** (tokens / words), rel=1e-5)
        assert by_metric["perplexity/original"].value == pytest.approx(V ** (tokens / (words + 2)), rel=1e-5)
        assert [by_metric[f"perplexity/{x}"].count for x in ("token", "original", "word")] == [tokens, 12, 10]
    bits = by_metric["bits/character" if task == "text8" else "bits/byte"]
    assert bits.value == pytest.approx(tokens * 5 / len(original), rel=1e-5)  # V = 2^5
    assert bits.count == len(original)


def test_errors_are_those_of_a_ratio():
    """Documents of unlike lengths: the spread of what each adds beyond its share, n - 1 in the denominator."""
    losses = [Loss(i, float(nll), tokens) for i, (nll, tokens) in enumerate([(10, 4), (6, 3), (9, 2), (20, 6)] * 10)]
    nll, tokens, spread = total(losses)
    left = [loss.nll - nll / tokens * loss.tokens for loss in losses]
    assert (nll, tokens) == (450.0, 150)
    assert spread == pytest.approx(math.sqrt(40 / 39 * sum(x * x for x in left)))
    few = [replace_document(loss, 0) for loss in losses]  # one document: its windows say it
    assert total(few) == total(losses)
    text = Text([], original=100, words=90, bytes=500, characters=480, note="")
    by_metric = {figure.metric: figure for figure in figures("ptb", text, losses)}
    assert by_metric["perplexity/word"].stderr == pytest.approx(math.exp(5.0) * spread / 90)
    assert by_metric["bits/byte"].stderr == pytest.approx(spread / 500 / math.log(2))
    assert math.isnan(total(losses[:1])[2]), "one window says nothing of its spread"


def replace_document(loss: Loss, document: int) -> Loss:
    return loss._replace(document=document)


def test_the_last_bytes_begin_and_end_with_whole_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "enwik8").write_bytes(b"x" * 50 + "ééé<tag/>€€".encode()[1:-1])  # cut within é and €
    monkeypatch.setattr(corpora, "LAST_BYTES", 16)
    text = read(CORPORA["enwik8"], found("enwik8", tmp_path / "enwik8"))
    assert text.documents == ["éé<tag/>€"]
    assert (text.bytes, text.characters, text.note) == (13, 9, "the last 13 bytes")
    (tmp_path / "enwik8").write_bytes(b"good \xff\xfe bad")
    with pytest.raises(DataError, match="not UTF-8") as refused:
        read(CORPORA["enwik8"], found("enwik8", tmp_path / "enwik8"))
    assert "byte 5" in refused.value.where


def test_what_is_not_the_whole_test_set_says_so(tmp_path: Path):
    path = write_task_texts(tmp_path)["ptb"]
    assert "41 tokens, not the test set's 82,430" in read(CORPORA["ptb"], found("ptb", path)).note
    whole = replace(CORPORA["ptb"], published=41)
    assert read(whole, found("ptb", path)).note == "PTB's detokenizer is undone in 3 of 3 lines"
    assert read(whole, found("ptb", path), limit=1).words == 6


def test_an_empty_text_is_refused(tmp_path: Path):
    (tmp_path / "empty").write_text("\n \n")
    for task in ("ptb", "enwik8"):
        (tmp_path / "enwik8").write_bytes(b"")
        with pytest.raises(DataError, match="the text is empty"):
            read(CORPORA[task], found(task, tmp_path / ("empty" if task == "ptb" else "enwik8")))
