"""Where a split's token files are: data_dir/NAME, a folder, or a pattern that holds {split}."""

import difflib
import glob
import logging
import os
from pathlib import Path
from typing import Literal, overload

from nanogpt_fast.data.dataset import Meta, check_split, read_meta
from nanogpt_fast.data.recipes import RECIPE_NAMES, prepare_command
from nanogpt_fast.data.token_format import refuse_wide
from nanogpt_fast.data.tokenizer import KINDS
from nanogpt_fast.data.tokens import TokenSource
from nanogpt_fast.errors import ConfigError, DataError, did_you_mean
from nanogpt_fast.settings.config import DataConfig

LOOKED_AT = 100_000  # tokens, of a dataset that says nothing of its ids
FEW_IDS = 1000  # GPT-2's tokens of any text of that length go beyond

log = logging.getLogger(__name__)


@overload
def open_split(data: DataConfig, split: Literal["train"]) -> TokenSource: ...
@overload
def open_split(data: DataConfig, split: Literal["val"], *, required: Literal[True]) -> TokenSource: ...
@overload
def open_split(data: DataConfig, split: Literal["train", "val"], *, required: bool = ...) -> TokenSource | None: ...
def open_split(data: DataConfig, split: Literal["train", "val"], *, required: bool = False) -> TokenSource | None:
    """The split's files, from data_dir/dataset, a folder, or a pattern that holds {split}.

    In a folder: train.bin, else NAME_train.bin, train_*.bin, NAME_train_*.bin, else the same with .npy. A missing
    validation split gives None and one warning, or DataError where it is required; train is always required. What
    meta.json lists must be there, in its size, and nothing beside it; a pattern may choose among it.
    """
    paths, looked = _find_split(data, split)
    folder = os.path.dirname(looked)
    check_split(Path(folder), split, paths, whole="{split}" not in data.dataset)
    if paths:
        source = TokenSource(paths)
        if not os.path.exists(os.path.join(folder, "meta.json")):
            refuse_wide(source.files[0])
        if split == "train":
            _warn_of_ids(Path(folder))
        return source
    if split == "val" and not required:
        log.warning("no validation tokens (%s): evaluation is off", looked)
        return None
    try:
        near = sorted(os.listdir(folder))
    except (OSError, ValueError) as error:
        near, why = [], getattr(error, "strerror", None) or str(error)
    else:
        why = "empty"
    close = difflib.get_close_matches(os.path.basename(looked), near, n=3, cutoff=0.4) or near[:8]
    raise DataError(
        f"no {split} tokens found",
        where=f"{looked} (from {os.getcwd()})",
        found=(f"in {folder}: " + ", ".join(close)) if close else f"{folder}: {why}",
        hint=prepare_command(folder),
    )


def _warn_of_ids(folder: Path) -> None:
    """Say before hours of training what will be missed after them."""
    try:
        meta = read_meta(folder)
    except DataError as error:
        log.warning("%s (%s): no text can be made of what is trained on these ids", error.what, error.found)
        return
    if meta and meta.tokenizer["kind"] not in KINDS:
        log.warning("%s does not say what text the ids stand for: samples of the model cannot be decoded", folder)


def warn_of_few_ids(meta: Meta | None, source: TokenSource, vocab_size: int) -> None:
    """Where neither a meta file nor --vocab_size says what the ids are, and they are to be taken for GPT-2's."""
    if meta is None and not vocab_size and (largest := source.largest_of(LOOKED_AT)) < FEW_IDS:
        looked = min(LOOKED_AT, source.files[0].n_tokens)
        log.warning(
            "no meta.json or meta.pkl, no --vocab_size: the ids are taken for GPT-2's 50,257, though the first %d go "
            "up to %d only; if they are characters', put their meta.pkl back", looked, largest,
        )  # fmt: skip


def dataset_folder(data: DataConfig) -> Path | None:
    """The folder that holds the dataset and its meta.json: data_dir/NAME, else NAME as a path; of a pattern that
    matches files, the part before {split}. None when nothing is there. Raises ConfigError as open_split does."""
    places = _places(data)
    if "{split}" in data.dataset:
        here = (place for place in places if glob.glob(place.replace("{split}", "*")))
        places = [os.path.dirname(place.partition("{split}")[0]) for place in here]
    return next((Path(place) for place in places if os.path.isdir(place)), None)


def _places(data: DataConfig) -> list[str]:
    """The paths that --dataset may mean, the first that is there counts."""
    name = data.dataset
    if os.path.isabs(name):
        return [name]
    if ".." in name.replace("\\", "/").split("/"):
        raise ConfigError(
            "--dataset climbs out of --data_dir",
            where=f"dataset = {name!r}",
            expected="a folder's name, or an absolute path",
            hint=f"--dataset={os.path.abspath(os.path.join(data.data_dir, name))}",
        )
    return [os.path.join(data.data_dir, name)] + [name] * bool(os.path.dirname(name))


def _find_split(data: DataConfig, split: str) -> tuple[list[str], str]:
    """(the split's files in order, the pattern that was looked for)."""
    name, places = data.dataset, _places(data)
    if "{split}" in name:
        patterns = [place.replace("{split}", split) for place in places]
        looked = patterns[-1]
    elif folder := dataset_folder(data):
        stems = (split, f"*_{split}", f"{split}_*", f"*_{split}_*")
        patterns = [os.path.join(glob.escape(str(folder)), stem + end) for end in (".bin", ".npy") for stem in stems]
        looked = str(folder / f"{split}.bin")
    elif glob.has_magic(name) or any(os.path.isfile(place) for place in places):
        raise ConfigError(
            "--dataset names files without saying which split",
            where=f"dataset = {name!r}",
            expected="a folder, or a pattern with {split} in it",
            hint="--dataset='data/fineweb10B/fineweb_{split}_*.bin'",
        )
    else:
        raise _no_dataset(name, places)
    matches = ([p for p in sorted(glob.glob(pattern)) if os.path.isfile(p)] for pattern in patterns)
    return next((paths for paths in matches if paths), []), looked


def _no_dataset(name: str, places: list[str]) -> DataError:
    places = [place.rstrip("/") for place in places]
    place = next((place for place in places if os.path.isdir(os.path.dirname(place))), places[0])
    parent, base = os.path.split(place)
    folders = sorted(e.name for e in os.scandir(parent) if e.is_dir()) if os.path.isdir(parent) else []
    known = list(dict.fromkeys([*folders, *RECIPE_NAMES]))
    nearest = next(iter(difflib.get_close_matches(base, known, n=1)), base)
    out = os.path.join(parent, nearest)
    if nearest in folders:
        hint = f"--dataset={os.path.join(os.path.dirname(name.rstrip('/')), nearest)}"
    else:
        hint = prepare_command(out)
    return DataError(
        f"there is no dataset {name!r}" + did_you_mean(base, known) * (base not in known),
        where=f"{place} (from {os.getcwd()})",
        found=f"in {parent or '.'}: " + (", ".join(folders[:12]) or "no folders"),
        hint=hint,
    )
