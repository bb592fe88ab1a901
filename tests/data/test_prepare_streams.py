"""Streams of the datasets library, on local files: any number of processes, interrupted and resumed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt_fast.data import encode
from nanogpt_fast.data import preparation as module
from nanogpt_fast.data.dataset import Meta, read_meta
from nanogpt_fast.data.hub import HubDocuments
from nanogpt_fast.data.nodes import Node
from nanogpt_fast.data.preparation import PrepareConfig, prepare
from nanogpt_fast.data.tokenizer import _cached_vocabularies, from_json
from nanogpt_fast.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.skipif(
    not any(p.is_file() for p in _cached_vocabularies()), reason="no vocab.bpe: pip install 'nanogpt-fast[offline]'"
)
TEXTS = [f"Document number {i}.\n" + "It has some words, and more.\n" * (i % 9) for i in range(600)]
TEXTS[7] = ""  # left out, though it counts in the stream


class Cut(Exception):
    """The network goes away."""


@pytest.fixture(params=["json", "parquet"])
def stream(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Opens a stream of three local files of 200 documents, in place of the hub."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    files = []
    for k in range(3):
        texts = TEXTS[200 * k : 200 * (k + 1)]
        files.append(str(tmp_path / f"{k}.{request.param}"))
        if request.param == "json":
            Path(files[-1]).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        else:
            parquet.write_table(pyarrow.table({"text": texts}), files[-1], row_group_size=64)
    return lambda: datasets.load_dataset(request.param, data_files=files, split="train", streaming=True)


@pytest.fixture(autouse=True)
def small_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encode, "BATCH_CHARS", 3000)
    monkeypatch.setattr(module, "COMMIT_TOKENS", 2000)


class Recorded(HubDocuments):
    """Remembers where reading began, and fails after `stop` documents."""

    def __init__(self, open_stream: Callable[[], Any], stop: int | None = None):
        super().__init__(open_stream, "hf:test")
        self.stop, self.began = stop, -1
        self.state_given: Any = None

    def read(self, documents: int = 0, state: Any = None):
        self.began, self.state_given = documents, state
        for number, part in enumerate(super().read(documents, state)):
            if number == self.stop:
                raise Cut
            yield part


def run(monkeypatch: pytest.MonkeyPatch, source: HubDocuments, **options: Any) -> Meta:
    monkeypatch.setattr(module, "hub_documents", lambda *_: source)
    return prepare(PrepareConfig(name="fineweb", val_fraction=0.1, **options))


def test_stream_processes_and_resume_give_one_and_the_same_dataset(stream, monkeypatch) -> None:
    meta = run(monkeypatch, Recorded(stream), out="data/one", num_proc=1)
    tokenizer = from_json(meta.tokenizer)
    expected = {"train": [], "val": []}
    for i, text in enumerate(t for t in TEXTS if t):
        expected["val" if encode.is_val(i, 2357, 0.1) else "train"] += [*tokenizer.encode(text), 50256]
    for split, ids in expected.items():
        assert np.fromfile(f"data/one/{split}.bin", "<u2").tolist() == ids

    assert run(monkeypatch, Recorded(stream), out="data/two", num_proc=2).splits == meta.splits

    for num_proc in (2, 1):  # cut off twice, each time going on where the last commit was
        with pytest.raises(Cut):
            run(monkeypatch, Recorded(stream, 250), out="data/three", num_proc=num_proc)
        assert read_meta(Path("data/three")) is None and not Path("data/three/train.bin").exists()
    last = Recorded(stream)
    assert run(monkeypatch, last, out="data/three").splits == meta.splits
    assert last.began > 250 and last.state_given
    assert last.state_given["examples_iterable"]["batch_idx"] == last.began + 1  # rows, with the empty one


def test_other_settings_do_not_resume(stream, monkeypatch) -> None:
    with pytest.raises(Cut):
        run(monkeypatch, Recorded(stream, 400), out="data/a")
    assert Path("data/a/.partial/journal.json").exists()
    source = Recorded(stream)
    run(monkeypatch, source, out="data/a", seed=1)
    assert source.began == 0
    assert run(monkeypatch, Recorded(stream), out="data/b", seed=1).splits == read_meta(Path("data/a")).splits  # type: ignore[union-attr]


def test_shards_of_a_resumed_stream_equal_those_of_a_straight_one(stream, monkeypatch) -> None:
    options = {"format": "llmc", "shard_tokens": 3000}
    straight = run(monkeypatch, Recorded(stream), out="data/x/set", **options)
    with pytest.raises(Cut):
        run(monkeypatch, Recorded(stream, 450), out="data/y/set", **options)
    assert run(monkeypatch, Recorded(stream), out="data/y/set", **options).splits == straight.splits
    assert len(straight.splits["train"].files) > 5


def part(monkeypatch: pytest.MonkeyPatch, source: HubDocuments, number: int, of: int) -> Meta | None:
    monkeypatch.setattr(module, "hub_documents", lambda *_: source)
    config = PrepareConfig(name="fineweb", val_fraction=0.1, out="data/many", node=f"{number}/{of}", num_proc=1)
    return module.prepare_part(config, Node(number, of))


def test_nodes_stream_files_of_their_own_and_go_on(stream, monkeypatch) -> None:
    meta = run(monkeypatch, Recorded(stream), out="data/one", num_proc=1)
    with pytest.raises(Cut):
        part(monkeypatch, Recorded(stream, 300), 1, 2)  # 400 of the 600
    began, read = [], Recorded.read
    monkeypatch.setattr(Recorded, "read", lambda *args: (began.append(args[1:]), read(*args))[1])
    assert part(monkeypatch, Recorded(stream), 1, 2) is None
    assert began[0][0] > 200 and began[0][1]
    assert part(monkeypatch, Recorded(stream), 2, 2) == meta
    with pytest.raises(ConfigError, match="more parts than files of text"):
        monkeypatch.chdir("data")
        part(monkeypatch, Recorded(stream), 1, 4)


def test_a_stream_goes_on_behind_what_a_join_wrote(stream, monkeypatch) -> None:
    """A join's journal has the number of documents, and no state of a stream."""
    meta = run(monkeypatch, Recorded(stream), out="data/one", num_proc=1)
    with pytest.raises(Cut):
        run(monkeypatch, Recorded(stream, 400), out="data/two")
    journal = Path("data/two/.partial/journal.json")
    noted = json.loads(journal.read_text())
    journal.write_text(json.dumps(noted | {"state": None}))
    last = Recorded(stream)
    assert run(monkeypatch, last, out="data/two") == meta
    assert last.began == noted["documents"] > 0 and last.state_given is None


def test_parts_of_two_commits_are_not_joined(stream, monkeypatch) -> None:
    """The dataset was changed on the hub while the nodes read it."""
    for number in (1, 2):
        source = Recorded(stream)
        source.commit = f"commit {number}".strip
        if number == 1:
            assert part(monkeypatch, source, number, 2) is None
    with pytest.raises(DataError, match=r"2of2\n  expected: listing hf:test at commit 1\n  found: .*commit 2"):
        part(monkeypatch, source, 2, 2)
    assert not Path("data/many/meta.json").exists()


def test_a_missing_field_names_the_document(stream, monkeypatch) -> None:
    source = HubDocuments(stream, "hf:test", field="body")
    with pytest.raises(DataError, match=r"no field 'body'\n  where:    hf:test, document 0\n.*body\n  found:    text"):
        run(monkeypatch, source)
    assert not Path("data").exists() or not list(Path("data").iterdir())
