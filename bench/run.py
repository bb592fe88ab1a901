"""How fast is it on this machine, beside what, and what holds it back: everything in bench/ by one command.

    python bench/run.py --profile                     all of it on the GPU if there is one, else on the CPU
    python bench/run.py --suite all --quick           under five minutes on two cores
    python bench/run.py --suite step --peers none     one part; --list names the stages of each suite
    python bench/run.py --out DIR                     goes on where a run into DIR was cut off

What is found is on the disk at once, line by line (DIR/*.jsonl); at the end there are tables here, DIR/report.html with
plots, and one results file for bench/compare.py, named to be sent in. --profile adds where the step goes, the floor of
each part, and what to do first. Same machine, same work, in turn: see bench/README.md.
"""

import argparse
import datetime
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import report
import torch
from cpu_stages import CANNOT, cpu_stages
from gpu_session import Watch, run_session, take_over
from gpu_stages import Stage, all_stages
from report_sections import read

from nanogpt_fast.command import run_command
from nanogpt_fast.distributed import resolve_device
from nanogpt_fast.errors import ConfigError

SUITES = ("ops", "step", "train", "loader", "sample", "kernels", "all")
ALWAYS = ("environment", "compile")  # stages that every suite begins with
MINUTES = {"cpu": {True: 4.8, False: 60.0}, "cuda": {True: 5.0, False: 30.0}}  # {quick: ...}
QUICK_ON_GPU = ("environment", "compile", "step", "profile", "ops", "sample", "loader")


def stages_of(suite: str, device: str, out: Path, args: argparse.Namespace) -> list[Stage]:
    """The stages of a suite on this device, in order of value."""
    peers = args.peers == "all"
    if device == "cpu":
        stages = cpu_stages(out, args.quick, peers)
    else:
        arch = 10 * torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 90
        stages = all_stages(out, arch, args.ptxas and args.ptxas.resolve())
        stages = [s for s in stages if (not args.quick or s.name in QUICK_ON_GPU) and (peers or "peers" not in s.name)]
    wanted = (suite, *ALWAYS, *(["profile"] if args.profile else []))
    if suite != "all":
        stages = [s for s in stages if s.suite in wanted or s.name in wanted]
    elif not args.profile:
        stages = [s for s in stages if s.suite != "profile"]
    given = {"NANOGPT_DIR": str(Path(args.nanogpt).resolve())} if args.nanogpt else {}
    return [replace(s, env={**s.env, **given}) for s in stages]


def default_out(device: str) -> Path:
    facts = machine.machine_facts(device)
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M")
    return machine.ROOT / "out-bench" / f"{now}-{slug(facts.get('gpu') or device)}-{facts['commit'][:7]}"


def slug(name: str) -> str:
    """A device's name as a folder: nvidia-h100-80gb-hbm3"""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---- while it runs ----


@contextmanager
def progress(stages: list[Stage]) -> Iterator[Watch | None]:
    """A line that says which stage runs, for how long and what it printed last; on a terminal only."""
    if not sys.stdout.isatty():
        yield None
        return
    names = [stage.name for stage in stages]

    def watch(stage: Stage, ran: float, limit: float, last: str) -> None:
        said = f"[{names.index(stage.name) + 1}/{len(names)}] {stage.name} {ran:.0f} of {limit:.0f} s at most: {last}"
        width = os.get_terminal_size().columns - 1
        print(f"\r{printable(said)[:width]:<{width}}", end="", flush=True)

    try:
        yield watch
    finally:
        print("\r", end="")


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


# ---- when it ends ----


def results_file(out: Path, began: float) -> Path:
    """All rows of a folder in one file, named as bench/results has them: DATE-COMMIT.jsonl. This checkout is "."."""
    target = out / f"{datetime.date.fromtimestamp(began).isoformat()}-{machine.machine_facts()['commit'][:7]}.jsonl"
    parts = [path for path in sorted(out.glob("*.jsonl")) if not re.match(r"\d{4}-\d\d-\d\d-", path.name)]
    rows = [row for path in parts for row in machine.read_lines(path) if "bench" in row]
    target.write_text("".join(f"{json.dumps(row)}\n" for row in rows).replace(str(machine.ROOT), "."))
    return target


def main(argv: list[str]) -> int:
    args = parsed(argv)
    device = resolve_device(args.device).type
    if device not in MINUTES:
        raise ConfigError(
            f"bench/run.py does not measure {device}", where=f"--device={args.device}", expected="cuda, cpu"
        )
    out = (args.out or default_out(device)).resolve()
    stages = stages_of(args.suite, device, out, args)
    if args.list:
        for stage in stages:
            print(f"{stage.suite:<12}{stage.name:<24}{stage.limit_s:>5.0f} s at most  {stage.missing}".rstrip())
        return 0
    out.mkdir(parents=True, exist_ok=True)
    take_over(args.previous, out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began, minutes = time.time(), args.minutes or MINUTES[device][args.quick]
    print(f"{len(stages)} stages on {device}, {minutes:g} minutes at most, results in {out}", flush=True)
    outcomes: list[tuple[str, dict[str, Any]]] = []
    interrupted = False
    try:
        with progress(stages) as watch:
            outcomes = run_session(stages, minutes, out, machine.tree_hash(), watch=watch)
    except KeyboardInterrupt:
        interrupted = True
    if interrupted:
        print(f"\ninterrupted: what was measured is in {out}; to go on:\n  {again(argv, out)}")
    page = report.write(out, () if device == "cuda" else CANNOT) if read(out) else None
    bad = [[name, o["status"], o.get("seconds"), o["result"]] for name, o in outcomes if o["status"] != "done"]
    if bad:
        print(f"\nstages that did not end well\n{machine.table(['stage', 'status', 's', ''], bad)}")
    if page is not None:
        print(f"\n{time.time() - began:.0f} s. The page: {page}\nThe results in one file, for bench/compare.py: "
              f"{results_file(out, began)}")  # fmt: skip
    if interrupted:
        return 130
    return 1 if any(o["status"] == "failed" for _, o in outcomes) or page is None else 0


def again(argv: list[str], out: Path) -> str:
    """The command that goes on."""
    words = [word for word in argv if not word.startswith("--out=")]
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return " ".join(["python", "bench/run.py", *words, "--out", str(out)])


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suite", choices=SUITES, default="all", help="kernels: tests, races, memcheck, tuning on a GPU"
    )
    parser.add_argument("--quick", action="store_true", help="fewer arms and rounds")
    parser.add_argument("--profile", action="store_true", help="where the step goes, its floor, what to do first")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--peers", choices=["all", "none"], default="all", help="others beside ours")
    parser.add_argument("--minutes", type=float, help="in all; 4.8 or 60 on a CPU, 5 or 30 on a GPU, by --quick")
    parser.add_argument("--out", type=Path, help="results; default out-bench/DATE-DEVICE-COMMIT")
    parser.add_argument("--previous", type=Path, nargs="*", default=[], help="folders of earlier results to go on from")
    parser.add_argument("--nanogpt", type=Path, default=os.environ.get("NANOGPT_DIR"), help="karpathy/nanoGPT, a peer")
    parser.add_argument("--ptxas", type=Path, help="assemble by this one on a GPU")
    parser.add_argument("--list", action="store_true", help="the stages, and what each is missing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
