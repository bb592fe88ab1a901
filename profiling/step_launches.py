"""What one training step launches: the trainer's own TrainStep on meta tensors, with the Triton ops, nothing computed.

Triton launches come from nanogpt_kernels.launch.recording, with the launch rows of an architecture; matrix products and
torch's other kernels from a dispatch mode over the same run. A step of one micro-batch and one of two are recorded:
their difference is a micro-step, what is left of the first comes once a step.

Bytes of a launch are those of its operands, each moved once (PASSES has the others): what it cannot do without, however
often its tiles come back to L2 for more. FLOPs are those of products; exponentials are attention's.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import built_step
import torch
from nanogpt_kernels import launch
from nanogpt_kernels.registry import NAMESPACE
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from triton.tools.tensor_descriptor import TensorDescriptor
from work import Work, causal_pairs

from nanogpt_fast.ops import TRITON
from nanogpt_fast.settings.config import Config, GPTConfig
from nanogpt_fast.step import TrainStep

META = torch.device("meta")
WEIGHT_GRADIENT = f"{NAMESPACE}::accumulate_weight_grad_"  # on a GPU one product, which adds into float32

# How often a launch moves an operand, by kernel and operand, where that is not once. A step accumulates gradients.
PASSES: dict[tuple[str, str], float] = {
    ("_cross_entropy_fwd_kernel", "logits_ptr"): 2.0,  # read; overwritten after a second read, which L2 serves
    **{("_adamw_kernel", f"{buffer}_ptr"): 2.0 for buffer in ("master", "m", "v")},
    **{("_column_sums_kernel", f"into{slot}_ptr"): 2.0 for slot in range(3)},
    **{("_embedding_bwd_kernel", "dwte_ptr"): 2.0, ("_embedding_bwd_pieces_kernel", "dwte_ptr"): 2.0},
    ("_embedding_bwd_positions_kernel", "dwpe_ptr"): 2.0,
    ("_attention_bwd_dq_kernel", "dqkv_ptr"): 1 / 3,  # dq of packed dq, dk, dv
    ("_after_atomic_kernel", "dqkv_ptr"): 1 / 3,
    ("_attention_bwd_dkdv_kernel", "dqkv_ptr"): 2 / 3,
    ("_attention_bwd_dkdv_kernel", "dq_ptr"): 2.0,  # added to
}
PAIRED = {  # {kernel: (products, exponentials) of every (query, key) pair}
    "_attention_fwd_kernel": (2, 1),
    "_attention_bwd_dq_kernel": (3, 1),  # scores, dp, dq
    "_attention_bwd_dkdv_kernel": (4, 1),  # scores, dp, dv, dk
}
# torch's, which launch nothing
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "_reshape_alias", "detach", "lift_fresh"}
ONLY_WRITE = {"zero_", "fill_", "copy_"}  # their first argument


@dataclass(frozen=True)
class Launch:
    """A kernel on the device. kind: "Triton", "product" or "torch"; name: the launch row's op, M x K x N, or torch's
    operator."""

    kind: str
    name: str
    work: Work


@dataclass(frozen=True)
class Launches:
    """{launch: how often} of a micro-step, and of what a step does once. calls: one of each Triton launch."""

    micro_step: Counter[Launch]
    once: Counter[Launch]
    calls: dict[Launch, launch.Call]

    def step(self, micro_steps: int) -> Counter[Launch]:
        return self.once + Counter({one: n * micro_steps for one, n in self.micro_step.items()})


def recorded(config: Config, shape: GPTConfig, dtype: torch.dtype, arch: int, fused: bool | None = None) -> Launches:
    """A step of the configuration with the Triton ops and sm_`arch`'s launch rows. fused: whatever those say, whether
    the MLP's products have GELU in their epilogue."""
    with META:
        step = built_step.assembled(config, shape, TRITON, dtype, META)
    with ExitStack() as stack:
        for op in ("mlp_fwd", "mlp_bwd") if fused is not None else ():
            stack.enter_context(launch.override(op, choices=dict(fused=fused)))
        (one, calls), (two, _) = (_step_of(step, n, config.data.batch_size, shape.block_size, arch) for n in (1, 2))
    micro_step = two - one
    return Launches(micro_step, one - micro_step, calls)


def _step_of(
    step: TrainStep, micro_steps: int, batch_size: int, block_size: int, arch: int
) -> tuple[Counter[Launch], dict[Launch, launch.Call]]:
    batch = torch.empty(micro_steps, batch_size, block_size + 1, dtype=torch.int64, device=META)
    with launch.recording(arch) as calls, _Torch() as torch_s:
        step(batch, 0)
    launches = [triton_launch(call) for call in calls]
    return torch_s.seen + Counter(launches), dict(zip(launches, calls))


class _Torch(TorchDispatchMode):
    """Counts what torch launches on meta tensors, also inside our ops, which it sees as one each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Launch] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.name() == WEIGHT_GRADIENT:
            into, dy, x = args
            flops = 2.0 * dy.numel() * x.size(1)
            name = f"{dy.size(1)} x {dy.size(0)} x {x.size(1)}, added into float32"
            self.seen[Launch("product", name, Work(flops, float(2 * into.nbytes + dy.nbytes + x.nbytes)))] += 1
            return func(*args, **kwargs)
        if func.namespace == NAMESPACE:
            with self:
                return func._op_dk(DispatchKey.Meta, *args, **kwargs)
        with self:  # linear and matmul, down to the products in them
            if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if not func.is_view and func.overloadpacket.__name__ not in FREE:
            self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func.overloadpacket
        reads, writes = _tensors(args), _tensors(out if isinstance(out, tuple | list) else (out,))
        if not all(t.is_meta for t in (*reads, *writes)):
            return  # made on the host, once
        if packet.__name__ in ONLY_WRITE:
            reads = reads[1:]
        moved = float(sum(t.nbytes for t in (*reads, *writes)))
        if packet in flop_registry:
            a, b = reads[-2:]
            flops = float(flop_registry[packet](*args, **kwargs, out_val=out))
            name = f"{a.size(-2)} x {a.size(-1)} x {b.size(-1)}"
            self.seen[Launch("product", name, Work(flops, moved))] += 1
        else:
            self.seen[Launch("torch", packet.__name__, Work(bytes=moved))] += 1


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def triton_launch(call: launch.Call) -> Launch:
    """A recorded call with what its operands' shapes say of its work."""
    kernel, named = call.kernel.__name__, dict(zip(call.kernel.arg_names, call.args))
    operands = {n: a.base if isinstance(a, TensorDescriptor) else a for n, a in named.items()}
    tensors = {n: a for n, a in operands.items() if isinstance(a, Tensor)}
    moved = sum(_share(n, named) * PASSES.get((kernel, n), 1.0) * t.nbytes for n, t in tensors.items())
    flops = exps = 0.0
    if kernel in PAIRED:
        products, exponentials = PAIRED[kernel]
        B, T, _, H, D = tensors["qkv_ptr"].shape
        pairs = causal_pairs(B * H, T)
        products += bool(call.options.get("ATOMIC"))  # dq too
        flops, exps = 2.0 * D * products * pairs, exponentials * pairs
    elif "gemm" in kernel:
        flops = 2.0 * named["M"] * named["N"] * named["K"]
    return Launch("Triton", call.op, Work(flops, moved, exps))


def _share(operand: str, named: dict[str, Any]) -> float:
    """Of an embedding's table what the tokens of the call can name at most; all of any other operand."""
    if operand not in ("wte_ptr", "dwte_ptr"):
        return 1.0
    tokens = named.get("runs") or named.get("M") or named["B"] * named["T"]
    return min(1.0, tokens / named["V"])
