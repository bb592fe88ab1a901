"""One number of a report, and what the numbers' names mean."""

import math
from typing import NamedTuple

MEANING = {
    "perplexity/token": "exp of the loss divided by the model's own tokens",
    "perplexity/original": "exp of the loss divided by the corpus' own tokens, ends of lines among them",
    "perplexity/word": "exp of the loss divided by words between spaces; of LAMBADA a passage's last word",
    "bits/byte": "loss in bits divided by the original's UTF-8 bytes",
    "bits/character": "loss in bits divided by characters",
    "accuracy/word": "every token of the last word is the likeliest",
    "accuracy/token": "the last token is the likeliest after the true ones",
    "accuracy/filtered": "accuracy/word where no stop word may begin the answer",
    "accuracy": "the choice is the likeliest together with the rest of its sentence",
}


class Figure(NamedTuple):
    """What a model reached."""

    task: str
    metric: str
    value: float
    stderr: float  # NaN where it is not known
    count: int  # what a loss was divided by; examples of a share; 0 where it is not known
    higher: bool = False  # better


def perplexity(task: str, metric: str, loss: float, stderr: float, count: int) -> Figure:
    """exp of a loss, whose standard error is stderr."""
    value = math.exp(min(loss, 700.0))
    return Figure(task, metric, value, value * stderr, count)


def accuracy(task: str, metric: str, right: list[bool]) -> Figure:
    """A share, with a binomial's standard error by n - 1."""
    n, share = len(right), sum(right) / len(right)
    return Figure(task, metric, share, math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan, n, True)
