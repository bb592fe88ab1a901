"""The layouts of token files, and what is said about damaged ones."""

import pickle

import numpy as np
import pytest

from nanogpt_fast.data.token_format import inspect
from nanogpt_fast.data.tokens import TokenSource
from nanogpt_fast.errors import DataError

TOKENS = np.arange(1000, 1300)


def llmc(tokens, magic=20240520, version=1, count=None, dtype="<u2") -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + tokens.astype(dtype).tobytes()


def npy(path, array) -> bytes:
    np.save(path, array, allow_pickle=True)
    return path.with_suffix(".npy").read_bytes()


@pytest.mark.parametrize(
    ("layout", "dtype", "offset"),
    [
        ("nanogpt", "<u2", 0),
        ("llm.c", "<u2", 1024),
        ("llm.c", "<u4", 1024),
        ("npy", "<u2", 128),
        ("npy", "<u4", 128),
        ("npy", "<i4", 128),
    ],
)
def test_every_layout_is_sniffed_and_read(tmp_path, layout, dtype, offset):
    content = {
        "nanogpt": lambda: TOKENS.astype(dtype).tobytes(),
        "llm.c": lambda: llmc(TOKENS, *((20240520, 1) if dtype == "<u2" else (20240801, 7)), dtype=dtype),
        "npy": lambda: npy(tmp_path / "saved", TOKENS.astype(dtype)),
    }[layout]()
    path = tmp_path / "train.bin"  # the name says nothing: the first bytes do
    path.write_bytes(content)
    file = inspect(str(path))
    assert (file.layout, file.dtype, file.offset, file.n_tokens) == (layout, dtype, offset, len(TOKENS))
    with TokenSource([str(path)]) as source:
        assert source.dtype == (np.uint16 if dtype == "<u2" else np.int32)
        out = np.empty((2, 150), source.dtype)
        source.read_rows([0, 0], [0, 150], out)
        np.testing.assert_array_equal(out.ravel(), TOKENS)


def test_npy_version_2_header(tmp_path):
    path = tmp_path / "train.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array(file, TOKENS.astype("<u2"), version=(2, 0))
    assert inspect(str(path)).n_tokens == 300


DAMAGED = {
    "D1 empty": (b"", "is empty", "0 bytes", "python -m nanogpt_fast.prepare shakes"),
    "D2 odd length": (TOKENS.astype("<u2").tobytes() + b"\1", "odd length", "601 bytes", "prepare it again"),
    "D3 other llm.c file": (llmc(TOKENS, magic=20240522), "magic", "20240522 (llm.c: a model", "prepare"),
    "D3 header of our shape": (llmc(TOKENS, magic=77), "magic", "77", "prepare"),
    "D4 version": (llmc(TOKENS, version=2), "unknown version", "version 2", "write the shard again"),
    "D5 truncated": (llmc(TOKENS)[:-100], "is truncated", "1524 bytes", "download or prepare"),
    "D5 header cut off": (llmc(TOKENS)[:600], "is truncated", "600 bytes", "download or prepare"),
    "D6 trailing": (llmc(TOKENS) + b"\0\0", "trailing", "1626 bytes", "download or prepare"),
    "text": (b"First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 9, "text", "First Cit", "prepare"),
    "npy magic alone": (b"\x93NUMPY", "header cannot be read", "", "prepare"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file(tmp_path, name):
    content, what, found, hint = DAMAGED[name]
    path = tmp_path / "shakes" / "train.bin"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        inspect(str(path))
    error = caught.value
    assert what in error.what and error.where == str(path) and found in error.found and hint in error.hint


@pytest.mark.parametrize(
    "array", [TOKENS.reshape(10, 30).astype("<u2"), TOKENS.astype("<f4"), TOKENS.astype(">u2"), TOKENS.astype("<i8")]
)
def test_npy_that_holds_no_tokens(tmp_path, array):
    npy(tmp_path / "train", array)
    with pytest.raises(DataError, match="does not hold tokens"):
        inspect(str(tmp_path / "train.npy"))


def test_truncated_npy(tmp_path):
    (tmp_path / "train.npy").write_bytes(npy(tmp_path / "saved", TOKENS.astype("<u2"))[:-2])
    with pytest.raises(DataError, match="truncated"):
        inspect(str(tmp_path / "train.npy"))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_npy_is_not_run(tmp_path):
    touched = tmp_path / "touched"
    npy(tmp_path / "train", np.array([Payload(str(touched))], dtype=object))
    with pytest.raises(DataError):
        inspect(str(tmp_path / "train.npy"))
    assert not touched.exists()
    pickle.loads(pickle.dumps(Payload(str(touched)))).close()
    assert touched.exists()  # the payload does work, where somebody unpickles it


def test_zeros_are_tokens(tmp_path):
    (tmp_path / "train.bin").write_bytes(bytes(1024))
    assert inspect(str(tmp_path / "train.bin")).n_tokens == 512
