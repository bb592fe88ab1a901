"""Helion's pretuned kernels: LayerNorm and cross-entropy with the launch shapes that its repository keeps for sm_90 and
sm_100, so that nothing is tuned here. They are no part of the wheel: HELION_DIR names a checkout.

Forward only, both. norm: eps is fixed at 1e-5, as ours is by default; it needs a bias. linear_cross_entropy: the logits
are a product by torch, kept whole; losses and their mean are in the logits' dtype.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from harness import Contestant, plain
from torch import Tensor

REQUIRES = (
    "pip install helion==1.5.1, and HELION_DIR=DIR, a checkout of pytorch/helion "
    "(written against ef091f416a, 2026-08-22)"
)
OPS = ("norm", "linear_cross_entropy")

importlib.import_module("helion")  # what the kernels are written in: an ImportError says that it is missing


def _kernel(name: str) -> Any:
    """The kernel of pretuned_kernels/NAME/NAME.py, which finds its launch shapes beside that file."""
    folder = os.environ.get("HELION_DIR")
    if not folder:
        raise ImportError("the pretuned kernels are not in the wheel: HELION_DIR is not set")
    path = Path(folder) / "pretuned_kernels" / name / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"helion_pretuned_{name}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"{path} is no file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def _norm() -> Contestant:
    kernel = _kernel("layer_norm")

    def norm(r: Tensor, w: Tensor, b: Tensor | None, eps: float = 1e-5) -> Tensor:
        if b is None or eps != 1e-5:
            raise ValueError("Helion's LayerNorm needs a bias, and eps 1e-5")
        return kernel(r.detach().flatten(0, -2), w.detach(), b.detach()).view_as(r)

    return plain(norm)


def _linear_cross_entropy() -> Contestant:
    kernel = _kernel("cross_entropy")

    def function(x: Tensor, w: Tensor, targets: Tensor, grad_scale: Tensor) -> Tensor:
        return kernel(x.detach().flatten(0, -2) @ w.detach().t(), targets.flatten())

    return plain(function)


def contestants(op: str) -> dict[str, Contestant]:
    if op == "norm":
        return {"Helion, forward only": _norm()}
    if op == "linear_cross_entropy":
        return {"Helion, logits by torch, forward only": _linear_cross_entropy()}
    return {}
