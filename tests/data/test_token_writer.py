"""The writer's promises: shards as llm.c reads them, resume at the last commit, nothing half done that looks whole."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanogpt_fast.data import token_writer
from nanogpt_fast.data.dataset import read_meta, verify
from nanogpt_fast.data.token_writer import PARTIAL, TokenWriter, locked, stale_files
from nanogpt_fast.errors import DataError

SETTINGS = {"seed": 1}


@pytest.fixture(autouse=True)
def quick_fsync(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Real ones cost 10 ms each on a busy disk; the list holds the names of what was synced, and of renames."""
    done: list[str] = []
    real = os.replace

    def replace(source, target) -> None:
        done.append(f"rename {Path(target).name}")
        real(source, target)

    monkeypatch.setattr(
        token_writer.os,
        "fsync",
        lambda fd: done.append(
            f"sync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}" if Path("/proc").is_dir() else "sync"
        ),
    )
    monkeypatch.setattr(token_writer.os, "replace", replace)
    return done


CHAR = {"kind": "char", "itos": ["a", "b"]}


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint16)


def publish(writer: TokenWriter, tokenizer: dict | None = None):
    return writer.publish(2, tokenizer or {"kind": "gpt2"}, "a test", "nanogpt_fast 0")


def shard(path: Path) -> list[int]:
    header = np.fromfile(path, dtype="<i4", count=256)
    tokens = np.fromfile(path, dtype="<u2", offset=1024)
    assert header[:3].tolist() == [20240520, 1, len(tokens)] and not header[3:].any()
    return tokens.tolist()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 25), min_size=1, max_size=8), st.integers(1, 12))
def test_any_writes_give_full_shards_and_a_last_one(tmp_path_factory, lengths: list[int], shard_tokens: int) -> None:
    folder = tmp_path_factory.mktemp("x") / "set"
    folder.mkdir()
    writer = TokenWriter(folder, "llmc", shard_tokens, SETTINGS)
    everything = list(range(65535, 65535 - sum(lengths) - 1, -1))
    writer.write("val", ids(7))
    writer.write("train", ids(everything[0]))
    for end, length in zip(np.cumsum(lengths) + 1, lengths):
        writer.write("train", ids(*everything[end - length : end]))
    meta = publish(writer)
    files = [folder / file.name for file in meta.splits["train"].files]
    assert [f.name for f in files] == [f"set_train_{i:06d}.bin" for i in range(len(files))]
    held = [shard(f) for f in files]
    assert [len(h) for h in held[:-1]] == [shard_tokens] * (len(held) - 1) and held[-1]
    assert sum(held, []) == everything
    assert meta.splits["train"].tokens == len(everything) and verify(folder) == meta


@pytest.mark.parametrize("format", ["bin", "llmc"])
@pytest.mark.parametrize("kept", [0, 1, 9, 10, 11, 20, 25])
def test_resume_goes_on_at_the_last_commit(tmp_path: Path, format: str, kept: int) -> None:
    def new() -> TokenWriter:
        return TokenWriter(tmp_path, format, 10, SETTINGS)  # type: ignore[arg-type]

    writer = new()
    writer.write("val", ids(5, 6))
    writer.write("train", ids(*range(kept)))
    writer.mark(3, {"shard": 1})
    writer.commit()
    writer.write("train", ids(*[999] * 17))  # lost: never committed
    writer.write("val", ids(999))
    writer.abandon()
    again = new()
    assert (again.documents, again.state, again.tokens, again.committed) == (3, {"shard": 1}, kept + 2, kept + 2)
    again.write("train", ids(*range(kept, 28)))
    meta = publish(again)
    read = shard if format == "llmc" else lambda path: np.fromfile(path, "<u2").tolist()
    assert sum((read(tmp_path / f.name) for f in meta.splits["train"].files), []) == list(range(28))
    assert read(tmp_path / meta.splits["val"].files[0].name) == [5, 6]
    assert not (tmp_path / PARTIAL).exists()


@pytest.mark.parametrize("damage", ["settings", "journal", "short", "missing", "types"])
def test_what_cannot_be_resumed_is_started_over(tmp_path: Path, damage: str) -> None:
    writer = TokenWriter(tmp_path, "bin", 10, SETTINGS)
    writer.write("train", ids(1, 2, 3))
    writer.mark(3, None)
    writer.commit()
    writer.abandon()
    partial = tmp_path / PARTIAL
    if damage == "journal":
        (partial / "journal.json").write_text('{"settings"')
    elif damage == "types":
        (partial / "journal.json").write_text(
            json.dumps({"settings": SETTINGS, "documents": 3, "state": 0, "tokens": 1})
        )
    elif damage == "short":
        os.truncate(partial / "train.bin", 4)
    elif damage == "missing":
        (partial / "train.bin").unlink()
    again = TokenWriter(tmp_path, "bin", 10, {"seed": 2} if damage == "settings" else SETTINGS)
    assert (again.documents, again.state, again.tokens) == (0, None, 0)
    assert names(partial) == []


def test_a_failure_before_the_first_commit_leaves_nothing(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path, "bin", 10, SETTINGS)
    writer.write("train", ids(1))
    assert names(tmp_path) == [PARTIAL]
    writer.abandon()
    assert names(tmp_path) == []


def test_an_empty_split_is_refused_and_nothing_published(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path, "bin", 10, SETTINGS)
    writer.write("train", ids(1))
    writer.mark(1, None)
    writer.commit()
    with pytest.raises(DataError, match="the val split got no tokens"):
        publish(writer)
    writer.abandon()
    assert names(tmp_path) == []  # resuming would end the same way


def test_a_new_dataset_leaves_no_file_of_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for old in ("train.bin", "val.bin", "set_train_000000.bin", "set_train_000007.bin", "train_000003.bin", "meta.pkl"):
        (folder / old).write_bytes(b"old")
    for mine in ("input.txt", "training.bin", "my_train.bin", "notes.md"):
        (folder / mine).write_bytes(b"mine")
    writer = TokenWriter(folder, "bin", 10, SETTINGS)
    for split in ("train", "val"):
        writer.write(split, ids(0, 1))
    publish(writer, CHAR)
    assert names(folder) == ["input.txt", "meta.json", "meta.pkl"] + [
        "my_train.bin", "notes.md", "train.bin", "training.bin", "val.bin"
    ]  # fmt: skip
    meta = read_meta(folder)
    assert meta and meta.tokenizer == CHAR and meta.settings == SETTINGS


@pytest.mark.parametrize("format", ["bin", "llmc"])
def test_killed_at_any_rename_nothing_looks_finished(tmp_path: Path, monkeypatch, format: str) -> None:
    """A fault at the k-th rename, for every k: the old dataset whole, or no meta.json and no first training file
    without the rest; and a rerun has only the renames to do."""
    real, steps = os.replace, 0

    def replace(source, target) -> None:
        nonlocal steps
        if steps == 0:
            raise KeyboardInterrupt
        steps -= 1
        real(source, target)

    for k in range(20):
        folder = tmp_path / f"set{k}"
        folder.mkdir()
        (folder / "meta.json").write_text("{}")  # an older dataset, being replaced
        (folder / "train.bin").write_bytes(b"older")
        writer = TokenWriter(folder, format, 2, SETTINGS)  # type: ignore[arg-type]
        for split in ("train", "val"):
            writer.write(split, ids(0, 1, 0))
        monkeypatch.setattr(token_writer.os, "replace", replace)
        steps = k
        try:
            publish(writer, CHAR)
        except KeyboardInterrupt:
            monkeypatch.setattr(token_writer.os, "replace", real)
            stem = f"set{k}_" if format == "llmc" else ""
            first, last = (f"{stem}train_000000.bin", f"{stem}train_000001.bin") if stem else ("train.bin", "val.bin")
            there = names(folder)
            if k == 0:  # the journal's: the older dataset stands, and the tokens are encoded anew
                assert "meta.json" in there and (folder / "train.bin").read_bytes() == b"older"
                continue
            assert "meta.json" not in there
            assert first not in there or {"meta.pkl", last} <= set(there)
            writer.abandon()
            again = TokenWriter(folder, format, 2, SETTINGS)  # type: ignore[arg-type]
            assert again.ready and again.finish() == verify(folder) and not (folder / PARTIAL).exists()
        else:
            monkeypatch.setattr(token_writer.os, "replace", real)
            break
    assert k == (7 if format == "llmc" else 5) and verify(folder)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_is_an_error_with_a_way_out(tmp_path: Path, monkeypatch, code: int) -> None:
    def fail(file, data) -> None:
        raise OSError(code, os.strerror(code))

    writer = TokenWriter(tmp_path, "bin", 10, SETTINGS)
    monkeypatch.setattr(token_writer, "_write_all", fail)
    with pytest.raises(DataError, match="disk is full" if code != errno.EIO else "cannot be written") as error:
        writer.write("train", ids(1))
    assert os.strerror(code) in str(error.value) and "--out" in str(error.value)


def test_short_writes_are_completed(tmp_path: Path) -> None:
    class Short:
        held = b""

        def write(self, data: memoryview) -> int:
            self.held += bytes(data[:3])
            return min(3, len(data))

    file = Short()
    token_writer._write_all(file, bytes(range(10)))
    assert file.held == bytes(range(10))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with locked(folder, 0):
        (folder / "x").touch()
        with pytest.raises(DataError, match="another process"), locked(folder, 0):
            pass
    with locked(folder, 0):
        pass
    with locked(tmp_path / "empty", 0):
        pass
    assert not (tmp_path / "empty").exists()  # nothing was written: no folder stays


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "set").touch()
    with pytest.raises(DataError, match="cannot be written"), locked(tmp_path / "set", 0):
        pass


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to name descriptors")
def test_what_is_renamed_was_synced_before(tmp_path: Path, quick_fsync: list[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    writer = TokenWriter(folder, "bin", 10, SETTINGS)
    for split in ("train", "val"):
        writer.write(split, ids(0, 1))
    publish(writer, CHAR)
    tail = ["rename val.bin", "rename train.bin", "sync set", "sync meta.json.tmp", "rename meta.json", "sync set"]
    assert quick_fsync == [
        *("sync train.bin", "sync val.bin"),
        *("sync journal.json.tmp", "rename journal.json", "sync .partial"),
        *("sync meta.pkl.tmp", "rename meta.pkl", "sync set"),
        *tail,
    ]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to name descriptors")
def test_what_a_journal_promises_was_synced_before(tmp_path: Path, quick_fsync: list[str]) -> None:
    writer = TokenWriter(tmp_path, "bin", 10, SETTINGS)
    for split in ("train", "val"):
        writer.write(split, ids(0, 1))
    writer.mark(1, None)
    writer.commit()
    until = quick_fsync.index("rename journal.json")
    assert {"sync train.bin", "sync val.bin", "sync journal.json.tmp"} == set(quick_fsync[:until])


def test_stale_files_of_a_folder_without_any(tmp_path: Path) -> None:
    (tmp_path / "input.txt").touch()
    assert stale_files(tmp_path) == []
