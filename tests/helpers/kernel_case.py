"""What tests of the Triton ops share: the device, guarded memory, and one comparison of values and gradients.

Where there is a GPU these tests run compiled on it (and carry the marker `gpu`); elsewhere they run interpreted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from interpreter import install
from parity import assert_parity
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GUARD = 256  # elements before and after each guarded tensor

if DEVICE.type == "cpu":
    install()


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """A reproducible normal tensor that requires a gradient."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype).requires_grad_()


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max // 3


def _guarded_empty(shape: Sequence[int], dtype: torch.dtype, device: Any, log: list[tuple[Tensor, int]]) -> Tensor:
    """A poisoned tensor between poisoned margins, 256-byte aligned."""
    numel = torch.Size(shape).numel()
    buffer = torch.full((numel + 2 * GUARD,), _poison(dtype), dtype=dtype, device=device)
    log.append((buffer, numel))
    return buffer[GUARD : GUARD + numel].view(shape)


@contextmanager
def guarded() -> Iterator[None]:
    """Within it, what the ops allocate is filled with NaN and has margins, which nothing may have touched at its end.

    So an element that no program writes shows as NaN, and a store past an end as AssertionError.
    """
    log: list[tuple[Tensor, int]] = []
    stock = torch.empty, torch.empty_like, Tensor.new_empty

    def empty(*shape: Any, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Tensor:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return _guarded_empty(sizes, dtype or torch.get_default_dtype(), device, log)

    def empty_like(t: Tensor, *, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        return _guarded_empty(t.shape, dtype or t.dtype, t.device, log)

    def new_empty(t: Tensor, *shape: Any, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Tensor:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return _guarded_empty(sizes, dtype or t.dtype, device or t.device, log)

    torch.empty, torch.empty_like, Tensor.new_empty = empty, empty_like, new_empty  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty, torch.empty_like, Tensor.new_empty = stock
    for buffer, numel in log:
        for margin in (buffer[:GUARD], buffer[GUARD + numel :]):
            untouched = margin.isnan() if buffer.is_floating_point() else margin == _poison(buffer.dtype)
            assert bool(untouched.all()), f"a kernel wrote outside a tensor of {numel} elements of {buffer.dtype}"


def between_margins(x: Any) -> Any:
    """A contiguous float input copied between NaN margins, so that a load past its ends shows; else as it is."""
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.is_contiguous()) or hasattr(x, "main_grad"):
        return x
    copy = _guarded_empty(x.shape, x.dtype, x.device, [])
    return copy.copy_(x.detach()).requires_grad_(x.requires_grad)


def gradients(f: Callable[..., Any], inputs: Sequence[Any], douts: Sequence[Tensor] | None) -> list[Tensor]:
    """Outputs, then the gradient of each input that requires one; f's outputs are Tensors."""
    result = f(*inputs)
    outs = list(result) if isinstance(result, tuple) else [result]
    differentiable = [o for o in outs if o.requires_grad]
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    given = [torch.ones_like(o) for o in differentiable] if douts is None else list(douts)
    grads = torch.autograd.grad(differentiable, wanted, [d.to(o.dtype) for d, o in zip(given, differentiable)])
    return [o.detach() for o in outs] + list(grads)


def upcast(x: Any) -> Any:
    """A float tensor in float64, still requiring its gradient; everything else as it is."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().double().requires_grad_(x.requires_grad)
    return x


def assert_op(
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    douts: Sequence[Tensor] | None = None,
    *,
    tiny: float = 1e-6,
    what: str = "op",
) -> None:
    """Values and every gradient by the two-reference rule, in guarded memory.

    ours and reference take the inputs alike; reference runs in their dtypes and in float64. douts: the incoming
    gradients of the differentiable outputs (default: ones).
    """
    with guarded():
        got = gradients(ours, [between_margins(x) for x in inputs], douts)
    same = gradients(reference, inputs, douts)
    exact = gradients(reference, [upcast(x) for x in inputs], douts)
    assert len(got) == len(same) == len(exact)
    for i, (a, b, c) in enumerate(zip(got, same, exact)):
        assert_parity(a, b, c.double(), tiny=tiny, what=f"{what}[{i}]")
