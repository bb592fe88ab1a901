"""tune on a GPU: real children, real times; and a training run that takes what is kept."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt_fast import ops, tune, tuned
from nanogpt_fast.launch_plan import cases_of
from nanogpt_fast.launch_search import GAIN
from nanogpt_fast.proof import Setup
from nanogpt_fast.settings.config import GPTConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SHAPE: dict[str, Any] = dict(n_layer=2, n_head=4, n_embd=256, block_size=256, vocab_size=5056, bias=False)
RUN: dict[str, Any] = dict(device="cuda", dtype="bfloat16", batch_size=8, kernels="reference,adamw=triton", **SHAPE)
SETUP = Setup(GPTConfig(**SHAPE), rows=8 * 256)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def of_the_update() -> tuple[Any, Any]:
    """(launch.Key, the shipped row) of the run's update on this GPU."""
    major, minor = torch.cuda.get_device_capability()
    cases = cases_of(SETUP, ops.TRITON, 10 * major + minor)
    ((key, present),) = next(case for case in cases if case.op == "adamw_").forward.items()
    return key, present


def test_a_slow_row_is_beaten_on_this_gpu(capsys: pytest.CaptureFixture):
    """The update's row in the cache is a poor one, of one warp and tiles of 256. Another is found, and kept unless the
    shipped one is as quick."""
    facts, (key, present) = tuned.facts_for(SETUP, torch.device("cuda")), of_the_update()
    poor = replace(present, blocks={"BLOCK": 256}, num_warps=1)
    tuned.write(facts, {key: tuned.entry_of(key, poor, 1.0, "planted")})
    assert tune.main([*(f"--{name}={value}" for name, value in RUN.items()), "--minutes=1.5"]) == 0
    said = capsys.readouterr().out
    found = re.search(r"adamw \(adamw_, size [\d,]+\): (\d\.\d+) of the time by .*: kept", said)
    assert found and float(found[1]) <= GAIN, said
    assert all(entry.of != "planted" for entry in tuned.read(facts).values())


def test_training_takes_what_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("rich")  # by which train shows its progress
    from tiny_run import train, write_dataset

    write_dataset(tmp_path)
    facts, (key, present) = tuned.facts_for(SETUP, torch.device("cuda")), of_the_update()
    other = tuned.entry_of(key, replace(present, num_warps=4), 1.0, "by hand")
    tuned.write(facts, {key: other})
    losses = {}
    for rows in ("tuned", "shipped"):
        assert train(tmp_path, **RUN, rows=rows, max_iters=5, eval_interval=5) == 0
        assert ("tuned on this GPU" in capsys.readouterr().out) == (rows == "tuned")
        lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
        taken = [line["launch_rows"] for line in lines if line["kind"] == "run"][-1]
        assert (other.row in taken) == (rows == "tuned")
        losses[rows] = [line["loss"] for line in lines if line["kind"] == "train"][-5:]
    assert losses["tuned"] == pytest.approx(losses["shipped"], rel=1e-3)
