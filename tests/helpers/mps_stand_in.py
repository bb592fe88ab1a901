"""A stand-in for Apple's MPS on a machine without one: CPU tensors that say `mps` and refuse what MPS refuses.

What is made on or moved to `mps` is a CPU tensor whose storage is marked: `.device` says mps, everything computed from
it is marked, and each aten op on it is checked:

  - no float64 and no unsigned 16, 32, 64-bit integers (pytorch/pytorch#122602, #159076);
  - no op without an MPS kernel in torch's own list (torchgen's native_functions.yaml), which no composite takes apart;
  - no marked beside unmarked tensors, but numbers: 0-dim ones, and no views even of those (#193057);
  - none of what is known to be wrong there: shifts and 64-bit products, scaled_dot_product_attention, multinomial,
    the fused AdamW with a grad_scale (the sources are where reference.py avoids them).

It proves where things are computed, and that MPS has the ops; whether Apple's kernels compute them right, it cannot.
"""

import re
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MPS = torch.device("mps")
NO_DTYPES = {torch.float64, torch.uint16, torch.uint32, torch.uint64, torch.complex128}
WRONG = re.compile(r"scaled_dot_product|multinomial|shift|randperm")
MOVES = {"aten::_to_copy", "aten::copy_"}


def is_mps(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == "mps"


class MPSError(RuntimeError):
    """What MPS would have refused, or computed wrongly."""


@cache
def _op_blocks() -> dict[str, str]:
    """{op.overload: its entry} of torch's native_functions.yaml."""
    spec = find_spec("torchgen")
    assert spec and spec.origin
    text = (Path(spec.origin).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    return {block.split("(")[0].strip(): block for block in re.split(r"^- func: ", text, flags=re.M)[1:]}


@cache
def has_mps_kernel(name: str) -> bool:
    """Whether torch implements the op (`mul.Tensor`) for MPS, itself or through other ops."""
    block = _op_blocks().get(name)
    assert block is not None, f"{name} is not in torch's list"
    if delegate := re.search(r"structured_delegate: (\S+)", block):
        return has_mps_kernel(delegate[1])
    dispatch = re.search(r"\n  dispatch:\n((?:    .+\n)+)", block)
    return dispatch is None or bool(re.search(r"\bMPS\b|Composite", dispatch[1]))


class StandIn(TorchDispatchMode):
    """The device, as a context manager; `ops` counts what ran on it."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address from being used again
        self.ops: Counter[str] = Counter()
        self.moving_to: torch.device | None = None  # where a clone on its way goes
        self.functions = _Functions(self)

    def __enter__(self) -> "StandIn":
        self.functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.functions.__exit__(*error)

    def holds(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage()._cdata in self.marks

    def _mark(self, x: Any) -> None:
        if isinstance(x, Tensor):
            storage = x.untyped_storage()
            self.marks.setdefault(storage._cdata, StorageWeakRef(storage))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        inside = [x for x in tensors if self.holds(x)]
        on_device = bool(inside)
        if is_mps(kwargs.get("device")):
            kwargs["device"], on_device = torch.device("cpu"), True
        result = func(*args, **kwargs)
        if func._schema.name == "aten::copy_":  # writes into args[0], wherever the source is
            on_device = self.holds(args[0])
        if self.moving_to is not None:
            on_device = is_mps(self.moving_to)
        if not on_device or func is torch.ops.aten._local_scalar_dense.default:
            return result
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._check(func, args, kwargs, tensors, inside, outputs)
        for x in outputs:
            self._mark(x)
        return result

    def _check(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], inside: list[Tensor], outputs: list[Tensor]
    ) -> None:
        name = func._schema.name.removeprefix("aten::") + (f".{o}" if (o := func._schema.overload_name) else "")
        self.ops[name] += 1
        if bad := {x.dtype for x in [*inside, *outputs]} & NO_DTYPES:
            raise MPSError(f"{name}: no {bad} on MPS")
        if not has_mps_kernel(name):
            raise MPSError(f"{name} has no MPS kernel")
        product = name.startswith("mul") and any(x.dtype == torch.int64 for x in outputs)
        if WRONG.search(name) or product:
            raise MPSError(f"{name}: not to be trusted on MPS")
        if name.startswith("_fused_adam") and kwargs.get("grad_scale") is not None:
            raise MPSError(f"{name} ignores grad_scale on MPS")
        outside = [x for x in tensors if not self.holds(x)]
        if func._schema.name in MOVES:
            if bad := {x.dtype for x in outside} & NO_DTYPES:
                raise MPSError(f"{name}: no {bad} to or from MPS")
        elif self.moving_to is None and any(x.dim() or x.storage_offset() or x.dtype == torch.float64 for x in outside):
            raise MPSError(f"{name}: tensors on mps and on cpu")


class _Functions(TorchFunctionMode):
    """What Python sees of marked tensors: their device, and moves to the host."""

    def __init__(self, stand_in: StandIn):
        super().__init__()
        self.stand_in = stand_in

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and is_mps(kwargs.get("device")):
            return self._to(torch.tensor(*args, **{**kwargs, "device": "cpu"}), MPS, None)
        if func is Tensor.to:
            return self._to(args[0], *torch._C._nn._parse_to(*args[1:], **kwargs)[:2])  # type: ignore[attr-defined]
        if not args or not self.stand_in.holds(args[0]):
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return MPS
        if func is Tensor.backward:  # torch switches this mode off inside, and ops' own backwards ask for devices
            with self:
                return torch.autograd.backward(args[0])
        if func in (Tensor.numpy, Tensor.__array__):
            raise MPSError("numpy of a tensor on mps")
        return self._to(args[0], torch.device("cpu"), None) if func is Tensor.cpu else func(*args, **kwargs)

    def _to(self, x: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
        """As torch: a copy where the device or the dtype changes, converted where x is."""
        with torch._C.DisableTorchFunctionSubclass():
            x = x if dtype is None else x.to(dtype)
        if device is None or is_mps(device) == self.stand_in.holds(x):
            return x
        self.stand_in.moving_to = device
        try:
            return x.clone()
        finally:
            self.stand_in.moving_to = None
