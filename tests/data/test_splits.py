"""Finding a dataset's folder and a split's files, and what is said when they are not there."""

import os
from pathlib import Path

import numpy as np
import pytest

from nanogpt_fast.data.splits import dataset_folder, open_split
from nanogpt_fast.errors import ConfigError, DataError
from nanogpt_fast.settings.config import DataConfig


def write(path, count) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.arange(count).astype("<u2").tofile(path)
    return str(path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.bin", "val.bin", "x_train_0.bin"], ["train.bin"]),
        (["tiny_train.bin", "tiny_val.bin"], ["tiny_train.bin"]),
        (
            ["f_train_000002.bin", "f_train_000001.bin", "f_val_000000.bin"],
            ["f_train_000001.bin", "f_train_000002.bin"],
        ),
        (["train_1.bin", "val_1.bin"], ["train_1.bin"]),
    ],
)
def test_folder_by_name(tmp_path, names, expected):
    for name in names:
        write(tmp_path / "data" / "web[1]" / name, 100)
    with open_split(DataConfig(dataset="web[1]", data_dir=str(tmp_path / "data")), "train") as source:
        assert [os.path.basename(file.path) for file in source.files] == expected


def test_npy_folder(tmp_path):
    for split in ("train", "val"):
        np.save(tmp_path / f"edufineweb_{split}_000001.npy", np.arange(100, dtype="<u2"))
    with open_split(DataConfig(dataset=str(tmp_path)), "val", required=True) as source:
        assert [os.path.basename(file.path) for file in source.files] == ["edufineweb_val_000001.npy"]


@pytest.mark.parametrize("pattern", ["web/f_{split}_*.bin", "here/f_{split}_*.bin", "/f_{split}_*.bin"])
def test_pattern(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    folder = {"web": "data/web", "here": "here", "": "."}[pattern.split("/")[0]]
    for name in ("f_train_1.bin", "f_train_2.bin", "f_val_0.bin"):
        write(tmp_path / folder / name, 100)
    dataset = str(tmp_path) + pattern if pattern.startswith("/") else pattern
    with open_split(DataConfig(dataset=dataset), "train") as source:
        assert [os.path.basename(file.path) for file in source.files] == ["f_train_1.bin", "f_train_2.bin"]


@pytest.mark.parametrize(
    ("dataset", "folder"),
    [
        ("web", "data/web"),
        ("data/web", "data/web"),  # a path, as the shell completes it
        ("data/here", "data/data/here"),  # data_dir comes first
        ("here", None),
        ("data/web/f_{split}_*.bin", "data/web"),
        ("web/f_{split}_*.bin", "data/web"),
        ("parts/{split}/*.bin", "data/parts"),
        ("web/other_{split}_*.bin", None),
        ("nowhere", None),
    ],
)
def test_dataset_folder(tmp_path, monkeypatch, dataset, folder):
    monkeypatch.chdir(tmp_path)
    for name in ("web/f_train_1.bin", "data/here/train.bin", "parts/train/0.bin"):
        write(tmp_path / "data" / name, 100)
    write(tmp_path / "here" / "train.bin", 100)
    found = dataset_folder(DataConfig(dataset=dataset))
    assert found == (Path(folder) if folder else None)
    if found:
        with open_split(DataConfig(dataset=dataset), "train") as source:
            assert all(Path(file.path).is_relative_to(found) for file in source.files)


def test_pattern_that_matches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "web" / "fineweb_train_0.bin", 100)
    with pytest.raises(DataError) as caught:
        open_split(DataConfig(dataset="web/finweb_{split}_*.bin"), "train")
    error = caught.value
    assert "web/finweb_train_*.bin" in error.where and str(tmp_path) in error.where
    assert "fineweb_train_0.bin" in error.found and error.hint.startswith("python -m nanogpt_fast.prepare web")


def test_pattern_without_split(tmp_path):
    path = write(tmp_path / "train.bin", 100)
    for dataset in (path, str(tmp_path / "*.bin")):
        with pytest.raises(ConfigError, match="split"):
            open_split(DataConfig(dataset=dataset), "train")


def test_missing_dataset_folder(tmp_path):
    (tmp_path / "shakespeare_char").mkdir()
    with pytest.raises(DataError) as caught:
        open_split(DataConfig(dataset="shakespear_char", data_dir=str(tmp_path)), "train")
    error = caught.value
    assert "did you mean 'shakespeare_char'" in error.what and "shakespeare_char" in error.found
    assert error.hint == "--dataset=shakespeare_char"


@pytest.mark.parametrize(
    ("dataset", "what", "hint"),
    [
        ("shakespere", "did you mean 'shakespeare' or 'shakespeare_char'?", "prepare shakespeare"),
        ("openwebtext", "there is no dataset 'openwebtext'", "prepare openwebtext"),
        ("qwertz", "there is no dataset 'qwertz'", "prepare qwertz --source FILE"),
        ("elsewhere/openwebtext/", "'elsewhere/openwebtext/'", "prepare openwebtext --out elsewhere/openwebtext"),
    ],
)
def test_a_missing_dataset_is_to_be_prepared(tmp_path, monkeypatch, dataset, what, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(DataError, match="no folders") as caught:
        open_split(DataConfig(dataset=dataset), "train")
    assert caught.value.what.endswith(what) and caught.value.hint == f"python -m nanogpt_fast.{hint}"


@pytest.mark.parametrize("name", ["../secrets", "a/../../b", "..", "../f_{split}_*.bin"])
def test_names_that_climb_out(tmp_path, name):
    write(tmp_path / "secrets" / "train.bin", 100)
    with pytest.raises(ConfigError, match="climbs out"):
        open_split(DataConfig(dataset=name, data_dir=str(tmp_path / "data")), "train")


def test_missing_validation_split(tmp_path, caplog):
    write(tmp_path / "train.bin", 100)
    data = DataConfig(dataset=str(tmp_path))
    assert open_split(data, "val") is None
    assert len(caplog.records) == 1 and "evaluation is off" in caplog.text
    with pytest.raises(DataError, match="no val tokens") as caught:
        open_split(data, "val", required=True)
    assert "train.bin" in caught.value.found


def test_missing_training_split(tmp_path):
    with pytest.raises(DataError, match="no train tokens") as caught:
        open_split(DataConfig(dataset=str(tmp_path)), "train")
    assert "empty" in caught.value.found
