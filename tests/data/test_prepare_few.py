"""Little text: both splits get some, and what is proposed next fits it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt_fast.data import documents, encode, hub
from nanogpt_fast.data.dataset import verify
from nanogpt_fast.data.preparation import PrepareConfig, prepare
from nanogpt_fast.data.recipes import RECIPES, prepare_command
from nanogpt_fast.data.splits import open_split
from nanogpt_fast.data.tokenizer import from_json
from nanogpt_fast.errors import DataError
from nanogpt_fast.prepare import main
from nanogpt_fast.settings import cli


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def texts_of(out: str) -> dict[str, str]:
    meta = verify(Path(out))
    tokenizer = from_json(meta.tokenizer)
    return {split: tokenizer.decode(np.fromfile(Path(out, f"{split}.bin"), "<u2").tolist()) for split in meta.splits}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 11, 12, 30])
@pytest.mark.parametrize("form", ["md", "jsonl"])
def test_any_number_of_documents_gives_both_splits_some(count: int, form: str) -> None:
    """README's own command, which failed with 2 to 11 notes."""
    notes = [f"note {number}: " + "some words " * 9 for number in range(count)]
    Path("notes/sub").mkdir(parents=True)
    for number, note in enumerate(notes if form == "md" else []):
        Path(f"notes/sub/{number:02d}.md").write_text(note)
    if form == "jsonl":
        Path("notes/all.jsonl").write_text("".join(json.dumps({"text": note}) + "\n" for note in notes))
    main(["text", "--source", f"notes/**/*.{form}", "--out", "data/notes", "--tokenizer=char"])
    got = texts_of("data/notes")
    assert len(got["train"]) > len(got["val"]) > 0
    if form == "md" and count == 1:  # one text, as nanoGPT's Shakespeare
        assert got["train"] + got["val"] == notes[0] and len(got["train"]) == int(len(notes[0]) * 0.9)
    elif count < 5:  # a whole document would be more than twice the tenth that was asked for
        at = int(sum(map(len, notes)) * 0.9)
        assert (got["train"] + got["val"]).split("\n\n") == [*notes, ""] and 0 <= len(got["train"]) - at <= 2 * count
    else:
        val = [note for number, note in enumerate(notes) if encode.is_val(number, 2357, 0.1)]
        if count < 12:
            assert not val  # 11 is the first that the draw gives to val
            val = [notes[min(range(count), key=lambda number: encode.draw(number, 2357))]]
        assert got["val"].split("\n\n") == [*val, ""]


def test_train_gets_a_document_too() -> None:
    source = documents.TextDocuments([f"text {i}" for i in range(4)], "a test")
    seed = next(seed for seed in range(1000) if all(encode.is_val(number, seed, 0.85) for number in range(4)))
    assert len(encode.val_of_few(source, seed, 0.85) or ()) == 3
    assert encode.val_of_few(documents.TextDocuments(["text"] * 30, "a test"), 2357, 0.5) is None


@pytest.mark.parametrize("argv", [["one.txt"], ["few.jsonl"]])
def test_max_tokens_leaves_val_its_share(argv: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(encode, "BATCH_CHARS", 100)
    Path("one.txt").write_text("some words of text\n" * 1000)
    Path("few.jsonl").write_text("".join(json.dumps({"text": "some words of text\n" * 500}) + "\n" for _ in "ab"))
    meta = prepare(PrepareConfig(name="text", source=argv[0], tokenizer="char", max_tokens=2000))
    train, val = (meta.splits[split].tokens for split in ("train", "val"))
    assert 1800 <= train < 2000 and 200 <= val < 400


def test_a_share_is_proposed_that_the_draw_really_needs(monkeypatch: Any) -> None:
    """A stream is read once, so its documents cannot be counted first."""
    rows = [{"text": f"document {i} " * 20} for i in range(9)]

    class Stream(list):
        def state_dict(self) -> None:
            return None

    stream = hub.HubDocuments(lambda: Stream(rows), "hf:test")
    monkeypatch.setattr("nanogpt_fast.data.preparation.hub_documents", lambda *_: stream)
    monkeypatch.setattr("nanogpt_fast.data.preparation.gpt2_tokenizer", lambda _: from_json(CHARS))
    with pytest.raises(DataError, match="the val split got no tokens") as error:
        prepare(PrepareConfig(name="openwebtext"))
    share = re.search(r"--val_fraction=([\d.e-]+)", str(error.value))
    assert share and prepare(PrepareConfig(name="openwebtext", val_fraction=float(share[1]))).splits["val"].tokens


CHARS = {"kind": "char", "itos": sorted(set("document 0123456789\n"))}


@pytest.mark.parametrize(
    ("characters", "flags"),
    [
        (30, "--config shakespeare_char --dataset=few --block_size=2"),
        (2000, "--config shakespeare_char --dataset=few --block_size=199"),
        (3000, "--config shakespeare_char --dataset=few"),
    ],
)
def test_the_next_command_fits_the_text(characters: int, flags: str, capsys: Any) -> None:
    Path("few.txt").write_text(("some words, " * characters)[:characters])
    main(["few", "--source", "few.txt", "--tokenizer=char"])
    command = capsys.readouterr().out.splitlines()[-1]
    assert command == f"next: python -m nanogpt_fast.train {flags}"
    config = cli.load_config(command.split("nanogpt_fast.train ")[1].split())
    for split in ("train", "val"):
        assert open_split(config.data, split).n_tokens > config.data.block_size  # type: ignore[call-overload]


def test_a_little_text_in_gpt2_tokens_is_no_124m_run(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("nanogpt_fast.data.preparation.gpt2_tokenizer", lambda _: from_json(CHARS | {"kind": "char"}))
    Path("few.txt").write_text("document 1\n" * 40)
    main(["few", "--source", "few.txt"])
    told = "--config quickstart --dataset=few --out_dir=out-few --block_size=43\n"
    assert capsys.readouterr().out.endswith(told)


def test_a_text_of_two_characters_is_enough_for_nothing(capsys: Any) -> None:
    Path("few.txt").write_text("abcd")
    main(["few", "--source", "few.txt", "--tokenizer=char"])
    assert "next: more text" in capsys.readouterr().out


def test_one_text_has_no_documents_to_count(capfd: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("nanogpt_fast.data.progress.TOLD_SECONDS", 0)
    monkeypatch.setattr(encode, "BATCH_CHARS", 100)
    Path("one.txt").write_text("some words of text\n" * 100)
    main(["few", "--source", "one.txt", "--tokenizer=char"])
    told = capfd.readouterr().err
    assert re.search(r"tokens \d+%: 1,900 tokens, [\d,]+ tokens/s", told) and "documents" not in told
    assert "characters 100%: 12 different characters" in told and "hashing 100%" in told


def test_commands_that_make_a_dataset_again() -> None:
    assert prepare_command("data/shakespeare") == "python -m nanogpt_fast.prepare shakespeare"
    assert prepare_command("sets/a b", "x y") == (
        "python -m nanogpt_fast.prepare 'a b' --source 'x y' --out 'sets/a b'"
    )
    assert prepare_command("data/stdlib", suffix="-again") == (
        "python -m nanogpt_fast.prepare stdlib --out data/stdlib-again"
    )


def test_openwebtext_is_read_as_parquet_and_an_absent_hub_is_asked_once(monkeypatch: Any) -> None:
    datasets, library = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    asked: list[Any] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise ConnectionError("nobody there")

    monkeypatch.setattr(library, "get_session", Session)
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)))
    recipe = RECIPES["openwebtext"]
    stream = hub.hub_documents(recipe.repository, recipe.subset, "text", recipe.revision)
    with pytest.raises(DataError, match="ConnectionError: nobody there"):
        list(stream.read())
    assert asked == [library.constants.ENDPOINT]
    monkeypatch.setattr(Session, "head", lambda *_, **__: None)
    stream.open_stream()
    assert asked[-1][0] == ("Skylion007/openwebtext",) and asked[-1][1]["revision"] == "refs/convert/parquet"


def test_the_release_of_datasets_that_starts_over_is_excluded() -> None:
    """5.0.0 begins at document 0 where a stream is resumed twice."""
    requirements = re.findall(r'"(datasets[^"]*)"', (Path(__file__).parents[2] / "setup.py").read_text())
    assert requirements and all("!=5.0.0" in requirement for requirement in requirements)
