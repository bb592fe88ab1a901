"""Tasks that are a text to predict: WikiText, PTB, enwik8, text8, 1BW. Perplexity by every convention in use.

GPT-2's paper divides a text's loss by the number of its ORIGINAL tokens before the exponential (openai/gpt-2 #78), as
its own BPE tokens are others; what people print beside its figures divides by BPE tokens, or by words. On one text
these differ by a quarter. Each is a figure of its own here, named by what the loss is divided by.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nanogpt_fast.data.tokenizer import Tokenizer
from nanogpt_fast.errors import DataError
from nanogpt_fast.generate import prompt_ids
from nanogpt_fast.model import GPT
from nanogpt_fast.zeroshot.detokenize import MOSES, PTB, WIKITEXT, Detokenizer
from nanogpt_fast.zeroshot.figures import Figure, perplexity
from nanogpt_fast.zeroshot.likelihood import Loss, Told, window_losses
from nanogpt_fast.zeroshot.task_files import Found, Hub, Wanted

LAST_BYTES = 5_000_000  # of enwik8 and text8 are the test set, by custom: 90, 5 and 5 of 100 million
ENOUGH = 30  # documents that say how sure a figure is; of fewer, their windows do


@dataclass(frozen=True)
class Corpus:
    """A text and how it is read."""

    wanted: Wanted
    detokenizer: Detokenizer | None = None
    sentences: bool = False  # every line a document of its own; else the lines follow one another
    unit: str = ""  # "byte" or "character" of a file that is scored as it stands; else words
    published: int = 0  # original tokens, ends of lines among them, of the whole test set


class Text(NamedTuple):
    """A corpus as the model reads it, and what its loss may be divided by."""

    documents: list[str]
    original: int  # tokens of the corpus, an end of line is one
    words: int
    bytes: int  # of the original
    characters: int
    note: str


_WIKI = ("wiki.test.tokens", "wiki.test.raw", "wiki.test.txt")
CORPORA = {
    "wikitext2": Corpus(
        Wanted(
            "wikitext2",
            _WIKI,
            "the zip archives wikitext-2-v1 or wikitext-2-raw-v1; WikiText-103's test set is the same",
            Hub("Salesforce/wikitext", "wikitext-2-v1"),
        ),
        WIKITEXT,
        published=245_569,
    ),
    "wikitext103": Corpus(
        Wanted(
            "wikitext103",
            _WIKI,
            "the zip archives wikitext-103-v1 or wikitext-103-raw-v1; WikiText-2's test set is the same",
            Hub("Salesforce/wikitext", "wikitext-103-v1"),
        ),
        WIKITEXT,
        published=245_569,
    ),
    "ptb": Corpus(
        Wanted(
            "ptb",
            ("ptb.test.txt",),
            "simple-examples/data/ of Mikolov's simple-examples.tgz",
            Hub("ptb-text-only/ptb_text_only", "penn_treebank", revision="refs/convert/parquet"),
            field="sentence",
        ),
        PTB,
        published=82_430,
    ),
    "enwik8": Corpus(
        Wanted("enwik8", ("enwik8", "enwik8.test"), "enwik8.zip of mattmahoney.net/dc/textdata.html, unzipped"),
        unit="byte",
    ),
    "text8": Corpus(
        Wanted("text8", ("text8", "text8.test"), "text8.zip of mattmahoney.net/dc/textdata.html, unzipped"),
        unit="character",
    ),
    "1bw": Corpus(
        Wanted(
            "1bw",
            ("news.en.heldout-00000-of-00050", "news.en.heldout-00000-of-00050.txt"),
            "heldout-monolingual.tokenized.shuffled/ of 1-billion-word-language-modeling-benchmark-r13output.tar.gz",
        ),
        MOSES,
        sentences=True,
        published=159_658,
    ),
}


def read(corpus: Corpus, found: Found, limit: int = 0) -> Text:
    """The text. limit: of so many lines, or thousand characters of a corpus without lines; 0: all. Raises DataError."""
    if corpus.unit:
        raw = _whole_characters(found.last_bytes(LAST_BYTES), str(found))
        text = raw[: limit * 1000] if limit else raw
        size = len(text.encode())
        note = f"the last {size:,} bytes" if size >= LAST_BYTES - 6 else f"{size:,} bytes, not the last {LAST_BYTES:,}"
        return Text([text], 0, len(text.split()), size, len(text), note)
    lines = found.lines()
    if found.path is None:  # rows of a hub keep their ends
        lines = [line.removesuffix("\n") for line in lines]
    lines = lines[:limit] if limit else lines
    words = sum(len(line.split()) for line in lines)
    if not words:
        raise DataError("the text is empty", where=str(found))
    detokenizer = corpus.detokenizer
    joined = [detokenizer.join(line) if detokenizer else line for line in lines]
    documents = [line for line in joined if line] if corpus.sentences else ["\n".join(joined)]
    original, note = words + len(lines), ""
    if corpus.published and original != corpus.published:
        note = f"{original:,} tokens, not the test set's {corpus.published:,}"
    if detokenizer:
        same, of = detokenizer.restored(lines)
        note = "; ".join(
            filter(None, [note, f"{detokenizer.name}'s detokenizer is undone in {same:,} of {of:,} lines"])
        )
    size = sum(len(line.encode()) + 1 for line in lines)
    return Text(documents, original, words, size, sum(len(line) + 1 for line in lines), note)


def _whole_characters(data: bytes, where: str) -> str:
    """Text of bytes that may begin and end within a character; such ends are dropped."""
    begin = next((i for i in range(min(4, len(data))) if data[i] & 0xC0 != 0x80), 0)
    try:
        text = data[begin:].decode()
    except UnicodeDecodeError as error:
        if len(data) - begin - error.start > 3:
            at = f"{where}, byte {begin + error.start} of its last {len(data):,}"
            raise DataError("the text is not UTF-8", where=at, found=error.reason) from error
        text = data[begin : begin + error.start].decode()
    if not text:
        raise DataError("the text is empty", where=where)
    return text


def encoded(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """A document's ids behind the one that a text begins after (<|endoftext|>), so that all of it is predicted."""
    return np.concatenate([prompt_ids(tokenizer, "")[:1], tokenizer.encode_ordinary(text).astype(np.int64)])


def losses_of(
    documents: Sequence[str], model: GPT, tokenizer: Tokenizer, *, block_size: int, stride: int, told: Told
) -> list[Loss]:
    """Of a Text's documents, window by window."""
    ids = [encoded(document, tokenizer) for document in documents]
    return window_losses(model, ids, block_size=block_size, stride=stride, told=told)


def figures(task: str, text: Text, losses: Sequence[Loss]) -> list[Figure]:
    """Perplexities and bits of a text's losses, each with its standard error."""
    (nll, tokens, spread), unit = total(losses), CORPORA[task].unit
    of = {"token": tokens} if unit else {"token": tokens, "original": text.original, "word": text.words}
    found = [perplexity(task, f"perplexity/{name}", nll / count, spread / count, count) for name, count in of.items()]
    name, count = ("character", text.characters) if unit == "character" else ("byte", text.bytes)
    bits = math.log(2) * count
    return [*found, Figure(task, f"bits/{name}", nll / bits, spread / bits, count)]


def total(losses: Sequence[Loss]) -> tuple[float, int, float]:
    """(nats, tokens, standard error of the nats): by documents, or windows where there are few, as if independent."""
    units: dict[int, list[Loss]] = {}
    for loss in losses:
        units.setdefault(loss.document, []).append(loss)
    if len(units) < ENOUGH:
        units = dict(enumerate([loss] for loss in losses))
    sums = np.array([(sum(part.nll for part in unit), sum(part.tokens for part in unit)) for unit in units.values()])
    nll, tokens = sums.sum(0)
    n = len(sums)
    left = sums[:, 0] - nll / tokens * sums[:, 1]  # of a ratio: what a unit's loss is beyond its tokens' share
    spread = math.sqrt(n / (n - 1) * float(left @ left)) if n > 1 else math.nan
    return float(nll), int(tokens), spread
