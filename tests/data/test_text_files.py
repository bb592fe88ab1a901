"""Files of text as people have them: suffixes, packing, byte-order marks, other encodings, devices, great length."""

import gzip
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanogpt_fast.data import text_files
from nanogpt_fast.data.documents import FileDocuments, find_files
from nanogpt_fast.data.text_files import read_chunks, write_text
from nanogpt_fast.errors import ConfigError, DataError
from nanogpt_fast.prompts import PROMPT_BYTES, read_prompt

ROWS = ["one", "two é\n", 'three \U0001f600, with "quotes"', ""]
LINES = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in ROWS)
CSV = 'n,text\n1,one\n1,"two é\n"\n1,"three \U0001f600, with ""quotes"""\n1,\n'


def documents(*paths: Path, field: str = "text") -> list[str]:
    texts = [""]
    for text, ends in FileDocuments(list(paths), "a test", field).read():
        texts[-1] += text
        texts += [""] * ends
    return texts[:-1]


def zst(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.compress(data, "zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.JSONL", LINES.encode()),
        ("a.ndjson", LINES.encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.NDJSON.GZ", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json", json.dumps([{"text": text} for text in ROWS], indent=2).encode()),
        ("a.json", b"\xef\xbb\xbf \n" + json.dumps([{"text": text} for text in ROWS]).encode()),
        ("a.json", LINES.encode()),
        ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("a.tsv", CSV.replace("1,", "1\t").replace("n,", "n\t").encode()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [1 << 20, 7])
def test_rows_of_every_form(tmp_path: Path, monkeypatch: Any, name: str, data: bytes, chunk: int) -> None:
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    (tmp_path / name).write_bytes(data)
    assert documents(tmp_path / name) == ROWS[:3]
    if name.endswith("json"):
        (tmp_path / f"{name}.zst").write_bytes(zst(data))
        assert documents(tmp_path / f"{name}.zst") == ROWS[:3]


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.json", b'[{"text": "x"}, {"text": "cut', "not JSON"),
        ("a.json", b'[{"text": "x"}, {"text" "y"}' + b" " * 100 + b"]", "row 1\n.*column"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'{"rows": [1]}', "no field 'text'"),
        ("a.json", b'[{"text": 1' + b"0" * 5000 + b"}]", "Exceeds the limit"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b'{"text": "x", "n": 1' + b"0" * 5000 + b"}", "Exceeds the limit"),
        ("a.csv", b"n,body\n1,x\n", "no field 'text'\n.*\n.*\n  found:    n, body"),
        ("a.csv", b"n,text\n1\n", "is not text"),
        ("a.csv", b"text\n\xff\n", "not UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], "cannot be read"),
        ("a.txt.gz", b"plain", "cannot be read\n.*\n  found:    Not a gzipped file"),
        ("a.txt", gzip.compress(b"x" * 100, mtime=0), r"gzip data without the suffix \.gz"),
        ("a.txt", b"PK\x03\x04" + bytes(20), "a zip archive"),
        ("a.txt", b"%PDF-1.7 \xe2\xe3", "a PDF"),
        ("a.txt", "naïve".encode("utf-16"), r"found:    UTF-16\n.*iconv -f UTF-16 -t UTF-8"),
        ("a.txt", "words of text".encode("utf-16-le"), r"iconv -f UTF-16LE -t UTF-8"),
        ("a.txt", "words of text".encode("utf-16-be"), r"iconv -f UTF-16BE -t UTF-8"),
        ("a.jsonl", LINES.encode("utf-16"), r"iconv -f UTF-16 -t UTF-8"),
        ("a.csv", "text\nx\n".encode("utf-32"), r"iconv -f UTF-32 -t UTF-8"),
        ("a.txt", bytes(5000), "only zeros"),
        ("a.parquet", b"PAR1" + bytes(100), "not parquet"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=told):
        documents(tmp_path / name)


def test_a_byte_order_mark_is_no_character_of_any_file(tmp_path: Path, monkeypatch: Any) -> None:
    for chunk in (1 << 20, 1, 2):
        monkeypatch.setattr(text_files, "CHUNK", chunk)
        for number in (1, 2):
            (tmp_path / f"{number}.txt").write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbf\xc3\xa9\r\n")
        assert documents(tmp_path / "1.txt", tmp_path / "2.txt") == ["a\ufeffé\n"] * 2
    assert read_prompt(f"FILE:{tmp_path / '1.txt'}") == "a\ufeffé\n"


@pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
def test_a_bad_byte_is_placed_whatever_the_pieces(tmp_path: Path, monkeypatch: Any, chunk: int) -> None:
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes("éé\U0001f600".encode() + b"\xf0\x9f\x98")
    with pytest.raises(DataError, match=r"a\.txt, byte 8\n"):
        list(read_chunks(tmp_path / "a.txt"))


def test_a_folder_takes_every_text_and_names_what_it_leaves(tmp_path: Path, caplog: Any) -> None:
    for name in (
        "a.JSONL",
        "b.jsonl",
        "c.ndjson",
        "d.TXT",
        "e.json",
        "f.jsonl.gz",
        "g.csv",
        "h.txt.zst",
        "i.pdf",
        ".j",
    ):
        (tmp_path / name).write_text("x")
    with caplog.at_level(logging.WARNING):
        found = [p.name for p in find_files(str(tmp_path))]
    assert found == ["a.JSONL", "b.jsonl", "c.ndjson", "d.TXT", "f.jsonl.gz", "h.txt.zst"]
    assert "3 file(s) are left out, being no text by their names: e.json, g.csv, i.pdf;" in caplog.text
    assert f"--source '{tmp_path}/**/*.json'" in caplog.text
    assert [p.name for p in find_files(f"{tmp_path}/**/*.json")] == ["e.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_devices_and_pipes_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DataError, match="not a regular file"):
            next(read_chunks(path))
        with pytest.raises(ConfigError, match="not a regular file"):
            read_prompt(f"FILE:{path}")


@pytest.mark.parametrize("name", ["a\0b", "a" * 300])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(DataError, match="--source"):
        find_files(name)
    with pytest.raises(ConfigError, match="prompt file cannot be read"):
        read_prompt(f"FILE:{name}")


def test_a_prompt_of_great_length_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with open(tmp_path / "long.txt", "wb") as file:
        file.truncate(PROMPT_BYTES + 1)
    with pytest.raises(ConfigError, match=r"at most 16,777,216 are read\n.*tail -c"):
        read_prompt(f"FILE:{tmp_path / 'long.txt'}")


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def texts():
        yield "half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.txt", texts())
    assert list(tmp_path.iterdir()) == []


PREPARE = """
import resource, sys
from nanogpt_fast.data.preparation import PrepareConfig, prepare
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepare(PrepareConfig(name="text", source="big.txt", tokenizer="char", out="made"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_a_text_with_one_emoji_is_never_held_whole(tmp_path: Path) -> None:
    """12 MB: 48 MB as a Python string."""
    (tmp_path / "big.txt").write_text("\U0001f600\n" + "no newline in it " * 700_000, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", PREPARE], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert int(done.stdout) < 30 * 1024, done.stdout + done.stderr
