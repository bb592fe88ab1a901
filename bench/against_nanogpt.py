"""The same job by stock nanoGPT and by us, whole processes, in turn: wall time, losses, and their ratio.

    python bench/against_nanogpt.py --nanogpt DIR --text tinyshakespeare.txt --rounds 3 [--iterations 2000] [--out DIR]
    python bench/against_nanogpt.py --job gpt2_124m --nanogpt DIR --rounds 1      # on a GPU, as shakespeare_char

Jobs: `cpu`, nanoGPT README's CPU command (4 layers, 4 heads, 128 wide, block 64, batch 12, 2000 iterations);
`shakespeare_char`, its config for a GPU, to the end (5000 iterations, val 1.47 in its README); `gpt2_124m`, 500
iterations of 65,536 tokens, in which both draw the same weights and batches: their losses are laid beside each other.
Evaluations, checkpoints and start-up are included. The text is --text, or Python's own library where none is given.
DIR is a checkout of karpathy/nanoGPT; its files are copied, nothing is written there.
"""

import argparse
import os
import re
import shlex
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

ARMS = ("nanogpt", "ours", "ours, nanoGPT's command", "ours, float32")
JOBS = {"cpu": 2000, "shakespeare_char": 5000, "gpt2_124m": 500}  # iterations
LAST = 50  # iterations whose mean loss is a run's loss at its end


class Failed(Exception):
    """Why a run did not get through."""


def schedule(args: argparse.Namespace) -> list[str]:
    """nanoGPT's flags, which we take too: how long, how often evaluated."""
    every = max(1, min(250, args.iterations // 4))
    return [f"--max_iters={args.iterations}", f"--lr_decay_iters={args.iterations}", f"--eval_interval={every}",
            f"--warmup_iters={min(100, args.iterations // 10)}", f"--dataset={args.dataset}"]  # fmt: skip


def commands(nanogpt: Path | None, scratch: Path, args: argparse.Namespace) -> dict[str, tuple[list[str], Path]]:
    """{arm: (command, working directory)}: without nanoGPT's files ours alone."""
    config = str((nanogpt or Path()) / "config/train_shakespeare_char.py")
    small = [config, "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64",
             "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0"]  # fmt: skip
    # one micro-batch: of several nanoGPT logs the last one's loss, we all of them
    large = ["--batch_size=64", "--gradient_accumulation_steps=1", "--eval_iters=20", "--log_interval=1"]
    theirs, ours = {
        "cpu": (small, ["--config", "shakespeare_char_cpu"]),
        "shakespeare_char": ([config], ["--config", "shakespeare_char"]),
        "gpt2_124m": (large, [*large, "--data_order=nanogpt"]),
    }[args.job]
    train = [sys.executable, "-m", "nanogpt_fast.train"]
    dtype = [f"--dtype={args.dtype}"] if args.dtype else []
    found = {"ours": ([*train, *ours, *schedule(args), *dtype], scratch)}
    if nanogpt is not None:
        found["nanogpt"] = ([sys.executable, "train.py", *theirs, *schedule(args)], nanogpt)
        if args.job == "cpu":
            same = [*train, *theirs, *schedule(args)]
            found |= {ARMS[2]: (same, scratch), ARMS[3]: ([*same, "--dtype=float32"], scratch)}
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
        if (data / name).exists():
            shutil.copy(data / name, copy / "data" / data.name / name)
    return copy


def run(command: list[str], folder: Path) -> tuple[dict[str, float], dict[int, float]]:
    """One process: seconds of wall and processor time, the last val loss, the median iteration; {iteration: its loss as
    logged}. Failed says why not."""
    env = {**os.environ, "PYTHONPATH": f"{machine.ROOT}{os.pathsep}{machine.ROOT / 'kernels'}"}
    began, used = time.perf_counter(), os.times()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    wall, after = time.perf_counter() - began, os.times()
    losses = re.findall(r"val loss ([\d.]+)", done.stdout)
    logged = re.findall(r"^iter (\d+): loss ([\d.]+), time ([\d.]+)ms", done.stdout, re.MULTILINE)
    iterations = [float(ms) for *_, ms in logged]
    if done.returncode or not losses or not iterations:
        last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-1:]
        raise Failed(f"exit code {done.returncode}: {''.join(last)[:200]}")
    curve = {int(iteration): float(loss) for iteration, loss, _ in logged}
    figures = {
        "wall_s": wall,
        "cpu_s": after.children_user - used.children_user + after.children_system - used.children_system,
        "val_loss": float(losses[-1]),
        "best_val_loss": min(map(float, losses)),
        "iter_ms": statistics.median(iterations),
        "end_loss": statistics.mean([curve[iteration] for iteration in sorted(curve)][-LAST:]),
    }
    return figures, curve


def gap(ours: dict[int, float], theirs: dict[int, float]) -> dict[str, float]:
    """How far two losses of the same batches are apart: at most, and in the mean of the last iterations."""
    apart = [ours[iteration] - theirs[iteration] for iteration in sorted(ours.keys() & theirs.keys())]
    return {"largest_gap": max(map(abs, apart)), "end_gap": statistics.mean(apart[-LAST:])}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=JOBS, default="cpu")
    parser.add_argument("--nanogpt", type=Path, default=os.environ.get("NANOGPT_DIR"), help="karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, default=os.environ.get("TINY_SHAKESPEARE"),
                        help="tiny Shakespeare; else the sources of Python's library")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, help=", ".join(f"{job}: {count}" for job, count in JOBS.items()))
    parser.add_argument("--arms", nargs="*", choices=ARMS, help="only these arms")
    parser.add_argument("--dtype", help="of the arm `ours`; by default its preset's")
    parser.add_argument("--dry_run", action="store_true", help="say what would run")
    parser.add_argument("--out", type=Path, help="append to DIR/train.jsonl")
    args = parser.parse_args(argv)
    args.iterations = args.iterations or JOBS[args.job]
    args.arms = args.arms or list(ARMS if args.job == "cpu" else ARMS[:2])
    args.dataset = "bins_alone" if args.job == "gpt2_124m" else "shakespeare_char" if args.text else "stdlib"
    facts = {**machine.machine_facts("cpu" if args.job == "cpu" else ""), "config": args.job}
    facts |= {"iterations": args.iterations, "dataset": args.dataset}
    with tempfile.TemporaryDirectory() as folder:
        if args.dry_run:
            for arm, (command, _) in commands(args.nanogpt or Path("nanoGPT"), Path(folder), args).items():
                print(f"{arm}: {shlex.join(command)}")
            return 0
        lines = machine.Lines(args.out and args.out / "train.jsonl", bench="train", **facts)
        return compare(args, lines, Path(folder))


def prepared(args: argparse.Namespace, scratch: Path) -> Path:
    """The folder of the text's tokens; of .bin files alone for a model that has GPT-2's vocabulary."""
    from nanogpt_fast.prepare import main as prepare  # only here: a dry run needs no tyro

    data = scratch / "data" / args.dataset
    source = ["shakespeare_char", f"--source={args.text}"] if args.text else ["stdlib"]
    prepare([*source, f"--out={data}"])
    for meta in data.glob("meta.*") if args.job == "gpt2_124m" else ():
        meta.unlink()
    return data


def compare(args: argparse.Namespace, lines: machine.Lines, scratch: Path) -> int:
    results: dict[str, list[dict[str, float]]] = {}
    data = prepared(args, scratch)
    arms = commands(copied(args.nanogpt and Path(args.nanogpt), data, scratch), scratch, args)
    for name in args.arms:
        if name not in arms:
            lines.write(arm=name, status="missing: name a checkout of karpathy/nanoGPT by --nanogpt DIR")
            print(f"{name}: missing: --nanogpt DIR, a checkout of karpathy/nanoGPT", flush=True)
    arms = {name: arms[name] for name in args.arms if name in arms}
    for number in range(args.rounds):
        curves: dict[str, dict[int, float]] = {}
        for arm in rotated(list(arms), number):
            try:
                figures, curves[arm] = run(*arms[arm])
                if args.job == "gpt2_124m" and len(curves) == 2:
                    figures |= gap(curves["ours"], curves["nanogpt"])
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
