"""Where text comes from: files of each kind, what is wrong with them and where, the library, downloads."""

import contextlib
import hashlib
import http.server
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanogpt_fast.data import documents as sources
from nanogpt_fast.data.documents import FileDocuments, TextDocuments, fetch, find_files, stdlib_documents
from nanogpt_fast.data.hub import HubDocuments, hub_documents
from nanogpt_fast.data.text_files import read_chunks
from nanogpt_fast.errors import DataError


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents(*paths: Path, field: str = "text") -> list[str]:
    return joined(FileDocuments(list(paths), "a test", field))


def joined(source: FileDocuments, first: int = 0) -> list[str]:
    """The documents from number `first` on, each in one piece."""
    texts = [""]
    for text, ends in source.read(first):
        texts[-1] += text
        texts += [""] * ends
    assert texts[-1] == ""
    return texts[:-1]


# ---- Finding files ----


def test_a_folder_gives_its_text_files_in_order_without_hidden_ones(tmp_path: Path) -> None:
    names = ["b.txt", "a.md", "sub/c.py", "sub/d.jsonl", "e.parquet", "f.bin", ".git/g.txt", ".h.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [str(p.relative_to(tmp_path)) for p in find_files(str(tmp_path))]
    assert found == ["a.md", "b.txt", "e.parquet", "sub/c.py", "sub/d.jsonl"]
    assert [p.name for p in find_files(str(tmp_path / "**" / "*.txt"))] == ["b.txt"]
    assert [p.name for p in find_files(str(tmp_path / "f.bin"))] == ["f.bin"]  # named: taken as text


def test_no_match_names_the_pattern_the_place_and_near_names(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(DataError, match=r"did you mean 'corpus\.txt'"):
        find_files(str(tmp_path / "copus.txt"))
    with pytest.raises(DataError, match="matches no file") as error:
        find_files(str(tmp_path / "*.jsonl"))
    assert str(Path.cwd()) in str(error.value) and "*.jsonl" in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"files ending in \.txt"):
        find_files(str(tmp_path / "empty"))


# ---- Reading them ----


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    texts = ["one", "", "two é\n", "three\u2028\U0001f600"]
    rows = [{"n": i, "body": text} for i, text in enumerate(texts)]
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    parquet.write_table(pyarrow.table({"n": [0, 1, 2, 3], "body": texts}), tmp_path / "a.parquet", row_group_size=2)
    plain = [tmp_path / f"{i}.txt" for i in range(4)]
    for path, text in zip(plain, texts):
        path.write_bytes(text.encode())
    expected = [text for text in texts if text]  # empty documents are left out
    assert documents(jsonl, field="body") == expected
    assert documents(tmp_path / "a.parquet", field="body") == expected
    assert documents(*plain) == expected
    assert joined(FileDocuments(plain, "a test"), 2) == expected[2:]


def test_line_ends_are_read_as_nanogpt_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes(b"a\r\nb\rc\n")
    assert "".join(read_chunks(path)) == path.open(encoding="utf-8").read() == "a\nb\nc\n"


def test_text_that_is_not_utf8_names_file_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt, byte 2") as error:
        documents(path)
    assert "0xef" in str(error.value) and "iconv" in str(error.value)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"text": "cut', "not JSON"),
        ('{"txt": "x", "id": 1}', "found:    txt, id"),
        ('["text"]', "found:    list"),
        ('{"text": 5}', "is not text"),
        ('{"text": null}', "is not text"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=told) as error:
        documents(path)
    assert f"{path}, line 3" in str(error.value)


def test_a_bad_byte_in_jsonl_is_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2, byte 10"):
        documents(tmp_path / "a.jsonl")


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["x", None]}), path)
    with pytest.raises(DataError, match="no field 'text'") as error:
        documents(path)
    assert "--field" in str(error.value) and "body" in str(error.value)
    with pytest.raises(DataError, match=r"row 1\n.*a string\n  found:    None"):
        documents(path, field="body")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet"):
        documents(path, field="body")


def test_a_source_that_cannot_be_read_is_an_error_not_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        documents(tmp_path / "gone.txt")
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(DataError, match="Is a directory"):
        documents(tmp_path / "x.jsonl")
    locked = tmp_path / "locked.txt"
    locked.write_text("x")
    locked.chmod(0)
    if not os.access(locked, os.R_OK):  # root reads it all the same
        with pytest.raises(DataError, match="Permission denied"):
            documents(locked)


def test_fingerprints_change_with_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = FileDocuments([path], "").fingerprint
    assert before == FileDocuments([path], "other").fingerprint
    path.write_text("three")
    assert FileDocuments([path], "").fingerprint != before
    assert TextDocuments(["ab", "c"], "").fingerprint != TextDocuments(["a", "bc"], "").fingerprint


def test_a_failing_stream_becomes_an_error_that_says_how_to_go_on() -> None:
    def open_stream() -> Any:
        raise ConnectionError("Couldn't reach the hub\nand a long story")

    with pytest.raises(DataError, match="ConnectionError: Couldn't reach the hub\n") as error:
        list(HubDocuments(open_stream, "hf:some/set").read())
    assert "hf:some/set" in str(error.value) and "--source" in str(error.value)


def test_what_a_part_must_have_in_common_is_asked_of_the_hub_once(monkeypatch: pytest.MonkeyPatch) -> None:
    library, asked = pytest.importorskip("huggingface_hub"), []
    pytest.importorskip("datasets")

    class Api:
        def dataset_info(self, *args: Any, **options: Any) -> Any:
            asked.append((args, options))
            return library.hf_api.DatasetInfo(id="some/set", sha="0123abc", tags=[])

    monkeypatch.setattr(library, "HfApi", Api)
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", False)
    source = hub_documents("some/set", "sub", revision="refs/convert/parquet")
    assert source.listing == "hf:some/set sub at 0123abc"
    assert asked == [(("some/set",), {"revision": "refs/convert/parquet", "timeout": 20.0})]
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", True)
    assert "cache" in source.listing
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Api, "dataset_info", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match="could not be read from the Hugging Face hub"):
        _ = source.listing


def test_the_library_is_plain_ascii_and_always_the_same() -> None:
    source = stdlib_documents()
    text = "".join(source.texts)
    assert 2**20 < source.nbytes <= 16 * 2**20
    assert text.isascii() and text.replace("\n", "").isprintable() and len(set(text)) <= 96
    assert "class JSONDecoder" in text
    assert source.fingerprint == stdlib_documents().fingerprint


def test_the_library_is_read_without_tests_installed_packages_and_paths(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="no library sources"):
        stdlib_documents()
    kept = {"b.py": "b = 1\n", "a.py": "a = 1\n", "sub/c.py": "c = 1\r\n"}
    left_out = {
        "test/x.py": "x",
        "sub/tests/x.py": "x",
        "site-packages/p/x.py": "x",
        "_sysconfigdata__linux.py": "x",
        "accents.py": "é",
        "tabs.py": "\t",
        "empty.py": "",
        "x.txt": "x",
    }
    for name, text in (kept | left_out).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert stdlib_documents().texts == ["a = 1\n", "b = 1\n", "c = 1\n"]
    monkeypatch.setattr(sources, "STDLIB_CAP", 12)
    assert stdlib_documents().texts == ["a = 1\n", "b = 1\n"]


# ---- Downloads ----


@contextlib.contextmanager
def server(body: bytes, *, claim: int | None = None) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/file" else 404)
            self.send_header("Content-Length", str(claim or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


BODY = b"some text\n" * 1000
DIGEST = hashlib.sha256(BODY).hexdigest()


def test_a_download_is_checked_and_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    with server(BODY) as url:
        fetch(f"{url}/file", target, DIGEST)
        assert target.read_bytes() == BODY and [p.name for p in target.parent.iterdir()] == ["file.txt"]
        target.unlink()
        with pytest.raises(DataError, match=f"expected: SHA-256 {'0' * 64}"):
            fetch(f"{url}/file", target, "0" * 64, otherwise="do this instead")
        with pytest.raises(DataError, match="Not Found"):
            fetch(f"{url}/absent", target, DIGEST)
    with server(BODY, claim=len(BODY) + 1) as url, pytest.raises(DataError, match="IncompleteRead|the download failed"):
        fetch(f"{url}/file", target, DIGEST)
    with pytest.raises(DataError, match="refused") as error:
        fetch(f"{url}/file", target, DIGEST, otherwise="do this instead")
    assert "do this instead" in str(error.value) and not target.exists()


def test_a_server_that_never_answers_ends_with_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(DataError, match="timed out"):
            fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/", tmp_path / "x", DIGEST, timeout=0.3)
        assert time.monotonic() - began < 10
