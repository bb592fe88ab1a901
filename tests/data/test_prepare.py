"""python -m nanogpt_fast.prepare: what each name writes, nanoGPT's bytes, reruns, and refusals."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt_fast.data import preparation as module
from nanogpt_fast.data.dataset import read_meta, verify
from nanogpt_fast.data.documents import stdlib_documents
from nanogpt_fast.data.encode import is_val
from nanogpt_fast.data.preparation import PrepareConfig, ensure, prepare
from nanogpt_fast.data.token_writer import locked
from nanogpt_fast.data.tokenizer import _cached_vocabularies, from_json
from nanogpt_fast.errors import ConfigError, DataError
from nanogpt_fast.prepare import main

PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak — naïve!\n\n" * 60

needs_gpt2 = pytest.mark.skipif(
    not any(p.is_file() for p in _cached_vocabularies()), reason="no vocab.bpe: pip install 'nanogpt-fast[offline]'"
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def play(tmp_path: Path) -> str:
    (tmp_path / "play.txt").write_text(PLAY, encoding="utf-8")
    return "play.txt"


def tokens(name: str) -> list[int]:
    return np.fromfile(Path("data", name), dtype="<u2").tolist()


# ---- What is written ----


def test_shakespeare_char_is_what_nanogpt_writes(play: str) -> None:
    """nanoGPT's data/shakespeare_char/prepare.py, done here by hand on another text."""
    assert main(["shakespeare_char", "--source", play]) == 0
    chars = sorted(set(PLAY))
    stoi = {c: i for i, c in enumerate(chars)}
    at = int(len(PLAY) * 0.9)
    assert tokens("shakespeare_char/train.bin") == [stoi[c] for c in PLAY[:at]]
    assert tokens("shakespeare_char/val.bin") == [stoi[c] for c in PLAY[at:]]
    meta = pickle.loads(Path("data/shakespeare_char/meta.pkl").read_bytes())
    assert meta == {"vocab_size": len(chars), "stoi": stoi, "itos": dict(enumerate(chars))}
    assert Path("data/shakespeare_char/input.txt").read_text(encoding="utf-8") == PLAY
    tokenizer = from_json(verify(Path("data/shakespeare_char")).tokenizer)
    assert tokenizer.decode(tokens("shakespeare_char/val.bin")) == PLAY[at:]


def test_the_exact_tiny_shakespeare_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.environ.get("TINY_SHAKESPEARE")
    if not path:
        pytest.skip("set TINY_SHAKESPEARE to the path of char-rnn's tinyshakespeare/input.txt")
    for name, sizes in (("shakespeare_char", (1_003_854, 111_540)), ("shakespeare", (301_966, 36_059))):
        meta = prepare(PrepareConfig(name=name, source=path))
        assert (meta.splits["train"].tokens, meta.splits["val"].tokens) == sizes
    meta = read_meta(Path("data/shakespeare_char"))
    assert meta and meta.vocab_size == 65
    # SHA-256 of what nanoGPT's own prepare.py writes from this file
    assert [meta.splits[split].files[0].sha256[:16] for split in ("train", "val")] == [
        "6ec305602a99ac28",
        "d37d30cc0c8327c2",
    ]


@needs_gpt2
def test_shakespeare_splits_by_characters_before_encoding(play: str) -> None:
    meta = prepare(PrepareConfig(name="shakespeare", source=play))
    tokenizer = from_json(meta.tokenizer)
    at = int(len(PLAY) * 0.9)
    assert tokens("shakespeare/train.bin") == tokenizer.encode_ordinary(PLAY[:at]).tolist()
    assert tokens("shakespeare/val.bin") == tokenizer.encode_ordinary(PLAY[at:]).tolist()
    assert meta.vocab_size == 50257 and not Path("data/shakespeare/meta.pkl").exists()


def test_input_txt_in_the_folder_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(
        module.RECIPES["shakespeare_char"], download=module.Download("http://127.0.0.1:9/", "")
    )  # nobody there
    monkeypatch.setitem(module.RECIPES, "shakespeare_char", recipe)
    with pytest.raises(DataError, match="the download failed") as error:
        prepare(PrepareConfig(name="shakespeare_char"))
    assert "--source input.txt" in str(error.value) and not Path("data/shakespeare_char").exists()
    Path("data/shakespeare_char").mkdir(parents=True)
    Path("data/shakespeare_char/input.txt").write_text("my own text, with its own letters")
    assert prepare(PrepareConfig(name="shakespeare_char")).splits["train"].tokens == 29


def test_ensure_makes_stdlib_and_only_stdlib() -> None:
    folder = ensure("stdlib", "somewhere")
    meta = verify(folder)
    assert folder == Path("somewhere/stdlib") and meta.vocab_size <= 96
    assert meta.splits["train"].tokens > 9 * meta.splits["val"].tokens * 0.5 > 10_000
    first = next(text for i, text in enumerate(stdlib_documents().texts) if not is_val(i, 2357, 0.1))
    ids = np.fromfile(folder / "train.bin", "<u2", count=len(first) + 2)
    assert from_json(meta.tokenizer).decode(ids.tolist()) == first + "\n\n"
    before = (folder / "train.bin").stat().st_mtime_ns
    assert ensure("stdlib", "somewhere") == folder and (folder / "train.bin").stat().st_mtime_ns == before
    assert ensure("openwebtext", "somewhere") == Path("somewhere/openwebtext")
    assert not Path("somewhere/openwebtext").exists()


@pytest.mark.parametrize("format", ["bin", "llmc"])
def test_a_collection_is_split_by_document(format: str) -> None:
    Path("notes").mkdir()
    texts = [f"note {i}\n" * (i % 5 + 1) for i in range(40)]
    for i, text in enumerate(texts):
        Path(f"notes/{i:02d}.txt").write_text(text)
    argv = ["mine", "--source", "notes", "--tokenizer=char", "--val_fraction=0.3", "--seed=5", f"--format={format}"]
    assert main([*argv, "--shard_tokens=100"]) == 0
    meta = verify(Path("data/mine"))
    tokenizer, offset = from_json(meta.tokenizer), 1024 if format == "llmc" else 0
    for split, wanted in (("train", False), ("val", True)):
        files = [Path("data/mine") / file.name for file in meta.splits[split].files]
        ids = np.concatenate([np.fromfile(file, "<u2", offset=offset) for file in files])
        assert (len(files) > 2) == (format == "llmc")
        expected = "".join(t + "\n\n" for i, t in enumerate(texts) if is_val(i, 5, 0.3) is wanted)
        assert tokenizer.decode(ids.tolist()) == expected


def test_max_tokens_stops_early() -> None:
    Path("a.jsonl").write_text("".join(json.dumps({"t": "word " * 10_000}) + "\n" for _ in range(200)))
    config = PrepareConfig(
        name="text", source="a.jsonl", field="t", tokenizer="char", max_tokens=3_000_000, val_fraction=0.3
    )
    meta = prepare(config)
    assert 3_000_000 <= sum(split.tokens for split in meta.splits.values()) < 4_000_000


def test_the_summary_says_what_was_made_and_what_to_do_next(play: str, capsys: pytest.CaptureFixture) -> None:
    main(["shakespeare_char", "--source", play])
    out = capsys.readouterr().out
    at = int(len(PLAY) * 0.9)
    assert f"{at:,} tokens" in out and f"{2 * at:,} bytes" in out and "tokens/s" in out
    assert "next: python -m nanogpt_fast.train --config shakespeare_char --dataset=shakespeare_char\n" in out
    main(["book", "--source", play, "--out", "sets/book", "--tokenizer", "char"])
    assert "--config shakespeare_char --dataset=book --data_dir=sets\n" in capsys.readouterr().out
    main(["book", "--out", "sets/book", "--verify"])
    assert "2 files are as prepared" in capsys.readouterr().out


# ---- Again ----


def test_a_rerun_with_the_same_settings_changes_nothing(play: str, capsys: pytest.CaptureFixture) -> None:
    first = prepare(PrepareConfig(name="shakespeare_char", source=play))
    before = Path("data/shakespeare_char/train.bin").stat().st_mtime_ns
    main(["shakespeare_char", "--source", play])
    assert "already prepared" in capsys.readouterr().out
    assert Path("data/shakespeare_char/train.bin").stat().st_mtime_ns == before
    assert prepare(PrepareConfig(name="shakespeare_char", source=play, force=True)) == first
    assert Path("data/shakespeare_char/train.bin").stat().st_mtime_ns != before


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 10)], ids=["gone", "cut short"])
def test_a_dataset_whose_tokens_are_gone_is_made_again(play: str, capsys: pytest.CaptureFixture, damage: Any) -> None:
    first = prepare(PrepareConfig(name="shakespeare_char", source=play))
    damage(Path("data/shakespeare_char/train.bin"))
    main(["shakespeare_char", "--source", play])
    assert "already prepared" not in capsys.readouterr().out
    assert verify(Path("data/shakespeare_char")) == first


def test_a_name_that_begins_like_a_recipe_is_a_name_of_your_own() -> None:
    Path("plays").mkdir()
    for number in range(8):
        Path(f"plays/{number}.txt").write_text(PLAY)
    meta = prepare(PrepareConfig(name="shakespeare_plays", source="plays", tokenizer="char", val_fraction=0.5))
    assert sum(split.tokens for split in meta.splits.values()) == 8 * (len(PLAY) + 2)


def test_other_settings_or_other_peoples_files_need_force(play: str) -> None:
    prepare(PrepareConfig(name="shakespeare_char", source=play))
    with pytest.raises(DataError, match=r"expected: val_fraction 0\.2\n  found:    val_fraction 0\.1\n.*--force"):
        prepare(PrepareConfig(name="shakespeare_char", source=play, val_fraction=0.2))
    Path("data/shakespeare_char/meta.json").unlink()  # as nanoGPT leaves it
    with pytest.raises(DataError, match=r"made otherwise\n  where: .*train\.bin"):
        prepare(PrepareConfig(name="shakespeare_char", source=play))
    assert prepare(PrepareConfig(name="shakespeare_char", source=play, force=True)).vocab_size == len(set(PLAY))


def test_two_at_once_are_refused(play: str) -> None:
    with locked(Path("data/shakespeare_char"), 0), pytest.raises(DataError, match="another process"):
        prepare(PrepareConfig(name="shakespeare_char", source=play))


def test_ctrl_c_before_anything_was_committed_leaves_nothing(play: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.TokenWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(PrepareConfig(name="mine", source=play, tokenizer="char"))
    assert list(Path("data").iterdir()) == []


# ---- Refusals ----


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["shakespear"], "did you mean 'shakespeare'"),
        (["../up", "--source", "play.txt"], "not a dataset name"),
        (["a/b", "--source", "play.txt"], "not a dataset name"),
        (["text"], "needs your text"),
        (["text", "--source", "absent.txt"], "matches no file"),
        (["text", "--source", "empty.txt", "--tokenizer=char"], "the source is empty"),
        (["text", "--source", "one.jsonl", "--tokenizer=char"], "the train split got no tokens"),
        (["shakespeare_char", "--source", "."], "shakespeare_char is one text"),
        (["mine", "--source", "play.txt", "--vocab_bpe=play.txt"], r"not GPT-2's vocab\.bpe"),
        (["text", "--verify"], "nothing to verify"),
    ],
)
def test_what_cannot_be_prepared_says_why_and_leaves_nothing(play: str, argv: list[str], told: str) -> None:
    Path("empty.txt").touch()
    Path("one.jsonl").write_text('{"text": "o"}\n')
    with pytest.raises(DataError, match=told) as error:
        main(argv)
    assert error.value.exit_code == 3 and not list(Path("data").glob("*/*"))


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["text", "--val_fraction=1"], "val_fraction is out of range"),
        (["text", "--val_fraction=-0.1"], "val_fraction is out of range"),
        (["text", "--val_fraction=nan"], "val_fraction is out of range"),
        (["text", "--num_proc=-1"], "num_proc is out of range"),
        (["text", "--shard_tokens=0"], "shard_tokens is out of range"),
        (["text", "--max_tokens=-1"], "max_tokens is out of range"),
        (["text", "--format=npy"], "bin, llmc"),
        (["openwebtext", "--tokenizer=char"], "needs the whole text first"),
        (["stdlib", "--source=x"], "stdlib has no --source"),
    ],
)
def test_wrong_flags_are_configuration_errors(argv: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        main(argv)
    assert not Path("data").exists() or not list(Path("data").iterdir())


def test_too_many_characters_for_uint16() -> None:
    Path("all.txt").write_text("".join(chr(c) for c in range(0x10000, 0x20001)), encoding="utf-8")
    with pytest.raises(DataError, match=r"at most 65,535\n  found:    65,537\n.*--tokenizer=gpt2"):
        main(["mine", "--source", "all.txt", "--tokenizer=char"])
