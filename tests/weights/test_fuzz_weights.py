"""Seeded mutations of every file that other people's weights come in: read, or refused by an error of ours.

Never another exception, never over 1 GiB, never over 10 s. Marked slow: 2,000 of each file; in the default suite a few
dozen. A failure names its seed, by which FILES[name]'s mutation makes the file again.
"""

import io
import json
import random
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import FEW, GIB, MANY, SECONDS, mutated, mutated_json, peak_bytes
from random_weights import random_weights
from safetensors.torch import load_file, save_file

from nanogpt_fast.data.tokenizer import from_json
from nanogpt_fast.errors import NanogptError
from nanogpt_fast.weights import formats, hf_tokenizer
from nanogpt_fast.weights.formats import Weights, write


def mutated_archive(data: bytes, rng: random.Random) -> bytes:
    """torch's archive with the pickle inside mutated, all sums right again; or any byte of it."""
    if rng.random() < 0.4:
        return mutated(data, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, mutated(part, rng) if name.endswith("data.pkl") else part)
    return out.getvalue()


def mutated_header(data: bytes, rng: random.Random) -> bytes:
    """safetensors: the JSON in front mutated, its length right again; or any byte."""
    if rng.random() < 0.4:
        return mutated(data, rng)
    size = int.from_bytes(data[:8], "little")
    header = mutated_json(data[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def mutated_front(data: bytes, rng: random.Random) -> bytes:
    """llm.c: the eight numbers of the header, or any byte."""
    return mutated(data, rng) if rng.random() < 0.3 else mutated(data[:32], rng).ljust(32, b"\0")[:32] + data[32:]


def small(**changes: Any) -> Weights:
    shape: dict[str, Any] = {"n_embd": 8, "n_head": 2, "n_layer": 2, "vocab_size": 20, "block_size": 4}
    return random_weights(**(shape | changes))


def ckpt(folder: Path) -> Path:
    return write(small(), folder / "out", "nanogpt")


def legacy(folder: Path) -> Path:
    path = ckpt(folder)
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    return path


def hf(folder: Path, name: str) -> Path:
    tokenizer = {"kind": "char", "itos": [chr(i) for i in range(65, 85)]}
    return write(small(tokenizer=tokenizer), folder / "hf", "hf") / name


def index(folder: Path) -> Path:
    model = hf(folder, "model.safetensors")
    tensors = load_file(model)
    halves = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for half in set(halves.values()):
        save_file({n: t for n, t in tensors.items() if halves[n] == half}, model.with_name(half))
    model.unlink()
    path = model.with_name("model.safetensors.index.json")
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": halves}))
    return path


def tokenizer_json(folder: Path) -> Path:
    path = hf(folder, "tokenizer.json")
    path.with_name("meta.json").unlink()
    return path


def vocab_json(folder: Path) -> Path:
    path = tokenizer_json(folder).with_name("vocab.json")
    path.with_name("tokenizer.json").unlink()
    path.with_name("merges.txt").write_text("#version: 0.2\na b\nab c\n")
    path.write_text(json.dumps({token: i for i, token in enumerate(["a", "b", "c", "ab", "abc", "<|endoftext|>"])}))
    return path


Mutate = Callable[[bytes, random.Random], bytes]
FILES: dict[str, tuple[Callable[[Path], Path], Mutate]] = {
    "ckpt.pt": (ckpt, mutated_archive),
    "ckpt.pt of before torch 1.6": (legacy, mutated),
    "model.safetensors": (lambda folder: hf(folder, "model.safetensors"), mutated_header),
    "config.json": (lambda folder: hf(folder, "config.json"), mutated_json),
    "index.json": (index, mutated_json),
    "m.bin": (lambda folder: write(small(activation="gelu_tanh"), folder / "m.bin", "llmc"), mutated_front),
    "tokenizer.json": (tokenizer_json, mutated_json),
    "tokenizer_config.json": (lambda f: vocab_json(f).with_name("tokenizer_config.json"), mutated_json),
    "vocab.json": (vocab_json, mutated_json),
}


@pytest.mark.skipif(sys.platform == "win32", reason="memory is measured by POSIX's getrusage")
@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_mutated_files_are_read_or_refused(tmp_path: Path, name: str, count: int):
    make, mutate = FILES[name]
    path = make(tmp_path)
    data, before, read, refused = path.read_bytes(), peak_bytes(), 0, 0
    source = path if name == "m.bin" else path.parent
    for seed in range(count):
        path.write_bytes(mutate(data, random.Random(seed)))
        began = time.monotonic()
        try:
            weights = formats.read(source)
            read += 1
            if weights.tokenizer:
                from_json(weights.tokenizer).decode([0])
                hf_tokenizer.write(weights, tmp_path)
        except NanogptError as error:
            refused += 1
            str(error).encode()
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {type(error).__name__}") from error
        assert time.monotonic() - began < SECONDS, f"{name}, seed {seed}"
        assert peak_bytes() - before < GIB, f"{name}, seed {seed}"
    assert read and refused, "mutations that all pass, or none, test nothing"
