"""A training step as bench/step.py times it: by our trainer with some set of ops, or by somebody else's.

KERNELS[+compile][+graph][+CHOICE=...]       KERNELS is what --kernels takes; compile: torch.compile of the model;
                                             graph: replayed as CUDA graphs; CHOICE=true|false: a switch of
                                             nanogpt_kernels' launch rows (atomic, fused)
nanogpt|hf[+fabric|+accelerate][+compile]    other people's models and loops: bench/trainers.py
llm.c                                        a program of its own, timed by bench/llmc_binary.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import torch
from torch import Tensor

from nanogpt_fast.distributed import World
from nanogpt_fast.errors import ConfigError
from nanogpt_fast.graphs import Graphs
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import select_ops
from nanogpt_fast.optim import AdamW, FlatParameters
from nanogpt_fast.settings.config import Config, GPTConfig
from nanogpt_fast.step import StepResult, TrainStep

LR = 1e-4
OTHERS = ("nanogpt", "hf", "llm.c")  # arms that are not our trainer
WORDS = ("compile", "graph")  # of ours, besides the switches of launch rows
Arm = Callable[[Tensor, int], StepResult]  # (token ids [A, B, T + 1], iteration) -> (loss, gradient norm)


class Missing(Exception):
    """What an arm needs is not on this machine."""


@dataclass(frozen=True)
class Setup:
    """What every arm starts from."""

    config: Config
    dtype: torch.dtype
    world: World
    weights: dict[str, Tensor]
    nanogpt: Path | None = None  # a checkout of karpathy/nanoGPT

    @property
    def shape(self) -> GPTConfig:
        return self.config.shape(self.config.model.vocab_size or 50304)


def initial_weights(config: Config) -> dict[str, Tensor]:
    model = GPT(config.shape(config.model.vocab_size or 50304))
    model.init_weights(torch.Generator().manual_seed(config.run.seed))
    return model.state_dict()


def is_ours(name: str) -> bool:
    """Whether an arm is our trainer's step, by some set of ops."""
    return name.split("+")[0] not in OTHERS


def make_arm(name: str, setup: Setup) -> Arm:
    """ConfigError for a word nobody knows, Missing where the machine lacks something."""
    base, *words = name.split("+")
    if base in ("nanogpt", "hf"):
        import trainers  # which takes Setup and Missing from here

        return trainers.make(base, words, setup)
    if base == "llm.c":
        raise Missing("llm.c is a program of its own: python bench/llmc_binary.py --llmc DIR writes its row")
    if "graph" in words and setup.world.device.type != "cuda":
        raise Missing("CUDA graphs need a CUDA device")
    compiled, turned = "compile" in words, overrides(words)
    model = GPT(setup.shape, select_ops(base, setup.world.device.type)).train()
    model.load_state_dict(setup.weights)
    graphs = Graphs(setup.world.device, "on" if "graph" in words else "off")
    step = _train_step(model, setup.config, setup.dtype, setup.world, graphs)
    if compiled:
        model.compile()

    def run(batch: Tensor, iteration: int) -> StepResult:
        with cases.overridden(turned):
            return step(batch, iteration)

    return run


def _train_step(
    model: GPT, config: Config, dtype: torch.dtype, world: World, graphs: Graphs | None = None
) -> TrainStep:
    optimizer = AdamW(FlatParameters(model, dtype, world.device), config.optim, model.ops, dtype == torch.float16)
    optimizer.set_lr(LR)
    return TrainStep(model, optimizer, world, config.run.seed, graphs=graphs)


def overrides(words: list[str]) -> dict[str, dict[str, Any]]:
    """["atomic=true"] -> {launch op: fields} for every launch op whose rows have that choice; an arm's other words are
    left out."""
    switches = [word for word in words if word not in WORDS]
    if not switches:
        return {}
    from nanogpt_kernels import launch

    having: dict[str, list[str]] = {}
    for op, rows in launch.TABLE.items():
        for choice in {choice for row in rows for choice, value in row.choices.items() if isinstance(value, bool)}:
            having.setdefault(choice, []).append(op)
    found: dict[str, dict[str, Any]] = {}
    for choice, _, value in (switch.partition("=") for switch in switches):
        if choice not in having or value not in ("true", "false"):
            known = ", ".join(f"{name}=true|false" for name in sorted(having))
            raise ConfigError(
                f"unknown word of an arm {choice!r}", expected=f"{', '.join(WORDS)}, {known}", found=value
            )
        for op in having[choice]:
            found.setdefault(op, {"choices": {}})["choices"][choice] = value == "true"
    return found


def recorded(name: str, config: Config, dtype: torch.dtype, arch: int) -> Any:
    """launch.Recording of one micro-batch and the update by an arm on Triton's ops, on meta tensors for sm_`arch`."""
    from nanogpt_kernels import launch

    base, *switches = name.split("+")
    meta = torch.device("meta")
    with meta:
        model = GPT(config.shape(config.model.vocab_size or 50304), select_ops(base, "cuda")).train()
    step = _train_step(model, config, dtype, World(device=meta))
    batch = torch.empty(1, config.data.batch_size, config.data.block_size + 1, dtype=torch.int64, device=meta)
    with cases.overridden(overrides(switches)), launch.recording(arch) as calls:
        step(batch, 0)
    return calls
