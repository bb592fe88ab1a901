"""The command: what it finds, writes, warns of, refuses."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from random_weights import random_weights, same_tensors

from nanogpt_fast import conversion, convert
from nanogpt_fast.errors import CheckpointError, ConfigError
from nanogpt_fast.weights.formats import read, write


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *argv: str) -> str:
    convert.main(list(argv))
    return capsys.readouterr().out


def test_through_every_form_and_back(capsys):
    """native -> nanogpt -> hf -> llmc -> native: the weights stay, bit for bit."""
    weights = random_weights(activation="gelu_tanh")
    write(weights, Path("run"), "native")
    run(capsys, "run", "a.pt", "--to", "nanogpt")
    run(capsys, "a.pt", "hf", "--to=hf")
    run(capsys, "hf", "m.bin", "--to", "llmc")
    out = run(capsys, "m.bin", "back", "--to", "native")
    assert "found   llm.c model file m.bin" in out
    assert "wrote   nanogpt_fast checkpoint back/checkpoints/step_00000000" in out
    assert same_tensors(read("back").model, weights.model)
    assert read("back").model_args == weights.model_args
    assert read("a.pt").optimizer_step == 12 and read("back").optimizer is None


def test_tells_what_it_found_and_what_comes_next(capsys):
    write(random_weights(), Path("run"), "native")
    out = run(capsys, "run", "theirs", "--to", "nanogpt")
    for part in (
        "found   nanogpt_fast checkpoint run",
        "0.11M parameters: 2 layers, 4 heads, width 64",
        "context 16, vocabulary 100, exact GELU, biases",
        "step 12, optimizer state: 12 updates",
        "wrote   nanoGPT checkpoint theirs/ckpt.pt, 1.3 MB, float32",
        "next    python sample.py --out_dir=theirs",
    ):
        assert part in out
    assert "note" not in out  # nothing is lost on this way
    assert "next    mv a.pt OUT/ckpt.pt; python sample.py --out_dir=OUT" in run(
        capsys, "run", "a.pt", "--to", "nanogpt"
    )
    assert "next    python -m nanogpt_fast.sample --out_dir=new\n" in run(capsys, "a.pt", "new", "--to", "native")


@pytest.mark.parametrize(
    ("to", "changes", "notes"),
    [
        ("llmc", {}, ["optimizer's state is dropped", "tanh GELU"]),
        ("llmc", {"activation": "gelu_tanh"}, ["optimizer's state is dropped"]),
        ("hf", {"optimizer": False}, ["no transformers tokenizer"]),
        ("hf", {"optimizer": False, "bias": False}, ["no biases", "no transformers tokenizer"]),
        ("hf", {"optimizer": False, "vocab_size": 50304, "n_layer": 1}, ["vocabulary cut from 50304 to 50257"]),
        ("nanogpt", {"activation": "gelu_tanh"}, ["nanoGPT computes the exact GELU"]),
        ("nanogpt", {"vocab_size": 50304, "bias": False, "n_layer": 1}, []),
        ("nanogpt", {"bias": False, "norm_bias": True}, ["would train those that are zeros"]),
        ("hf", {"optimizer": False, "bias": False, "norm_bias": True}, ["in its Linear", "no transformers tokenizer"]),
    ],
)
def test_says_what_is_lost_and_nothing_else(to, changes, notes):
    lines = conversion.losses(random_weights(**changes), to)
    assert len(lines) == len(notes)
    for line, note in zip(lines, notes):
        assert note in line


def test_character_table_comes_from_the_dataset(capsys):
    itos = [chr(n) for n in range(32, 132)]
    Path("data/tiny").mkdir(parents=True)
    meta = {"format": 1, "vocab_size": 100, "tokenizer": {"kind": "char", "itos": itos}, "splits": {}}
    Path("data/tiny/meta.json").write_text(json.dumps(meta))
    write(random_weights(), Path("a.pt"), "nanogpt")  # its config says dataset = tiny
    run(capsys, "a.pt", "hf", "--to", "hf")
    assert json.loads(Path("hf/meta.json").read_text())["tokenizer"]["itos"] == itos
    run(capsys, "a.pt", "run", "--to", "native")
    assert read("run").tokenizer == meta["tokenizer"]


def test_dataset_name_from_a_file_is_not_followed_as_a_path(capsys):
    Path("elsewhere").mkdir()
    meta = {"format": 1, "vocab_size": 100, "tokenizer": {"kind": "char", "itos": ["x"]}, "splits": {}}
    Path("elsewhere/meta.json").write_text(json.dumps(meta))
    Path("data").mkdir()
    weights = dataclasses.replace(random_weights(), config={"dataset": "../elsewhere"})
    write(weights, Path("a.pt"), "nanogpt")
    run(capsys, "a.pt", "hf", "--to", "hf")
    assert not Path("hf/meta.json").exists()


def test_destination_needs_force(capsys):
    write(random_weights(seed=1), Path("a.pt"), "nanogpt")
    write(random_weights(seed=2), Path("m.bin"), "llmc")
    with pytest.raises(CheckpointError, match="--force"):
        run(capsys, "a.pt", "m.bin", "--to", "llmc")
    run(capsys, "a.pt", "m.bin", "--to", "llmc", "--force")
    assert same_tensors(read("m.bin").model, read("a.pt").model)


def test_half_precision(capsys):
    write(random_weights(), Path("a.pt"), "nanogpt")
    assert "bfloat16" in run(capsys, "a.pt", "m.bin", "--to", "llmc", "--dtype", "bfloat16")
    assert Path("m.bin").stat().st_size < Path("a.pt").stat().st_size / 5  # two bytes, no moments


@pytest.mark.parametrize(("to", "dtype"), [("llmc", "float16"), ("nanogpt", "bfloat16"), ("native", "float16")])
def test_dtype_the_form_lacks_is_refused_before_anything_is_read(to, dtype):
    with pytest.raises(ConfigError, match="dtype"):
        convert.main(["nowhere", "dst", "--to", to, "--dtype", dtype])


def test_exit_code_and_short_message():
    command = [sys.executable, "-m", "nanogpt_fast.convert", "nowhere", "dst", "--to", "hf"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert ran.returncode == 4
    assert ran.stderr.startswith("error: no weights in a known form")
    assert "Traceback" not in ran.stderr
