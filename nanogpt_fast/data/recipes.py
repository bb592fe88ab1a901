"""What a dataset's name stands for: its text, tokenizer, split, and the preset to train on it."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Download:
    """One text, kept as input.txt in the dataset's folder."""

    url: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a dataset's name stands for."""

    tokenizer: Literal["char", "gpt2"] = "gpt2"
    val_fraction: float = 0.1
    repository: str = ""  # on the Hugging Face hub
    subset: str = ""
    revision: str = ""
    download: Download | None = None
    preset: str = "gpt2_124m"  # to train on it


def _web(repository: str, subset: str = "", revision: str = "") -> Recipe:
    return Recipe(val_fraction=0.0005, repository=repository, subset=subset, revision=revision)


SHAKESPEARE = Download(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
RECIPES = {
    "stdlib": Recipe(tokenizer="char", preset="quickstart"),
    "shakespeare_char": Recipe(tokenizer="char", preset="shakespeare_char", download=SHAKESPEARE),
    "shakespeare": Recipe(preset="finetune_shakespeare", download=SHAKESPEARE),
    # The repository's main branch is a loading script, which datasets refuses from version 4 on; the hub keeps its rows
    # as Parquet under this revision.
    "openwebtext": _web("Skylion007/openwebtext", revision="refs/convert/parquet"),
    "fineweb": _web("HuggingFaceFW/fineweb", "sample-10BT"),
    "finewebedu": _web("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "text": Recipe(),
}
RECIPE_NAMES = tuple(RECIPES)[:-1]  # `text` is whatever the user has


def prepare_command(folder: str | Path, source: str = "", suffix: str = "") -> str:
    """The command that makes the dataset of this folder; source: the text behind it, where that is known; suffix: of
    the name of a new folder to make it in."""
    parent, name = os.path.split(str(folder))
    command = f"python -m nanogpt_fast.prepare {shlex.quote(name) if name else 'NAME'}"
    if name not in RECIPE_NAMES:
        command += f" --source {shlex.quote(source) if source else 'FILE'}"
    if name and (suffix or parent != "data"):
        command += f" --out {shlex.quote(str(folder) + suffix)}"
    return command
