"""meta.json and nanoGPT's meta.pkl: round trips, damage, and a pickle that must not run."""

import contextlib
import dataclasses
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_fast.data.dataset import (
    FileEntry,
    Meta,
    Split,
    check_name,
    read_meta,
    verify,
)
from nanogpt_fast.data.meta_pickle import nanogpt_pickle, read_pickle
from nanogpt_fast.errors import DataError
from nanogpt_fast.files import sha256_of, write_json


def nanogpt_meta(size: int) -> dict:
    """The dict that nanoGPT's data/shakespeare_char/prepare.py pickles, for `size` different characters."""
    chars = [chr(c) for c in range(9, 9 + size)] if size < 1000 else [chr(c) for c in range(0x10000, 0x10000 + size)]
    return {"vocab_size": size, "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("size", [1, 65, 300, 70_000])  # the larger ones need the wide opcodes
def test_reads_what_pickle_writes(protocol: int, size: int) -> None:
    value = nanogpt_meta(size)
    assert read_pickle(pickle.dumps(value, protocol=protocol)) == value


def test_our_pickle_is_the_dict_nanogpt_loads() -> None:
    value = nanogpt_meta(65)
    assert pickle.loads(nanogpt_pickle(list(value["itos"].values()))) == value


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("nested", [False, True])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, protocol: int, nested: bool) -> None:
    target = tmp_path / "touched"
    payload = Payload(target)
    data = pickle.dumps({**nanogpt_meta(3), "x": payload} if nested else payload, protocol=protocol)
    pickle.loads(data).clear() if nested else pickle.loads(data).close()
    assert target.exists(), "the payload itself must work, or this test proves nothing"
    target.unlink()
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "meta.pkl").write_bytes(data)
    with pytest.raises(DataError, match="opcode (STACK_)?GLOBAL at byte"):
        read_meta(folder)
    assert not target.exists()


def test_a_pickle_cut_short_anywhere_is_an_error() -> None:
    data = pickle.dumps(nanogpt_meta(5))
    for length in range(len(data)):
        with pytest.raises(ValueError):
            read_pickle(data[:length])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_pickle_with_one_byte_changed_never_escapes_as_another_error(position: int, value: int) -> None:
    data = bytearray(pickle.dumps(nanogpt_meta(20), protocol=position % 4 + 2))
    data[position % len(data)] = value
    with contextlib.suppress(ValueError):
        read_pickle(bytes(data))


@pytest.mark.parametrize("value", [{"vocab_size": 2}, {"vocab_size": 2, "itos": {0: "a"}}])
def test_a_pickle_without_characters_still_gives_the_vocabulary(tmp_path: Path, value: object) -> None:
    """nanoGPT's training reads vocab_size alone."""
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(value))
    meta = read_meta(tmp_path)
    assert meta is not None and (meta.vocab_size, meta.tokenizer) == (2, {"kind": "unknown"})


@pytest.mark.parametrize("value", [[1], {"itos": {}}, "text"])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(DataError, match=r"meta\.pkl cannot be used"):
        read_meta(tmp_path)


META = Meta(
    vocab_size=2,
    tokenizer={"kind": "char", "itos": ["a", "é"]},
    splits={"train": Split(tokens=3, files=(FileEntry(name="train.bin", bytes=6, sha256="0" * 64),))},
    source="a test",
    created_by="nanogpt_fast 0",
    settings={"seed": 1},
)


def test_meta_json_round_trip_and_its_place_before_meta_pkl(tmp_path: Path) -> None:
    assert read_meta(tmp_path) is None
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(nanogpt_meta(65)))
    from_pickle = read_meta(tmp_path)
    assert from_pickle and (from_pickle.vocab_size, from_pickle.tokenizer["itos"][1]) == (65, "\n")
    write_json(tmp_path / "meta.json", META.to_json())
    assert read_meta(tmp_path) == META


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 2}, "format 2"),
        ({"splits": {"train": {"tokens": 1}}}, "no key 'files'"),
        ({"vocab_size": "many"}, "vocab_size is 'many', expected a whole number"),
        ({"splits": {"train": {"tokens": 1, "files": [{"name": "../x", "bytes": 2, "sha256": ""}]}}}, r"'\.\./x'"),
        ({"splits": {"train": {"tokens": 1, "files": [{"name": "/etc/x", "bytes": 2, "sha256": ""}]}}}, "'/etc/x'"),
    ],
)
def test_a_damaged_meta_json_says_what_is_wrong(tmp_path: Path, change: dict, told: str) -> None:
    (tmp_path / "meta.json").write_text(json.dumps(META.to_json() | change))
    with pytest.raises(DataError, match=told):
        read_meta(tmp_path)


def test_half_a_meta_json_is_an_error(tmp_path: Path) -> None:
    text = json.dumps(META.to_json())
    (tmp_path / "meta.json").write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"found: .*char \d+\)\n  next:     put the file back"):
        read_meta(tmp_path)


def test_verify_finds_a_flipped_bit_a_short_and_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(bytes(range(6)))
    row = FileEntry(name="train.bin", bytes=6, sha256=sha256_of(path))
    meta = dataclasses.replace(META, splits={"train": Split(tokens=3, files=(row,))})
    write_json(tmp_path / "meta.json", meta.to_json())
    assert verify(tmp_path) == meta
    path.write_bytes(bytes([0, 1, 2 ^ 0x40, 3, 4, 5]))
    with pytest.raises(DataError, match="expected: SHA-256"):
        verify(tmp_path)
    path.write_bytes(b"12345")
    with pytest.raises(DataError, match="found:    5 bytes"):
        verify(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="found:    no such file"):
        verify(tmp_path)
    (tmp_path / "meta.json").unlink()
    with pytest.raises(DataError, match=r"no meta\.json"):
        verify(tmp_path)


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "/etc", "", ".hidden", "a\\b", "a b", "-x"])
def test_names_that_are_paths_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="is not a dataset name"):
        check_name(name)


def test_plain_names_pass() -> None:
    assert [check_name(name) for name in ("openwebtext", "my.text-2_b")] == ["openwebtext", "my.text-2_b"]
