"""--micro_batch=auto and --dry_run --on: what fits is found before step one, and the tokens stay the same."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
from tiny_run import VOCAB, metrics, train
from torch import Tensor

from nanogpt_fast import dry_run, parts
from nanogpt_fast.distributed import World
from nanogpt_fast.errors import ConfigError, DeviceError
from nanogpt_fast.memory import batch_flags, peak, plan_of
from nanogpt_fast.ops import REFERENCE
from nanogpt_fast.run import checkpoint
from nanogpt_fast.schedule import BatchSchedule
from nanogpt_fast.settings.cli import load_config
from nanogpt_fast.settings.config import Config
from nanogpt_fast.train import main

TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=VOCAB, data_order="shuffle")
CPU = torch.device("cpu")


def room_for(batch_size: int, sequences: int = 8) -> int:
    """Free bytes of which, less the reserve, so large a micro-batch just fits."""
    config = Config().replace(**TINY, batch_size=batch_size, gradient_accumulation_steps=sequences // batch_size)
    held = peak(plan_of(config, config.shape(VOCAB), REFERENCE, torch.float32, CPU))
    return int(sum(held.values()) / 0.9) + 1


def test_the_largest_that_fits_is_trained_with_and_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(parts, "free_memory", lambda _: room_for(4))
    train(folder, batch_size=1, gradient_accumulation_steps=8, micro_batch="auto")
    out = capsys.readouterr().out
    assert re.search(
        r"^micro-batch of 4 sequences, 2 a rank and iteration: the largest whose predicted .* 10%$", out, re.M
    )
    found = metrics(folder, "train", "loss")
    written = tomllib.loads((folder / "out/config.toml").read_text())
    assert (written["data"]["batch_size"], written["data"]["gradient_accumulation_steps"]) == (4, 2)
    assert written["system"]["micro_batch"] == ""
    state = checkpoint.load(folder / "out/checkpoints/step_00000020").state
    assert state["config"]["batch_size"] == 4 and state["samples_seen"] == 20 * 8
    train(folder, batch_size=4, gradient_accumulation_steps=2, out_dir=folder / "by_hand")
    (folder / "out").rename(folder / "auto")
    (folder / "by_hand").rename(folder / "out")
    assert metrics(folder, "train", "loss") == found


def test_ranks_take_what_fits_on_each(monkeypatch: pytest.MonkeyPatch):
    config = Config().replace(**TINY, batch_size=1, gradient_accumulation_steps=16, micro_batch="auto")
    monkeypatch.setattr(parts, "free_memory", lambda _: 10**9)

    def other_rank_fits_two(self: World, votes: Tensor) -> None:
        if not votes.is_meta:  # a predicted step's gradient is
            assert votes.tolist() == [8, 0], "8 sequences a rank, and all of them fit here"
            votes[1] = 2

    monkeypatch.setattr(World, "all_reduce_", other_rank_fits_two)
    args = config.shape(VOCAB), REFERENCE, torch.float32, World(0, 2), lambda _: None
    data = parts.fit_micro_batch(config, *args).data
    assert (data.batch_size, data.gradient_accumulation_steps) == (2, 8)


def test_a_batch_ramp_keeps_its_tokens(monkeypatch: pytest.MonkeyPatch):
    """12 sequences growing to 24: the largest divisor of both; the ramp counts the new micro-batches."""
    config = Config().replace(**TINY, batch_size=2, gradient_accumulation_steps=12, batch_ramp="6:100")
    monkeypatch.setattr(parts, "free_memory", lambda _: 10**9)
    args = config.shape(VOCAB), REFERENCE, torch.float32, World(), lambda _: None
    data = parts.fit_micro_batch(config, *args).data
    assert (data.batch_size, data.gradient_accumulation_steps, data.batch_ramp) == (12, 2, "1:100")
    before, after = (BatchSchedule.of(d) for d in (config.data, data))
    assert before.tokens_before(1) == after.tokens_before(1) == 12 * 8
    assert batch_flags(plan_of(config, *args[:3], CPU).with_batch(4), 4).endswith("=6 --batch_ramp=3:100")


def test_what_cannot_be_chosen_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, "free_memory", lambda _: room_for(1) - 100)
    with pytest.raises(DeviceError, match=r"not even one sequence(?s:.*)--recompute=mlp"):
        train(folder, batch_size=2, gradient_accumulation_steps=4, micro_batch="auto")
    assert not (folder / "out/config.toml").exists()
    monkeypatch.setattr(parts, "free_memory", lambda _: None)
    with pytest.raises(DeviceError, match="set --batch_size"):
        train(folder, micro_batch="auto")
    with pytest.raises(ConfigError, match="draws by batch_size"):
        train(folder, micro_batch="auto", data_order="nanogpt")


def test_a_config_from_before_recompute_loads_and_resumes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    train(folder, recompute="mlp")
    path = folder / "out/config.toml"
    written = path.read_text()
    assert 'recompute = "mlp"\n' in written
    for old, new in (("true", "mlp"), ("false", "none")):
        path.write_text(written.replace('recompute = "mlp"\n', f"recompute_gelu = {old}\n"))
        assert load_config(["--config", str(path)]).system.recompute == new
    real = checkpoint.load

    def older(path: Path) -> checkpoint.Checkpoint:
        found = real(path)
        found.state["config"]["recompute_gelu"] = found.state["config"].pop("recompute") == "mlp"
        return found

    monkeypatch.setattr(checkpoint, "load", older)
    assert main(["--config", str(path), "--init_from=resume", "--max_iters=25"]) == 0
    assert max(metrics(folder, "train", "loss")) == 25


# ---- --dry_run --on ----

GPT2 = ["gpt2_124m", "--vocab_size=50304", "--n_layer=2", "--dry_run"]


def described(*flags: str) -> list[str]:
    return [row for row in dry_run.describe(load_config([*GPT2, *flags])).splitlines() if row.startswith("# ")]


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir("/")
    monkeypatch.setattr(dry_run.distributed, "resolve_device", lambda _: pytest.fail("asks this machine"))
    rows = {row[2:18].strip(): row[18:] for row in described("--on=l4", "--recompute=block")}
    assert rows["device"].startswith("NVIDIA L4, bfloat16, peak 121 TFLOP/s dense bfloat16")
    assert re.match(
        r"\d+ sequences at most fit into 24.00 GiB in all less 10%, [\d.]+ GiB: --batch_size", rows["micro-batch"]
    )
    batch_size, accumulation = map(int, re.findall(r"=(\d+)", rows["micro-batch"]))
    assert batch_size * accumulation == 480 and rows["tokens"].startswith("491,520 an iteration")
    assert "days at least" in rows["time"] and re.match(
        r"[\d.]+ [GM]iB at the peak, predicted: parameters 0\.", rows["memory"]
    )
    older = " ".join(described("--on=Tesla V100-SXM2-16GB"))
    assert "float16, peak 125 TFLOP/s" in older and "16.00 GiB in all" in older
    assert "time" not in " ".join(described("--on=h100", "--dtype=float32"))


def test_a_gpu_that_no_row_names():
    with pytest.raises(ConfigError, match="unknown GPU 'h10', did you mean 'h100'"):
        described("--on=h10")
    with pytest.raises(ConfigError, match="--on names a GPU to foretell"):
        load_config(["--on=h100"])


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch):
    config = load_config([*GPT2, "--device=cpu"])
    plan = plan_of(config, config.shape(50304), REFERENCE, torch.float32, CPU)
    assert "not even one sequence" in dry_run._what_fits(plan, 10**8, "free")
    assert "not known" in dry_run._what_fits(plan, None, "free")
