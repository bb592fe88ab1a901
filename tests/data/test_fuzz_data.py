"""Files of a dataset with anything wrong in them: read, or refused by a NanogptError, in bounded memory and time.

The mutations run in a child: a reader may end the process too, and the child's address space and alarm are limited.
"""

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

KINDS = [
    "meta.json",
    "meta.pkl",
    "train.bin",
    "llmc.bin",
    "llmc4.bin",
    "x.npy",
    "x.jsonl",
    "x.json",
    "x.csv",
    "x.parquet",
]
QUICK, MANY = 40, 2000
PIECES = [
    b"\xff", b"\x00", b"\x80", b"\xff" * 4, b"\x00\x00\x00\x80", b"\xff\xff\xff\x7f", b"\xff" * 8, b"\x00" * 64,
    b"-1", b"1e999", b"NaN", b"Infinity", b"null", b"true", b"[]", b"{}", b'""', b"9" * 30, b"9" * 5000, b"[" * 3000,
    b"\\u0000", b"\\ud800", b"../../x", b"\xef\xbb\xbf", b"\n", b",", b'"', b"(", b"'", b"\x93NUMPY", b"}", b"t", b"R",
]  # fmt: skip


def originals() -> dict[str, list[bytes]]:
    """Good files of each kind."""
    import io
    import json
    import pickle

    import numpy as np

    from nanogpt_fast.data.meta_pickle import nanogpt_pickle

    ids = np.arange(700)
    file = {"name": "train.bin", "bytes": 1400, "sha256": "0" * 64}
    meta = {
        "format": 1,
        "tokenizer": {"kind": "char", "itos": list("abc")},
        "vocab_size": 3,
        "splits": {"train": {"tokens": 700, "files": [file]}},
        "source": "x",
        "created_by": "y",
        "settings": {"seed": 1},
    }
    odd = {"vocab_size": np.int64(2), "itos": ["a", "the"], "x": [None, 1.5, {1}, (2,), True]}
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 700
    wide = header.copy()
    wide[:2] = 20240801, 7
    saved = io.BytesIO()
    np.save(saved, ids.astype("<u2"))
    rows = [{"text": f"text {i} é", "n": i} for i in range(9)]
    found = {
        "meta.json": [json.dumps(meta).encode()],
        "meta.pkl": [nanogpt_pickle(list("abcdé"))] + [pickle.dumps(odd, protocol) for protocol in range(6)],
        "train.bin": [ids.astype("<u2").tobytes()],
        "llmc.bin": [header.tobytes() + ids.astype("<u2").tobytes()],
        "llmc4.bin": [wide.tobytes() + ids.astype("<u4").tobytes()],
        "x.npy": [saved.getvalue()],
        "x.jsonl": ["".join(json.dumps(row) + "\n" for row in rows).encode()],
        "x.json": [json.dumps(rows).encode()],
        "x.csv": [b"n,text\n" + "".join(f'{r["n"]},"{r["text"]}"\n' for r in rows).encode()],
    }
    if "x.parquet" in KINDS:
        import pyarrow
        from pyarrow import parquet

        found["x.parquet"] = []
        for compression in ("none", "zstd"):
            sink = io.BytesIO()
            parquet.write_table(pyarrow.Table.from_pylist(rows), sink, compression=compression)
            found["x.parquet"].append(sink.getvalue())
    return found


def mutated(data: bytes, draw: random.Random) -> bytes:
    """1 to 4 changes: a bit, a piece put in or over, a cut, a part repeated or left out."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, end = sorted(draw.randrange(len(out) + 1) for _ in range(2))
        end = min(end, at + draw.choice([1, 4, 16, 1000]))
        piece = draw.choice(PIECES)
        how = draw.randrange(6)
        if how == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            out[at:at] = piece
        elif how == 2:
            out[at : at + len(piece)] = piece
        elif how == 3:
            out[at:end] = b""
        elif how == 4:
            out[at:at] = out[at:end] * draw.choice([1, 2, 50])
        elif draw.random() < 0.3:
            del out[at:]
    return bytes(out)


def read(folder: Path, name: str) -> None:
    """What train, prepare, evaluate and sample do with such a file."""
    import numpy as np

    from nanogpt_fast.data.dataset import is_complete, read_meta
    from nanogpt_fast.data.documents import FileDocuments
    from nanogpt_fast.data.splits import open_split
    from nanogpt_fast.data.tokenizer import from_json
    from nanogpt_fast.data.tokens import TokenSource
    from nanogpt_fast.settings.config import DataConfig

    if name.startswith("meta"):
        meta = read_meta(folder)
        assert meta and meta.vocab_size >= 1
        is_complete(folder)
        if meta.tokenizer["kind"] != "gpt2":
            tokenizer = from_json(meta.tokenizer)
            tokenizer.decode([0, tokenizer.vocab_size - 1])
            tokenizer.token_bytes()
        open_split(DataConfig(dataset=folder.name, data_dir=str(folder.parent)), "val", required=True)
    elif name in ("train.bin", "llmc.bin", "llmc4.bin", "x.npy"):
        with TokenSource([str(folder / name)]) as source:
            source.fingerprint()
            out = np.empty((1, min(source.n_tokens, 100)), source.dtype)
            source.read_rows([0], [source.n_tokens - out.shape[1]], out)
    else:
        for text, _ in FileDocuments([folder / name], "a test").read():
            assert text


def child(names: list[str], first: int, last: int, folder: Path) -> None:
    """Mutations first .. last - 1 of these kinds; prints what broke the promise, by its number."""
    import resource
    import signal
    import traceback

    from nanogpt_fast.errors import NanogptError

    good = originals()
    for name in good:  # all that is imported later, once
        (folder / name).write_bytes(good[name][0])
        with contextlib.suppress(NanogptError):
            read(folder, name)
        (folder / name).unlink()
    (folder / "val.bin").write_bytes(bytes(range(200)))
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**30, resource.RLIM_INFINITY))
    for name in (name for name in names if name in good):
        for number in range(first, last):
            draw = random.Random(f"{name} {number}")
            (folder / name).write_bytes(mutated(draw.choice(good[name]), draw))
            print(name, number, file=sys.stderr, flush=True)  # the last one seen of a child that is gone
            signal.alarm(10)
            try:
                with contextlib.suppress(NanogptError):
                    read(folder, name)
            except BaseException:
                print(f"{name} {number}:", traceback.format_exc()[-1500:], flush=True)
            signal.alarm(0)
        (folder / name).unlink()


def run_child(tmp_path: Path, names: list[str], first: int, last: int) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, ",".join(names), str(first), str(last), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seen = done.stderr.splitlines()[-3:]
    assert done.returncode == 0 and not done.stdout, f"{done.stdout[:6000]}\nended with {done.returncode} after {seen}"


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to limit the memory")


@needs_proc
def test_some_damaged_files_of_every_kind(tmp_path: Path) -> None:
    run_child(tmp_path, KINDS, 0, QUICK)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files(tmp_path: Path, name: str) -> None:
    run_child(tmp_path, [name], QUICK, MANY)


if __name__ == "__main__":
    child(sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
