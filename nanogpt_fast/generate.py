"""Text from a model, in pieces as its tokens are drawn.

Draws are nanoGPT's: one generator, one multinomial a token. On the CPU nanoGPT's has drawn a model's initial weights
before the first token, so a seed's texts are the same only where its sample.py seeds again after loading (measured).
"""

from collections.abc import Iterable, Iterator

import torch

from nanogpt_fast.data.tokenizer import Tokenizer
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
    if tokenizer.vocab_size > (embeddings := model.config.vocab_size):
        raise DataError(
            "the tokenizer has more ids than the model has embeddings",
            expected=f"at most {embeddings}",
            found=str(tokenizer.vocab_size),
        )
    device = model.transformer.wte.weight.device
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator(exact_device(device)).manual_seed(seed)
    idx = torch.tensor([prompt_ids(tokenizer, prompt)], device=device)
    stream = model.stream(idx, max_new_tokens, temperature, top_k or None, generator, tokenizer.vocab_size, graphs)

    def ids() -> Iterator[int]:
        for token in stream:
            if stop_at_eot and int(token) == tokenizer.eot:
                return
            if drawn is not None:
                drawn.append(int(token))
            yield int(token)

    return decode_pieces(ids(), tokenizer)


def decode_pieces(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The ids' text in pieces, each printed as soon as no later token can change it.

    A BPE token may end within a character. Decoding shows that as one U+FFFD at the end, which is held back until the
    next tokens complete it or show that it is none; everything before it is final.
    """
    pending: list[int] = []  # ids since the last clean end of a character
    given = 0  # characters of their decoding given out
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        final = text.removesuffix(UNFINISHED)
        if len(final) > given:
            yield final[given:]
        pending, given = ([], 0) if final == text else (pending, len(final))
    if pending:
        yield tokenizer.decode(pending)[given:]


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
