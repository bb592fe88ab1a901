"""Saving, finding, pruning and loading checkpoints when nothing goes wrong."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_checkpoint import CONFIG, assert_whole, save_steps, tiny_checkpoint

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.run.checkpoint import Checkpoint, best, list_steps, load, newest, save, set_aside_later


def names(out_dir: Path) -> list[str]:
    return sorted(path.name for path in (out_dir / "checkpoints").iterdir())


def test_what_is_loaded_is_bit_for_bit_what_was_saved(tmp_path):
    awkward = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, 1 / 3])
    state = {"val_loss": 0.1 + 0.2, "best_val_loss": float("inf"), "config": {"a": [1, "x", None, True]}, "big": 2**63}
    tensors = {"a": awkward, "scalar": torch.tensor(7.0), "empty": torch.zeros(0, 3), "ünï": torch.rand(2, 3, 4)}
    path = save(tmp_path, Checkpoint(5, {"n_layer": 1}, tensors, {"exp_avg.a": -awkward}, state), keep_last=2)
    loaded = load(path)
    assert (loaded.step, loaded.model_args, loaded.state) == (5, {"n_layer": 1}, state)
    assert loaded.model.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.model[name].shape == tensor.shape
        assert torch.equal(loaded.model[name].view(torch.int32), tensor.view(torch.int32))
    assert torch.equal(loaded.optimizer["exp_avg.a"].view(torch.int32), (-awkward).view(torch.int32))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=12), st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=5))
def test_any_names_and_shapes_survive(tmp_path_factory, shapes):
    shapes.pop("__metadata__", None)
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    loaded = load(save(tmp_path_factory.mktemp("run"), Checkpoint(0, {}, tensors), keep_last=2))
    assert loaded.model.keys() == tensors.keys()
    assert all(torch.equal(loaded.model[name], tensors[name]) for name in tensors)


def test_views_of_one_buffer_and_transposed_tensors_are_saved_as_they_look(tmp_path):
    flat = torch.arange(12.0)
    tensors = {"first": flat[:4], "second": flat[4:].view(2, 4), "transposed": flat.view(3, 4).T}
    loaded = load(save(tmp_path, Checkpoint(1, {}, tensors), keep_last=2))
    assert all(torch.equal(loaded.model[name], tensors[name]) for name in tensors)


def test_layout_on_disk(tmp_path):
    path = save(tmp_path, tiny_checkpoint(250), keep_last=2)
    assert path == tmp_path / "checkpoints" / "step_00000250"
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert names(tmp_path) == ["step_00000250"], "nothing temporary stays"
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format_version"], manifest["step"]) == (1, 250)
    assert manifest["created_by"].startswith("nanogpt_fast ")
    assert manifest["files"].keys() == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert load_file(path / "model.safetensors").keys() == CONFIG.parameter_shapes().keys()


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        path = save(tmp_path, tiny_checkpoint(1), keep_last=2)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == {0o640}
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_weights_alone_are_a_checkpoint(tmp_path):
    checkpoint = tiny_checkpoint(3)
    checkpoint.optimizer = {}
    path = save(tmp_path, checkpoint, keep_last=2)
    assert not (path / "optimizer.safetensors").exists()
    assert load(path).optimizer == {}


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path):
    path = save(tmp_path, tiny_checkpoint(3), keep_last=2)
    for tensor in load(path).model.values():
        tensor.zero_()
    assert_whole(load(path))


def test_a_state_json_cannot_hold_is_refused_and_leaves_nothing(tmp_path):
    checkpoint = tiny_checkpoint(1)
    checkpoint.state["path"] = tmp_path
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, checkpoint, keep_last=2)
    checkpoint = tiny_checkpoint(1)
    checkpoint.model["transformer.wte.weight"] = checkpoint.model["transformer.wte.weight"].bfloat16()
    with pytest.raises(TypeError, match=r"transformer\.wte\.weight is torch\.bfloat16"):
        save(tmp_path, checkpoint, keep_last=2)
    assert names(tmp_path) == []


def test_the_newest_and_the_best_stay(tmp_path):
    for step, loss in [(10, 4.0), (20, 2.0), (30, 3.0), (40, None), (50, float("nan")), (60, 2.5)]:
        save(tmp_path, tiny_checkpoint(step, loss), keep_last=2)
    assert list(list_steps(tmp_path)) == [20, 50, 60]
    assert best(tmp_path) == tmp_path / "checkpoints" / "step_00000020"
    save(tmp_path, tiny_checkpoint(70, 2.0), keep_last=2)
    assert list(list_steps(tmp_path)) == [60, 70], "of equal losses the later one is the best"
    assert names(tmp_path) == ["step_00000060", "step_00000070"]


def test_there_is_no_best_before_an_evaluation(tmp_path):
    assert best(tmp_path) is None
    save(tmp_path, tiny_checkpoint(1), keep_last=2)
    assert best(tmp_path) is None


def test_the_same_step_is_replaced(tmp_path):
    save_steps(tmp_path, 10, 20)
    again = tiny_checkpoint(20, val_loss=1.5)
    assert load(save(tmp_path, again, keep_last=2)).state["val_loss"] == 1.5
    assert names(tmp_path) == ["step_00000010", "step_00000020"]


def test_checkpoints_of_a_later_step_never_cost_the_one_just_saved(tmp_path):
    save_steps(tmp_path, 1000, 2000)
    for step in (10, 20, 30):
        save(tmp_path, tiny_checkpoint(step), keep_last=2)
    assert list(list_steps(tmp_path)) == [20, 30, 1000, 2000]


def test_an_abandoned_future_is_moved_aside_not_deleted(tmp_path):
    save_steps(tmp_path, 10, 20, 30)
    folder = set_aside_later(tmp_path, 10)
    assert folder == tmp_path / "checkpoints.abandoned-1"
    assert list(list_steps(tmp_path)) == [10]
    assert_whole(load(tmp_path / "checkpoints.abandoned-1" / "step_00000030"))
    assert set_aside_later(tmp_path, 10) is None
    assert set_aside_later(tmp_path, -1) == tmp_path / "checkpoints.abandoned-2"
    assert list(list_steps(tmp_path)) == []


def test_latest_goes_by_step_never_by_time(tmp_path):
    paths = save_steps(tmp_path, 9, 10, 200, 100_000_000)
    for age, path in enumerate(paths):  # the higher the step, the older its time
        os.utime(path, (2_000_000_000 - age * 1000, 2_000_000_000 - age * 1000))
    assert list(list_steps(tmp_path)) == [9, 10, 200, 100_000_000]
    assert newest(tmp_path)[0].step == 100_000_000


def test_other_names_in_the_folder_are_no_checkpoints(tmp_path):
    (path,) = save_steps(tmp_path, 10)
    for name in ("step_20", "step_000000030", "step_0000004x", ".tmp-step_00000050-1@host-00000000", "notes"):
        (path.parent / name).mkdir()
    (path.parent / "step_00000060").write_text("a file")
    assert list(list_steps(tmp_path)) == [10]


def test_a_symlinked_run_directory_works(tmp_path):
    real, link = tmp_path / "disk" / "run", tmp_path / "out"
    real.mkdir(parents=True)
    link.symlink_to(real, target_is_directory=True)
    for step in (10, 20, 30):
        save(link, tiny_checkpoint(step), keep_last=2)
    assert link.is_symlink()
    assert list(list_steps(real)) == [20, 30]
    assert_whole(newest(link)[0])


def test_a_checkpoint_moved_elsewhere_behind_a_link_loads_and_is_not_pruned(tmp_path):
    out_dir, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (path,) = save_steps(out_dir, 10)
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert_whole(load(path))
    for step in (20, 30, 40):
        save(out_dir, tiny_checkpoint(step), keep_last=2)
    assert list(list_steps(out_dir)) == [10, 30, 40]


def test_nothing_there_says_what_was_looked_for_and_how_to_start(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        newest(tmp_path / "out")
    text = str(caught.value)
    assert "there is no checkpoint to resume from" in text
    assert str(tmp_path / "out" / "checkpoints") in text
    assert "step_00000250" in text
    assert "--init_from=scratch" in text


def test_a_nanogpt_run_is_recognised(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"--init_from=.*ckpt\.pt"):
        newest(tmp_path)
