"""Where our training step goes, for bench/run.py: a trace of ten steps, each part against its floor, what to do first.

    python bench/profile_stage.py [--config gpt2_124m] [--device cuda] [--steps 10] [--out DIR]

The step is the trainer's own, on random tokens (profiling/built_step.py); DIR/profile/ gets the trace for Perfetto and
a summary, DIR/profile.jsonl the parts. A real run traces itself: train --profile=10:15.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import machine
import step
from built_step import build, traced
from explain import bars, explanation
from measured_roof import roof_of

from nanogpt_fast.command import run_command
from nanogpt_fast.run import tracing


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="gpt2_124m")
    parser.add_argument("--batch_size", type=int, help="sequences a micro-batch: 64, on a CPU the preset's")
    parser.add_argument("--accumulation", type=int, help="micro-batches a step: 1, on a CPU the preset's")
    parser.add_argument("--vocab_size", type=int, help="of a preset on characters: 65 for Tiny Shakespeare")
    parser.add_argument("--kernels", help="ops of the step: triton on a GPU, else the trainer's own choice")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a tiny model: to see that this runs")
    parser.add_argument("--out", type=Path, help="append to DIR/profile.jsonl, keep the trace in DIR/profile")
    args = parser.parse_args(argv)
    words = [f"--config={args.config}", f"--device={args.device}", *(["--tiny"] if args.tiny else [])]
    given = {"accumulation": args.accumulation or (1 if args.device == "cuda" or args.tiny else None)}
    given |= {"batch_size": args.batch_size, "vocab_size": args.vocab_size}
    words += [f"--{name}={value}" for name, value in given.items() if value]
    kernels = args.kernels or ("triton" if args.device == "cuda" else "auto")
    config = step.setup_of(step.parsed(words)).config.replace(device=args.device, kernels=kernels)
    built = build(config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out / "profile" if args.out else Path(scratch)
        summary = traced(built, args.steps, folder)
    explained = explanation(summary, roof_of(summary.facts), args.config)
    facts = {**machine.machine_facts(args.device), "dtype": summary.facts["dtype"], "kernels": kernels}
    lines = machine.Lines(args.out and args.out / "profile.jsonl", **facts)
    for row in explained.rows():
        lines.write(**row)
    print(f"{tracing.table(summary)}\n\n{explained.text}\n\n{bars(explained)}\n\nfirst: {explained.advice}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
