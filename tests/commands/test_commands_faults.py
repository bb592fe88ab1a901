"""What the commands did badly that no test had: their list, foreign text, odd values, files in the way, progress."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_weights import random_weights
from tiny_run import ENV, write_dataset

from nanogpt_fast import __main__ as listing
from nanogpt_fast import convert, doctor, dry_run, evaluate, examination, hardware, ops, plot, sample, tuned, verdict
from nanogpt_fast.command import explained
from nanogpt_fast.data import progress
from nanogpt_fast.errors import ConfigError, DataError, DeviceError
from nanogpt_fast.settings.cli import load_config
from nanogpt_fast.train import AGAIN
from nanogpt_fast.weights import formats

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name == "nt", reason="files and signals of POSIX")
ITOS = ["\n", "\x1b", "\u202e", *map(chr, range(97, 97 + 17))]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run in out/, whose text can drive a terminal, and its dataset of 29 ids."""
    monkeypatch.chdir(tmp_path)
    weights = random_weights(vocab_size=20, tokenizer={"kind": "char", "itos": ITOS})
    formats.write(weights, tmp_path / "out", "native")
    return tmp_path


# ---- python -m nanogpt_fast ----


def test_every_command_is_listed():
    files = [path for path in (ROOT / "nanogpt_fast").glob("*.py") if "run_command(main" in path.read_text()]
    assert {path.stem for path in files} - {"__main__", "command"} == set(listing.COMMANDS)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_list_has_a_line_a_command(argv: list[str], capsys: pytest.CaptureFixture[str]):
    assert listing.main(argv) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", out, re.MULTILINE) for name in listing.COMMANDS)


def test_its_version_and_words_it_does_not_know(capsys: pytest.CaptureFixture[str]):
    assert listing.main(["--version"]) == 0 and capsys.readouterr().out == "0.1.0\n"
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        listing.main(["trian", "--help"])


def test_a_word_runs_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.delitem(sys.modules, "nanogpt_fast.plot")  # runpy warns of a module that is there already
    with pytest.raises(SystemExit) as stop:
        listing.main(["plot", "--help"])
    assert stop.value.code == 0 and "usage: python -m nanogpt_fast.plot" in capsys.readouterr().out


@posix
@pytest.mark.usefixtures("signals_heeded")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize(
    ("module", "words", "again"),
    [
        pytest.param("nanogpt_fast", ["convert", "run", "hf", "--to=hf"], convert.AGAIN, id="convert"),
        pytest.param("nanogpt_fast.train", ["quickstart"], AGAIN, id="train"),
    ],
)
def test_a_signal_while_torch_is_imported_is_said_in_a_line(
    module: str, words: list[str], again: str, name: str, code: int
):
    body = (
        "import os, runpy, signal, sys\n"
        "class Hit:\n"
        "    def find_spec(self, module, *_):\n"
        f"        module == 'torch' and os.kill(os.getpid(), signal.{name})\n"
        "sys.meta_path.insert(0, Hit())\n"
        f"sys.argv = {['', *words]}\n"
        f"runpy.run_module('{module}', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", body], env=ENV, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"interrupted ({name}): {again}\n"


# ---- sample ----


@pytest.mark.parametrize("flag", [f"--seed={2**64}", "--temperature=1e-45", "--temperature=nan", "--temperature=-1"])
def test_sample_refuses_values_out_of_range(flag: str):
    with pytest.raises(ConfigError, match="out of range"):
        sample.main([flag])


@pytest.mark.parametrize(
    "flag", ["--temperature=1e-30", "--temperature=1e300", f"--top_k={2**63 - 1}", f"--seed={2**63 - 1}"]
)
def test_sample_takes_the_ends_of_the_ranges(here: Path, flag: str, capsys: pytest.CaptureFixture[str]):
    sample.main(["--num_samples=1", "--max_new_tokens=20", "--device=cpu", flag])
    assert len(capsys.readouterr().out) > 20


def test_a_sample_cannot_drive_the_terminal(here: Path, capsys: pytest.CaptureFixture[str]):
    sample.main(["--num_samples=2", "--max_new_tokens=100", "--device=cpu", "--temperature=9"])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "\\x1b" in out and "\\u202e" in out


# ---- evaluate ----


def test_evaluate_says_how_far_it_is(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    (here / "text.txt").write_text("abcdef\n" * 200)
    evaluate.main(["--file=text.txt", "--device=cpu", "--batch_size=1"])
    assert "to go" not in capsys.readouterr().err  # quick
    monkeypatch.setattr(progress, "TOLD_SECONDS", 0.0)
    evaluate.main(["--file=text.txt", "--device=cpu", "--batch_size=1"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith("to go")]
    assert lines[-1] == "text.txt 100%: 1,399 of 1,399 tokens, 0 s to go"
    evaluate.main(["--file=text.txt", "--device=cpu", "--batch_size=1", "--eval_mode=random", "--eval_iters=3"])
    assert "text.txt 100%: 48 of 48 tokens, 0 s to go" in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [10**12, 2**62])
@pytest.mark.parametrize("mode", ["full", "random"])
def test_a_batch_that_no_machine_holds_is_exit_5(here: Path, batch_size: int, mode: str):
    (here / "text.txt").write_text("abcdef\n" * 200)
    with pytest.raises(Exception) as caught:
        evaluate.main(["--file=text.txt", "--device=cpu", f"--batch_size={batch_size}", f"--eval_mode={mode}"])
    assert isinstance(explained(caught.value), DeviceError)


# ---- plot ----

LOG = "tokens per iteration will be: 10\n" + "".join(f"iter {i}: loss 4.0, time 10.00ms, mfu 1%\n" for i in range(9))


def test_plot_draws_into_a_folder_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    (tmp_path / "run.log").write_text(LOG)
    (tmp_path / "v1.d").mkdir()
    for out, wrote in (("v1.d", "v1.d/plot.png"), ("name", "name.png"), ("x.svg", "x.svg")):
        plot.main([str(tmp_path / "run.log"), f"--out={tmp_path / out}"])
        assert capsys.readouterr().out == f"wrote {tmp_path / wrote}\n" and (tmp_path / wrote).stat().st_size
    assert not (tmp_path / "v1.d.png").exists()


@posix
def test_plot_reads_regular_files_only(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.log")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    with (tmp_path / "huge.log").open("wb") as file:
        file.truncate(plot.MAX_LOG + 1)
    for name, found in (("pipe.log", "not a regular"), ("zero.jsonl", "not a regular"), ("huge.log", "at most")):
        with pytest.raises(DataError) as caught:
            plot.read_history(tmp_path / name)
        assert found in caught.value.found


@pytest.mark.parametrize(
    "row", [{"iter": "1"}, {"iter": 1.5}, {"iter": -1}, {"iter": 2**70}, {"iter": 1, "loss": "x"},
            {"iter": 1, "loss": [1]}, {"iter": 1, "loss": 10**40}, {"iter": True}]
)  # fmt: skip
def test_plot_names_the_line_of_a_figure_that_is_none(tmp_path: Path, row: dict):
    good = json.dumps({"kind": "train", "iter": 0, "loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text(f"{good}\n{json.dumps({'kind': 'train', **row})}\n{good}\n")
    with pytest.raises(DataError) as caught:
        plot.read_history(tmp_path)
    assert caught.value.where.endswith("metrics.jsonl:2")


def test_console_lines_that_only_look_like_figures_are_passed_over(tmp_path: Path):
    odd = "iter 9: loss abc, time 1ms\niter 10: loss 1.0, time 1.2.3.4ms\nstep 3: train loss -, val loss +\n"
    (tmp_path / "a.log").write_text(
        LOG + odd + f"iter {'9' * 5000}: loss 1, time 1ms\niter 11: loss 1.0, time 0.00ms\n"
    )
    history = plot.read_history(tmp_path / "a.log")
    assert sorted(history.train) == [*range(9), 11] and not history.evals


# ---- doctor, hardware, caches ----


def test_doctor_calls_an_unusable_vocabulary_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (write_dataset(tmp_path) / "toy/meta.pkl").write_bytes(b"no pickle")
    assert doctor.main([f"--data_dir={tmp_path / 'data'}", "--smoke=False"]) == 5
    out = capsys.readouterr().out
    assert re.search(r"PROBLEM: .*toy: its meta file cannot be used: ", out) and "no problems found" not in out


@posix
def test_doctor_works_for_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for name in ("XDG_CACHE_HOME", "TRITON_HOME", "TRITON_CACHE_DIR", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert examination.caches()["HF_HOME"].startswith("~/.cache/huggingface, not there yet")


def test_a_product_that_gives_nothing_is_no_peak(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "measure_gemm", lambda *_: 3e7)
    peak, source = hardware.resolve_peak(torch.device("cpu"), torch.float32)
    assert peak is None and source == "n/a, a float32 product gave 0.03 GFLOP/s, which is no peak"
    monkeypatch.setattr(hardware, "measure_gemm", lambda *_: 3e8)
    assert hardware.resolve_peak(torch.device("cpu"), torch.float32)[1].startswith("0.3 GFLOP/s, measured")


def test_presets_leave_the_dtype_to_the_machine():
    assert not [path.name for path in (ROOT / "configs").glob("*.toml") if re.search(r"^dtype", path.read_text(), re.M)]


@posix
@pytest.mark.parametrize("kind", ["pipe", "folder", "huge", "nested"])
def test_a_kept_file_that_is_none_is_as_good_as_none(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "kept.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("[" * 100_000 if kind == "nested" else " " * (65 << 20))
    monkeypatch.setattr(verdict, "_path", lambda facts: path)
    monkeypatch.setattr(tuned, "path_of", lambda facts: path)
    said: list[str] = []
    assert verdict.remembered({"gpu": "x"}) is None
    assert tuned.read({"gpu": "x"}, said.append) == {} and "cannot be read" in said[0]


# ---- a run's shape, before its data ----


def test_wide_heads_are_refused_before_the_data_are_looked_for(monkeypatch: pytest.MonkeyPatch):
    from nanogpt_kernels.ops.attention.forward import MAX_D

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    flags = ["--n_head=1", "--n_embd=136", "--dataset=none", "--device=cpu"]
    with pytest.raises(ConfigError, match="no tiles for such heads") as caught:
        verdict.check_kernels(load_config([*flags, "--kernels=triton"]), "cpu")
    assert caught.value.where == "n_embd / n_head = 136" and ops.MAX_HEAD == MAX_D
    for more in ("--kernels=triton,attention=reference", "--kernels=reference", "--kernels=auto"):
        verdict.check_kernels(load_config([*flags, more]), "cpu")
    verdict.check_kernels(load_config(["--n_head=1", "--n_embd=128", "--kernels=triton"]), "cpu")


@pytest.mark.parametrize(
    "seconds, words",
    [(4.7528843e9, "151 years"), (90.0, "90 s"), (7200.0, "2 hours"), (1e6, "11.6 days"), (180, "3 minutes"),
     (3.2e15, "101,401,881 years")],
)  # fmt: skip
def test_a_long_time_is_said_in_its_unit(seconds: float, words: str):
    assert dry_run.span(seconds) == words


def test_a_dry_run_looks_for_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    small = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--device=cpu", "--max_iters=99",
             "--batch_size=1", "--gradient_accumulation_steps=10", "--dataset=toy"]  # fmt: skip
    assert "# dataset         there is no dataset 'toy'" in dry_run.describe(load_config(small))
    write_dataset(tmp_path)
    assert "# dataset         toy, 6,000 tokens to train on, seen 1.33 times" in dry_run.describe(load_config(small))
