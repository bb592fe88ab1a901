"""Hugging Face GPT-2 folders, in and out, and OpenAI's sizes from the hub by name.

Their four Linear layers a block are Conv1D, stored (in, out): transposed both ways. attn.c_proj is square, so a
transpose forgotten there loads without complaint; the tests compare logits.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanogpt_fast.data.dataset import FORMAT as META_FORMAT
from nanogpt_fast.data.tokenizer import EOT, Gpt2Tokenizer, find_vocab_bpe, gpt2_bytes
from nanogpt_fast.errors import CheckpointError, DataError
from nanogpt_fast.weights.canonical import Weights, checked, load_pickle, model_config, plain_names, with_biases
from nanogpt_fast.weights.model_card import model_card

HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
HUB_FILES = ("config.json", "model.safetensors")
HUB_TIMEOUT_S = 5

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

ACTIVATIONS = {  # theirs: ours; the tanh forms differ in how they are computed, not in what
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}

# Options of theirs that change the computation, with the one value that ours has.
FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def read(folder: Path) -> Weights:
    """The weights in a folder of config.json and model.safetensors (or shards of it, or pytorch_model.bin).

    dropout is 0: theirs (0.1) was OpenAI's pretraining, ours is the run's to choose. Raises CheckpointError.
    """
    where = str(folder)
    found = _json(folder / "config.json")
    for option, value in {"model_type": "gpt2", **FIXED}.items():
        if found.get(option, value) != value:
            raise CheckpointError(
                f"{option} = {found[option]!r} makes another model than GPT-2 as computed here",
                where=f"{where}/config.json",
                expected=f"{option} = {value!r}",
                found=repr(found[option]),
            )
    activation = found.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            "the activation is not a GELU known here",
            where=f"{where}/config.json: activation_function",
            expected=", ".join(ACTIVATIONS),
            found=repr(activation),
        )
    config = model_config(
        where,
        n_layer=found.get("n_layer"),
        n_head=found.get("n_head"),
        n_embd=found.get("n_embd"),
        block_size=found.get("n_positions", found.get("n_ctx")),
        vocab_size=found.get("vocab_size"),
        bias=True,
        activation=ACTIVATIONS[activation],
    )
    if found.get("n_inner") not in (None, 4 * config.n_embd):
        raise CheckpointError(
            "n_inner makes another MLP than GPT-2's",
            where=f"{where}/config.json",
            expected=f"n_inner null or 4 * n_embd = {4 * config.n_embd}",
            found=str(found["n_inner"]),
        )
    tensors = plain_names(_read_tensors(folder), where)
    tensors = {n: t.t() if n.endswith(TRANSPOSED) and t.dim() == 2 else t for n, t in tensors.items()}
    return checked(Weights(model_args=config, model=tensors), where)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's weight files, safetensors before torch's own."""
    for name, load in (("model.safetensors", _load_safetensors), ("pytorch_model.bin", load_pickle)):
        if (folder / name).exists():
            return _require_dict(load(folder / name), folder / name)
        if (folder / f"{name}.index.json").exists():
            return _read_shards(folder, f"{name}.index.json", load)
    raise CheckpointError(
        "the folder holds no weights",
        where=str(folder),
        expected="model.safetensors or pytorch_model.bin, or either's .index.json with its shards",
        found=", ".join(sorted(p.name for p in folder.iterdir()))[:200] or "nothing",
    )


def _read_shards(folder: Path, index: str, load: Callable[[Path], Any]) -> dict[str, Tensor]:
    shards = _json(folder / index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise CheckpointError(
            "the index maps no tensors to files", where=str(folder / index), expected='"weight_map": {tensor: file}'
        )
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        if Path(name).name != name:  # a crafted index must not lead out of its folder
            raise CheckpointError("the index names a file outside its folder", where=str(folder / index), found=name)
        if not (folder / name).is_file():
            raise CheckpointError(
                "a file the index names is missing", where=str(folder / name), hint="copy every shard into the folder"
            )
        tensors |= _require_dict(load(folder / name), folder / name)
    return tensors


def _require_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(loaded, dict):
        raise CheckpointError(
            "the file holds no tensors by name", where=str(path), expected="a state_dict", found=type(loaded).__name__
        )
    return loaded


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError("the file is damaged or cut off", where=str(path), found=str(error)) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError("cannot be read as JSON", where=str(path), found=str(error)) from error
    if not isinstance(found, dict):
        raise CheckpointError("holds no JSON object", where=str(path), found=type(found).__name__)
    return found


def write(weights: Weights, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """A folder that transformers' from_pretrained loads: weights, configuration, tokenizer, model card.

    Rows past the tokenizer's vocabulary are cut (transformers refuses a padded table); biases the model lacks are
    written as zeros (transformers would warn that it made them up).
    """
    folder.mkdir()
    tensors = {}
    for name, tensor in with_biases(weights).items():
        stored = (tensor.t() if name.endswith(TRANSPOSED) else tensor).to(dtype).contiguous()
        if not stored.isfinite().all():  # float16 ends at 65504
            largest = f"{tensor.abs().max():.4g}"
            raise CheckpointError(
                "a weight is too large for this dtype",
                where=name,
                found=f"{largest} as {dtype}",
                hint="--dtype=bfloat16",
            )
        tensors[name] = stored
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves 0600: nobody else could load it

    config = _their_config(weights, dtype)
    _write_json(folder / "config.json", config)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    _write_json(folder / "generation_config.json", special)
    (folder / "README.md").write_text(model_card(weights, _write_tokenizer(weights, folder)), encoding="utf-8")


def _their_config(weights: Weights, dtype: torch.dtype) -> dict[str, Any]:
    c = weights.model_args
    end_of_text = Gpt2Tokenizer.eot if weights.is_gpt2_vocab else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": weights.used_vocab,
        "n_positions": c.block_size,
        "n_ctx": c.block_size,  # read by converters to other formats
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_inner": None,
        "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[c.activation],
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
        "initializer_range": 0.02,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": str(dtype).removeprefix("torch."),
        **FIXED,
    }


def _write_tokenizer(weights: Weights, folder: Path) -> bool:
    """Whether transformers finds a tokenizer in the folder: GPT-2's, where vocab.bpe can be had.

    For characters it has none that fits; the vocabulary goes into meta.json.
    """
    if not weights.is_gpt2_vocab:
        if weights.tokenizer:
            meta = {
                "format": META_FORMAT,
                "tokenizer": weights.tokenizer,
                "vocab_size": weights.used_vocab,
                "splits": {},
            }
            _write_json(folder / "meta.json", meta)
        return False
    try:
        merges = find_vocab_bpe().read_text(encoding="utf-8")
    except DataError:
        return False  # the weights are good without it; convert says what is missing
    tokens = [*gpt2_bytes(), *(line.replace(" ", "") for line in merges.split("\n")[1:-1]), EOT]
    _write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT)
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": weights.model_args.block_size,
        "add_prefix_space": False,
    }
    _write_json(folder / "tokenizer_config.json", {**settings, **special})
    return True


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_pretrained(name: str | Path) -> Weights:
    """The weights of a hub name (gpt2 ... gpt2-xl, with openai-community/ or without) or of a folder.

    Only config.json and model.safetensors are fetched, and kept in the hub's cache: the next time needs no network.
    Raises CheckpointError.
    """
    repository = HUB.get(str(name).removeprefix("openai-community/"))
    return read(_fetch(repository) if repository else Path(name))


def _fetch(repository: str) -> Path:
    """The folder in the hub's cache that holds the repository's two files, fetched when it does not."""
    by_hand = f"put {' and '.join(HUB_FILES)} of {repository} in a folder, then --init_from=FOLDER"
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise CheckpointError(
            "huggingface_hub is not installed", where=repository, hint=f'pip install "nanogpt-fast[data]", or {by_hand}'
        ) from error
    try:
        return [Path(hub.hf_hub_download(repository, name, local_files_only=True)).parent for name in HUB_FILES][0]
    except FileNotFoundError:
        pass  # not in the cache yet
    try:
        # One request that gives up at once: without it hf_hub_download retries for 23 s before it fails (measured).
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, HUB_FILES[0]), timeout=HUB_TIMEOUT_S)
        return [Path(hub.hf_hub_download(repository, name, etag_timeout=HUB_TIMEOUT_S)).parent for name in HUB_FILES][0]
    except Exception as error:  # the hub's errors are httpx's, requests' or its own, by version
        raise CheckpointError(
            "the weights cannot be fetched from the Hugging Face hub",
            where=f"{repository}: {', '.join(HUB_FILES)}",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            hint=f"connect to the network, or {by_hand}",
        ) from error
