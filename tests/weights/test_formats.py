"""The door to all formats: sniff, read, write; what a destination may lose, and when."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_weights import random_weights, same_tensors

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.run.checkpoint import Checkpoint, save
from nanogpt_fast.weights import destination
from nanogpt_fast.weights.formats import Format, read, sniff, write

DESTINATIONS: dict[Format, str] = {"nanogpt": "a.pt", "hf": "hf", "llmc": "m.bin", "native": "run"}


@pytest.mark.parametrize(
    ("to", "changes"),
    [
        ("native", {}),
        ("nanogpt", {}),
        ("native", {"bias": False}),
        ("nanogpt", {"bias": False}),
        ("native", {"bias": False, "norm_bias": True, "tie_word_embeddings": False}),
    ],
)
def test_round_trip_keeps_every_bit(tmp_path, to, changes):
    weights = random_weights(dropout=0.1, **changes)
    found = read(write(weights, tmp_path / "out", to))
    assert same_tensors(found.model, weights.model)
    assert same_tensors(found.optimizer, weights.optimizer)
    for field in ("model_args", "optimizer_step", "step", "best_val_loss", "config"):
        assert getattr(found, field) == getattr(weights, field), field


@pytest.mark.parametrize("to", ["nanogpt", "llmc"])
def test_a_head_of_its_own_is_not_written_where_there_is_no_place_for_it(tmp_path, to):
    with pytest.raises(CheckpointError, match="no head of their own") as refused:
        write(random_weights(tie_word_embeddings=False), tmp_path / "out.pt", to)
    assert refused.value.where == str(tmp_path / "out.pt") and "--to=hf" in refused.value.hint
    assert not list(tmp_path.iterdir())


def test_layernorm_biases_alone_become_biases_in_all_layers(tmp_path):
    weights = random_weights(bias=False, norm_bias=True)
    found = read(write(weights, tmp_path / "ckpt.pt", "nanogpt"))
    assert found.model_args == dataclasses.replace(weights.model_args, bias=True, norm_bias=False)
    assert weights.optimizer is not None and found.optimizer is not None
    for before, after in ((weights.model, found.model), (weights.optimizer, found.optimizer)):
        assert all(
            torch.equal(after[name], before[name]) if name in before else not after[name].any() for name in after
        )
    assert len(found.model) - len(weights.model) == 4 * weights.model_args.n_layer


def test_sniff_knows_each_form(tmp_path):
    weights = random_weights()
    step = write(weights, tmp_path / "run", "native")
    assert sniff(tmp_path / "run") == sniff(step) == "native"
    ckpt = write(weights, tmp_path / "theirs", "nanogpt")
    assert ckpt == tmp_path / "theirs" / "ckpt.pt"
    assert sniff(tmp_path / "theirs") == sniff(ckpt) == "nanogpt"
    assert sniff(write(weights, tmp_path / "hf", "hf")) == "hf"
    assert sniff(write(weights, tmp_path / "model.bin", "llmc")) == "llmc"
    assert sniff("gpt2-xl") == sniff("openai-community/gpt2") == "hf"


def test_sniff_says_what_it_found_instead(tmp_path):
    shard = tmp_path / "train.bin"
    shard.write_bytes((20240520).to_bytes(4, "little") + bytes(1020))
    for path, found in [(shard, "data, not a model"), (tmp_path / "gone", "nothing there"), (tmp_path, "without any")]:
        with pytest.raises(CheckpointError, match="no weights in a known form") as refused:
            sniff(path)
        assert found in refused.value.found


def test_native_source_may_be_an_out_dir_its_newest_counts(tmp_path):
    old, new = random_weights(seed=1), dataclasses.replace(random_weights(seed=2), step=20)
    for weights in (new, old):
        model_args, state = dataclasses.asdict(weights.model_args), {"best_val_loss": None, "tokenizer": None}
        save(tmp_path, Checkpoint(weights.step, model_args, weights.model, state=state), keep_last=5)
    found = read(tmp_path)
    assert found.step == 20 and found.optimizer is None
    assert read(write(found, tmp_path / "ckpt.pt", "nanogpt")).best_val_loss == float("inf")  # never evaluated
    assert same_tensors(found.model, new.model)


def test_destination_is_kept_unless_forced(tmp_path):
    first, second = random_weights(seed=1), random_weights(seed=2)
    for to, name in DESTINATIONS.items():
        dst = tmp_path / name
        write(first, dst, to)
        with pytest.raises(CheckpointError, match="destination"):
            write(second, dst, to)
        assert same_tensors(read(dst).model, first.model)
        write(second, dst, to, force=True)
        assert same_tensors(read(dst).model, second.model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "hf", "m.bin", "run"]


def test_force_removes_no_folder_of_another_kind(tmp_path):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.txt").write_text("...")
    with pytest.raises(CheckpointError, match="replaces nothing else"):
        write(random_weights(), precious, "hf", force=True)
    assert (precious / "chapter1.txt").exists()
    (tmp_path / "empty").mkdir()
    assert sniff(write(random_weights(), tmp_path / "empty", "hf")) == "hf"


@pytest.mark.parametrize("error", [OSError("device lost"), KeyboardInterrupt()])
def test_failed_swap_puts_the_old_folder_back(tmp_path, monkeypatch, error):
    first, dst = random_weights(seed=1), tmp_path / "hf"
    write(first, dst, "hf")

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            write(random_weights(seed=2), dst, "hf", force=True)
    assert same_tensors(read(dst).model, first.model)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("name", ["hf", "a.pt"])
def test_what_is_written_is_fsynced_before_it_gets_its_name_and_the_name_after(tmp_path, monkeypatch, name):
    dst, synced = tmp_path / name, []
    monkeypatch.setattr(destination, "sync", lambda path: synced.append((path, dst.exists())))
    write(random_weights(), dst, "hf" if name == "hf" else "nanogpt")
    before = [path for path, named in synced if not named]
    assert {path.name for path in before} == {"new", *(path.name for path in dst.rglob("*"))}
    assert before[-1].name == "new" and synced[-1] == (tmp_path, True) and len(synced) == len(before) + 1


FULL_DISK = """
import resource, sys
from pathlib import Path
from random_weights import random_weights
from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.weights.formats import write
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for to, name in (("nanogpt", "a.pt"), ("hf", "hf"), ("llmc", "m.bin")):
    try:
        write(random_weights(), Path(sys.argv[1]) / name, to, force=True)
    except CheckpointError as error:
        print(to, error.what)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX's")
def test_full_disk_leaves_what_was_there(tmp_path):
    """A file size limit stands in for the full disk: the write fails midway."""
    weights = random_weights(seed=3)
    for to in ("nanogpt", "hf", "llmc"):
        write(weights, tmp_path / DESTINATIONS[to], to)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, env=env, timeout=120
    )
    assert ran.stdout.splitlines() == [f"{to} could not be written" for to in ("nanogpt", "hf", "llmc")], ran.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "hf", "m.bin"]
    for name in ("a.pt", "hf", "m.bin"):
        assert same_tensors(read(tmp_path / name).model, weights.model)
