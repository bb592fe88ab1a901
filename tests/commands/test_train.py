"""The trainer as a user runs it: it learns, evaluates, saves, stops and says so."""

import itertools
import json
import math
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import VOCAB, flags, metrics, train, train_process, write_dataset

from nanogpt_fast import hardware, parts, trainer
from nanogpt_fast.errors import CheckpointError, ConfigError, DataError, DeviceError, DivergedError
from nanogpt_fast.hardware import Peak
from nanogpt_fast.parts import best_val_loss_of
from nanogpt_fast.run import checkpoint
from nanogpt_fast.step import StepResult, TrainStep
from nanogpt_fast.train import main
from nanogpt_fast.trainer import Trainer

CHARACTERS = [chr(97 + i) for i in range(VOCAB)]
META = json.dumps(
    {
        "format": 1,
        "tokenizer": {"kind": "char", "itos": CHARACTERS},
        "vocab_size": VOCAB,
        "splits": {},
        "source": "",
        "created_by": "",
    }
)


def test_it_learns_and_prints_nanogpts_lines(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert train(folder, max_iters=150, eval_interval=50) == 0
    val = metrics(folder, "eval", "val_loss")
    assert val[0] == pytest.approx(math.log(VOCAB), abs=0.1) and val[150] < 2.0  # ln 3 = 1.10 is the floor
    out = capsys.readouterr().out
    assert re.search(r"^tokens per iteration will be: 32$", out, re.MULTILINE)
    assert re.search(r"^step 50: train loss \d\.\d{4}, val loss \d\.\d{4}", out, re.MULTILINE)
    assert re.search(r"^iter 7: loss \d\.\d{4}, time \d+\.\d\dms, mfu \d+\.\d\d%", out, re.MULTILINE)
    assert re.search(r"^iter 0: .* mfu n/a", out, re.MULTILINE)  # not settled yet
    assert sorted(metrics(folder, "train", "loss")) == list(range(151))  # max_iters + 1 steps, as nanoGPT


def test_products_for_the_peak_are_no_training_time(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """On a clock that products alone move by more than a tick."""
    now = itertools.count()
    skipped = [0]

    def product() -> float:
        skipped[0] += 10**9
        return 1e15

    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now) + skipped[0]))
    monkeypatch.setattr(Peak, "SPAN_S", math.inf)
    monkeypatch.setattr(hardware, "gemm", lambda *_: product)
    train(folder)
    assert skipped[0] >= 20 * 10**9, "one an iteration"
    assert max(metrics(folder, "train", "time_ms").values()) < 1e9
    assert all(0 < mfu < 100 for mfu in metrics(folder, "train", "mfu").values())


def test_mfu_against_too_low_a_peak_is_not_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(hardware, "gemm", lambda *_: lambda: 1.0)
    monkeypatch.setattr(Peak, "SPAN_S", 0.0)
    train(folder)
    assert len(re.findall(r"^iter \d+: .* mfu n/a", capsys.readouterr().out, re.MULTILINE)) == 21
    assert set(metrics(folder, "train", "mfu").values()) == set(metrics(folder, "eval", "mfu").values()) == {None}
    assert [r.getMessage()[:20] for r in caplog.records] == ["MFU is n/a from here"]


def test_all_dtypes_and_accumulation_train(folder: Path):
    losses = {}
    for dtype in ("float32", "bfloat16", "float16"):
        train(folder, dtype=dtype, gradient_accumulation_steps=2, bias=True, max_iters=60, eval_interval=60)
        losses[dtype] = metrics(folder, "eval", "val_loss")[60]
    assert max(losses.values()) < 2.6, losses


def test_eval_only_evaluates_and_writes_nothing(folder: Path):
    train(folder, eval_only=True)
    assert list(metrics(folder, "eval", "val_loss")) == [0] and not metrics(folder, "train", "loss")
    assert not (folder / "out/checkpoints").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eval_only_finds_the_losses_of_the_run(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch):
    """With the parameters alone: no gradient, no moments but the vectors', nor a checkpoint's read."""
    built, moments, run, restore = [], [], Trainer.run, parts.restore

    def noted_run(trainer: Trainer) -> int:
        built.append(trainer.optimizer)
        return run(trainer)

    def noted_restore(*args: Any, **settings: Any) -> Any:
        found = restore(*args, **settings)
        moments.append(found.optimizer)  # now: the run lets go of it
        return found

    monkeypatch.setattr(Trainer, "run", noted_run)
    monkeypatch.setattr(parts, "restore", noted_restore)
    train(folder, dtype=dtype)
    train(folder, dtype=dtype, init_from="resume", eval_only=True)
    rows = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    last, again = [(row["iter"], row["train_loss"], row["val_loss"]) for row in rows if row["kind"] == "eval"][-2:]
    assert last == again
    whole, frozen = built
    assert len(whole.m) == len(whole.flat.grad) == len(whole.flat.params) == len(frozen.flat.params)
    assert moments == [None]
    assert len(frozen.flat.grad) == 0
    vectors = frozen.flat.vectors
    assert len(frozen.m) == len(frozen.v) == len(frozen.flat.master) == vectors.stop - vectors.start


def test_full_evaluation_covers_the_split(folder: Path):
    train(folder, eval_only=True, eval_mode="full")
    train(folder, eval_only=True, eval_mode="full", batch_size=7)
    lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    first, second = [line["val_loss"] for line in lines if line["kind"] == "eval"]
    assert first == pytest.approx(second, abs=1e-6)  # the batch size regroups the sum, no more


def test_saves_only_improvements_when_asked(folder: Path):
    train(folder, always_save_checkpoint=False, max_iters=40, eval_interval=10, learning_rate=0.0, min_lr=0.0)
    assert len(checkpoint.list_steps(folder / "out")) <= 4
    losses, saved = metrics(folder, "eval", "val_loss"), set(checkpoint.list_steps(folder / "out"))
    best = math.inf
    improved = {i for i in sorted(losses) if losses[i] < best and ((best := losses[i]) or True)} - {0}
    assert saved == set(sorted(improved)[-3:])  # keep_last 2, and the best, which is the newest


def test_an_evaluation_that_is_not_a_number_is_never_the_best(folder: Path, monkeypatch: pytest.MonkeyPatch):
    losses = iter([3.0, math.nan, 2.5])
    monkeypatch.setattr(Trainer, "_estimate", lambda self, i, stop: {"train": 1.0, "val": next(losses)})
    train(folder, always_save_checkpoint=True)
    saved = {step: checkpoint.load(path).state for step, path in checkpoint.list_steps(folder / "out").items()}
    assert {step: state["best_val_loss"] for step, state in saved.items()} == {20: 2.5}  # not one of iteration 10


def test_a_best_loss_that_an_older_version_saved_as_nan_heals(folder: Path):
    for saved, best in ((math.nan, math.inf), (None, math.inf), (1.5, 1.5)):
        resumed = SimpleNamespace(state={"best_val_loss": saved})
        assert best_val_loss_of(resumed) == best  # type: ignore[arg-type]


def test_a_new_run_sets_an_older_ones_checkpoints_aside(folder: Path, capsys: pytest.CaptureFixture[str]):
    train(folder)
    train(folder, max_iters=10)
    assert list(checkpoint.list_steps(folder / "out")) == [10]
    assert "checkpoints.abandoned-1" in capsys.readouterr().out


def test_validation_data_may_be_missing(folder: Path):
    (folder / "data/toy/val.bin").unlink()
    assert train(folder) == 0
    assert not metrics(folder, "eval", "val_loss") and list(checkpoint.list_steps(folder / "out"))
    with pytest.raises(DataError):
        train(folder, eval_only=True)


def test_dry_run_trains_nothing(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert train(folder, dry_run=True) == 0
    out = capsys.readouterr().out
    assert "n_embd = 16" in out and "tokens          32 an iteration, 672 in all" in out and "memory" in out
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        (dict(dataset="toyy"), DataError, "toy"),
        (dict(vocab_size=20), DataError, "vocab_size = 20"),
        (dict(block_size=7000), DataError, "7001 tokens"),
        (dict(device="cuda:7"), DeviceError, "--device=cpu"),
        (dict(cuda_graph="on"), DeviceError, "--cuda_graph=auto"),
        (dict(init_from="resume"), CheckpointError, "no checkpoint to resume from"),
        (dict(n_head=3), ConfigError, "n_head"),
    ],
)
def test_bad_input_is_said_before_training(folder: Path, changes: dict, error: type[Exception], told: str):
    with pytest.raises(error, match=re.escape(told)):
        train(folder, **changes)
    assert not (folder / "out").exists() or "vocab_size" in changes or "block_size" in changes  # no litter of a typo


def test_divergence_stops_the_run(folder: Path):
    """A learning rate of 1e20 (composer's trick): finite weights are kept, the run ends with its own error."""
    with pytest.raises(DivergedError, match="not finite"):
        train(folder, learning_rate=1e20, min_lr=1e20, warmup_iters=0, decay_lr=False, grad_clip=0.0, max_iters=100)


def test_positions_are_cropped_on_resume(folder: Path, capsys: pytest.CaptureFixture[str]):
    train(folder, max_iters=10)
    train(folder, max_iters=20, init_from="resume", block_size=6, ignore_fingerprint=True)
    assert "positions cropped from 8 to 6" in capsys.readouterr().out
    assert checkpoint.newest(folder / "out")[0].model_args["block_size"] == 6
    with pytest.raises(ConfigError, match="longer than"):
        train(folder, init_from="resume", block_size=9)


def test_the_end_of_a_run_is_saved(folder: Path, capsys: pytest.CaptureFixture[str]):
    train(folder, max_iters=14, eval_interval=10)
    assert list(checkpoint.list_steps(folder / "out")) == [10, 15]
    assert train(folder, max_iters=12, init_from="resume") == 0
    assert "nothing to do: 15 iterations are done, --max_iters=12" in capsys.readouterr().out


def test_a_stopped_step_does_not_pass_for_an_evaluated_one(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped right before an evaluation: the checkpoint must not carry the loss of the one before."""
    real = TrainStep.__call__

    def step_and_signal(self: TrainStep, batch: torch.Tensor, iteration: int, *votes: bool) -> StepResult:
        if iteration == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, iteration, *votes)

    monkeypatch.setattr(TrainStep, "__call__", step_and_signal)
    assert train(folder, max_iters=20, eval_interval=10) == 143
    assert checkpoint.load(folder / "out/checkpoints/step_00000010").state.get("val_loss") is None
    monkeypatch.undo()
    train(folder, max_iters=20, eval_interval=10, init_from="resume")
    assert checkpoint.load(folder / "out/checkpoints/step_00000010").state["val_loss"] is not None


def test_out_of_memory_says_what_to_try(folder: Path, monkeypatch: pytest.MonkeyPatch):
    real = TrainStep.__call__

    def explode(step: TrainStep, *args: Any) -> StepResult:
        if step.device.type == "meta":  # a predicted one
            return real(step, *args)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(TrainStep, "__call__", explode)
    monkeypatch.setattr(trainer, "free_memory", lambda _: 10**9)  # by prediction it fits: the next smaller one
    with pytest.raises(DeviceError, match=r"--recompute=mlp .*--batch_size=2 --gradient_accumulation_steps=2") as error:
        train(folder)
    assert "batch_size = 4, block_size = 8, recompute = 'none'" in str(error.value)
    with pytest.raises(DeviceError, match="next: +--batch_size=4 --gradient_accumulation_steps=2"):
        train(folder, batch_size=8, recompute="block")
    with pytest.raises(DeviceError, match="--batch_size=2 --gradient_accumulation_steps=16 --batch_ramp=4:10"):
        train(folder, gradient_accumulation_steps=8, batch_ramp="2:10")
    monkeypatch.setattr(trainer, "free_memory", lambda _: 340_000)  # 8 sequences take 301,200
    with pytest.raises(DeviceError, match="--recompute=block .*--batch_size=8 --gradient_accumulation_steps=8"):
        train(folder, batch_size=64)


def test_figures_follow_a_batch_ramp(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Lines every third iteration: tokens/s are of the iterations since the last line, whose sizes may differ."""
    ramp = dict(gradient_accumulation_steps=6, batch_ramp="2:10", max_iters=12)
    train(folder, log_interval=3, eval_interval=12, **ramp)
    sizes = [2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 6, 6, 6]  # micro-batches of 32 tokens
    assert metrics(folder, "train", "tokens") == {it: 32 * sum(sizes[: it + 1]) for it in (0, 3, 6, 9, 12)}
    assert metrics(folder, "eval", "tokens") == {it: 32 * sum(sizes[:it]) for it in (0, 12)}
    means = {0: 64, 3: 64, 6: 32 * (2 + 4 + 4) / 3, 9: 128, 12: 192}
    seconds = {it: ms / 1e3 for it, ms in metrics(folder, "train", "time_ms").items()}
    rates = metrics(folder, "train", "tokens_per_s")
    assert rates == pytest.approx({it: mean / seconds[it] for it, mean in means.items()})
    capsys.readouterr()
    train(folder, dry_run=True, **ramp)
    assert f"# tokens          64, growing to 192 an iteration, {32 * sum(sizes):,} in all" in capsys.readouterr().out


@pytest.mark.parametrize("meta", [META, ""], ids=["characters", "29 ids of GPT-2"])
def test_a_document_mask_needs_a_token_that_ends_documents(folder: Path, meta: str):
    if meta:
        (folder / "data/toy/meta.json").write_text(meta)
    with pytest.raises(DataError, match="no token of these data ends a document") as caught:
        train(folder, document_mask=True)
    assert "vocab_size = 29" in caught.value.where and "50256" in caught.value.expected


def test_another_tokenizer_than_the_weights_is_said(folder: Path, caplog: pytest.LogCaptureFixture):
    train(folder, max_iters=10)
    (folder / "data/toy/meta.json").write_text(META)
    train(folder, max_iters=10, init_from=folder / "out", out_dir=folder / "second")
    assert "another tokenizer" in caplog.text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(folder: Path, number: int, code: int):
    process = train_process(folder, max_iters=100_000, eval_interval=100_000)
    wait_for(folder, iterations=20)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    (step,) = checkpoint.list_steps(folder / "out")
    assert step == max(metrics(folder, "train", "loss")) + 1  # the step in flight was finished, and is in it
    command = re.search(r"python -m nanogpt_fast\.train (.*--init_from=resume)", out)
    assert command
    assert main([*command[1].split(), f"--max_iters={step + 5}", f"--eval_interval={step + 5}"]) == 0
    assert max(metrics(folder, "train", "loss")) == step + 5


def test_shard_truncated_while_training_is_an_error_not_a_crash(folder: Path):
    write_dataset(folder, tokens=400_000)
    process = train_process(folder, max_iters=1_000_000, eval_interval=1_000_000)
    wait_for(folder, iterations=20)
    with (folder / "data/toy/train.bin").open("r+b") as file:
        file.truncate(1000)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "train.bin" in err and "Traceback" not in err


def test_numbers_do_not_depend_on_the_log_interval(folder: Path):
    train(folder, log_interval=1)
    first = checkpoint.load(folder / "out/checkpoints/step_00000020").model
    train(folder, log_interval=7)
    second = checkpoint.load(folder / "out/checkpoints/step_00000020").model
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_llmc_shards_train_too(folder: Path):
    tokens = np.fromfile(folder / "data/toy/train.bin", np.uint16)
    (folder / "data/shards").mkdir()
    for i, part in enumerate(np.array_split(tokens, 3)):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, len(part)
        name = "toy_val_000000.bin" if i == 0 else f"toy_train_{i:06d}.bin"
        (folder / "data/shards" / name).write_bytes(header.tobytes() + part.tobytes())
    assert train(folder, dataset="shards") == 0
    assert flags(folder)[0] == "--dataset=toy"


def wait_for(folder: Path, iterations: int) -> None:
    """Until the process has logged so many iterations."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        path = folder / "out/metrics.jsonl"
        if path.exists() and path.read_text().count('"train"') >= iterations:
            return
        time.sleep(0.05)
    raise AssertionError("the run did not get going")
