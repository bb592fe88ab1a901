"""Other people's weights, and our own checkpoints, by one door: what is this path, read it, write it.

native    our out_dir, or one step folder of it       hf     a Hugging Face GPT-2 folder, or gpt2 ... gpt2-xl
nanogpt   nanoGPT's ckpt.pt, or the out_dir around it  llmc   llm.c's model file
"""

import logging
import math
import os
import struct
import sys
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Literal

import torch

from nanogpt_fast.data.token_format import LLMC_LAYOUTS
from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.run import checkpoint
from nanogpt_fast.run.checkpoint import Checkpoint
from nanogpt_fast.run.rundir import RunLock
from nanogpt_fast.settings.config import GPTConfig
from nanogpt_fast.weights import huggingface, llmc, nanogpt_ckpt
from nanogpt_fast.weights.canonical import Weights, check_model, checked, model_config, plain_config, require_tied_head
from nanogpt_fast.weights.destination import foreign_in, lock_of, written_beside
from nanogpt_fast.weights.huggingface import HUB, load_pretrained
from nanogpt_fast.weights.sources import file_bytes

__all__ = ["FORMATS", "Format", "Weights", "load_pretrained", "read", "read_native", "sniff", "write"]

log = logging.getLogger(__name__)
Format = Literal["native", "nanogpt", "hf", "llmc"]
FORMATS: dict[Format, str] = {
    "native": "nanogpt_fast checkpoint",
    "nanogpt": "nanoGPT checkpoint",
    "hf": "Hugging Face GPT-2 folder",
    "llmc": "llm.c model file",
}


def sniff(path: str | Path) -> Format:
    """The format at path, from its contents; hub names are "hf". Raises CheckpointError for anything else."""
    path, hint = Path(path), ""
    if str(path).removeprefix("openai-community/") in HUB:
        return "hf"
    if path.is_dir():
        if checkpoint.readable_steps(path) or (path / checkpoint.STATE).is_file():
            return "native"
        if (path / "config.json").is_file():
            return "hf"
        if (path / "ckpt.pt").is_file():
            return "nanogpt"
        if (path / "checkpoints").is_dir():  # of a run that has saved nothing yet: whoever reads it says so
            return "native"
        odd = [name for name in ("config.json", "ckpt.pt", checkpoint.STATE) if (path / name).exists()]
        found = f"{odd[0]}, which is no regular file" if odd else "a folder without any of these"
    elif os.path.lexists(path):
        if file_bytes(path) >= 4:
            head = path.open("rb").read(4)
            magic = struct.unpack("<i", head)[0]
            if magic == llmc.MAGIC:
                return "llmc"
            if head[:2] in (b"PK", b"\x80\x02"):  # torch.save's zip, and its form before torch 1.6
                return "nanogpt"
        else:
            head, magic = b"", 0
        found = f"a file that begins with {head!r}"
        if magic in LLMC_LAYOUTS:
            found = "an llm.c token file: data, not a model"
        elif path.suffix in (".safetensors", ".json"):
            found, hint = f"one file of a folder: {path.name}", f"give the folder: {path.parent}"
    else:
        found = "nothing there"
    raise CheckpointError(
        "no weights in a known form",
        where=str(path),
        expected="an out_dir or step folder of ours, a nanoGPT ckpt.pt, a folder with config.json and "
        f"model.safetensors, an llm.c model file, or one of {', '.join(HUB)}",
        found=found,
        hint=hint,
    )


def read(path: str | Path, optimizer: bool = True) -> Weights:
    """The weights at path, whatever their format (see sniff), with optimizer its state too, where there is one, which
    else is not looked at. Raises CheckpointError."""
    kind, path = sniff(path), Path(path)
    if kind == "native":
        weights, path = read_native(path, optimizer)
        return checked(weights, str(path))  # formats to write need tensors with storages of their own
    if kind == "nanogpt":
        return nanogpt_ckpt.read(path / "ckpt.pt" if path.is_dir() else path, optimizer)
    return load_pretrained(path) if kind == "hf" else llmc.read(path)


def write(weights: Weights, dst: Path, to: Format, *, dtype: torch.dtype = torch.float32, force: bool = False) -> Path:
    """Write dst whole or not at all; returns what was written (in an out_dir, the file or folder inside it).

    dtype: for hf float32, bfloat16 or float16, for llmc float32 or bfloat16, else float32. force: replace what is
    at dst, if that is of the same format, and in a folder nothing but an export of ours. Raises CheckpointError.
    """
    if to == "native":
        return _write_native(weights, dst, force)
    if to in ("nanogpt", "llmc"):
        require_tied_head(weights, dst)
    if to == "nanogpt" and dst.suffix != ".pt":
        dst = dst / "ckpt.pt"
    if force and os.path.lexists(dst) and (blocker := _irreplaceable(dst, to)):
        raise CheckpointError(
            f"the destination is no {FORMATS[to]} of ours; --force replaces nothing else",
            where=str(dst),
            found=blocker,
            hint="choose another name, or move it away yourself",
        )
    tensors = (
        [*weights.model.values(), *(weights.optimizer or {}).values()] if to == "nanogpt" else [*weights.model.values()]
    )
    size = sum(t.numel() for t in tensors) * dtype.itemsize
    lock = lock_of(dst.parent) if dst.name == "ckpt.pt" else nullcontext()  # a resume reads no other form
    with lock, written_beside(dst, force, size) as new:
        if to == "nanogpt":
            nanogpt_ckpt.write(weights, new)
        elif to == "hf":
            huggingface.write(weights, new, dtype)
        else:
            llmc.write(weights, new, dtype)
    return dst


def _irreplaceable(dst: Path, to: Format) -> str:
    """What at dst --force may not replace, or "": a file of another form, anything that no export of ours wrote."""
    if dst.is_dir():
        return (foreign_in(dst) if to == "hf" else "a folder") if any(dst.iterdir()) else ""
    try:
        found = sniff(dst)
        if found == "nanogpt":
            nanogpt_ckpt.load(dst)  # any file of torch's, or any zip, begins alike
    except CheckpointError as error:
        return error.what if error.found == "" else error.found
    return "" if found == to else f"a {FORMATS[found]}"


def read_native(path: Path, optimizer: bool = True) -> tuple[Weights, Path]:
    """(weights, step folder) of a run or one step of it, with a warning for each newer one that does not verify.

    Tensors are mapped from the file; the optimizer's are looked at when asked for. Raises CheckpointError, also where
    the tensors do not fit the configuration.
    """
    if (path / checkpoint.STATE).is_file():
        found = checkpoint.load(path)
    else:
        found, path, skipped = checkpoint.newest(path)
        for line in skipped:
            log.warning(line)
    known = {f.name for f in fields(GPTConfig)}
    args = {key: value for key, value in found.model_args.items() if key in known}
    config = model_config(str(path), checkpoint.bytes_of(path), **args)
    found = check_model(found if optimizer else replace(found, optimizer={}), config)
    state, best = found.state, found.state.get("best_val_loss", math.inf)
    weights = Weights(
        model_args=config,
        model=found.model,
        optimizer=found.optimizer or None,
        optimizer_step=state.get("optimizer_step", found.step),
        step=found.step,
        best_val_loss=best if math.isfinite(best) else math.inf,
        config=plain_config(state.get("config")),
        tokenizer=state.get("tokenizer"),
        state=state,
    )
    return weights, path


def _write_native(weights: Weights, out_dir: Path, force: bool) -> Path:
    state = {**weights.state, "config": weights.config, "optimizer_step": weights.optimizer_step}
    if math.isfinite(weights.best_val_loss):
        state["best_val_loss"] = weights.best_val_loss
    if weights.tokenizer:
        state["tokenizer"] = weights.tokenizer
    new = Checkpoint(weights.step, asdict(weights.model_args), weights.model, weights.optimizer or {}, state)
    with RunLock(out_dir):
        if steps := checkpoint.list_steps(out_dir):
            if not force:
                raise CheckpointError(
                    "the destination holds checkpoints",
                    where=str(out_dir),
                    hint="choose another folder, or add --force",
                )
            if moved := checkpoint.set_aside_later(out_dir, weights.step - 1):
                log.warning(
                    "checkpoints from step %d on are now in %s", min(s for s in steps if s >= weights.step), moved
                )
        final = out_dir / "checkpoints" / f"step_{weights.step:08d}"
        if os.path.lexists(final):
            raise CheckpointError(
                "what lies there is no checkpoint", where=str(final), hint="move it away, or choose another folder"
            )
        return checkpoint.save(out_dir, new, keep_last=sys.maxsize)
