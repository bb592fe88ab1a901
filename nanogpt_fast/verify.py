"""Are the Triton kernels right on this GPU? `python -m nanogpt_fast.verify [--config NAME] [--flag=value ...]`

Every op as a training run with these flags calls it, values and gradients, against plain PyTorch and float64, then 50
times for the same bits beside other work. The verdict is kept: `--kernels=auto` trains by it. Exit code 5 where an op
is wrong.
"""

import json
import time
from functools import partial
from typing import Any

import torch

from nanogpt_fast import tuned
from nanogpt_fast.data.dataset import read_meta
from nanogpt_fast.data.splits import dataset_folder
from nanogpt_fast.distributed import World, resolve_device, resolve_dtype
from nanogpt_fast.errors import DeviceError, run_command
from nanogpt_fast.hardware import capability_of
from nanogpt_fast.launch_plan import as_proven
from nanogpt_fast.ops import OLDEST, OP_NAMES, compile_ahead, keep_rows, row_from_json, rows_asked, select_ops
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
    if device.type == "cuda" and (capability_of(device) or 0) < OLDEST:
        raise DeviceError(
            "the Triton ops are not for this GPU",
            where=str(device),
            expected=f"compute capability {OLDEST / 10} or later",
            found=str((capability_of(device) or 0) / 10),
            hint="--kernels=reference, which --kernels=auto takes here",
        )
    setup = setup_of(config, shape_of_run(config), resolve_dtype(config.system.dtype, device))
    torch.set_float32_matmul_precision("high" if config.system.tf32 else "highest")
    tuned.take(config.system.rows, "triton", setup, World(device=device), print)
    verdict = judge(setup, device)
    for name, value in verdict.facts.items():
        print(f"{name:<14}{value}")
    print()
    said = verdict.wrong | {name: f"not tried: {why}" for name, why in verdict.untried.items()}
    for name in OP_NAMES:
        print(f"{name:<22}{verdict.spent.get(name, 0.0):>6.1f} s  {said.get(name, 'right')}")
    report = remember(verdict)
    print(f"\n{len(OP_NAMES) - len(verdict.refused)} of {len(OP_NAMES)} ops are right, {verdict.seconds:.0f} s, "
          f"{verdict.spent.get('compiling', 0.0):.0f} of them compiling")  # fmt: skip
    if verdict.wrong:
        raise DeviceError(
            "some kernels differ from plain PyTorch here",
            where=", ".join(verdict.wrong),
            hint="--kernels=auto trains without them"
            + f"; please send {report} to the project's issues" * bool(report),
        )
    return 1 if verdict.untried else 0


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
    """Try the ops, for verdict.judge: a JSON line as each begins and ends and for each fault, and one at the end."""
    setup = Setup(**{**given["setup"], "shape": GPTConfig(**given["setup"]["shape"])})
    device, began = torch.device(given["device"]), time.perf_counter()
    torch.set_float32_matmul_precision(given["tf32"])  # by which attention's products are compiled
    ours = select_ops("triton", device.type)
    if given["launch_rows"]:
        asked = rows_asked(partial(rehearse, setup, ours), given["capability"] or tuned.INTERPRETED)
        keep_rows(as_proven(dict(map(row_from_json, given["launch_rows"])), asked))
    if given["capability"]:
        compile_ahead(partial(rehearse, setup, ours), given["capability"])
    spent = {"compiling": time.perf_counter() - began}
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)

    def tell(event: str, op: str, text: str) -> None:
        print(json.dumps({event: {op: text} if text else op}), flush=True)

    witness = Witness(ours, device, skip=frozenset(given["skip"]), tell=tell)
    exercise(setup, device, witness)
    print(json.dumps({"spent": spent | {name: check.seconds for name, check in witness.checks.items()}}), flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
