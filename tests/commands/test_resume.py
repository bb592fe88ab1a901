"""A run cut in two is the run in one piece: parameters, moments, losses, bit for bit, dropout on, mid-epoch."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import metrics, train, write_dataset

from nanogpt_fast.errors import DataError
from nanogpt_fast.run import checkpoint
from nanogpt_fast.schedule import BatchSchedule
from nanogpt_fast.step import StepResult, TrainStep
from nanogpt_fast.train import main
from nanogpt_fast.weights import formats

CUT, END = 100, 200


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path, tokens=5_003)  # 625 windows, 3.2 batches of 4 x 2 short of a whole number an epoch
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        dict(dropout=0.2, gradient_accumulation_steps=2, norm_bias=True, tie_word_embeddings=False),
        dict(dropout=0.2, dtype="bfloat16", bias=True, activation="gelu_tanh"),
        dict(dtype="float16", max_iters=60),  # the loss scale and its counter too; slow on a CPU, so fewer steps
    ],
    ids=["float32", "bfloat16", "float16"],
)
def test_half_and_resume_is_bitwise_the_whole(folder: Path, changes: dict):
    end = changes.pop("max_iters", END)
    cut = end // 2
    train(folder, max_iters=end, eval_interval=cut, **changes)
    whole = checkpoint.load(folder / f"out/checkpoints/step_{end:08d}")
    losses, evals = metrics(folder, "train", "loss"), metrics(folder, "eval", "val_loss")
    shutil.rmtree(folder / "out")

    train(folder, max_iters=cut, eval_interval=cut, **changes)
    train(folder, max_iters=end, eval_interval=cut, init_from="resume", **changes)
    resumed = checkpoint.load(folder / f"out/checkpoints/step_{end:08d}")
    assert metrics(folder, "train", "loss") == losses and metrics(folder, "eval", "val_loss") == evals
    for kind in ("model", "optimizer"):
        ours, theirs = getattr(resumed, kind), getattr(whole, kind)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and len(ours) == len(theirs) > 0
    assert resumed.state["samples_seen"] == whole.state["samples_seen"]
    assert resumed.state["optimizer_step"] == whole.state["optimizer_step"]


def test_a_run_is_cut_inside_its_batch_ramp(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """With wsd's decay, dropout, a document mask, refused updates and rebuilt blocks too: the same bits, what was
    counted, no dropout mask twice."""
    step, counted = TrainStep.__call__, []

    def counting(self: TrainStep, batch: torch.Tensor, iteration: int, *votes: bool) -> StepResult:
        result = step(self, batch, iteration, *votes)
        counted.append(int(self.counter) - self.base)
        return result

    monkeypatch.setattr(TrainStep, "__call__", counting)
    for split in ("train", "val"):
        tokens = np.fromfile(folder / f"data/toy/{split}.bin", np.uint16)
        tokens[::7] = 50256
        tokens.tofile(folder / f"data/toy/{split}.bin")
    changes = dict(
        gradient_accumulation_steps=6, batch_ramp="2:10", schedule="wsd", lr_decay_iters=14, decay_ratio=0.6,
        dropout=0.2, document_mask=True, vocab_size=50304, n_layer=1, n_embd=8, batch_size=2,
        skip_step_sigma=0.6, skip_step_window=3, recompute="block", learning_rate=1e-3, min_lr=1e-4,
    )  # fmt: skip
    end, cut, batches = 14, 8, BatchSchedule(2, 6, 10, tokens_a_micro_batch=2 * 8)
    train(folder, max_iters=end, eval_interval=end, **changes)
    whole = checkpoint.load(folder / f"out/checkpoints/step_{end:08d}")
    losses, tokens = metrics(folder, "train", "loss"), metrics(folder, "train", "tokens")
    val_loss, refused = metrics(folder, "eval", "val_loss")[0], metrics(folder, "refused", "loss")
    assert min(refused) < cut < max(refused) and len(refused) < end / 2
    assert counted == [batches.micro_batches_before(it + 1) for it in range(end + 1)]
    shutil.rmtree(folder / "out")
    train(folder, max_iters=cut, eval_interval=cut, **changes)
    assert main(["--config", str(folder / "out/config.toml"), "--init_from=resume", f"--max_iters={end}",
                 f"--eval_interval={end}"]) == 0  # fmt: skip
    resumed = checkpoint.load(folder / f"out/checkpoints/step_{end:08d}")
    assert metrics(folder, "train", "loss") == losses and metrics(folder, "refused", "loss") == refused
    assert all(torch.equal(resumed.model[name], whole.model[name]) for name in whole.model)
    assert resumed.state["optimizer_step"] == whole.state["optimizer_step"] < end
    assert resumed.state["samples_seen"] == whole.state["samples_seen"] == 2 * batches.micro_batches_before(end)
    assert tokens == {it: batches.tokens_before(it + 1) for it in range(end + 1)} == metrics(folder, "train", "tokens")
    assert counted[end + 1 :] == counted[: cut + 1] + counted[cut : end + 1]  # iteration `cut` came twice
    train(folder, max_iters=0, out_dir=folder / "unmasked", **{**changes, "document_mask": False})
    lines = [json.loads(line) for line in (folder / "unmasked/metrics.jsonl").read_text().splitlines()]
    assert [line["val_loss"] for line in lines if line["kind"] == "eval"] != [val_loss]


def test_resuming_with_the_written_config_needs_no_other_flag(folder: Path):
    train(folder, max_iters=10)
    assert main(["--config", str(folder / "out/config.toml"), "--init_from=resume", "--max_iters=20"]) == 0
    assert max(metrics(folder, "train", "loss")) == 20


def test_a_damaged_newest_checkpoint_is_skipped_and_named(folder: Path, capsys: pytest.CaptureFixture[str], caplog):
    train(folder, max_iters=20)
    path = folder / "out/checkpoints/step_00000020/model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    train(folder, max_iters=20, init_from="resume")
    assert "step_00000020" in caplog.text and "model.safetensors" in caplog.text
    assert "step_00000010" in capsys.readouterr().out
    assert checkpoint.load(folder / "out/checkpoints/step_00000020")  # written anew


def test_changed_data_are_refused_unless_accepted(folder: Path):
    train(folder, max_iters=10)
    tokens = np.fromfile(folder / "data/toy/train.bin", np.uint16)
    tokens[:100] = 0
    tokens.tofile(folder / "data/toy/train.bin")
    with pytest.raises(DataError, match="changed since the checkpoint"):
        train(folder, init_from="resume")
    assert train(folder, init_from="resume", ignore_fingerprint=True) == 0


def test_the_schedule_may_change_and_the_data_order_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Another batch size on resume: the samples go on where they were, not at iteration x the new batch."""
    train(folder, max_iters=10)
    capsys.readouterr()
    train(folder, max_iters=20, init_from="resume", batch_size=8, learning_rate=1e-4)
    told = "changed since the checkpoint: batch_size 4 -> 8, learning_rate 0.01 -> 0.0001, max_iters 10 -> 20"
    assert told in capsys.readouterr().out
    state = json.loads((folder / "out/checkpoints/step_00000020/state.json").read_text())["state"]
    assert state["samples_seen"] == 10 * 4 + 10 * 8


def test_finetuning_starts_at_zero_with_fresh_moments(folder: Path):
    train(folder, max_iters=10)
    shutil.move(folder / "out", folder / "first")
    train(folder, max_iters=10, init_from=folder / "first", always_save_checkpoint=True)
    state = checkpoint.load(folder / "out/checkpoints/step_00000010").state
    assert state["optimizer_step"] == 10 and min(metrics(folder, "train", "loss")) == 0


@pytest.mark.parametrize("forms", [["nanogpt"], ["nanogpt", "native"], ["native"]], ids=" then ".join)
def test_a_converted_run_goes_on_as_the_run_itself(folder: Path, forms: list[formats.Format]):
    """Also without what nanoGPT does not keep: the samples seen, the data's fingerprint, the loss scale."""
    train(folder, max_iters=20)
    losses = metrics(folder, "train", "loss")
    whole = checkpoint.load(folder / "out/checkpoints/step_00000020")
    path = folder / "out/checkpoints/step_00000010"
    for form in forms:
        formats.write(formats.read(path), folder / form, form)
        path = folder / form
    shutil.rmtree(folder / "out")
    shutil.move(path, folder / "out")

    assert train(folder, max_iters=20, init_from="resume") == 0
    assert metrics(folder, "train", "loss") == {i: loss for i, loss in losses.items() if i >= 10}
    resumed = checkpoint.load(folder / "out/checkpoints/step_00000020")
    assert all(torch.equal(resumed.model[name], whole.model[name]) for name in whole.model)
    for key in ("optimizer_step", "samples_seen", "best_val_loss", "val_loss", "fingerprint"):
        assert resumed.state[key] == whole.state[key]


def test_a_copy_by_conversion_keeps_all_of_the_state(folder: Path):
    train(folder, max_iters=10)
    state = checkpoint.load(folder / "out/checkpoints/step_00000010").state
    copy = formats.write(formats.read(folder / "out"), folder / "copy", "native")
    assert checkpoint.load(copy).state == state and state["fingerprint"]
    assert checkpoint.best(folder / "copy") == copy


def test_a_nanogpt_checkpoint_with_no_best_loss_and_no_moments_is_resumed(folder: Path):
    train(folder, max_iters=10)
    path = formats.write(formats.read(folder / "out"), folder / "theirs", "nanogpt")
    saved = torch.load(path, weights_only=True)
    shutil.rmtree(folder / "out")
    (folder / "out").mkdir()
    kept = {key: saved[key] for key in ("model", "model_args", "iter_num")}
    torch.save(kept, folder / "out/ckpt.pt")
    assert train(folder, max_iters=20, init_from="resume") == 0
    state = checkpoint.load(folder / "out/checkpoints/step_00000020").state
    assert state["optimizer_step"] == 10 and min(metrics(folder, "train", "loss")) == 10


def test_training_from_the_best_starts_at_zero_with_its_weights(folder: Path):
    train(folder, max_iters=10)
    path = folder / "out/checkpoints/step_00000010"
    worse = checkpoint.load(path)
    worse.step, worse.state["val_loss"] = 20, 9.0
    worse.model = {name: torch.zeros_like(tensor) for name, tensor in worse.model.items()}
    checkpoint.save(folder / "out", worse, keep_last=9)
    train(folder, max_iters=10, init_from=path, out_dir=folder / "by-path")

    train(folder, max_iters=10, init_from="best", always_save_checkpoint=True)
    lines = [json.loads(line) for line in (folder / "by-path/metrics.jsonl").read_text().splitlines()]
    assert metrics(folder, "train", "loss") == {r["iter"]: r["loss"] for r in lines if r["kind"] == "train"}
    assert checkpoint.load(path).state["optimizer_step"] == 10
    assert list(checkpoint.list_steps(folder / "out")) == [10], "the old run is set aside"
