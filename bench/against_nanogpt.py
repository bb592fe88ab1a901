"""The same job by stock nanoGPT and by us, whole processes, in turn: wall time, validation loss, and their ratio.

    python bench/against_nanogpt.py --nanogpt DIR --text tinyshakespeare.txt --rounds 3

DIR is a checkout of karpathy/nanoGPT. The job is nanoGPT README's CPU command (4 layers, 4 heads, 128 wide, block 64,
batch 12, 2000 iterations; evaluations, checkpoints and start-up included). One JSON line a run goes to --out.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nanogpt_fast.prepare import main as prepare

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64",
         "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000",
         "--dropout=0.0"]  # fmt: skip


def commands(nanogpt: Path, dtype: str | None) -> dict[str, tuple[list[str], Path | None]]:
    """{arm: (command, working directory, None for the scratch one)}."""
    config = str(nanogpt / "config/train_shakespeare_char.py")
    chosen = [f"--dtype={dtype}"] if dtype else []
    ours = [sys.executable, "-m", "nanogpt_fast.train", config, *FLAGS]
    return {
        "nanogpt": ([sys.executable, "train.py", config, *FLAGS], nanogpt),
        "ours": ([sys.executable, "-m", "nanogpt_fast.train", "--config", "shakespeare_char_cpu", *chosen], None),
        "ours, nanoGPT's command": (ours, None),
        "ours, float32": ([*ours, "--dtype=float32"], None),
    }


def run(command: list[str], folder: Path) -> dict[str, float]:
    """One process: seconds of wall and processor time, the last val loss, the median iteration."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    began, used = time.perf_counter(), os.times()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    wall, after = time.perf_counter() - began, os.times()
    losses = re.findall(r"val loss ([\d.]+)", done.stdout)
    iterations = [float(x) for x in re.findall(r"^iter \d+: .* time ([\d.]+)ms", done.stdout, re.MULTILINE)]
    return {
        "wall_s": wall,
        "cpu_s": after.children_user - used.children_user + after.children_system - used.children_system,
        "val_loss": float(losses[-1]),
        "best_val_loss": min(map(float, losses)),
        "iter_ms": statistics.median(iterations),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="checkout of karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="tiny Shakespeare")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", help="only these arms")
    parser.add_argument("--dtype", help="of the arm `ours`; by default its preset's")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    args = parser.parse_args()
    arms = {k: v for k, v in commands(args.nanogpt.resolve(), args.dtype).items() if not args.arms or k in args.arms}
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data/shakespeare_char"
        prepare(["shakespeare_char", f"--source={args.text}", f"--out={data}"])
        link = args.nanogpt / "data/shakespeare_char"
        for name in ("train.bin", "val.bin", "meta.pkl"):
            (link / name).write_bytes((data / name).read_bytes())
        for round_number in range(args.rounds):
            for arm, (command, folder) in arms.items():
                figures = run(command, folder or Path(scratch))
                results[arm].append(figures)
                print(
                    f"round {round_number} {arm}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True
                )
                if args.out:
                    facts = {"arm": arm, "date": datetime.date.today().isoformat(), "torch": torch.__version__}
                    machine = {"cores": os.cpu_count(), "cpu": cpu_name(), "python": platform.python_version()}
                    with args.out.open("a") as file:
                        file.write(json.dumps({**facts, **machine, "round": round_number, **figures}) + "\n")
    base = results.get("nanogpt")
    print(f"\n{'arm':<26}{'wall s':>9}{'of nanoGPT':>12}{'iter ms':>9}{'val':>9}{'best val':>10}")
    for arm, rows in results.items():
        ratio = statistics.median(r["wall_s"] / b["wall_s"] for r, b in zip(rows, base)) if base else float("nan")
        median = {k: statistics.median(row[k] for row in rows) for k in rows[0]}
        print(
            f"{arm:<26}{median['wall_s']:>9.1f}{ratio:>12.3f}{median['iter_ms']:>9.2f}{median['val_loss']:>9.4f}"
            f"{median['best_val_loss']:>10.4f}"
        )


def cpu_name() -> str:
    """The processor's own name, as Linux gives it."""
    try:
        return re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[0]
    except (OSError, IndexError):
        return platform.processor()


if __name__ == "__main__":
    main()
