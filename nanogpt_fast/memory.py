"""What a training step, or an evaluation alone, holds at its peak, in bytes, before it runs: itself on tensors without
data, counted.

    peak(Plan(...)) -> {part: bytes}            largest_batch(plan, budget) -> sequences of a micro-batch that fit

The model, its backward and the optimizer run on device "meta", where a tensor has a shape and a storage of so many
bytes, but no memory; each storage is counted from its allocation to its end. So a prediction follows the code, and a
device need not be there. Two things are told apart by hand: scaled_dot_product_attention, which on meta would make the
T x T scores that no fused kernel makes, and the device that ops ask for (contract.stand_for).

Not counted: what lies outside torch's allocator (the CUDA context, NCCL), the workspaces of cuBLAS and of torch's own
kernels, fragmentation, and an evaluation within a training run, whose CUDA graph keeps its pool. torch.compile decides
itself what to keep: here the step is eager.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanogpt_fast.distributed import World
from nanogpt_fast.gpus import GPU
from nanogpt_fast.hardware import capability_of
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import Ops, inside_of, without_data
from nanogpt_fast.optim import BUCKET, AdamW, FlatParameters
from nanogpt_fast.scoring import Forward, stack_for
from nanogpt_fast.settings.config import Config, GPTConfig
from nanogpt_fast.step import TrainStep

RESERVE = 0.1  # of a device's memory, left free: a prediction may be so far off, and does not count everything
RECOMPUTE = ("none", "mlp", "block")  # each keeps less than the one before
CUDA_BLOCK = 512  # bytes: the caching allocator rounds up to multiples (CUDACachingAllocator.cpp, kMinBlockSize)
NO_RELIEF = "a smaller --block_size or model, or a device with more memory"
PARTS = ("parameters", "gradients", "optimizer", "activations", "logits and workspace")
PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, WORKSPACE = PARTS


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A rank's training step: all that its memory depends on."""

    shape: GPTConfig
    ops: Ops
    dtype: torch.dtype
    residual_dtype: torch.dtype | None
    recompute: str
    batch_size: int
    micro_batches: int  # an iteration
    first: int = 0  # sequences of a batch ramp's first iteration
    ramp: int = 0  # its iterations, 0 without one
    device_type: str
    capability: int | None = None  # of a CUDA device, as in sm_90: 90
    ranks: int = 1
    parallel: str = "ddp"  # zero1: each holds a share of masters and moments
    reduce_dtype: torch.dtype = torch.float32
    bucket_mb: float = BUCKET
    evaluates: bool = False  # and trains nothing

    def with_batch(self, batch_size: int) -> "Plan":
        """As many sequences an iteration, in micro-batches of batch_size, which divides them."""
        return replace(self, batch_size=batch_size, micro_batches=self.sequences // batch_size)

    @property
    def sequences(self) -> int:
        """An iteration's, of one rank."""
        return self.batch_size * self.micro_batches

    @property
    def batch_sizes(self) -> list[int]:
        """Of a micro-batch: those that leave every iteration's tokens as they are."""
        return [n for n in range(1, self.sequences + 1) if self.sequences % n == 0 and self.first % n == 0]


def plan_of(
    config: Config, shape: GPTConfig, ops: Ops, dtype: torch.dtype, device: torch.device | GPU, ranks: int = 1
) -> Plan:
    """What a run of this configuration does on each of so many ranks, on a device that is there or on a GPU."""
    start, _, ramp = config.data.ramp
    return Plan(
        shape=shape,
        ops=ops,
        dtype=dtype,
        residual_dtype=torch.float32 if config.system.residual_dtype == "float32" else None,
        recompute=config.system.recompute,
        batch_size=config.data.batch_size,
        micro_batches=config.data.gradient_accumulation_steps // ranks,
        first=start // ranks * config.data.batch_size if ramp else 0,
        ramp=ramp,
        device_type="cuda" if isinstance(device, GPU) else device.type,
        capability=device.capability if isinstance(device, GPU) else capability_of(device),
        ranks=ranks,
        parallel=config.system.parallel,
        reduce_dtype=getattr(torch, config.system.reduce_dtype),
        bucket_mb=config.system.bucket_mb,
        evaluates=config.run.eval_only,
    )


# ---- the prediction ----


def peak(plan: Plan) -> dict[str, int]:
    """{part: bytes} of PARTS at the moment when a training step, or an evaluation alone, holds most; their sum is the
    peak."""
    held = _LiveBytes(CUDA_BLOCK if plan.device_type == "cuda" else 1)
    with without_data(plan.ops, plan.device_type, plan.capability), _fused_attention(plan.device_type), held:
        if plan.evaluates:
            _evaluate(plan, held)
            return held.at_peak
        ids = torch.empty(1, plan.batch_size, plan.shape.block_size + 1, dtype=torch.uint16, device="meta")
        _step(plan, held)(ids, 0)
    more_ids = (plan.micro_batches - 1) * ids.nbytes if plan.device_type == "cpu" else 0  # the loader's batch
    return {**held.at_peak, WORKSPACE: held.at_peak[WORKSPACE] + more_ids}


def _step(plan: Plan, held: "_LiveBytes") -> TrainStep:
    """The step on meta, its ops labelled. adamw_ works in place, and is left out: the reference's asks for numbers."""
    ops = replace(
        plan.ops,
        linear_cross_entropy=held.labelled(WORKSPACE, plan.ops.linear_cross_entropy),
        adamw_=lambda *args: None,
    )
    meta, sharded = torch.device("meta"), plan.parallel == "zero1"
    world = Unheard(0, plan.ranks, meta)
    frozen, bucket_mb = plan.evaluates, plan.bucket_mb
    counts = frozen and plan.device_type == "cpu"  # the model is built on a CPU; of a step, less than what comes later
    with meta, nullcontext() if counts else held.overlooking():
        model = held.labelled(PARAMETERS, GPT)(plan.shape, ops, plan.residual_dtype, plan.recompute).train()
    flat = held.labelled(PARAMETERS, FlatParameters)(
        model, plan.dtype, meta, world, sharded=sharded, frozen=frozen, bucket_mb=bucket_mb
    )
    optimizer = AdamW(flat, Config().optim, ops, scale_loss=plan.dtype == torch.float16)
    for part, buffers in {
        PARAMETERS: (flat.master, flat.params),
        GRADIENTS: (flat.grad,),
        OPTIMIZER: (optimizer.m, optimizer.v),
    }.items():
        for buffer in buffers:
            held.label(buffer, part)
    return TrainStep(model, optimizer, world, seed=0, reduce_dtype=plan.reduce_dtype)


@torch.no_grad()
def _evaluate(plan: Plan, held: "_LiveBytes") -> None:
    """One forward of an evaluation, as wide as scoring.py makes it."""
    model, size = _step(plan, held).model.eval(), plan.shape.block_size
    rows = plan.batch_size * stack_for(model, plan.batch_size, size, on=plan.device_type)
    ids = torch.empty(rows, size, dtype=torch.int64, device="meta")
    Forward(model).add(ids, ids)


class Unheard(World):
    """A rank whose collectives nobody hears."""

    def _started(self, name: str, *tensors: Tensor, **settings: int) -> Callable[[], None]:
        return lambda: None


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that ops under it make, while they live; at_peak: by label, when they were most."""

    def __init__(self, block: int):
        super().__init__()
        self.block, self.current, self.total, self.most = block, ACTIVATIONS, 0, 0
        self.now: dict[str, int] = dict.fromkeys(PARTS, 0)
        self.at_peak = dict(self.now)
        self.live: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (inside := inside_of(func._schema.name)) is not None:
            with self:  # what the op allocates inside counts too
                return inside(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.live:
            return
        size = -(-storage.nbytes() // self.block) * self.block if self.block else 0
        in_backward = torch._C._current_graph_task_id() != -1
        part = WORKSPACE if in_backward else self.current
        self.live[key] = weakref.ref(storage, lambda _: self._forget(key)), size, part
        self.now[part] += size
        self.total += size
        if self.total > self.most:
            self.most, self.at_peak = self.total, dict(self.now)

    def _forget(self, key: int) -> None:
        _, size, part = self.live.pop(key)
        self.now[part] -= size
        self.total -= size

    def label(self, tensor: Tensor, part: str) -> None:
        """From now on a live tensor's bytes belong to this part."""
        key = tensor.untyped_storage()._cdata
        ref, size, before = self.live[key]
        self.live[key] = ref, size, part
        self.now[before] -= size
        self.now[part] += size

    @contextmanager
    def overlooking(self) -> Iterator[None]:
        """What is made within does not count, then or later."""
        block, self.block = self.block, 0
        try:
            yield
        finally:
            self.block = block

    def labelled(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """function, what it allocates being of this part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before, self.current = self.current, part
            try:
                return function(*args, **kwargs)
            finally:
                self.current = before

        return call


@contextmanager
def _fused_attention(device_type: str) -> Iterator[None]:
    """Within it, a causal scaled_dot_product_attention keeps what the device's fused kernel does: q, k, v, the output
    and one float32 a row. One under a mask stays as torch has it on meta, with its scores."""
    own, aten = F.scaled_dot_product_attention, torch.ops.aten
    on_cpu = device_type == "cpu"
    kernel = aten._scaled_dot_product_flash_attention_for_cpu if on_cpu else aten._scaled_dot_product_flash_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None:
            return own(q, k, v, attn_mask=attn_mask)
        return kernel(q, k, v, 0.0, is_causal)[0]

    with patch.object(F, "scaled_dot_product_attention", attention):
        yield


# ---- what fits ----


def largest_batch(plan: Plan, budget: float) -> int | None:
    """The most sequences of a micro-batch whose step stays within budget bytes, a divisor of the rank's sequences an
    iteration, so that its tokens stay; None where not even one sequence fits."""
    batches = plan.batch_sizes
    low, high = 0, len(batches)  # batches[:low] fit, batches[high:] do not
    while low < high:
        middle = (low + high) // 2
        if sum(peak(plan.with_batch(batches[middle])).values()) <= budget:
            low = middle + 1
        else:
            high = middle
    return batches[low - 1] if low else None


def batch_flags(plan: Plan, batch_size: int) -> str:
    """The flags of micro-batches of batch_size sequences, with the plan's tokens an iteration."""
    first, full = (n * plan.ranks // batch_size for n in (plan.first, plan.sequences))
    ramp = f" --batch_ramp={first}:{plan.ramp}" if plan.ramp else ""
    return f"--batch_size={batch_size} --gradient_accumulation_steps={full}{ramp}"


def relief(plan: Plan, budget: float | None) -> str:
    """What to set when a step of this plan, or its evaluation, ran out of memory, best first; budget: bytes there are,
    None if unknown."""
    found, stronger = [], RECOMPUTE[RECOMPUTE.index(plan.recompute) + 1 :]
    now = sum(peak(plan).values())
    if plan.evaluates:  # small batches are put together (stack_for), so fewer sequences a batch may be more at once
        sizes = [n for n in (plan.batch_size >> i for i in range(1, 10)) if n]
        held = {n: sum(peak(replace(plan, batch_size=n)).values()) for n in sizes}
        least = min(held, key=lambda n: held[n], default=0)
        return f"--batch_size={least}" if least and held[least] < now else NO_RELIEF
    kept = {name: sum(peak(replace(plan, recompute=name)).values()) for name in stronger}
    helps = [name for name in stronger if kept[name] < now]
    smaller = [n for n in plan.batch_sizes if n < plan.batch_size]
    if helps and (smaller or budget is None or kept[helps[-1]] <= budget):
        enough = [name for name in helps if budget is not None and kept[name] <= budget]
        name = (enough or helps)[0 if enough else -1]
        found.append(f"--recompute={name} ({readable(now - kept[name])} less by prediction)")
    if smaller:
        fits = None if budget is None else largest_batch(plan, budget)
        found.append(batch_flags(plan, fits if fits in smaller else smaller[-1]) + ", on the same tokens")
    return ", or ".join(found) or NO_RELIEF


def readable(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
