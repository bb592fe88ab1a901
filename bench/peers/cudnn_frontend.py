"""cuDNN by NVIDIA's own frontend (PyPI: nvidia-cudnn-frontend): LayerNorm and attention as graphs and CuTe kernels of
its choice. torch's SDPA reaches cuDNN through a frontend of its own: bench/peers/pytorch.py.

norm: float32 weight and bias, as ours; without a bias it adds zeros that it makes each time. attention: [B, H, T, D] in
any strides, causal, scale 1 / sqrt(D); no packed form, so on our packed layout the gradient is put together from three.
16 bits only.
"""

from attention_forms import forms
from cudnn.ops.norm import layer_norm
from cudnn.sdpa.fwd.torch_op import sdpa
from harness import Contestant, plain
from torch import Tensor

REQUIRES = "pip install nvidia-cudnn-frontend==1.32.0 (beside the cuDNN that torch brings)"
OPS = ("norm", "attention")


def _norm(r: Tensor, w: Tensor, b: Tensor | None, eps: float = 1e-5) -> Tensor:
    return layer_norm(r, (r.size(-1),), w, b, eps)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # backward consumes the log of the sums, so it is asked for
    return sdpa(q, k, v, is_causal=True, return_lse=True)[0].transpose(1, 2)


def contestants(op: str) -> dict[str, Contestant]:
    if op == "norm":
        return {"cuDNN frontend": plain(_norm)}
    if op == "attention":
        return forms("cuDNN frontend", _attention, heads_first=True)
    return {}
