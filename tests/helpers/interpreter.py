"""Triton's interpreter, made exact for bfloat16, and (byte_counter) able to count the bytes that kernels move.

Triton 3.6 to 3.9 interpret bfloat16 as the uint16 patterns that hold it: sums and products of them are silently
meaningless, and float32 -> bfloat16 truncates. Here bfloat16 operands are widened to float32, and results are rounded
to nearest even, as GPUs do. What is not made exact (reductions and elementary functions of bfloat16) raises.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from byte_counter import counting_bytes as counting_bytes
from byte_counter import mend_interpreter
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

InterpreterBuilder: Any = interpreter.InterpreterBuilder


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 patterns (uint16) -> float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 patterns (uint16), to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(np.shape(x))


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _numeric(handle: TensorHandle) -> np.ndarray:
    return widen(handle.data) if _is_bfloat16(handle) else handle.data


def remember_types() -> None:
    """A block's type is made once, and the shape that tensors of it have: anew for every operation of every program
    they take a quarter of the interpreter's time."""
    make_type, scalar = tl.block_type.__init__, {"shape": tl.tuple([]), "numel": tl.constexpr(1)}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        made = vars(element_ty).setdefault("blocks", {})
        sizes = tuple([s.value if isinstance(s, tl.constexpr) else s for s in shape])
        if sizes not in made:
            make_type(self, element_ty, shape)
            self.of_tensors = {"shape": tl.tuple(list(map(tl.constexpr, sizes))), "numel": tl.constexpr(self.numel)}
            made[sizes] = vars(self)
        vars(self).update(made[sizes])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        vars(self).update(vars(type).get("of_tensors", scalar), handle=handle, type=type, dtype=type.scalar)

    def broadcast(self: Any, lhs: Any, rhs: Any, _stock: Any = TritonSemantic.broadcast_impl_value) -> Any:
        shapes = vars(lhs.type).get("shape"), vars(rhs.type).get("shape")
        if shapes[0] is not None and shapes[1] is not None and shapes[0].values == shapes[1].values:
            return lhs, rhs
        return _stock(self, lhs, rhs)

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
    TritonSemantic.broadcast_impl_value = broadcast


def install() -> None:
    """Patch the interpreter; once a process."""
    if getattr(InterpreterBuilder, "exact_bfloat16", False):
        return
    mend_interpreter()
    remember_types()
    # Checks of overflow are computed, and then asserted only in debug mode, which the interpreter is not in.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    np.seterr(over="ignore")  # to infinity without a word, as GPUs do
    stock = {
        name: getattr(InterpreterBuilder, name)
        for name in ("cast_impl", "create_fp_to_fp", "binary_op", "unary_op", "create_dot", "create_fma",
                     "create_rsqrt", "create_fabs", "create_clampf")
    }  # fmt: skip

    def cast(self: Any, src: TensorHandle, dst_type: Any, *rounding: Any) -> TensorHandle:
        to_bfloat16 = dst_type.scalar == tl.bfloat16
        if not (to_bfloat16 or _is_bfloat16(src)):
            return stock["create_fp_to_fp" if rounding else "cast_impl"](self, src, dst_type, *rounding)
        if to_bfloat16:
            data = src.data if _is_bfloat16(src) else round_to_bfloat16(src.data.astype(np.float32))
        else:
            data = widen(src.data).astype(interpreter._get_np_dtype(dst_type))
        return TensorHandle(data, dst_type.scalar)

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if not (_is_bfloat16(lhs) or _is_bfloat16(rhs)):
            return stock["binary_op"](self, lhs, rhs, op)
        result = op(_numeric(lhs), _numeric(rhs))
        return TensorHandle(result if result.dtype == bool else round_to_bfloat16(result), tl.bfloat16)

    def dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> TensorHandle:
        a, b = (TensorHandle(widen(t.data), tl.float32) if _is_bfloat16(t) else t for t in (a, b))
        return stock["create_dot"](self, a, b, d, *rest)

    def erf(self: Any, arg: TensorHandle) -> TensorHandle:  # 100 times as fast as the stock np.vectorize(math.erf)
        return TensorHandle(torch.erf(torch.from_numpy(np.ascontiguousarray(arg.data))).numpy(), arg.dtype.scalar)

    def refusing(name: str) -> Any:
        def refuse(self: Any, *args: Any) -> TensorHandle:
            if any(isinstance(a, TensorHandle) and _is_bfloat16(a) for a in args):
                raise NotImplementedError(
                    f"{name} of bfloat16 is not exact in the interpreter: convert to float32 first"
                )
            return stock[name](self, *args)

        return refuse

    def refuse_reductions(self: Any, input: Any, _stock: Any = interpreter.ReduceOps.apply_impl) -> Any:
        if any(t.dtype.scalar == tl.bfloat16 for t in input):
            raise NotImplementedError(
                "a reduction of bfloat16 is not exact in the interpreter: convert to float32 first"
            )
        return _stock(self, input)

    def scan_slices(self: Any, input: Any) -> Any:  # 100 times as fast as the stock loop over single elements
        slices = [np.moveaxis(t.handle.data, self.axis, 0) for t in input]
        whole, outs = self.to_tensor, [list(s[:1]) for s in slices]
        for i in range(1, len(slices[0])):
            before = [whole(out[-1], t.dtype) for out, t in zip(outs, input)]
            result = self.combine_fn.fn(*before, *(whole(s[i], t.dtype) for s, t in zip(slices, input)))
            for out, t in zip(outs, result if isinstance(result, tuple) else (result,)):
                out.append(t.handle.data)
        return [whole(np.moveaxis(np.stack(out), 0, self.axis), t.dtype) for out, t in zip(outs, input)]

    for name in ("unary_op", "create_fma", "create_rsqrt", "create_fabs", "create_clampf"):
        setattr(InterpreterBuilder, name, refusing(name))
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = cast
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.create_erf = erf
    interpreter.ReduceOps.apply_impl = refuse_reductions
    interpreter.ScanOps.generic_scan = scan_slices
    InterpreterBuilder.exact_bfloat16 = True
