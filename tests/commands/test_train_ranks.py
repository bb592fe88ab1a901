"""Ranks train what one rank trains: same data, same masks, same losses; one of them writes. Whatever holds the
optimizer's state, a checkpoint is one process's, and goes on at another number of ranks and in another mode."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import Ended, Ranks
from tiny_run import flags, losses, metrics, steps_of, train, wait_for_iteration, write_dataset

from nanogpt_fast.run import checkpoint

MODES = ["ddp", "zero1"]


def train_on(ranks: Ranks, folder: Path, size: int, **changes: Any) -> list[Ended]:
    ranks.start(size, ["train", *flags(folder, **changes)])
    ended = ranks.wait()
    assert [rank.code for rank in ended] == [0] * size, ended
    return ended


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_train_as_one(ranks: Ranks, folder: Path, mode: str):
    """Two micro-batches an iteration, four from the 20th on."""
    settings = dict(gradient_accumulation_steps=4, batch_ramp="2:20", dropout=0.1)
    settings |= dict(max_iters=30, eval_interval=30, eval_iters=4)
    train(folder, **settings)
    alone, alone_eval = metrics(folder, "train", "loss"), metrics(folder, "eval", "val_loss")
    (folder / "out/metrics.jsonl").unlink()
    ended = train_on(ranks, folder, 2, parallel=mode, sample_at_end=20, **settings)
    together = metrics(folder, "train", "loss")
    assert max(abs(alone[i] - together[i]) for i in alone) < 1e-4
    assert metrics(folder, "eval", "val_loss")[30] == pytest.approx(alone_eval[30], abs=0.1)  # other random batches
    assert "iter 30" in ended[0].out and "iter" not in ended[1].out  # rank 0 alone talks
    assert steps_of(folder) == [30]


@pytest.mark.parametrize("tokens", [6_000, 70])  # of the shorter, some ranks get no validation window
def test_a_full_evaluation_is_shared_and_the_same(ranks: Ranks, folder: Path, tokens: int):
    """1,500 or 17 tokens to predict, in windows of 8, over three ranks: what one finds, to rounding."""
    write_dataset(folder, tokens)
    settings = dict(gradient_accumulation_steps=3, max_iters=4, eval_interval=4, eval_mode="full")
    train(folder, **settings)
    alone = metrics(folder, "eval", "val_loss")
    (folder / "out/metrics.jsonl").unlink()
    train_on(ranks, folder, 3, parallel="zero1", **settings)
    assert metrics(folder, "eval", "val_loss") == pytest.approx(alone, abs=1e-5)


# ---- resume ----


def newest(folder: Path) -> checkpoint.Checkpoint:
    return checkpoint.newest(folder / "out")[0]


SETTINGS = dict(gradient_accumulation_steps=12, dropout=0.2, eval_interval=5, eval_iters=1, learning_rate=1e-3)
# Five steps each on so many ranks, in this mode.
CHAINS = {
    "ranks": [(4, "ddp"), (2, "ddp"), (1, "ddp"), (3, "ddp")],
    "modes": [(2, "ddp"), (2, "zero1"), (2, "ddp"), (2, "zero1")],
    "both": [(3, "zero1"), (1, "zero1"), (4, "ddp"), (2, "zero1")],
}


@pytest.mark.parametrize(
    "chain", [pytest.param(CHAINS["ranks"], marks=pytest.mark.slow), CHAINS["modes"], CHAINS["both"]], ids=CHAINS
)
def test_a_run_goes_on_at_another_number_of_ranks_and_in_another_mode(
    ranks: Ranks, folder: Path, tmp_path_factory: pytest.TempPathFactory, chain: list[tuple[int, str]]
):
    """Mid-epoch, dropout on, 5 iterations each, against 20 by the first in one piece: equal bits where all are of as
    many ranks, 1e-6 elsewhere."""
    other = tmp_path_factory.mktemp("straight")
    (other / "data").symlink_to(folder / "data")
    size, mode = chain[0]
    train_on(ranks, other, size, parallel=mode, max_iters=20, **SETTINGS)
    for part, (size, mode) in enumerate(chain):
        go_on = {"init_from": "resume"} if part else {}
        train_on(ranks, folder, size, parallel=mode, max_iters=5 * (part + 1), **SETTINGS, **go_on)
    exact, straight = len({size for size, _ in chain}) == 1, losses(other)
    assert losses(folder) == (straight if exact else pytest.approx(straight, abs=1e-6))
    ours, theirs = newest(folder), newest(other)
    assert ours.step == theirs.step == 20 and ours.state["samples_seen"] == theirs.state["samples_seen"]
    for found, expected in ((ours.model, theirs.model), (ours.optimizer, theirs.optimizer)):
        for name in expected:
            if exact:
                assert torch.equal(found[name], expected[name]), name
            else:
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("async_save", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_disks_of_their_own_will_do(
    ranks: Ranks, folder: Path, tmp_path_factory: pytest.TempPathFactory, async_save: bool
):
    """Rank 1's node does not see rank 0's out_dir: rank 0 is sent the shares, and at the resume sends all."""
    shared, elsewhere = tmp_path_factory.mktemp("shared"), folder / "elsewhere"
    (shared / "data").symlink_to(folder / "data")
    settings: dict[str, Any] = {**SETTINGS, "parallel": "zero1", "async_save": async_save}
    for end, go_on in ((10, {}), (20, {"init_from": "resume"})):
        words = ["train", *flags(folder, max_iters=end, **settings, **go_on)]
        ranks.start(2, words, RUN_FIRST=f"1:import sys; sys.argv.append('--out_dir={elsewhere}')")
        ended = ranks.wait()
        assert [rank.code for rank in ended] == [0, 0], ended
    train_on(ranks, shared, 2, max_iters=20, **settings)
    assert not list(elsewhere.glob("checkpoints/step_*")) and losses(folder) == losses(shared)
    names = [{file.name for file in checkpoint.list_steps(at / "out")[20].iterdir()} for at in (folder, shared)]
    assert checkpoint.MODEL in names[0] and "share_0001.safetensors" in names[1]
    ours, theirs = newest(folder), newest(shared)
    for found, expected in ((ours.model, theirs.model), (ours.optimizer, theirs.optimizer)):
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# ---- signals ----


@pytest.mark.parametrize("mode", MODES)
def test_a_signal_to_one_rank_stops_both_and_saves_once(ranks: Ranks, folder: Path, mode: str):
    settings = dict(gradient_accumulation_steps=2, max_iters=100_000, eval_interval=100_000, parallel=mode)
    started = ranks.start(2, ["train", *flags(folder, **settings)])
    wait_for_iteration(folder, 20)
    os.kill(started[1], signal.SIGUSR1)  # saves and goes on
    for _ in range(100):
        if steps_of(folder):
            break
        time.sleep(0.1)
    (kept,) = steps_of(folder)
    wait_for_iteration(folder, kept + 10)
    os.kill(started[1], signal.SIGTERM)
    ended = ranks.wait()
    assert [rank.code for rank in ended] == [143, 143], ended
    assert len(steps_of(folder)) == 2 and "--init_from=resume" in ended[0].out
    assert not any("lost" in rank.err for rank in ended)


def test_accumulation_must_divide_among_the_ranks(ranks: Ranks, folder: Path):
    ranks.start(2, ["train", *flags(folder, gradient_accumulation_steps=3)])
    ended = ranks.wait()
    assert [rank.code for rank in ended] == [2, 2] and "--gradient_accumulation_steps=4" in ended[0].err
