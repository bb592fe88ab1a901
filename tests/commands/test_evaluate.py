"""evaluate.py: the command's figures, its table and JSON, presets, refusals."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from random_weights import random_weights
from separate_documents import separately

from nanogpt_fast import evaluate, evaluation, scoring
from nanogpt_fast.data.meta_pickle import nanogpt_pickle
from nanogpt_fast.data.tokens import TokenSource
from nanogpt_fast.errors import ConfigError, DataError
from nanogpt_fast.model import GPT
from nanogpt_fast.score_table import PUBLISHED
from nanogpt_fast.weights import formats, huggingface

ITOS = ["\n", *map(chr, range(97, 97 + 18)), "é"]
CHAR = {"kind": "char", "itos": ITOS}


def prepare(folder: Path, itos: list[str] | None = ITOS, vocab_size: int = 20) -> None:
    folder.mkdir(parents=True)
    for split, count in (("train", 400), ("val", 150)):
        ids = np.random.default_rng(count).integers(0, vocab_size, count)
        ids.astype("<u2").tofile(folder / f"{split}.bin")
    if itos is not None:
        (folder / "meta.pkl").write_bytes(nanogpt_pickle(itos))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run in out/ that was trained on data/tiny."""
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path / "data/tiny")
    formats.write(random_weights(vocab_size=20, tokenizer=CHAR), tmp_path / "out", "native")
    return tmp_path


def rows(capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict]:
    """The command's JSON lines."""
    evaluate.main(["--json", "--device=cpu", *flags])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def losses(path: Path) -> np.ndarray:
    """Each target's loss, window by window of the model's 16 tokens."""
    loaded = random_weights(vocab_size=20)
    model = GPT(loaded.model_args)
    model.load_state_dict(loaded.model)
    ids = torch.from_numpy(np.fromfile(path, "<u2").astype(np.int64))
    parts = []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            window = ids[start : start + 17]
            parts.append(model(window[None, :-1], window[None, 1:])[1].double())
    return torch.cat(parts).numpy()


def test_by_default_the_whole_val_split_of_the_runs_dataset(here: Path, capsys: pytest.CaptureFixture[str]):
    (row,) = rows(capsys)
    expected = losses(here / "data/tiny/val.bin")
    assert (row["split"], row["data"], row["mode"], row["tokens"]) == ("val", "tiny", "full", 149)
    assert row["loss"] == pytest.approx(expected.mean(), rel=1e-6)
    assert row["perplexity"] == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    targets = np.fromfile(here / "data/tiny/val.bin", "<u2")[1:]
    text_bytes = len(targets) + int((targets == 19).sum())  # é has two
    assert row["text_bytes"] == text_bytes
    assert row["bits_per_byte"] == pytest.approx(expected.sum() / math.log(2) / text_bytes, rel=1e-6)


def test_the_dataset_by_its_path(here: Path, capsys: pytest.CaptureFixture[str]):
    (by_name,), (by_path,) = rows(capsys), rows(capsys, "--dataset=data/tiny")
    assert by_path["bits_per_byte"] == by_name["bits_per_byte"], "its characters are known"
    (by_pattern,) = rows(capsys, "--dataset=data/tiny/{split}.bin")
    assert by_pattern["bits_per_byte"] == by_name["bits_per_byte"]


def test_a_text_file_is_tokenized_and_scored(here: Path, capsys: pytest.CaptureFixture[str]):
    ids = np.fromfile(here / "data/tiny/val.bin", "<u2")
    (here / "text.txt").write_text("".join(ITOS[i] for i in ids), encoding="utf-8")
    (row,) = rows(capsys, "--file=text.txt")
    assert row["loss"] == rows(capsys)[0]["loss"] and row["data"] == row["split"] == "text.txt"
    (here / "text.txt").write_text("")
    with pytest.raises(DataError, match="empty"):
        rows(capsys, "--file=text.txt")
    (here / "text.txt").write_text("xyz")
    with pytest.raises(DataError, match="not in the vocabulary"):
        rows(capsys, "--file=text.txt")


def test_random_mode_reports_both_splits_by_one_generator(here: Path, capsys: pytest.CaptureFixture[str]):
    found = rows(capsys, "--eval_mode=random", "--eval_iters=5", "--batch_size=3", "--seed=9")
    loaded = random_weights(vocab_size=20)
    model = GPT(loaded.model_args)
    model.load_state_dict(loaded.model)
    sources = {split: TokenSource([f"data/tiny/{split}.bin"]) for split in ("train", "val")}
    expected = scoring.estimate_loss(
        model, sources, eval_iters=5, batch_size=3, block_size=16, generator=torch.Generator().manual_seed(9)
    )
    assert {row["split"]: row["loss"] for row in found} == pytest.approx(expected, rel=1e-6)
    assert found[0]["tokens"] == 5 * 3 * 16


def test_more_context_from_overlapping_windows(here: Path, capsys: pytest.CaptureFixture[str]):
    (whole,), (overlapping,) = rows(capsys, "--block_size=8"), rows(capsys, "--block_size=8", "--stride=1")
    assert whole["tokens"] == overlapping["tokens"] == 149 and whole["loss"] != overlapping["loss"]
    assert overlapping["text_bytes"] == whole["text_bytes"]


def test_a_run_with_a_document_mask_is_evaluated_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path / "data/tiny", itos=None, vocab_size=50257)
    ids = np.fromfile("data/tiny/val.bin", "<u2")[: 9 * 16 + 1]
    ids[::6] = 50256
    ids.tofile("data/tiny/val.bin")
    loaded = random_weights(vocab_size=50257, n_embd=8, n_head=2, n_layer=1, optimizer=False)
    loaded.config["document_mask"] = True
    formats.write(loaded, tmp_path / "out", "native")
    model = GPT(loaded.model_args)
    model.load_state_dict(loaded.model)
    with torch.no_grad():
        tokens = torch.from_numpy(ids.astype(np.int64))
        windows = tokens[:-1].view(9, 16), tokens[1:].view(9, 16)
        masked, whole = separately(model, *windows, 50256)[1].mean().item(), model(*windows)[1].mean().item()
    assert masked != pytest.approx(whole, rel=1e-5)
    (row,), (unmasked,) = rows(capsys), rows(capsys, "--document_mask=False")
    assert (row["loss"], row["document_mask"]) == (pytest.approx(masked, rel=1e-6), True)
    assert (unmasked["loss"], unmasked["document_mask"]) == (pytest.approx(whole, rel=1e-6), False)
    evaluate.main(["--device=cpu"])
    assert "windows of 16, attention inside documents" in capsys.readouterr().out


def test_characters_have_no_documents_to_mask(here: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(DataError, match="no token of these data ends a document"):
        rows(capsys, "--document_mask=True")
    assert rows(capsys)[0]["document_mask"] is False


def test_the_table(here: Path, capsys: pytest.CaptureFixture[str]):
    evaluate.main(["--device=cpu", "--split=train,val", "--stride=4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model") and "step_00000012" in lines[0]
    assert lines[1] == "data    tiny: every token once, in order, windows of 16, 4 apart"
    assert lines[2] == "device  cpu, float32"
    assert lines[4].split() == ["split", "loss", "perplexity", "bits/byte", "tokens", "tokens/s"]
    assert [line.split()[0] for line in lines[5:]] == ["train", "val"]
    assert len({len(line) for line in lines[4:]}) == 1, "columns are aligned"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--block_size=32"], "block_size is too long"),
        (["--stride=17"], "stride is too long"),
        (["--stride=4", "--eval_mode=random"], "--stride is for"),
        (["--eval_iters=0"], "--eval_iters is out of range"),
    ],
)
def test_flags_that_do_not_fit(here: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str):
    with pytest.raises(ConfigError, match=words):
        rows(capsys, *flags)


@pytest.mark.parametrize("itos", [ITOS[::-1], ITOS[:-1], None], ids=["reordered", "smaller", "gpt2"])
def test_data_of_another_tokenizer_are_refused(here: Path, capsys: pytest.CaptureFixture[str], itos: list[str] | None):
    prepare(here / "data/other", itos)
    with pytest.raises(DataError, match="another tokenizer") as error:
        rows(capsys, "--dataset=other")
    assert error.value.expected.startswith("20 characters") and error.value.exit_code == 3


def test_ids_beyond_the_vocabulary_are_refused(here: Path, capsys: pytest.CaptureFixture[str]):
    np.array([1, 2, 20, 3], "<u2").tofile(here / "data/tiny/val.bin")
    with pytest.raises(DataError, match="outside the vocabulary"):
        rows(capsys)


def test_a_missing_split_and_dataset(here: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(DataError, match="no test tokens"):
        rows(capsys, "--split=test")
    with pytest.raises(DataError, match="did you mean 'tiny'"):
        rows(capsys, "--dataset=tini")


def test_a_checkpoints_dataset_name_is_no_path(here: Path, capsys: pytest.CaptureFixture[str]):
    loaded = random_weights(vocab_size=20, tokenizer=CHAR)
    loaded.config["dataset"] = "../data/tiny"
    formats.write(loaded, here / "crafted", "native")
    with pytest.raises(DataError, match="not a dataset name") as caught:
        rows(capsys, "--out_dir=crafted")
    assert caught.value.hint.endswith("--dataset=../data/tiny")
    assert rows(capsys, "--out_dir=crafted", "--dataset=tiny")[0]["tokens"] == 149


def test_no_vocabulary_costs_the_bits_per_byte_alone(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def unreachable(_: object) -> None:
        raise DataError("the vocabulary is not on this machine")

    monkeypatch.setattr(evaluation, "from_json", unreachable)
    evaluate.main(["--json", "--device=cpu"])
    out, err = capsys.readouterr()
    assert json.loads(out)["bits_per_byte"] is None and json.loads(out)["loss"] > 0
    assert "no bits per byte: the vocabulary is not on this machine" in err


# ---- presets ----


@pytest.fixture
def gpt2(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`gpt2` is a tiny model on the hub, data/openwebtext a few tokens."""
    formats.write(random_weights(bias=True, vocab_size=50257, n_embd=8), here / "hub", "hf")
    monkeypatch.setattr(huggingface, "_fetch", lambda repository: here / "hub")
    prepare(here / "data/openwebtext", None, 50257)
    return here


def test_the_preset_of_a_published_baseline(gpt2: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--config", "eval_gpt2", "--block_size=16", "--eval_iters=2"]
    found = rows(capsys, *flags)
    assert [(row["split"], row["published_loss"]) for row in found] == [("train", 3.11), ("val", 3.12)]
    assert all(row["mode"] == "random" and row["tokens"] == 2 * 8 * 16 for row in found), "batch_size is the preset's"
    evaluate.main([*flags, "--device=cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].endswith("published loss") and lines[5].endswith("3.11") and lines[6].endswith("3.12")


def test_other_data_have_no_published_loss(gpt2: Path, capsys: pytest.CaptureFixture[str]):
    prepare(gpt2 / "data/mine", None, 50257)
    (row,) = rows(capsys, "--init_from=gpt2", "--dataset=mine")
    assert row["published_loss"] is None
    with pytest.raises(ConfigError, match="what to evaluate on"):
        rows(capsys, "--init_from=gpt2")


def test_published_losses_are_nanogpts():
    assert PUBLISHED == {
        "gpt2": {"train": 3.11, "val": 3.12},
        "gpt2-medium": {"train": 2.85, "val": 2.84},
        "gpt2-large": {"train": 2.66, "val": 2.67},
        "gpt2-xl": {"train": 2.56, "val": 2.54},
    }


@pytest.mark.parametrize(
    "line",
    ["--config eval_gpt2 --eval_iters 7 --split=val", "eval_gpt2 --eval_iters=7 --split val",
     "--eval_iters 7 --config=eval_gpt2 --split=val"],
)  # fmt: skip
def test_presets_lend_what_both_commands_have(line: str):
    config = evaluate.parse_config(line.split())
    assert (config.init_from, config.dataset, config.batch_size) == ("gpt2", "openwebtext", 8)
    assert (config.eval_mode, config.eval_iters, config.split) == ("random", 7, "val")


def test_a_training_preset_means_its_run():
    config = evaluate.parse_config(["--config", "quickstart"])
    assert (config.init_from, config.out_dir, config.dataset) == ("resume", "out-quickstart", "stdlib")
