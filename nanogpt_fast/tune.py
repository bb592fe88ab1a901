"""Launch rows measured on this GPU: `python -m nanogpt_fast.tune [--config NAME] [--flag=value ...] --minutes=5`

Tiles, warps, stages and choices of the kernels that a training run with these flags launches, tried around the present
ones: at the run's own tokens, widths and dtype, forward and backward, beside the present row. A row is kept where it is
right by the rule of verify, gives the same bits each time, and is quicker: in the user's cache, from which train takes
it (--rows=shipped does not). Ctrl-C keeps what was found.
"""

import json
import sys
from dataclasses import dataclass, field

from nanogpt_fast.child import die_with_parent
from nanogpt_fast.command import importing, run_command
from nanogpt_fast.settings.cli import load_config
from nanogpt_fast.settings.config import Config, require_range

PROG = "python -m nanogpt_fast.tune"


@dataclass(frozen=True, kw_only=True)
class TuneSection:
    """How long."""

    minutes: float = 5.0  # in all; a row that has its turn late has less

    def __post_init__(self) -> None:
        require_range(0.5 <= self.minutes <= 24 * 60, "minutes", "0.5 to 1440", self.minutes)


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Config):
    """A run, and how long its launch rows are tuned."""

    tune: TuneSection = field(default_factory=TuneSection)


def main(argv: list[str]) -> int:
    """Tune, or be one of the children that compile and time rows. Returns the exit code."""
    is_child = argv[:1] == ["--child"]
    description = "Measure launch rows of the Triton kernels on this GPU, at a run's own shapes; keep the better ones."
    config = None if is_child else load_config(argv, prog=PROG, cls=TuneConfig, description=description)
    with importing():  # torch, a second that --help and a wrong flag do without
        from nanogpt_fast.launch_tuning import child, run

    return run(config, config.tune.minutes) if config else child(json.loads(argv[1]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        die_with_parent()
    run_command(main, again="the same command goes on from the rows that are kept")
