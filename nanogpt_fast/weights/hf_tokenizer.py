"""The tokenizer in a Hugging Face folder: GPT-2's, any other byte-level BPE, or our characters, in and out.

tokenizer.json is read where vocab.json and merges.txt are not there: what transformers 5 saves is that file alone.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from nanogpt_fast.data.bpe import extends_gpt2
from nanogpt_fast.data.dataset import FORMAT as META_FORMAT
from nanogpt_fast.data.dataset import read_meta
from nanogpt_fast.data.tokenizer import EOT, Gpt2Tokenizer, find_vocab_bpe, from_json, gpt2_bytes
from nanogpt_fast.errors import CheckpointError, DataError
from nanogpt_fast.files import read_small, write_json
from nanogpt_fast.weights.canonical import GPT2_PADDED, GPT2_VOCAB, Weights
from nanogpt_fast.weights.sources import read_object

log = logging.getLogger(__name__)
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
UNKNOWN = {"kind": "unknown"}  # there is one, which is not GPT-2's; never taken for it by the vocabulary's size
_FILES = ("meta.json", "vocab.json", "tokenizer.json", "vocab.txt", "spiece.model", "tokenizer.model")


def read(folder: Path, vocab_size: int) -> dict[str, Any] | None:
    """The tokenizer as meta.json has it; None where the folder has none. One that cannot be read is unknown, with a
    warning: the weights are good without it."""
    if not any((folder / name).exists() for name in _FILES):
        return None
    try:
        if (folder / "meta.json").exists() and (meta := read_meta(folder)):
            return meta.tokenizer
        found = _read_bpe(folder) or _read_json(folder)
        if found and extends_gpt2(found) and len(found["added"]) == 1 and vocab_size in (GPT2_VOCAB, GPT2_PADDED):
            return {"kind": "gpt2"}
        if found and from_json(found).vocab_size <= vocab_size:
            return found
        reason = "it has more ids than the model" if found else "it is neither byte-level BPE nor single characters"
    except (CheckpointError, DataError) as error:
        reason = f"{error.where}: {error.what}"
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"it is not built as transformers' ({type(error).__name__}: {error})"
    log.warning("the tokenizer in %s is not read: %s", folder, reason[:300])
    return UNKNOWN


def _read_bpe(folder: Path) -> dict[str, Any] | None:
    """vocab.json and merges.txt, with the tokens that two more files may add."""
    if not ((folder / "vocab.json").exists() and (folder / "merges.txt").exists()):
        return None
    settings = read_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    if settings.get("add_prefix_space"):
        return None
    lines = read_small(folder / "merges.txt").decode("utf-8").replace("\r\n", "\n").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    vocab, added = read_object(folder / "vocab.json"), {}
    if (folder / "added_tokens.json").exists():
        added = read_object(folder / "added_tokens.json")
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        added[token["content"]] = int(number)
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):  # <|endoftext|> stands in vocab.json
        text = settings.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        if isinstance(text, str) and text in vocab:
            added[text] = vocab[text]
    return _bpe(vocab, merges, added | ({EOT: vocab[EOT]} if EOT in vocab else {}))


def _bpe(vocab: dict[str, int], merges: list[str], added: dict[str, int]) -> dict[str, Any]:
    return {
        "kind": "bpe",
        "vocab": {token: i for token, i in vocab.items() if token not in added},
        "merges": merges,
        "added": dict(sorted(added.items(), key=lambda item: item[1])),
    }


def _read_json(folder: Path) -> dict[str, Any] | None:
    """tokenizer.json, where it is byte-level BPE, or words of single characters as write() makes them."""
    if not (folder / "tokenizer.json").exists():
        return None
    found = read_object(folder / "tokenizer.json")
    model, before = found["model"], found["pre_tokenizer"] or {}
    if found.get("normalizer"):
        return None
    added = {token["content"]: token["id"] for token in found.get("added_tokens") or ()}
    if model["type"] == "BPE" and before.get("type") == "ByteLevel" and not before.get("add_prefix_space"):
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        return _bpe(model["vocab"], merges, added)
    if model["type"] == "WordLevel" and before.get("type") == "Split" and not added:
        itos = sorted(model["vocab"], key=model["vocab"].get)
        if [model["vocab"][char] for char in itos] == list(range(len(itos))):
            return {"kind": "char", "itos": itos}
    return None


def special_ids(config: dict[str, Any]) -> dict[str, Any]:
    """bos_token_id and the like of a config.json, those that are ids."""
    found = {key: config[key] for key in SPECIAL_IDS if key in config}
    return {key: value for key, value in found.items() if value is None or type(value) is int and 0 <= value < 2**31}


def write(weights: Weights, folder: Path) -> bool:
    """Whether transformers finds a tokenizer in the folder: GPT-2's where vocab.bpe can be had, the one that came with
    the weights, or one that splits text into our characters, whose table goes into meta.json too."""
    if weights.is_gpt2_vocab:
        try:
            text = find_vocab_bpe().read_text(encoding="utf-8")
        except DataError:
            return False  # the weights are good without it; convert says what is missing
        merges = text.split("\n")[1:-1]
        tokens = [*gpt2_bytes(), *(line.replace(" ", "") for line in merges)]
        bpe = _bpe({token: i for i, token in enumerate(tokens)}, merges, {EOT: Gpt2Tokenizer.eot})
        _write_bpe(bpe, weights, folder)
        return True
    found = weights.tokenizer or {}
    if found.get("kind") == "bpe":
        _write_bpe(found, weights, folder)
        write_hf_json(folder / "tokenizer.json", _tokenizer_json(found))
        return True
    if found:
        meta = {"format": META_FORMAT, "tokenizer": found, "vocab_size": weights.used_vocab, "splits": {}}
        write_json(folder / "meta.json", meta)  # escapes what UTF-8 cannot hold
    if found.get("kind") != "char" or not is_text(found["itos"]):
        return False
    write_hf_json(folder / "tokenizer.json", _tokenizer_json(found))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_hf_json(folder / "tokenizer_config.json", settings | {"model_max_length": weights.model_args.block_size})
    return True


def is_text(itos: list[str]) -> bool:
    """Whether UTF-8 can hold the characters: transformers' tokenizers know no lone surrogates."""
    return not re.search("[\ud800-\udfff]", "".join(itos))


def _write_bpe(bpe: dict[str, Any], weights: Weights, folder: Path) -> None:
    end = {EOT: bpe["added"][EOT]} if EOT in bpe["added"] else {}
    write_hf_json(folder / "vocab.json", bpe["vocab"] | end)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *bpe["merges"], ""]), encoding="utf-8")
    text_of = {i: text for text, i in bpe["added"].items()}
    ids = special_ids(weights.state.get("special_ids") or {})
    special = {key.removesuffix("_id"): text_of[i] for key, i in ids.items() if i in text_of}
    if EOT in bpe["added"]:
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT) | special
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": weights.model_args.block_size,
        "add_prefix_space": False,
    }
    write_hf_json(folder / "tokenizer_config.json", {**settings, **special})


def _tokenizer_json(found: dict[str, Any]) -> dict[str, Any]:
    """What the package tokenizers loads."""
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    whole: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None}
    if found["kind"] == "bpe":
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        added = [{"id": i, "content": text, **token} for text, i in found["added"].items()]
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                 "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                 "vocab": {**found["vocab"], **found["added"]}, "merges": found["merges"]}  # fmt: skip
        ends = {"pre_tokenizer": level, "post_processor": None, "decoder": level}
        return whole | {"added_tokens": added} | ends | {"model": model}
    each = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}
    vocab = {char: i for i, char in enumerate(found["itos"])}
    ends = {"pre_tokenizer": each, "post_processor": None, "decoder": {"type": "Fuse"}}
    return whole | {"added_tokens": []} | ends | {"model": {"type": "WordLevel", "vocab": vocab, "unk_token": ""}}


def write_hf_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
