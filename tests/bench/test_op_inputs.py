"""profiling/op_inputs.py: what is recorded on meta tensors is what is timed with data."""

from dataclasses import replace
from typing import Any

import kernel_case
import op_inputs
import pytest
import torch
from op_inputs import Setting, Shape
from torch import Tensor

META = torch.device("meta")
SHAPE = Shape(B=2, T=17, C=128, H=2, V=96, N=5000)
OPS = ["embedding", "norm", "add_norm", "dropout_add", "attention", "qkv_attention", "cached_attention", "linear",
       "mlp", "bias_gelu", "linear_cross_entropy", "cross_entropy", "grad_norm", "adamw_"]  # fmt: skip


def test_sizes_are_gpt2_s_with_a_padded_vocabulary():
    """12C^2 + 13C a layer, 50304 + 1024 rows of embeddings, two vectors: 124m, 1558m."""
    assert op_inputs.gpt2("124m").N == 12 * (12 * 768**2 + 13 * 768) + (50304 + 1024 + 2) * 768 == 124_475_904
    assert op_inputs.gpt2("1558m").N == 48 * (12 * 1600**2 + 13 * 1600) + (50304 + 1024 + 2) * 1600 == 1_557_686_400
    assert op_inputs.gpt2("350m", B=3, T=7) == Shape(3, 7, 1024, 16, 50304, op_inputs.gpt2("350m").N)
    assert [op_inputs.gpt2("124m", V=V).valid for V in (65, 50257, 50304)] == [65, 50257, 50257]


def described(args: tuple[Any, ...]) -> list[Any]:
    def one(arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        main_grad = getattr(arg, "main_grad", None)
        kept = None if main_grad is None else (main_grad.shape, main_grad.dtype)
        return arg.shape, arg.stride(), arg.dtype, arg.requires_grad, arg.is_leaf, kept

    return [one(arg) for arg in args]


@pytest.mark.parametrize("op", OPS)
def test_meta_arguments_are_the_real_ones_without_data(op: str):
    at = Setting(SHAPE, torch.bfloat16)
    loaded = replace(at, p=0.1, stream=torch.float32, main_grad=True, documents=torch.int32, activation="gelu_tanh")
    for s in (replace(at, bias=False), loaded):
        made = [getattr(op_inputs, op)(replace(s, device=device)) for device in (META, kernel_case.DEVICE)]
        assert described(made[0]) == described(made[1])
        tensors = [[arg for arg in args if isinstance(arg, Tensor)] for args in made]
        assert all(arg.is_meta for arg in tensors[0]) and not any(arg.is_meta for arg in tensors[1])


def test_documents_do_not_cross_sequences_and_every_one_is_long():
    *_, ids = op_inputs.attention(Setting(SHAPE, device=kernel_case.DEVICE, documents=torch.int64))
    assert ids.shape == (2, 17) and (ids[:, 1:] >= ids[:, :-1]).all()
    assert [row.unique().tolist() for row in ids] == [[0, 1, 2, 3]] * 2
