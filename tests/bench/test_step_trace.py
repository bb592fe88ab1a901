"""profiling/step_trace.py: the run's own step and vocabulary, through run/tracing.py."""

import json
import os
import subprocess
from pathlib import Path

import built_step
import pytest
import step_trace

from nanogpt_fast.errors import DataError
from nanogpt_fast.settings.cli import load_config

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=8", "--batch_size=2", "--device=cpu",
        "--gradient_accumulation_steps=1", "--dtype=float32"]  # fmt: skip


def dataset(folder: Path, kind: str, vocab: int) -> list[str]:
    (folder / "data/toy").mkdir(parents=True)
    tokenizer = {"kind": kind, "itos": [chr(97 + i) for i in range(vocab)]} if kind == "char" else {"kind": kind}
    meta = {"format": 1, "tokenizer": tokenizer, "vocab_size": vocab, "splits": {}, "source": "", "created_by": ""}
    (folder / "data/toy/meta.json").write_text(json.dumps(meta))
    return [*TINY, "--dataset=toy", f"--data_dir={folder / 'data'}"]


def test_the_vocabulary_is_the_datasets(tmp_path: Path):
    flags = dataset(tmp_path, "char", 23)
    built = built_step.build(load_config(flags))
    assert built.step.model.config.vocab_size == 23 and int(built.batch.max()) < 23
    assert built.facts["shape"]["vocab_size"] == 23
    assert built_step.vocab_size_of(load_config([*flags, "--vocab_size=31"])) == 31


def test_gpt2s_tokens_take_gpt2s_padded_vocabulary(tmp_path: Path):
    assert built_step.vocab_size_of(load_config(dataset(tmp_path, "gpt2", 50257))) == 50304


def test_without_a_dataset_the_vocabulary_must_be_said(tmp_path: Path):
    with pytest.raises(DataError, match="--vocab_size=N") as caught:
        built_step.vocab_size_of(load_config([*TINY, "--dataset=nowhere", f"--data_dir={tmp_path}"]))
    assert caught.value.exit_code == 3


def test_it_prints_the_parts_and_keeps_the_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    step_trace.main(["--steps=2", f"--out={tmp_path / 'trace'}", *TINY, "--vocab_size=23"])
    shown = capsys.readouterr().out
    assert "vocabulary 23" in shown and "matrix products" in shown and "2 traced steps took" in shown
    found = json.loads((tmp_path / "trace/summary.json").read_text())
    assert found["steps"] == 2 and found["untraced_ms"] > 0
    assert sum(found["parts"].values()) == pytest.approx(found["wall_ms"], rel=0.2)  # 0.05: test_tracing.py
    assert (tmp_path / "trace/trace.json.gz").exists()


def test_nsys_gets_the_window_and_the_runs_own_flags(tmp_path: Path):
    """Under a stand-in for nsys that prints its arguments."""
    stand_in = tmp_path / "nsys"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    script = Path(step_trace.__file__).with_name("nsys.sh")
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    shown = subprocess.run([script, "report", "--config", "quickstart"], env=env, capture_output=True, text=True)
    assert shown.stdout.startswith("profile --output report ") and "--capture-range cudaProfilerApi" in shown.stdout
    assert shown.stdout.endswith("train --profile=10:15 --profiler=nsys --config quickstart\n")
    usage = subprocess.run([script], env=env, capture_output=True, text=True)
    assert usage.returncode and "usage: profiling/nsys.sh REPORT" in usage.stderr
