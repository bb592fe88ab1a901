"""What a dataset's name stands for: its text, tokenizer, split, and the preset to train on it."""

from dataclasses import dataclass
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
    download: Download | None = None
    preset: str = "gpt2_124m"  # to train on it


def _web(repository: str, subset: str = "") -> Recipe:
    return Recipe(val_fraction=0.0005, repository=repository, subset=subset)


SHAKESPEARE = Download(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
RECIPES = {
    "stdlib": Recipe(tokenizer="char", preset="quickstart"),
    "shakespeare_char": Recipe(tokenizer="char", preset="shakespeare_char", download=SHAKESPEARE),
    "shakespeare": Recipe(preset="finetune_shakespeare", download=SHAKESPEARE),
    "openwebtext": _web("Skylion007/openwebtext"),
    "fineweb": _web("HuggingFaceFW/fineweb", "sample-10BT"),
    "finewebedu": _web("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "text": Recipe(),
}
RECIPE_NAMES = tuple(RECIPES)[:-1]  # `text` is whatever the user has
