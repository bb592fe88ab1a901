"""LAMBADA's three ways to be right, and the choices of the Children's Book Test."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from known_model import known_model
from task_texts import CHOICES, LAMBADA, LAMBADA_ROWS, cbt

from nanogpt_fast.data.tokenizer import CharTokenizer, gpt2_tokenizer
from nanogpt_fast.errors import DataError
from nanogpt_fast.model import GPT
from nanogpt_fast.settings.config import GPTConfig
from nanogpt_fast.zeroshot import cloze
from nanogpt_fast.zeroshot.cloze import CLOZES, Question, choices_of, from_row, lambada_figures, last_word, parse
from nanogpt_fast.zeroshot.likelihood import Answer, Request
from nanogpt_fast.zeroshot.task_files import Found

GPT2 = gpt2_tokenizer()


def told(done: int, of: int) -> None: ...


def answer(logprobs: list[float], likeliest: list[int], unbarred: int) -> Answer:
    return Answer(np.array(logprobs), np.array(likeliest), np.array([unbarred]))


def test_a_last_word_of_several_tokens():
    request = last_word("He thanked Mr. Quzzlewick", GPT2, "here")
    assert GPT2.decode(request.continuation) == " Quzzlewick" and len(request.continuation) > 2
    assert GPT2.decode(request.prefix) == "He thanked Mr."
    with pytest.raises(DataError, match="no last word"):
        last_word("alone", GPT2, "here")


def test_three_ways_to_be_right():
    requests = [Request([0], [5, 6]), Request([0], [5, 6]), Request([0], [7]), Request([0], [8, 9])]
    given = [
        answer([-1.0, -2.0], [5, 6], 5),  # the whole word
        answer([-3.0, -1.0], [4, 6], 5),  # its last token; the whole, once what came first is barred
        answer([-2.0], [1], 7),  # only when a stop word is barred
        answer([-3.0, -1.0], [2, 1], 8),  # not at all: its first token alone, were stop words barred
    ]
    by_metric = {figure.metric: figure for figure in lambada_figures(requests, given)}
    shares = [by_metric[f"accuracy/{way}"].value for way in ("word", "token", "filtered")]
    assert shares == [0.25, 0.5, 0.75]
    assert by_metric["accuracy/token"].stderr == pytest.approx(math.sqrt(0.25 / 3))
    assert by_metric["perplexity/word"].value == pytest.approx(math.exp((3 + 4 + 2 + 4) / 4))
    assert by_metric["perplexity/token"].value == pytest.approx(math.exp((2 + 1 + 2 + 1) / 4))
    nll = np.array([3, 4, 2, 4])
    assert by_metric["perplexity/word"].stderr == pytest.approx(math.exp(3.25) * nll.std(ddof=1) / 2)


def test_stop_words_are_tokens_with_their_space():
    shape = GPTConfig(vocab_size=50257, n_embd=1, n_layer=1, n_head=1, block_size=4)
    full = cloze.stop_tokens(GPT2, GPT(shape))
    texts = {GPT2.decode([i]) for i in torch.nonzero(full)[:, 0].tolist()}
    assert {" the", " The", " her", " cannot"} <= texts and " signs" not in texts
    assert all(text.strip().lower() in cloze.STOP_WORDS.split() for text in texts)


def test_both_forms_of_lambada(tmp_path: Path):
    itos = sorted({*"".join(row["text"] for row in LAMBADA_ROWS), *LAMBADA, "\n"})
    tokenizer, model = CharTokenizer(itos), known_model(len(itos), block_size=256)
    (tmp_path / "lambada_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LAMBADA_ROWS))
    (tmp_path / "lambada_test_plain_text.txt").write_text(LAMBADA)
    for name, note, lengths in (
        ("lambada_test.jsonl", "3 examples, not all 5,153, OpenAI's form", (6, 10, 8)),
        ("lambada_test_plain_text.txt", "2 examples, not all 5,153, the plain text, detokenized", (6, 10)),
    ):
        given = Found(CLOZES["lambada"].wanted, tmp_path / name)
        figures, said = cloze.lambada(given, model, tokenizer, limit=0, told=told)
        assert said == note
        by_metric = {figure.metric: figure.value for figure in figures}
        mean = sum(lengths) / len(lengths)  # " signs", " cigarette", " Gabriel": characters of a uniform model
        assert by_metric["perplexity/word"] == pytest.approx(len(itos) ** mean, rel=1e-4)
        assert by_metric["perplexity/token"] == pytest.approx(len(itos), rel=1e-4)


def test_questions_are_read_and_detokenized():
    first, second = parse(cbt().split("\n"), "here")
    assert first.choices == second.choices == CHOICES
    assert (first.answer, second.answer) == (0, 3)
    assert first.before.endswith('stood there.\n"And the ') and first.after == ' is high," she said.'
    assert first.before.startswith("The door wasn't old, and number 1 of them")
    assert (second.before[-1:], second.after) == ("\n", " didn't come.")


def test_choices_share_a_prefix_and_hold_the_rest_of_the_sentence():
    first, second = parse(cbt().split("\n"), "here")
    for question, ending in ((first, ' fence is high," she said.'), (second, "fence didn't come.")):
        requests = choices_of(question, GPT2, 1024)
        assert len({tuple(request.prefix) for request in requests}) == 1
        assert GPT2.decode(requests[0].continuation) == ending
        whole = question.before + "fence" + question.after
        assert GPT2.decode([*requests[0].prefix, *requests[0].continuation]) == whole
    requests = choices_of(first, GPT2, 64)
    longest = max(len(request.continuation) for request in requests)
    assert {len(request.prefix) for request in requests} == {65 - longest}, "cut alike, so that the longest fits"


def test_the_likeliest_choice_is_counted(tmp_path: Path):
    """A model that repeats itself finds "aaaa" likelier than "abab"."""
    tokenizer = CharTokenizer(["\n", *" abcdefghijklmnopqrstuvwxyzXTS0123456789.|"])
    rows = [f"{n} a a" for n in range(1, 21)]
    lines = [*rows, "21 XXXXX b\taaaa\t\tabab|aaaa|abba", "", *rows, "21 XXXXX b\tabab\t\tabab|aaaa|abba"]
    (tmp_path / "cbtest_CN_test_2500ex.txt").write_text("\n".join(lines) + "\n")
    given = Found(CLOZES["cbt_cn"].wanted, tmp_path / "cbtest_CN_test_2500ex.txt")
    model = known_model(tokenizer.vocab_size, block_size=256, strength=2.0)
    (figure,), note = cloze.cbt("cbt_cn", given, model, tokenizer, limit=0, told=told)
    assert (figure.value, figure.count, note) == (0.5, 2, "2 examples, not all 2,000, the test set")
    (figure,), _ = cloze.cbt("cbt_cn", given, model, tokenizer, limit=1, told=told)
    assert (figure.value, figure.count) == (1.0, 1)


def test_damaged_questions_are_refused_by_their_line():
    lines = cbt().split("\n")
    for change, what, where in (
        (lambda x: x[:5] + x[6:], "out of its order", "line 6"),
        (lambda x: x[:30], "the last question is not whole", "here"),
        (lambda x: [line.replace("XXXXX", "it") for line in x], "a question cannot be read", "line 21"),
        (lambda x: [line.replace("\tfence\t", "\tfences\t") for line in x], "a question cannot be read", "line 21"),
        (lambda x: [], "the last question is not whole", "here"),
    ):
        with pytest.raises(DataError, match=what) as refused:
            parse(change(lines), "here")
        assert where in refused.value.where
    row = {"sentences": ["a ."] * 20, "question": "XXXXX b", "answer": "c", "options": ["c", "d"]}
    assert from_row(row, "here") == Question("\n".join(["a."] * 20) + "\n", " b", ["c", "d"], 0)
