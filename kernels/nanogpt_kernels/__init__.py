"""GPT-2's ops in Triton, forward and backward: `from nanogpt_kernels import layernorm`. `reference` specifies each.

Importing the package loads neither torch nor triton; the first use of an op's name loads its file (PEP 562). The files
are in ops/ and not here, because importing a submodule makes it an attribute of its package: as nanogpt_kernels.norm
the file would replace `norm` the op, in some orders of import and not in others.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ops.adamw import adamw_, grad_norm
    from .ops.attention import attention, cached_attention, qkv_attention
    from .ops.cross_entropy import cross_entropy
    from .ops.embedding import embedding
    from .ops.linear import linear
    from .ops.linear_cross_entropy import linear_cross_entropy
    from .ops.mlp import bias_gelu, mlp
    from .ops.norm import add_norm, layernorm, norm
    from .ops.residual import dropout_add

__version__ = "0.1.0"
__all__ = [
    "adamw_",
    "add_norm",
    "attention",
    "bias_gelu",
    "cached_attention",
    "cross_entropy",
    "dropout_add",
    "embedding",
    "grad_norm",
    "layernorm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "norm",
    "qkv_attention",
]

_FILE_OF = {name: name for name in __all__} | {  # in ops/; most ops have the name of their file
    "adamw_": "adamw",
    "add_norm": "norm",
    "bias_gelu": "mlp",
    "cached_attention": "attention",
    "dropout_add": "residual",
    "grad_norm": "adamw",
    "layernorm": "norm",
    "qkv_attention": "attention",
}


def __getattr__(name: str) -> Any:
    """The op of that name, from its file."""
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    op = getattr(importlib.import_module(f"{__name__}.ops.{_FILE_OF[name]}"), name)
    globals()[name] = op  # the next use finds it without this function
    return op


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
