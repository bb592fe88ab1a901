"""What `tune` runs: the search, what it keeps and says, and its two children."""

import json
import sys
import time
from functools import partial
from typing import Any

import torch

from nanogpt_fast import tuned
from nanogpt_fast.child import DIED
from nanogpt_fast.command import Stopped
from nanogpt_fast.distributed import World, resolve_device, resolve_dtype
from nanogpt_fast.dry_run import dtype_on, gpu_named
from nanogpt_fast.errors import ConfigError, DeviceError
from nanogpt_fast.gpus import GPUS
from nanogpt_fast.hardware import capability_of
from nanogpt_fast.launch_plan import cases_of, proven
from nanogpt_fast.launch_race import Compiler, Race, raced, serve
from nanogpt_fast.launch_search import candidates, shown
from nanogpt_fast.ops import REFERENCE, Ops, select_ops
from nanogpt_fast.settings.config import Config
from nanogpt_fast.tuning import WHOLE_S, Died, Kept, Remote, Target, Tuning, targets_of
from nanogpt_fast.verdict import (
    given_to_child,
    require_capability,
    require_triton,
    setup_of,
    shape_of_run,
    taken_by_child,
)


def run(config: Config, minutes: float) -> int:
    """Measure for so long, keep, and say what it comes to; the exit code. Raises NanogptError."""
    until = time.monotonic() - WHOLE_S + 60.0 * minutes
    if config.system.dry_run:
        print("\n".join(listed(config)))
        return 0
    device = resolve_device(config.system.device)
    if device.type != "cuda":
        raise DeviceError(
            "launch rows are timed on a CUDA GPU",
            where=f"--device={config.system.device}",
            expected="cuda",
            found=f"{device}, torch {torch.__version__}",
            hint="`python -m nanogpt_fast.tune --dry_run --on=h100` lists what would be tried; or nanogpt_fast.doctor",
        )
    require_triton(device)
    ours = ours_of(config)
    torch.set_float32_matmul_precision("high" if config.system.tf32 else "highest")
    setup = setup_of(config, shape_of_run(config), resolve_dtype(config.system.dtype, device))
    facts = tuned.facts_for(setup, device)
    tuned.take(config.system.rows, "triton", setup, World(device=device), print)
    earlier = tuned.read(facts) if config.system.rows == "tuned" else {}
    given = {**given_to_child(setup, device), "kernels": config.system.kernels}
    racer, compiler = (
        Remote([sys.executable, "-m", "nanogpt_fast.tune", "--child", json.dumps({**given, "role": role})], does)
        for role, does in (("race", "times"), ("compile", "compiles"))
    )
    data = config.data
    print(f"tuning on {facts['gpu']} for {minutes:g} minutes: {setup.shape.num_params() / 1e6:,.2f}M "
          f"parameters, micro-batches of {data.batch_size} x {data.block_size} tokens, {setup.dtype}")  # fmt: skip
    try:
        tuning = Tuning(setup, ours, capability_of(device) or 0, data.gradient_accumulation_steps, racer, compiler, say)
        return tune(tuning, facts, earlier, until)
    finally:
        racer.end()
        compiler.end()


def tune(tuning: Tuning, facts: dict[str, str], earlier: dict[Any, tuned.Entry], until: float) -> int:
    """Search, keeping each better row as it is found; then look at all of them together. earlier: the entries whose
    rows are the present ones."""
    kept: dict[Any, Kept] = {}

    def keep(found: Kept) -> None:
        key, before = found.target.key, earlier.get(found.target.key)
        kept[key] = found
        of = f"{found.target.case.op}, {'both ways' if found.target.backward else 'forward'}"
        entry = tuned.entry_of(key, found.row, found.ratio * (before.ratio if before else 1.0), of)
        tuned.write(facts, {key: entry})

    try:
        targets = tuning.targets()
        for target in targets:
            say(f"  {target.cost:8.2f} ms an iteration  {target.name}: {shown(target.present)}")
        tuning.run(targets, until, keep)
    except (KeyboardInterrupt, Stopped):
        say(f"\n{_rows(len(kept))} kept so far, which train takes from now on")
        raise
    for target in targets:
        if target.walk is None and not target.lost:
            say(f"  {target.name}: no time was left for it")
    if not kept:
        say("no row is quicker than the present ones: nothing is kept")
        return 0
    try:
        shipped, now, ratios = tuning.whole()
    except Died as died:
        tuned.write(facts, {key: earlier.get(key) for key in kept})
        say(f"  all together: {DIED.format(how=died.how)}; none of these rows is kept")
        return 0
    for op, ratio in ratios.items():
        say(f"  {op}: {ratio:.3f} of its time with the shipped rows, forward and backward")
    if not now < shipped:
        tuned.write(facts, dict.fromkeys(tuning.kept))
        say("together these rows are no quicker than the shipped ones: none is kept, of earlier ones neither")
        return 0
    say(f"these calls take {shipped:.1f} ms an iteration with the shipped rows, {now:.1f} ms with the kept ones "
        f"({now / shipped:.3f})\n{_rows(len(kept))} kept in {tuned.path_of(facts)}\n"
        "next: train takes them, and verifies the kernels with them once; --rows=shipped does not")  # fmt: skip
    return 0


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


def say(line: str) -> None:
    print(line, flush=True)


def ours_of(config: Config) -> Ops:
    """The ops of --kernels, `auto` being ours. ConfigError where none is."""
    ours = select_ops(config.system.kernels, "cuda", select_ops("triton", "cuda"))
    if ours == REFERENCE:
        raise ConfigError(
            "plain PyTorch has no launch rows",
            where=f"--kernels={config.system.kernels}",
            expected="auto or triton, for some op",
        )
    return ours


def listed(config: Config) -> list[str]:
    """--dry_run: the launch rows that the run reaches on this GPU or --on's, and how many are near each."""
    ours, name = ours_of(config), config.system.on and gpu_named(config.system.on)
    device = resolve_device(config.system.device)
    if not name and device.type != "cuda":
        name = gpu_named("h100")
    capability = (GPUS[name].capability if name else capability_of(device)) or 0
    require_capability(capability, name or str(device))
    dtype = dtype_on(GPUS[name], config.system.dtype) if name else resolve_dtype(config.system.dtype, device)
    setup = setup_of(config, shape_of_run(config), dtype)
    if not name:
        tuned.take(config.system.rows, "triton", setup, World(device=device), print)
    cases = cases_of(setup, ours, capability, config.data.gradient_accumulation_steps)
    targets = targets_of(cases, {}, cases_of(proven(setup), ours, capability))
    where = f"{name or torch.cuda.get_device_name(device)} (sm_{capability}), {setup.dtype}"
    return [f"{_rows(len(targets))} to tune on {where}; as many others are one or two changes away:",
            *(f"  {_near(target):>5}  {target.name}: {shown(target.present)}" for target in targets)]  # fmt: skip


def _near(target: Target) -> int:
    """How many rows lie around the present one; a search leaves out those that launch the same."""
    return sum(1 for _ in candidates(target.key.op, target.present))


def child(given: dict[str, Any]) -> int:
    """A process that times rows on the GPU, or one that compiles them and never touches it; a request a line."""
    setup, device = taken_by_child(given)
    ours = select_ops(given["kernels"], "cuda", select_ops("triton", "cuda"))
    if given["role"] == "compile":
        answer = Compiler(setup, ours, given["capability"]).compiled
    else:
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
        answer = partial(raced, Race(setup, device, ours))
    serve(answer, sys.stdin, lambda event: print(json.dumps(event), flush=True))
    return 0
