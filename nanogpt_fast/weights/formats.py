"""Other people's weights, and our own checkpoints, by one door: what is this path, read it, write it.

native    our out_dir, or one step folder of it       hf     a Hugging Face GPT-2 folder, or gpt2 ... gpt2-xl
nanogpt   nanoGPT's ckpt.pt, or the out_dir around it  llmc   llm.c's model file
"""

import logging
import math
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from nanogpt_fast.data.token_format import LLMC_LAYOUTS
from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.files import sync
from nanogpt_fast.run import checkpoint
from nanogpt_fast.run.checkpoint import Checkpoint
from nanogpt_fast.settings.config import GPTConfig
from nanogpt_fast.weights import huggingface, llmc, nanogpt_ckpt
from nanogpt_fast.weights.canonical import Weights, check_model, checked, model_config
from nanogpt_fast.weights.huggingface import HUB, load_pretrained

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
    path, found = Path(path), "a folder without any of these"
    if str(path).removeprefix("openai-community/") in HUB:
        return "hf"
    if path.is_dir():
        if (path / "checkpoints").is_dir() or (path / checkpoint.STATE).is_file():
            return "native"
        if (path / "config.json").is_file():
            return "hf"
        if (path / "ckpt.pt").is_file():
            return "nanogpt"
    elif path.is_file():
        head = path.open("rb").read(4)
        magic = struct.unpack("<i", head)[0] if len(head) == 4 else 0
        if magic == llmc.MAGIC:
            return "llmc"
        if head[:2] in (b"PK", b"\x80\x02"):  # torch.save's zip, and its form before torch 1.6
            return "nanogpt"
        found = (
            "an llm.c token file: data, not a model" if magic in LLMC_LAYOUTS else f"a file that begins with {head!r}"
        )
    else:
        found = "nothing there"
    raise CheckpointError(
        "no weights in a known form",
        where=str(path),
        expected="an out_dir or step folder of ours, a nanoGPT ckpt.pt, a folder with config.json and "
        f"model.safetensors, an llm.c model file, or one of {', '.join(HUB)}",
        found=found,
    )


def read(path: str | Path) -> Weights:
    """The weights at path, whatever their format; see sniff. Raises CheckpointError."""
    kind, path = sniff(path), Path(path)
    if kind == "native":
        weights, path = read_native(path)
        return checked(weights, str(path))  # formats to write need tensors with storages of their own
    if kind == "nanogpt":
        return nanogpt_ckpt.read(path / "ckpt.pt" if path.is_dir() else path)
    return load_pretrained(path) if kind == "hf" else llmc.read(path)


def write(weights: Weights, dst: Path, to: Format, *, dtype: torch.dtype = torch.float32, force: bool = False) -> Path:
    """Write dst whole or not at all; returns what was written (in an out_dir, the file or folder inside it).

    dtype: for hf float32, bfloat16 or float16, for llmc float32 or bfloat16, else float32. force: replace what is
    at dst, if that is of the same format. Raises CheckpointError.
    """
    if to == "native":
        return _write_native(weights, dst, force)
    if to == "nanogpt" and dst.suffix != ".pt":
        dst = dst / "ckpt.pt"
    if force and dst.exists() and not _replaceable(dst, to):
        raise CheckpointError(
            f"the destination is no {FORMATS[to]}; --force replaces nothing else",
            where=str(dst),
            hint="choose another name, or remove it yourself",
        )
    with written_beside(dst, force) as new:
        if to == "nanogpt":
            nanogpt_ckpt.write(weights, new)
        elif to == "hf":
            huggingface.write(weights, new, dtype)
        else:
            llmc.write(weights, new, dtype)
    return dst


def _replaceable(dst: Path, to: Format) -> bool:
    if dst.is_dir() and not any(dst.iterdir()):
        return True
    try:
        return sniff(dst) == to
    except CheckpointError:
        return False


def read_native(path: Path) -> tuple[Weights, Path]:
    """(weights, step folder) of a run or one step of it, with a warning for each newer one that does not verify.

    Tensors are mapped from the file. Raises CheckpointError, also where the tensors do not fit the configuration.
    """
    if (path / checkpoint.STATE).is_file():
        found = checkpoint.load(path)
    else:
        found, path, skipped = checkpoint.newest(path)
        for line in skipped:
            log.warning(line)
    known = {f.name for f in fields(GPTConfig)}
    config = model_config(str(path), **{key: value for key, value in found.model_args.items() if key in known})
    found, state = check_model(found, config), found.state
    best, run, tokenizer = (state.get(key) for key in ("best_val_loss", "config", "tokenizer"))
    weights = Weights(
        model_args=config,
        model=found.model,
        optimizer=found.optimizer or None,
        optimizer_step=state.get("optimizer_step", found.step),
        step=found.step,
        best_val_loss=math.inf if best is None else best,  # null until a first evaluation
        config=run if isinstance(run, dict) else {},
        tokenizer=tokenizer if isinstance(tokenizer, dict) else None,
        state=state,
    )
    return weights, path


def _write_native(weights: Weights, out_dir: Path, force: bool) -> Path:
    if checkpoint.list_steps(out_dir):
        if not force:
            raise CheckpointError(
                "the destination holds checkpoints", where=str(out_dir), hint="choose another folder, or add --force"
            )
        checkpoint.set_aside_later(out_dir, weights.step)
    state = {**weights.state, "config": weights.config, "optimizer_step": weights.optimizer_step}
    if math.isfinite(weights.best_val_loss):
        state["best_val_loss"] = weights.best_val_loss
    if weights.tokenizer:
        state["tokenizer"] = weights.tokenizer
    new = Checkpoint(weights.step, asdict(weights.model_args), weights.model, weights.optimizer or {}, state)
    return checkpoint.save(out_dir, new, keep_last=sys.maxsize)


@contextmanager
def written_beside(dst: Path, force: bool = False) -> Iterator[Path]:
    """A path beside dst to write the file or folder to; when the block succeeds it is fsynced and renamed to dst.

    Raises CheckpointError when dst exists and force is not set. What dst held is gone only after the new is in place.
    A folder is replaced by two renames: killed between them, both are whole, as old and new in `.NAME.*` beside dst.
    """
    empty = dst.is_dir() and not any(dst.iterdir())
    if dst.exists() and not (force or empty):
        raise CheckpointError(
            "the destination exists", where=str(dst), hint="choose another name, or add --force to replace it"
        )
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", dir=dst.parent))
    except OSError as error:
        raise CheckpointError("cannot write there", where=str(dst), found=str(error)) from error
    new, old = workshop / "new", workshop / "old"
    try:
        yield new
        for path in [*new.rglob("*"), new]:
            sync(path)
        if dst.is_dir():  # a rename replaces a file, but no folder that holds something
            dst.rename(old)
        new.replace(dst)
        sync(dst.parent)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # the last two are how torch and safetensors say "disk full"
        raise CheckpointError("could not be written", where=str(dst), found=str(error).split("\n")[0]) from error
    finally:
        if old.exists() and not dst.exists():
            old.rename(dst)
        shutil.rmtree(workshop, ignore_errors=True)
