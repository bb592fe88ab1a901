"""Sampling as a user starts it, whole processes in turn: ours, stock nanoGPT's sample.py, transformers' generate.

    python bench/sample_process.py --nanogpt DIR [--config shakespeare_char --vocab_size 65] [--new_tokens 1 200 500]

One sample from the same random weights, in float32 on the CPU: ours and nanogpt read one ckpt.pt and one meta.pkl, hf
an export of it, whose tokenizer it is spared. From 1 new token, which is start-up and a prompt, to nanoGPT's default
of 500; hf has none past block_size. Of nanoGPT's checkout the files are copied, nothing is written there.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import machine
import step
from turns import Failed, rotated

from nanogpt_fast.command import run_command
from nanogpt_fast.data.meta_pickle import nanogpt_pickle
from nanogpt_fast.weights import formats
from nanogpt_fast.weights.canonical import Weights

ARMS = ("ours", "nanogpt", "hf")
DATASET = "letters"
GENERATE = """\
import sys, torch
from transformers import GPT2LMHeadModel
model, count = GPT2LMHeadModel.from_pretrained(sys.argv[1]), int(sys.argv[2])
ids = torch.zeros((1, 1), dtype=torch.long)
torch.manual_seed(1337)
print(model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_k=200,
                     min_new_tokens=count, max_new_tokens=count, pad_token_id=0)[0].tolist())
"""


def prepared(args: argparse.Namespace, scratch: Path) -> int:
    """The folders that the arms start in, with weights and vocabulary; returns block_size."""
    words = [f"--config={args.config}", f"--vocab_size={args.vocab_size}", "--device=cpu", "--dtype=float32"]
    setup = step.setup_of(step.parsed([*words, "--accumulation=1", *(["--tiny"] if args.tiny else [])]))
    letters = [chr(ord("!") + i) for i in range(setup.shape.vocab_size - 1)]
    weights = Weights(model_args=setup.shape, model=setup.weights, step=1, config={"dataset": DATASET})
    formats.write(weights, scratch / "out", "nanogpt")
    formats.write(weights, scratch / "hf", "hf")
    (scratch / "data" / DATASET).mkdir(parents=True)
    (scratch / "data" / DATASET / "meta.pkl").write_bytes(nanogpt_pickle(["\n", *letters]))
    for name in ("sample.py", "model.py", "configurator.py") if args.nanogpt else ():
        shutil.copy(Path(args.nanogpt) / name, scratch / name)
    return setup.shape.block_size


def commands(count: int, block_size: int, nanogpt: bool) -> dict[str, list[str]]:
    """{arm: command}, in the prepared folder."""
    flags = ["--out_dir=out", "--num_samples=1", f"--max_new_tokens={count}", "--device=cpu", "--dtype=float32"]
    found = {"ours": [sys.executable, "-m", "nanogpt_fast.sample", *flags]}
    if nanogpt:
        found["nanogpt"] = [sys.executable, "sample.py", *flags, "--compile=False"]
    if count < block_size:  # a prompt of one
        found["hf"] = [sys.executable, "-c", GENERATE, "hf", str(count)]
    return found


def run(command: list[str], folder: Path) -> float:
    """Wall seconds of one process. Failed says why there are none."""
    paths = [str(machine.ROOT), str(machine.ROOT / "kernels")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode or not done.stdout.strip():
        raise Failed(f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1][:200]}")
    return seconds


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="shakespeare_char", help="whose sizes")
    parser.add_argument("--vocab_size", type=int, default=65)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--new_tokens", type=int, nargs="+", default=[1, 200, 500])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--nanogpt", type=Path, default=os.environ.get("NANOGPT_DIR"), help="karpathy/nanoGPT")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: to see that this runs")
    parser.add_argument("--out", type=Path, help="append to DIR/sample_process.jsonl")
    args = parser.parse_args(argv)
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        block_size = prepared(args, Path(folder))
        facts = machine.machine_facts("cpu") | {"config": args.config, "block_size": block_size, "dtype": "float32"}
        lines = machine.Lines(args.out and args.out / "sample_process.jsonl", bench="sample_process", **facts)
        for count in args.new_tokens:
            arms = commands(count, block_size, bool(args.nanogpt))
            rows += compared({name: arms[name] for name in args.arms if name in arms}, count, args, Path(folder), lines)
    print(machine.table(["new tokens", "arm", "s", "x first", "quartiles"], rows))
    return 0 if rows else 1


def compared(
    arms: dict[str, list[str]], count: int, args: argparse.Namespace, folder: Path, lines: machine.Lines
) -> list[list[Any]]:
    """A line an arm: its median, and the median of its ratios to the first arm within a round."""
    seconds: dict[str, list[float]] = {}
    for name in list(arms):
        try:
            run(arms[name], folder)  # once uncounted: files come into memory
            seconds[name] = []
        except Failed as problem:
            lines.write(arm=name, new_tokens=count, status=f"failed: {problem}")
            print(f"{name}, {count} tokens: {problem}", flush=True)
    for turn in range(args.rounds):
        for name in rotated(list(seconds), turn):
            seconds[name].append(run(arms[name], folder))
    rows = []
    for name, found in seconds.items():
        own = harness.summary(found)
        ratio = harness.paired(found, next(iter(seconds.values())), "x_first")
        lines.write(arm=name, new_tokens=count, status="ok", seconds=found, median_s=own["ms"], **ratio)
        spread = f"{ratio['x_first_q1']:.3f}-{ratio['x_first_q3']:.3f}"
        rows.append([count, name, own["ms"], ratio["x_first"], spread])
    return rows


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main)
