"""Flat parameters and AdamW over them.

Every parameter is a view into one flat buffer, so that the gradient norm, the update, the all-reduce and zeroing are
each one pass over one tensor.
"""

import math

import torch
from torch import Tensor, nn

from nanogpt_fast.ops import GRAD_NORM, LOSS_SCALE, LR, MAX_NORM, STEP, Ops, exact_device
from nanogpt_fast.run import ranges
from nanogpt_fast.settings.config import OptimConfig

ALIGNMENT = 128  # elements: 256 bytes of the narrowest dtype
RANKS = 8  # the length divides evenly over so many ranks


class FlatParameters:
    """The buffers behind a model's parameters, all of one length and one layout.

    master, grad: float32. params: the compute dtype; the same tensor as master when that is float32. Parameters of two
    and more dimensions are views of params, one-dimensional ones of master. Each carries `main_grad`, its view of
    grad; float32 ones have it as .grad too, so plain autograd accumulates into the same memory.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device):
        named = dict(model.named_parameters())
        self.slices: dict[str, tuple[int, int]] = {}
        self.shapes = {name: parameter.shape for name, parameter in named.items()}
        end = 0
        for name, parameter in named.items():
            start = math.ceil(end / ALIGNMENT) * ALIGNMENT
            end = start + parameter.numel()
            self.slices[name] = (start, end)
        length = math.ceil(end / (ALIGNMENT * RANKS)) * ALIGNMENT * RANKS
        self.master = torch.zeros(length, dtype=torch.float32, device=device)
        self.grad = torch.zeros(length, dtype=torch.float32, device=device)
        self.params = self.master if dtype == torch.float32 else torch.zeros(length, dtype=dtype, device=device)
        for name, parameter in named.items():
            self.view(self.master, name).copy_(parameter.data)
        self.params.copy_(self.master)
        for name, parameter in named.items():
            parameter.data = self.view(self.params if parameter.dim() > 1 else self.master, name)
            main_grad = self.view(self.grad, name)
            parameter.main_grad = main_grad  # type: ignore[attr-defined]
            parameter.grad = main_grad if parameter.dtype == torch.float32 else None

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """The part of a flat buffer that belongs to a parameter, in its shape."""
        start, end = self.slices[name]
        return buffer[start:end].view(self.shapes[name])

    def named(self, buffer: Tensor) -> dict[str, Tensor]:
        """{name: view} of a flat buffer."""
        return {name: self.view(buffer, name) for name in self.slices}

    def decay_segments(self, weight_decay: float) -> list[tuple[int, int, float]]:
        """(start, end, decay) runs covering the buffers; matrices and embeddings decay, vectors do not."""
        runs: list[tuple[int, int, float]] = []
        starts = [start for start, _ in self.slices.values()]
        for shape, start, end in zip(self.shapes.values(), starts, [*starts[1:], len(self.master)]):
            decay = weight_decay if len(shape) > 1 else 0.0
            if runs and runs[-1][2] == decay:
                runs[-1] = (runs[-1][0], end, decay)
            else:
                runs.append((start, end, decay))
        return runs


class AdamW:
    """AdamW with global-norm clipping and, for float16, a dynamic loss scale; its state lies on the device, numbers
    on exact_device of it.

    Loss scale: starts at 2^16, doubles after 2000 applied updates in a row, halves when a gradient is not finite
    (torch.amp.GradScaler's rule).
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, flat: FlatParameters, config: OptimConfig, ops: Ops, scale_loss: bool = False):
        self.flat, self.ops, self.config, self.scale_loss = flat, ops, config, scale_loss
        self.m, self.v = torch.zeros_like(flat.grad), torch.zeros_like(flat.grad)
        self.segments = flat.decay_segments(config.weight_decay)
        exact = exact_device(flat.grad.device)
        self.scalars = torch.zeros(5, dtype=torch.float64, device=exact)
        self.scalars[MAX_NORM] = config.grad_clip
        self.scalars[LOSS_SCALE] = 65536.0 if scale_loss else 1.0
        self.good_steps = torch.zeros((), dtype=torch.int64, device=exact)  # applied, since the scale grew
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=exact)  # refused, in a row

    @property
    def loss_scale(self) -> Tensor:
        return self.scalars[LOSS_SCALE]

    def step(self, refused: Tensor | None = None) -> Tensor:
        """Clip, update, zero the gradient. Returns the norm before clipping; where that is not finite, or `refused`
        (bool []) says so, nothing was updated. Nothing here waits for the device, or varies but by what lies on it."""
        flat, scalars = self.flat, self.scalars
        betas = self.config.beta1, self.config.beta2
        with ranges.span(ranges.GRAD_NORM):
            scaled = self.ops.grad_norm(flat.grad).to(scalars.device).double()
            norm = scaled / scalars[LOSS_SCALE]
            overflow = ~torch.isfinite(norm)
            refused = overflow if refused is None else overflow | refused
            scalars[GRAD_NORM].copy_(scaled.masked_fill(refused, math.nan))
        with ranges.span(ranges.UPDATE):
            params = None if flat.params is flat.master else flat.params
            self.ops.adamw_(params, flat.master, self.m, self.v, flat.grad, scalars, self.segments, *betas)
            flat.grad.zero_()
            self.bad_steps.add_(1).masked_fill_(~refused, 0)
            if self.scale_loss:
                self._update_loss_scale(overflow)
        return norm

    def set_lr(self, lr: float) -> None:
        self.scalars[LR].fill_(lr)  # an assignment would copy from the host, and wait for the GPU

    def _update_loss_scale(self, overflow: Tensor) -> None:
        self.good_steps.add_(1).masked_fill_(overflow, 0)
        grow = self.good_steps == self.GROWTH_INTERVAL
        self.scalars[LOSS_SCALE].mul_(1.0 + grow.double() - 0.5 * overflow.double())
        self.good_steps.masked_fill_(grow, 0)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(tensors `exp_avg.NAME` and `exp_avg_sq.NAME` as views, JSON numbers)."""
        tensors = {f"exp_avg.{name}": t for name, t in self.flat.named(self.m).items()}
        tensors |= {f"exp_avg_sq.{name}": t for name, t in self.flat.named(self.v).items()}
        numbers: dict[str, float] = {"optimizer_step": int(self.scalars[STEP])}
        if self.scale_loss:
            numbers |= {"good_steps": int(self.good_steps), "loss_scale": float(self.loss_scale)}
        return tensors, numbers

    def load_state_dict(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """The inverse of state_dict; a loss scale is taken only where this run scales its loss."""
        for name in self.flat.slices:
            self.flat.view(self.m, name).copy_(tensors[f"exp_avg.{name}"])
            self.flat.view(self.v, name).copy_(tensors[f"exp_avg_sq.{name}"])
        self.scalars[STEP] = numbers["optimizer_step"]
        if self.scale_loss:
            self.scalars[LOSS_SCALE] = numbers.get("loss_scale", 65536.0)
            self.good_steps.fill_(int(numbers.get("good_steps", 0)))
