"""Where an export goes: what --force may replace, what a live run's folder is spared, what killed exports leave."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import random_weights, same_tensors

from nanogpt_fast import command, convert
from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.run.rundir import RunLock
from nanogpt_fast.weights import destination, formats, huggingface
from nanogpt_fast.weights.formats import read, write

FIRST, SECOND = random_weights(seed=1), random_weights(seed=2)


def refusal(dst: Path, to: formats.Format) -> CheckpointError:
    with pytest.raises(CheckpointError) as refused:
        write(SECOND, dst, to, force=True)
    assert refused.value.exit_code == 4
    return refused.value


def test_a_folder_that_looks_like_an_export_keeps_the_users_files(tmp_path):
    """The one that was lost: config.json beside a thesis."""
    (tmp_path / "P/.git").mkdir(parents=True)
    (tmp_path / "P/config.json").write_text("{}")
    (tmp_path / "P/thesis.tex").write_text("x")
    assert refusal(tmp_path / "P", "hf").found == "thesis.tex"
    assert sorted(p.name for p in (tmp_path / "P").iterdir()) == [".git", "config.json", "thesis.tex"]


@pytest.mark.parametrize("name", ["notes.md", ".env", "pytorch_model.bin", "checkpoints", "model.safetensors.bak"])
def test_force_names_what_no_export_wrote(tmp_path, name):
    folder = write(FIRST, tmp_path / "hf", "hf")
    (folder / name).mkdir() if name == "checkpoints" else (folder / name).write_text("mine")
    assert refusal(folder, "hf").found == name
    assert (folder / name).exists() and same_tensors(huggingface.read(folder).model, FIRST.model)


def test_known_names_of_another_hand_or_kind_are_kept(tmp_path):
    folder = write(FIRST, tmp_path / "hf", "hf")
    (folder / "README.md").write_text("# my own card")
    assert "README.md" in refusal(folder, "hf").found
    (folder / "README.md").unlink()  # a downloaded model has our names, not our card
    assert "README.md" in refusal(folder, "hf").found
    (folder / "README.md").mkdir()
    assert refusal(folder, "hf").found == "README.md, which is no regular file"


def test_a_repository_stays_one(tmp_path):
    folder = write(FIRST, tmp_path / "hf", "hf")
    (folder / ".git").mkdir()
    (folder / ".git/HEAD").write_text("ref: refs/heads/main")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    write(SECOND, folder, "hf", force=True)
    assert same_tensors(read(folder).model, SECOND.model)
    assert (folder / ".git/HEAD").read_text() == "ref: refs/heads/main"
    assert (folder / ".gitattributes").read_text() == "*.safetensors filter=lfs"
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("to", ["nanogpt", "llmc", "hf"])
def test_a_file_of_another_kind_is_not_replaced(tmp_path, to):
    other = tmp_path / "thesis.pt"
    with zipfile.ZipFile(other, "w") as archive:  # begins as torch's files do
        archive.writestr("word/document.xml", "x" * 50)
    before = other.read_bytes()
    refusal(other, to)
    torch.save({"yolo": torch.ones(3)}, other)
    refusal(other, to)
    other.unlink()
    other.write_bytes(before)
    link = tmp_path / "link.pt"
    link.symlink_to(other)
    refusal(link, to)
    assert other.read_bytes() == before


def test_a_folder_where_a_file_belongs_is_refused(tmp_path):
    (tmp_path / "m.bin").mkdir()
    (tmp_path / "m.bin/mine").write_text("x")
    assert refusal(tmp_path / "m.bin", "llmc").found == "a folder"
    (tmp_path / "out/ckpt.pt").mkdir(parents=True)
    (tmp_path / "out/ckpt.pt/mine").write_text("x")
    assert refusal(tmp_path / "out", "nanogpt").found == "a folder"


def test_a_link_stays_a_link(tmp_path):
    write(FIRST, tmp_path / "big/a.pt", "nanogpt")
    (tmp_path / "latest.pt").symlink_to("big/a.pt")
    write(SECOND, tmp_path / "latest.pt", "nanogpt", force=True)
    assert (tmp_path / "latest.pt").is_symlink() and same_tensors(read(tmp_path / "big/a.pt").model, SECOND.model)


def test_native_force_moves_checkpoints_of_the_same_step_aside_and_loses_none(tmp_path, caplog):
    step = write(FIRST, tmp_path, "native")
    write(SECOND, tmp_path, "native", force=True)
    assert same_tensors(read(tmp_path).model, SECOND.model)
    moved = tmp_path / "checkpoints.abandoned-1" / step.name
    assert same_tensors(read(moved).model, FIRST.model) and str(moved.parent) in caplog.text


def test_what_is_no_checkpoint_in_a_run_stays(tmp_path):
    mine = tmp_path / "checkpoints/step_00000012"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert refusal(tmp_path, "native").where == str(mine) and mine.read_text() == "mine"


@pytest.mark.parametrize("to", ["native", "nanogpt"])
def test_the_folder_of_a_live_run_is_left_alone(tmp_path, to):
    if to == "native":
        write(FIRST, tmp_path, "native")
    before = [p for p in sorted(tmp_path.rglob("*")) if ".run.lock" not in p.name]
    with RunLock(tmp_path):
        said = refusal(tmp_path, to)
        assert "another run" in said.what and str(os.getpid()) in said.found
    assert [p for p in sorted(tmp_path.rglob("*")) if ".run.lock" not in p.name] == before
    write(SECOND, tmp_path, to, force=True)


# ---- what killed exports leave ----


def gone() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def workshop(dst: Path, pid: int, host: str = "") -> Path:
    path = dst.with_name(f".tmp-{dst.name}-{pid}@{host or socket.gethostname()}-0123abcd")
    (path / "new").mkdir(parents=True)
    return path


def test_the_next_export_sweeps_what_dead_ones_left_and_nothing_else(tmp_path):
    dst = tmp_path / "hf"
    dead = [workshop(dst, gone()), workshop(dst, os.getpid())]  # a container gives one number again and again
    others = [workshop(dst, os.getppid()), workshop(dst, gone(), "elsewhere"), workshop(tmp_path / "hf2", gone())]
    (tmp_path / ".hf.mine").mkdir()
    write(FIRST, dst, "hf")
    assert not any(path.exists() for path in dead) and all(path.exists() for path in others)
    assert (tmp_path / ".hf.mine").exists()


def test_killed_between_the_renames_nothing_is_lost(tmp_path):
    dst, first = tmp_path / "hf", write(FIRST, tmp_path / "hf", "hf")
    (first / ".git").mkdir()
    left = workshop(dst, gone())
    dst.rename(left / "old")
    destination.sweep(dst)
    assert same_tensors(read(dst).model, FIRST.model) and (dst / ".git").is_dir() and not left.exists()
    left = workshop(dst, gone())  # killed after both renames, before .git was brought back
    dst.rename(left / "old")
    write(SECOND, tmp_path / "second", "hf").rename(dst)
    write(SECOND, dst, "hf", force=True)
    assert same_tensors(read(dst).model, SECOND.model) and (dst / ".git").is_dir() and not left.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.usefixtures("signals_heeded")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_convert_between_two_pieces_and_leaves_nothing(tmp_path, monkeypatch, capsys, number):
    write(FIRST, tmp_path / "a.pt", "nanogpt")
    pieces, whole = [], huggingface._safetensors

    def interrupted(*args: Any) -> Iterator[Any]:
        for piece in whole(*args):
            pieces.append(len(piece))
            if len(pieces) == 9:
                os.kill(os.getpid(), number)
            yield piece

    monkeypatch.setattr(huggingface, "PIECE", 1000)
    monkeypatch.setattr(huggingface, "_safetensors", interrupted)
    with command._unwinding():
        code = command._guarded(convert.main, [f"{tmp_path}/a.pt", f"{tmp_path}/hf", "--to=hf"], convert.AGAIN)
    assert code == 128 + number and len(pieces) == 9 and max(pieces[2:]) == 1000
    assert convert.AGAIN in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_a_signal_is_heard_while_the_disk_takes_its_time(tmp_path, monkeypatch):
    """fsync of some gigabytes takes long, and hears nothing."""
    done = threading.Event()

    def sync(path: Path) -> None:
        assert threading.current_thread() is not threading.main_thread()
        done.wait(30)

    monkeypatch.setattr(destination, "sync", sync)
    monkeypatch.setattr(command, "_came", [])  # no boundary is here to answer the signal, a later test has one
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    began = time.monotonic()
    with command._unwinding(), pytest.raises(command.Stopped):
        try:
            write(FIRST, tmp_path / "m.bin", "llmc")
        finally:
            timer.cancel()  # where the write failed before it, nobody is there to take it
    done.set()
    assert time.monotonic() - began < 1.2 and not list(tmp_path.iterdir())


def test_a_long_export_tells_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(destination, "SHOW_AFTER_S", 0.01)
    monkeypatch.setattr(destination, "TELL_EVERY_S", 0.1)
    with destination.written_beside(tmp_path / "a.bin", expected_bytes=3_000_000_000) as new:
        new.write_bytes(bytes(20_000_000))
        time.sleep(0.3)
    assert "written 0.02 of 3.00 GB" in capsys.readouterr().err
