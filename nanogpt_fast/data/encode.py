"""Text to tokens at full speed: documents, their split, batches, and the processes that encode them in order."""

import hashlib
import itertools
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any

import numpy as np

from nanogpt_fast.data.documents import Documents
from nanogpt_fast.data.tokenizer import Tokenizer
from nanogpt_fast.errors import DataError

BATCH_CHARS = 1 << 19  # handed to a process at once: 40 ms of GPT-2 encoding, so queues and pickling do not show
CHAR_SEPARATOR = "\n\n"
Encoded = dict[str, np.ndarray]  # {split: uint16 [tokens]}


@dataclass
class Batch:
    """Consecutive (split, text) pieces; `documents` and `state` say where reading goes on after the last of them."""

    pieces: list[tuple[str, str]] = field(default_factory=list)
    chars: int = 0
    documents: int = 0
    state: Any = None


@dataclass(frozen=True)
class Encoder:
    """Encodes a batch; each piece is followed by `end`, the ids that close a document."""

    tokenizer: Tokenizer
    end: tuple[int, ...] = ()

    def __call__(self, pieces: list[tuple[str, str]]) -> Encoded:
        end = np.array(self.end, dtype=np.uint16)
        rows: dict[str, list[np.ndarray]] = {}
        for split, text in pieces:
            rows.setdefault(split, []).extend((self.tokenizer.encode_ordinary(text), end))
        return {split: np.concatenate(arrays) for split, arrays in rows.items()}


def document_end(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends a document: <|endoftext|>; characters have no such token, they get an empty line."""
    return (tokenizer.eot,) if tokenizer.eot is not None else tuple(tokenizer.encode(CHAR_SEPARATOR))


def is_val(document: int, seed: int, val_fraction: float) -> bool:
    """Whether a document belongs to val: a fixed function of its number, true for val_fraction of them."""
    digest = hashlib.blake2b(f"{seed}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2**64


def cut(text: str, size: int = BATCH_CHARS) -> Iterator[str]:
    """Pieces of about `size` characters that have, one after the other, the GPT-2 tokens of the whole text.

    A single newline between visible characters is a token of its own, whatever surrounds it: cut after it.
    """
    start, boundary = 0, re.compile(r"(?<=\S\n)(?=\S)")
    while start < len(text):
        found = boundary.search(text, start + size)
        end = found.start() if found else len(text)
        yield text[start:end]
        start = end


def batches_by_document(
    source: Documents, seed: int, val_fraction: float, documents: int, state: Any
) -> Iterator[Batch]:
    """Whole documents, each assigned to a split by is_val; begins after `documents` of them, at `state`."""
    batch = Batch()
    for text in source.read(documents, state):
        batch.pieces.append(("val" if is_val(documents, seed, val_fraction) else "train", text))
        batch.chars += len(text)
        documents += 1
        if batch.chars >= BATCH_CHARS:
            batch.documents, batch.state = documents, source.state()
            yield batch
            batch = Batch()
    if batch.pieces:
        batch.documents, batch.state = documents, source.state()
        yield batch


def batches_by_position(text: str, val_fraction: float, start: int) -> Iterator[Batch]:
    """One text: the first 1 - val_fraction of its characters is train, the rest val (nanoGPT's split of Shakespeare).

    Here a piece counts as a document; begins after `start` of them.
    """
    at = int(len(text) * (1 - val_fraction))
    pieces = itertools.chain((("train", p) for p in cut(text[:at])), (("val", p) for p in cut(text[at:])))
    for number, piece in enumerate(itertools.islice(pieces, start, None), start + 1):
        yield Batch([piece], len(piece[1]), number)


def encode_batches(batches: Iterable[Batch], encoder: Encoder, num_proc: int) -> Generator[tuple[Batch, Encoded]]:
    """Every batch with its tokens, in the order given; num_proc = 1 encodes in this process."""
    if num_proc == 1:
        yield from ((batch, encoder(batch.pieces)) for batch in batches)
        return
    context = multiprocessing.get_context("spawn")  # forking a process that has threads (datasets has) can deadlock
    pool = ProcessPoolExecutor(num_proc, mp_context=context, initializer=_start_worker, initargs=(encoder,))
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode_in_worker, batch.pieces)))
            if len(waiting) > 3 * num_proc:  # bounds the text held in memory
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenExecutor as error:
        raise DataError(
            "a tokenizing process died",
            found=str(error),
            hint="out of memory is the usual reason: run the same command with a smaller --num_proc",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder  # of a worker process: sent once, not with each batch


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed parent closes no queue: its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(pieces: list[tuple[str, str]]) -> Encoded:
    return _encoder(pieces)
