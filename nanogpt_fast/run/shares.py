"""A checkpoint of ranks that hold shares of the state: each writes its own file, rank 0 publishes when all are durable.

    share_0000.safetensors   tensors `model.NAME@START`, `exp_avg.NAME@START`, `exp_avg_sq.NAME@START`: flat float32
                             runs of parameter NAME from its element START on
    share_0000.json          while it is being collected: the file's size and hash, or why there is none

They meet in the directory that rank 0 will rename, on a file system that all see; nothing is sent. Whoever reads puts
the runs together, whatever number of ranks wrote them.
"""

import json
import math
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.files import load_json, sync, write_atomic
from nanogpt_fast.run.encoding import encode
from nanogpt_fast.run.manifest import write_file

KINDS = ("model", "exp_avg", "exp_avg_sq")
MOST = 65_536  # ranks
_KEY = re.compile(r"(model|exp_avg|exp_avg_sq)\.(.+)@(\d{1,18})")


def file_of(rank: int) -> str:
    return f"share_{rank:04d}.safetensors"


def files_of(count: Any) -> list[str]:
    """The files of a manifest's `shares`; none where it has none. ValueError for what is no number of ranks."""
    if count is None:
        return []
    if type(count) is not int or not 1 <= count <= MOST:
        raise ValueError(f"shares is {count!r}")
    return [file_of(rank) for rank in range(count)]


def write_share(folder: Path, rank: int, tensors: dict[str, Tensor]) -> None:
    """This rank's file in `folder`, which is made where it is not there; then, durably, the note that it is there.
    Raises OSError, of which the note tells where it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        note = write_file(folder / file_of(rank), encode(tensors))
        sync(folder)
    except OSError as error:
        note = {"error": error.strerror or str(error)}
        write_atomic(_note(folder, rank), json.dumps(note).encode())
        raise
    write_atomic(_note(folder, rank), json.dumps(note).encode())


def collect(folder: Path, ranks: int, patience: float) -> dict[str, dict[str, Any]]:
    """{file: its manifest entry} of all ranks, once they are durable; their notes are removed. TimeoutError after so
    many seconds, OSError where a rank could not write, both naming it."""
    entries: dict[str, dict[str, Any]] = {}
    until = time.monotonic() + patience
    for rank in range(ranks):
        while not (note := _note(folder, rank)).exists():
            if time.monotonic() > until:
                raise TimeoutError(f"rank {rank} of {ranks} has not written its share within {patience:.0f} s")
            time.sleep(0.02)
        found = load_json(note)
        if "error" in found:
            raise OSError(f"rank {rank} of {ranks}: {found['error']}")
        entries[file_of(rank)] = found
    for rank in range(ranks):
        _note(folder, rank).unlink()
    return entries


def assemble(paths: Iterable[Path], shapes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(model, optimizer) of the shares in these files, whose hashes were right. shapes: state.json's, by parameter.
    CheckpointError unless every element is there once."""
    paths = list(paths)
    where = str(paths[0].parent)
    if not isinstance(shapes, dict) or not all(map(_is_shape, shapes.values())):
        raise CheckpointError("state.json is damaged at shapes", where=where, expected="{parameter: its shape}")
    runs: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
    for path in paths:
        for key, tensor in load_file(path).items():
            match = _KEY.fullmatch(key)
            if not match or tensor.dtype != torch.float32 or tensor.dim() != 1:
                raise CheckpointError("a share holds what is none", where=f"{path}: {key}", expected="KIND.NAME@START")
            runs.setdefault((match[1], match[2]), []).append((int(match[3]), tensor))
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for name, shape in shapes.items():
            parts = sorted(runs.pop((kind, name), []), key=lambda run: run[0])
            ends = [start + len(part) for start, part in parts]
            if [start for start, _ in parts] != [0, *ends[:-1]] or not ends or ends[-1] != math.prod(shape):
                raise CheckpointError(
                    "the shares do not make up a parameter",
                    where=f"{where}: {kind}.{name}",
                    expected=f"{math.prod(shape):,} elements, each once",
                    found=f"{len(parts)} runs of {sum(len(part) for _, part in parts):,}",
                )
            found[kind][name] = torch.cat([part for _, part in parts]).view(shape)
    if runs:
        kind, name = next(iter(runs))
        raise CheckpointError("the shares hold a parameter that the state has not", where=f"{where}: {kind}.{name}")
    moments = {f"{kind}.{name}": t for kind in KINDS[1:] for name, t in found[kind].items()}
    return found["model"], moments


def _note(folder: Path, rank: int) -> Path:
    return (folder / file_of(rank)).with_suffix(".json")


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 < n < 2**40 for n in value) and len(value) < 8
