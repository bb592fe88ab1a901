"""Counts the bytes that kernels load and store while Triton's interpreter runs them (TRITON_INTERPRET=1).

`mend_interpreter` first: that of Triton 3.6, torch 2.11's, breaks with numpy 2.4 and later, and each version spends two
fifths and more of its time on work that is done already.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder as _InterpreterBuilder
from triton.runtime.interpreter import TensorHandle

InterpreterBuilder: Any = _InterpreterBuilder


def mend_interpreter() -> None:
    """Make it accept new numpy, and quicker; once a process. Twenty steps of a tiny model: 24.6 s, then 14.9."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        _accept_new_numpy()
    np_dtype = functools.cache(interpreter._get_np_dtype)  # the stock one builds a table of all types each time
    interpreter._get_np_dtype = lambda of: np.dtype(np.uint64) if of.scalar.is_ptr() else np_dtype(of.scalar)
    stock_call = interpreter.InterpretedFunction.__call__

    def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        """triton.language is patched for the kernel that calls it: the stock call searches it once more."""
        if any(language.static_print is not print for language in _languages(self.fn)):
            return stock_call(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call_device_function


@functools.cache
def _languages(fn: Any) -> list[Any]:
    """triton.language, by each of the names that a function has for it."""
    return [language for language in (tl, tl.core) if any(language is value for value in fn.__globals__.values())]


def _accept_new_numpy() -> None:
    """Let kernels loop over range(n) of an argument n, which is an array of one element: from numpy 2.4 on int() of it
    is a TypeError. Triton 3.7 takes the element out first."""
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
