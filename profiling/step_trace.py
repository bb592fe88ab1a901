"""Where a training step's time goes: run/tracing.py over some steps, a table by kind of work and a trace for Perfetto.

    python profiling/step_trace.py --config shakespeare_char_cpu [--steps 30] [--out DIR] [--flag=value ...]

Random tokens, everything else as train would have it: the preset's shapes, the prepared dataset's vocabulary (or
--vocab_size), the trainer's own TrainStep. DIR gets trace.json.gz and summary.json; `profiling/explain.py DIR` sets
each part against its floor. A real run traces itself: train --profile=10:15.
"""

import argparse
import tempfile
from pathlib import Path

import built_step

from nanogpt_fast.command import run_command
from nanogpt_fast.run import tracing
from nanogpt_fast.settings.cli import load_config


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, help="keep trace.json.gz and summary.json there")
    args, rest = parser.parse_known_args(argv)
    if args.steps < 1:
        parser.error("--steps: at least 1")
    built = built_step.build(load_config(rest, prog="python profiling/step_trace.py"))
    with tempfile.TemporaryDirectory() as folder:
        summary = built_step.traced(built, args.steps, args.out or Path(folder))
    facts = summary.facts
    print(f"{facts['device']} ({facts['device_name']}), {facts['dtype']}, vocabulary {facts['shape']['vocab_size']}")
    if args.out:
        print(tracing.report(summary, args.out))
    else:
        print(f"{tracing.table(summary)}\n\n{tracing.paragraph(summary)}\n--out DIR keeps the trace")


if __name__ == "__main__":
    run_command(main)
