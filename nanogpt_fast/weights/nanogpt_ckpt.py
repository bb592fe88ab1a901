"""nanoGPT's ckpt.pt, in and out, optimizer included; the forms it had before are read too.

Its optimizer state is positional: group 0 holds the tensors of two dimensions, group 1 the rest, both in the
model's own order (the head shares wte's parameter, so wte stands for both), numbered through. Until 6 May 2023
(nanoGPT's commit 7fe4a099) group 0 held the Linear weights alone, group 1 all else, each sorted by name as text; until
14 January 2023 (7c828855) the head was a weight of its own, and one of them.

GELU was the tanh form until 14 June 2023 (f08abb45). A file does not say which: the older optimizer is proof of tanh,
and so are model_args without bias, an option since 27 January 2023 (cc5444e1). Else the present form is assumed.
"""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.settings.config import GPTConfig, OptimConfig
from nanogpt_fast.weights.canonical import (
    Weights,
    all_biases,
    checked,
    dense,
    model_config,
    number,
    plain_config,
    plain_names,
    shown,
    without_tied_head,
)
from nanogpt_fast.weights.sources import file_bytes, load_pickle, saved_before_torch_2_1

log = logging.getLogger(__name__)
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


LINEAR = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight", "lm_head.weight")


def optimizer_names(config: GPTConfig) -> tuple[list[str], list[str]]:
    """Parameter names by AdamW group, in nanoGPT's order: (decayed, not decayed)."""
    shapes = config.parameter_shapes()
    return [n for n, s in shapes.items() if len(s) > 1], [n for n, s in shapes.items() if len(s) == 1]


def old_optimizer_names(config: GPTConfig) -> tuple[list[str], list[str]]:
    """The same as nanoGPT grouped and ordered them until 6 May 2023."""
    names = sorted(config.parameter_shapes())
    return [n for n in names if n.endswith(LINEAR)], [n for n in names if not n.endswith(LINEAR)]


def load(path: Path) -> dict[str, Any]:
    """What a ckpt.pt holds: a dict with model and model_args at least. Nothing in it is executed.

    Raises CheckpointError, which says what the file is instead.
    """
    saved = load_pickle(path)
    if isinstance(saved, dict) and isinstance(saved.get("model"), dict) and isinstance(saved.get("model_args"), dict):
        return saved
    what, hint = _what_else(saved, path)
    raise CheckpointError(
        what,
        where=str(path),
        expected="a dict with model, model_args, optimizer, iter_num, best_val_loss, config",
        found=f"a dict with {', '.join(map(shown, list(saved)[:8]))}"[:200]
        if isinstance(saved, dict)
        else type(saved).__name__,
        hint=hint,
    )


def _what_else(saved: Any, path: Path) -> tuple[str, str]:
    """(what a torch file that is no ckpt.pt holds, what to do about it)."""
    tensors = saved if isinstance(saved, dict) else {}
    if "model_args" not in tensors and "model" in tensors and isinstance(tensors.get("config"), dict):
        hint = "save it again with config's sizes as model_args: n_layer, n_head, n_embd, block_size, vocab_size, bias"
        return "a checkpoint that keeps its model's shape under `config`, as build-nanogpt's do, not nanoGPT's", hint
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        return "not a nanoGPT checkpoint", ""
    shapes = {str(name).split("transformer.", 1)[-1]: tuple(tensor.shape) for name, tensor in tensors.items()}
    qkv, wte, wpe = (shapes.get(name, ()) for name in ("h.0.attn.c_attn.weight", "wte.weight", "wpe.weight"))
    if len(qkv) == 2 and qkv[1] == 3 * qkv[0]:  # Conv1D: (in, out)
        hint = "name it pytorch_model.bin in a folder with its config.json, and give the folder"
        return "weights as Hugging Face's GPT-2 stores them, not a nanoGPT checkpoint", hint
    known = ""
    if len(wte) == len(wpe) == 2:
        layers = {name.split(".")[1] for name in shapes if name.startswith("h.")}
        known = f"n_layer={len(layers)}, n_embd={wte[1]}, block_size={wpe[0]}, vocab_size={wte[0]}, "
    return "a state_dict alone: weights without the shape of their model, of which n_head cannot be told", (
        f"python -c \"import torch; torch.save({{'model': torch.load('{path}'), 'model_args': "
        f"dict({known}n_head=HEADS, bias={'ln_f.bias' in shapes}, dropout=0.0)}}, 'ckpt.pt')\""
    )


def read(path: Path, optimizer: bool = True) -> Weights:
    """The weights in a ckpt.pt, with optimizer its moments too, which else are not looked at. Raises CheckpointError.

    An optimizer that is not nanoGPT's is left out with a warning: training then starts its moments anew.
    """
    saved, where = load(path), str(path)
    tensors, tied = without_tied_head(plain_names(saved["model"], where))
    run = plain_config(saved.get("config"))
    config, known = _shape(saved, tensors, tied, run, path)
    weights = Weights(
        model_args=config,
        model=tensors,
        step=int(number(saved, "iter_num", 0, where)),
        best_val_loss=number(saved, "best_val_loss", math.inf, where),
        optimizer_step=_updates(saved.get("optimizer")),
        config=run,
        activation_known=known,
    )
    weights = checked(weights, where)
    if not optimizer:
        return weights
    moments, updates, refused = _read_optimizer(saved.get("optimizer"), config, f"{where}: optimizer")
    if refused:
        log.warning(
            "%s: the optimizer is not nanoGPT's AdamW over this model (%s): its state is left out", where, refused
        )
    return (
        checked(replace(weights, optimizer=moments, optimizer_step=updates), where)
        if moments
        else replace(weights, optimizer_step=0)
    )


def _shape(
    saved: dict[str, Any], tensors: dict[str, Tensor], tied: bool, run: dict[str, Any], path: Path
) -> tuple[GPTConfig, bool]:
    """(the model's shape, whether its GELU is known); says so where it is not and may well be the other."""
    given, where = saved["model_args"], str(path)
    args = {key: given[key] for key in MODEL_ARGS if key in given}
    args["tie_word_embeddings"] = tied
    args.setdefault("bias", "transformer.ln_f.bias" in tensors)  # an option since 27 January 2023
    for key, name in (("vocab_size", "wte"), ("block_size", "wpe")):  # vocab_size is there since 14 January 2023
        rows = tensors.get(f"transformer.{name}.weight")
        if key not in args and rows is not None and rows.dim() == 2:
            args[key] = rows.shape[0]
    activation = run.pop("activation", None)
    nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
    config = model_config(where, min(nbytes, file_bytes(path)), **args, activation=activation or "gelu")
    decayed = _group_sizes(saved.get("optimizer"))[:1]
    old, new = ([len(names(config)[0])] for names in (old_optimizer_names, optimizer_names))
    if not tied and decayed in ([old[0] - 1], [new[0] - 1]):
        raise CheckpointError(
            "the output head is not the token embedding",
            where=f"{where}: lm_head.weight",
            expected="equal to transformer.wte.weight: the file's optimizer has one parameter for both",
            found="two different tensors",
        )
    if activation:
        return config, True
    if decayed == old or ("bias" not in given and decayed != new):
        return replace(config, activation="gelu_tanh"), True
    if saved_before_torch_2_1(path):
        log.warning(
            "%s does not say which GELU it was trained with: the exact one is taken, nanoGPT's since 14 June 2023; "
            "for one of an older checkout say --activation=gelu_tanh",
            where,
        )
    return config, False


def _group_sizes(saved: Any) -> list[int]:
    """Parameters in each group of an optimizer's state_dict; [] where it is none."""
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    groups = groups if isinstance(groups, list) else []
    params = [group.get("params") if isinstance(group, dict) else None for group in groups]
    return [len(p) for p in params if isinstance(p, list)] if all(isinstance(p, list) for p in params) else []


def _updates(saved: Any) -> int:
    """How many updates an optimizer's state_dict has seen, by its first parameter."""
    state = saved.get("state") if isinstance(saved, dict) else None
    first = next(iter(state.values()), None) if isinstance(state, dict) else None
    return _steps(first) or 0


def _steps(state: Any) -> int | None:
    step = state.get("step") if isinstance(state, dict) else None
    if isinstance(step, Tensor) and step.numel() == 1 and step.layout == torch.strided and not step.is_complex():
        step = step.item()
    return int(step) if isinstance(step, (int, float)) and 0 <= step < 2**53 else None


def _read_optimizer(saved: Any, config: GPTConfig, where: str) -> tuple[dict[str, Tensor] | None, int, str]:
    """({moment.NAME: tensor} or None, number of updates, why there are no moments although there is a state)."""
    if not saved or (isinstance(saved, dict) and saved.get("state") == {}):
        return None, 0, ""
    sizes, orders = _group_sizes(saved), (optimizer_names(config), old_optimizer_names(config))
    names = next((order for order in orders if sizes == [len(group) for group in order]), None)
    state = saved.get("state") if isinstance(saved, dict) else None
    if names is None or not isinstance(state, dict):
        return None, 0, f"groups of {', '.join(map(str, sizes[:8])) or 'nothing known'}"
    numbered = [index for group in saved["param_groups"] for index in group["params"]]
    if not all(isinstance(index, int) and isinstance(state.get(index), dict) for index in numbered):
        return None, 0, f"state for {len(state)} of {len(numbered)} parameters"
    by_name = dict(zip([*names[0], *names[1]], (state[index] for index in numbered)))
    updates = {_steps(s) for s in by_name.values()}
    if len(updates) != 1 or None in updates:
        return None, 0, "parameters were updated a different number of times"
    shapes = config.parameter_shapes()
    for name, s in by_name.items():
        if not all(isinstance(s.get(m), Tensor) and tuple(s[m].shape) == shapes[name] for m in MOMENTS):
            return None, 0, f"no moments of {name}'s shape"
    moments = {f"{m}.{name}": dense(f"{m}.{name}", s[m], where) for m in MOMENTS for name, s in by_name.items()}
    return moments, updates.pop() or 0, ""


def write(weights: Weights, path: Path) -> None:
    """A ckpt.pt that nanoGPT's train.py resumes from and its sample.py reads; float32. Its head must be tied."""
    weights = all_biases(weights) if weights.model_args.norm_bias else weights
    c, config = weights.model_args, {k: weights.config[k] for k in CONFIG_KEYS if k in weights.config}
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
