"""Tokenizers in Hugging Face folders, in and out: ids and text as transformers' own give them."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_weights import random_weights

from nanogpt_fast import convert, sample
from nanogpt_fast.data.bpe import BpeTokenizer
from nanogpt_fast.data.tokenizer import find_vocab_bpe, from_json
from nanogpt_fast.errors import DataError
from nanogpt_fast.evaluation import open_sources
from nanogpt_fast.restore import restore
from nanogpt_fast.settings.evaluating import EvaluateConfig
from nanogpt_fast.weights import hf_tokenizer
from nanogpt_fast.weights.formats import read, write

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "The quick fox's 1234 tails.\n\n  She'll say \u00e9t\u00e9, \u732b \U0001f600 \u0930\u093f; tabs\tand   spaces  "
ITOS = sorted(set(TEXT + "abcdefghijklmnopqrstuvwxyz"))


def trained(folder: Path, layout: str) -> Path:
    """A small byte-level BPE made by the package tokenizers: its special tokens come first, so ids are no ranks."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    corpus = [TEXT, "the then there brown browner quick quicker say saying tails tail 12 123 1234"] * 9
    tokenizer.train_from_iterator(corpus, vocab_size=330, min_frequency=2, special_tokens=["<s>", "</s>"])
    folder.mkdir(exist_ok=True)
    if layout == "two files":
        tokenizer.save_model(str(folder))
        settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def hf_folder(folder: Path, layout: str = "two files", vocab_size: int = 340, **config: Any) -> Path:
    write(random_weights(vocab_size=vocab_size, n_layer=1), folder, "hf")
    trained(folder, layout)
    edit(folder, bos_token_id=0, eos_token_id=1, pad_token_id=339, **config)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("layout", ["two files", "tokenizer.json"])
def test_ids_and_text_are_transformers_own(tmp_path, layout):
    folder = hf_folder(tmp_path / "hf", layout)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), restore(str(folder), "").tokenizer()
    assert isinstance(ours, BpeTokenizer)
    for text in (TEXT, "brown</s>fox", "", "<s>", "quick" * 40):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids and ours.decode(ids) == text
    assert ours.encode("<s>") == [0]
    plain = ours.encode_ordinary("a<s>")  # in data a special token is text
    assert plain.dtype == np.uint16 and 0 not in plain and ours.decode(plain.tolist()) == "a<s>"
    sizes = ours.token_bytes()
    assert sizes[ours.encode(TEXT)].sum() == len(TEXT.encode()) and sizes[0] == 0
    assert from_json(ours.to_json()).encode(TEXT) == ours.encode(TEXT)


@pytest.mark.parametrize("layout", ["two files", "tokenizer.json"])
def test_such_a_model_is_sampled_from_and_its_tokenizer_and_ids_survive(tmp_path, capsys, layout):
    """HF -> ours -> HF."""
    folder = hf_folder(tmp_path / "hf", layout)
    sample.main([f"--init_from={folder}", "--start=brown fox", "--num_samples=1", "--max_new_tokens=8", "--device=cpu"])
    assert "brown fox" in capsys.readouterr().out
    convert.main([str(folder), str(tmp_path / "run"), "--to=native"])
    convert.main([str(tmp_path / "run"), str(tmp_path / "back"), "--to=hf"])
    assert "no transformers tokenizer" not in capsys.readouterr().out
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert [config[f"{k}_token_id"] for k in ("bos", "eos", "pad")] == [0, 1, 339] and config["vocab_size"] == 340
    theirs, back = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("hf", "back"))
    text = TEXT + "</s>"
    assert back(text)["input_ids"] == theirs(text)["input_ids"] and back.decode(theirs(TEXT)["input_ids"]) == TEXT
    assert "AutoTokenizer" in (tmp_path / "back/README.md").read_text()
    if layout == "two files":
        assert (back.bos_token, back.eos_token_id) == ("<s>", 1)


def gpt2_folder(folder: Path, vocab_size: int, **added: int) -> Path:
    """GPT-2's tokenizer in a folder, with tokens added as transformers notes them."""
    find_vocab_bpe()
    write(random_weights(vocab_size=50257, n_layer=1, n_embd=8), folder, "hf")
    if vocab_size != 50257:
        write(random_weights(vocab_size=vocab_size, n_layer=1, n_embd=8), folder.with_name("wider"), "hf")
        for name in ("model.safetensors", "config.json"):
            (folder.with_name("wider") / name).replace(folder / name)
    (folder / "added_tokens.json").write_text(json.dumps({f"[{key}]": i for key, i in added.items()}))
    return folder


def test_gpt2_with_a_pad_token(tmp_path):
    """vocab_size 50258 with vocab.json and merges.txt was refused by sample, and lost its tokenizer on export."""
    folder = gpt2_folder(tmp_path / "hf", 50258, PAD=50257)
    edit(folder, pad_token_id=50257)
    ours = restore(str(folder), "").tokenizer()
    assert ours.encode("Hello world[PAD]") == [15496, 995, 50257] and ours.eot == 50256
    write(read(folder), tmp_path / "back", "hf")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back("Hello world[PAD]<|endoftext|>")["input_ids"] == [15496, 995, 50257, 50256]
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["pad_token_id"], config["vocab_size"]) == (50257, 50258)
    (tmp_path / "data/toy").mkdir(parents=True)  # data of GPT-2's ids are its data
    np.arange(400, dtype=np.uint16).tofile(tmp_path / "data/toy/val.bin")
    data = EvaluateConfig(dataset="toy", data_dir=str(tmp_path / "data"), split="val")
    with ExitStack() as stack:
        assert list(open_sources(data, restore(str(folder), ""), stack)[0]) == ["val"]


def test_gpt2s_own_is_known_by_its_merges_not_by_its_size(tmp_path, caplog):
    folder = gpt2_folder(tmp_path / "hf", 50257)
    assert read(folder).tokenizer == {"kind": "gpt2"}
    merges = (folder / "merges.txt").read_text().split("\n")
    merges[1], merges[2] = merges[2], merges[1]
    (folder / "merges.txt").write_text("\n".join(merges))
    assert (read(folder).tokenizer or {})["kind"] == "bpe"
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}, "pre_tokenizer": None}))
    assert read(folder).tokenizer == hf_tokenizer.UNKNOWN and "is not read" in caplog.text
    with pytest.raises(DataError, match="tokenizer is unknown"):
        restore(str(folder), "").tokenizer()


# ---- characters ----


@pytest.fixture
def char_folder(tmp_path: Path) -> Path:
    tokenizer = {"kind": "char", "itos": ITOS}
    return write(random_weights(vocab_size=len(ITOS), tokenizer=tokenizer), tmp_path / "chars", "hf")


def test_transformers_reads_our_characters(char_folder):
    theirs = transformers.AutoTokenizer.from_pretrained(char_folder)
    ids = theirs(TEXT)["input_ids"]
    assert ids == [ITOS.index(char) for char in TEXT] and theirs.decode(ids) == TEXT
    assert len(theirs) == len(ITOS)
    pipe = transformers.pipeline("text-generation", str(char_folder))
    out = pipe("The", max_new_tokens=4, do_sample=False, pad_token_id=0)[0]["generated_text"]
    assert out.startswith("The") and len(out) == 7


@pytest.mark.parametrize("files", [("meta.json", "tokenizer.json"), ("tokenizer.json",)])
def test_we_sample_from_our_own_export_of_characters(char_folder, capsys, files):
    for name in {"meta.json", "tokenizer.json"} - set(files):
        (char_folder / name).unlink()
    sample.main([f"--init_from={char_folder}", "--start=The", "--num_samples=1", "--max_new_tokens=8", "--device=cpu"])
    assert capsys.readouterr().out.startswith("The")
    assert read(char_folder).tokenizer == {"kind": "char", "itos": ITOS}


def test_a_character_that_utf_8_cannot_hold_leaves_the_table_alone(tmp_path):
    itos = ["a", "b", "\ud800"]
    folder = write(random_weights(vocab_size=3, tokenizer={"kind": "char", "itos": itos}), tmp_path / "hf", "hf")
    assert not (folder / "tokenizer.json").exists() and "meta.json" in (folder / "README.md").read_text()
    assert read(folder).tokenizer == {"kind": "char", "itos": itos}


def test_the_card_warns_readers_of_gguf_of_the_exact_gelu(tmp_path):
    for activation, told in (("gelu", True), ("gelu_tanh", False)):
        folder = write(random_weights(activation=activation), tmp_path / activation, "hf")
        assert ("GGUF" in (folder / "README.md").read_text()) == told


DAMAGES = {
    "vocab.json": ["[1, 2]", "{", '{"a": "b"}', '{"a": -1}', '{"a": 99999}', '{"a": NaN}', "[" * 100_000],
    "merges.txt": ["a b c\n", "\x00\n", "onlyone\n"],
    "tokenizer_config.json": ["[]", '{"added_tokens_decoder": [1]}', '{"added_tokens_decoder": {"x": {}}}'],
    "added_tokens.json": ['{"[PAD]": "x"}', '{"[PAD]": 340}', "7"],
}


@pytest.mark.parametrize("name, text", [(name, text) for name, texts in DAMAGES.items() for text in texts])
def test_a_damaged_tokenizer_costs_a_warning_not_the_weights(tmp_path, caplog, name, text):
    folder = tmp_path / "hf"
    (trained(folder, "two files") / name).write_text(text)
    assert hf_tokenizer.read(folder, 340) == hf_tokenizer.UNKNOWN and "is not read" in caplog.text


@pytest.mark.parametrize(
    "change", [{"model": None}, {"pre_tokenizer": 7}, {"added_tokens": [{}]}, {"normalizer": {"a": 1}}]
)
def test_a_damaged_tokenizer_json_too(tmp_path, caplog, change):
    path = trained(tmp_path / "hf", "tokenizer.json") / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert hf_tokenizer.read(path.parent, 340) == hf_tokenizer.UNKNOWN and "is not read" in caplog.text
