"""The safetensors format, written as it comes: save_file would need all tensors on the host at once."""

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def encode(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The file of these float32 tensors, one at a time; they may live on any device."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} is {tensor.dtype}: checkpoints hold float32 masters")
        end = start + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begins 8-byte aligned
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().numpy().astype("<f4", copy=False).reshape(-1).data
