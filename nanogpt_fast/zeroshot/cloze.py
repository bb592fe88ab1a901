"""Tasks whose answer is a word: LAMBADA's last one, and the Children's Book Test's one of ten.

LAMBADA has been counted in three ways, 6 to 14 points apart on one model: the whole last word likeliest (lm-eval), its
last token likeliest after the true ones before it (OpenAI's, as others who asked report), and the last word likeliest
among words that are no stop words (the filter behind the accuracies of GPT-2's table). All three are given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanogpt_fast.data.text_files import has_rows
from nanogpt_fast.data.tokenizer import Tokenizer
from nanogpt_fast.errors import DataError
from nanogpt_fast.generate import prompt_ids
from nanogpt_fast.model import GPT
from nanogpt_fast.zeroshot.detokenize import TREEBANK
from nanogpt_fast.zeroshot.figures import Figure, accuracy, perplexity
from nanogpt_fast.zeroshot.likelihood import Answer, Request, Told, answers
from nanogpt_fast.zeroshot.task_files import Found, Hub, Wanted

BLANK = "XXXXX"  # in a question of the Children's Book Test
_CBT = (
    "the Children's Book Test, CBTest.tgz; GPT-2's paper reports the validation set: The Jungle Book is in its training"
)

# Function words, which are never the answer of a LAMBADA passage that its makers kept. The paper names no list.
STOP_WORDS = """
a about above after again against all am an and any are as at be because been before being below between both but by
can cannot could did do does doing down during each few for from further had has have having he her here hers herself
him himself his how i if in into is it its itself just me more most my myself no nor not now of off on once only or
other our ours ourselves out over own same she should so some such than that the their theirs them themselves then
there these they this those through to too under until up us very was we were what when where which while who whom why
will with would you your yours yourself yourselves
"""


@dataclass(frozen=True)
class Cloze:
    """A set of questions."""

    wanted: Wanted
    examples: int  # of the whole set


CLOZES = {
    "lambada": Cloze(
        Wanted(
            "lambada",
            ("lambada_test.jsonl", "lambada_test.json", "lambada_test_plain_text.txt", "lambada_test.txt"),
            "OpenAI's lambada_test.jsonl, with punctuation and capitals, or lambada_test_plain_text.txt of its makers",
            Hub("EleutherAI/lambada_openai", "default"),
        ),
        5153,
    ),
    "cbt_cn": Cloze(
        Wanted(
            "cbt_cn",
            ("cbtest_CN_valid_2000ex.txt", "cbtest_CN_test_2500ex.txt"),
            _CBT,
            Hub("cam-cst/cbt", "CN", "validation"),
        ),
        2000,
    ),
    "cbt_ne": Cloze(
        Wanted(
            "cbt_ne",
            ("cbtest_NE_valid_2000ex.txt", "cbtest_NE_test_2500ex.txt"),
            _CBT,
            Hub("cam-cst/cbt", "NE", "validation"),
        ),
        2000,
    ),
}


class Question(NamedTuple):
    """Text before the blank and after it, what may fill it, and what does."""

    before: str
    after: str
    choices: list[str]
    answer: int


# ---- LAMBADA ----


def lambada(found: Found, model: GPT, tokenizer: Tokenizer, *, limit: int, told: Told) -> tuple[list[Figure], str]:
    """Figures of LAMBADA's passages, and a note on them."""
    lines = [line.strip() for line in found.lines() if line.strip()]
    if not lines:
        raise DataError("the text is empty", where=str(found))
    lines = lines[:limit] if limit else lines
    plain = found.path is not None and not has_rows(found.path)
    requests = [last_word(TREEBANK.join(line) if plain else line, tokenizer, f"{found}") for line in lines]
    found_answers = answers(model, requests, barred=stop_tokens(tokenizer, model), told=told)
    form = "the plain text, detokenized" if plain else "OpenAI's form"
    return lambada_figures(requests, found_answers), f"{_how_many(len(lines), CLOZES['lambada'])}, {form}"


def last_word(text: str, tokenizer: Tokenizer, where: str) -> Request:
    """The request for a passage's last word after all before it."""
    before, space, word = text.rpartition(" ")
    if not before or not word:
        raise DataError("a passage has no last word", where=where, expected="words and spaces", found=repr(text[:80]))
    return Request(prompt_ids(tokenizer, before), tokenizer.encode_ordinary(space + word).tolist())


def lambada_figures(requests: Sequence[Request], found: Sequence[Answer]) -> list[Figure]:
    """Accuracies and perplexities of the last word."""
    hits = [answer.likeliest == request.continuation for request, answer in zip(requests, found)]
    filtered = [
        bool(answer.likeliest_of[0] == request.continuation[0] and hit[1:].all())
        for request, answer, hit in zip(requests, found, hits)
    ]
    word = np.array([-answer.logprob for answer in found])
    token = np.array([-answer.logprobs[-1] for answer in found])
    return [
        accuracy("lambada", "accuracy/word", [bool(hit.all()) for hit in hits]),
        accuracy("lambada", "accuracy/token", [bool(hit[-1]) for hit in hits]),
        accuracy("lambada", "accuracy/filtered", filtered),
        _perplexity("perplexity/word", word),
        _perplexity("perplexity/token", token),
    ]


def _perplexity(metric: str, nll: np.ndarray) -> Figure:
    n = len(nll)
    spread = float(nll.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return perplexity("lambada", metric, float(nll.mean()), spread, n)


def stop_tokens(tokenizer: Tokenizer, model: GPT) -> Tensor:
    """bool [V]: ids that are a stop word with its space; a longer word that begins with one is barred with it."""
    barred = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    for word in STOP_WORDS.split():
        for form in {word, word.capitalize()}:
            try:
                ids = tokenizer.encode_ordinary(" " + form)
            except DataError:  # a vocabulary without these characters has no such token
                continue
            if len(ids) == 1:
                barred[int(ids[0])] = True
    return barred.to(model.transformer.wte.weight.device)


# ---- the Children's Book Test ----


def cbt(
    task: str, found: Found, model: GPT, tokenizer: Tokenizer, *, limit: int, told: Told
) -> tuple[list[Figure], str]:
    """The share of questions whose right choice makes the sentence likeliest, from the blank to its end."""
    if found.path is None:
        questions = [from_row(row, f"{found}, row {i}") for i, row in enumerate(found.rows)]
    else:
        questions = parse(found.lines(), str(found))
    questions = questions[:limit] if limit else questions
    requests = [choices_of(question, tokenizer, model.config.block_size) for question in questions]
    flat = answers(model, [request for choices in requests for request in choices], told=told)
    right, at = [], 0
    for question, choices in zip(questions, requests):
        scores = [answer.logprob for answer in flat[at : at + len(choices)]]
        right.append(int(np.argmax(scores)) == question.answer)
        at += len(choices)
    note = f"{_how_many(len(questions), CLOZES[task])}" + ", the test set" * ("_test_" in str(found))
    return [accuracy(task, "accuracy", right)], note


def parse(lines: Sequence[str], where: str) -> list[Question]:
    """Questions of 20 numbered sentences and one with a blank, its answer and ten choices. Raises DataError."""
    questions, sentences = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        position, _, rest = line.strip().partition(" ")
        if position != str(len(sentences) + 1):
            at = f"{where}, line {number}"
            raise DataError(
                "a line is out of its order", where=at, expected=f"{len(sentences) + 1} ...", found=line[:80]
            )
        if len(sentences) < 20:
            sentences.append(rest)
            continue
        query, answer, choices = ([*filter(None, rest.split("\t")), "", ""])[:3]
        row = {"sentences": sentences, "question": query, "answer": answer, "options": choices.split("|")}
        questions.append(from_row(row, f"{where}, line {number}"))
        sentences = []
    if sentences or not questions:
        raise DataError("the last question is not whole", where=where, expected="21 lines", found=f"{len(sentences)}")
    return questions


def from_row(row: dict[str, Any], where: str) -> Question:
    """A question, detokenized with its blank in place. Raises DataError."""
    choices, answer = [c for c in row["options"] if c], row["answer"]
    text = "\n".join(TREEBANK.join(line) for line in [*row["sentences"], row["question"]])
    if text.count(BLANK) != 1 or answer not in choices:
        expected = f"one {BLANK}, and the answer among the choices"
        found = f"{text.count(BLANK)} of it, answer {answer!r}, choices {choices}"[:300]
        raise DataError("a question cannot be read", where=where, expected=expected, found=found)
    before, _, after = text.partition(BLANK)
    return Question(before, after, choices, choices.index(answer))


def choices_of(question: Question, tokenizer: Tokenizer, block_size: int) -> list[Request]:
    """A request for each choice, from the blank to the sentence's end. All have one prefix, cut on the left so that the
    longest of them fits."""
    before = question.before.removesuffix(" ")
    space = question.before[len(before) :]
    endings = [tokenizer.encode_ordinary(space + choice + question.after).tolist() for choice in question.choices]
    prefix = prompt_ids(tokenizer, before)
    room = block_size + 1 - max(map(len, endings))
    return [Request(prefix[-room:] if room > 0 else prefix, ending) for ending in endings]


def _how_many(count: int, cloze: Cloze) -> str:
    return f"{count:,} examples" + f", not all {cloze.examples:,}" * (count != cloze.examples)
