"""In which order the samples come: without replacement, or as nanoGPT draws them.

A sample is a window of block_size + 1 = T + 1 tokens: T inputs, and the same shifted by one as targets.
"""

import math

import numpy as np
import torch

from nanogpt_fast.data.tokens import TokenSource
from nanogpt_fast.errors import ConfigError, DataError

ROUNDS = 6  # of the Feistel network


def _mix(x: np.ndarray, key: int) -> np.ndarray:
    """splitmix64's finalizer over x + key, elementwise on uint64."""
    x = x + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seed: int, epoch: int, count: int) -> list[int]:
    state = _mix(np.array([seed], np.uint64), 0x9E3779B97F4A7C15) + np.uint64(epoch)
    return _mix(_mix(state, 0) + np.arange(count, dtype=np.uint64), 0xD1B54A32D192ED03).tolist()


def permute(position: np.ndarray, size: int, keys: list[int]) -> np.ndarray:
    """A bijection of range(size), chosen by keys (one a round), at these positions (int64).

    A Feistel network on Z_a x Z_b with a = ceil(sqrt(size)), b = ceil(size / a): a * b exceeds size by less than a,
    so the walk that leads values past the end back inside takes a second turn for one value in sqrt(size) only.
    """
    a = math.isqrt(size - 1) + 1
    a, b = np.uint64(a), np.uint64(-(-size // a))
    out, todo = position.astype(np.uint64), slice(None)
    while True:
        left, right = np.divmod(out[todo], b)
        for key_left, key_right in zip(keys[::2], keys[1::2]):
            left = (left + _mix(right, key_left)) % a
            right = (right + _mix(left, key_right)) % b
        out[todo] = left * b + right
        todo = np.flatnonzero(out >= np.uint64(size))
        if not todo.size:
            return out.astype(np.int64)


class ShuffleOrder:
    """Windows without replacement: sample i is a pure function of (seed, i), so to resume is to know i.

    Each file of n tokens is cut into w = max(1, n // T - 1) windows at stride T; none crosses a file. Each epoch moves
    the cuts by a phase in [0, n - wT) and permutes all files' windows together. Within an epoch a token is a target at
    most once; fewer than 2T of a file's tokens are left out, at its ends, and come in other epochs. A file of T tokens
    or fewer gives no window.
    """

    def __init__(self, source: TokenSource, block_size: int, seed: int):
        require_window(source, block_size)
        self.source, self.block_size, self.seed = source, block_size, seed
        n = np.array([file.n_tokens for file in source.files], np.int64)
        counts = np.where(n > block_size, np.maximum(1, n // block_size - 1), 0)
        self._phases = np.where(counts > 0, n - counts * block_size, 1)  # all that keep the last window inside
        self._ends = np.cumsum(counts)
        self._first = self._ends - counts
        self.samples_per_epoch = int(self._ends[-1])

    def windows(self, sample_indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(file index, first token) of each sample, int64 [N] from int64 [N]."""
        epochs, positions = np.divmod(sample_indices, self.samples_per_epoch)
        files, starts = np.empty_like(sample_indices), np.empty_like(sample_indices)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            phase, *keys = _keys(self.seed, epoch, 1 + ROUNDS)
            window = permute(positions[here], self.samples_per_epoch, keys)
            files[here] = file = np.searchsorted(self._ends, window, side="right")
            shift = phase % self._phases.astype(np.uint64)[file]
            starts[here] = (window - self._first[file]) * self.block_size + shift.astype(np.int64)
        return files, starts


class NanogptOrder:
    """nanoGPT's order: torch.randint on the one CPU generator that initialisation and evaluations draw from as well.

    nanoGPT draws the first micro-batch before its loop and the next one after each forward: iteration k, once its
    evaluation is done, draws the micro-batches kA+1 .. kA+A. Loader.__next__ draws in the same places.
    """

    def __init__(self, source: TokenSource, block_size: int, generator: torch.Generator):
        require_window(source, block_size)
        if len(source.files) > 1:
            raise ConfigError(
                "--data_order=nanogpt reads a single file, as nanoGPT does",
                found=f"{len(source.files)} files, {source.files[0].path} the first",
                hint="--data_order=shuffle",
            )
        self.source, self.block_size, self.generator = source, block_size, generator

    def draw(self, batch_size: int) -> np.ndarray:
        """First tokens of one micro-batch, int64 [batch_size]; advances the generator."""
        return draw_starts(self.source, self.block_size, batch_size, self.generator)


def draw_starts(source: TokenSource, block_size: int, rows: int, generator: torch.Generator) -> np.ndarray:
    """nanoGPT's draw: uniform over the file's possible first tokens; over all files' ones in a row, where several."""
    total = sum(max(0, file.n_tokens - block_size) for file in source.files)
    return torch.randint(total, (rows,), generator=generator).numpy()


def require_window(source: TokenSource, block_size: int) -> None:
    """DataError unless some file holds block_size + 1 tokens."""
    longest = max(source.files, key=lambda file: file.n_tokens)
    if longest.n_tokens <= block_size:
        raise DataError(
            "too few tokens for one sample",
            where=longest.path,
            expected=f"{block_size + 1} tokens: block_size + 1",
            found=f"{longest.n_tokens} tokens",
            hint=f"--block_size={longest.n_tokens - 1}" if longest.n_tokens > 1 else "prepare more text",
        )
