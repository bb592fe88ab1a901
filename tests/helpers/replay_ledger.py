"""What a piece of device work would leave in a CUDA graph, recorded call by call, to compare two runs of it.

Two runs that give equal ledgers made the same calls, with the same scalars, on the same memory: so a graph of the
first, replayed, is the second. Tensors without data (device "meta") stand for the GPU's: what is on the CPU, or is
read by the host, shows.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from nanogpt_kernels import launch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from triton.tools.tensor_descriptor import TensorDescriptor

from nanogpt_fast.graphs import Graphs

Line = tuple[Any, ...]
WAITING = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero")  # the host reads these


class Ledger(TorchDispatchMode):
    """The calls made within it. A storage that was there before is named by itself, one made within by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Line] = []
        self.faults: list[str] = []
        self._made: dict[int, int] = {}  # storage -> number, of those made within
        self._alive: list[tuple[str, StorageWeakRef]] = []
        self._before: dict[int, torch.UntypedStorage] = {}  # held, so that no other takes its name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ):
        kwargs, name = kwargs or {}, str(func)
        operands = tree_flatten((args, kwargs))[0]
        if func is torch.ops.aten._fused_adamw_.tensor_lr:  # which has no form on meta; all is in place
            result = None
        else:
            result = func(*args, **kwargs)
        results = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        if any(word in name for word in WAITING):
            self.faults.append(f"{name}: the host would wait for the device")
        for t in (*operands, *results):
            if isinstance(t, Tensor) and t.device.type != "meta":
                self.faults.append(f"{name}: a tensor on {t.device}: a copy between host and device")
        told = tuple(self.describe(x) for x in operands)
        known = {x.untyped_storage()._cdata for x in operands if isinstance(x, Tensor)}
        for t in results:
            if (key := t.untyped_storage()._cdata) not in known:
                self._before.pop(key, None)
                self._made[key] = len(self._alive)
                self._alive.append((name, StorageWeakRef(t.untyped_storage())))
        self.lines.append((name, *told, "->", *(self.describe(t) for t in results)))
        return result

    def describe(self, x: Any) -> Any:
        if isinstance(x, TensorDescriptor):
            return ("descriptor", self.describe(x.base), tuple(x.shape), tuple(x.strides), tuple(x.block_shape))
        if not isinstance(x, Tensor):
            return repr(x)
        storage = x.untyped_storage()
        number = self._made.get(storage._cdata)
        if number is None:
            self._before[storage._cdata] = storage
        where = ("before", storage._cdata) if number is None else ("made", number)
        return (*where, x.storage_offset(), tuple(x.shape), tuple(x.stride()), x.dtype)

    def outliving(self) -> list[str]:
        """The calls whose new storage is still in use: a replay writes over it."""
        return [name for name, storage in self._alive if not storage.expired()]


class Pieces(Graphs):
    """Graphs without a GPU: each piece that would be captured is handed to `call`, which by default calls it."""

    def __init__(self, call: Callable[[str, Callable[[], None]], None] = lambda name, work: work()):
        super().__init__(torch.device("meta"))
        self.active, self._call = True, call

    def replayed(self, name: str, work: Callable[[], None]) -> Callable[[], None]:
        return lambda: self._call(name, work)


def record(work: Callable[[], Any]) -> Ledger:
    """The ledger of one call; its faults name what a graph cannot hold."""
    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(Ledger())
        stack.enter_context(_no_waiting(ledger))
        work()
    ledger.faults += [f"{name}: its result outlives the call" for name in ledger.outliving()]
    return ledger


def record_launches(work: Callable[[], Any], arch: int = 90) -> list[Line]:
    """The kernels that one call would launch on such a GPU, with their grids, arguments and shapes."""
    ledger = Ledger()
    with launch.recording(arch) as calls:
        work()
    lines = []
    for call in calls:
        told = [_without_name(a) if isinstance(a, Tensor | TensorDescriptor) else ledger.describe(a) for a in call.args]
        lines.append((call.op, call.kernel.__name__, call.grid, *told, repr(sorted(call.options.items()))))
    return lines


def _without_name(t: Tensor | TensorDescriptor) -> Line:
    """Its place in memory is the dispatcher's ledger's to hold: here it may be a temporary of the op."""
    if isinstance(t, TensorDescriptor):
        return (*_without_name(t.base), tuple(t.shape), tuple(t.strides), tuple(t.block_shape))
    return (t.storage_offset(), tuple(t.shape), tuple(t.stride()), t.dtype)


@contextlib.contextmanager
def _no_waiting(ledger: Ledger) -> Iterator[None]:
    """The waits that are no op: seen by their functions."""
    places = [(torch.cuda, "synchronize"), (torch.cuda.Event, "synchronize"), (torch.cuda.Stream, "synchronize")]
    kept = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name in places:
        setattr(owner, name, lambda *_, n=name: ledger.faults.append(f"{n}(): the host would wait for the device"))
    try:
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)
