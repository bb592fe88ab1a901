"""The two-reference rule: our error against float64 may be twice that of torch in the same dtype, and a tiny term.

A fixed tolerance is either too loose to catch anything or wrong for the next shape; torch's own error on the same
inputs says what the dtype allows.

Where float64 would not fit, relative_error and TOLERANCE tell a result that is another from one that was rounded
differently.
"""

import math

import torch
from torch import Tensor

FACTOR = 2.0
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-3}  # relative; float32 products may be TF32


def disagreement(ours: Tensor, same_dtype: Tensor, ref64: Tensor, *, tiny: float) -> str:
    """What is wrong with `ours`: "" where it is as close to `ref64` as `same_dtype` is, times FACTOR, plus tiny.

    same_dtype: torch's answer in the dtype of ours. ref64: float64. tiny: relative to the largest |ref64|, for results
    that torch gets exactly right; one step of the dtype's subnormals is allowed besides. Both the largest and the
    root-mean-square error are held: one wrong element, or many small ones.
    """
    if not ours.shape == same_dtype.shape == ref64.shape:
        return f"shapes {ours.shape}, {same_dtype.shape}, {ref64.shape}"
    if ours.dtype != same_dtype.dtype:
        return f"{ours.dtype}, but torch gives {same_dtype.dtype}"
    if ref64.dtype != torch.float64:
        return f"the reference is {ref64.dtype}"
    if ref64.numel() == 0:
        return ""
    error, allowed = (ours.double() - ref64).abs(), (same_dtype.double() - ref64).abs()
    slack = tiny * ref64.abs().max() + torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    for name, measure in (("largest", Tensor.max), ("rms", lambda e: e.square().mean().sqrt())):
        bound = FACTOR * measure(allowed) + slack
        # `not <=` rather than `>`: NaN anywhere must fail
        if not bool(measure(error) <= bound):
            at = tuple(int(i) for i in torch.unravel_index(error.nan_to_num(nan=torch.inf).argmax(), error.shape))
            return (
                f"{name} error {measure(error):.3e} > {bound:.3e} = {FACTOR} x {measure(allowed):.3e} (torch, "
                f"{ours.dtype}) + {slack:.1e}; worst at {at}: {ours[at].item()}, expected {ref64[at].item()}"
            )
    return ""


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, by the 2-norm; NaN where either has one. Zeros on both sides prove nothing."""
    if ours.shape != theirs.shape:
        return math.nan
    norm = float(torch.linalg.vector_norm(theirs.detach(), dtype=torch.float32))
    if norm == 0.0:
        raise ValueError("a result that is all zeros proves nothing: choose other inputs")
    return float(torch.linalg.vector_norm(ours.detach().float() - theirs.detach().float())) / norm
