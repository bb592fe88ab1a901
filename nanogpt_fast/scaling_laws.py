"""Scaling laws as others published them: the loss of a size and its tokens, and the best of a budget.

    L(N, D) = E + A / N^alpha + B / D^beta        nats a token; N all parameters, D tokens, each seen once

Hoffmann et al. 2022 ("Chinchilla", arXiv 2203.15556) asked the best N and D of a budget of C = 6 N D FLOPs in three
ways: 1 the lowest loss of all training curves at each C; 2 the minimum of a parabola through final losses at one C; 3
the law above, fitted to all final losses, and its minimum. ROWS has what 1 and 2 came to, LAWS the fits of 3, each with
where its digits are from. docs/scaling_laws.md says why 3 differs from itself so much.

A law's loss is of its own data and tokenizer: published_runs.py has what runs on GPT-2's tokens reached.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    name: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    source: str = ""
    data: str = ""
    errors: tuple[float, ...] = ()  # published standard errors of E, A, B, alpha, beta

    def loss(self, params: Any, tokens: Any) -> Any:
        """Nats a token; of numbers or arrays."""
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta

    def optimum(self, flops: float, each: float = 6.0) -> tuple[float, float]:
        """(N, D) of the least loss where each * N * D = flops: there alpha A / N^alpha = beta B / D^beta."""
        product = flops / each
        ratio = self.alpha * self.A / (self.beta * self.B)
        params = (ratio * product**self.beta) ** (1.0 / (self.alpha + self.beta))
        return params, product / params

    def tokens_for(self, params: float) -> float:
        """D for which N is the best size."""
        return (self.beta * self.B * params**self.alpha / (self.alpha * self.A)) ** (1.0 / self.beta)

    def params_for(self, tokens: float) -> float:
        """N for which D is the best number of tokens."""
        return (self.alpha * self.A * tokens**self.beta / (self.beta * self.B)) ** (1.0 / self.alpha)

    def tokens_to_reach(self, params: float, loss: float) -> float:
        """D with which N comes down to a loss; infinite where it never does."""
        left = loss - self.E - self.A * params**-self.alpha
        return (self.B / left) ** (1.0 / self.beta) if left > 0 else math.inf

    @property
    def exponent(self) -> float:
        """a of N ~ C^a along the optimum; D ~ C^(1 - a)."""
        return self.beta / (self.alpha + self.beta)


ROUNDED = Law(
    "Hoffmann, as printed",
    *(1.69, 406.4, 410.7, 0.34, 0.28),
    source="arXiv 2203.15556, section 3.3",
    data="MassiveText, 32,000 SentencePiece tokens",
)
UNROUNDED = Law(
    "Hoffmann, TeX source",
    *(1.6934, 406.4, 410.7, 0.3392, 0.2849),
    source="the TeX source of arXiv 2203.15556, as quoted by arXiv 2404.10102",
    data=ROUNDED.data,
)
REFIT = Law(
    "Besiroglu, refit",
    *(1.8172, 482.01, 2085.43, 0.3478, 0.3658),
    source="arXiv 2404.10102v2: 240 of Hoffmann's runs, read off a figure",
    data=ROUNDED.data,
    errors=(0.03, 124.58, 1293.23, 0.02, 0.02),
)
C4 = Law(
    "Muennighoff, C4",
    *(math.exp(0.6254804), math.exp(6.255414), math.exp(7.3049974), 0.3526596, 0.3526596),
    source="arXiv 2305.16264, appendix A: alpha and beta are one number there",
    data="C4, GPT-2's tokens",
)
LAWS = (ROUNDED, UNROUNDED, REFIT, C4)

# Table 3 and table A3 of arXiv 2203.15556, (parameters, tokens), as nanoGPT's scaling_laws.ipynb quotes them, cell 22.
ROWS = {
    "approach 1": (
        *((400e6, 8.0e9), (1e9, 20.2e9), (10e9, 205.1e9), (67e9, 1.5e12), (175e9, 3.7e12)),
        *((280e9, 5.9e12), (520e9, 11e12), (1e12, 21.2e12), (10e12, 216.2e12)),
    ),
    "approach 2": (
        *((400e6, 7.7e9), (1e9, 20.0e9), (10e9, 219.5e9), (67e9, 1.7e12), (175e9, 4.3e12)),
        *((280e9, 7.1e12), (520e9, 13.4e12), (1e12, 26.5e12), (10e12, 292.0e12)),
    ),
}
TABLE_A3 = (
    400e6,
    2.21e19,
    9.2e9,
)  # the first row of approach 3: parameters, FLOPs, tokens (the same notebook, cell 17)


def along(rows: Sequence[tuple[float, float]], flops: float) -> tuple[float, float, float]:
    """(N, D, a) of a budget by a straight line through rows of (N, D), log N against log 6 N D."""
    n, d = np.log(np.array(rows)).T
    a, at_zero = np.polyfit(math.log(6.0) + n + d, n, 1)
    params = math.exp(at_zero + a * math.log(flops))
    return params, flops / 6.0 / params, float(a)


def on_a_grid(law: Law, flops: float, steps_a_decade: int) -> tuple[float, float]:
    """(N, D) of the least loss among sizes of 10M to 100B, so many to a factor of ten: what nanoGPT's notebook does,
    with 16."""
    params = 10.0 ** np.arange(7, 11, 1.0 / steps_a_decade)
    tokens = flops / 6.0 / params
    best = int(np.argmin(law.loss(params, tokens)))
    return float(params[best]), float(tokens[best])


# ---- data seen again ----

REPEATS = 15.387756  # R*: what a repetition is worth falls as exp(-R / R*); arXiv 2305.16264, appendix A
AS_GOOD_AS_NEW = 4.0  # passes that cost next to nothing, by the same paper's abstract


def effective_tokens(tokens: float, unique: float | None) -> float:
    """Tokens seen once that are worth as much as these, of `unique` seen again and again; None: never seen again."""
    if unique is None or tokens <= unique:
        return tokens
    return unique * (1.0 + REPEATS * (1.0 - math.exp(-(tokens / unique - 1.0) / REPEATS)))


def tokens_worth(effective: float, unique: float | None) -> float:
    """How many must be seen for so many effective_tokens; infinite where no number of passes is worth as much."""
    if unique is None or effective <= unique:
        return effective
    left = 1.0 - (effective / unique - 1.0) / REPEATS
    return unique * (1.0 - REPEATS * math.log(left)) if left > 0 else math.inf


# ---- the batch ----


def critical_batch(loss: float) -> float:
    """Tokens a step beyond which more of them save few steps: 2e8 / L^(1 / 0.21), of GPT-2's tokens on WebText2 (Kaplan
    et al. 2020, arXiv 2001.08361, section 5.1)."""
    return 2e8 / loss ** (1 / 0.21)
