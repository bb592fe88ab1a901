"""Is this checkout faster than another revision of it? Both train in turn, in processes of their own.

    python bench/against_revision.py REVISION [--config shakespeare_char_cpu] [--rounds 4] [--turns 6] [--steps 5]
    make bench-compare BASE=REVISION

A worktree of the revision is made in a temporary folder and removed at the end. A round starts a process a side
(timed_step.py of this checkout, with nanogpt_fast and nanogpt_kernels of either); they take turns of a few steps, the
order turned about each turn, and a ratio is of two medians within one turn. Several rounds, because processes of the
same code differ too. What is uncommitted here is timed as it is.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import harness
import machine
import torch
from turns import Apart, Failed, rotated

from nanogpt_fast.command import run_command
from nanogpt_fast.errors import ConfigError, DeviceError, did_you_mean
from nanogpt_fast.hardware import cpu_multiplies

SIDES = ("base", "here")


def git(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", "-C", str(machine.ROOT), *words], capture_output=True, text=True)
    except OSError as problem:
        raise ConfigError("git does not run", found=str(problem), hint="install git") from None


def commit_of(revision: str) -> str:
    """ConfigError where this is no checkout, or has no such revision."""
    found = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode == 0:
        return found.stdout.strip()
    if git("rev-parse", "--git-dir").returncode != 0:
        raise ConfigError("this is no git checkout: there is nothing to compare with", where=str(machine.ROOT))
    known = git("for-each-ref", "--format=%(refname:short)").stdout.split()
    raise ConfigError(
        f"unknown revision {revision!r}{did_you_mean(revision, known)}",
        where=str(machine.ROOT),
        expected="a commit, a branch or a tag",
        hint="git log --oneline",
    )


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A checkout of the commit for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="against-") as folder:
        path = Path(folder) / "base"
        made = git("worktree", "add", "--detach", "--quiet", str(path), commit)
        if made.returncode != 0:
            raise ConfigError("git could not make a worktree", where=str(path), found=made.stderr.strip())
        try:
            yield path
        finally:
            git("worktree", "remove", "--force", str(path))
            git("worktree", "prune")


def worker(root: Path, args: argparse.Namespace) -> Apart:
    """A process that steps with the code under `root`; Failed where it cannot."""
    command = [sys.executable, str(machine.ROOT / "bench/timed_step.py"), "--root", str(root), "--config", args.config]
    command += ["--device", args.device, "--dtype", args.dtype, "--kernels", args.kernels]
    folders = [root, root / "kernels", *filter(None, [os.environ.get("PYTHONPATH")])]
    process = Apart(command, {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))})
    process.turn(args.steps)  # warms up
    return process


def one_round(roots: dict[str, Path], args: argparse.Namespace) -> dict[str, list[float]]:
    """{side: ms a step, one figure a turn}. DeviceError where a side cannot run."""
    workers: dict[str, Apart] = {}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    try:
        for side in SIDES:
            try:
                workers[side] = worker(roots[side], args)
            except Failed as problem:
                hint = "it may be older than what bench/timed_step.py asks for" if side == "base" else ""
                raise DeviceError(
                    f"{side} cannot make a step", where=str(roots[side]), found=str(problem), hint=hint
                ) from None
        for turn in range(args.turns):
            for side in rotated(SIDES, turn):
                times[side].append(statistics.median(workers[side].turn(args.steps)["seconds"]) * 1e3)
    finally:
        for process in workers.values():
            process.end()
    return times


def said(times: dict[str, list[float]], names: dict[str, str]) -> str:
    rows = []
    for side in SIDES:
        ms, x = harness.summary(times[side]), harness.paired(times[side], times["base"], "x")
        spread = f"{x['x_q1']:.3f}-{x['x_q3']:.3f}"
        rows.append([f"{side}: {names[side]}", ms["ms"], f"{ms['q1']:.4g}-{ms['q3']:.4g}", f"{x['x']:.3f}", spread])
    return machine.table(["", "ms a step", "quartiles", "x base", "quartiles"], rows)


def main(argv: list[str]) -> int:
    args = parsed(argv)
    facts = machine.machine_facts(args.device)
    commit = commit_of(args.revision)
    names = {
        "base": f"{args.revision} ({commit[:10]})",
        "here": facts["commit"] + " and changes" * bool(facts["dirty"]),
    }
    lines = machine.Lines(args.out and args.out / "revision.jsonl", bench="revision", **facts)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    with worktree(commit) as base:
        roots = {"base": base, "here": machine.ROOT}
        for i in range(args.rounds):
            found = one_round(roots, args)
            lines.write(status="ok", base=commit[:10], config=args.config, dtype=args.dtype, kernels=args.kernels,
                        round=i, base_ms=found["base"], here_ms=found["here"])  # fmt: skip
            for side in SIDES:
                times[side] += found[side]
            ratio = harness.paired(found["here"], found["base"], "x")["x"]
            print(f"round {i + 1} of {args.rounds}: {ratio:.3f} of base", file=sys.stderr, flush=True)
    print(f"{args.config}, {args.device}, {args.dtype}, --kernels={args.kernels}; {len(times['base'])} turns a side")
    print(said(times, names))
    return 0


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="a commit, a branch or a tag")
    parser.add_argument(
        "--config", default="shakespeare_char_cpu", help="of this checkout: one micro-batch of it a step"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: what the device is fast in"
    )
    parser.add_argument("--kernels", default="reference", help="the ops, as train's --kernels takes them")
    parser.add_argument("--rounds", type=int, default=4, help="pairs of processes")
    parser.add_argument("--turns", type=int, default=6, help="of each process")
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--out", type=Path, help="append to DIR/revision.jsonl")
    args = parser.parse_args(argv)
    for name in ("rounds", "turns", "steps"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be 1 or more", found=str(getattr(args, name)))
    known = [path.stem for path in (machine.ROOT / "configs").glob("*.toml")]
    if args.config not in known:
        raise ConfigError(
            f"there is no configs/{args.config}.toml{did_you_mean(args.config, known)}",
            expected=", ".join(sorted(known)),
        )
    if args.device == "cuda":
        machine.require_cuda("bench/against_revision.py --device cuda")
    native = args.device == "cuda" or cpu_multiplies(torch.bfloat16)
    args.dtype = args.dtype or ("bfloat16" if native else "float32")
    return args


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
