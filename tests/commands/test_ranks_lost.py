"""A rank that dies, hangs, stops or errs: the others name it within --timeout, end, and keep what they hold; ranks that
are started again go on."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import Ended, Ranks
from tiny_run import flags, losses, steps_of, wait_for_iteration, write_dataset

ENDLESS: dict[str, Any] = dict(gradient_accumulation_steps=6, max_iters=100_000, eval_interval=100_000, timeout=1)


def others_after(ranks: Ranks, pid: int, number: int, lost: int) -> tuple[list[Ended], float]:
    """What became of the ranks, one of which was sent a signal, and the seconds until the last of the others ended."""
    began = time.monotonic()
    os.kill(pid, number)
    left, seconds = {0, 1, 2} - {lost}, 0.0
    while left:
        rank, _ = ranks.next_end()
        left.discard(rank)
        seconds = time.monotonic() - began
    if number == signal.SIGSTOP:
        os.kill(pid, signal.SIGKILL)
    return ranks.wait(), seconds


SILENT = [("ddp", "SIGKILL"), ("zero1", "SIGSTOP")]
SILENT += [pytest.param(mode, how, marks=pytest.mark.slow) for mode, how in (("ddp", "SIGSTOP"), ("zero1", "SIGKILL"))]


@pytest.mark.parametrize(("mode", "how"), SILENT)
def test_a_rank_that_falls_silent_is_named(ranks: Ranks, folder: Path, mode: str, how: str):
    """The others end with exit 5; in ddp rank 0 has saved. Of shares, the lost rank's are lost."""
    pids = ranks.start(3, ["train", *flags(folder, parallel=mode, **ENDLESS)])
    wait_for_iteration(folder, 20)
    ended, seconds = others_after(ranks, pids[2], getattr(signal, how), lost=2)
    assert [rank.code for rank in ended] == [5, 5, -9], ended
    assert seconds < 12, "the time-out of 1 s, 1.2 of listening, and a loaded machine's"
    for rank in ended[:2]:
        assert "another rank does not answer" in rank.err, rank.err
        assert "rank 2 (process" in rank.err and "is silent" in rank.err and "iteration" in rank.err, rank.err
    if mode == "ddp":
        (step,) = steps_of(folder)
        assert step >= 20 and f"stopped after iteration {step - 1}" in ended[0].out
    else:
        assert steps_of(folder) == [] and "a rank that ended held its share" in ended[0].err


def test_the_rank_that_keeps_the_store_can_be_lost_too(ranks: Ranks, folder: Path):
    pids = ranks.start(3, ["train", *flags(folder, **ENDLESS)])
    wait_for_iteration(folder, 20)
    ended, _ = others_after(ranks, pids[0], signal.SIGKILL, lost=0)
    assert [rank.code for rank in ended] == [-9, 5, 5], ended
    for rank in ended[1:]:
        assert "the ranks' store, which rank 0 or torchrun keeps, does not answer" in rank.err, rank.err


@pytest.mark.parametrize("mode", ["ddp", "zero1"])
def test_a_rank_that_errs_says_why_to_the_others(ranks: Ranks, folder: Path, mode: str):
    """Rank 1's data are cut short while it trains. Nobody is lost: of shares too, all is saved."""
    (folder / "other").mkdir()
    write_dataset(folder / "other")
    words = ["train", *flags(folder, parallel=mode, **{**ENDLESS, "timeout": 20})]
    ranks.start(2, [word for word in words if "data_dir" not in word], DATA_DIRS=f"{folder}/data,{folder}/other/data")
    wait_for_iteration(folder, 20)
    os.truncate(folder / "other/data/toy/train.bin", 100)
    ended = ranks.wait()
    assert [rank.code for rank in ended] == [5, 3], ended
    assert "rank 1 ended:" in ended[0].err and "train.bin" in ended[0].err, ended[0].err
    assert len(steps_of(folder)) == 1


def test_memory_that_ran_out_on_one_rank_is_named(ranks: Ranks, folder: Path):
    ranks.start(2, ["train", *flags(folder, **{**ENDLESS, "timeout": 20})], OUT_OF_MEMORY_AT="1:12")
    ended = ranks.wait()
    assert [rank.code for rank in ended] == [5, 5], ended
    assert "rank 1 ended: the device ran out of memory, cpu, batch_size = 4" in ended[0].err, ended[0].err
    assert "the device ran out of memory" in ended[1].err and "--batch_size=" in ended[1].err


def test_a_rank_that_hangs_is_named_with_its_place(ranks: Ranks, folder: Path):
    """It lives, and says where it is: within its data. Its own end is the test's."""
    pids = ranks.start(2, ["train", *flags(folder, **ENDLESS)], HANGS_AT="1:12")
    assert ranks.next_end()[0] == 0
    os.kill(pids[1], signal.SIGKILL)
    ended = ranks.wait()
    assert [rank.code for rank in ended] == [5, -9], ended
    assert "rank 1 (process" in ended[0].err and "is in trainer.py:" in ended[0].err, ended[0].err
    assert "iteration 12" in ended[0].err and steps_of(folder) == [12]


def test_clocks_need_not_agree(ranks: Ranks, folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """A rank an hour ahead: nothing of the run is told by the clock of another machine."""
    other = tmp_path_factory.mktemp("other")
    (other / "data").symlink_to(folder / "data")
    for place, env in ((folder, {"CLOCK_AHEAD": "1:3600"}), (other, {})):
        ranks.start(2, ["train", *flags(place, parallel="zero1", **{**SETTINGS, "timeout": 5})], **env)
        ended = ranks.wait()
        assert [rank.code for rank in ended] == [0, 0], ended
    assert losses(folder) == losses(other) and steps_of(folder) == steps_of(other)


def test_ranks_with_other_data_do_not_begin(ranks: Ranks, folder: Path):
    write_dataset(folder / "other", 7_000)
    words = [word for word in ["train", *flags(folder, gradient_accumulation_steps=2)] if "data_dir" not in word]
    ranks.start(2, words, DATA_DIRS=f"{folder}/data,{folder}/other/data")
    ended = ranks.wait()
    assert [rank.code for rank in ended] == [3, 3], ended
    assert "the training data are not rank 0's" in ended[1].err and "rank 1 of 2: train.bin" in ended[1].err
    assert "another rank found other training data" in ended[0].err


# ---- started again ----


SETTINGS: dict[str, Any] = dict(
    gradient_accumulation_steps=6, dropout=0.2, max_iters=20, eval_interval=5, eval_iters=1, learning_rate=1e-3
)


def test_ranks_that_torchrun_starts_again_go_on(ranks: Ranks, folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """The same command: from the newest checkpoint, in the same order, at another number of ranks too."""
    straight = tmp_path_factory.mktemp("straight")
    (straight / "data").symlink_to(folder / "data")
    ranks.start(3, ["train", *flags(straight, **SETTINGS)])
    assert [rank.code for rank in ranks.wait()] == [0, 0, 0]
    for attempt, (size, end) in enumerate([(3, 10), (3, 15), (2, 20)]):
        env = {"TORCHELASTIC_RESTART_COUNT": str(attempt), "TORCHELASTIC_RUN_ID": "one"}
        ranks.start(size, ["train", *flags(folder, **{**SETTINGS, "max_iters": end})], **env)
        ended = ranks.wait()
        assert [rank.code for rank in ended] == [0] * size, ended
        again = f"started again by torchrun, time {attempt}"
        assert (again in ended[0].out) == ("Resuming training from" in ended[0].out) == (attempt > 0)
    assert losses(folder) == pytest.approx(losses(straight), abs=1e-6)
    first = {i: loss for i, loss in losses(straight).items() if i < 15}
    assert {i: loss for i, loss in losses(folder).items() if i < 15} == first, "bit for bit on three ranks"


def test_another_runs_checkpoints_are_not_gone_on_with(ranks: Ranks, folder: Path):
    """A restart of a run that never came to its first checkpoint finds those of an older one in out_dir."""
    settings = {**SETTINGS, "max_iters": 5}
    for run, count in (("old", "0"), ("new", "1")):
        ranks.start(2, ["train", *flags(folder, **settings)], TORCHELASTIC_RUN_ID=run, TORCHELASTIC_RESTART_COUNT=count)
        ended = ranks.wait()
        assert [rank.code for rank in ended] == [0, 0] and "Resuming" not in ended[0].out, ended


def test_auto_resume_goes_on_where_there_is_a_run(ranks: Ranks, folder: Path):
    for end, resumes in ((5, False), (10, True)):
        ranks.start(2, ["train", *flags(folder, auto_resume=True, **{**SETTINGS, "max_iters": end})])
        ended = ranks.wait()
        assert [rank.code for rank in ended] == [0, 0] and ("Resuming" in ended[0].out) == resumes, ended
    assert steps_of(folder)[-1] == 10
