"""Config: nanoGPT's names and defaults, the frozen set of flags, ranges, and copies."""

import dataclasses
import math

import pytest

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.settings.config import SECTION_OF, Config, GPTConfig

# A new flag is a promise to every script that will use it. Adding one means adding it here, on purpose.
FLAGS = """
out_dir init_from eval_interval log_interval eval_iters eval_only eval_mode always_save_checkpoint resume_step keep_last
auto_resume async_save sample_at_end seed
dataset data_dir gradient_accumulation_steps batch_ramp batch_size block_size data_order document_mask
ignore_fingerprint
n_layer n_head n_embd dropout bias norm_bias tie_word_embeddings activation vocab_size
learning_rate max_iters weight_decay beta1 beta2 grad_clip skip_step_sigma skip_step_window max_bad_steps
decay_lr schedule decay_ratio warmup_iters lr_decay_iters min_lr
wandb_log wandb_project wandb_run_name tensorboard
device dtype residual_dtype tf32 cuda_graph recompute micro_batch compile kernels rows backend timeout parallel
reduce_dtype bucket_mb dry_run world on debug profile profiler
"""

# What nanoGPT's train.py starts from; device and dtype are read from the machine there, and are "auto" here.
NANOGPT_DEFAULTS = {
    "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "eval_only": False,
    "always_save_checkpoint": True, "init_from": "scratch", "wandb_log": False, "wandb_project": "owt",
    "wandb_run_name": "gpt2", "dataset": "openwebtext", "gradient_accumulation_steps": 40, "batch_size": 12,
    "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False,
    "learning_rate": 6e-4, "max_iters": 600000, "weight_decay": 1e-1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
    "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5, "backend": "nccl",
    "device": "auto", "dtype": "auto", "compile": True,
}  # fmt: skip


def test_the_set_of_flags_is_frozen():
    assert list(SECTION_OF) == FLAGS.split()


def test_defaults_are_nanogpts():
    flat = Config().flat()
    assert {key: flat[key] for key in NANOGPT_DEFAULTS} == NANOGPT_DEFAULTS
    assert {key: type(flat[key]) for key in NANOGPT_DEFAULTS} == {k: type(v) for k, v in NANOGPT_DEFAULTS.items()}


def test_tokens_per_iter_is_nanogpts_half_million():
    assert Config().tokens_per_iter == 40 * 12 * 1024 == 491_520


@pytest.mark.parametrize(
    "key, value",
    [
        ("learning_rate", math.nan), ("learning_rate", math.inf), ("learning_rate", -1e-4), ("min_lr", -1.0),
        ("weight_decay", math.inf), ("weight_decay", -0.1), ("grad_clip", math.nan), ("grad_clip", -1.0),
        ("dropout", 1.0), ("dropout", -0.1), ("dropout", math.nan), ("beta1", 1.0), ("beta2", -0.5),
        ("beta2", math.nan),
        ("batch_size", -5), ("batch_size", 0), ("block_size", 0), ("gradient_accumulation_steps", 0),
        ("n_layer", 0), ("n_head", 0), ("n_embd", -768), ("vocab_size", -1), ("max_iters", -1), ("warmup_iters", -1),
        ("lr_decay_iters", -1), ("eval_interval", 0), ("log_interval", 0), ("eval_iters", 0), ("keep_last", 1),
        ("resume_step", -1), ("timeout", 0.0), ("timeout", math.inf), ("bucket_mb", 0.0), ("bucket_mb", math.nan),
        ("world", -1),
        ("decay_ratio", 0.0), ("decay_ratio", 1.1), ("decay_ratio", math.nan), ("sample_at_end", -1),
        ("seed", -1), ("seed", 2**63), ("skip_step_sigma", -1.0), ("skip_step_sigma", math.nan),
        ("skip_step_window", 1), ("max_bad_steps", 0),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(ConfigError) as caught:
        Config().replace(**{key: value})
    assert caught.value.what == f"--{key} is out of range"
    assert caught.value.where == f"{key} = {value!r}" and caught.value.expected
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "key, value",
    [
        ("dropout", 0.0),
        ("learning_rate", 0.0),
        ("max_iters", 0),
        ("grad_clip", 0.0),
        ("seed", 2**63 - 1),
        ("beta1", 0.0),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(key, value):
    assert Config().replace(**{key: value}).flat()[key] == value


def test_heads_that_do_not_divide_the_width_name_the_nearest_that_do():
    with pytest.raises(ConfigError, match="n_embd is not divisible by n_head") as caught:
        Config().replace(n_embd=768, n_head=7)
    assert "4, 6, 8" in caught.value.expected


@pytest.mark.parametrize("width, heads", [(10**9 + 7, 12), (10**30 + 7, 10**15)])
def test_an_absurd_width_is_refused_at_once(width, heads):
    with pytest.raises(ConfigError, match="not divisible"):
        Config().replace(n_embd=width, n_head=heads)


def test_replace_changes_only_what_it_names_and_copies_are_frozen():
    config = Config().replace(batch_size=3, learning_rate=1e-3)
    changed = {key for key, value in config.flat().items() if value != Config().flat()[key]}
    assert changed == {"batch_size", "learning_rate"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.data.batch_size = 4  # type: ignore[misc]


def test_the_models_shape_takes_every_model_setting_the_context_and_the_vocabulary():
    config = Config().replace(
        n_layer=3, n_head=2, n_embd=8, dropout=0.1, bias=True, activation="gelu_tanh", block_size=5, vocab_size=7
    )
    assert config.shape(65) == GPTConfig(
        block_size=5, vocab_size=65, n_layer=3, n_head=2, n_embd=8, dropout=0.1, bias=True, activation="gelu_tanh"
    )


def test_gpt2_has_124_million_parameters():
    assert GPTConfig(vocab_size=50257, bias=True).num_params(non_embedding=False) == 124_439_808
