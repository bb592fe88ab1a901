"""What is compared in an ablation: bench/studies/NAME.toml as arms, and arms times seeds as runs.

question = "..."            what it is to answer
said = "..."                what others say of it, with the source
baseline = "ARM"            what the other arms are compared with
[small]                     train's flags of all arms at SMALL, the preset that studies are made for: sizes and texts,
                            which another --config brings itself
[flags]                     train's, of all arms
[after]                     train's, of a run that all arms begin from the end of, as finetuning does: made once a seed,
                            with nothing of the arms; with another --config, or --dataset, it is --before's checkpoint
[arms."NAME"]               train's, of this arm; `weights = KIND` begins from initial_weights.py's, `after = {}` from
                            scratch where others do not

Some numbers follow the command's --iters, so that a longer run is the same study: "N%" of max_iters is of --iters, of
warmup_iters of the run's own max_iters, of gradient_accumulation_steps of the preset's, and batch_ramp = "S%:N%" of the
latter and of --iters.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import initial_weights
import turns

from nanogpt_fast.errors import ConfigError, did_you_mean

STUDIES = Path(__file__).parent / "studies"
SMALL = "shakespeare_char_cpu"
FIRST_SEED = 1337
POINTS = 5  # evaluations of a run after its first


@dataclass(frozen=True)
class Arm:
    """One way to train. flags: of `train`, the study's too. weights: of initial_weights.KINDS, "" for train's own."""

    name: str
    flags: dict[str, Any]
    weights: str = ""
    after: dict[str, Any] = field(default_factory=dict)  # flags of the run that it begins from the end of


@dataclass(frozen=True)
class Study:
    """Arms of one question."""

    name: str
    question: str
    said: str
    baseline: str
    arms: tuple[Arm, ...]
    small: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """An arm with a seed. flags: of `train`, all but the places it writes to; before: of the run whose end it begins
    from, if any."""

    study: str
    arm: Arm
    seed: int
    flags: dict[str, Any]
    before: dict[str, Any] = field(default_factory=dict)

    def key(self, data: str, settings: Mapping[str, Any]) -> str:
        """What it computes, on data of this hash: a run whose key is in the results is not made again.

        settings: the resolved configuration, so that it is another run where the preset has changed; `before` may say
        more of where it begins."""
        what = [dict(settings), self.arm.weights, self.before, self.seed, data]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def names() -> list[str]:
    return sorted(path.stem for path in STUDIES.glob("*.toml"))


def load(name: str, folder: Path = STUDIES) -> Study:
    """The study of that name. Raises ConfigError."""
    path, known = folder / f"{name}.toml", sorted(path.stem for path in folder.glob("*.toml"))
    if name not in known:
        raise ConfigError(f"unknown study {name!r}{did_you_mean(name, known)}", expected=", ".join(known))
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("the study is not TOML", where=str(path), found=str(error)) from error
    arms = table.get("arms")
    tables = [table.get("small", {}), table.get("flags", {}), table.get("after", {})]
    whole = isinstance(arms, dict) and all(isinstance(one, dict) for one in [*tables, *arms.values()])
    if not isinstance(arms, dict) or not whole or table.get("baseline") not in arms or not table.get("question"):
        raise ConfigError(
            "the study is not whole", where=str(path), expected="a question, [arms.NAME] tables, a baseline among them"
        )
    if unknown := sorted(set(table) - {"question", "said", "baseline", "small", "flags", "after", "arms"}):
        near = did_you_mean(unknown[0], ("question", "said", "baseline", "small", "flags", "after", "arms"))
        raise ConfigError(f"a study has no {unknown[0]!r}{near}", where=str(path))
    made = []
    for arm, settings in arms.items():
        weights, after = settings.pop("weights", ""), settings.pop("after", table.get("after", {}))
        if weights and weights not in initial_weights.KINDS:
            near = did_you_mean(weights, initial_weights.KINDS)
            expected = ", ".join(initial_weights.KINDS)
            raise ConfigError(f"unknown weights {weights!r}{near}", where=f"{path}, {arm}", expected=expected)
        made.append(Arm(arm, {**table.get("flags", {}), **settings}, weights, after))
    return Study(name, table["question"], table.get("said", ""), table["baseline"], tuple(made), table.get("small", {}))


@dataclass(frozen=True)
class Terms:
    """What a command gives all runs of a study. common: flags that the study's own overrule; always: that overrule
    them; small: whether the preset is SMALL; accumulation: the preset's gradient_accumulation_steps."""

    iters: int
    common: dict[str, Any] = field(default_factory=dict)
    always: dict[str, Any] = field(default_factory=dict)
    small: bool = True
    accumulation: int = 1

    def flags(self, study: Study, own: dict[str, Any]) -> dict[str, Any]:
        """Of a run, with its shares as numbers."""
        base = {**self.common, **(study.small if self.small else {})}
        flags = {"max_iters": self.iters, **base, **own, **self.always}
        micro = base.get("gradient_accumulation_steps", self.accumulation)
        # A run's last evaluation is where eval_interval divides its length.
        flags["max_iters"] = iters = POINTS * max(1, round(_share(flags["max_iters"], self.iters) / POINTS))
        flags = {"lr_decay_iters": iters, "eval_interval": iters // POINTS, **flags}
        flags["warmup_iters"] = _share(flags.get("warmup_iters", "5%"), iters)
        if "gradient_accumulation_steps" in flags:
            flags["gradient_accumulation_steps"] = max(1, _share(flags["gradient_accumulation_steps"], micro))
        if "%" in (ramp := str(flags.get("batch_ramp", ""))):
            start, _, length = ramp.partition(":")
            flags["batch_ramp"] = f"{max(1, _share(start, micro))}:{max(1, _share(length, self.iters))}"
        return flags


def _share(value: Any, whole: int) -> int:
    """ "N%" of the whole; a number stays."""
    try:
        return round(float(value.removesuffix("%")) / 100 * whole) if isinstance(value, str) else value
    except ValueError:
        raise ConfigError("a study's share is no number", expected='"N%"', found=repr(value)) from None


def runs(study: Study, seeds: int, terms: Terms) -> list[Run]:
    """Seed after seed, each begun by another arm, so that a part of a study is a balanced part."""
    by_name = {arm.name: arm for arm in study.arms}
    made = {
        arm.name: (terms.flags(study, arm.flags), terms.flags(study, arm.after) if arm.after else {})
        for arm in study.arms
    }
    return [
        Run(study.name, by_name[name], FIRST_SEED + seed, *made[name])
        for seed in range(seeds)
        for name in turns.rotated(list(by_name), seed)
    ]
