"""Text to tokens at full speed: documents, their split, batches, and the processes that encode them in order."""

import contextlib
import hashlib
import itertools
import logging
import multiprocessing
import operator
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any

import numpy as np

from nanogpt_fast.data.documents import Documents, Part
from nanogpt_fast.data.tokenizer import Tokenizer
from nanogpt_fast.errors import DataError

BATCH_CHARS = 1 << 19  # handed to a process at once: 40 ms of GPT-2 encoding, so queues and pickling do not show
CHAR_SEPARATOR = "\n\n"
FEW = 200_000  # a collection of more documents is not asked whether it has a document for either split
Encoded = dict[str, np.ndarray]  # {split: uint16 [tokens]}

log = logging.getLogger(__name__)


@dataclass
class Batch:
    """Consecutive (split, text, whether its document ends) pieces.

    Where the last of them ends a document (`whole`), `documents` and `state` say where reading goes on after it.
    """

    pieces: list[tuple[str, str, bool]] = field(default_factory=list)
    chars: int = 0
    documents: int = 0
    state: Any = None
    whole: bool = True


@dataclass(frozen=True)
class Encoder:
    """Encodes a batch; each document is followed by `end`, the ids that close it."""

    tokenizer: Tokenizer
    end: tuple[int, ...] = ()

    def __call__(self, pieces: list[tuple[str, str, bool]]) -> Encoded:
        end = np.array(self.end, dtype=np.uint16)
        rows: dict[str, list[np.ndarray]] = {}
        for split, text, ends in pieces:
            rows.setdefault(split, []).extend((self.tokenizer.encode_ordinary(text), end[: len(end) * ends]))
        return {split: np.concatenate(arrays) for split, arrays in rows.items()}


def document_end(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends a document: <|endoftext|>; characters have no such token, they get an empty line."""
    return (tokenizer.eot,) if tokenizer.eot is not None else tuple(tokenizer.encode(CHAR_SEPARATOR))


def draw(document: int, seed: int) -> int:
    """A fixed function of the document's number, even over 0 .. 2^64 - 1."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{document}".encode(), digest_size=8).digest(), "little")


def is_val(document: int, seed: int, val_fraction: float) -> bool:
    """Whether a document belongs to val: true for val_fraction of them."""
    return draw(document, seed) < val_fraction * 2**64


def val_of_few(source: Documents, seed: int, val_fraction: float) -> frozenset[int] | None:
    """The documents that are val where is_val would leave one split empty, having too few to choose from.

    The one that is_val would take first, if that is at most twice the share asked for; else an empty set: such a
    collection is split by position. None where is_val does.
    """
    first = {}
    for number in range(FEW):
        first.setdefault(is_val(number, seed, val_fraction), number)
        if len(first) == 2:
            break
    limit = max(first.values()) + 1 if len(first) == 2 else FEW
    count = sum(ends for _, ends in _until(source.read(), limit))
    if count >= limit:
        return None
    if not count or min(val_fraction, 1 - val_fraction) * count < 0.5:
        return frozenset()
    order = sorted(range(count), key=lambda number: draw(number, seed))
    return frozenset(order[:1] if True not in first or first[True] >= count else order[:-1])


def _until(parts: Iterable[Part], documents: int) -> Iterator[Part]:
    for text, ends in parts:
        yield text, ends
        documents -= ends
        if not documents:
            return


def cut(parts: Iterable[Part], boundary: re.Pattern[str], size: int | None = None) -> Iterator[Part]:
    """The same text in pieces of about `size` (BATCH_CHARS) characters, cut where the tokenizer's tokens stay those of
    the whole."""
    size = size or BATCH_CHARS
    text, searched = "", 0
    for part, ends in parts:
        text += part
        start = 0
        while (at := max(start + size, searched)) < len(text) and (found := boundary.search(text, at, len(text))):
            yield text[start : found.start()], False
            start = searched = found.start()
        text, searched = text[start:], max(0, len(text) - start - 2)  # a boundary is told by three characters
        if ends:
            yield text, True
            text, searched = "", 0
    if text:
        yield text, False


def batches_by_document(
    source: Documents,
    boundary: re.Pattern[str],
    split_of: Callable[[int], str],
    documents: int,
    state: Any,
) -> Iterator[Batch]:
    """Whole documents, their split by their number; begins after `documents` of them, at `state`."""
    batch = Batch()
    for text, ends in cut(source.read(documents, state), boundary):
        batch.pieces.append((split_of(documents), text, ends))
        batch.chars += len(text)
        documents += ends
        if batch.chars >= BATCH_CHARS:
            batch.documents, batch.state, batch.whole = documents, source.state() if ends else None, ends
            yield batch
            batch = Batch()
    if batch.pieces:
        batch.documents, batch.state = documents, source.state()
        yield batch


def batches_by_position(
    parts: Iterable[Part], boundary: re.Pattern[str], train_chars: int, start: int
) -> Iterator[Batch]:
    """The first train_chars characters are train, the rest val (nanoGPT's split of Shakespeare).

    Here a piece counts as a document; begins after `start` of them.
    """
    pieces = (
        (split, *piece)
        for split, side in itertools.groupby(_sides(parts, train_chars), key=operator.itemgetter(0))
        for piece in cut((part[1:] for part in side), boundary)
    )
    for number, piece in enumerate(itertools.islice(pieces, start, None), start + 1):
        yield Batch([piece], len(piece[1]), number)


def _sides(parts: Iterable[Part], train_chars: int) -> Iterator[tuple[str, str, bool]]:
    """(split, text, whether its document ends): no document ends where only the split does."""
    for text, ends in parts:
        left = text[:train_chars]
        train_chars -= len(left)
        if left:
            yield "train", left, ends and len(left) == len(text)
        if len(left) < len(text):
            yield "val", text[len(left) :], ends


def encode_batches(batches: Iterable[Batch], encoder: Encoder, num_proc: int) -> Generator[tuple[Batch, Encoded]]:
    """Every batch with its tokens, in the order given; num_proc = 1 encodes in this process."""
    pool = _pool(encoder, num_proc) if num_proc > 1 else None
    if pool is None:
        yield from ((batch, encoder(batch.pieces)) for batch in batches)
        return
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    try:
        for batch in batches:
            with _signals_held():  # the first of these starts the processes, which inherit that
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
        if waiting:  # what they still do is not wanted, and a process that is just starting takes seconds to hear it
            for process in list((pool._processes or {}).values()):
                process.kill()
        pool.shutdown(cancel_futures=True)


def _pool(encoder: Encoder, num_proc: int) -> ProcessPoolExecutor | None:
    context = multiprocessing.get_context("spawn")  # forking a process that has threads (datasets has) can deadlock
    try:
        with _signals_held():  # the resource tracker starts here, which would take SIGHUP and SIGUSR1
            return ProcessPoolExecutor(num_proc, mp_context=context, initializer=_start_worker, initargs=(encoder,))
    except (OSError, ImportError) as error:  # semaphores live in /dev/shm
        log.warning("no processes can be shared work with here (%s): this one encodes alone", error)
        return None


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """A terminal's signals, and Slurm's, go to all processes: what starts in here sees none, its parent decides."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_encoder: Encoder  # of a worker process: sent once, not with each batch


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where they cannot be held
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed parent closes no queue: its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(pieces: list[tuple[str, str, bool]]) -> Encoded:
    return _encoder(pieces)
