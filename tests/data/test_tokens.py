"""Reading token files while the world changes under them."""

import errno
import json
import logging
import os
import threading
import time

import numpy as np
import pytest

from nanogpt_fast.data import tokens as tokens_module
from nanogpt_fast.data.splits import open_split
from nanogpt_fast.data.tokens import TokenSource, check_fingerprint
from nanogpt_fast.errors import DataError
from nanogpt_fast.settings.config import DataConfig


def write(path, count, first=0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.arange(first, first + count) % 65536).astype("<u2").tofile(path)
    return str(path)


def read(source: TokenSource, index: int, start: int, count: int) -> np.ndarray:
    out = np.empty((1, count), source.dtype)
    source.read_rows([index], [start], out)
    return out[0]


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(tokens_module, "RETRY_SECONDS", 0.0)


@pytest.mark.parametrize("has_preadv", [True, False])
def test_rows_of_several_files(tmp_path, monkeypatch, has_preadv):
    if not has_preadv:  # Windows
        monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr(tokens_module, "MAX_OPEN_FILES", 2)
    paths = [write(tmp_path / f"s_train_{i}.bin", 100, first=1000 * i) for i in range(5)]
    with TokenSource(paths) as source:
        assert source.n_tokens == 500
        out = np.empty((7, 4), np.uint16)
        source.read_rows([0, 4, 2, 3, 1, 4, 0], [0, 96, 50, 1, 2, 3, 7], out)
        assert out[:, 0].tolist() == [0, 4096, 2050, 3001, 1002, 4003, 7]
        assert (np.diff(out.astype(int)) == 1).all()
        assert len(source._descriptors) == 2


def test_threads_share_a_source(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "MAX_OPEN_FILES", 1)  # each read closes the other thread's file
    source = TokenSource([write(tmp_path / f"{i}.bin", 2000, first=3000 * i) for i in range(2)])
    wrong = []

    def reader(index):
        wrong.extend(i for i in range(500) if read(source, index, i, 1)[0] != 3000 * index + i)

    threads = [threading.Thread(target=reader, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    source.close()


def test_offsets_past_4_gib(tmp_path):
    path, count = tmp_path / "train.bin", (5 << 30) // 2
    with open(path, "wb") as file:
        for offset in (4 << 30, (5 << 30) - 8):
            file.seek(offset)
            file.write(np.arange(1, 5, dtype="<u2").tobytes())
    assert path.stat().st_blocks * 512 < 1 << 20, "the file should be sparse"
    with TokenSource([str(path)]) as source:
        assert source.n_tokens == count
        assert read(source, 0, 2 << 30, 5).tolist() == [1, 2, 3, 4, 0]
        assert read(source, 0, count - 4, 4).tolist() == [1, 2, 3, 4]


def test_reads_that_stop_early_are_continued(tmp_path, monkeypatch):
    whole = tokens_module._pread
    monkeypatch.setattr(tokens_module, "_pread", lambda fd, view, offset: whole(fd, view[:7], offset))
    with TokenSource([write(tmp_path / "train.bin", 100)]) as source:
        np.testing.assert_array_equal(read(source, 0, 10, 50), np.arange(10, 60))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_network_errors_are_retried_then_reported(tmp_path, monkeypatch, no_pause, caplog, code):
    whole, failures, tries, opened, os_open = tokens_module._pread, [3], [], [], os.open

    def flaky(fd, view, offset):
        tries.append(fd)
        if failures[0] > 0:
            failures[0] -= 1
            raise OSError(code, os.strerror(code))
        return whole(fd, view, offset)

    monkeypatch.setattr(tokens_module, "_pread", flaky)
    monkeypatch.setattr(os, "open", lambda *args: opened.append(args) or os_open(*args))
    with TokenSource([write(tmp_path / "train.bin", 100)]) as source:
        opened.clear()
        assert read(source, 0, 5, 2).tolist() == [5, 6]
        assert len(tries) == 4 and caplog.text.count("try ") == 3
        assert len(opened) == 4  # a stale handle stays stale: each try opens the file again
        failures[0] = 4
        with pytest.raises(DataError, match="cannot be read") as caught:
            read(source, 0, 5, 2)
    assert os.strerror(code) in caught.value.found and "--init_from=resume" in caught.value.hint


def test_other_read_errors_are_not_retried(tmp_path, monkeypatch, caplog):
    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with TokenSource([write(tmp_path / "train.bin", 100)]) as source:
        monkeypatch.setattr(tokens_module, "_pread", denied)
        with pytest.raises(DataError, match="Permission denied"):
            read(source, 0, 5, 2)
    assert not caplog.records


def test_unreadable_file_at_the_start(tmp_path, monkeypatch):
    path = write(tmp_path / "train.bin", 100)

    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)  # root reads a file of mode 000, so chmod shows nothing
    with pytest.raises(DataError, match="cannot be read") as caught:
        TokenSource([path])
    assert caught.value.where == path and "Permission denied" in caught.value.found


# ---- Files that change while they are read ----


def test_truncated_file(tmp_path):
    path = write(tmp_path / "train.bin", 1000)
    with TokenSource([path]) as source:
        read(source, 0, 900, 50)
        os.truncate(path, 1000)
        with pytest.raises(DataError, match="replaced"):
            read(source, 0, 400, 50)  # what is left can be read, but nobody knows what it is
        with pytest.raises(DataError, match="became shorter") as caught:
            read(source, 0, 900, 50)
        error = caught.value
        assert path in error.where and "2000 bytes" in error.expected and "1000 bytes" in error.found
        assert "--init_from=resume" in error.hint
        with pytest.raises(DataError, match="replaced"):
            source.check_unchanged(every_seconds=0)


def test_deleted_file(tmp_path):
    path = write(tmp_path / "train.bin", 1000)
    with TokenSource([path]) as source:
        read(source, 0, 0, 1)
        os.unlink(path)
        assert read(source, 0, 900, 50)[0] == 900  # an open file outlives its name
        source.check_unchanged(every_seconds=60)  # not yet time to look
        with pytest.raises(DataError, match="is gone") as caught:
            source.check_unchanged(every_seconds=0)
    assert caught.value.where == path and "--init_from=resume" in caught.value.hint


@pytest.mark.parametrize("fingerprinted", [True, False])
def test_replaced_file(tmp_path, fingerprinted):
    path = write(tmp_path / "train.bin", 1000)
    with TokenSource([path]) as source:
        if fingerprinted:
            source.fingerprint()
        os.replace(write(tmp_path / "new.bin", 1000, first=5), path)
        with pytest.raises(DataError, match="replaced"):
            source.check_unchanged(every_seconds=0)


def test_no_rows_of_a_file_that_was_written_over_are_handed_out(tmp_path, monkeypatch):
    """In place, in its size, between two looks at the names; and while the rows are being read."""
    path = tmp_path / "train.bin"
    out = np.empty((1, 8), np.uint16)
    for late in (False, True):
        write(path, 5000)
        with TokenSource([str(path)]) as source:
            source.fingerprint()
            source.read_rows([0], [0], out)
            real = source._read

            def read(*args, real=real, late=late):
                if late:
                    real(*args)
                path.write_bytes(bytes(path.stat().st_size))
                os.utime(path, ns=(1, 1))
                if not late:
                    real(*args)

            monkeypatch.setattr(source, "_read", read)
            source._checked = time.monotonic()
            with pytest.raises(DataError, match="replaced while the run was reading it"):
                source.read_rows([0], [0], out)


def test_a_new_time_stamp_alone_is_forgiven(tmp_path):
    path = write(tmp_path / "train.bin", 1000)
    with TokenSource([path]) as source:
        source.fingerprint()
        os.replace(write(tmp_path / "copy.bin", 1000), path)  # other inode, other time, same bytes
        source.check_unchanged(every_seconds=0)
        os.utime(path, ns=(1, 1))
        source.check_unchanged(every_seconds=0)
        assert read(source, 0, 900, 1)[0] == 900


def test_the_same_shard_twice_warns_once(tmp_path, caplog):
    path = write(tmp_path / "a_train_0.bin", 100)
    os.symlink(path, tmp_path / "a_train_1.bin")
    with open_split(DataConfig(dataset=str(tmp_path)), "train") as source:
        assert source.n_tokens == 200
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and "same file" in caplog.text


def test_mixed_widths(tmp_path):
    np.save(tmp_path / "a_train_1.npy", np.arange(9, dtype="<u4"))
    with pytest.raises(DataError, match="mix"):
        TokenSource([write(tmp_path / "a_train_0.bin", 9), str(tmp_path / "a_train_1.npy")])


# ---- Fingerprint ----


def test_fingerprint_survives_json_and_names_the_change(tmp_path):
    paths = [write(tmp_path / f"a_train_{i}.bin", 2_000_000) for i in range(2)]
    with TokenSource(paths) as source:
        saved = json.loads(json.dumps(source.fingerprint()))
        assert saved["tokens"] == 4_000_000
        check_fingerprint(saved, source.fingerprint())
    with open(paths[1], "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xaa")
    with TokenSource(paths) as source, pytest.raises(DataError, match="data changed") as caught:
        check_fingerprint(saved, source.fingerprint())
    error = caught.value
    assert error.where == "a_train_1.bin" and "--ignore_fingerprint" in error.hint
    assert saved["files"][1]["sha256_ends"][:16] in error.expected
    assert "sha256" in error.found and error.found != error.expected


def test_fingerprint_of_fewer_files_and_of_another_order(tmp_path):
    paths = [write(tmp_path / f"{i}.bin", 100, first=i) for i in range(2)]
    both, one, turned = (TokenSource(p).fingerprint() for p in (paths, paths[:1], paths[::-1]))
    with pytest.raises(DataError) as caught:
        check_fingerprint(both, one)
    assert caught.value.where == "1.bin" and "no such file" in caught.value.found
    with pytest.raises(DataError, match="order of the files"):
        check_fingerprint(both, turned)
