"""llm.c's model file: 256 int32 of header, then 16 tensors, each stacked over the layers.

    header: magic 20240326, version (3: float32, 5: bfloat16), maxT, V, L, H, C, Vp, zeros

Little-endian, Linear weights (out, in) as ours, so nothing is transposed. wte has Vp rows; llm.c's softmax
runs over the first V only. Every layer has biases, and GELU is the tanh form.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.weights.canonical import Weights, checked, model_config, with_biases
from nanogpt_fast.weights.sources import file_bytes

MAGIC = 20240326
DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by version
HEADER_BYTES = 256 * 4
VOCAB_MULTIPLE = 128  # llm.c pads the vocabulary to it

_BLOCK = tuple(
    f"{layer}.{kind}"
    for layer in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")
)


def _file_order(n_layer: int) -> list[str]:
    """Our parameter names in the file's order: each of a block's tensors for every layer before the next."""
    blocks = [f"transformer.h.{i}.{name}" for name in _BLOCK for i in range(n_layer)]
    return [
        "transformer.wte.weight",
        "transformer.wpe.weight",
        *blocks,
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    ]


def read(path: Path) -> Weights:
    """The weights in an llm.c model file, padding rows of wte cut off. Raises CheckpointError."""
    size = file_bytes(path)
    with path.open("rb") as file:
        header = np.fromfile(file, "<i4", 256)
        if header.size < 256 or header[0] != MAGIC:
            raise CheckpointError(
                "not an llm.c model file", where=str(path), expected=f"1024 bytes of header, magic {MAGIC}"
            )
        version, T, V, L, H, C, Vp = (int(n) for n in header[1:8])
        if version not in DTYPES:
            raise CheckpointError(
                "this version of llm.c's model file is not readable",
                where=str(path),
                expected="3 (float32) or 5 (bfloat16)",
                found=str(version),
            )
        config = model_config(
            str(path),
            size,
            block_size=T,
            vocab_size=V,
            n_layer=L,
            n_head=H,
            n_embd=C,
            bias=True,
            activation="gelu_tanh",
        )
        if Vp < V:
            raise CheckpointError(
                "the padded vocabulary is smaller than the vocabulary", where=str(path), found=f"V = {V}, Vp = {Vp}"
            )
        shapes = {**config.parameter_shapes(), "transformer.wte.weight": (Vp, C)}
        expected = HEADER_BYTES + sum(map(math.prod, shapes.values())) * DTYPES[version].itemsize
        if size != expected:
            raise CheckpointError(
                "the file does not have the size its header asks for",
                where=str(path),
                expected=f"{expected} bytes for V={V}, Vp={Vp}, T={T}, L={L}, H={H}, C={C}",
                found=f"{size} bytes",
            )
        tensors = {name: _read_tensor(file, shapes[name], DTYPES[version]) for name in _file_order(L)}
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:V]
    return checked(Weights(model_args=config, model=tensors), str(path))


def _read_tensor(file, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    stored = np.fromfile(file, "<f4" if dtype == torch.float32 else "<i2", math.prod(shape))
    return torch.from_numpy(stored).view(dtype).view(shape).float()


def write(weights: Weights, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """One model file of a tied head; biases a model lacks are zeros, rows past the tokenizer's vocabulary are zeros."""
    c, V, versions = weights.model_args, weights.used_vocab, {dtype: version for version, dtype in DTYPES.items()}
    if dtype not in versions:
        raise CheckpointError(
            "llm.c has no model file of this type", where=str(path), expected="float32 or bfloat16", found=str(dtype)
        )
    Vp = math.ceil(V / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    tensors, header = with_biases(weights), np.zeros(256, "<i4")
    header[:8] = MAGIC, versions[dtype], c.block_size, V, c.n_layer, c.n_head, c.n_embd, Vp
    with path.open("wb") as file:
        header.tofile(file)
        for name in _file_order(c.n_layer):
            tensor = tensors[name]
            if name == "transformer.wte.weight":
                tensor = torch.cat((tensor, tensor.new_zeros(Vp - V, c.n_embd)))
            stored = tensor.detach().to(dtype).contiguous()
            (stored.view(torch.int16) if dtype == torch.bfloat16 else stored).numpy().tofile(file)
