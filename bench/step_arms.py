"""A training step as bench/step.py times it: by our trainer with some set of ops, or by stock nanoGPT.

KERNELS[+compile][+CHOICE=true|false ...]    KERNELS is what --kernels takes; compile: torch.compile of the model;
                                             CHOICE: a switch of nanogpt_kernels' launch rows (atomic, fused)
nanogpt[+compile]                            model.py of a checkout of karpathy/nanoGPT, driven as its train.py does
"""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import torch
from torch import Tensor, nn

from nanogpt_fast.distributed import World
from nanogpt_fast.errors import ConfigError
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import select_ops
from nanogpt_fast.optim import AdamW, FlatParameters
from nanogpt_fast.settings.config import Config, GPTConfig
from nanogpt_fast.step import StepResult, TrainStep

LR = 1e-4
OTHERS = ("nanogpt", "hf", "llm.c")  # arms that are not our trainer
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
    compiled, switches = "compile" in words, [word for word in words if word != "compile"]
    if base == "nanogpt":
        if switches:
            raise ConfigError(f"{switches[0]!r} means nothing to nanoGPT", expected="nanogpt or nanogpt+compile")
        return Nanogpt(setup, compiled)
    turned = overrides(switches)
    model = GPT(setup.shape, select_ops(base, setup.world.device.type)).train()
    model.load_state_dict(setup.weights)
    step = _train_step(model, setup.config, setup.dtype, setup.world)
    if compiled:
        model.compile()

    def run(batch: Tensor, iteration: int) -> StepResult:
        with cases.overridden(turned):
            return step(batch, iteration)

    return run


def _train_step(model: GPT, config: Config, dtype: torch.dtype, world: World) -> TrainStep:
    optimizer = AdamW(FlatParameters(model, dtype, world.device), config.optim, model.ops, dtype == torch.float16)
    optimizer.set_lr(LR)
    return TrainStep(model, optimizer, world, config.run.seed)


def overrides(switches: list[str]) -> dict[str, dict[str, Any]]:
    """["atomic=true"] -> {launch op: fields} for every launch op whose rows have that choice."""
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
            raise ConfigError(f"unknown word of an arm {choice!r}", expected=f"compile, {known}", found=value)
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


class Nanogpt:
    """Stock nanoGPT's model and optimizer, stepped as its train.py does: autocast, scaler, clipping, AdamW."""

    def __init__(self, setup: Setup, compiled: bool):
        shape, self.device = setup.shape, setup.world.device
        stock = _stock_model(setup.nanogpt)
        sizes = dict(block_size=shape.block_size, vocab_size=shape.vocab_size, n_layer=shape.n_layer)
        sizes |= dict(n_head=shape.n_head, n_embd=shape.n_embd, dropout=shape.dropout, bias=shape.bias)
        self.model: nn.Module = stock.GPT(stock.GPTConfig(**sizes)).to(self.device).train()
        missing, unexpected = self.model.load_state_dict(setup.weights, strict=False)  # lm_head is tied to wte
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ConfigError("this is not the nanoGPT we know", found=f"parameters {unexpected or missing}")
        optim = setup.config.optim
        self.clip = optim.grad_clip or float("inf")
        betas = (optim.beta1, optim.beta2)
        configure: Any = self.model.configure_optimizers
        self.optimizer = configure(optim.weight_decay, LR, betas, self.device.type)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=setup.dtype == torch.float16)
        on_gpu = self.device.type == "cuda"  # on the CPU train.py computes in float32, whatever its dtype says
        self.autocast = torch.amp.autocast("cuda", setup.dtype) if on_gpu else nullcontext()
        if compiled:
            self.model.compile()

    def __call__(self, batch: Tensor, iteration: int) -> StepResult:
        total, tokens = torch.zeros((), device=self.device), batch.to(self.device, non_blocking=True).long()
        for micro in tokens:
            with self.autocast:
                _, loss = self.model(micro[:, :-1].contiguous(), micro[:, 1:].contiguous())
                loss = loss / len(tokens)
            total += loss.detach()
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(total, norm)


def _stock_model(folder: Path | None) -> Any:
    if folder is None:
        raise Missing("stock nanoGPT: name a checkout of karpathy/nanoGPT by --nanogpt DIR or NANOGPT_DIR")
    path = folder / "model.py"
    if not path.is_file():
        raise Missing(f"stock nanoGPT: {path} is no file")
    spec = importlib.util.spec_from_file_location("stock_nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
