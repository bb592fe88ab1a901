"""NVIDIA's apex: FusedLayerNorm and FusedAdam. PyPI's `apex` is a web toolkit, so NVIDIA's is told by its compiled
modules.

norm: its result has the weight's dtype, so weight and bias are narrowed to the activations' beforehand (ours are
float32); their gradients are as narrow. adamw_: bench/fused_adam.py.
"""

import importlib

import fused_adam
from apex.normalization.fused_layer_norm import fused_layer_norm_affine
from apex.optimizers import FusedAdam
from harness import Bound, Contestant
from torch import Tensor

REQUIRES = (
    "in a checkout of NVIDIA/apex (written against 6424da3b4f, 2026-07-08): "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)
OPS = ("norm", "adamw_")

for compiled in (
    "amp_C",
    "fused_layer_norm_cuda",
):  # built with APEX_CUDA_EXT: an ImportError says that apex is missing
    importlib.import_module(compiled)


def _bind_norm(r: Tensor, w: Tensor, b: Tensor | None, eps: float = 1e-5) -> Bound:
    if b is None:
        raise ValueError("apex's LayerNorm needs a bias")
    narrow = [x.detach().to(r.dtype).requires_grad_() for x in (w, b)]

    def forward() -> Tensor:
        return fused_layer_norm_affine(r, *narrow, (r.size(-1),), eps)

    return Bound(forward, [r, *narrow])


def contestants(op: str) -> dict[str, Contestant]:
    if op == "norm":
        return {"apex": Contestant(_bind_norm)}
    if op == "adamw_":
        return {"apex": fused_adam.contestant(FusedAdam)}
    return {}
