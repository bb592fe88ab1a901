"""Text from a model, in pieces as its tokens are drawn.

Draws are nanoGPT's: one generator, one multinomial a token. On the CPU nanoGPT's has drawn a model's initial weights
before the first token, so a seed's texts are the same only where its sample.py seeds again after loading (measured).
Samples drawn together have a generator each instead.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nanogpt_fast.data.tokenizer import Tokenizer
from nanogpt_fast.draw import Draw, Generators
from nanogpt_fast.errors import DataError
from nanogpt_fast.graphs import Graphs
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import exact_device

UNFINISHED = "\ufffd"  # what decoding puts for bytes that are no character, or not one yet


def sample_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 500,
    temperature: float = 0.8,
    top_k: int = 200,
    seed: int | torch.Generator = 1337,
    stop_at_eot: bool = False,
    drawn: list[int] | None = None,
    graphs: Graphs | None = None,
) -> Iterator[str]:
    """The text after the prompt, in pieces as they are generated; together they are the tokens' decoding.

    temperature 0 takes the likeliest token, top_k 0 draws among all. seed: a number, or a generator on exact_device of
    the model's, which several samples may share. drawn, when given, receives the ids. graphs: as `GPT.stream`'s.
    Raises DataError where the tokenizer has more ids than the model has embeddings.
    """
    device = model.transformer.wte.weight.device
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator(exact_device(device)).manual_seed(seed)
    text = Text(tokenizer, max_new_tokens, stop_at_eot=stop_at_eot, ids=drawn)
    ids = prompt_ids(tokenizer, prompt)
    pieces = continued(model, tokenizer, [ids], [text], Draw(temperature, top_k), generator, graphs)
    return (piece for _, piece in pieces if piece)


class Text:
    """A sample's text while its tokens come, each piece of it given out when no later token can change it.

    It ends after `limit` tokens, before the first of the `stop` strings, which may lie across tokens, or before
    <|endoftext|>; finish_reason is then "length", "stop" or "eot", and "" until then. Of a stop string nothing is
    given out, and its tokens are in `ids`, as other engines count them; <|endoftext|> is not. logprob is the sum of
    theirs, of what `take` was told.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        limit: int,
        stop: Sequence[str] = (),
        stop_at_eot: bool = False,
        ids: list[int] | None = None,
    ):
        self.ids = [] if ids is None else ids
        self.limit, self.logprob, self.finish_reason = limit, 0.0, "" if limit else "length"
        self._characters, self._left, self._stop, self._held = _Characters(tokenizer), limit, stop, ""
        self._eot = tokenizer.eot if stop_at_eot else None

    def take(self, token: int, logprob: float = 0.0) -> str:
        """What is final of the text with this token, and was not before."""
        if token == self._eot:
            return self._ended("eot")
        self.ids.append(token)
        self.logprob += logprob
        self._left -= 1
        piece = self._before_stop(self._characters.take(token))
        return piece + self._ended("length") if not self._left and not self.finish_reason else piece

    def _ended(self, reason: str) -> str:
        """The rest of the text, which ends for this reason if no stop string is in it."""
        rest = self._before_stop(self._characters.flush()) + self._held
        self.finish_reason = self.finish_reason or reason
        return rest

    def _before_stop(self, piece: str) -> str:
        """All of the text up to a stop string, but for an end that one may begin with, which is held."""
        self._held += piece
        if ends := [at for stop in self._stop if (at := self._held.find(stop)) >= 0]:
            given, self._held, self.finish_reason = self._held[: min(ends)], "", "stop"
            return given
        begun = (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        final = len(self._held) - max(begun, default=0)
        given, self._held = self._held[:final], self._held[final:]
        return given


def continued(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    texts: Sequence[Text],
    draw: Draw,
    generator: Generators,
    graphs: Graphs | None = None,
    logprobs: bool = False,
) -> Iterator[tuple[int, str]]:
    """Continue the prompts together, each into its text, until all have ended: (row, its next piece) a token.

    generator: one a row where there are several prompts, so that a row's text is the one it has alone (to rounding,
    which matters where two tokens are all but equally likely). A row that ended is decoded along: to leave it out would
    change the batch, and with it the graph that is replayed. logprobs: whether the texts are told them.
    Raises DataError where the tokenizer has more ids than the model has embeddings.
    """
    if tokenizer.vocab_size > (embeddings := model.config.vocab_size):
        raise DataError(
            "the tokenizer has more ids than the model has embeddings",
            expected=f"at most {embeddings}",
            found=str(tokenizer.vocab_size),
        )
    prompts = [ids[-model.config.block_size :] for ids in prompts]  # what a model sees, and repetition_penalty too
    lengths = [len(ids) for ids in prompts]
    longest, device = max(lengths), model.transformer.wte.weight.device
    told: list[Tensor] | None = [] if logprobs else None
    stream = model.stream(
        torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts], device=device),
        max(text.limit for text in texts),
        draw.temperature,
        draw.top_k,
        generator,
        tokenizer.vocab_size,
        graphs,
        top_p=draw.top_p,
        min_p=draw.min_p,
        repetition_penalty=draw.repetition_penalty,
        lengths=lengths,
        logprobs=told,
    )
    return _handed_out(stream, lengths, texts, told)


def _handed_out(
    stream: Iterator[Tensor], lengths: list[int], texts: Sequence[Text], told: list[Tensor] | None
) -> Iterator[tuple[int, str]]:
    """The tokens of GPT.stream, given to the texts whose own they are: behind the prompt, before the end."""
    at = min(lengths)
    while not all(text.finish_reason for text in texts):
        tokens = next(stream)[:, 0].tolist()
        logprobs = told.pop()[:, 0].tolist() if told else [0.0] * len(tokens)
        for row, text in enumerate(texts):
            if lengths[row] <= at and not text.finish_reason:
                yield row, text.take(tokens[row], logprobs[row])
        at += 1


class _Characters:
    """Tokens to text, given out as soon as no later token can change it.

    A BPE token may end within a character. Decoding shows that as one U+FFFD at the end, which is held back until the
    next tokens complete it or show that it is none; everything before it is final.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._pending: list[int] = []  # ids since the last clean end of a character
        self._given = 0  # characters of their decoding given out

    def take(self, token: int) -> str:
        self._pending.append(token)
        text, given = self._tokenizer.decode(self._pending), self._given
        final = text.removesuffix(UNFINISHED)
        if final == text:
            self._pending, self._given = [], 0
        else:
            self._given = max(given, len(final))
        return final[given:]

    def flush(self) -> str:
        """What is still held back, as it stands."""
        rest = self._tokenizer.decode(self._pending)[self._given :] if self._pending else ""
        self._pending, self._given = [], 0
        return rest


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's ids, at least one. Raises DataError for characters outside the vocabulary.

    A model predicts from something: an empty prompt begins at <|endoftext|> or, for characters, at a line's start.
    The default prompt, a newline, is as good as empty to a vocabulary without one.
    """
    if not prompt and tokenizer.eot is not None:
        return [tokenizer.eot]
    try:
        return tokenizer.encode(prompt or "\n")
    except DataError:
        if prompt not in ("", "\n"):
            raise
        return [0]
