"""Who takes part in an op's benchmark (ops.py), who cannot, and whose results are wrong, with the reason."""

import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import cases
import harness
import peer_facts
import torch
from cases import CASES
from harness import Contestant
from op_inputs import Setting

from nanogpt_fast import agreement

WITHOUT_GPU = ("0 active drivers", "No viable backend")  # what Triton, and torch of cuDNN's attention, say on a CPU
PEERS = tuple(sorted(path.stem for path in (Path(__file__).parent / "peers").glob("*.py")))


@dataclass
class Lineup:
    """{name: contestant}, and {name: why it takes no part}."""

    contestants: dict[str, Contestant] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, find: Callable[[], dict[str, Contestant]]) -> None:
        try:
            self.contestants |= find()
        except Exception as problem:  # a peer that breaks on import is as good as missing, and must not stop the rest
            missing, how = isinstance(problem, ImportError), peer_facts.facts(name).requires
            why = f"{'not installed' if missing else 'broken'} ({first_line(problem)})"
            self.absent[name] = f"{why}; {how}" if how else why


def first_line(problem: BaseException) -> str:
    text = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {text[0]}"[:160] if text else type(problem).__name__


def contestants(op: str, at: Setting, peers: list[str], compiled: bool = True, ours: bool = True) -> Lineup:
    """Everyone for an op; without ours on a CPU, where its interpreter's times mean nothing."""
    lineup = Lineup()
    if ours:
        lineup.add("ours", lambda: _ours(op, at))
    else:
        lineup.absent["ours"] = "missing: Triton ops need a GPU"
    lineup.add("eager", lambda: {"eager": harness.plain(cases.specification(op), capturable=not CASES[op].syncs)})
    if compiled and at.device.type == "cpu" and not cpp_compiler():
        lineup.absent["torch.compile"] = "missing: torch.compile on a CPU needs a C++ compiler (g++, clang++ or CXX)"
    elif compiled:
        lineup.add("torch.compile", lambda: _compiled(op))
    for name in peers if at.p == 0.0 else []:
        lineup.add(name, lambda name=name: peer_contestants(name, op))
    return lineup


def cpp_compiler() -> str | None:
    """The one that torch.compile would find on this machine."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "c++"))), None)


def _ours(op: str, at: Setting) -> dict[str, Contestant]:
    """Ours, and ours with each boolean choice of its launch rows the other way."""
    from nanogpt_kernels import launch

    stock = harness.plain(cases.ours(op))
    found = {"ours": stock}
    for name, row in dict(cases.recorded(op, at, launch.architecture(at.device), backward=True).rows).items():
        for choice, value in row.choices.items():
            if isinstance(value, bool):
                within = partial(launch.override, name, choices={choice: not value})
                found[f"ours, {choice}={not value}"] = replace(stock, within=within)
    return found


def _compiled(op: str) -> dict[str, Contestant]:
    if CASES[op].syncs:
        return {}
    return {"torch.compile": harness.plain(torch.compile(cases.specification(op), dynamic=False))}


def peer_contestants(name: str, op: str) -> dict[str, Contestant]:
    """{its contestants for the op} of bench/peers/NAME.py."""
    served = op in peer_facts.facts(name).ops
    return importlib.import_module(f"peers.{name}").contestants(op) if served else {}


# ---- their results ----

Results = tuple[list[torch.Tensor | None], list[torch.Tensor | None]]  # outputs (or what was mutated), gradients


def results(contestant: Contestant, op: str, at: Setting) -> Results:
    """Of one run on fresh inputs, in memory that was full of NaN."""
    args = CASES[op].inputs(at)
    bound = contestant.bind(*args)
    megabytes = min(2048, 1 + sum(a.numel() * a.element_size() for a in args if isinstance(a, torch.Tensor)) // 2**19)
    with contestant.within():
        if CASES[op].mutates:
            outs = harness.outputs_of(bound.forward())
            return [*outs, *(args[i] for i in CASES[op].mutates)], []
        douts = cases.douts_of(harness.outputs_of(bound.forward()), at)
        harness.poison(at.device, megabytes)
        outs, grads = harness.both(bound, douts)
    return list(outs), list(bound.canonical(grads))


def difference(got: Results, expected: Results) -> float:
    """The largest relative error over results that both have (peers lack some); NaN where one is NaN or misshapen."""
    pairs = [pair for mine, theirs in zip(got, expected) for pair in zip(mine, theirs)]
    errors = [agreement.relative_error(a, b) for a, b in pairs if a is not None and b is not None]
    return float("nan") if any(e != e for e in errors) else max(errors)


def checked(op: str, at: Setting, lineup: Lineup) -> dict[str, float | str]:
    """{contestant: relative error, or what went wrong}; those that fail are taken out. The measure is eager, the
    specification itself; where that fails (memory), ours."""
    verdicts: dict[str, float | str] = {}
    expected = None
    for name in sorted(lineup.contestants, key=lambda name: name != "eager"):
        try:
            got = results(lineup.contestants[name], op, at)
            expected = expected or got
            error = difference(got, expected)
            verdicts[name] = error if error <= agreement.TOLERANCE[at.dtype] else f"WRONG: relative error {error:.3g}"
        except Exception as problem:
            needs_gpu = at.device.type == "cpu" and any(words in str(problem) for words in WITHOUT_GPU)
            verdicts[name] = f"{'missing: needs a GPU' if needs_gpu else 'failed'}: {first_line(problem)}"
        if isinstance(verdicts[name], str):
            del lineup.contestants[name]
        harness.release(at.device)
    return verdicts
