"""proof.py on the interpreted kernels and on planted faults; verdict.py with children that lie, crash and hang."""

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
from torch import Tensor

from nanogpt_fast import assembler, ops, tuned, verdict, verification, verify
from nanogpt_fast.distributed import World
from nanogpt_fast.files import user_cache
from nanogpt_fast.ops import OP_NAMES, REFERENCE, Ops
from nanogpt_fast.proof import Setup, Witness, exercise, rehearse
from nanogpt_fast.settings.config import GPTConfig
from nanogpt_fast.verdict import Verdict, judge, ops_of_run, remember, remembered

CPU = torch.device("cpu")
SHAPE = GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=16, vocab_size=48, bias=True, dropout=0.1)
SETUP = Setup(SHAPE, "bfloat16", wide_residual=True, documents=True, rows=32)


def found(ours: Ops, setup: Setup = SETUP, repeats: int = 2) -> dict[str, str]:
    """{op: its fault}."""
    witness = Witness(ours, CPU, repeats)
    exercise(setup, CPU, witness)
    assert all(check.calls for check in witness.checks.values()), "an op was never called"
    return {name: check.wrong for name, check in witness.checks.items() if check.wrong}


@pytest.mark.parametrize(
    "setup", [SETUP, Setup(dataclasses.replace(SHAPE, bias=False, dropout=0.0), "float32", rows=32)]
)
def test_the_specification_agrees_with_itself(setup: Setup):
    assert found(REFERENCE, setup) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's are tried by a child, below")
def test_the_interpreted_kernels_are_right():
    interpreter.install()
    witness = Witness(ops.TRITON, CPU, repeats=1)
    exercise(dataclasses.replace(SETUP, rows=16), CPU, witness)
    assert {name: check.wrong for name, check in witness.checks.items() if check.wrong} == {}


def test_a_rehearsal_launches_what_a_run_needs():
    """On tensors without data: so its kernels can be compiled ahead, on all cores."""
    from nanogpt_kernels.launch import recording

    with recording(90) as calls:
        rehearse(dataclasses.replace(SETUP, rows=16), ops.TRITON)
    launched = {call.op for call in calls}
    wanted = {"embedding_fwd", "embedding_bwd", "norm_fwd", "norm_bwd", "attention_fwd_dropout_or_docs",
              "attention_bwd_dq_dropout_or_docs", "attention_bwd_dkdv_dropout_or_docs", "cached_attention",
              "bias_gelu_fwd", "bias_gelu_bwd", "cross_entropy", "grad_norm", "adamw", "column_sums"}  # fmt: skip
    assert wanted <= launched, wanted - launched


# ---- planted faults ----


def scaled(op: Callable[..., Any]) -> Callable[..., Any]:
    """Its first result 1% too large."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = op(*args, **kwargs)
        return (out[0] * 1.01, *out[1:]) if isinstance(out, tuple) else out * 1.01

    return wrong


def no_bias(y: Tensor, w_fc: Tensor, b_fc: Tensor | None, *rest: Any) -> Tensor:
    return REFERENCE.mlp(y, w_fc, None if b_fc is None else b_fc * 1.0 - b_fc.detach(), *rest)


def overwrites(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
    """The weight's gradient is not added to what was there."""
    if (into := getattr(w, "main_grad", None)) is not None:
        into.zero_()
    return REFERENCE.linear(x, w, *rest)


def forgets_moment(p: Any, master: Tensor, m: Tensor, *rest: Any) -> None:
    kept = m.clone()
    REFERENCE.adamw_(p, master, m, *rest)
    m.copy_(kept)


def races() -> Callable[..., Any]:
    """Other bits in the fifth call, the forward's second repeat."""
    calls = iter(range(10**6))

    def norm(r: Tensor, *args: Any) -> Tensor:
        y = REFERENCE.norm(r, *args)
        return torch.where(torch.zeros_like(y) == next(calls) - 3, torch.nextafter(y, y + 1), y)

    return norm


def raises(*_: Any) -> Any:
    raise RuntimeError("no such kernel\nand more")


@pytest.mark.parametrize(
    "op, planted, says",
    [
        ("embedding", scaled(REFERENCE.embedding), "output 0: largest error"),
        ("add_norm", scaled(REFERENCE.add_norm), "output 0: "),
        ("mlp", no_bias, "output 0: largest error"),
        ("linear", overwrites, "gradient of w: largest error"),
        ("adamw_", forgets_moment, "m afterwards: largest error"),
        ("qkv_attention", raises, "RuntimeError: no such kernel"),
        ("linear_cross_entropy", scaled(REFERENCE.linear_cross_entropy), "output 0"),
        ("cached_attention", lambda *args: REFERENCE.cached_attention(*args).float(), "torch.float32, but torch gives"),
    ],
)
def test_a_wrong_op_is_named_and_no_other(op: str, planted: Callable[..., Any], says: str):
    wrong = found(dataclasses.replace(REFERENCE, **{op: planted}))
    assert wrong.keys() == {op} and says in wrong[op], wrong


def test_a_race_is_found():
    wrong = found(dataclasses.replace(REFERENCE, norm=races()), repeats=5)
    assert wrong.keys() == {"norm"} and wrong["norm"].startswith("other bits, of 5 times: output 0 in 1"), wrong


def test_what_is_skipped_is_not_called():
    witness = Witness(dataclasses.replace(REFERENCE, mlp=raises), CPU, 1, skip=frozenset({"mlp"}))
    exercise(dataclasses.replace(SETUP, rows=16), CPU, witness)
    assert "mlp" not in witness.checks and not any(check.wrong for check in witness.checks.values())


# ---- children ----


def children(*programs: str) -> Callable[[Setup, torch.device, Sequence[str]], list[str]]:
    """A child a call, each a line of Python; what it is told to skip is in `skip`."""
    left = iter(programs)

    def command(setup: Setup, device: torch.device, skip: Sequence[str]) -> list[str]:
        say = "say = lambda **event: print(json.dumps(event), flush=True)"
        return [sys.executable, "-c", f"import json, os, sys, time\nskip = {list(skip)}\n{say}\n{next(left)}"]

    return command


DONE = "say(spent={})"
PASSED = "; ".join(f"say(began={name!r}); say(ended={name!r})" for name in OP_NAMES[:4])  # norm among them
CRASH = "os.kill(os.getpid(), 11)"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "programs, wrong, untried",
    [
        ([DONE], {}, {}),
        (["say(began='mlp'); say(wrong={'mlp': 'NaN'}); say(ended='mlp'); " + DONE], {"mlp": "NaN"}, {}),
        (
            ["say(untried={'mlp': 'out of memory'}); print({}); print('{\"a\": 1}'); " + DONE],
            {},
            {"mlp": "out of memory"},
        ),
        ([f"say(began='mlp'); {CRASH}", "assert skip == ['mlp']; " + DONE], {"mlp": "signal 11"}, {}),
        # what was found before a crash stays found
        (
            [f"say(wrong={{'norm': 'a race'}}); say(began='mlp'); {CRASH}", DONE],
            {"norm": "a race", "mlp": "signal 11"},
            {},
        ),
        (["say(began='norm'); sys.exit('bad')", DONE], {"norm": "(bad)"}, {}),
        # of no op in particular: the next run tries again
        ([f"{PASSED}; sys.exit('torch broke')"], {}, dict.fromkeys(OP_NAMES[4:], "torch broke")),
        ([f"{PASSED}; say(began='mlp'); time.sleep(60)"], {}, dict.fromkeys(OP_NAMES[4:], "no end within")),
        (["say(began='mlp'); os.kill(os.getpid(), 9)"], {}, dict.fromkeys(OP_NAMES, "signal 9")),
        (["sys.exit(3)"], {}, dict.fromkeys(OP_NAMES, "exit code 3")),
    ],
)
def test_a_child_s_end_is_its_op_s_fault_or_nobody_s(
    programs: list[str], wrong: dict[str, str], untried: dict[str, str]
):
    judged = judge(SETUP, CPU, 2.0 if "sleep" in str(programs) else 60.0, children(*programs))
    for found, expected in ((judged.wrong, wrong), (judged.untried, untried)):
        assert found.keys() == expected.keys()
        assert all(text in found[name] for name, text in expected.items()), found
    remember(judged)
    assert (remembered(judged.facts) is None) == bool(untried)


def test_the_real_child_says_what_it_tries(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """In this process: the interpreter needs its numpy shim."""
    monkeypatch.setattr(verification, "select_ops", lambda *_: dataclasses.replace(REFERENCE, norm=raises))
    command = verdict.child_command(SETUP, CPU, ["mlp"])
    assert command[1:3] == ["-m", "nanogpt_fast.verify"] and verify.main(command[3:]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["began"] for line in lines if "began" in line} == set(OP_NAMES) - {"mlp"}
    assert [line["wrong"] for line in lines if "wrong" in line] == [{"norm": "RuntimeError: no such kernel"}]
    assert lines[-1]["spent"].keys() == {"compiling", *OP_NAMES} - {"mlp"}


def test_out_of_memory_says_nothing_of_an_op():
    def too_much(*_: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate")

    witness = Witness(dataclasses.replace(REFERENCE, mlp=too_much), CPU, 1)
    exercise(SETUP, CPU, witness)
    assert witness.checks["mlp"].untried == "out of memory" and not witness.checks["mlp"].wrong


# ---- what is kept ----


def a_verdict(**changes: Any) -> Verdict:
    return Verdict(
        verdict.facts_of(dataclasses.replace(SETUP, **changes), CPU), {"mlp": "NaN"}, {}, {}, "2026-11-27T00:00:00", 1.0
    )


def test_a_verdict_is_kept_until_anything_changes(monkeypatch: pytest.MonkeyPatch):
    mine = a_verdict()
    report = remember(mine)
    assert remembered(mine.facts) == mine and report is not None and "mlp: NaN" in report.read_text()
    shape = dataclasses.replace(SHAPE, n_layer=7, dropout=0.3)  # neither is a new kernel
    assert remembered(a_verdict(shape=shape).facts) is not None
    for name, value in mine.facts.items():
        assert remembered(mine.facts | {name: f"another {value}"}) is None, name
    for changes in (
        dict(dtype="float16"),
        dict(documents=False),
        dict(recompute="mlp"),
        dict(wide_residual=False),
        dict(rows=16),
    ):
        assert remembered(a_verdict(**changes).facts) is None, changes
    monkeypatch.setattr(tuned, "kernel_sources", lambda: "edited")
    assert remembered(a_verdict().facts) is None


@pytest.mark.parametrize(
    "text", ["", "{}", '{"facts": 1}', "[", '{"facts": {}, "wrong": {"x": ""}, "made": "", "seconds": 0}']
)
def test_a_damaged_verdict_is_none(text: str):
    mine = a_verdict()
    remember(mine)
    next(user_cache("verdicts").glob("*.json")).write_text(text)
    assert remembered(mine.facts) is None


# ---- which ops a run takes ----


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A world on CUDA, as far as choosing ops goes; what was said."""
    assert ops.TRITON  # made before TRITON_INTERPRET goes, by which `auto` is plain PyTorch
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(verdict, "capability_of", lambda device: 90 if device.type == "cuda" else None)
    monkeypatch.setattr(tuned, "facts_of", lambda device: {"gpu": "a GPU"})
    monkeypatch.setattr(
        verdict, "facts_of", lambda setup, device: {"gpu": "a GPU", "ptxas": "13.5", **vars(setup.shape)}
    )
    return []


WORLD = World(device=torch.device("cuda"))


def test_auto_takes_ours_where_they_are_right(a_gpu: list[str], monkeypatch: pytest.MonkeyPatch):
    tried = []
    monkeypatch.setattr(
        verdict,
        "judge",
        lambda *_: tried.append(1) or Verdict(verdict.facts_of(SETUP, CPU), {}, {}, {}, "2026-11-27", 3.0),
    )
    assert ops_of_run("auto", SETUP, WORLD, a_gpu.append, check=False) == REFERENCE and not tried
    for _ in range(2):
        assert ops_of_run("auto", SETUP, WORLD, a_gpu.append) == ops.TRITON
    assert ops_of_run("auto,mlp=reference", SETUP, WORLD, a_gpu.append).mlp is REFERENCE.mlp
    assert ops_of_run("auto", SETUP, WORLD, a_gpu.append, check=False) == ops.TRITON
    assert len(tried) == 1 and "kernels: triton by ptxas 13.5, as tried 2026-11-27" in a_gpu


def test_a_wrong_op_is_replaced_and_reported(
    a_gpu: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    wrong = {"mlp": "NaN"}
    monkeypatch.setattr(
        verdict, "judge", lambda *_: Verdict(verdict.facts_of(SETUP, CPU), wrong, {}, {}, "2026-11-27", 3.0)
    )
    with caplog.at_level(logging.WARNING, "nanogpt_fast"):
        chosen = ops_of_run("auto", SETUP, WORLD, a_gpu.append)
    assert chosen == dataclasses.replace(ops.TRITON, mlp=REFERENCE.mlp)
    assert "mlp differs from plain PyTorch" in caplog.text and "please send" in caplog.text
    assert "triton,mlp=reference" in a_gpu[-1]
    wrong |= dict.fromkeys(OP_NAMES, "all")
    other = dataclasses.replace(SETUP, shape=dataclasses.replace(SHAPE, n_embd=8))
    assert ops_of_run("auto", other, WORLD, a_gpu.append) == REFERENCE


def test_other_specs_and_devices_ask_nobody(a_gpu: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verdict, "judge", raises)
    assert ops_of_run("triton", SETUP, WORLD, a_gpu.append) == ops.TRITON
    assert ops_of_run("reference", SETUP, WORLD, a_gpu.append) == REFERENCE
    assert ops_of_run("auto", SETUP, World(), a_gpu.append) == REFERENCE
    monkeypatch.setattr(verdict, "capability_of", lambda _: 70)
    assert ops_of_run("auto", SETUP, WORLD, a_gpu.append) == REFERENCE and a_gpu == []


# ---- the assembler ----


@pytest.mark.parametrize(
    "found, driver, given, taken",
    [
        (("/new/ptxas", "13.5.37"), 13000, None, "/new/ptxas"),
        (("/new/ptxas", "13.5.37"), 0, None, "/new/ptxas"),
        (("/new/ptxas", "13.5.37"), 12080, None, None),  # this driver does not load CUDA 13's cubins
        (("/new/ptxas", "13.1.80"), 13000, None, None),  # not new enough
        (("/new/ptxas", "13.5.37"), 13000, "/mine", "/mine"),
        (None, 13000, None, None),
    ],
)
def test_the_extra_s_ptxas_is_taken(
    found: tuple[str, str] | None, driver: int, given: str | None, taken: str | None, monkeypatch: pytest.MonkeyPatch
):
    for variable in assembler.VARIABLES:
        monkeypatch.setenv(variable, given or "")
        if given is None:
            monkeypatch.delenv(variable)
    monkeypatch.setattr(assembler, "extra", lambda: found)
    monkeypatch.setattr(assembler, "driver_cuda", lambda: driver)
    assembler.prefer_extra()
    import os

    assert {os.environ.get(variable) for variable in assembler.VARIABLES} == {taken}
