"""Damaged, foreign and hostile checkpoints: found before use, named, never executed, and stepped over on resume."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_checkpoint import assert_whole, save_steps, tiny_checkpoint

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.run.checkpoint import best, load, newest, save, set_aside_later

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def edit_manifest(path: Path, edit: Callable[[dict], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def reseal(path: Path) -> None:
    """Make the manifest agree with whatever the files hold now, as an attacker would."""

    def update(manifest: dict) -> None:
        for name, entry in manifest["files"].items():
            data = (path / name).read_bytes()
            entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    edit_manifest(path, update)


def truncate(path: Path, name: str) -> None:
    os.truncate(path / name, (path / name).stat().st_size - 1)


def flip_bit(path: Path, name: str) -> None:
    data = bytearray((path / name).read_bytes())
    data[-3] ^= 0x40
    (path / name).write_bytes(data)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert caught.value.exit_code == 4
    return str(caught.value)


DAMAGE = {
    "cut short": truncate,
    "damaged": flip_bit,
    "empty": lambda path, name: os.truncate(path / name, 0),
    "too long": lambda path, name: (path / name).open("ab").write(b"x"),
    "missing": lambda path, name: (path / name).unlink(),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("word", DAMAGE)
def test_damage_is_found_named_and_stepped_over(tmp_path, name, word):
    _, path = save_steps(tmp_path, 10, 20)
    DAMAGE[word](path, name)
    text = refusal(path)
    assert f"{name} is {word}" in text
    assert str(path / name) in text
    checkpoint, _, skipped = newest(tmp_path)
    assert checkpoint.step == 10
    assert_whole(checkpoint)
    assert len(skipped) == 1
    assert skipped[0].startswith(f"skipped step_00000020 because {name} is {word}")


def test_without_the_hash_a_flipped_bit_would_load(tmp_path):
    """The reason for the manifest: the tensor library itself does not notice."""
    (path,) = save_steps(tmp_path, 10)
    flip_bit(path, "model.safetensors")
    tensors = load_file(path / "model.safetensors").values()
    assert not all((tensor == 10).all() for tensor in tensors)
    assert "sha256" in refusal(path)


def test_every_single_byte_of_the_tensors_is_covered(tmp_path):
    (path,) = save_steps(tmp_path, 10)
    file = path / "model.safetensors"
    good = file.read_bytes()
    for position in range(0, len(good), 97):
        file.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        assert "model.safetensors is damaged" in refusal(path)
    file.write_bytes(good)
    assert_whole(load(path))


def test_no_manifest(tmp_path):
    _, path = save_steps(tmp_path, 10, 20)
    (path / "manifest.json").unlink()
    assert "there is no manifest.json" in refusal(path)
    assert newest(tmp_path)[0].step == 10


@pytest.mark.parametrize("text", ["", "{", "[1]", "\0" * 64, "{'a': 1}", "[" * 100_000, '"\udcff"'])
def test_a_broken_manifest(tmp_path, text):
    (path,) = save_steps(tmp_path, 10)
    (path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "manifest.json is damaged" in refusal(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.pop("format_version"),
        lambda m: m.update(format_version="1"),
        lambda m: m.update(format_version=0),
        lambda m: m.pop("files"),
        lambda m: m.update(files=[1]),
        lambda m: m["files"].update({"model.safetensors": "hash"}),
        lambda m: m["files"]["model.safetensors"].update(sha256="g" * 64),
        lambda m: m["files"]["model.safetensors"].update(bytes="12"),
    ],
)
def test_a_manifest_of_the_wrong_form(tmp_path, edit):
    (path,) = save_steps(tmp_path, 10)
    edit_manifest(path, edit)
    assert "manifest.json is damaged" in refusal(path)


def test_a_manifest_that_lists_too_little(tmp_path):
    (path,) = save_steps(tmp_path, 10)
    edit_manifest(path, lambda m: m["files"].pop("model.safetensors"))
    assert "'model.safetensors' not listed" in refusal(path)


def test_extra_files_are_ignored(tmp_path):
    (path,) = save_steps(tmp_path, 10)
    (path / "notes.txt").write_text("mine")
    (path / "plots").mkdir()
    assert_whole(load(path))


def test_a_newer_format_asks_for_an_update(tmp_path):
    _, path = save_steps(tmp_path, 10, 20)
    edit_manifest(path, lambda m: m.update(format_version=3, created_by="nanogpt_fast 9.9", files="unknowable"))
    text = refusal(path)
    assert "written by a newer version" in text
    assert "nanogpt_fast 9.9" in text
    assert "next:     update nanogpt_fast" in text


@pytest.mark.parametrize("edit", [lambda m: m.update(step=11), lambda m: m.pop("step")])
def test_a_manifest_with_another_step(tmp_path, edit):
    (path,) = save_steps(tmp_path, 10)
    edit_manifest(path, edit)
    assert "disagree on the step" in refusal(path)


def test_a_directory_renamed_to_another_step_is_not_taken_for_it(tmp_path):
    (path,) = save_steps(tmp_path, 10)
    path.rename(path.with_name("step_00000099"))
    assert "the directory name and state.json disagree" in refusal(path.with_name("step_00000099"))
    path.with_name("step_00000099").rename(tmp_path / "my-favourite")
    assert load(tmp_path / "my-favourite").step == 10


@pytest.mark.parametrize("state", ["[]", "{}", '{"step": "10", "model_args": {}, "state": {}}', '{"step": 10'])
def test_a_state_of_the_wrong_form(tmp_path, state):
    (path,) = save_steps(tmp_path, 10)
    (path / "state.json").write_text(state)
    reseal(path)
    assert "state.json is damaged" in refusal(path)


def test_when_all_are_bad_each_reason_is_given(tmp_path):
    cut, flipped, bare = save_steps(tmp_path, 10, 20, 30)
    truncate(cut, "model.safetensors")
    flip_bit(flipped, "optimizer.safetensors")
    (bare / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        newest(tmp_path)
    text = str(caught.value)
    assert "no checkpoint can be used" in text
    assert "step_00000010 because model.safetensors is cut short" in text
    assert "step_00000020 because optimizer.safetensors is damaged" in text
    assert "step_00000030 because there is no manifest.json" in text


def test_broken_ones_are_neither_the_best_nor_pruned_nor_counted(tmp_path):
    """Also how a run goes on after stepping over a damaged checkpoint: it is moved aside, kept as evidence."""
    first, broken = save_steps(tmp_path, 10, 20)
    truncate(broken, "model.safetensors")
    checkpoint, _, _ = newest(tmp_path)
    for step in (30, 40):
        checkpoint.step = step
        save(tmp_path, checkpoint, keep_last=2)
    assert sorted(p.name[-2:] for p in broken.parent.iterdir()) == ["20", "30", "40"]
    assert not first.exists()
    assert best(tmp_path) is None
    assert set_aside_later(tmp_path, 10) == tmp_path / "checkpoints.abandoned-1"


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "..", "a/b", "sub\\x", "ckpt.pt", "manifest.json", ""]
)
def test_a_manifest_cannot_name_other_files(tmp_path, name):
    (path,) = save_steps(tmp_path, 10)
    edit_manifest(path, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
    assert f"{name!r} listed" in refusal(path)


def test_links_and_pipes_in_place_of_files_are_refused(tmp_path):
    (path,) = save_steps(tmp_path, 10)
    outside = tmp_path / "outside"
    (path / "model.safetensors").rename(outside)
    (path / "model.safetensors").symlink_to(outside)
    assert "model.safetensors is not a regular file" in refusal(path)
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")  # opened, it would block for ever
    assert "model.safetensors is not a regular file" in refusal(path)


class Payload:
    """Pickles to a call that creates a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_a_pickle_is_never_executed(tmp_path):
    executed = tmp_path / "executed"
    payload = pickle.dumps(Payload(executed))
    pickle.loads(payload)
    assert executed.exists(), "the payload works"
    executed.unlink()
    (path,) = save_steps(tmp_path, 10)
    for name in FILES:
        good = (path / name).read_bytes()
        (path / name).write_bytes(payload)
        reseal(path)
        refusal(path)
        (path / name).write_bytes(good)
    (tmp_path / "ckpt.pt").write_bytes(payload)
    refusal(tmp_path / "ckpt.pt")
    for extra in ("model.pkl", "ckpt.pt"):
        (path / extra).write_bytes(payload)
    reseal(path)
    assert_whole(load(path))
    assert not executed.exists()


def test_an_explicit_path_that_is_no_checkpoint(tmp_path):
    save_steps(tmp_path, 10)
    assert f"--init_from=resume --out_dir={tmp_path}" in refusal(tmp_path)
    assert "missing path" in refusal(tmp_path / "nowhere")


def test_an_unreadable_file_is_an_error_with_its_name(tmp_path, monkeypatch):
    (path,) = save_steps(tmp_path, 10)

    def denied(*_):
        raise PermissionError(13, "Permission denied", str(path / "model.safetensors"))

    monkeypatch.setattr("nanogpt_fast.run.manifest.sha256_of", denied)  # chmod does not stop root
    text = refusal(path)
    assert "Permission denied" in text
    assert str(path / "model.safetensors") in text


@pytest.mark.parametrize("key", ["samples_seen", "elapsed_s", "recent_losses", "fingerprint", "draws", "val_loss"])
def test_a_null_in_the_state_is_as_nothing(tmp_path: Path, key: str):
    """samples_seen: null ended a resume in a TypeError."""
    checkpoint = tiny_checkpoint(10, val_loss=1.0)
    checkpoint.state[key] = None
    assert key not in load(save(tmp_path, checkpoint, keep_last=1)).state


@pytest.mark.parametrize("key", ["samples_seen", "val_loss", "elapsed_s"])
def test_a_number_beyond_all_counts_is_damage(tmp_path: Path, key: str):
    """An integer of 400 digits is JSON; math.isfinite() of it is an OverflowError."""
    checkpoint = tiny_checkpoint(10)
    checkpoint.state[key] = 10**400
    path = save(tmp_path, checkpoint, keep_last=1)
    with pytest.raises(CheckpointError, match=rf"(?s)state.json is damaged.*state.{key}"):
        load(path)
    assert best(tmp_path) is None
