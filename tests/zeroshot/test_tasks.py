"""`evaluate --tasks`: every task on a tiny stand-in of its file, the report in each form, what is refused."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from random_weights import random_weights
from task_texts import LAMBADA_ROWS, PTB, write_task_texts

from nanogpt_fast import evaluate
from nanogpt_fast.data import hub
from nanogpt_fast.errors import ConfigError, DataError
from nanogpt_fast.files import sha256_of
from nanogpt_fast.weights import formats
from nanogpt_fast.zeroshot import cloze, corpora
from nanogpt_fast.zeroshot.published import OTHERS, PAPER, TASKS
from nanogpt_fast.zeroshot.tasks import Tasks


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GPT-2 of 50,257 tokens in hf/, and all tasks' files in texts/."""
    folder = tmp_path_factory.mktemp("zeroshot")
    weights = random_weights(vocab_size=50257, block_size=32, n_embd=16, n_layer=1, optimizer=False)
    formats.write(weights, folder / "hf", "hf")
    write_task_texts(folder / "texts")
    return folder


def rows(here: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, Any]]:
    """The command's JSON lines."""
    evaluate.main([f"--init_from={here / 'hf'}", f"--source={here / 'texts'}", "--json", *flags])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_all_tasks_have_all_their_figures(here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    found = rows(here, capsys, f"--tasks={','.join(TASKS)}", f"--report={tmp_path / 'r.csv'}")
    cells = {(row["task"], row["metric"]): row for row in found}
    assert {task for task, _ in cells} == set(TASKS) == {*corpora.CORPORA, *cloze.CLOZES}
    assert set(PAPER) <= set(cells), "a figure of the paper has none beside it"
    assert {key for key in OTHERS if key[0] in TASKS} <= set(cells)
    assert all(row["value"] >= 0 and row["count"] > 0 for row in found)
    for (task, metric), row in cells.items():
        paper = PAPER.get((task, metric), (None,) * 4)
        assert tuple(row[f"paper_{size}"] for size in ("117M", "345M", "762M", "1542M")) == paper
        assert len(row["sha256"]) == 64 and row["dtype"] == "float32" and row["source"].startswith(str(here))
    assert cells["ptb", "perplexity/word"]["sha256"] == sha256_of(here / "texts/ptb.test.txt")
    ways = [cells["wikitext2", f"perplexity/{x}"]["value"] for x in ("token", "original", "word")]
    assert ways == [cells["wikitext103", f"perplexity/{x}"]["value"] for x in ("token", "original", "word")]
    assert ways[0] < ways[1] < ways[2]
    with open(tmp_path / "r.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["task"], row["metric"]) for row in written] == list(cells)
    assert float(written[0]["value"]) == found[0]["value"]


def test_one_text_is_scored_once(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    scored, window_losses = [], corpora.window_losses
    monkeypatch.setattr(
        corpora, "window_losses", lambda *args, **flags: scored.append(1) or window_losses(*args, **flags)
    )
    found = rows(here, capsys, "--tasks=wikitext2,ptb,wikitext103")
    notes = {row["task"]: row["note"] for row in found}
    assert len(scored) == 2 and notes["wikitext103"].endswith("; the text of wikitext2, scored there")
    assert "scored there" not in notes["wikitext2"] + notes["ptb"]
    values = {task: [row["value"] for row in found if row["task"] == task] for task in notes}
    assert values["wikitext2"] == values["wikitext103"] != values["ptb"]


def test_the_table_and_its_markdown(here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    report = tmp_path / "r.md"
    evaluate.main([f"--init_from={here / 'hf'}", f"--source={here / 'texts'}", "--tasks=wikitext103,cbt_ne",
                   f"--report={report}", "--stride=8", "--block_size=16"])  # fmt: skip
    table, markdown = capsys.readouterr().out, report.read_text()
    line = next(line for line in table.splitlines() if line.startswith("wikitext103  perplexity/word"))
    assert line.split()[-5:] == ["37.50", "26.37", "22.05", "17.48", "59"]
    assert "16 tokens, 8 apart" in table
    assert "117M 37.37, lm-eval's word_perplexity" in table and "huggingface/transformers #13761" in table
    assert "| wikitext103 | perplexity/word |" in markdown and "| 37.50 | 26.37 | 22.05 | 17.48 | 59 |" in markdown
    assert "| 83.40 | 87.10 | 88.00 | 89.05 | 2 |" in markdown
    assert "2 examples, not all 2,000" in markdown


def test_overlapping_windows_and_limits_change_what_is_scored(here: Path, capsys: pytest.CaptureFixture[str]):
    (apart, *_), (overlapping, *_) = (
        rows(here, capsys, "--tasks=ptb", "--block_size=8", stride) for stride in ("--stride=0", "--stride=1")
    )
    assert apart["value"] != overlapping["value"] and apart["count"] == overlapping["count"]
    (first, *_) = rows(here, capsys, "--tasks=ptb", "--limit=1")
    assert first["count"] < apart["count"] and first["note"].startswith("the first 1; ")


def test_a_file_by_name_and_the_report_so_far(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The second task's file is damaged: the first one's figures are kept."""
    (tmp_path / "mine.txt").write_text(PTB)
    (tmp_path / "bad.txt").write_text("1 a\n3 b\n")
    report = tmp_path / "r.jsonl"
    with pytest.raises(DataError, match="out of its order"):
        evaluate.main([f"--init_from={here / 'hf'}", "--tasks=ptb,cbt_cn", f"--report={report}",
                       f"--source=ptb={tmp_path / 'mine.txt'},cbt_cn={tmp_path / 'bad.txt'}"])  # fmt: skip
    kept = [json.loads(line) for line in report.read_text().splitlines()]
    assert {row["task"] for row in kept} == {"ptb"} and kept[0]["source"] == str(tmp_path / "mine.txt")


@pytest.mark.parametrize(
    "flags, error, said",
    [
        (["--tasks=ptb", "--source=."], DataError, "ptb.test.txt (simple-examples/data/ of Mikolov's"),
        (["--tasks=enwik8"], DataError, "enwik8.zip of mattmahoney.net"),
        (["--tasks=ptb", "--source=ptb=none.txt"], ConfigError, "there is no such file"),
        (["--tasks=ptb", "--source=nowhere"], ConfigError, "there is no such folder"),
        (["--tasks=ptb", "--source=pbt=x"], ConfigError, "did you mean 'ptb'"),
        (["--tasks=ptb", "--report=x.txt"], ConfigError, ".md, .csv, .jsonl"),
        (["--tasks=ptb", "--report=none/x.md"], ConfigError, "in a folder that is there"),
        (["--tasks=,"], ConfigError, "--tasks names none"),
        (["--limit=3"], ConfigError, "--limit is for --tasks"),
        (["--tasks=ptb", "--file=x"], ConfigError, "two evaluations"),
        (["--tasks=ptb", "--limit=-1"], ConfigError, "out of range"),
    ],
)
def test_what_is_refused(
    flags: list[str], error: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All before a model is loaded: there is none."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as refused:
        evaluate.main([*flags, "--init_from=none"])
    assert said in str(refused.value)


def test_characters_that_a_model_does_not_know_are_named_with_their_file(tmp_path: Path):
    tokenizer = {"kind": "char", "itos": [*" \nabcdefghijklmno"]}
    formats.write(random_weights(vocab_size=17, tokenizer=tokenizer, optimizer=False), tmp_path / "run", "native")
    (tmp_path / "ptb.test.txt").write_text(" abc zoo \n")
    with pytest.raises(DataError, match="character 'z' is not in the vocabulary") as refused:
        evaluate.main([f"--init_from={tmp_path / 'run'}", "--tasks=ptb", f"--source={tmp_path}"])
    assert refused.value.where.startswith(f"task ptb, {tmp_path / 'ptb.test.txt'}, position 4")
    (tmp_path / "lambada_test.jsonl").write_text("")
    with pytest.raises(DataError, match="the text is empty"):
        evaluate.main([f"--init_from={tmp_path / 'run'}", "--tasks=lambada", f"--source={tmp_path}"])


def test_other_tasks_need_lm_eval(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match="pbt is no task of ours, did you mean 'ptb'"):
        Tasks("pbt")
    with pytest.raises(ConfigError, match="others need lm-eval") as refused:
        Tasks("ptb,hellaswag", source="ptb=/dev/null")
    assert refused.value.hint == "pip install 'nanogpt-fast[eval]'"


def test_without_files_the_hub_is_asked(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked = []

    def load(repository: str, **rest: Any) -> list[dict[str, str]]:
        asked.append((repository, rest))
        if "ptb" in repository:
            raise ConnectionError("nobody there\nat all")
        return LAMBADA_ROWS

    offline = SimpleNamespace(constants=SimpleNamespace(HF_HUB_OFFLINE=True))
    monkeypatch.setattr(hub, "libraries", lambda: (SimpleNamespace(load_dataset=load), offline))
    evaluate.main([f"--init_from={here / 'hf'}", "--tasks=lambada", "--json"])
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (row["source"], row["note"]) == (
        "hf:EleutherAI/lambada_openai default, test", "3 examples, not all 5,153, OpenAI's form",
    )  # fmt: skip
    assert asked == [
        ("EleutherAI/lambada_openai", {"name": "default", "split": "test", "revision": None, "streaming": False})
    ]
    with pytest.raises(DataError, match="the text of task ptb is not there") as refused:
        evaluate.main([f"--init_from={here / 'hf'}", "--tasks=ptb"])
    assert refused.value.found == "ConnectionError: nobody there"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="the text of task ptb is not there") as refused:
        evaluate.main([f"--init_from={here / 'hf'}", "--tasks=ptb"])
    assert refused.value.found == "the datasets library is missing: pip install 'nanogpt-fast[data]'"
