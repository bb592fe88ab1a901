"""Hugging Face GPT-2 folders, in and out, and OpenAI's sizes from the hub by name.

Their four Linear layers a block are Conv1D, stored (in, out): transposed both ways. attn.c_proj is square, so a
transpose forgotten there loads without complaint; the tests compare logits.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt_fast.data.tokenizer import Gpt2Tokenizer
from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.weights import hf_tokenizer
from nanogpt_fast.weights.canonical import (
    Weights,
    checked,
    model_config,
    plain_names,
    shown,
    with_biases,
    without_tied_head,
)
from nanogpt_fast.weights.model_card import model_card
from nanogpt_fast.weights.sources import file_bytes, load_pickle, load_safetensors, read_object

HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
HUB_FILES = ("config.json", "model.safetensors")
HUB_TIMEOUT_S = 5

SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PIECE = 16 << 20  # bytes written at once: a signal is heard between two

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
}


def read(folder: Path) -> Weights:
    """The weights in a folder of config.json and model.safetensors (or shards of it, or pytorch_model.bin).

    dropout is 0: theirs (0.1) was OpenAI's pretraining, ours is the run's to choose. Raises CheckpointError.
    """
    where, files = str(folder), _weight_files(folder)
    found = read_object(folder / "config.json")
    for option, value in {"model_type": "gpt2", **FIXED}.items():
        if found.get(option, value) != value:
            raise CheckpointError(
                f"{option} = {shown(found[option])} makes another model than GPT-2 as computed here",
                where=f"{where}/config.json",
                expected=f"{option} = {value!r}",
                found=shown(found[option]),
            )
    activation = found.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise CheckpointError(
            "the activation is not a GELU known here",
            where=f"{where}/config.json: activation_function",
            expected=", ".join(ACTIVATIONS),
            found=shown(activation),
        )
    tensors, tied = plain_names(_read_tensors(files), where), found.get("tie_word_embeddings", True)
    if tied is True:  # a head that is stored all the same repeats the embedding
        tensors, is_tied = without_tied_head(tensors)
        if not is_tied:
            raise CheckpointError(
                "the output head is not the token embedding",
                where=f"{where}: lm_head.weight",
                expected="the same as wte.weight, as config.json's tie_word_embeddings has it",
                found="two different tensors",
                hint="tie_word_embeddings = false in config.json, if the head is meant to be a weight of its own",
            )
    config = model_config(
        where,
        min(sum(map(file_bytes, files)), sum(t.numel() * t.element_size() for t in tensors.values())),
        n_layer=found.get("n_layer"),
        n_head=found.get("n_head"),
        n_embd=found.get("n_embd"),
        block_size=found.get("n_positions", found.get("n_ctx")),
        vocab_size=found.get("vocab_size"),
        bias=True,
        tie_word_embeddings=tied,
        activation=ACTIVATIONS[activation],
    )
    if found.get("n_inner") not in (None, 4 * config.n_embd):
        raise CheckpointError(
            "n_inner makes another MLP than GPT-2's",
            where=f"{where}/config.json",
            expected=f"n_inner null or 4 * n_embd = {4 * config.n_embd}",
            found=shown(found["n_inner"]),
        )
    tensors = {n: t.t() if n.endswith(TRANSPOSED) and t.dim() == 2 else t for n, t in tensors.items()}
    special = hf_tokenizer.special_ids(found)
    weights = Weights(
        model_args=config,
        model=tensors,
        tokenizer=hf_tokenizer.read(folder, config.vocab_size),
        state={"special_ids": special} if special else {},
    )
    return checked(weights, where)


def _weight_files(folder: Path) -> dict[Path, Callable[[Path], Any]]:
    """{file: its reader} of the folder's weights, safetensors before torch's own."""
    for name, load in (("model.safetensors", load_safetensors), ("pytorch_model.bin", load_pickle)):
        if os.path.lexists(folder / name):
            return {folder / name: load}
        if os.path.lexists(folder / f"{name}.index.json"):
            return dict.fromkeys(_shards(folder / f"{name}.index.json"), load)
    raise CheckpointError(
        "the folder holds no weights",
        where=str(folder),
        expected="model.safetensors or pytorch_model.bin, or either's .index.json with its shards",
        found=", ".join(sorted(p.name for p in folder.iterdir()))[:200] or "nothing",
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
        raise CheckpointError(
            "the index maps no tensors to files", where=str(index), expected='"weight_map": {tensor: file}'
        )
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name:  # a crafted index must not lead out of its folder
            raise CheckpointError("the index names a file outside its folder", where=str(index), found=name[:200])
        try:
            file_bytes(index.parent / name)
        except CheckpointError as error:
            raise CheckpointError(
                "a file the index names is missing",
                where=error.where,
                found=error.found,
                hint="copy every shard into the folder",
            ) from error
    return [index.parent / name for name in names]


def _read_tensors(files: dict[Path, Callable[[Path], Any]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, load in files.items():
        loaded = load(path)
        if not isinstance(loaded, dict):
            raise CheckpointError(
                "the file holds no tensors by name",
                where=str(path),
                expected="a state_dict",
                found=type(loaded).__name__,
            )
        tensors |= loaded
    return tensors


def write(weights: Weights, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """A folder that transformers' from_pretrained loads: weights, configuration, tokenizer, model card.

    Rows past the tokenizer's vocabulary are cut (transformers refuses a padded table); biases the model lacks are
    written as zeros (transformers would warn that it made them up).
    """
    folder.mkdir()
    shapes = {name: _stored(name, tensor).shape for name, tensor in with_biases(weights).items()}
    with (folder / "model.safetensors").open("wb") as file:
        for chunk in _safetensors(weights, shapes, dtype):
            file.write(chunk)
    config = _their_config(weights, dtype)
    hf_tokenizer.write_hf_json(folder / "config.json", config)
    special = {key: config[key] for key in hf_tokenizer.SPECIAL_IDS if key in config}
    hf_tokenizer.write_hf_json(folder / "generation_config.json", special)
    (folder / "README.md").write_text(model_card(weights, hf_tokenizer.write(weights, folder)), encoding="utf-8")


def _stored(name: str, tensor: Tensor) -> Tensor:
    return tensor.t() if name.endswith(TRANSPOSED) else tensor


def _safetensors(weights: Weights, shapes: dict[str, torch.Size], dtype: torch.dtype) -> Iterator[bytes | memoryview]:
    """The file, a piece at a time: save_file would hold every tensor in both dtypes, and hear no Ctrl-C."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begins 8-byte aligned
    yield len(text).to_bytes(8, "little")
    yield text
    for name, tensor in with_biases(weights).items():
        stored = _stored(name, tensor).to(dtype).contiguous()
        if not stored.isfinite().all():  # float16 ends at 65504
            raise CheckpointError(
                "a weight is too large for this dtype",
                where=name,
                found=f"{tensor.abs().max():.4g} as {dtype}",
                hint="--dtype=bfloat16",
            )
        data = stored.view(torch.uint8).numpy().reshape(-1).data
        yield from (data[at : at + PIECE] for at in range(0, len(data), PIECE))


def _their_config(weights: Weights, dtype: torch.dtype) -> dict[str, Any]:
    c = weights.model_args
    end_of_text = Gpt2Tokenizer.eot if weights.is_gpt2_vocab else None
    special = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
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
        **special,
        **hf_tokenizer.special_ids(weights.state.get("special_ids") or {}),
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": c.tie_word_embeddings,
        **FIXED,
    }


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
        print(f"fetching {' and '.join(HUB_FILES)} of {repository}", file=sys.stderr, flush=True)
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, HUB_FILES[0]), timeout=HUB_TIMEOUT_S)
        return [Path(hub.hf_hub_download(repository, name, etag_timeout=HUB_TIMEOUT_S)).parent for name in HUB_FILES][0]
    except Exception as error:  # the hub's errors are httpx's, requests' or its own, by version
        raise CheckpointError(
            "the weights cannot be fetched from the Hugging Face hub",
            where=f"{repository}: {', '.join(HUB_FILES)}",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            hint=f"connect to the network, or {by_hand}",
        ) from error
