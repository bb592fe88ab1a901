"""Counts the bytes that kernels load and store while Triton's interpreter runs them (TRITON_INTERPRET=1)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder as _InterpreterBuilder
from triton.runtime.interpreter import TensorHandle

InterpreterBuilder: Any = _InterpreterBuilder


@contextmanager
def counting_bytes() -> Iterator[dict[str, int]]:
    """Within it, bytes that kernels load and store (lanes masked off do not count): {"load": n, "store": n}."""
    counted = {"load": 0, "store": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self: Any, ptrs: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
        result = load(self, ptrs, mask, *rest)
        counted["load"] += int(np.broadcast_to(mask.data, result.data.shape).sum()) * result.data.itemsize
        return result

    def counting_store(self: Any, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        counted["store"] += int(np.broadcast_to(mask.data, ptrs.data.shape).sum()) * value.data.itemsize
        return store(self, ptrs, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counting_load, counting_store
    try:
        yield counted
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
