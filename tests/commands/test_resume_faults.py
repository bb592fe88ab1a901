"""What a resume finds after runs that something ended: the order, the figures, the directory."""

import errno
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import save_steps
from tiny_run import metrics, steps_of, train

from nanogpt_fast import evaluate
from nanogpt_fast.errors import CheckpointError, ConfigError
from nanogpt_fast.hardware import Peak, flops_per_token
from nanogpt_fast.meter import Meter
from nanogpt_fast.restore import restore
from nanogpt_fast.run import checkpoint
from nanogpt_fast.run.log import set_rows_aside
from nanogpt_fast.run.rundir import aside
from nanogpt_fast.settings.cli import load_config
from nanogpt_fast.step import Report
from nanogpt_fast.trainer import Trainer
from nanogpt_fast.weights import formats

# ---- resuming ----


def test_nanogpts_order_goes_on_where_it_was(folder: Path):
    """The generator that batches, evaluations and initialisation share is part of a native checkpoint."""
    changes = dict(data_order="nanogpt", gradient_accumulation_steps=2, eval_interval=7)
    train(folder, **changes)
    losses, evaluations = metrics(folder, "train", "loss"), metrics(folder, "eval", "val_loss")
    for cut in (7, 10):  # at an evaluation, and between two
        shutil.rmtree(folder / "out")
        train(folder, **changes, max_iters=cut)
        again = dict(changes, init_from="resume", max_iters=20)
        train(folder, **again)
        assert metrics(folder, "train", "loss") == losses
        assert metrics(folder, "eval", "val_loss") == evaluations


@pytest.mark.parametrize(
    "draws",
    [None, 3, {}, {"generator": "x", "ahead": [1]}, {"generator": "QUFB", "ahead": [0, 1, 2, 3]}, {"ahead": [10**30]}],
)
def test_draws_that_are_none_begin_anew(folder: Path, draws: Any, monkeypatch: pytest.MonkeyPatch, caplog):
    train(folder, data_order="nanogpt", max_iters=10)
    real = checkpoint.load

    def load(path: Path) -> checkpoint.Checkpoint:
        found = real(path)
        found.state["draws"] = draws
        return found

    monkeypatch.setattr(checkpoint, "load", load)
    assert train(folder, data_order="nanogpt", max_iters=12, init_from="resume") == 0
    assert "its draws begin anew" in caplog.text


def test_an_unbeaten_best_loss_is_not_saved_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    train(folder, max_iters=10)
    real = checkpoint.load

    def load(path: Path) -> checkpoint.Checkpoint:
        found = real(path)
        found.state |= {"best_val_loss": 0.01, "val_loss": 0.01}
        return found

    monkeypatch.setattr(checkpoint, "load", load)
    saved: list[tuple[int, Any]] = []
    keep = checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda out, c, **more: saved.append((c.step, c.state)) or keep(out, c, **more)
    )
    train(folder, max_iters=40, init_from="resume", always_save_checkpoint=False)
    assert [step for step, _ in saved] == [41], "the end alone, since nothing else of this process was saved"
    assert saved[0][1]["best_val_loss"] == 0.01


def test_what_was_loaded_is_not_saved_again(folder: Path, capsys: pytest.CaptureFixture[str]):
    train(folder, max_iters=10)
    capsys.readouterr()
    before = (folder / "out/checkpoints/step_00000010/manifest.json").stat().st_ino
    train(folder, max_iters=20, init_from="resume")
    assert (folder / "out/checkpoints/step_00000010/manifest.json").stat().st_ino == before
    assert "step_00000010\n" not in capsys.readouterr().out.split("step 10:")[1]


def test_the_moments_of_the_first_positions_are_kept(folder: Path):
    train(folder, max_iters=10, block_size=8)
    whole = checkpoint.load(folder / "out/checkpoints/step_00000010").optimizer
    rows = [whole[f"{m}.transformer.wpe.weight"][:6].clone() for m in ("exp_avg", "exp_avg_sq")]
    for seen in rows:
        assert seen.abs().sum() > 0 and not torch.equal(seen, whole["exp_avg.transformer.wpe.weight"][2:])
    kept: list[torch.Tensor] = []
    real = Trainer.run

    def run(self: Trainer) -> int:
        flat = self.optimizer.flat
        kept.extend(
            flat.view(buffer, "transformer.wpe.weight").clone() for buffer in (self.optimizer.m, self.optimizer.v)
        )
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", run)
        train(folder, max_iters=11, block_size=6, init_from="resume")
    assert all(torch.equal(a, b) for a, b in zip(rows, kept))


def test_a_step_between_two_renames_is_read_by_every_command(folder: Path, capsys: pytest.CaptureFixture[str]):
    """publish moved the old one aside; the kill came before the new one had its name."""
    train(folder, max_iters=10)
    step = folder / "out/checkpoints/step_00000010"
    os.rename(step, aside(step, "replaced"))
    out, data = str(folder / "out"), str(folder / "data")
    assert restore("resume", out).step == restore("best", out).step == 10
    evaluate.main([f"--out_dir={out}", f"--data_dir={data}", "--device=cpu"])
    assert "iteration 10" in capsys.readouterr().out and not step.exists(), "readers move nothing"
    train(folder, max_iters=12, init_from="resume")
    assert steps_of(folder) == [10, 13] and "restored step_00000010" in capsys.readouterr().out


def test_checkpoints_that_were_set_aside_are_named_with_the_way_back(folder: Path):
    train(folder, max_iters=10)
    (path,) = save_steps(folder / "elsewhere", 7)
    checkpoint.set_aside_later(folder / "out", -1)
    with pytest.raises(CheckpointError) as error:
        restore("resume", str(folder / "out"))
    assert str(path.parent.parent) in error.value.found and "elsewhere" not in error.value.hint
    command = re.search(r"mv .*", error.value.hint)
    assert command and os.system(command[0]) == 0
    assert restore("resume", str(folder / "out")).step == 10


def test_the_next_command_says_where_it_begins(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    losses = iter([3.0, 2.0, 2.5])
    monkeypatch.setattr(Trainer, "_estimate", lambda *_: {"train": 1.0, "val": next(losses)})
    train(folder, always_save_checkpoint=False)
    assert steps_of(folder) == [10] and "(from iteration 10: always_save_checkpoint" in capsys.readouterr().out


# ---- figures ----


def test_a_new_run_begins_a_new_file_of_figures(folder: Path, capsys: pytest.CaptureFixture[str]):
    train(folder)
    old = (folder / "out/metrics.jsonl").read_bytes()
    train(folder, max_iters=5)
    assert (folder / "out/metrics.abandoned.jsonl").read_bytes() == old
    assert "metrics.abandoned.jsonl" in capsys.readouterr().out
    assert len(metrics(folder, "train", "loss")) == 6


def test_rows_of_steps_that_are_done_again_stand_once(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "run"}, *({"kind": "train", "iter": i} for i in range(5)), {"kind": "eval", "iter": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr')
    assert set_rows_aside(path, 3) == tmp_path / "metrics.abandoned.jsonl"
    kept = path.read_text().splitlines()
    assert [json.loads(line).get("iter") for line in kept[:-1]] == [None, 0, 1, 2] and kept[-1] == '{"kind": "tr'
    moved = (tmp_path / "metrics.abandoned.jsonl").read_text().splitlines()
    assert [json.loads(line)["iter"] for line in moved] == [3, 4, 3]
    assert set_rows_aside(path, 3) is None and set_rows_aside(tmp_path / "none.jsonl", 0) is None
    path.write_text('{"kind": "eval", "iter": 4}\n{"kind": "train", "iter": 4}\n')
    assert set_rows_aside(path, 4, evaluates=False)
    assert path.read_text() == '{"kind": "eval", "iter": 4}\n', "its checkpoint's loss, which nobody computes again"
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    assert set_rows_aside(link, -1) and link.is_symlink() and path.read_text() == ""


def test_elapsed_goes_on_over_a_resume(folder: Path):
    train(folder, max_iters=10)
    first = metrics(folder, "train", "elapsed_s")
    train(folder, max_iters=12, init_from="resume")
    both = metrics(folder, "train", "elapsed_s")
    assert both[12] > both[10] > first[9] and both[9] == first[9]


def meter(world_size: int = 1, peak: float = 1e9, **changes: Any) -> Meter:
    config = load_config([f"--{key}={value}" for key, value in changes.items()])
    return Meter(config, config.shape(29), world_size, Peak(peak, "made up"), 0)


SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, batch_size=4, gradient_accumulation_steps=2)
REPORT = Report(loss=2.0, stop=0.0, save=0.0, grad_norm=1.0, refused=0.0, bad_steps=0.0, loss_scale=1.0)


def test_mfu_is_a_ranks_share_of_its_own_peak(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    one = meter(2, max_iters=100, **SHAPE)
    flops = flops_per_token(one.config.shape(29))
    for iteration in range(6):
        one.count(REPORT, False)
        now[0] += 0.5
        figures, line, _ = one.figures(iteration, REPORT, 0.1)
    assert figures["tokens_per_s"] == 2 * 4 * 8 / 0.5 and figures["time_ms"] == 500 and figures["data_wait"] == 20
    for name, key in (("nanogpt", "mfu"), ("llmc", "mfu_llmc")):
        assert figures[key] == pytest.approx(100 * flops[name] * (2 * 4 * 8 / 0.5) / 2 / 1e9)
    assert f"mfu {figures['mfu']:.2f}%" in line


def test_the_time_left_counts_the_evaluations(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    one = meter(max_iters=100, eval_interval=10, **SHAPE)
    now[0] += 7.0
    one.evaluated(7.0)
    one.restart()
    one.count(REPORT, False)
    now[0] += 0.5
    _, line, _ = one.figures(0, REPORT, 0.0)
    left = 100 * 0.5 + 10 * 7.0  # iterations 1 to 100; evaluations at 10, 20, ... 100
    assert line.endswith(f"eta {int(left) // 60}:{int(left) % 60:02d}") and "mfu n/a" in line


# ---- the directory ----


def test_an_evaluation_needs_no_disk_that_can_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    train(folder, max_iters=10)
    real = Path.open

    def refuse(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "a" in mode:
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert train(folder, init_from="resume", eval_only=True) == 0
    assert "Read-only file system; its figures are not kept" in caplog.text
    with pytest.raises(OSError, match="Read-only"):
        train(folder, init_from="resume")


def test_the_configuration_is_written_durably(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed at any moment, config.toml is the old one or the new one: the printed resume command names it."""
    train(folder, max_iters=1)
    old = (folder / "out/config.toml").read_bytes()
    real = os.replace

    def killed(source: Any, target: Any) -> None:
        if str(target).endswith("config.toml"):
            raise SystemExit(137)
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):
        train(folder, max_iters=7)
    assert (folder / "out/config.toml").read_bytes() == old


@pytest.mark.parametrize(
    ("key", "value"),
    [("samples_seen", "many"), ("samples_seen", -1), ("best_val_loss", []), ("val_loss", "low"), ("config", 3),
     ("tokenizer", []), ("fingerprint", "x"), ("recent_losses", 1.0), ("elapsed_s", "long"), ("optimizer_step", 1.5),
     ("fingerprint", {"tokens": 1, "files": [{}]}), ("recent_losses", ["x"]), ("loss_scale", -1.0)],
)  # fmt: skip
def test_a_state_of_the_wrong_kind_is_stepped_over(folder: Path, key: str, value: Any, capsys, caplog):
    """Its hash is right: somebody wrote it so."""
    train(folder, max_iters=20)
    path = folder / "out/checkpoints/step_00000020"
    found = checkpoint.load(path)
    found.state[key] = value
    checkpoint.save(folder / "out", found, keep_last=5)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged") as error:
        checkpoint.load(path)
    assert f"state.{key}" in error.value.where
    assert restore("resume", str(folder / "out")).step == 10


def test_a_loss_scale_below_one_is_sound(folder: Path):
    """float16's is halved as often as gradients overflow."""
    train(folder, max_iters=10)
    found = checkpoint.load(folder / "out/checkpoints/step_00000010")
    found.state["loss_scale"] = 0.5
    checkpoint.save(folder / "out", found, keep_last=5)
    assert restore("resume", str(folder / "out")).state["loss_scale"] == 0.5


def test_a_start_that_fails_disturbs_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """--wandb_log without wandb, --profile before the start: exit 2, and the finished run is as it was."""
    train(folder, max_iters=30)
    monkeypatch.setitem(sys.modules, "wandb", None)
    files = {p: p.read_bytes() for p in (folder / "out").rglob("*") if p.is_file()}
    for changes in (dict(wandb_log=True), dict(init_from="resume", profile="3:5")):
        with pytest.raises(ConfigError):
            train(folder, **changes)
        assert {p: p.read_bytes() for p in (folder / "out").rglob("*") if p.is_file()} == files


def test_a_resume_from_nanogpts_file_has_saved_nothing_yet(folder: Path):
    train(folder, max_iters=10)
    formats.write(formats.read(folder / "out"), folder / "theirs", "nanogpt")
    (folder / "theirs/checkpoints").mkdir()
    assert formats.sniff(folder / "theirs") == "nanogpt", "an empty folder of ours does not hide theirs"
    train(folder, max_iters=10, init_from="resume", out_dir=folder / "theirs")
    assert list(checkpoint.list_steps(folder / "theirs")) == [10]
