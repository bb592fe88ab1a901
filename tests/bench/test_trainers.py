"""bench/trainers.py: other people's models and loops compute our step. nanoGPT's need NANOGPT_DIR set to a checkout."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import pytest
import step
import step_arms
import torch
import torch.nn.functional as F
import trainers
from step_arms import Arm, Setup

from nanogpt_fast.distributed import World
from nanogpt_fast.errors import ConfigError

NANOGPT = os.environ.get("NANOGPT_DIR")
MODULES = {"hf": "transformers", "fabric": "lightning_fabric", "accelerate": "accelerate"}
ARMS = [base + through for base in ("nanogpt", "hf") for through in ("", "+fabric", "+accelerate")]


def setup_of(**changes: Any) -> Setup:
    config = step.configuration("gpt2_124m", **step.TINY).replace(**{"dropout": 0.0, **changes})
    weights = step_arms.initial_weights(config)
    return Setup(config, torch.float32, World(), weights, Path(NANOGPT) if NANOGPT else None)


def arm_of(name: str, setup: Setup) -> Any:
    """The arm, or a skip that says what it lacks."""
    for word in name.split("+"):
        if word == "nanogpt" and not NANOGPT:
            pytest.skip("set NANOGPT_DIR to a checkout of karpathy/nanoGPT")
        if word in MODULES:
            pytest.importorskip(MODULES[word], reason=f"pip install {trainers.REQUIRES[MODULES[word]]}")
    return step_arms.make_arm(name, setup)


def curve(arm: Arm, steps: int = 10) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the check's first step and of steps on one batch of two micro-batches."""
    batch = torch.randint(96, (2, 4, 17), generator=torch.Generator().manual_seed(1))
    results = [arm(batch[:1], 0), *(arm(batch, i) for i in range(1, steps + 1))]
    return [(float(result.loss), float(result.grad_norm)) for result in results]


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_an_arm_takes_our_steps(name: str, bias: bool):
    setup = setup_of(bias=bias)
    arm = arm_of(name, setup)
    ours, theirs = curve(step_arms.make_arm("reference", setup)), curve(arm)
    assert theirs[-1][0] < theirs[1][0] - 0.02  # it learns
    for mine, other in zip(ours, theirs):
        assert other == pytest.approx(mine, rel=2e-5)
    assert ("frozen" in arm.note) == (name.startswith("hf") and not bias)


@pytest.mark.parametrize("activation,other", [("gelu", "gelu_tanh"), ("gelu_tanh", "gelu")])
def test_hugging_face_has_the_shape_s_activation(activation: str, other: str):
    gelu = arm_of("hf", setup_of(activation=activation)).model.transformer.h[0].mlp.act
    x = torch.linspace(-3.0, 3.0, 64)
    same, not_it = (F.gelu(x, approximate="tanh" if a == "gelu_tanh" else "none") for a in (activation, other))
    assert (gelu(x) - same).abs().max() < 1e-6 < 1e-4 < (gelu(x) - not_it).abs().max()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """A process has one precision, until its state is dropped."""
    state = importlib.util.find_spec("accelerate") and importlib.import_module("accelerate.state").AcceleratorState
    if state:
        state._reset_state(True)
    yield
    if state:
        state._reset_state(True)


@pytest.mark.parametrize("name", [arm for arm in ARMS if "+" in arm])
def test_mixed_precision_is_the_bare_loop_s(name: str, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None):
    """What a GPU gets: float32 parameters under autocast, here under the CPU's."""
    monkeypatch.setattr(trainers, "mixed_dtype", lambda setup: torch.bfloat16)
    setup = setup_of()
    through, bare = arm_of(name, setup), arm_of(name.partition("+")[0], setup)
    exact = curve(step_arms.make_arm("reference", setup))
    theirs, plain = curve(through), curve(bare)
    assert theirs == [pytest.approx(pair, rel=1e-6) for pair in plain]
    assert theirs[0] != pytest.approx(exact[0], rel=1e-6) and theirs[0] == pytest.approx(exact[0], rel=1e-2)
    assert {parameter.dtype for parameter in through.model.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARMS)
def test_compiled_arms_take_the_same_steps(name: str, monkeypatch: pytest.MonkeyPatch):
    """Traced by dynamo, run eagerly: a loop must not step around the compiled model."""
    traced = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    stock = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: stock(model, backend=backend))
    torch.compiler.reset()
    setup = setup_of()
    theirs = curve(arm_of(f"{name}+compile", setup), steps=2)
    assert traced
    assert theirs == [pytest.approx(pair, rel=2e-5) for pair in curve(step_arms.make_arm("reference", setup), steps=2)]


def test_what_is_missing_is_said_with_its_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in MODULES.values():
        monkeypatch.setitem(sys.modules, module, None)
    arms = ["hf", "hf+fabric", "hf+accelerate", "nanogpt", "llm.c", "reference"]
    argv = [
        "--device=cpu",
        "--tiny",
        "--dtype=float32",
        "--batch_size=2",
        "--accumulation=1",
        "--warmup=0",
        "--steps=1",
    ]
    monkeypatch.delenv("NANOGPT_DIR", raising=False)
    assert step.main([*argv, "--arms", *arms, "--out", str(tmp_path)]) == 0
    status = {row["arm"]: row["status"] for row in machine.read_lines(tmp_path / "step.jsonl")}
    assert status["hf"].startswith("missing: pip install transformers==")
    assert status["hf+fabric"].startswith("missing: pip install lightning-fabric==")
    assert status["hf+accelerate"].startswith("missing: pip install accelerate==")
    assert "--nanogpt DIR" in status["nanogpt"] and "bench/llmc_binary.py" in status["llm.c"]
    assert status["reference"] == "ok"


@pytest.mark.parametrize("name", ["nanogpt+x=true", "hf+fabric+accelerate", "hf+atomic=true"])
def test_words_that_mean_nothing_are_refused(name: str):
    with pytest.raises(ConfigError, match="means nothing to|one loop"):
        step_arms.make_arm(name, setup_of())


@pytest.mark.skipif(not NANOGPT, reason="set NANOGPT_DIR to a checkout of karpathy/nanoGPT")
def test_stock_nanogpt_has_one_activation():
    with pytest.raises(step_arms.Missing, match="erf GELU"):
        step_arms.make_arm("nanogpt", setup_of(activation="gelu_tanh"))


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_a_step_run_has_hugging_face_as_an_arm(tmp_path: Path):
    argv = [
        "--device=cpu",
        "--tiny",
        "--dtype=float32",
        "--batch_size=2",
        "--accumulation=2",
        "--warmup=0",
        "--steps=1",
    ]
    assert step.main([*argv, "--rounds=1", "--arms", "reference", "hf", "--out", str(tmp_path)]) == 0
    rows = [row for row in machine.read_lines(tmp_path / "step.jsonl") if row["arm"] == "hf"]
    assert [(row["how"], row["status"]) for row in rows] == [("alone", "ok"), ("in turn", "ok")]
