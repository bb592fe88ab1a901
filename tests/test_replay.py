"""The step's two captured pieces: two successive calls make the same calls, so a replay of the first is the second.

Tensors without data stand for the GPU's (device "meta"), so nothing here needs one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.replay_ledger import Ledger, Pieces, record, record_launches
from torch import Tensor

from nanogpt_fast.distributed import World
from nanogpt_fast.guards import LossGuard
from nanogpt_fast.memory import Unheard
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import REFERENCE, TRITON, Ops
from nanogpt_fast.optim import AdamW, FlatParameters
from nanogpt_fast.scoring import Forward
from nanogpt_fast.settings.cli import load_config
from nanogpt_fast.settings.config import Config, GPTConfig, OptimConfig
from nanogpt_fast.step import TrainStep

META = torch.device("meta")
SMALL = GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=2, n_embd=32, dropout=0.1, bias=True)
OPS = {"reference": lambda: REFERENCE, "triton": lambda: TRITON}


def build(
    ops: Ops,
    call: Callable[[str, Callable[[], None]], None],
    shape: GPTConfig = SMALL,
    dtype: torch.dtype = torch.bfloat16,
    config: Config | None = None,
    eot: int | None = None,
    world: World | None = None,
    sharded: bool = False,
    reduce_dtype: torch.dtype = torch.float32,
    **model: Any,
) -> TrainStep:
    optim = config.optim if config else OptimConfig(skip_step_sigma=6.0)
    with META:
        network = GPT(shape, ops, **model).train()
    world = world or World(device=META)
    flat = FlatParameters(network, dtype, META, world, sharded=sharded, bucket_mb=0.01)
    optimizer = AdamW(flat, optim, ops, scale_loss=dtype == torch.float16)
    guard = LossGuard(optim.skip_step_sigma, optim.skip_step_window, META)
    return TrainStep(network, optimizer, world, 1337, None, eot, Pieces(call), guard, reduce_dtype)


def two_steps(step: TrainStep, accumulation: int, batch_size: int = 2) -> None:
    """Successive iterations: other tokens, rate and dropout counter."""
    T = step.model.config.block_size
    for iteration in (7, 8):
        step.optimizer.set_lr(1e-3 / iteration)
        step(torch.full((accumulation, batch_size, T + 1), iteration, dtype=torch.uint16), iteration)


def ledgers(ops: Ops, accumulation: int, batch_size: int = 2, **kwargs: Any) -> dict[str, list[Ledger]]:
    """{piece: the ledgers of its calls in two successive steps}."""
    found: dict[str, list[Ledger]] = {}
    step = build(ops, lambda name, work: found.setdefault(name, []).append(record(work)), **kwargs)
    two_steps(step, accumulation, batch_size)
    return found


def assert_replayable(found: dict[str, list[Ledger]], accumulation: int, apart: tuple[str, ...] = ()) -> None:
    """apart: what the micro-steps that are pieces of their own are called."""
    pieces = {"the micro-step": 2 * (accumulation - len(apart)), "the update": 2}
    pieces |= {f"the {name} micro-step": 2 for name in apart}
    assert {name: len(calls) for name, calls in found.items()} == {n: calls for n, calls in pieces.items() if calls}
    for name, (first, *others) in found.items():
        assert first.lines and not first.faults, f"{name}: {first.faults}"
        for other in others:
            assert not other.faults, f"{name}: {other.faults}"
            for ours, theirs in zip(first.lines, other.lines, strict=True):
                assert ours == theirs, name


FEATURES = {
    "plain": {},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "float32 residual": {"residual_dtype": torch.float32},
    "no dropout, no bias": {"shape": dataclasses.replace(SMALL, dropout=0.0, bias=False)},
    "GELU recomputed": {"recompute": "mlp"},
    "blocks recomputed": {"recompute": "block"},
    "documents": {"eot": 3},
    "tanh": {"shape": dataclasses.replace(SMALL, activation="gelu_tanh")},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_two_steps_are_one_list_of_calls(ops: Callable[[], Ops], features: dict[str, Any]):
    accumulation = 4 if "dtype" in features else 1
    assert_replayable(ledgers(ops(), accumulation, **features), accumulation)


class Heard(Unheard):
    """A collective leaves a call on its tensors, which shows in the ledger: as it starts, and as it is waited for."""

    def _started(self, name: str, *tensors: Tensor, **settings: int) -> Callable[[], None]:
        for tensor in tensors:
            tensor.mul_(1.0)
        return lambda: [tensors[0].neg_()].clear()


RANKS = {
    "ddp": ({}, ("last",)),
    "summed in bfloat16": ({"reduce_dtype": torch.bfloat16}, ("last",)),
    "zero1": ({"sharded": True}, ("first", "last")),
    "zero1 float32": ({"sharded": True, "dtype": torch.float32}, ("first", "last")),
    "zero1, blocks recomputed": ({"sharded": True, "recompute": "block"}, ("first", "last")),
}


@pytest.mark.parametrize(("features", "apart"), RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_ranks_take_the_same_collectives_in_two_steps(
    ops: Callable[[], Ops], features: dict[str, Any], apart: tuple[str, ...]
):
    """Collectives are part of the pieces: of the last micro-step, the update and, in zero1, the first micro-step."""
    world = Heard(1, 4, META)
    found = ledgers(ops(), 3, world=world, **features)
    assert_replayable(found, 3, apart)
    collectives = {
        name: sum(line[0] == "aten.neg_.default" for line in calls[0].lines) for name, calls in found.items()
    }
    buckets = 2  # the embeddings', and the block's
    expected = {"the micro-step": 0, "the last micro-step": buckets + 1, "the update": 1}
    assert collectives == expected | ({"the first micro-step": buckets} if "first" in apart else {})
    together = ledgers(ops(), 1, world=world, **features)
    assert_replayable(together, 1, (", ".join(apart),))


PRESETS = (
    "gpt2_124m",
    "gpt2_350m",
    "gpt2_774m",
    "gpt2_1558m",
    "shakespeare_char",
    "finetune_shakespeare",
    "quickstart",
)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_launches_the_same_kernels(preset: str):
    """At the preset's own shape (two of its layers): dispatcher's calls, and the launches below them on an H100."""
    config = load_config(["--config", preset])
    shape = dataclasses.replace(config.shape(50304), n_layer=2)
    kwargs = {"shape": shape, "config": config}
    assert_replayable(ledgers(TRITON, 1, config.data.batch_size, **kwargs), 1)
    launched: dict[str, list[Any]] = {}
    step = build(TRITON, lambda n, work: launched.setdefault(n, []).append(record_launches(work)), **kwargs)
    two_steps(step, 1, config.data.batch_size)
    for name, (first, second) in launched.items():
        assert first and first == second, name


@pytest.mark.parametrize("eot", [None, 3])
@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_two_batches_of_an_evaluation_are_one_list_of_calls(ops: Callable[[], Ops], eot: int | None):
    found: dict[str, list[Ledger]] = {}
    with META:
        network = GPT(SMALL, ops()).eval()
    forward = Forward(network, eot, Pieces(lambda name, work: found.setdefault(name, []).append(record(work))))
    with torch.no_grad():
        for token in (1, 2):
            forward.add(torch.full((2, 16), token), torch.full((2, 16), token + 1))
    ((first, second),) = found.values()
    assert first.lines and first.lines == second.lines and not first.faults + second.faults


# ---- what it must find ----


def planted(spoil: Callable[[TrainStep], None]) -> str:
    """What the ledger says of a step that was spoilt."""
    found: dict[str, list[Ledger]] = {}
    step = build(REFERENCE, lambda name, work: found.setdefault(name, []).append(record(work)))
    spoil(step)
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        two_steps(step, 1)
        assert_replayable(found, 1)
    return str(caught.value)


def test_a_python_number_that_varies_is_found():
    def spoil(step: TrainStep) -> None:
        calls = iter(range(100))
        guard = step.guard.refuses
        step.guard.refuses = lambda loss: guard(loss * (1.0 + next(calls)))

    assert "the update" in planted(spoil)


def test_an_item_is_found():
    def spoil(step: TrainStep) -> None:
        add = step.guard.add
        step.guard.add = lambda loss, refused: add(loss, refused) if refused.item() else None

    assert "item" in planted(spoil)


WAITS = {"device": (torch.cuda, ()), "event": (torch.cuda.Event, (None,))}


@pytest.mark.parametrize(("owner", "args"), WAITS.values(), ids=WAITS)
def test_a_wait_is_found(owner: Any, args: tuple[None, ...]):
    def spoil(step: TrainStep) -> None:
        add = step.guard.add
        step.guard.add = lambda loss, refused: (owner.synchronize(*args), add(loss, refused))[1]

    assert "the host would wait" in planted(spoil)


def test_a_tensor_from_the_host_is_found():
    def spoil(step: TrainStep) -> None:
        guard = step.guard.refuses
        step.guard.refuses = lambda loss: guard(loss + torch.zeros(()))

    assert "a copy between host and device" in planted(spoil)


def test_a_tensor_that_outlives_the_step_is_found():
    kept: list[Tensor] = []

    def spoil(step: TrainStep) -> None:
        guard = step.guard.refuses
        step.guard.refuses = lambda loss: guard((kept.append(loss * 2.0), loss)[1])

    assert "mul.Tensor: its result outlives the call" in planted(spoil)


def test_memory_that_moves_is_found():
    """A buffer made anew each step: the same calls on another address."""

    def spoil(step: TrainStep) -> None:
        real = step.optimizer.set_lr

        def set_lr(lr: float) -> None:
            step.optimizer.m = torch.zeros_like(step.optimizer.m)
            real(lr)

        step.optimizer.set_lr = set_lr

    assert "the update" in planted(spoil)
