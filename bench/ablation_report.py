"""Of an ablation's runs: means, spreads, differences paired by seed with intervals, and what of it may be chance."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ablation_study import Arm, Study

from nanogpt_fast.columns import columns

LEVEL = 0.05


def figures(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of a run's metrics.jsonl: losses, their curve, gradient norms, how often clipping acted."""
    lines = list(lines)
    evals = [line for line in lines if line["kind"] == "eval" and line.get("val_loss") is not None]
    steps = [line for line in lines if line["kind"] == "train"]
    first = next((line for line in lines if line["kind"] == "run"), {})
    found: dict[str, Any] = {"dtype": first.get("dtype")}
    if evals:
        found |= {"val_loss": evals[-1]["val_loss"], "best_val_loss": min(line["val_loss"] for line in evals)}
        found["curve"] = [[line["iter"], round(line["val_loss"], 5)] for line in evals]
        found["tokens"] = evals[-1]["tokens"]
    if steps:
        norms = sorted(line["grad_norm"] for line in steps if line["grad_norm"] is not None)
        spans = [b["iter"] - a["iter"] for a, b in zip(steps, steps[1:])]
        shares = [(line["clipped"], span) for line, span in zip(steps[1:], spans) if line.get("clipped") is not None]
        last = [line["loss"] for line in steps[-10:] if line["loss"] is not None]
        found |= {"train_loss": sum(last) / len(last)} if last else {}
        found |= {"grad_norm": norms[len(norms) // 2], "grad_norm_max": norms[-1]} if norms else {}
        if shares:
            found["clipped"] = sum(share * span for share, span in shares) / sum(span for _, span in shares)
    return found


@dataclass(frozen=True)
class Outcome:
    """An arm's runs beside the baseline's of the same seeds."""

    arm: str
    losses: dict[int, float]  # final validation loss by seed, of runs that ended
    failed: int
    differences: list[float]  # to the baseline, of the seeds that both have; below 0 is better
    noise: float  # the baseline's standard deviation over seeds
    clipped: float | None  # mean share of clipped iterations, percent
    grad_norm: float | None
    curves: tuple[list[list[float]], ...] = ()  # [iteration, validation loss] pairs of every run that ended

    @property
    def mean(self) -> float:
        return _mean(list(self.losses.values()))

    @property
    def spread(self) -> float:
        return deviation(list(self.losses.values()))

    @property
    def difference(self) -> float:
        return _mean(self.differences)

    @property
    def half_width(self) -> float:
        """Of the difference's 95% interval, Student's t."""
        n = len(self.differences)
        return t_quantile(1 - LEVEL / 2, n - 1) * deviation(self.differences) / math.sqrt(n) if n > 1 else math.nan

    @property
    def effect(self) -> float:
        """The difference in units of seed noise."""
        return self.difference / self.noise if self.noise > 0 else math.nan

    @property
    def p(self) -> float:
        """Two-sided, of a paired t test; 1 for an arm that changed nothing, which was compared all the same."""
        n, sd = len(self.differences), deviation(self.differences)
        if n < 2:
            return math.nan
        if not sd > 0:
            return 0.0 if self.difference else 1.0
        return t_two_sided(self.difference / (sd / math.sqrt(n)), n - 1)

    @property
    def better(self) -> int:
        """Seeds in which it beat the baseline."""
        return sum(value < 0 for value in self.differences)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    """By n - 1."""
    mean = _mean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else math.nan


def t_two_sided(t: float, freedom: int) -> float:
    """P(|T| > |t|) of Student's t with a whole number of degrees of freedom (Abramowitz & Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = 1.0, 0.0
    if freedom % 2:
        term = cosine
        for k in range(2, freedom, 2):
            total += term
            term *= cosine**2 * k / (k + 1)
        inside = 2 / math.pi * (angle + sine * total)
    else:
        for k in range(1, freedom, 2):
            total += term
            term *= cosine**2 * k / (k + 1)
        inside = sine * total
    return min(1.0, max(0.0, 1.0 - inside))


def t_quantile(share: float, freedom: int) -> float:
    """t with P(T < t) = share > 1/2."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, freedom) > 2 * (1 - share) else (low, middle)
    return high


def outcomes(study: Study, rows: Sequence[dict[str, Any]]) -> list[Outcome]:
    """The baseline first. Of rows that cannot be compared those like the last are taken; of one run the last."""
    arms = {arm.name: arm for arm in study.arms}
    rows = [row for row in rows if row["arm"] in arms and _is_current(row, arms[row["arm"]])]
    if not rows:
        return []
    kind = kind_of(rows[-1], study)
    rows = [row for row in rows if kind_of(row, study) == kind]
    begins = [_beginning(row) for row in rows if row.get("before")]
    rows = [row for row in rows if not row.get("before") or _beginning(row) == begins[-1]]
    newest = {(row["arm"], row["seed"]): row for row in rows}
    base = _losses(study.baseline, newest)
    order = sorted(study.arms, key=lambda arm: arm.name != study.baseline)
    found = []
    for arm in order:
        losses, mine = _losses(arm.name, newest), [row for (name, _), row in newest.items() if name == arm.name]
        clipped = [row["clipped"] for row in mine if row.get("clipped") is not None]
        norms = [row["grad_norm"] for row in mine if row.get("grad_norm") is not None]
        found.append(
            Outcome(
                arm.name,
                losses,
                sum(row["status"] != "ok" for row in mine),
                [losses[seed] - base[seed] for seed in sorted(losses) if seed in base and arm.name != study.baseline],
                deviation(list(base.values())),
                _mean(clipped) if clipped else None,
                _mean(norms) if norms else None,
                tuple(row["curve"] for row in mine if row["status"] == "ok" and row.get("curve")),
            )
        )
    return [one for one in found if one.losses or one.failed]


# Of flags: what follows from --iters, which a row has, and from the arm.
DERIVED = {"max_iters", "lr_decay_iters", "eval_interval", "warmup_iters", "batch_ramp", "gradient_accumulation_steps"}


def _is_current(row: dict[str, Any], arm: Arm) -> bool:
    """Whether the row is of the arm as its study has it now; shares of --iters are not looked at."""
    same = all(row["flags"].get(key) == value for key, value in arm.flags.items() if "%" not in str(value))
    return same and row.get("weights", arm.weights) == arm.weights and bool(row.get("before")) == bool(arm.after)


def _beginning(row: dict[str, Any]) -> tuple[Any, str]:
    """The run, or checkpoint, that a finetuned run began from the end of; from scratch there is none."""
    return row["before"], row["data"].partition("+")[2]


def kind_of(row: dict[str, Any], study: Study) -> tuple[Any, ...]:
    """What must be alike for runs of a study to be compared: data, preset, length, and the flags that all arms share.
    `dtype=auto` is another arithmetic on another machine."""
    varied = DERIVED.union(*(arm.flags for arm in study.arms))
    shared = sorted((key, str(value)) for key, value in row["flags"].items() if key not in varied)
    iters = row.get("iters", row["flags"].get("max_iters"))
    return row["data"].partition("+")[0], row["config"], iters, *shared, None if "dtype" in varied else row.get("dtype")


def _losses(arm: str, rows: dict[tuple[str, int], dict[str, Any]]) -> dict[int, float]:
    return {seed: row["val_loss"] for (name, seed), row in rows.items() if name == arm and row["status"] == "ok"}


def holm(found: Sequence[Outcome]) -> set[str]:
    """Arms whose difference survives Holm's correction for all arms that were compared."""
    ranked = sorted((one for one in found if not math.isnan(one.p)), key=lambda one: one.p)
    kept: set[str] = set()
    for i, one in enumerate(ranked):
        if one.p > LEVEL / (len(ranked) - i):
            break
        kept.add(one.arm)
    return kept


HEADER = ["arm", "runs", "val loss", "sd", "difference", "95%", "in seed sd", "better", "clipped", "norm"]


def cells(study: Study, rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row an arm, under HEADER; * marks what survives Holm."""
    found = outcomes(study, rows)
    sure, lines = holm(found), []
    for one in found:
        runs = f"{len(one.losses)}" + f", {one.failed} failed" * bool(one.failed)
        row = [one.arm, runs, *(_shown(x, ".4f") for x in (one.mean, one.spread))]
        if one.differences:
            mark = "*" if one.arm in sure else ""
            row += [f"{one.difference:+.4f}{mark}", _shown(one.half_width, ".4f", "+/- ")]
            row += [_shown(one.effect, "+.1f"), f"{one.better} of {len(one.differences)}"]
        else:
            row += [""] * 4
        row += ["" if one.clipped is None else f"{one.clipped:.0f}%", _shown(one.grad_norm, ".2f")]
        lines.append(row)
    return lines


def _shown(value: float | None, form: str, before: str = "") -> str:
    return "" if value is None or math.isnan(value) else f"{before}{value:{form}}"


def text(study: Study, rows: Sequence[dict[str, Any]]) -> list[str]:
    """For the terminal."""
    table = columns([HEADER, *cells(study, rows)])
    return [f"{study.name}: {study.question}", *table, "* survives Holm's correction at 5%"]
