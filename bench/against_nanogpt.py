"""The same job by stock nanoGPT and by us, whole processes, in turn: wall time, validation loss, and their ratio.

    python bench/against_nanogpt.py --nanogpt DIR --text tinyshakespeare.txt --rounds 3 [--iterations 2000] [--out DIR]

DIR is a checkout of karpathy/nanoGPT; its files are copied, nothing is written there. The job is nanoGPT README's CPU
command (4 layers, 4 heads, 128 wide, block 64, batch 12, 2000 iterations; evaluations, checkpoints and start-up
included) on the characters of --text, or of Python's own library where none is given.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
from turns import rotated

from nanogpt_fast.command import run_command
from nanogpt_fast.prepare import main as prepare

ARMS = ("nanogpt", "ours", "ours, nanoGPT's command", "ours, float32")


class Failed(Exception):
    """Why a run did not get through."""


def flags(iterations: int, dataset: str) -> list[str]:
    """nanoGPT's own, which we take too."""
    every = max(1, min(250, iterations // 4))
    return ["--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64",
            "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", f"--max_iters={iterations}",
            f"--lr_decay_iters={iterations}", "--dropout=0.0", f"--eval_interval={every}",
            f"--warmup_iters={min(100, iterations // 10)}", f"--dataset={dataset}"]  # fmt: skip


def commands(nanogpt: Path | None, scratch: Path, args: argparse.Namespace) -> dict[str, tuple[list[str], Path]]:
    """{arm: (command, working directory)}: without nanoGPT's files ours alone."""
    given = flags(args.iterations, args.dataset)
    schedule = [
        flag for flag in given if flag.startswith(("--max", "--lr", "--eval_interval", "--warmup", "--dataset"))
    ]
    preset = [sys.executable, "-m", "nanogpt_fast.train", "--config", "shakespeare_char_cpu", *schedule]
    found = {"ours": ([*preset, *([f"--dtype={args.dtype}"] if args.dtype else [])], scratch)}
    if nanogpt is not None:
        config = str(nanogpt / "config/train_shakespeare_char.py")
        ours = [sys.executable, "-m", "nanogpt_fast.train", config, *given]
        found["nanogpt"] = ([sys.executable, "train.py", config, *given], nanogpt)
        found |= {ARMS[2]: (ours, scratch), ARMS[3]: ([*ours, "--dtype=float32"], scratch)}
    return found


def copied(nanogpt: Path | None, data: Path, scratch: Path) -> Path | None:
    """nanoGPT's files in a folder of ours, with the dataset where it looks for it; None where there is no checkout."""
    if nanogpt is None or not (nanogpt / "train.py").is_file():
        return None
    copy = scratch / "nanogpt"
    (copy / "config").mkdir(parents=True)
    for name in ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py"):
        shutil.copy(nanogpt / name, copy / name)
    (copy / "data" / data.name).mkdir(parents=True)
    for name in ("train.bin", "val.bin", "meta.pkl"):
        shutil.copy(data / name, copy / "data" / data.name / name)
    return copy


def run(command: list[str], folder: Path) -> dict[str, float]:
    """One process: seconds of wall and processor time, the last val loss, the median iteration. Failed says why not."""
    env = {**os.environ, "PYTHONPATH": f"{machine.ROOT}{os.pathsep}{machine.ROOT / 'kernels'}"}
    began, used = time.perf_counter(), os.times()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    wall, after = time.perf_counter() - began, os.times()
    losses = re.findall(r"val loss ([\d.]+)", done.stdout)
    iterations = [float(x) for x in re.findall(r"^iter \d+: .* time ([\d.]+)ms", done.stdout, re.MULTILINE)]
    if done.returncode or not losses or not iterations:
        last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-1:]
        raise Failed(f"exit code {done.returncode}: {''.join(last)[:200]}")
    return {
        "wall_s": wall,
        "cpu_s": after.children_user - used.children_user + after.children_system - used.children_system,
        "val_loss": float(losses[-1]),
        "best_val_loss": min(map(float, losses)),
        "iter_ms": statistics.median(iterations),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, default=os.environ.get("NANOGPT_DIR"), help="karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, help="tiny Shakespeare; else the sources of Python's library")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS), help="only these arms")
    parser.add_argument("--dtype", help="of the arm `ours`; by default its preset's")
    parser.add_argument("--out", type=Path, help="append to DIR/train.jsonl")
    args = parser.parse_args(argv)
    args.dataset = "shakespeare_char" if args.text else "stdlib"
    facts = {**machine.machine_facts("cpu"), "iterations": args.iterations, "dataset": args.dataset}
    lines = machine.Lines(args.out and args.out / "train.jsonl", bench="train", **facts)
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data = scratch / "data" / args.dataset
        prepare([args.dataset, *([f"--source={args.text}"] if args.text else []), f"--out={data}"])
        arms = commands(copied(args.nanogpt and Path(args.nanogpt), data, scratch), scratch, args)
        for name in args.arms:
            if name not in arms:
                lines.write(arm=name, status="missing: name a checkout of karpathy/nanoGPT by --nanogpt DIR")
                print(f"{name}: missing: --nanogpt DIR, a checkout of karpathy/nanoGPT", flush=True)
        arms = {name: arms[name] for name in args.arms if name in arms}
        for number in range(args.rounds):
            for arm in rotated(list(arms), number):
                try:
                    figures = run(*arms[arm])
                except Failed as problem:
                    lines.write(arm=arm, round=number, status=f"failed: {problem}")
                    print(f"round {number} {arm}: {problem}", flush=True)
                    continue
                results.setdefault(arm, []).append({"round": number, **figures})
                lines.write(arm=arm, round=number, status="ok", **figures)
                said = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
                print(f"round {number} {arm}: {said}", flush=True)
    print(f"\n{machine.table(['arm', 'wall s', 'of nanoGPT', 'iter ms', 'val', 'best val'], summary(results))}")
    return 0 if results else 1


def summary(results: dict[str, list[dict[str, float]]]) -> list[list[Any]]:
    """A line an arm: medians over the rounds; of nanoGPT: the median of the ratios within a round."""
    stock = {row["round"]: row["wall_s"] for row in results.get("nanogpt", [])}
    found = []
    for arm, rows in results.items():
        ratios = [row["wall_s"] / stock[row["round"]] for row in rows if row["round"] in stock]
        median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        found.append([arm, median["wall_s"], statistics.median(ratios) if ratios else None, median["iter_ms"],
                      median["val_loss"], median["best_val_loss"]])  # fmt: skip
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
