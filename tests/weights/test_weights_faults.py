"""Files that would exhaust memory, hang, or raise what is no error of ours: refused by name, at once."""

import dataclasses
import json
import os
import struct
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import random_weights
from safetensors.torch import save_file

from nanogpt_fast.errors import CheckpointError, NanogptError
from nanogpt_fast.restore import restore
from nanogpt_fast.run import checkpoint
from nanogpt_fast.weights import canonical
from nanogpt_fast.weights.formats import Weights, read, sniff, write
from nanogpt_fast.weights.sources import load_pickle

HUGE = 10**9


def refusal(path: Path, within_s: float = 5.0) -> CheckpointError:
    began = time.monotonic()
    with pytest.raises(CheckpointError) as refused:
        read(path)
    assert time.monotonic() - began < within_s
    str(refused.value).encode()
    return refused.value


@pytest.fixture(autouse=True)
def no_name_list_of_a_model_that_is_not_there(monkeypatch):
    """A billion names would fill the memory of whoever runs this: the list alone fails the test."""
    names = canonical.GPTConfig.parameter_shapes

    def counted(self: Any) -> dict:
        assert self.n_layer < 1000, "the names of a model were built before its size was held against the file's"
        return names(self)

    monkeypatch.setattr(canonical.GPTConfig, "parameter_shapes", counted)


def small(**changes: Any) -> Weights:
    shape: dict[str, Any] = {"n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 20, "block_size": 4}
    shape["activation"] = "gelu_tanh"
    return random_weights(**(shape | changes))


def hf(tmp_path: Path, **config: Any) -> Path:
    folder = write(small(), tmp_path / "hf", "hf")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def ckpt(tmp_path: Path, change: Any, **shape: Any) -> Path:
    path = write(small(**shape), tmp_path / "ckpt.pt", "nanogpt")
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)
    return path


# ---- sizes that the file does not bear out ----


@pytest.mark.parametrize("key", ["n_layer", "n_embd", "n_positions", "vocab_size"])
def test_a_huge_size_in_config_json(tmp_path, key):
    said = refusal(hf(tmp_path, **{key: HUGE}, n_head=1))
    assert "too small for the model" in said.what and str(HUGE) in said.where and "bytes" in said.found


@pytest.mark.parametrize("key", ["n_layer", "n_embd", "block_size", "vocab_size"])
def test_a_huge_size_in_ckpt_pt(tmp_path, key):
    said = refusal(ckpt(tmp_path, lambda s: s["model_args"].update({key: HUGE, "n_head": 1})))
    assert "too small for the model" in said.what and str(HUGE) in said.where


@pytest.mark.parametrize("slot", [2, 3, 4, 6])
def test_a_huge_size_in_an_llmc_header(tmp_path, slot):
    path = write(small(), tmp_path / "m.bin", "llmc")
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, 4 * slot, HUGE)
    struct.pack_into("<i", data, 4 * 5, 1)  # heads divide any width
    path.write_bytes(data)
    assert "too small for the model" in refusal(path).what


def test_many_thin_layers_are_no_way_around(tmp_path):
    """13 numbers a layer of width 1: the file bears 100,000 of them out, and their names take far more than it."""
    args = {"n_layer": 10_001, "n_embd": 1, "n_head": 1, "vocab_size": 20}
    said = refusal(ckpt(tmp_path, lambda s: s["model_args"].update(args), vocab_size=30_000))
    assert "10,000 layers at most" in said.expected


@pytest.mark.parametrize("key", ["n_layer", "vocab_size"])
def test_a_huge_size_in_state_json(tmp_path, key):
    write(small(), tmp_path, "native")
    content = checkpoint.load(checkpoint.list_steps(tmp_path)[12])
    content.model_args[key] = HUGE
    checkpoint.save(tmp_path, content, keep_last=9)
    assert "too small for the model" in refusal(tmp_path).what


def test_a_tensor_that_repeats_one_number(tmp_path):
    def change(saved: dict) -> None:
        saved["model"]["transformer.wte.weight"] = torch.zeros(1, 1).expand(10**6, 10**6)

    said = refusal(ckpt(tmp_path, change))
    assert "larger than what is stored" in said.what and "wte" in said.where


def test_one_tensor_under_many_names_is_not_copied_for_each(tmp_path):
    """2,000 names of one tensor of 4 MB would be 8 GB as copies."""
    row = torch.zeros(10**6)
    began = time.monotonic()
    refusal(ckpt(tmp_path, lambda s: s["model"].update({f"x.{i}": row[:-1] for i in range(2000)})))
    assert time.monotonic() - began < 5


def test_a_compressed_archive_is_refused_unread(tmp_path):
    path = write(small(), tmp_path / "ckpt.pt", "nanogpt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert "compressed" in refusal(tmp_path / "z.pt").found


# ---- what is no regular file ----


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices are POSIX's")
@pytest.mark.parametrize("odd", ["pipe", "device", "socketless folder"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]
)
def test_pipes_and_devices_in_a_folder(tmp_path, name, odd):
    folder = hf(tmp_path)
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    make_odd(folder / name, odd)
    said = refusal(folder)
    assert name in f"{said.where} {said.found}"


def make_odd(path: Path, odd: str) -> None:
    if odd == "pipe":
        os.mkfifo(path)
    elif odd == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices are POSIX's")
@pytest.mark.parametrize("odd", ["pipe", "device"])
def test_pipes_and_devices_as_the_path_itself(tmp_path, odd):
    make_odd(tmp_path / "m.pt", odd)
    assert "not a regular file" in refusal(tmp_path / "m.pt").what
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_pickle(tmp_path / "m.pt")
    (tmp_path / "out").mkdir()
    make_odd(tmp_path / "out/ckpt.pt", odd)
    assert "ckpt.pt" in refusal(tmp_path / "out").found


# ---- values that no reader expects ----

CONFIGS = {
    "deeply nested": '{"model_type": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "infinity": '{"model_type": "gpt2", "n_layer": Infinity}',
    "not a number": '{"n_layer": NaN}',
    "5000 digits": '{"n_layer": ' + "9" * 5000 + "}",
    "no object": "[]",
    "utf-16": '{"model_type": "gpt2"}'.encode("utf-16").decode("latin1"),
    "a lone surrogate": '{"model_type": "\\ud800"}',
    "empty": "",
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_json_of_strange_text(tmp_path, case):
    folder = hf(tmp_path)
    (folder / "config.json").write_bytes(CONFIGS[case].encode("latin1"))
    assert "config.json" in refusal(folder).where or "utf" in case


@pytest.mark.parametrize("key", ["n_layer", "n_head", "n_embd", "n_positions", "vocab_size"])
@pytest.mark.parametrize("value", [-1, 0, 1.5, True, "2", None, [], {}, 10**30, 1e308])
def test_sizes_of_other_kinds_in_config_json(tmp_path, key, value):
    assert refusal(hf(tmp_path, **{key: value})).what


@pytest.mark.parametrize("value", [["gelu"], {"a": 1}, None, 7, "GELU"])
def test_activations_of_other_kinds(tmp_path, value):
    assert "activation" in refusal(hf(tmp_path, activation_function=value)).what


@pytest.mark.parametrize(
    "weight_map",
    [[], {}, {"a": 1}, {"a": "/etc/passwd"}, {"a": ".."}, {"a": ""}, {"a": "x\0y"}, {"a": "n" * 300}, {"a": "gone"}],
    ids=str,
)
def test_an_index_that_leads_nowhere(tmp_path, weight_map):
    folder = hf(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "safetensors" in (said := refusal(folder)).where or said.hint


@pytest.mark.parametrize("name", ["n" * 300, "a/" + "n" * 300 + "/b"])
def test_a_name_that_is_too_long_is_an_error_of_ours_or_the_systems(tmp_path, name):
    for call in (sniff, read, lambda path: restore(str(path), "")):
        with pytest.raises((NanogptError, OSError)):
            call(tmp_path / name)
    with pytest.raises(CheckpointError):
        write(small(), tmp_path / name, "hf")


VALUES = {
    "iter_num": [float("inf"), float("nan"), -1, 2.5, "7", [1], {"a": 1}, True, 10**400],
    "best_val_loss": ["low", [1.0], {"a": 1}, True, -1.0, torch.ones(2), 10**400],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in VALUES.items() for value in values], ids=str)
def test_figures_of_other_kinds_in_ckpt_pt(tmp_path, key, value):
    assert key in refusal(ckpt(tmp_path, lambda s: s.update({key: value}))).what


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None, torch.tensor(float("nan"))])
def test_a_loss_that_is_not_finite_was_never_measured(tmp_path, value):
    assert read(ckpt(tmp_path, lambda s: s.update(best_val_loss=value))).best_val_loss == float("inf")


ARGS = {
    "bias": ["yes", 1, None, [True]],
    "dropout": ["0.1", [0], 2.0, float("nan"), None],
    "n_layer": [float("inf"), 10**6000, torch.tensor(1), [2], -5],
    "n_head": [3, 0, 10**12],
}


@pytest.mark.parametrize(
    "key, value",
    [(k, v) for k, vs in ARGS.items() for v in vs],
    ids=lambda v: str(v)[:20] if not isinstance(v, int) else "int",
)
def test_model_args_of_other_kinds(tmp_path, key, value):
    assert refusal(ckpt(tmp_path, lambda s: s["model_args"].update({key: value}))).what


@pytest.mark.parametrize("key", ["model", "model_args"])
@pytest.mark.parametrize("value", [None, 7, [], "x"], ids=str)
def test_a_ckpt_pt_without_its_parts(tmp_path, key, value):
    assert "not a nanoGPT checkpoint" in refusal(ckpt(tmp_path, lambda s: s.update({key: value}))).what


@pytest.mark.parametrize("key", ["config", "optimizer"])
@pytest.mark.parametrize(
    "value",
    [None, 7, [], "x", {}, {"state": 7, "param_groups": "x"}, {"state": {0: 1}, "param_groups": [{}]}],
    ids=str,
)
def test_parts_of_ckpt_pt_that_are_done_without(tmp_path, key, value):
    found = read(ckpt(tmp_path, lambda s: s.update({key: value})))
    assert found.optimizer is None if key == "optimizer" else not {"dataset", "beta1"} & found.config.keys()


def test_names_and_a_gelu_of_other_kinds(tmp_path):
    assert refusal(ckpt(tmp_path, lambda s: s["model"].update({7: torch.ones(2), "x": "y"}))).what
    (tmp_path / "ckpt.pt").unlink()
    assert refusal(ckpt(tmp_path, lambda s: s["config"].update(activation="relu"))).what


STATES = {
    "samples_seen": ["many", -1, 1.5, [1]],
    "optimizer_step": ["x", -1, {}],
    "best_val_loss": ["low", [1]],
    "good_steps": [{}],
    "recent_losses": ["x", [1, "a"], 7],
    "fingerprint": ["x", 7, {"files": 7}, {"files": [{"name": 1}], "tokens": 5}, {"tokens": 5}, {"files": []}],
    "tokenizer": ["char", 7, [1]],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in STATES.items() for value in values], ids=str)
def test_a_state_whose_hash_is_right_and_whose_types_are_not(tmp_path, key, value):
    write(small(), tmp_path, "native")
    content = checkpoint.load(checkpoint.list_steps(tmp_path)[12])
    content.state[key] = value
    checkpoint.save(tmp_path, content, keep_last=9)
    said = str(refusal(tmp_path))
    assert key in said and "state.json" in said


@pytest.mark.parametrize("itos", [7, "abc", [1, 2], [["a"]]], ids=str)
def test_a_table_of_characters_of_another_kind_costs_an_error_of_ours(tmp_path, itos):
    write(small(), tmp_path, "native")
    content = checkpoint.load(checkpoint.list_steps(tmp_path)[12])
    content.state["tokenizer"] = {"kind": "char", "itos": itos}
    checkpoint.save(tmp_path, content, keep_last=9)
    assert read(tmp_path).used_vocab <= 20
    with pytest.raises(NanogptError):
        restore("resume", str(tmp_path)).tokenizer()


def test_tensors_of_other_types_in_safetensors(tmp_path):
    folder = write(small(), tmp_path / "hf", "hf")
    for dtype in (torch.int64, torch.bool, torch.complex64):
        save_file({"wte.weight": torch.zeros(20, 8, dtype=dtype)}, folder / "model.safetensors")
        assert refusal(folder).what


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    folder = hf(tmp_path)

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("nanogpt_fast.weights.sources.load_file", denied)
    assert "model.safetensors" in refusal(folder).where
    monkeypatch.setattr("nanogpt_fast.weights.sources.load_json", denied)
    said = refusal(folder)
    assert "config.json" in said.where and said.found == "Permission denied"


def test_a_char_table_longer_than_the_model_is_no_crash(tmp_path):
    weights = dataclasses.replace(small(), tokenizer={"kind": "char", "itos": [chr(i) for i in range(65, 95)]})
    assert read(write(weights, tmp_path / "hf", "hf")).model_args.vocab_size == 20
