"""kill -9 at random moments and at every single step of a save: what looks finished is whole, the newest loads."""

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from tiny_checkpoint import assert_whole, save_steps, tiny_checkpoint

from nanogpt_fast.run.checkpoint import list_steps, load, newest, save
from nanogpt_fast.run.rundir import clean_stale

pytestmark = pytest.mark.skipif(os.name == "nt", reason="kills by signal")
KILLS = 30
CRASHED = 86
# Every call by which a save changes the disk, besides the writes themselves.
DISK_CALLS = ("mkdir", "open", "fsync", "rename", "unlink", "rmdir")


@pytest.fixture(scope="module")
def context():
    """Children are forked from a server that has torch in memory already: 0.1 s each, not 2 s."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "safetensors.torch", "hypothesis", "pytest"])
    return context


def start(context, target: Callable, *args: object) -> tuple[multiprocessing.Process, Connection]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*args, sender))
    process.start()
    sender.close()
    return process, receiver


def train_until_killed(out_dir: Path, sender: Connection) -> None:
    """Resume as a run does, then save as fast as possible, each third step twice; report what is saved."""
    clean_stale(out_dir / "checkpoints")
    step = newest(out_dir)[0].step
    while True:
        step += 1
        for _ in range(2 if step % 3 == 0 else 1):
            save(out_dir, tiny_checkpoint(step), keep_last=2)
        sender.send(step)


def assert_sound(out_dir: Path, at_least: int, why: str) -> int:
    """Nothing that looks finished is damaged, before and after cleaning; returns the newest step."""
    for path in list_steps(out_dir).values():
        assert_whole(load(path))
    clean_stale(out_dir / "checkpoints")
    checkpoint, _, skipped = newest(out_dir)
    assert_whole(checkpoint)
    assert (skipped, checkpoint.step >= at_least) == ([], True), f"{why}: step {checkpoint.step} of {at_least}"
    leftovers = [p.name for p in (out_dir / "checkpoints").iterdir() if p.name.startswith(".")]
    assert leftovers == [], why
    return checkpoint.step


def test_kill_at_random_moments_never_costs_a_saved_step(tmp_path, context):
    rng, reached, interrupted = random.Random(1337), 1, 0
    save_steps(tmp_path, 1)
    for kill in range(KILLS):
        process, receiver = start(context, train_until_killed, tmp_path)
        assert receiver.poll(60), "the child saved nothing"
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.join()
        while receiver.poll():
            try:
                reached = receiver.recv()
            except EOFError:
                break
        interrupted += any(p.name.startswith(".") for p in (tmp_path / "checkpoints").iterdir())
        reached = assert_sound(tmp_path, reached, f"kill {kill}")
    assert interrupted >= KILLS // 5, "most kills missed the save: they prove nothing"


def crash_at(out_dir: Path, step: int, call: int, sender: Connection) -> None:
    """Die as by kill -9 just before the disk call number `call` of a save; report how many there are."""
    calls = 0

    def counted(function: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            nonlocal calls
            if calls == call:
                os._exit(CRASHED)
            calls += 1
            return function(*args, **kwargs)

        return wrapper

    for name in DISK_CALLS:
        setattr(os, name, counted(getattr(os, name)))
    save(out_dir, tiny_checkpoint(step), keep_last=2)
    sender.send(calls)


def crash_everywhere(context, out_dir: Path, step: int, at_least: int) -> list[int]:
    """Crash one save before each of its disk calls in turn; the newest step found after each."""
    found = []
    for call in range(200):
        process, receiver = start(context, crash_at, out_dir, step, call)
        process.join()
        if process.exitcode == 0:
            assert receiver.recv() == call, "crashes were tried at each call"
            return found
        assert process.exitcode == CRASHED
        found.append(assert_sound(out_dir, at_least, f"crash at call {call}"))
        if found[-1] == step:  # published: take it back, so that the next crash starts from the same place
            os.rename(list_steps(out_dir)[step], out_dir / f"done-{call}")
        if list(list_steps(out_dir)) != [10, 20]:
            save_steps(out_dir, 10, 20)
    raise AssertionError("a save has no end")


def test_a_crash_before_each_disk_call_of_a_save(tmp_path, context):
    save_steps(tmp_path, 10, 20)
    found = crash_everywhere(context, tmp_path, 30, at_least=20)
    assert len(found) > 12, "mkdir, four files' fsyncs, renames, directories, the pruned one's files"
    assert found == sorted(found), "once published, always published"
    assert set(found) == {20, 30}


def test_a_crash_before_each_disk_call_of_saving_a_step_again(tmp_path, context):
    """The old one must survive until the new one has its name."""
    (path,) = save_steps(tmp_path, 10)
    for call in range(200):
        process, receiver = start(context, crash_at, tmp_path, 10, call)
        process.join()
        clean_stale(path.parent)
        assert_sound(tmp_path, 10, f"crash at call {call}")
        if process.exitcode == 0:
            assert receiver.recv() == call > 12
            return
    raise AssertionError("a save has no end")


def test_killed_between_publishing_and_pruning_the_next_save_prunes(tmp_path):
    save_steps(tmp_path, 10, 20, 30, 40)  # nothing pruned
    save(tmp_path, tiny_checkpoint(50), keep_last=2)
    assert list(list_steps(tmp_path)) == [40, 50]


def test_everything_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """The order that survives a power cut: files, manifest last, their directory, the name, its directory."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(("fsync", _name(fd))) or fsync(fd))
    monkeypatch.setattr(os, "rename", lambda a, b: events.append(("rename", _bare(str(b)))) or rename(a, b))
    path = save(tmp_path, tiny_checkpoint(10), keep_last=2)
    written = {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert {name for _, name in events[:3]} == written
    assert events[3:] == [
        ("fsync", "manifest.json"),
        ("fsync", ".tmp"),
        ("rename", "step_00000010"),
        ("fsync", "checkpoints"),
        ("fsync", tmp_path.name),
        ("fsync", "checkpoints"),
    ]
    assert json.loads((path / "manifest.json").read_text())["files"].keys() == written


def _name(fd: int) -> str:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc to tell what a descriptor is")
    return _bare(os.readlink(f"/proc/self/fd/{fd}"))


def _bare(path: str) -> str:
    name = os.path.basename(path)
    return name.split("-")[0] if name.startswith(".") else name
