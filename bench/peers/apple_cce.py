"""Apple's cut-cross-entropy (PyPI), Triton: the linear cross-entropy that never holds logits; backward computes them
again.

Mean over the rows, which is ours with grad_scale = 1 / rows. By default it leaves out gradients below 2^-12 (bfloat16):
less work than ours; "no filtering" computes them all. dw is accumulated in the weights' dtype. It counts the targets
that are not ignored, which waits for the device, so no graph holds it.
"""

from cut_cross_entropy import linear_cross_entropy
from harness import Contestant, plain
from torch import Tensor

REQUIRES = "pip install cut-cross-entropy==25.1.1"
OPS = ("linear_cross_entropy",)


def _linear_cross_entropy(filtering: str | None, implementation: str = "cce") -> Contestant:
    def function(x: Tensor, w: Tensor, targets: Tensor, grad_scale: Tensor) -> Tensor:
        return linear_cross_entropy(
            x, w, targets, ignore_index=-1, reduction="mean", filter_eps=filtering, impl=implementation
        )

    return plain(function, capturable=False)


def contestants(op: str) -> dict[str, Contestant]:
    if op != "linear_cross_entropy":
        return {}
    return {
        "cut-cross-entropy": _linear_cross_entropy("high"),
        "cut-cross-entropy, no filtering": _linear_cross_entropy(None),
        "cut-cross-entropy, torch.compile": _linear_cross_entropy(None, "torch_compile"),
    }
