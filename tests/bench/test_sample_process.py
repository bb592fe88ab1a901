"""bench/sample_process.py: what its arms start in is what ours and transformers' commands sample from."""

import subprocess
from pathlib import Path
from typing import Any

import machine
import pytest
import sample_process

from nanogpt_fast.sample import main as sample

ARGV = ["--tiny", "--rounds=2", "--new_tokens", "3", "--arms", "ours"]


def test_rows_of_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Ours in this process; the others' commands are looked at."""
    asked: list[list[str]] = []

    def run(command: list[str], folder: Path) -> float:
        asked.append(command)
        monkeypatch.chdir(folder)
        sample(command[3:])
        monkeypatch.chdir(tmp_path)
        return float(len(asked))

    monkeypatch.setattr(sample_process, "run", run)
    assert sample_process.main([*ARGV, f"--out={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert out.count("---------------\n") >= 3 and len(asked) == 3
    (row,) = machine.read_lines(tmp_path / "sample_process.jsonl")
    assert row["seconds"] == [2.0, 3.0] and row["median_s"] == 2.5 and row["x_first"] == 1.0 and row["new_tokens"] == 3


def test_who_can_sample_what():
    assert list(sample_process.commands(10, 16, True)) == ["ours", "nanogpt", "hf"]
    assert list(sample_process.commands(16, 16, True)) == ["ours", "nanogpt"], "hf has no position for it"
    assert list(sample_process.commands(10, 16, False)) == ["ours", "hf"]


def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def failed(*_: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 3, "", "one\nModuleNotFoundError: no transformers\n")

    monkeypatch.setattr(subprocess, "run", failed)
    with pytest.raises(sample_process.Failed, match="exit code 3: ModuleNotFoundError: no transformers"):
        sample_process.run(["x"], tmp_path)
