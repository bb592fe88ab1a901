"""nanoGPT's ckpt.pt, in and out, optimizer included.

Its optimizer state is positional: group 0 holds the tensors of two dimensions, group 1 the rest, both in the
model's own order (the head shares wte's parameter, so wte stands for both), numbered through.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.settings.config import GPTConfig, OptimConfig
from nanogpt_fast.weights.canonical import Weights, checked, dense, load_pickle, model_config, plain_names

MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")  # nanoGPT's GPTConfig
MOMENTS = ("exp_avg", "exp_avg_sq")

# The keys of nanoGPT's train.py, in its order; a checkpoint's `config` has these and no others.
CONFIG_KEYS = (
    "out_dir", "eval_interval", "log_interval", "eval_iters", "eval_only", "always_save_checkpoint", "init_from",
    "wandb_log", "wandb_project", "wandb_run_name", "dataset", "gradient_accumulation_steps", "batch_size",
    "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "learning_rate", "max_iters", "weight_decay",
    "beta1", "beta2", "grad_clip", "decay_lr", "warmup_iters", "lr_decay_iters", "min_lr", "backend", "device",
    "dtype", "compile",
)  # fmt: skip


def optimizer_names(config: GPTConfig) -> tuple[list[str], list[str]]:
    """Parameter names by AdamW group, in nanoGPT's order: (decayed, not decayed)."""
    shapes = config.parameter_shapes()
    return [n for n, s in shapes.items() if len(s) > 1], [n for n, s in shapes.items() if len(s) == 1]


def read(path: Path) -> Weights:
    """The weights in a ckpt.pt. Nothing in the file is executed. Raises CheckpointError."""
    saved = load_pickle(path)
    if not isinstance(saved, dict) or not {"model", "model_args"} <= saved.keys():
        raise CheckpointError(
            "not a nanoGPT checkpoint",
            where=str(path),
            expected="a dict with model, model_args, optimizer, iter_num, best_val_loss, config",
            found=f"a dict with {', '.join(map(str, saved))[:120]}"
            if isinstance(saved, dict)
            else type(saved).__name__,
        )
    try:
        weights = _parse(saved, str(path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            "the checkpoint is not built as nanoGPT's", where=str(path), found=f"{type(error).__name__}: {error}"
        ) from error
    return checked(weights, str(path))


def _parse(saved: dict[str, Any], where: str) -> Weights:
    tensors, run = plain_names(saved["model"], where), dict(saved.get("config", {}))
    args = {key: saved["model_args"][key] for key in MODEL_ARGS if key in saved["model_args"]}
    args.setdefault("bias", "transformer.ln_f.bias" in tensors)  # checkpoints older than the option
    config = model_config(where, **args, activation=run.pop("activation", "gelu"))
    optimizer, updates = _read_optimizer(saved.get("optimizer"), config, f"{where}: optimizer")
    return Weights(
        model_args=config,
        model=tensors,
        optimizer=optimizer,
        optimizer_step=updates,
        step=int(saved.get("iter_num", 0)),
        best_val_loss=float(saved.get("best_val_loss", math.inf)),
        config=run,
    )


def _read_optimizer(saved: Any, config: GPTConfig, where: str) -> tuple[dict[str, Tensor] | None, int]:
    """({moment.NAME: tensor} or None when nothing was updated yet, number of updates)."""
    if not saved or not saved["state"]:
        return None, 0
    state, groups, names = saved["state"], [g["params"] for g in saved["param_groups"]], optimizer_names(config)
    numbered = [index for group in groups for index in group]
    if [len(g) for g in groups] != [len(n) for n in names] or set(numbered) != set(state):
        raise CheckpointError(
            "the optimizer is not nanoGPT's AdamW over this model",
            where=where,
            expected=f"two groups of {len(names[0])} and {len(names[1])} parameters, each with state",
            found=f"groups of {', '.join(str(len(g)) for g in groups)}, state for {len(state)}",
        )
    by_name = dict(zip([*names[0], *names[1]], (state[i] for i in numbered)))
    updates = {float(s["step"]) for s in by_name.values()}
    if len(updates) != 1:
        raise CheckpointError(
            "parameters were updated a different number of times", where=where, found=f"steps {sorted(updates)}"
        )
    moments = {f"{m}.{name}": dense(f"{m}.{name}", s[m], where) for m in MOMENTS for name, s in by_name.items()}
    return moments, int(updates.pop())


def write(weights: Weights, path: Path) -> None:
    """A ckpt.pt that nanoGPT's train.py resumes from and its sample.py reads; float32."""
    c, config = weights.model_args, {k: weights.config[k] for k in CONFIG_KEYS if k in weights.config}
    if c.activation != "gelu":
        config["activation"] = c.activation  # nanoGPT ignores it and computes erf; read() restores it
    model = {**weights.model, "lm_head.weight": weights.model["transformer.wte.weight"]}
    saved = {
        "model": model,
        "optimizer": _optimizer_state(weights),
        "model_args": {key: getattr(c, key) for key in MODEL_ARGS},
        "iter_num": weights.step,
        "best_val_loss": torch.tensor(weights.best_val_loss),
        "config": config,
    }
    torch.save(saved, path)


def _optimizer_state(weights: Weights) -> dict[str, Any]:
    """AdamW's state_dict; without moments a fresh one, as nanoGPT's resume asks for some."""
    config, default = weights.config, OptimConfig()
    decayed, rest = optimizer_names(weights.model_args)
    shapes = weights.model_args.parameter_shapes()

    def on_meta(names: list[str]) -> list[Tensor]:
        return [torch.nn.Parameter(torch.empty(shapes[n], device="meta")) for n in names]

    # torch's own AdamW makes the groups, so that they have every key its load_state_dict and step read.
    adamw = torch.optim.AdamW(
        [
            {"params": on_meta(decayed), "weight_decay": config.get("weight_decay", default.weight_decay)},
            {"params": on_meta(rest), "weight_decay": 0.0},
        ],
        lr=config.get("learning_rate", default.learning_rate),
        betas=(config.get("beta1", default.beta1), config.get("beta2", default.beta2)),
    )
    moments = weights.optimizer
    state = {}
    if moments is not None:
        state = {
            i: {"step": torch.tensor(float(weights.optimizer_step)), **{m: moments[f"{m}.{name}"] for m in MOMENTS}}
            for i, name in enumerate([*decayed, *rest])
        }
    return {"state": state, "param_groups": adamw.state_dict()["param_groups"]}
