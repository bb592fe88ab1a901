"""What `verify` runs: every op judged in a child, and the child."""

import json
import time
from functools import partial
from typing import Any

import torch

from nanogpt_fast import tuned
from nanogpt_fast.distributed import World, resolve_device, resolve_dtype
from nanogpt_fast.errors import DeviceError
from nanogpt_fast.ops import OP_NAMES, compile_ahead, keep_rows, row_from_json, select_ops
from nanogpt_fast.proof import Witness, exercise, rehearse
from nanogpt_fast.settings.config import Config
from nanogpt_fast.verdict import judge, remember, require_triton, setup_of, shape_of_run, taken_by_child


def verify(config: Config) -> int:
    """Judge, remember, and print a line an op; the exit code. Raises NanogptError."""
    device = resolve_device(config.system.device)
    require_triton(device)
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


def child(given: dict[str, Any]) -> int:
    """Try the ops, for verdict.judge: a JSON line as each begins and ends and for each fault, and one at the end."""
    began = time.perf_counter()
    setup, device = taken_by_child(given)
    ours = select_ops("triton", device.type)
    keep_rows(dict(map(row_from_json, given["launch_rows"])))
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
