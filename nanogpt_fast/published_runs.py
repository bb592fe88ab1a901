"""Runs of GPT-2 that others published, and what they make of a law: the loss to expect on our data, and how surely.

A law of scaling_laws.py is of other text, cut up by another tokenizer: its nats a token are not ours. Its shape is
taken, and one number a data set is added, the mean by which published runs on that data set lie above it. Where a data
set has no such run nothing is added, and the expectation says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanogpt_fast.gpus import CHOICES, GPUS
from nanogpt_fast.hardware import flops_per_token
from nanogpt_fast.scaling_laws import C4, REFIT, UNROUNDED, Law, effective_tokens
from nanogpt_fast.settings.config import GPTConfig

# The laws that an expectation is spread over; the first is its middle. Hoffmann's constants as printed are left out:
# they are those of the TeX source, rounded.
SPREAD = (REFIT, UNROUNDED, C4)

OWT, FINEWEB, EDU = "OpenWebText", "FineWeb", "FineWeb-Edu"
UNIQUE = {OWT: 9_035_582_198}  # tokens of train.bin: nanoGPT's data/openwebtext/readme.md

_GPT2 = GPTConfig(vocab_size=50304, bias=True)
_124M = _GPT2
_350M = replace(_GPT2, n_layer=24, n_head=16, n_embd=1024)
_1558M = replace(_GPT2, n_layer=48, n_head=25, n_embd=1600)


@dataclass(frozen=True)
class Run:
    """A training run, and what its authors said of it."""

    name: str
    shape: GPTConfig
    data: str
    iterations: int
    batch: int  # tokens an iteration
    loss: float | None  # on the validation split; None: none was found
    loss_source: str
    gpu: str = ""  # of gpus.CHOICES; "": no time is given
    gpus: int = 8
    hours: float = 0.0
    hours_source: str = ""

    @property
    def tokens(self) -> float:
        return float(self.iterations * self.batch)

    @property
    def params(self) -> int:
        return self.shape.num_params(non_embedding=False)

    @property
    def effective(self) -> float:
        """Tokens, those seen again counted for less."""
        return effective_tokens(self.tokens, UNIQUE.get(self.data))

    def hours_at(self, mfu: float) -> float:
        """With nanoGPT's count of FLOPs at an MFU."""
        peak = GPUS[CHOICES[self.gpu]].tflops * 1e12 * self.gpus
        return self.tokens * flops_per_token(self.shape)["nanogpt"] / (peak * mfu) / 3600

    @property
    def mfu(self) -> float:
        """That its own hours come to, evaluations included."""
        return self.hours_at(1.0) / self.hours


_RECORDS = "github.com/KellerJordan/modded-nanogpt, records"
RUNS = (
    Run("nanoGPT 124M", replace(_124M, bias=False), OWT, 600_000, 491_520, 2.85, "nanoGPT's README: ~2.85",
        "a100-40gb", 8, 96.0, "nanoGPT's README: about 4 days"),
    Run("llm.c 124M", _124M, FINEWEB, 19_560, 524_288, 3.2722, f"{_RECORDS}/2024-10-13_llmc/main.log",
        "h100", 8, 0.75, "modded-nanogpt's README: 45 minutes"),
    Run("llm.c 350M", _350M, FINEWEB, 60_000, 524_288, 2.9282, f"{_RECORDS}/011825_GPT2Medium/main.log",
        "a100", 8, 60_000 * 0.82 / 3600, "llm.c, scripts/run_gpt2_350M.sh: about 820 ms a step"),
    Run("llm.c 1558M", _1558M, EDU, 32_000, 1_048_576, None, "none found in figures (discussion 677, as quoted)",
        "h100", 8, 24.0, "llm.c, scripts/run_gpt2_1558M.sh: 24 hours"),
)  # fmt: skip


def data_named(dataset: str) -> str | None:
    """The data set that a folder's name speaks of, where there are published runs on it."""
    name = dataset.lower()
    if "openwebtext" in name or name in ("owt", "owt2"):
        return OWT
    return None if "fineweb" not in name else EDU if "edu" in name else FINEWEB


def calibrating(data: str | None, without: Run | None = None) -> list[Run]:
    """The runs on a data set whose loss is known."""
    return [run for run in RUNS if run.data == data and run.loss is not None and run is not without]


def above(law: Law, run: Run) -> float:
    """By how much a run's loss lies above a law's."""
    assert run.loss is not None, run.name
    return run.loss - law.loss(run.params, run.effective)


def offset(law: Law, runs: Sequence[Run]) -> float:
    """What is added to a law on these runs' data: the mean that they lie above it; nothing without runs."""
    return sum(above(law, run) for run in runs) / len(runs) if runs else 0.0


def misfit(law: Law) -> float:
    """How far a published loss lies from a law with its offset, at most, over all data sets."""
    groups = [calibrating(data) for data in dict.fromkeys(run.data for run in RUNS)]
    return max(abs(above(law, run) - offset(law, runs)) for runs in groups for run in runs)


@dataclass(frozen=True)
class Expected:
    """A loss before it is measured. low to high is no confidence interval: it is where the laws of SPREAD put it, each
    with its own offset, and as far on as the worst of the published runs lies from the law that it helped to fit."""

    loss: float
    low: float
    high: float
    data: str | None
    runs: tuple[str, ...]  # that the offset is from; none: the loss is of the law's own data
    added: float


def expected(params: float, effective: float, data: str | None, without: Run | None = None) -> Expected:
    """Of a model of so many parameters, all of them, after effective_tokens; without: a run that is not to be known."""
    runs = calibrating(data, without)
    each = [law.loss(params, effective) + offset(law, runs) for law in SPREAD]
    slack = [misfit(law) if runs else 0.0 for law in SPREAD]
    return Expected(
        loss=each[0],
        low=min(loss - more for loss, more in zip(each, slack)),
        high=max(loss + more for loss, more in zip(each, slack)),
        data=data,
        runs=tuple(run.name for run in runs),
        added=offset(SPREAD[0], runs),
    )


def published(mfu: float) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of each run beside what is expected of it. `others` leaves the run itself out of the offset, where
    its data set has another one."""
    header = ["run", "data", "tokens, passes", "loss", "the law's", "expected", "from others", "GPUs", "hours",
              f"at {mfu:.0%}", "its MFU"]  # fmt: skip
    rows = []
    for run in RUNS:
        full, blind = (expected(run.params, run.effective, run.data, left_out) for left_out in (None, run))
        passes = run.tokens / UNIQUE[run.data] if run.data in UNIQUE else 1.0
        times = ["-"] * 4
        if run.gpu:
            times = [f"{run.gpus} {run.gpu}", f"{run.hours:.3g}", f"{run.hours_at(mfu):.3g}", f"{run.mfu:.0%}"]
        rows.append([
            run.name,
            run.data,
            f"{run.tokens / 1e9:.3g}B, {passes:.3g}",
            "-" if run.loss is None else f"{run.loss:g}",
            f"{REFIT.loss(run.params, run.effective):.2f}",
            f"{full.loss:.2f}, {full.low:.2f} to {full.high:.2f}" if full.runs else "-",
            f"{blind.loss:.2f}" if blind.runs else "-",
            *times,
        ])  # fmt: skip
    return header, rows
