"""Weights: the one form that every format is read into and written from, and the checks all formats share."""

import math
from collections.abc import Callable
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

MAX_LAYERS = 10_000

_WRAPPERS = ("_orig_mod.", "module.")  # torch.compile's and DistributedDataParallel's
_VOCABULARY = ("transformer.wte.weight", "lm_head.weight")  # what has a row a token
_MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks stored as buffers; c_attn.bias is not one


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model by our names, float32, with what else its file knew.

    model: {name: tensor} in the order of model_args.parameter_shapes(), no lm_head where it is tied. Tensors may be
    mapped from the file: copy them where they belong and drop the Weights.
    optimizer: {"exp_avg.NAME", "exp_avg_sq.NAME"} for every name, or None; optimizer_step: its updates.
    step: nanoGPT's iter_num. config: flat configuration of the run, {} when unknown.
    tokenizer: the `tokenizer` of the dataset's meta.json, when known.
    activation_known: False where the file does not say which GELU it is, and nanoGPT's present one is taken.
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
    activation_known: bool = True
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def used_vocab(self) -> int:
        """Tokens the tokenizer can produce: vocab_size without its padding rows."""
        vocab = self.model_args.vocab_size
        itos = self.tokenizer.get("itos") if self.tokenizer else None
        if itos and isinstance(itos, list):
            return min(vocab, len(itos))
        return min(vocab, GPT2_VOCAB) if self.is_gpt2_vocab else vocab

    @property
    def is_gpt2_vocab(self) -> bool:
        """Whether the ids are GPT-2's: said by the tokenizer, else told from the vocabulary's size."""
        if self.tokenizer:
            return self.tokenizer.get("kind") == "gpt2"
        return self.model_args.vocab_size in (GPT2_VOCAB, GPT2_PADDED)


def model_config(where: str, nbytes: int, **values: Any) -> GPTConfig:
    """GPTConfig(**values), checked: these values come out of a file, which has nbytes for the weights.

    Raises CheckpointError, also for a model too large for that: before the names of its parameters fill the memory.
    """
    for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        value = values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise CheckpointError(
                f"{key} is missing or no size", where=where, expected="a whole number from 1 on", found=shown(value)
            )
    for key, ok in (
        *((key, isinstance(values.get(key, True), bool)) for key in ("bias", "norm_bias", "tie_word_embeddings")),
        ("dropout", type(values.get("dropout", 0)) in (int, float)),
        ("activation", values.get("activation", "gelu") in ("gelu", "gelu_tanh")),
    ):
        if not ok:
            raise CheckpointError(f"{key} makes no GPT", where=where, found=shown(values[key]))
    L, C, V, T = (values[key] for key in ("n_layer", "n_embd", "vocab_size", "block_size"))
    matrices = 12 * L * C * C + (V + T) * C + (0 if values.get("tie_word_embeddings", True) else V * C)
    if matrices > nbytes or L > MAX_LAYERS:
        raise CheckpointError(
            "the file is too small for the model that it describes",
            where=f"{where}: n_layer = {L}, n_embd = {C}, vocab_size = {V}, block_size = {T}",
            expected=f"at least {matrices:,} bytes of weights, and {MAX_LAYERS:,} layers at most",
            found=f"{nbytes:,} bytes",
        )
    try:
        ModelConfig(**{key: value for key, value in values.items() if key != "block_size"})
    except (ConfigError, TypeError) as error:
        raise CheckpointError("the model's configuration makes no GPT", where=where, found=str(error)) from error
    return GPTConfig(**values)


def number(saved: dict[str, Any], key: str, default: float, where: str) -> float:
    """A number >= 0 of a checkpoint, as a tensor of one too: a whole one, but where the default is infinite (a loss
    that is not finite was never measured). Raises CheckpointError."""
    value: Any = saved.get(key, default)
    if isinstance(value, Tensor) and value.numel() == 1 and value.layout == torch.strided and not value.is_complex():
        value = value.item()
    if value is None:
        return default
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if default == math.inf and (value != value or value in (math.inf, -math.inf)):
            return default
        if 0 <= value < 2**53 and (default == math.inf or value == int(value)):
            return value
    raise CheckpointError(
        f"{key} is no {'loss' if default == math.inf else 'count'}",
        where=where,
        expected="a number >= 0",
        found=shown(value),
    )


def plain_config(config: Any) -> dict[str, Any]:
    """A run's configuration as JSON can hold it: torch.bfloat16 becomes "bfloat16"; what is no setting is left out."""
    plain = {}
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, torch.dtype):
            value = str(value).removeprefix("torch.")
        finite = not isinstance(value, float) or math.isfinite(value)
        if isinstance(key, str) and (value is None or isinstance(value, (str, bool, int, float))) and finite:
            plain[key] = value
    return plain


def shown(value: Any) -> str:
    """A foreign value for a message: not too long, whatever it is."""
    try:
        return repr(value)[:80]
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists
        return f"a {type(value).__name__} that cannot be shown"


def plain_names(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """{our name: tensor}: wrappers' prefixes stripped, mask buffers dropped.

    Raises CheckpointError for anything that is not a dense tensor.
    """
    plain = {}
    for key, tensor in tensors.items():
        tensor, key = dense(str(key), tensor, where), str(key)
        while key.startswith(_WRAPPERS):
            key = key.split(".", 1)[1]
        if key.endswith(_MASKS):
            continue
        plain[key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"] = tensor
    return plain


def without_tied_head(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """(the tensors less a head that repeats the token embedding, whether the head is no weight of its own)."""
    wte, head = (tensors.get(name) for name in _VOCABULARY)
    if head is not None and wte is not None and (head.dtype != wte.dtype or not torch.equal(head, wte)):
        return tensors, False
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, True


def dataset_meta(config: dict[str, Any], data_dir: str | Path) -> Meta | None:
    """The meta of the dataset a run's configuration names, where that lies in data_dir and can be read."""
    try:  # the name comes out of a file: it must not be a path
        return read_meta(Path(data_dir) / check_name(str(config.get("dataset", ""))))
    except DataError:
        return None


def all_biases(weights: Weights) -> Weights:
    """The same model with biases in all layers: zeros, with moments of zero, where ours has none."""
    args = replace(weights.model_args, bias=True, norm_bias=False)

    def filled(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        named = ((prefix + name, shape) for name, shape in args.parameter_shapes().items())
        return {name: tensors[name] if name in tensors else torch.zeros(shape) for name, shape in named}

    moments = weights.optimizer and filled(weights.optimizer, "exp_avg.") | filled(weights.optimizer, "exp_avg_sq.")
    return replace(weights, model_args=args, model=filled(weights.model, ""), optimizer=moments)


def with_biases(weights: Weights) -> dict[str, Tensor]:
    """The model for formats that always have biases, its vocabulary cut to the used one."""
    used = weights.used_vocab
    return {n: t[:used] if n in _VOCABULARY else t for n, t in all_biases(weights).model.items()}


def require_tied_head(weights: Weights, path: Path) -> None:
    """CheckpointError where the head is a weight of its own, for which nanoGPT's and llm.c's files have no place."""
    if not weights.model_args.tie_word_embeddings:
        raise CheckpointError(
            "nanoGPT's and llm.c's models have no head of their own, as this one has",
            where=str(path),
            expected="a head tied to the token embedding",
            hint="--to=hf or --to=native keeps both weights",
        )


def dense(key: str, value: Any, where: str) -> Tensor:
    """value, if it is an ordinary tensor: out of a pickle come sparse ones unvalidated, and ones of a few bytes that
    repeat them a million times. Raises CheckpointError."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        found = f"{value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise CheckpointError(
            "only dense tensors can be read", where=f"{where}: {key}", expected="a dense tensor", found=found
        )
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(
            "a tensor is larger than what is stored of it",
            where=f"{where}: {key}",
            expected=f"{value.numel() * value.element_size():,} bytes for {tuple(value.shape)}",
            found=f"{value.untyped_storage().nbytes():,} bytes",
        )
    return value.detach()


def checked(weights: Weights, where: str) -> Weights:
    """The same as float32, contiguous, in parameter_shapes() order, each tensor with a storage of its own.

    Raises CheckpointError: names missing or foreign, another shape, no floating type, NaN or infinity.
    """
    try:  # names and shapes first: a file of thousands of names for one tensor is not copied thousands of times
        loaded = Checkpoint(weights.step, asdict(weights.model_args), weights.model, weights.optimizer or {})
        check_shapes(loaded, weights.model_args)
        loaded.model = {name: _float32(tensor) for name, tensor in loaded.model.items()}
        loaded.optimizer = {name: _float32(tensor) for name, tensor in loaded.optimizer.items()}
        loaded = check_model(loaded, weights.model_args)
    except CheckpointError as error:
        at = f"{where}: {error.where}" if error.where else where
        raise error.at(at) from error
    return replace(weights, model=loaded.model, optimizer=loaded.optimizer or None)


def _float32(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        tensor = tensor.float().contiguous()
    # A view (nanoGPT's cropped wpe is one) would be saved with all of the storage behind it.
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def check_model(checkpoint: Checkpoint, config: GPTConfig) -> Checkpoint:
    """The checkpoint with its tensors in the order of `config`'s parameters, fit for a model of `config`.

    Raises CheckpointError for missing or unexpected names, shapes other than the config's, anything but float32,
    and NaN or infinity, in the weights and in the optimizer's moments.
    """
    check_shapes(checkpoint, config)
    names = list(config.parameter_shapes())
    moments = [f"{m}.{name}" for m in ("exp_avg", "exp_avg_sq") for name in names] if checkpoint.optimizer else []
    model = {name: _finite(name, checkpoint.model[name], "") for name in names}
    optimizer = {name: _finite(name, checkpoint.optimizer[name], "optimizer ") for name in moments}
    return replace(checkpoint, model=model, optimizer=optimizer)


def check_shapes(checkpoint: Checkpoint, config: GPTConfig) -> None:
    """Raise CheckpointError for missing or unexpected names, and shapes other than the config's."""
    shapes = config.parameter_shapes()
    differing = ", ".join(
        f"{key}: checkpoint {checkpoint.model_args[key]!r}, run {value!r}"
        for key, value in asdict(config).items()
        if key in checkpoint.model_args and checkpoint.model_args[key] != value
    )
    hint = f"the configurations differ in {differing}" if differing else ""
    _check_names(checkpoint.model, "", shapes, hint)
    if checkpoint.optimizer:
        moments = {f"{m}.{name}": shape for m in ("exp_avg", "exp_avg_sq") for name, shape in shapes.items()}
        _check_names(checkpoint.optimizer, "optimizer ", moments, hint)


def _check_names(tensors: dict[str, Tensor], kind: str, shapes: dict[str, tuple[int, ...]], hint: str) -> None:
    missing, unexpected = [n for n in shapes if n not in tensors], [n for n in tensors if n not in shapes]
    if missing or unexpected:
        raise CheckpointError(
            f"the checkpoint's {kind}tensors are not the model's",
            expected=_some(missing, lambda name: f"{name} (missing{did_you_mean(name, unexpected[:1000])})"),
            found=_some(unexpected, lambda name: f"{name[:200]} (unexpected)"),
            hint=hint,
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"a {kind}tensor of the checkpoint has another shape than the model's",
                where=name,
                expected=str(shape),
                found=str(tuple(tensors[name].shape)),
                hint=hint,
            )


def _finite(name: str, tensor: Tensor, kind: str) -> Tensor:
    """The tensor, if it is float32 and each of its numbers finite."""
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
    return tensor


def _some(names: list[str], told: Callable[[str], str], limit: int = 5) -> str:
    return ", ".join(map(told, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")
