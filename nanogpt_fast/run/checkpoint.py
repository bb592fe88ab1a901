"""Checkpoints that survive kill -9, full disks and flipped bits: float32 safetensors and JSON, never pickle.

    out_dir/checkpoints/step_00000250/
        model.safetensors        float32 masters by nanoGPT's names
        optimizer.safetensors    exp_avg.NAME and exp_avg_sq.NAME, float32; absent when only weights were saved
        state.json               step, model_args and whatever else the run needs to go on
        manifest.json            bytes and SHA-256 of the others, written last

Where ranks hold shares of the state, files of theirs (shares.py) take the place of the first two.

A directory is filled under a name nobody reads, fsynced, then renamed: a name like step_00000250 means finished.
Nothing is used before its hashes are checked, because a flipped bit in a tensor loads without any complaint. Which
checkpoint is the latest is computed from the step numbers, never from times or a stored pointer.
"""

import errno
import json
import logging
import math
import os
import platform
import re
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanogpt_fast import __version__
from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.files import sync
from nanogpt_fast.run import shares
from nanogpt_fast.run.encoding import encode
from nanogpt_fast.run.manifest import Chunks, read_json, read_manifest, verify, write_files
from nanogpt_fast.run.rundir import aside, clean_stale, publish, replaced

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
log = logging.getLogger(__name__)
_STEP = re.compile(r"step_(\d{8}|[1-9]\d{8,})")


class SaveFailed(CheckpointError):
    """A checkpoint could not be written. Older ones are untouched: warn, train on, try again at the next one."""


@dataclass
class Checkpoint:
    """All a run needs to go on."""

    step: int  # iterations completed, nanoGPT's iter_num
    model_args: dict[str, Any]  # GPTConfig's fields
    model: dict[str, Tensor]  # float32 masters by name
    optimizer: dict[str, Tensor] = field(default_factory=dict)  # exp_avg.NAME, exp_avg_sq.NAME; empty: weights only
    state: dict[str, Any] = field(default_factory=dict)  # JSON; `val_loss` decides which checkpoint is the best


@dataclass(frozen=True)
class Ranks:
    """Those that hold shares of a checkpoint, and how they find one another."""

    rank: int
    size: int
    meeting: str  # ends the name of the directory that they fill, which clean_stale then knows as rank 0's
    patience: float  # seconds that rank 0 waits for the others' files


def list_steps(out_dir: Path) -> dict[int, Path]:
    """{step: directory} of all finished checkpoints, unverified, in ascending order."""
    folder = out_dir / "checkpoints"
    named = [(p, _STEP.fullmatch(p.name)) for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    return dict(sorted((int(match[1]), path) for path, match in named if match))


def readable_steps(out_dir: Path) -> dict[int, Path]:
    """list_steps, and a step whose replacement was killed before it had its name; for whoever reads."""
    named = {int(name.removeprefix("step_")): path for name, path in replaced(out_dir / "checkpoints").items()}
    return dict(sorted({**named, **list_steps(out_dir)}.items()))


def save(out_dir: Path, checkpoint: Checkpoint, *, keep_last: int, ranks: Ranks | None = None) -> Path:
    """Publish the checkpoint atomically, then prune: the newest `keep_last` and the best one stay.

    Tensors may live on any device; they are copied to the host one at a time. Checkpoints of later steps (another
    run's, or the future before a rewind) are neither counted nor removed. Raises SaveFailed when the disk refuses.
    ranks: each calls this with its share of the model (shares.py's runs), but for rank 0 done once that is written.
    """
    step, folder = checkpoint.step, out_dir / "checkpoints"
    final = folder / f"step_{step:08d}"
    tmp = aside(final, "tmp", ranks.meeting if ranks else None)
    state = {"step": step, "model_args": checkpoint.model_args, "state": checkpoint.state}
    contents: dict[str, Chunks] = {STATE: [json.dumps(state, indent=1).encode()]}
    if not ranks:
        contents[MODEL] = encode(checkpoint.model)
    if checkpoint.optimizer:
        contents[OPTIMIZER] = encode(checkpoint.optimizer)
    facts = {
        "step": step,
        "created_by": f"nanogpt_fast {__version__}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    others: dict[str, Any] = {}
    try:
        if ranks:
            shares.write_share(tmp, ranks.rank, checkpoint.model)
            if ranks.rank > 0:
                return final
            others = shares.collect(tmp, ranks.size, ranks.patience)
            facts["shares"] = ranks.size
        else:
            tmp.mkdir(parents=True)
        write_files(tmp, contents, facts, others)
        publish(tmp, final)
        sync(out_dir)
        try:
            _prune(out_dir, step, keep_last)
        except OSError as error:  # the save itself stands; the next one prunes again
            log.warning("%s: older checkpoints could not be removed: %s", folder, error.strerror or error)
    except OSError as error:
        numbers = sum(t.numel() for tensors in (checkpoint.model, checkpoint.optimizer) for t in tensors.values())
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise SaveFailed(
            f"could not save the checkpoint of step {step}; older ones are untouched",
            where=str(final),
            expected=f"room for {4e-6 * numbers:,.1f} MB" if full else "",
            found=error.strerror or str(error),
            hint=f"{'free some space' if full else 'check the disk and its mount'}: the next save tries again",
        ) from error
    finally:
        if not ranks or ranks.rank == 0:
            clean_stale(folder)  # what a failed save had written, what a good one pruned or replaced
    return final


def load(path: Path) -> Checkpoint:
    """The checkpoint in `path`, tensors on the CPU, every file checked against the manifest.

    Tensors are mapped privately, not read: copy them where they belong and drop the Checkpoint. CheckpointError
    names the file that is missing or damaged.
    """
    try:
        manifest = read_manifest(path, _files_of)
        verify(path, manifest, manifest["files"])
        state = _read_state(path, manifest)
        if files := shares.files_of(manifest.get("shares")):
            model, optimizer = shares.assemble([path / name for name in files], state["state"].pop("shapes", None))
        else:
            model = load_file(path / MODEL)
            optimizer = load_file(path / OPTIMIZER) if OPTIMIZER in manifest["files"] else {}
    except OSError as error:
        raise CheckpointError(
            "a checkpoint cannot be read", where=str(error.filename or path), found=error.strerror or str(error)
        ) from error
    except SafetensorError as error:
        raise CheckpointError("a checkpoint holds no valid tensors", where=str(path), found=str(error)) from error
    return Checkpoint(state["step"], state["model_args"], model, optimizer, state["state"])


def bytes_of(path: Path) -> int:
    """Of the files that hold a checkpoint's tensors: no model in it is larger."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _files_of(manifest: Mapping[str, Any]) -> tuple[Collection[str], Collection[str]]:
    """The files of a checkpoint with this manifest: those there must be, and may be. ValueError for no checkpoint's."""
    files = shares.files_of(manifest.get("shares"))
    return ((*files, STATE), ()) if files else ((MODEL, STATE), (OPTIMIZER,))


def newest(out_dir: Path) -> tuple[Checkpoint, Path, list[str]]:
    """The latest checkpoint that verifies, its directory, and a line for each later one that does not.

    Raises CheckpointError when none does, with each one's reason.
    """
    skipped = []
    for path in reversed(readable_steps(out_dir).values()):
        try:
            return load(path), path, skipped
        except CheckpointError as error:
            skipped.append(f"skipped {path.name} because {_in_one_line(error)}")
    foreign = out_dir / "ckpt.pt"
    raise CheckpointError(
        "no checkpoint can be used" if skipped else "there is no checkpoint to resume from",
        where=str(out_dir / "checkpoints"),
        expected="directories named step_00000250, each with a manifest.json",
        found="".join(f"\n    {line}" for line in skipped) or "none",
        hint=f"{foreign} is nanoGPT's: start from it with --init_from={foreign}"
        if foreign.exists()
        else bring_back(out_dir) or "start anew with --init_from=scratch, or point --out_dir at the run to go on with",
    )


def best(out_dir: Path) -> Path | None:
    """The checkpoint with the lowest state["val_loss"], the later one of equals; None when none was evaluated.

    Looks at sizes and state.json, without hashing the tensors.
    """
    step = _best_step(_val_losses(readable_steps(out_dir)))
    return None if step is None else readable_steps(out_dir)[step]


def set_aside_later(out_dir: Path, step: int) -> Path | None:
    """Move checkpoints later than `step` to `out_dir/checkpoints.abandoned-N`; returns that folder, None if none.

    For a run that starts anew (step=-1) or rewinds: left in place, the old future would be what the next resume takes.
    """
    later = {s: path for s, path in list_steps(out_dir).items() if s > step}
    if not later:
        return None
    number = 1
    while (folder := out_dir / f"checkpoints.abandoned-{number}").exists():
        number += 1
    folder.mkdir()
    for path in later.values():
        os.rename(path, folder / path.name)
    sync(out_dir)
    return folder


def bring_back(out_dir: Path) -> str:
    """The command that puts back the newest checkpoints that a later run set aside; "" where there are none."""
    folders = sorted(out_dir.glob("checkpoints.abandoned-*"), key=lambda folder: folder.stat().st_mtime)
    if not any(folder.glob("step_*") for folder in folders):
        return ""
    return f"an earlier run's are in {folders[-1]}; back with them: " + shlex.join(
        ["mv", *map(str, sorted(folders[-1].glob("step_*"))), str(out_dir / "checkpoints")]
    )


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_amount(value: Any) -> bool:
    return _is_number(value) and 0 <= value < math.inf


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_losses(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_fingerprint(value: Any) -> bool:
    """As data.tokens makes it; empty of other formats."""
    if not isinstance(value, dict) or not value:
        return value == {}
    files = value.get("files")
    return _is_count(value.get("tokens")) and isinstance(files, list) and all(map(_is_file, files))


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() >= {"name", "bytes", "layout", "sha256_ends"}


# What a run takes from a state.json's `state`, which may lack any: hashes prove who wrote last, not what. Other keys
# are not ours to judge.
_SOUND: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("samples_seen", "optimizer_step", "good_steps"), (_is_count, "a whole number >= 0")),
    **dict.fromkeys(("best_val_loss", "val_loss"), (_is_number, "a number")),  # an older version saved NaN
    **dict.fromkeys(("loss_scale", "elapsed_s"), (_is_amount, "a finite number >= 0")),
    **dict.fromkeys(("tokenizer", "config", "draws"), (_is_object, "an object")),
    "fingerprint": (_is_fingerprint, "the data's tokens and files"),
    "recent_losses": (_is_losses, "a list of numbers"),
}


def _read_state(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """state.json, already verified; its step is the truth that the manifest's and the directory's name must match."""
    state = read_json(path / STATE)
    if not (
        type(state.get("step")) is int
        and state["step"] >= 0
        and isinstance(state.get("model_args"), dict)
        and isinstance(state.get("state"), dict)
    ):
        raise CheckpointError(f"{STATE} is damaged", where=str(path / STATE), expected="step, model_args and state")
    for key, (is_one, meaning) in _SOUND.items():
        value = state["state"].get(key)
        if value is not None and not is_one(value):
            raise CheckpointError(
                f"{STATE} is damaged at {key}",
                where=f"{path / STATE}: state.{key}",
                expected=meaning,
                found=repr(value)[:80],
                hint="use an earlier checkpoint: --init_from=resume finds the newest sound one",
            )
    state["state"] = {key: value for key, value in state["state"].items() if value is not None}  # null: not there
    name = _STEP.fullmatch(path.name)
    found = {"manifest.json": manifest.get("step"), "directory name": int(name[1]) if name else state["step"]}
    for where, step in found.items():
        if step != state["step"]:
            raise CheckpointError(
                f"the {where} and {STATE} disagree on the step",
                where=str(path),
                expected=f"step {state['step']}",
                found=f"step {step}",
            )
    return state


def _val_losses(steps: dict[int, Path]) -> dict[int, float]:
    """{step: validation loss} of the checkpoints that look sound (files there, sizes right); inf when not evaluated."""
    losses = {}
    for step, path in steps.items():
        try:
            manifest = read_manifest(path, _files_of)
            verify(path, manifest, [STATE])
            loss = _read_state(path, manifest)["state"].get("val_loss")
        except (CheckpointError, OSError):
            continue  # neither the best nor ours to remove; whoever loads it hears why
        losses[step] = loss if isinstance(loss, int | float) and math.isfinite(loss) else math.inf
    return losses


def _best_step(losses: dict[int, float]) -> int | None:
    """The step of the lowest finite loss, the later one of equals."""
    step = min(losses, key=lambda s: (losses[s], -s), default=None)
    return step if step is not None and losses[step] < math.inf else None


def _prune(out_dir: Path, saved: int, keep_last: int) -> None:
    """Rename what may go to `.trash-...`: deleted in place, a kill would leave half a directory with a good name."""
    steps = list_steps(out_dir)
    losses = {step: loss for step, loss in _val_losses(steps).items() if step <= saved}
    keep = {_best_step(losses), *list(losses)[-keep_last:]}
    for step in losses.keys() - keep:
        if not steps[step].is_symlink():
            os.rename(steps[step], aside(steps[step], "trash"))
    sync(out_dir / "checkpoints")


def _in_one_line(error: CheckpointError) -> str:
    sides = [f"{label} {text}" for label, text in (("expected", error.expected), ("found", error.found)) if text]
    return ", ".join([error.what, *sides])
