"""Weights: the one form that every format is read into and written from, and the checks all formats share."""

import math
import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt_fast.data.dataset import Meta, check_name, read_meta
from nanogpt_fast.errors import CheckpointError, ConfigError, DataError, did_you_mean
from nanogpt_fast.run.checkpoint import Checkpoint
from nanogpt_fast.settings.config import GPTConfig, ModelConfig

GPT2_VOCAB = 50257  # GPT-2's tokens, <|endoftext|> included
GPT2_PADDED = 50304  # the same padded to a multiple of 64, nanoGPT's vocab_size from scratch

_WRAPPERS = ("_orig_mod.", "module.")  # torch.compile's and DistributedDataParallel's
_MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks stored as buffers; c_attn.bias is not one


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model by our names, float32, with what else its file knew.

    model: {name: tensor} in the order of model_args.parameter_shapes(), no lm_head (it is tied). Tensors may be
    mapped from the file: copy them where they belong and drop the Weights.
    optimizer: {"exp_avg.NAME", "exp_avg_sq.NAME"} for every name, or None; optimizer_step: its updates.
    step: nanoGPT's iter_num. config: flat configuration of the run, {} when unknown.
    tokenizer: the `tokenizer` of the dataset's meta.json, when known.
    state: the rest of what our trainer saved (samples seen, fingerprint, loss scale); {} from other formats.
    """

    model_args: GPTConfig
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] | None = None
    optimizer_step: int = 0
    step: int = 0
    best_val_loss: float = math.inf
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] | None = None
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def used_vocab(self) -> int:
        """Tokens the tokenizer can produce: vocab_size without its padding rows."""
        vocab = self.model_args.vocab_size
        if self.tokenizer and self.tokenizer.get("itos"):
            return min(vocab, len(self.tokenizer["itos"]))
        return min(vocab, GPT2_VOCAB) if self.is_gpt2_vocab else vocab

    @property
    def is_gpt2_vocab(self) -> bool:
        """Whether the ids are GPT-2's: said by the tokenizer, else told from the vocabulary's size."""
        if self.tokenizer:
            return self.tokenizer.get("kind") == "gpt2"
        return self.model_args.vocab_size in (GPT2_VOCAB, GPT2_PADDED)


def model_config(where: str, **values: Any) -> GPTConfig:
    """GPTConfig(**values), checked: these values come out of a file. Raises CheckpointError."""
    for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        value = values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{key} is missing or no size", where=where, expected="a whole number >= 1", found=repr(value)
            )
    try:
        ModelConfig(**{key: value for key, value in values.items() if key != "block_size"})
    except (ConfigError, TypeError) as error:
        raise CheckpointError("the model's configuration makes no GPT", where=where, found=str(error)) from error
    return GPTConfig(**values)


def plain_names(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """{our name: tensor}: wrappers' prefixes stripped, mask buffers and the tied head dropped.

    Raises CheckpointError for anything that is not a dense tensor, and for a head that is not the token embedding.
    """
    plain = {}
    for key, tensor in tensors.items():
        tensor = dense(key, tensor, where)
        while key.startswith(_WRAPPERS):
            key = key.split(".", 1)[1]
        if key.endswith(_MASKS):
            continue
        plain[key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"] = tensor
    head, wte = plain.pop("lm_head.weight", None), plain.get("transformer.wte.weight")
    if head is not None and wte is not None and not torch.equal(head, wte):
        raise CheckpointError(
            "the output head is not the token embedding",
            where=f"{where}: lm_head.weight",
            expected="lm_head.weight equal to transformer.wte.weight (tied)",
            found="two different tensors",
        )
    return plain


def dataset_meta(config: dict[str, Any], data_dir: str | Path) -> Meta | None:
    """The meta of the dataset a run's configuration names, where that lies in data_dir and can be read."""
    try:  # the name comes out of a file: it must not be a path
        return read_meta(Path(data_dir) / check_name(str(config.get("dataset", ""))))
    except DataError:
        return None


def with_biases(weights: Weights) -> dict[str, Tensor]:
    """The model for formats that always have biases: zeros where ours has none, wte cut to the used vocabulary."""
    shapes = replace(weights.model_args, bias=True).parameter_shapes()
    full = {n: weights.model[n] if n in weights.model else torch.zeros(shape) for n, shape in shapes.items()}
    return full | {"transformer.wte.weight": full["transformer.wte.weight"][: weights.used_vocab]}


def dense(key: str, value: Any, where: str) -> Tensor:
    """value, if it is an ordinary tensor: sparse ones come out of a pickle unvalidated. Raises CheckpointError."""
    if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu":
        return value.detach()
    found = f"{value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
    raise CheckpointError(
        "only dense tensors can be read", where=f"{where}: {key}", expected="a dense tensor", found=found
    )


def checked(weights: Weights, where: str) -> Weights:
    """The same as float32, contiguous, in parameter_shapes() order, each tensor with a storage of its own.

    Raises CheckpointError: names missing or foreign, another shape, no floating type, NaN or infinity.
    """
    model = {name: _float32(tensor) for name, tensor in weights.model.items()}
    moments = {name: _float32(tensor) for name, tensor in (weights.optimizer or {}).items()}
    loaded = Checkpoint(weights.step, asdict(weights.model_args), model, moments)
    try:
        loaded = check_model(loaded, weights.model_args)
    except CheckpointError as error:
        at = f"{where}: {error.where}" if error.where else where
        raise CheckpointError(
            error.what, where=at, expected=error.expected, found=error.found, hint=error.hint
        ) from error
    return replace(weights, model=loaded.model, optimizer=loaded.optimizer or None)


def _float32(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        tensor = tensor.float().contiguous()
    # A view (nanoGPT's cropped wpe is one) would be saved with all of the storage behind it.
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def load_pickle(path: Path) -> Any:
    """torch.load that runs no code from the file; mapped, not copied, where the file's form allows it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not named:
            raise CheckpointError("the file is damaged or is no torch file", where=str(path)) from error
        raise CheckpointError(
            "the file holds more than tensors and plain values; refused, and nothing in it was run",
            where=str(path),
            expected="tensors, numbers, strings, lists and dicts",
            found=f"the Python object {named[1]}",
            hint="if you trust its author, save it again without that object",
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(
            "the file is damaged, cut off or no torch file", where=str(path), found=str(error).split("\n")[0][:200]
        ) from error


def check_model(checkpoint: Checkpoint, config: GPTConfig) -> Checkpoint:
    """The checkpoint with its tensors in the order of `config`'s parameters, fit for a model of `config`.

    Raises CheckpointError for missing or unexpected names, shapes other than the config's, anything but float32,
    and NaN or infinity, in the weights and in the optimizer's moments.
    """
    shapes = config.parameter_shapes()
    differing = ", ".join(
        f"{key}: checkpoint {checkpoint.model_args[key]!r}, run {value!r}"
        for key, value in asdict(config).items()
        if key in checkpoint.model_args and checkpoint.model_args[key] != value
    )
    hint = f"the configurations differ in {differing}" if differing else ""
    moments = {f"{m}.{name}": shape for m in ("exp_avg", "exp_avg_sq") for name, shape in shapes.items()}
    model = _check_tensors(checkpoint.model, "", shapes, hint)
    optimizer = _check_tensors(checkpoint.optimizer, "optimizer ", moments, hint) if checkpoint.optimizer else {}
    return replace(checkpoint, model=model, optimizer=optimizer)


def _check_tensors(
    tensors: dict[str, Tensor], kind: str, shapes: dict[str, tuple[int, ...]], hint: str
) -> dict[str, Tensor]:
    """The tensors in the order of `shapes`."""
    missing, unexpected = [n for n in shapes if n not in tensors], [n for n in tensors if n not in shapes]
    if missing or unexpected:
        raise CheckpointError(
            f"the checkpoint's {kind}tensors are not the model's",
            expected=_some(f"{name} (missing{did_you_mean(name, unexpected)})" for name in missing),
            found=_some(f"{name} (unexpected)" for name in unexpected),
            hint=hint,
        )
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"a {kind}tensor of the checkpoint has another shape than the model's",
                where=name,
                expected=str(shape),
                found=str(tuple(tensor.shape)),
                hint=hint,
            )
        if tensor.dtype != torch.float32:
            raise CheckpointError(
                f"a {kind}tensor of the checkpoint has the wrong dtype",
                where=name,
                expected="float32",
                found=str(tensor.dtype).removeprefix("torch."),
                hint="checkpoints hold float32 masters; convert the weights explicitly",
            )
        low, high = tensor.aminmax()  # both become nan when one element is; no temporary, unlike isfinite
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CheckpointError(
                f"a {kind}tensor of the checkpoint holds NaN or infinity",
                where=name,
                expected="finite numbers",
                found=f"values from {low.item()} to {high.item()}",
                hint="the run had diverged when it was saved: go on from an earlier checkpoint",
            )
    return {name: tensors[name] for name in shapes}


def _some(items: Iterable[str], limit: int = 5) -> str:
    items = list(items)
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")
