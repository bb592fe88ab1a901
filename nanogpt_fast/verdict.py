"""Whether our kernels are right on this GPU: found once for each kind of run, in a process of its own, and remembered.

A kernel that is wrong may also crash the process, poison its CUDA context or never return; so verify.py's child tries
the ops, names each before it runs, and is started again without the one that it died in. A verdict holds for what
`facts_of` lists. It is a JSON file in the user's cache; one that found a fault leaves a report to send beside it.
"""

import dataclasses
import datetime
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanogpt_fast import proof, tuned
from nanogpt_fast.child import DIED, Child
from nanogpt_fast.data.dataset import read_meta
from nanogpt_fast.data.splits import dataset_folder
from nanogpt_fast.distributed import World
from nanogpt_fast.errors import DeviceError, NanogptError
from nanogpt_fast.files import load_json, sha256_of, user_cache, write_atomic, write_json
from nanogpt_fast.hardware import capability_of
from nanogpt_fast.launch_plan import as_proven
from nanogpt_fast.ops import (
    OLDEST,
    OP_NAMES,
    REFERENCE,
    Ops,
    keep_rows,
    kept_rows,
    require_heads,
    row_as_json,
    rows_asked,
    select_ops,
)
from nanogpt_fast.proof import Setup, rehearse
from nanogpt_fast.restore import restore, shape_of
from nanogpt_fast.settings.config import Config, GPTConfig
from nanogpt_fast.weights.canonical import GPT2_PADDED

log = logging.getLogger(__name__)
LIMIT_S = 480.0  # in all, most of it compiling; less than the ten minutes that other ranks wait in a collective
TRANSIENT = ("no end", "signal 9")  # too slow a machine, too little memory: of no op in particular
EVENTS = {"began", "ended", "wrong", "untried", "spent"}  # of a child


@dataclass(frozen=True)
class Verdict:
    """wrong: {op: its fault}; untried: {op: what kept it from being tried}. Plain PyTorch does both."""

    facts: dict[str, Any]
    wrong: dict[str, str] = field(default_factory=dict)
    untried: dict[str, str] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)  # {op, or "compiling": seconds}
    made: str = ""
    seconds: float = 0.0

    @property
    def refused(self) -> list[str]:
        return [*self.wrong, *self.untried]


def shape_of_run(config: Config) -> GPTConfig:
    """The shape that a training run with these flags would have."""
    if config.run.init_from != "scratch":
        restored = restore(config.run.init_from, config.run.out_dir, config.data.data_dir, config.run.resume_step)
        return shape_of(config, restored, None, lambda _: None)
    folder = dataset_folder(config.data)
    meta = read_meta(folder, config.model.vocab_size) if folder else None
    known = meta.vocab_size if meta and meta.tokenizer.get("kind") != "gpt2" else GPT2_PADDED
    return config.shape(config.model.vocab_size or known)


def require_triton(device: torch.device) -> None:
    """DeviceError where the Triton ops cannot run."""
    select_ops("triton", device.type)
    if device.type == "cuda":
        require_capability(capability_of(device) or 0, str(device))


def check_kernels(config: Config, device_type: str) -> None:
    """An error for --kernels that cannot be had here, or not for this shape; before the data are read."""
    ops = select_ops(config.system.kernels, device_type)
    if config.run.init_from == "scratch":  # else the weights say
        require_heads(ops, config.model.n_embd // config.model.n_head)


def require_capability(capability: int, where: str) -> None:
    """DeviceError where it is below that of the Triton ops."""
    if capability < OLDEST:
        raise DeviceError(
            "the Triton ops are not for this GPU",
            where=where,
            expected=f"compute capability {OLDEST / 10} or later",
            found=str(capability / 10),
            hint="--kernels=reference, which --kernels=auto takes here",
        )


def setup_of(config: Config, shape: GPTConfig, dtype: torch.dtype) -> Setup:
    """What a training run with this configuration asks of the ops."""
    return Setup(
        shape,
        str(dtype).removeprefix("torch."),
        config.system.residual_dtype == "float32",
        config.system.recompute,
        config.data.document_mask,
        config.data.batch_size * shape.block_size,
    )


def facts_of(setup: Setup, device: torch.device) -> dict[str, Any]:
    """What a verdict holds for: anything else, and the ops are tried anew."""
    shape = dataclasses.asdict(setup.shape) | {"dropout": setup.shape.dropout > 0.0}
    return {
        **tuned.facts_of(device),
        "launch_rows": tuned.digest(),
        "proof": sha256_of(Path(proof.__file__))[:16],
        **{name: value for name, value in shape.items() if name != "n_layer"},  # one block is tried
        "rows": min(setup.rows, proof.ROWS),
        **{name: getattr(setup, name) for name in ("dtype", "wide_residual", "recompute", "documents")},
        "float32_products": torch.get_float32_matmul_precision() if setup.dtype == "float32" else "",
    }


# ---- what is remembered ----


def _path(facts: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return user_cache("verdicts") / f"{digest}.json"


def remembered(facts: dict[str, Any]) -> Verdict | None:
    """The verdict on exactly this; None for one that cannot be read as well."""
    try:
        found = load_json(_path(facts))
        verdict = Verdict(**found)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # RuntimeError: there is no home
        return None
    return verdict if verdict.facts == facts and set(verdict.wrong) <= set(OP_NAMES) else None


def remember(verdict: Verdict) -> Path | None:
    """Write it, and a report where something is wrong, whose path is returned. What could not be tried this time is
    tried the next. A cache that cannot be written costs the next run its time."""
    report = None
    try:
        path = _path(verdict.facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not verdict.untried:
            write_json(path, dataclasses.asdict(verdict))
        if verdict.wrong:
            report = path.with_suffix(".txt")
            write_atomic(report, _report(verdict).encode())
    except (OSError, RuntimeError) as error:
        log.warning("the verdict on the kernels cannot be kept: %s", error)
    return report


def _report(verdict: Verdict) -> str:
    lines = ["nanogpt_fast: kernels that differ from plain PyTorch on this machine", f"found {verdict.made}", ""]
    lines += [f"{name}: {wrong}" for name, wrong in verdict.wrong.items()]
    return "\n".join([*lines, "", *(f"{name} = {value}" for name, value in verdict.facts.items())]) + "\n"


# ---- how it is found ----


def given_to_child(setup: Setup, device: torch.device) -> dict[str, Any]:
    """What a child needs to know of a run, for JSON."""
    return {"setup": dataclasses.asdict(setup), "device": str(device), "capability": capability_of(device),
            "tf32": torch.get_float32_matmul_precision()}  # fmt: skip


def taken_by_child(given: dict[str, Any]) -> tuple[Setup, torch.device]:
    """(the setup, the device): the child's side, which multiplies float32 as its parent does."""
    torch.set_float32_matmul_precision(given["tf32"])  # by which attention's products are compiled
    setup = Setup(**{**given["setup"], "shape": GPTConfig(**given["setup"]["shape"])})
    return setup, torch.device(given["device"])


def child_command(setup: Setup, device: torch.device, skip: Sequence[str]) -> list[str]:
    """What verify.py's main takes apart again."""
    if rows := kept_rows():
        ours, capability = select_ops("triton", device.type), capability_of(device) or tuned.INTERPRETED
        rows = as_proven(rows, rows_asked(partial(rehearse, setup, ours), capability))
    given = {**given_to_child(setup, device), "skip": list(skip),
             "launch_rows": [row_as_json(*pair) for pair in rows.items()]}  # fmt: skip
    return [sys.executable, "-m", "nanogpt_fast.verify", "--child", json.dumps(given)]


def judge(
    setup: Setup,
    device: torch.device,
    limit_s: float = LIMIT_S,
    command: Callable[[Setup, torch.device, Sequence[str]], list[str]] = child_command,
) -> Verdict:
    """Try every op, in processes of their own: one more after each that an op has ended."""
    began, facts = time.monotonic(), facts_of(setup, device)
    wrong: dict[str, str] = {}
    untried: dict[str, str] = {}
    spent: dict[str, float] = {}
    done = False
    while not done and len(wrong) < len(OP_NAMES):
        left = limit_s - (time.monotonic() - began)
        lines, how = _run(command(setup, device, tuple(wrong)), max(1.0, left))
        running, ended = "", set()
        for line in lines:
            running = line.get("began", running if line.get("ended") != running else "")
            ended |= {line["ended"]} if "ended" in line else set()
            wrong |= line.get("wrong", {})
            untried |= line.get("untried", {})
            spent |= line.get("spent", {})
            done = done or "spent" in line
        if not done and (not running or how.startswith(TRANSIENT)):  # no op's fault
            untried |= {name: how for name in OP_NAMES if name not in ended - {running} and name not in wrong}
            break
        if not done:
            wrong[running] = DIED.format(how=how)
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Verdict(facts, wrong, untried, spent, made, round(time.monotonic() - began, 1))


def _run(command: list[str], limit_s: float) -> tuple[list[dict[str, Any]], str]:
    """(the events that it printed; how it ended)."""
    child = Child(command)
    try:
        return [event for event in child.events(limit_s) if event.keys() <= EVENTS], child.how
    finally:
        child.end()


# ---- which ops a run takes ----


def ops_of_run(
    spec: str, setup: Setup, world: World, say: Callable[[str], None], check: bool = True, rows: str = "tuned"
) -> Ops:
    """The ops that --kernels names for this run, and on them the launch rows that --rows names. `auto` on CUDA is our
    kernels where they were found right, here and now if that is not known yet (check=False: then it is plain PyTorch);
    all ranks take rank 0's word."""
    tuned.take(rows, spec, setup, world, say)
    if spec.split(",")[0].strip() != "auto" or world.device.type != "cuda":
        ops = select_ops(spec, world.device.type)
        require_heads(ops, setup.shape.n_embd // setup.shape.n_head)
        return ops
    refused, tuned_rows = list(OP_NAMES), bool(kept_rows())
    able = (capability_of(world.device) or 0) >= OLDEST and os.environ.get("TRITON_INTERPRET") != "1"
    if world.is_main and able:
        try:
            refused = _refused(setup, world.device, say, check)
        except (NanogptError, ImportError, RuntimeError, OSError) as error:  # no Triton, no ptxas
            say(f"kernels: reference ({str(error).splitlines()[0]})")
    refused = world.main_object(refused)
    if tuned_rows:  # which rank 0 may have found wrong
        tuned.agree(world)
    if world.any(not able) or len(refused) == len(OP_NAMES):
        return select_ops(spec, "cuda")
    ours = dataclasses.replace(select_ops("triton", "cuda"), **{name: getattr(REFERENCE, name) for name in refused})
    return select_ops(spec, "cuda", ours)


def _refused(setup: Setup, device: torch.device, say: Callable[[str], None], check: bool) -> list[str]:
    """The ops that plain PyTorch must do."""
    select_ops("triton", "cuda")
    verdict = _found(setup, device, say, check)
    if kept_rows() and (verdict is None or verdict.wrong):  # with the shipped rows it may be known, or right
        if verdict is not None:
            say("kernels: wrong with launch rows tuned on this GPU, so the shipped ones are taken; "
                "`python -m nanogpt_fast.tune` measures anew")  # fmt: skip
        keep_rows({})
        verdict = _found(setup, device, say, check)
    if verdict is None:
        say("kernels: reference; `python -m nanogpt_fast.verify` or a training run tries the Triton ops")
        return list(OP_NAMES)
    return verdict.refused


def _found(setup: Setup, device: torch.device, say: Callable[[str], None], check: bool) -> Verdict | None:
    """The verdict that is remembered, else one that is found now; without check there may be none."""
    verdict = remembered(facts_of(setup, device))
    if verdict is not None:
        say(f"kernels: {_summary(verdict)}, as tried {verdict.made[:10]}{tuned.words()}")
    elif check:
        say("kernels: trying the Triton ops on this GPU, once for this shape, dtype and software ...")
        verdict = judge(setup, device)
        report = remember(verdict)
        for name, wrong in verdict.wrong.items():
            log.warning("%s differs from plain PyTorch, which takes its place: %s", name, wrong)
        for name, why in verdict.untried.items():
            log.warning("%s could not be tried, and plain PyTorch takes its place this time: %s", name, why)
        if report is not None:
            log.warning("please send %s to the project's issues", report)
        say(f"kernels: {_summary(verdict)}, tried in {verdict.seconds:.0f} s{tuned.words()}")
    return verdict


def ops_known(
    spec: str, shape: GPTConfig, device: torch.device, dtype: torch.dtype, documents: bool | None = False
) -> Ops:
    """Those of a model that is sampled from or scored: nothing is tried, what is known counts."""
    setup = Setup(shape, str(dtype).removeprefix("torch."), documents=bool(documents))
    return ops_of_run(spec, setup, World(device=device), partial(print, file=sys.stderr), check=False)


def _summary(verdict: Verdict) -> str:
    if len(verdict.refused) == len(OP_NAMES):
        return "reference"
    return (
        f"{','.join(['triton', *(f'{name}=reference' for name in verdict.refused)])} by ptxas {verdict.facts['ptxas']}"
    )
