"""Other people's models and training loops as arms of bench/step.py (bench/step_arms.py makes them by name).

nanogpt         model.py and configure_optimizers of a checkout of karpathy/nanoGPT
hf              Hugging Face's GPT2LMHeadModel, attention by SDPA, its own loss, AdamW on nanoGPT's groups
...             stepped as nanoGPT's train.py does: autocast, scaler, clipping, AdamW
...+fabric      stepped through Lightning Fabric: setup, backward, clip_gradients
...+accelerate  stepped through Hugging Face Accelerate: prepare, accumulate, backward, clip_grad_norm_
...+compile     any of these with torch.compile of the model

All start from Setup.weights and compute in one precision, nanoGPT's: float32 parameters, autocast on a GPU, float32 on
a CPU whatever the dtype says. So what +fabric and +accelerate take over the bare loop is what the framework takes. An
arm's `note` names the versions and what is not the same. float16 with Fabric fails on a GPU: it clips no gradients of a
fused optimizer under a scaler, and says so itself.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from step_arms import LR, Missing, Setup
from torch import Tensor, nn

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.step import StepResult

REQUIRES = {  # the versions that these calls were written and tested against
    "transformers": "transformers==5.24.0",
    "lightning_fabric": "lightning-fabric==2.6.6",
    "accelerate": "accelerate==1.15.0",
}


def require(module: str) -> Any:
    """The package, imported; Missing with the command that brings it. It is said too where it breaks on import."""
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise Missing(f"pip install {REQUIRES[module]} ({problem})") from problem


def version(module: str) -> str:
    package = REQUIRES[module].partition("==")[0]
    return f"{package} {importlib.metadata.version(package)}"


@dataclass
class Trainee:
    """What a loop steps. loss(model, ids, targets), both [B, T] -> mean negative log-likelihood."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    note: str = ""


def make(base: str, words: list[str], setup: Setup) -> "Loop":
    """The arm BASE+WORD+...; ConfigError for a word nobody knows, Missing where the machine lacks something."""
    unknown = [word for word in words if word not in ("compile", *LOOPS)]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} means nothing to {base}", expected=f"compile, {', '.join(LOOPS)}")
    through = [word for word in words if word in LOOPS]
    if len(through) > 1:
        raise ConfigError(
            f"{base} is stepped by one loop", expected=f"one of {', '.join(LOOPS)}", found="+".join(through)
        )
    loop = LOOPS[through[0]] if through else Bare
    loop.need()  # before a model is built for it
    trainee = MODELS[base](setup)
    if "compile" in words:
        trainee.model.compile()
    return loop(trainee, setup)


# ---- models ----


def nanogpt(setup: Setup) -> Trainee:
    """Stock nanoGPT's model and optimizer."""
    model, optim = nanogpt_model(setup).train(), setup.config.optim
    betas = (optim.beta1, optim.beta2)
    optimizer = model.configure_optimizers(optim.weight_decay, LR, betas, setup.world.device.type)
    return Trainee(model, optimizer, lambda model, ids, targets: model(ids, targets)[1])


def nanogpt_model(setup: Setup) -> Any:
    """nanoGPT's GPT in float32 with Setup.weights, on the device."""
    shape, stock = setup.shape, stock_model(setup.nanogpt)
    if shape.activation != "gelu":
        raise Missing(f"stock nanoGPT has the erf GELU only, not {shape.activation}")
    if not shape.tie_word_embeddings or (shape.norm_bias and not shape.bias):
        raise Missing("stock nanoGPT has a tied head, and biases in all layers or in none")
    sizes = dict(block_size=shape.block_size, vocab_size=shape.vocab_size, n_layer=shape.n_layer)
    sizes |= dict(n_head=shape.n_head, n_embd=shape.n_embd, dropout=shape.dropout, bias=shape.bias)
    model = stock.GPT(stock.GPTConfig(**sizes)).to(setup.world.device)
    missing, unexpected = model.load_state_dict(setup.weights, strict=False)  # lm_head is tied to wte
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ConfigError("this is not the nanoGPT we know", found=f"parameters {unexpected or missing}")
    return model


def stock_model(folder: Path | None) -> Any:
    """nanoGPT's model.py as a module; Missing where the folder or the file is."""
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


def huggingface_model(setup: Setup) -> tuple[Any, str]:
    """(GPT2LMHeadModel in float32 with Setup.weights, on the device; what is not the same, or "").

    Its layers always have biases: where ours have none they are zeros and frozen, so that the parameters that learn and
    the gradient's norm are the same; the forward pass adds the zeros."""
    transformers, shape = require("transformers"), setup.shape
    config = transformers.GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.block_size,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        activation_function={"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[shape.activation],
        resid_pdrop=shape.dropout,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.dropout,
        tie_word_embeddings=shape.tie_word_embeddings,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.loss_type = "ForCausalLM"  # what it takes anyhow, with a warning
    # Conv1D layers, stored (in, out): every matrix of a block
    turned = {name: w.t() if ".h." in name and w.dim() == 2 else w for name, w in setup.weights.items()}
    missing, unexpected = model.load_state_dict(turned, strict=False)
    absent = {name for name in missing if name != "lm_head.weight"}  # which is tied to wte
    if unexpected or any(shape.bias or not name.endswith(".bias") for name in absent):
        raise ConfigError("this is not the GPT-2 we know", found=f"parameters {unexpected or sorted(absent)}")
    for name, parameter in model.named_parameters():
        if name in absent:
            nn.init.zeros_(parameter).requires_grad_(False)
    return model.to(setup.world.device), "biases are zeros, frozen" if absent else ""


def hf(setup: Setup) -> Trainee:
    """Hugging Face's model, its loss as its forward computes it, nanoGPT's AdamW."""
    model, different = huggingface_model(setup)
    optim = setup.config.optim
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learning if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = dict(fused=True) if setup.world.device.type == "cuda" else {}
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(optim.beta1, optim.beta2), **fused)

    def loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        # labels would be shifted once more, and the last position lost
        return model(input_ids=ids, labels=targets, shift_labels=targets).loss

    return Trainee(model.train(), optimizer, loss, "; ".join(filter(None, [version("transformers"), different])))


# ---- loops ----


def mixed_dtype(setup: Setup) -> torch.dtype | None:
    """Of autocast, None without it: train.py computes in float32 on a CPU."""
    return setup.dtype if setup.world.device.type == "cuda" and setup.dtype != torch.float32 else None


def autocast_of(setup: Setup) -> AbstractContextManager[Any]:
    """As nanoGPT's train.py and sample.py run a model."""
    mixed = mixed_dtype(setup)
    return torch.amp.autocast(setup.world.device.type, mixed) if mixed else nullcontext()


class Loop(ABC):
    """step(batch [A, B, T + 1], iteration) -> StepResult: A micro-batches, clipping, AdamW."""

    package = ""  # that it goes through

    def __init__(self, trainee: Trainee, setup: Setup):
        self.model, self.optimizer, self.loss = trainee.model, trainee.optimizer, trainee.loss
        self.setup, self.device = setup, setup.world.device
        self.clip = setup.config.optim.grad_clip or float("inf")
        self.mixed = mixed_dtype(setup)
        self.note = "; ".join(filter(None, [trainee.note, self.package and version(self.package)]))
        self.set_up()

    @classmethod
    def need(cls) -> None:
        """Missing where its package is."""
        if cls.package:
            require(cls.package)

    @abstractmethod
    def set_up(self) -> None:
        """What the loop needs besides the model and the optimizer."""

    @abstractmethod
    def step(self, micro_batches: list[tuple[Tensor, Tensor]]) -> StepResult:
        """Of (ids, targets) pairs on the device."""

    def __call__(self, batch: Tensor, iteration: int) -> StepResult:
        tokens = batch.to(self.device, non_blocking=True).long()
        return self.step([(micro[:, :-1].contiguous(), micro[:, 1:].contiguous()) for micro in tokens])


class Bare(Loop):
    """As nanoGPT's train.py."""

    def set_up(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.mixed == torch.float16)
        self.autocast = autocast_of(self.setup)

    def step(self, micro_batches: list[tuple[Tensor, Tensor]]) -> StepResult:
        total = torch.zeros((), device=self.device)
        for ids, targets in micro_batches:
            with self.autocast:
                loss = self.loss(self.model, ids, targets) / len(micro_batches)
            total += loss.detach()
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(total, norm)


class Fabric(Loop):
    """Lightning Fabric on one device: its precision plugin, its wrapped model and optimizer."""

    package = "lightning_fabric"

    def set_up(self) -> None:
        precision: Any = {None: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}[self.mixed]
        devices: Any = [self.device.index or 0] if self.device.type == "cuda" else 1
        self.fabric = require(self.package).Fabric(accelerator=self.device.type, devices=devices, precision=precision)
        self.model, self.optimizer = self.fabric.setup(self.model, self.optimizer)

    def step(self, micro_batches: list[tuple[Tensor, Tensor]]) -> StepResult:
        total = torch.zeros((), device=self.device)
        for ids, targets in micro_batches:  # one device has no gradients to synchronize: no_backward_sync is for more
            loss = self.loss(self.model, ids, targets) / len(micro_batches)
            total += loss.detach()
            self.fabric.backward(loss)
        # error_if_nonfinite would wait for the device, which no other arm does
        norm = self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.clip, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(total, norm)


class Accelerate(Loop):
    """Hugging Face Accelerate on one device: prepare, and its accumulation, which divides the loss itself."""

    package = "accelerate"

    def set_up(self) -> None:
        precision = {None: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.mixed]
        self.accelerator = require(self.package).Accelerator(mixed_precision=precision, cpu=self.device.type == "cpu")
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def step(self, micro_batches: list[tuple[Tensor, Tensor]]) -> StepResult:
        accelerator, total = self.accelerator, torch.zeros((), device=self.device)
        norm = total
        accelerator.gradient_accumulation_steps = len(micro_batches)  # state that all Accelerators of a process share
        accelerator.step = 0  # of the count that says which micro-batch is the last
        for ids, targets in micro_batches:
            with accelerator.accumulate(self.model):
                loss = self.loss(self.model, ids, targets)
                total += loss.detach()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                self.optimizer.step()  # these two do nothing before the last micro-batch
                self.optimizer.zero_grad()
        return StepResult(total / len(micro_batches), norm)


MODELS: dict[str, Callable[[Setup], Trainee]] = {"nanogpt": nanogpt, "hf": hf}
LOOPS: dict[str, type[Loop]] = {"fabric": Fabric, "accelerate": Accelerate}
