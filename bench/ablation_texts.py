"""The texts that ablations train on by default, both this Python's own, so that no network is needed.

stdlib   the sources of the library, as `prepare stdlib` makes it
manual   the language reference that `help()` shows (pydoc_data), in the vocabulary of stdlib: finetuning goes on to it

Other Pythons have other texts, which is why the data's hash is part of a run's key.
"""

import importlib
import json
from pathlib import Path

from nanogpt_fast.data.dataset import read_meta
from nanogpt_fast.data.preparation import PrepareConfig, prepare
from nanogpt_fast.errors import DataError

VAL_SHARE = {"stdlib": 0.01, "manual": 0.25}  # some 100,000 characters each: every run is scored on all of them
PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})


def ensure(name: str, data_dir: Path) -> Path:
    """The dataset's folder; one of VAL_SHARE is made where it is not there. DataError for another that is not."""
    folder = data_dir / name
    if name in VAL_SHARE and not (folder / "meta.json").is_file():
        source = ""
        if name == "manual":
            stdlib = read_meta(ensure("stdlib", data_dir))
            assert stdlib is not None
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "input.txt"
            path.write_text(manual(stdlib.tokenizer["itos"]), newline="")
            source = str(path)
        prepare(
            PrepareConfig(
                name=name, source=source, out=str(folder), tokenizer="char", val_fraction=VAL_SHARE[name], num_proc=1
            ),
            wait=300,
        )
    return folder


def digest(name: str, data_dir: Path) -> str:
    """What tells the data of a folder from others': of the SHA-256 of its files."""
    path = ensure(name, data_dir) / "meta.json"
    if not path.is_file():
        raise DataError("the dataset has no meta.json to know it by", where=str(path.parent), hint="prepare it anew")
    splits = json.loads(path.read_text())["splits"]
    return "-".join(file["sha256"][:8] for split in ("train", "val") for file in splits[split]["files"])


def manual(characters: list[str]) -> str:
    """The language reference in these characters, each of which is in the first line, so that they are its vocabulary.

    Topics quote one another at length: a paragraph is kept where it stands first, or validation would be of text that
    was trained on."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as problem:
        hint = "--dataset=NAME --before=CHECKPOINT finetune on other text"
        raise DataError("this Python has no pydoc_data", found=str(problem), hint=hint) from problem
    known, seen = set(characters), set[str]()
    kept = ["".join(sorted(known - {"\n"}))]
    for name in sorted(topics):
        for paragraph in topics[name].translate(PLAIN).split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept.append("".join(c for c in paragraph if c in known))
    return "\n\n".join(kept) + "\n"
