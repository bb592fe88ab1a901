"""Counts the bytes that kernels load and store while Triton's interpreter runs them (TRITON_INTERPRET=1).

The interpreter of Triton 3.6, torch 2.11's, breaks with numpy 2.4 and later: `accept_new_numpy` mends it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder as _InterpreterBuilder
from triton.runtime.interpreter import TensorHandle

InterpreterBuilder: Any = _InterpreterBuilder


def accept_new_numpy() -> None:
    """Let kernels loop over range(n) of an argument n, which is an array of one element: from numpy 2.4 on int() of it
    is a TypeError. Triton 3.7 takes the element out first; before it we do. Once a process."""
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    patch_the_rest = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_the_rest(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


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
