"""Everything that only a GPU can show, in order of value, within a time limit, to be gone on with later.

    PYTHONPATH=.:kernels python bench/gpu_session.py --minutes 8 --out DIR [--previous DIR ...] [--only STAGE ...]
    python bench/gpu_session.py --list | --dry_run      the stages, without a GPU
    python bench/gpu_session.py --rehearse --out DIR    each stage on the CPU, on something tiny: that it runs and ends

Each stage is a process of its own with a time limit; what it finds is on the disk line by line (DIR/*.jsonl), its
output in DIR/session.log. A stage that is done at the same tree of files is skipped by the next call, one that was cut
off is run again, one that failed or used up its own limit is run again last. --previous takes over the results of
another folder, where each call gets an empty one. Torch, Triton and pytest are all it needs; what else is missing is
said by the stage that would use it. The GPU's settings are never touched.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import torch
from gpu_stages import BENCH, DEAREST, SECONDS, Stage, all_stages, in_rehearsal

from nanogpt_fast import assembler
from nanogpt_fast.command import run_command
from nanogpt_fast.errors import ConfigError, did_you_mean

RESERVE_S = 5.0  # kept for the last table
LAST_LINES = 15  # of a stage that did not get through, on the console
KERNELS = 15  # of the last table
GRACE_S = 5.0  # between asking a process to end and ending it


# ---- what has been done ----


def take_over(previous: Sequence[Path], out: Path) -> None:
    """Put the result lines of other folders before those of this one, once."""
    for folder in previous:
        if not folder.is_dir():
            raise ConfigError("--previous is no folder", where=str(folder))
        for path in sorted(folder.glob("*.jsonl")):
            mine = out / path.name
            have = mine.read_text().splitlines() if mine.is_file() else []
            known = set(have)
            theirs = [line for line in path.read_text().splitlines() if line not in known]
            if theirs:
                mine.write_text("".join(f"{line}\n" for line in [*theirs, *have]))


def states(path: Path, tree: str | None) -> dict[str, dict[str, Any]]:
    """{stage: its last line} at this tree of files (None: at any)."""
    rows = [row for row in machine.read_lines(path) if "stage" in row and tree in (None, row.get("tree"))]
    return {row["stage"]: row for row in rows}


def to_run(stages: Sequence[Stage], past: dict[str, dict[str, Any]]) -> list[Stage]:
    """Those not done, in order; last the ones that failed or used up their own limit before."""
    status = {stage.name: past.get(stage.name, {}).get("status", "new") for stage in stages}
    left = [stage for stage in stages if status[stage.name] != "done"]
    return sorted(left, key=lambda stage: status[stage.name] in ("failed", "over its limit"))


def dearest(out: Path, most: int = 5) -> list[str]:
    """The launch ops of our kernels that take most of the step profiled last, dearest first."""
    rows = [row for row in machine.read_lines(out / "kernels.jsonl") if row.get("launch_op")]
    spent: dict[str, float] = {}
    for row in rows:
        if row["run"] == rows[-1]["run"]:
            spent[row["launch_op"]] = spent.get(row["launch_op"], 0.0) + row["ms"]
    return sorted(spent, key=lambda op: -spent[op])[:most]


# ---- running ----


def end(process: subprocess.Popen, grace_s: float = GRACE_S) -> None:
    """End a process and all it started: they are a group of their own."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def waited(process: subprocess.Popen, seconds: float, every_second: Callable[[float], Any]) -> int:
    """Its exit code; TimeoutExpired when the time is up."""
    began = time.monotonic()
    while True:
        left = began + seconds - time.monotonic()
        try:
            return process.wait(min(1.0, max(0.0, left)))
        except subprocess.TimeoutExpired:
            if left <= 1.0:
                raise
            every_second(time.monotonic() - began)


def last_line(path: str) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


Watch = Callable[[Stage, float, float, str], None]  # (stage, seconds it has run, seconds it has, its last line)


def run_stage(stage: Stage, seconds: float, out: Path, watch: Watch | None = None) -> dict[str, Any]:
    """Run it for at most so long; {"status", "rc", "seconds", "result": the last line of its output}. watch is called
    once a second meanwhile."""
    folders = [machine.ROOT, machine.ROOT / "kernels", BENCH, os.environ.get("PYTHONPATH", "")]
    python_path = os.pathsep.join(str(folder) for folder in folders if folder)
    given = {**os.environ, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", **stage.env}
    env = {name: value for name, value in given.items() if value is not None}
    command = [word.replace(SECONDS, str(max(1, int(seconds) - 15))) for word in stage.command]
    if DEAREST in command:
        at, launch_ops = command.index(DEAREST), dearest(out)
        if not launch_ops:
            return {"status": "missing", "result": "needs the table of kernels of the stage step"}
        command[at : at + 1] = launch_ops
    began = time.monotonic()
    with (out / "session.log").open("a") as log:
        log.write(f"\n==== {stage.name}: {' '.join(command)}\n")
        log.flush()
        start = log.tell()
        try:
            process = subprocess.Popen(
                command, cwd=machine.ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, process_group=0
            )
        except OSError as problem:
            return {"status": "failed", "rc": None, "seconds": 0.0, "result": str(problem)}
        try:
            rc = waited(
                process, max(0.1, seconds), lambda ran: watch and watch(stage, ran, seconds, last_line(log.name))
            )
            status = "done" if rc == 0 else "failed"
        except subprocess.TimeoutExpired:
            rc, status = None, "over its limit" if seconds >= stage.limit_s else "cut off"
        finally:
            end(process)  # also what a stage left behind, and on the way out of an interrupted session
    with (out / "session.log").open() as log:
        log.seek(start)
        text = [line.rstrip() for line in log if line.strip()]
    if status != "done":
        print("\n".join(f"  | {line[:200]}" for line in text[-LAST_LINES:]))
    result = text[-1][:160] if text else "no output"
    return {"status": status, "rc": rc, "seconds": round(time.monotonic() - began, 1), "result": result}


def run_session(
    stages: Sequence[Stage], minutes: float, out: Path, tree: str, any_tree: bool = False, watch: Watch | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """Run what is left to do until the time is up; (stage, outcome) of each stage, also of those not run."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60.0 * minutes - RESERVE_S
    lines = machine.Lines(out / "session.jsonl", tree=tree)
    past = states(out / "session.jsonl", None if any_tree else tree)
    queue = to_run(stages, past)
    outcomes = {s.name: {**past[s.name], "note": "before"} for s in stages if s not in queue}
    for stage in queue:
        left = deadline - time.monotonic()
        if stage.missing:
            outcomes[stage.name] = {"status": "missing", "result": stage.missing}
        elif left < stage.least_s:
            outcomes[stage.name] = {"status": "no time left", "result": f"needs {stage.least_s:.0f} s"}
            continue
        else:
            lines.write(stage=stage.name, status="started")
            print(f"{stage.name}: up to {min(stage.limit_s, left):.0f} s", flush=True)
            outcomes[stage.name] = run_stage(stage, min(stage.limit_s, left), out, watch)
        lines.write(stage=stage.name, **outcomes[stage.name])
        print(f"{stage.name}: {outcomes[stage.name]['status']}: {outcomes[stage.name]['result']}", flush=True)
    return [(stage.name, outcomes[stage.name]) for stage in stages]


# ---- the last table ----


def measured(out: Path) -> str:
    """The figures of ops.jsonl and step.jsonl, the last of each."""
    last: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in machine.read_lines(out / "ops.jsonl"):
        if row.get("status") == "ok" and "ms" in row:
            last[row["op"], row["size"], row["mode"], row["contestant"]] = row
    rows = []
    for (op, size, mode, who), row in last.items():
        if who == "ours":
            others = {w: r["ms"] for (o, s, m, w), r in last.items() if (o, s, m) == (op, size, mode)}
            best = min((w for w in others if not w.startswith("ours")), key=lambda w: others[w], default=None)
            share = f"{row['of_floor']:.0%}" if "of_floor" in row else "n/a"
            rows.append([f"{op} {size} {mode}", row["ms"], share, others.get("eager"), best, others.get(best or "")])
    text = machine.table(["op", "ours ms", "of floor", "eager ms", "best other", "ms"], rows) if rows else ""
    return "\n".join([text, *step_figures(out)])


def step_figures(out: Path) -> list[str]:
    """Of each arm alone and in turn the last line, and the dearest kernels of the last profile."""
    last = {(row["config"], row["arm"], row["how"]): row for row in machine.read_lines(out / "step.jsonl")}
    said = []
    for (config, arm, how), row in last.items():
        mfu = f", MFU {row['mfu_nanogpt']:.1%} (nanoGPT's count)" if "mfu_nanogpt" in row else ""
        rate = f"{row['tokens_per_s']:.0f} tokens/s{mfu}, B={row['batch_size']}" if "tokens_per_s" in row else ""
        said.append(f"{config} {arm}, {how}: {rate or row['status']}")
    rows = [row for row in machine.read_lines(out / "kernels.jsonl") if "kernel" in row]
    rows = [row for row in rows if row["run"] == rows[-1]["run"]][:KERNELS]
    cells = [[row["kernel"][:60], row["calls"], row["ms"], f"{row['share']:.1%}"] for row in rows]
    return [*said, machine.table(["kernel of a step", "calls", "ms", "share"], cells)] if cells else said


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, help="needed to run")
    parser.add_argument("--previous", type=Path, nargs="*", default=[], help="folders of earlier results")
    parser.add_argument("--only", nargs="+", metavar="STAGE")
    parser.add_argument("--ptxas", type=Path, help="assemble by this one, and race Triton's own beside it")
    parser.add_argument("--sanitizer", type=Path, help="compute-sanitizer, where PATH has none")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT, to be timed beside ours")
    parser.add_argument(
        "--any_tree", action="store_true", help="skip what was done with other versions of the files too"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="every stage tiny, on the CPU; no figure means anything"
    )
    parser.add_argument("--list", action="store_true", help="the stages and their limits")
    parser.add_argument("--dry_run", action="store_true", help="the stages' commands")
    args = parser.parse_args(argv)
    stages = asked(args)
    if args.list or args.dry_run:
        for stage in stages:
            command = " ".join(map(str, stage.command)) if args.dry_run else ""
            print(f"{stage.name:<24}{stage.limit_s:>5.0f} s  {stage.missing or command}".rstrip())
        return 0
    if not args.rehearse:
        machine.require_cuda("bench/gpu_session.py")
    if args.out is None:
        raise ConfigError("where should the results go?", expected="--out DIR")
    args.out.mkdir(parents=True, exist_ok=True)
    take_over(args.previous, args.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    tree = machine.tree_hash() + "-rehearsal" * args.rehearse
    outcomes = run_session(stages, args.minutes, args.out.resolve(), tree, args.any_tree)
    rows = [[name, o["status"], o.get("seconds"), o.get("note", ""), o["result"]] for name, o in outcomes]
    print(measured(args.out))
    print(machine.table(["stage", "status", "s", "", "result"], rows))
    return 1 if any(o["status"] == "failed" for _, o in outcomes) else 0


def asked(args: argparse.Namespace) -> list[Stage]:
    """The stages that the flags name; ConfigError for what is not there."""
    out = args.out.resolve() if args.out else Path("DIR")
    if args.ptxas and not assembler.version_of(args.ptxas):
        raise ConfigError(  # Triton would say nothing, and take its own
            "--ptxas does not run",
            where=str(args.ptxas),
            expected="an executable whose --version names a release",
            hint="pip install 'nanogpt-fast[ptxas]' has one: site-packages/nvidia/cu13/bin/ptxas",
        )
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    ptxas = args.ptxas and args.ptxas.resolve()
    stages = all_stages(out, 10 * major + minor, ptxas, args.sanitizer and args.sanitizer.resolve())
    names = [stage.name for stage in stages]
    for name in args.only or []:
        if name not in names:
            raise ConfigError(f"unknown stage {name!r}{did_you_mean(name, names)}", expected=", ".join(names))
    if args.nanogpt:
        stages = [replace(stage, env={**stage.env, "NANOGPT_DIR": str(args.nanogpt.resolve())}) for stage in stages]
    stages = [stage for stage in stages if args.only is None or stage.name in args.only]
    return [in_rehearsal(stage) for stage in stages] if args.rehearse else stages


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
