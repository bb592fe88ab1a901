"""Are the Triton kernels right on this GPU? `python -m nanogpt_fast.verify [--config NAME] [--flag=value ...]`

Every op as a training run with these flags calls it, values and gradients, against plain PyTorch and float64, then 50
times for the same bits beside other work. The verdict is kept: `--kernels=auto` trains by it. Exit code 5 where an op
is wrong.
"""

import json
import sys
import time
from functools import partial
from typing import Any

import torch

from nanogpt_fast.data.dataset import read_meta
from nanogpt_fast.data.splits import dataset_folder
from nanogpt_fast.distributed import resolve_device, resolve_dtype
from nanogpt_fast.errors import DeviceError, run_command
from nanogpt_fast.ops import OP_NAMES, compile_ahead, select_ops
from nanogpt_fast.proof import Setup, Witness, exercise, rehearse
from nanogpt_fast.restore import restore, shape_of
from nanogpt_fast.settings.cli import load_config
from nanogpt_fast.settings.config import Config, GPTConfig
from nanogpt_fast.verdict import judge, remember, setup_of
from nanogpt_fast.weights.canonical import GPT2_PADDED

PROG = "python -m nanogpt_fast.verify"


def main(argv: list[str]) -> int:
    """Judge, remember, and print a line an op."""
    if argv[:1] == ["--child"]:
        return child(json.loads(argv[1]))
    config = load_config(argv, prog=PROG)
    device = resolve_device(config.system.device)
    select_ops("triton", device.type)  # a DeviceError where they cannot run
    setup = setup_of(config, shape_of_run(config), resolve_dtype(config.system.dtype, device))
    torch.set_float32_matmul_precision("high" if config.system.tf32 else "highest")
    verdict = judge(setup, device)
    for name, value in verdict.facts.items():
        print(f"{name:<14}{value}")
    print()
    for name in OP_NAMES:
        print(f"{name:<22}{verdict.spent.get(name, 0.0):>6.1f} s  {verdict.wrong.get(name) or 'right'}")
    report = remember(verdict)
    print(f"\n{len(OP_NAMES) - len(verdict.wrong)} of {len(OP_NAMES)} ops are right, {verdict.seconds:.0f} s, "
          f"{verdict.spent.get('compiling', 0.0):.0f} of them compiling")  # fmt: skip
    if verdict.wrong:
        raise DeviceError(
            "some kernels differ from plain PyTorch here",
            where=", ".join(verdict.wrong),
            hint=f"--kernels=auto trains without them; please send {report} to the project's issues",
        )
    return 0


def shape_of_run(config: Config) -> GPTConfig:
    """The shape that a training run with these flags would have."""
    if config.run.init_from != "scratch":
        restored = restore(config.run.init_from, config.run.out_dir, config.data.data_dir)
        return shape_of(config, restored, None, lambda _: None)
    folder = dataset_folder(config.data)
    meta = read_meta(folder) if folder else None
    known = meta.vocab_size if meta and meta.tokenizer.get("kind") != "gpt2" else GPT2_PADDED
    return config.shape(config.model.vocab_size or known)


def child(given: dict[str, Any]) -> int:
    """Try the ops, for verdict.judge: a JSON line before each, and one with all faults at the end."""
    say = partial(print, file=sys.stdout, flush=True)
    setup = Setup(**{**given["setup"], "shape": GPTConfig(**given["setup"]["shape"])})
    device = torch.device(given["device"])
    ours = select_ops("triton", device.type)
    began = time.perf_counter()
    if given["capability"]:
        compile_ahead(partial(rehearse, setup, ours), given["capability"])
    spent = {"compiling": time.perf_counter() - began}
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    torch.set_float32_matmul_precision(given["tf32"])
    witness = Witness(ours, device, skip=frozenset(given["skip"]), began=lambda op: say(json.dumps({"began": op})))
    exercise(setup, device, witness)
    spent |= {name: check.seconds for name, check in witness.checks.items()}
    say(json.dumps({"wrong": {n: check.wrong for n, check in witness.checks.items() if check.wrong}, "spent": spent}))
    return 0


if __name__ == "__main__":
    run_command(main)
