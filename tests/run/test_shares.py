"""Checkpoints whose state several ranks wrote: put together they are the one that one process writes; what is missing,
late or damaged is named."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.files import sha256_of
from nanogpt_fast.memory import Unheard
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import REFERENCE
from nanogpt_fast.optim import AdamW, FlatParameters
from nanogpt_fast.run import checkpoint, shares
from nanogpt_fast.run.checkpoint import Checkpoint, Ranks, SaveFailed
from nanogpt_fast.run.rundir import meeting_point
from nanogpt_fast.settings.config import GPTConfig, OptimConfig

CONFIG = GPTConfig(block_size=8, vocab_size=37, n_layer=3, n_head=2, n_embd=16, bias=True)
MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_of(rank: int, ranks: int) -> AdamW:
    """Weights that are always the same, and moments; this rank's share of them."""
    model = GPT(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    world = Unheard(rank, ranks)
    flat = FlatParameters(model, torch.float32, world.device, world, sharded=True, bucket_mb=1e-3)
    optimizer = AdamW(flat, OptimConfig(), REFERENCE)
    names, generator = list(flat.slices), torch.Generator().manual_seed(1)
    moments = {f"{kind}.{n}": torch.randn(flat.shapes[n], generator=generator) for kind in MOMENTS for n in names}
    optimizer.load_state_dict(moments, {"optimizer_step": 7})
    return optimizer


def share_of(optimizer: AdamW, rank: int, step: int = 10) -> Checkpoint:
    flat = optimizer.flat
    held = zip(shares.KINDS, (flat.master, optimizer.m, optimizer.v))
    tensors = {f"{kind}.{n}@{first}": run for kind, buf in held for n, first, run in flat.runs(buf, rank == 0)}
    shapes = {name: list(shape) for name, shape in flat.shapes.items()}
    return Checkpoint(step, asdict(CONFIG), tensors, {}, {"val_loss": 2.0, "shapes": shapes})


def save_shares(out: Path, ranks: int, step: int = 10, patience: float = 20.0, absent: int = -1) -> Path:
    """As the ranks of a run: rank 0 in this thread, the others beside it."""
    meeting = meeting_point()

    def save(rank: int) -> Path:
        content = share_of(optimizer_of(rank, ranks), rank, step)
        return checkpoint.save(out, content, keep_last=2, ranks=Ranks(rank, ranks, meeting, patience))

    others = [threading.Thread(target=save, args=(rank,)) for rank in range(1, ranks) if rank != absent]
    for other in others:
        other.start()
    try:
        return save(0)
    finally:
        for other in others:
            other.join()


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_shares_are_the_whole(tmp_path: Path, ranks: int):
    path = save_shares(tmp_path, ranks)
    assert sorted(p.name for p in path.iterdir()) == sorted(
        [*(f"share_{rank:04d}.safetensors" for rank in range(ranks)), "state.json", "manifest.json"]
    )
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name], "nothing is left beside it"
    found, alone = checkpoint.load(path), optimizer_of(0, 1)
    assert list(found.model) == list(CONFIG.parameter_shapes())
    for name, tensor in alone.flat.named(alone.flat.master).items():
        assert torch.equal(found.model[name], tensor), name
    for name, tensor in alone.state_dict()[0].items():
        assert torch.equal(found.optimizer[name], tensor), name
    assert found.step == 10 and found.state == {"val_loss": 2.0}


def test_shares_are_kept_and_pruned_as_others_are(tmp_path: Path):
    for step in (10, 20, 30, 40):
        save_shares(tmp_path, 2, step)
    assert list(checkpoint.list_steps(tmp_path)) == [30, 40]  # the best, of equals the last, is among the newest
    assert checkpoint.newest(tmp_path)[0].step == 40 and checkpoint.best(tmp_path) is not None


def test_nothing_is_published_before_every_share_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rank 1 writes slowly; rank 0 has long been done."""
    real = shares.write_file

    def slow(path: Path, chunks: Any) -> dict[str, Any]:
        if path.name == shares.file_of(1):
            time.sleep(0.4)
        return real(path, chunks)

    monkeypatch.setattr(shares, "write_file", slow)
    assert checkpoint.load(save_shares(tmp_path, 2)).step == 10


def test_a_rank_that_does_not_write_is_named(tmp_path: Path):
    save_shares(tmp_path, 3)
    with pytest.raises(SaveFailed, match=r"rank 2 of 3 has not written its share within 0 s"):
        save_shares(tmp_path, 3, step=20, patience=0.3, absent=2)
    assert list(checkpoint.list_steps(tmp_path)) == [10], "older ones are untouched"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000010"]


def test_a_rank_whose_disk_is_full_says_so_to_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = shares.write_file

    def full(path: Path, chunks: Any) -> dict[str, Any]:
        if path.name == shares.file_of(1):
            raise OSError(28, "No space left on device")
        return real(path, chunks)

    monkeypatch.setattr(shares, "write_file", full)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # the other rank's own SaveFailed
    with pytest.raises(SaveFailed, match="rank 1 of 2: No space left on device"):
        save_shares(tmp_path, 2)
    assert checkpoint.list_steps(tmp_path) == {}


# ---- what is damaged ----


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change share 1's tensors, the manifest knowing of it: a hash proves who wrote last, not what."""
    file = path / shares.file_of(1)
    tensors = load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, file)
    rewrite(path, file)


def rewrite(path: Path, file: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def edit_shapes(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    state = json.loads((path / "state.json").read_text())
    change(state["state"])
    (path / "state.json").write_text(json.dumps(state))
    rewrite(path, path / "state.json")


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    (path / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v != "drop"}))


def first_key(tensors: dict[str, Any]) -> str:
    return next(key for key in sorted(tensors) if key.startswith("model."))


def longer(tensors: dict[str, Any]) -> None:
    key = first_key(tensors)
    tensors[key] = torch.cat([tensors[key], torch.zeros(1)])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a share is missing": (lambda path: (path / shares.file_of(1)).unlink(), "share_0001.safetensors is missing"),
    "a share is cut": (
        lambda path: (path / shares.file_of(1)).write_bytes(b"123"),
        "share_0001.safetensors is cut short",
    ),
    "a run is missing": (lambda path: edit(path, lambda t: t.pop(first_key(t))), "do not make up a parameter"),
    "a run is too long": (lambda path: edit(path, longer), "do not make up a parameter"),
    "a run is there twice": (
        lambda path: edit(path, lambda t: t.update({"model.transformer.wte.weight@0": torch.zeros(4)})),
        "do not make up a parameter",
    ),
    "a run is of nothing": (
        lambda path: edit(path, lambda t: t.update({"model.other@0": torch.zeros(4)})),
        "a parameter that the state has not",
    ),
    "a tensor is no run": (
        lambda path: edit(path, lambda t: t.update(odd=torch.zeros(4))),
        "a share holds what is none",
    ),
    "a run is a matrix": (
        lambda path: edit(path, lambda t: t.update({first_key(t): torch.zeros(2, 2)})),
        "a share holds what is none",
    ),
    "no shapes": (lambda path: edit_shapes(path, lambda s: s.pop("shapes")), "damaged at shapes"),
    "a shape is wrong": (
        lambda path: edit_shapes(path, lambda s: s["shapes"].update({"transformer.wte.weight": [37, 17]})),
        "transformer.wte.weight",
    ),
    "a shape is none": (
        lambda path: edit_shapes(path, lambda s: s["shapes"].update({"transformer.wte.weight": [-1, "x"]})),
        "damaged at shapes",
    ),
    "another number of shares": (lambda path: edit_manifest(path, shares=3), "share_0002.safetensors' not listed"),
    "no number of shares": (lambda path: edit_manifest(path, shares="many"), "shares is 'many'"),
    "a number beyond all": (lambda path: edit_manifest(path, shares=10**9), "shares is 1000000000"),
    "shares that are not said": (lambda path: edit_manifest(path, shares="drop"), "does not list a checkpoint's files"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    for step in (10, 20):
        save_shares(out, 2, step)
    return out


@pytest.mark.parametrize(("damage", "what"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_share_is_refused_and_the_checkpoint_before_it_taken(
    whole: Path, tmp_path: Path, damage: Callable[[Path], Any], what: str
):
    shutil.copytree(whole, tmp_path / "out")
    path = tmp_path / "out/checkpoints/step_00000020"
    damage(path)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path)
    assert what in str(error.value)
    assert checkpoint.newest(tmp_path / "out")[0].step == 10


def test_a_flipped_bit_is_found(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "out")
    file = tmp_path / "out/checkpoints/step_00000020" / shares.file_of(1)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"share_0001.safetensors is damaged"):
        checkpoint.load(file.parent)
