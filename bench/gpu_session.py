"""Everything that only a GPU can show, in order of value, within a time limit, to be gone on with later.

    python bench/gpu_session.py --minutes 9 --out DIR [--previous DIR ...] [--only STAGE ...] [--list]

Each stage is a process of its own with a time limit; what it finds is on the disk line by line (DIR/*.jsonl), its
output in DIR/session.log. A stage that is done at the same tree of files is skipped by the next call, one that was cut
off is run again, one that failed or used up its own limit is run again last. --previous takes over the results of
another folder, where each call gets an empty one. The GPU's settings are never touched.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine

from nanogpt_fast.errors import ConfigError, did_you_mean, run_command

BENCH = machine.ROOT / "bench"
RESERVE_S = 5.0  # kept for the last table
LAST_LINES = 15  # of a stage that did not get through, on the console
SECONDS = "{seconds}"  # in a stage's command: the time it is given, less 15 s to start and to end in
GRACE_S = 5.0  # between asking a process to end and ending it
SLICES = {  # of the GPU tests, by the beginning of the file's name; what no slice takes comes last
    "shared": ("primitives", "launch", "linear.", "ops.", "opinfo"),
    "attention": ("attention", "cached_attention", "qkv"),
    "cross_entropy": ("cross_entropy", "linear_cross_entropy"),
    "norm": ("norm", "add_norm"),
    "mlp": ("mlp", "bias_gelu", "gemm"),
    "embedding_adamw": ("embedding", "adamw", "grad_norm"),
}


@dataclass(frozen=True)
class Stage:
    """command: in a process of its own, from the repository's root. missing: why it cannot run here."""

    name: str
    command: Sequence[str]
    limit_s: float
    least_s: float = 15.0  # not worth starting with less
    env: dict[str, str] = field(default_factory=dict)
    missing: str = ""


def gpu_test_slices() -> dict[str, list[str]]:
    """{slice: files} of tests that run on a GPU: those of the Triton ops (tests/ops), and those marked so."""
    found: dict[str, list[str]] = {name: [] for name in (*SLICES, "others")}
    tests = machine.ROOT / "tests"
    for path in sorted(tests.rglob("test_*.py")):
        if path.parent != tests / "ops" and "mark.gpu" not in path.read_text():
            continue
        stem = f"{path.stem.removeprefix('test_')}."
        name = next((name for name, starts in SLICES.items() if stem.startswith(starts)), "others")
        found[name].append(str(path.relative_to(machine.ROOT)))
    return {name: files for name, files in found.items() if files}


def all_stages(out: Path) -> list[Stage]:
    """In order of value."""

    def script(name: str, *args: str) -> list[str]:
        return [sys.executable, str(BENCH / name), *args, "--out", str(out)]

    jobs = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # a test's time is compiling: on several cores
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-rfE", "--tb=short", "--maxfail=40", "-p",
              "no:cacheprovider", *jobs]  # fmt: skip
    tests = [Stage(f"tests-{name}", [*pytest, *files], 150) for name, files in gpu_test_slices().items()]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    check = [sys.executable, str(BENCH / "ops.py"), "--check", "--sizes", "tiny", "--peers", "none", "--no_compile"]
    return [
        Stage("environment", script("environment.py"), 60),
        *tests,
        Stage("race", script("race.py"), 120),
        Stage("ops", script("ops.py", "--resume", "--sizes", "124m", "--peers", "none", "--no_compile"), 120),
        Stage("step", script("step.py"), 120),
        Stage("tune", script("tune.py", "--worst", str(out / "ops.jsonl"), "--total_s", SECONDS), 180, least_s=60),
        Stage("peers", script("ops.py", "--resume", "--sizes", "124m"), 180),
        Stage("ops-1558m", script("ops.py", "--resume", "--sizes", "1558m"), 180),
        Stage("race-dropout", script("race.py", "--p", "0.1", "--repeats", "300"), 90),
        Stage(
            "sanitizer",
            [sanitizer or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *check],
            150,
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else it sees one large allocation, not a tensor's end
            missing="" if sanitizer else "compute-sanitizer is not installed",
        ),
    ]


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


def run_stage(stage: Stage, seconds: float, out: Path) -> dict[str, Any]:
    """Run it for at most so long; {"status", "rc", "seconds", "result": the last line of its output}."""
    path = f"{machine.ROOT}{os.pathsep}{machine.ROOT / 'kernels'}"
    python_path = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", **stage.env}
    command = [word.replace(SECONDS, str(max(1, int(seconds) - 15))) for word in stage.command]
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
            rc = process.wait(max(0.1, seconds))
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
    stages: Sequence[Stage], minutes: float, out: Path, tree: str, any_tree: bool = False
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
            outcomes[stage.name] = run_stage(stage, min(stage.limit_s, left), out)
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
    for row in machine.read_lines(out / "step.jsonl"):
        if "tokens_per_s" in row:
            text += f"\n{row['config']} {row['arm']}: {row['tokens_per_s']:.0f} tokens/s"
            text += f", MFU {row['mfu_nanogpt']:.1%} (nanoGPT's count)" if "mfu_nanogpt" in row else ""
    return text


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, help="needed to run")
    parser.add_argument("--previous", type=Path, nargs="*", default=[], help="folders of earlier results")
    parser.add_argument("--only", nargs="+", metavar="STAGE")
    parser.add_argument(
        "--any_tree", action="store_true", help="skip what was done with other versions of the files too"
    )
    parser.add_argument("--list", action="store_true", help="the stages and their limits")
    parser.add_argument("--dry_run", action="store_true", help="the stages' commands")
    args = parser.parse_args(argv)
    stages = all_stages(args.out or Path("DIR"))
    names = [stage.name for stage in stages]
    for name in args.only or []:
        if name not in names:
            raise ConfigError(f"unknown stage {name!r}{did_you_mean(name, names)}", expected=", ".join(names))
    stages = [stage for stage in stages if args.only is None or stage.name in args.only]
    if args.list or args.dry_run:
        for stage in stages:
            command = " ".join(map(str, stage.command)) if args.dry_run else ""
            print(f"{stage.name:<24}{stage.limit_s:>5.0f} s  {stage.missing or command}".rstrip())
        return 0
    machine.require_cuda("bench/gpu_session.py")
    if args.out is None:
        raise ConfigError("where should the results go?", expected="--out DIR")
    args.out.mkdir(parents=True, exist_ok=True)
    take_over(args.previous, args.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    outcomes = run_session(stages, args.minutes, args.out.resolve(), machine.tree_hash(), args.any_tree)
    rows = [[name, o["status"], o.get("seconds"), o.get("note", ""), o["result"]] for name, o in outcomes]
    print(measured(args.out))
    print(machine.table(["stage", "status", "s", "", "result"], rows))
    return 1 if any(o["status"] == "failed" for _, o in outcomes) else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
