"""Dataset folders as accidents, other people and nanoGPT leave them: each refused by name, or read."""

import json
import logging
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt_fast.data.dataset import MAX_PICKLE, check_files, is_complete, read_meta
from nanogpt_fast.data.preparation import PrepareConfig, prepare
from nanogpt_fast.data.splits import open_split, warn_of_few_ids
from nanogpt_fast.data.tokenizer import from_json
from nanogpt_fast.errors import DataError, NanogptError
from nanogpt_fast.prepare import main
from nanogpt_fast.settings.config import DataConfig

DATA = DataConfig(dataset="set", data_dir="data")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """data/set: two shards of train, one of val."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("abcdefghi\n" * 30)
    make()
    return Path("data/set")


def make(**options: Any) -> None:
    config = {"name": "set", "source": "text.txt", "tokenizer": "char", "format": "llmc", "shard_tokens": 200} | options
    prepare(PrepareConfig(**config))


# ---- The folder against its meta.json ----


def test_a_whole_folder_opens(folder: Path) -> None:
    assert open_split(DATA, "train").n_tokens == 270 and open_split(DATA, "val", required=True).n_tokens == 30


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda d: (d / "set_train_000001.bin").unlink(), r"token file is missing\n.*set_train_000001\.bin"),
        (lambda d: (d / "set_train_000000.bin").unlink(), r"token file is missing\n.*set_train_000000\.bin"),
        (lambda d: [p.unlink() for p in d.glob("*train*")], r"token file is missing\n.*set_train_000000\.bin"),
        (lambda d: os.truncate(d / "set_train_000001.bin", 1030), r"not as it was prepared\n.*000001\.bin\n.*1164 b"),
        (lambda d: (d / "set_train_000002.bin").write_bytes(b"x" * 2000), r"not among those that were prepared"),
    ],
)
def test_shards_that_meta_json_does_not_know_or_misses(folder: Path, damage: Any, told: str) -> None:
    damage(folder)
    with pytest.raises(DataError, match=told) as error:
        open_split(DATA, "train")
    assert "rm " not in str(error.value) and "delete" not in str(error.value)
    assert open_split(DATA, "val", required=True).n_tokens == 30  # each split for itself


def test_prepare_makes_what_is_missing_again(folder: Path) -> None:
    (folder / "set_train_000001.bin").unlink()
    assert not is_complete(folder)
    make()
    assert is_complete(folder) and open_split(DATA, "train").n_tokens == 270


def test_somebodys_own_longer_file_is_not_replaced_unasked(folder: Path) -> None:
    (folder / "set_train_000001.bin").write_bytes(bytes(5000))
    with pytest.raises(DataError, match=r"--out FOLDER; --force replaces them"):
        make()
    assert (folder / "set_train_000001.bin").stat().st_size == 5000
    make(force=True)
    assert is_complete(folder)


def test_a_damaged_meta_json_does_not_keep_force_from_its_work(folder: Path, capsys: Any) -> None:
    (folder / "meta.json").write_text("{")
    main(["set", "--source=text.txt", "--tokenizer=char", "--force"])
    assert is_complete(folder) and "already prepared" not in capsys.readouterr().out


def test_a_pattern_may_choose_some_shards_but_no_damaged_one(folder: Path) -> None:
    pattern = DataConfig(dataset="data/set/set_{split}_000001.bin", data_dir=".")
    assert open_split(pattern, "train").n_tokens == 70
    os.truncate(folder / "set_train_000001.bin", 1026)
    with pytest.raises(DataError, match="not as it was prepared"):
        open_split(pattern, "train")


def test_a_preparation_cut_off_while_publishing_is_refused_and_goes_on(folder: Path, monkeypatch: Any) -> None:
    """--force, killed after the old data went: what lies there must not be trained on, as GPT-2 tokens least of all."""
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == "train.bin":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        make(format="bin", force=True)
    assert (folder / "val.bin").exists() and not (folder / "meta.json").exists()
    for split in ("train", "val"):
        with pytest.raises(DataError, match="did not finish") as error:
            open_split(DATA, split)
        assert "python -m nanogpt_fast.prepare set --source FILE" in str(error.value)
    monkeypatch.setattr(os, "replace", real)
    monkeypatch.setattr("nanogpt_fast.data.preparation._encode", lambda *_: pytest.fail("encoded again"))
    make(format="bin")
    assert open_split(DATA, "train").n_tokens == 270 and sorted(os.listdir(folder)) == [
        ".prepare.lock", "meta.json", "meta.pkl", "train.bin", "val.bin"
    ]  # fmt: skip


# ---- meta.json ----


def changed(**values: Any) -> str:
    return json.dumps(json.loads(Path("data/set/meta.json").read_text()) | values)


FILE = {"name": "x.bin", "bytes": 2, "sha256": ""}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"format": Infinity}', "Infinity is no JSON number"),
        ('{"format": 1' + "0" * 5000 + "}", "Exceeds the limit"),
        ("[1]", "expected dict"),
        ({"vocab_size": 0}, r"vocab_size is 0, expected 1"),
        ({"vocab_size": -5}, "expected a whole number"),
        ({"vocab_size": 10**11}, "vocab_size is 100000000000"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"vocab_size": 3}, "itos is not a list of at most 3"),
        ({"tokenizer": []}, "tokenizer is"),
        ({"tokenizer": {"kind": 5}}, "kind is 5"),
        ({"source": 5}, "source is 5"),
        ({"splits": []}, "splits is"),
        ({"splits": {"train": {"tokens": -1, "files": []}}}, "tokens is -1"),
        ({"splits": {"train": {"tokens": 1, "files": [FILE | {"bytes": -2}]}}}, "bytes is -2"),
        ({"splits": {"train": {"tokens": 1, "files": [FILE | {"bytes": "2"}]}}}, "bytes is '2'"),
        ({"splits": {"train": {"tokens": 1, "files": [FILE | {"name": "a\0b"}]}}}, "file name"),
        ({"splits": {"train": {"tokens": 1, "files": [FILE | {"name": "a" * 256}]}}}, "file name"),
        ({"splits": {"train": {"tokens": 1, "files": [FILE | {"name": ".."}]}}}, "file name"),
        ({"splits": {"train": {"tokens": 1, "files": [FILE | {"name": "\ud800"}]}}}, "meta.json cannot be used"),
    ],
)
def test_a_meta_json_with_impossible_values_is_refused(folder: Path, text: Any, told: str) -> None:
    text = text if isinstance(text, str) else changed(**text)
    (folder / "meta.json").write_text(text)
    for read in (lambda: read_meta(folder), lambda: open_split(DATA, "train")):
        with pytest.raises(DataError, match=told) as error:
            read()
        assert "delete" not in str(error.value) and "--out data/set-again" in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("name", ["meta.json", "meta.pkl"])
def test_meta_files_that_hang_or_never_end_are_not_read(folder: Path, name: str) -> None:
    (folder / "meta.json").unlink()
    (folder / "meta.pkl").unlink()
    os.mkfifo(folder / name)
    with pytest.raises(DataError, match="not a regular file"):
        read_meta(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match="not a regular file"):
        read_meta(folder)
    (folder / name).unlink()
    with open(folder / name, "wb") as file:
        file.truncate(MAX_PICKLE * 3)
    with pytest.raises(DataError, match="where at most"):
        read_meta(folder)


@pytest.mark.parametrize("name", ["a\0b", "a" * 300, "b/" + "a" * 300])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(NanogptError, match="there is no dataset"):
        open_split(DataConfig(dataset=name, data_dir="data"), "train")


def test_a_folder_that_may_not_be_read_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in folder.iterdir():
        path.unlink()

    def refuse(path: Any) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("nanogpt_fast.data.splits.os.listdir", refuse)
    with pytest.raises(DataError, match="data/set: Permission denied"):
        open_split(DATA, "train")


# ---- meta.pkl ----


def pickled(folder: Path, value: Any, protocol: int = 4) -> None:
    (folder / "meta.json").unlink(missing_ok=True)
    (folder / "meta.pkl").write_bytes(pickle.dumps(value, protocol=protocol))


LETTERS = dict(enumerate("abc"))
BESIDE = {"x": [None, True, 1.5, np.float32(2), {1, 2}, frozenset("a"), b"b\xff", (), (1,), 2**70]}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("value", "itos"),
    [
        ({"vocab_size": 3, "itos": LETTERS}, list("abc")),
        ({"vocab_size": np.int64(3), "itos": {np.int64(i): c for i, c in LETTERS.items()}}, list("abc")),
        ({"vocab_size": 3, "itos": ["a", "b", "c"]}, list("abc")),
        ({"vocab_size": 3, "itos": ("a", "b", "c")}, list("abc")),
        ({"vocab_size": 3, "itos": OrderedDict(LETTERS)}, list("abc")),
        ({"vocab_size": 3, "itos": {i: np.str_(c) for i, c in LETTERS.items()}}, list("abc")),
        ({"vocab_size": 3, "itos": LETTERS} | BESIDE, list("abc")),
        ({"vocab_size": 3, "itos": {0: "the", 1: " cat", 2: "[PAD]"}}, ["the", " cat", "[PAD]"]),
        ({"vocab_size": 3, "itos": {0: "a", 1: "a", 2: ""}}, ["a", "a", ""]),
    ],
)  # fmt: skip
def test_a_meta_pkl_of_plain_data_is_read(folder: Path, value: Any, itos: list[str], protocol: int) -> None:
    pickled(folder, value, protocol)
    meta = read_meta(folder)
    assert meta and meta.vocab_size == 3 and meta.tokenizer["itos"] == itos
    assert from_json(meta.tokenizer).decode([0, 1, 2, 0]) == "".join(itos) + itos[0]


def test_strings_encode_by_the_longest_first_and_name_what_is_missing() -> None:
    tokenizer = from_json({"kind": "strings", "itos": ["a", "ab", " ", "[PAD]"]})
    assert tokenizer.encode("aba [PAD]") == [1, 0, 2, 3] and tokenizer.token_bytes().tolist() == [1, 2, 1, 5]
    assert from_json(tokenizer.to_json()).vocab_size == 4
    with pytest.raises(DataError, match="character 'x' is not in the vocabulary"):
        tokenizer.encode("abx")


@pytest.mark.parametrize("size", [10**11, 0, -3, True, 2.0, None, "3"])
def test_an_impossible_vocabulary_is_refused_unless_vocab_size_overrides(folder: Path, size: Any, caplog: Any) -> None:
    pickled(folder, {"vocab_size": size, "itos": LETTERS})
    with pytest.raises(DataError, match=r"meta\.pkl cannot be used") as error:
        read_meta(folder)
    assert "delete" not in str(error.value) and "--vocab_size=N" in str(error.value)
    assert (found := read_meta(folder, vocab_size=65)) and found.vocab_size == 65
    with caplog.at_level(logging.WARNING):
        open_split(DATA, "train")
    assert "no text can be made" in caplog.text  # before training, not after


def test_ids_without_texts_are_warned_of_before_training(folder: Path, caplog: Any) -> None:
    pickled(folder, {"vocab_size": 300, "itos": LETTERS})
    with caplog.at_level(logging.WARNING):
        open_split(DATA, "train")
    assert "cannot be decoded" in caplog.text
    caplog.clear()
    (folder / "meta.pkl").unlink()
    with caplog.at_level(logging.WARNING):
        warn_of_few_ids(None, open_split(DATA, "train"), 0)
    assert "no meta.json or meta.pkl" in caplog.text and "go up to 9 only" in caplog.text


@pytest.mark.parametrize("data", [b"}" * 5000 + b".", b"](" * 10 + b"t.", b"(" + b"\x85" * 100_000 + b"."])
def test_pickles_that_exhaust_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("nanogpt_fast.data.meta_pickle.MAX_OPCODES", 1000)
    (folder / "meta.json").unlink()
    (folder / "meta.pkl").write_bytes(data)
    with pytest.raises(DataError, match=r"meta\.pkl cannot be used"):
        read_meta(folder)


def test_a_key_nested_deep_does_not_end_python(folder: Path) -> None:
    (folder / "meta.json").unlink()
    (folder / "meta.pkl").write_bytes(b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.")
    with pytest.raises(DataError, match="a key of type tuple"):
        read_meta(folder)


# ---- Four-byte ids ----


def test_a_headerless_file_of_four_byte_ids_is_named(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    ids = np.random.default_rng(0).integers(0, 50257, 5000)
    for split in ("train", "val"):
        ids.astype("<u4").tofile(folder / f"{split}.bin")
    with pytest.raises(DataError, match="seems to hold four-byte ids"):
        open_split(DATA, "train")
    ids.astype("<u2").tofile(folder / "train.bin")
    assert open_split(DATA, "train").n_tokens == 5000
    np.tile([0, 7], 500).astype("<u2").tofile(folder / "train.bin")  # every second id is zero, and nothing else is odd
    assert open_split(DATA, "train").n_tokens == 1000


def test_check_files_is_silent_about_a_folder_that_lists_none(folder: Path) -> None:
    pickled(folder, {"vocab_size": 3, "itos": LETTERS})
    meta = read_meta(folder)
    assert meta
    check_files(folder, meta, "train", ["anything.bin"])
