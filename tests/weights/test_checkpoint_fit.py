"""check_model: a checkpoint that does not fit the model is refused with the key, both sides and the reason."""

import dataclasses

import pytest
import torch
from tiny_checkpoint import CONFIG, tiny_checkpoint

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.weights.canonical import check_model

FC = "transformer.h.0.mlp.c_fc.weight"


def refusal(checkpoint, config=CONFIG) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_model(checkpoint, config)
    assert caught.value.exit_code == 4
    return str(caught.value)


def test_a_fitting_checkpoint_comes_back_in_the_models_order():
    checkpoint = tiny_checkpoint(1)
    checkpoint.model = dict(reversed(checkpoint.model.items()))
    assert list(check_model(checkpoint, CONFIG).model) == list(CONFIG.parameter_shapes())
    checkpoint.optimizer = {}
    assert check_model(checkpoint, CONFIG).optimizer == {}


def test_a_wrong_shape_names_key_shapes_and_the_differing_configuration():
    text = refusal(tiny_checkpoint(1), dataclasses.replace(CONFIG, n_embd=6, n_head=3, dropout=0.5))
    assert "transformer.wte.weight" in text
    assert "(8, 6)" in text
    assert "(8, 4)" in text
    assert "n_embd: checkpoint 4, run 6" in text
    assert "n_head: checkpoint 2, run 3" in text
    assert "vocab_size" not in text


def test_a_wrong_shape_in_the_moments_is_found():
    checkpoint = tiny_checkpoint(1)
    checkpoint.optimizer[f"exp_avg_sq.{FC}"] = torch.zeros(4, 16)
    assert f"exp_avg_sq.{FC}" in refusal(checkpoint)


def test_missing_and_unexpected_names_are_listed_with_a_guess():
    checkpoint = tiny_checkpoint(1)
    checkpoint.model["transformer.h.0.mlp.c_fcc.weight"] = checkpoint.model.pop(FC)
    text = refusal(checkpoint)
    assert f"{FC} (missing, did you mean 'transformer.h.0.mlp.c_fcc.weight'" in text
    assert "transformer.h.0.mlp.c_fcc.weight (unexpected)" in text


def test_a_deeper_model_says_so_and_lists_only_a_few_names():
    text = refusal(tiny_checkpoint(1), dataclasses.replace(CONFIG, n_layer=3))
    assert "n_layer: checkpoint 1, run 3" in text
    assert "and 19 more" in text


def test_a_missing_moment_is_found():
    checkpoint = tiny_checkpoint(1)
    del checkpoint.optimizer[f"exp_avg.{FC}"]
    assert f"exp_avg.{FC} (missing" in refusal(checkpoint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_an_error_never_a_silent_cast(dtype):
    checkpoint = tiny_checkpoint(1)
    checkpoint.model[FC] = checkpoint.model[FC].to(dtype)
    text = refusal(checkpoint)
    assert FC in text
    assert str(dtype).removeprefix("torch.") in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part, name", [("model", FC), ("optimizer", f"exp_avg.{FC}")])
def test_one_non_finite_number_is_enough_to_refuse(value, part, name):
    checkpoint = tiny_checkpoint(1)
    getattr(checkpoint, part)[name][3, 2] = value
    text = refusal(checkpoint)
    assert "NaN or infinity" in text
    assert name in text
