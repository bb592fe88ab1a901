"""From a budget to a run: `python -m nanogpt_fast.plan --flops=1e19 | --hours=24 --gpu=h100 --gpus=8 | --tokens=1e10`

Size, tokens, batch, rates, iterations, hours, memory and the loss to expect, and the command that trains it. --params
or --config fix it, with or without a budget. --published sets what is expected beside runs that others published.
Nothing runs. docs/scaling_laws.md says where it comes from, and how far to trust it.
"""

import re

from nanogpt_fast.command import importing, run_command
from nanogpt_fast.settings.cli import parse
from nanogpt_fast.settings.planning import EXAMPLES, PROG, PlanFlags


def main(argv: list[str]) -> None:
    """Plan, and print."""
    argv = [re.sub(r"^--config(?==|$)", "--model", word) for word in argv]  # here it is the run's, not this command's
    flags = parse(PlanFlags, argv, prog=PROG, description="From a budget to a run, before it starts.", epilog=EXAMPLES)
    with importing():  # torch, a second that --help and a wrong flag do without
        from nanogpt_fast.plan_report import told_of

    print(told_of(flags))


if __name__ == "__main__":
    run_command(main)
