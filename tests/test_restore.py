"""restore.py: what --init_from can name, what each brings, and the errors."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import random_weights, same_tensors
from twin import Twin

from nanogpt_fast.data.meta_pickle import nanogpt_pickle
from nanogpt_fast.data.tokenizer import CharTokenizer
from nanogpt_fast.errors import CheckpointError, ConfigError, DataError
from nanogpt_fast.restore import build_model, restore
from nanogpt_fast.run import checkpoint
from nanogpt_fast.weights import formats, huggingface

LETTERS = [chr(i) for i in range(97, 97 + 20)]
CHAR = {"kind": "char", "itos": LETTERS}


def char_weights(**changes: Any) -> formats.Weights:
    return random_weights(vocab_size=20, **changes)


def dataset(data_dir: Path, name: str = "tiny") -> Path:
    """A nanoGPT dataset folder of LETTERS, with meta.pkl alone."""
    (data_dir / name).mkdir(parents=True)
    (data_dir / name / "meta.pkl").write_bytes(nanogpt_pickle(LETTERS))
    return data_dir


def test_resume_takes_the_newest_native_checkpoint(tmp_path: Path):
    expected = char_weights(tokenizer=CHAR)
    formats.write(expected, tmp_path / "out", "native")
    formats.write(char_weights(seed=1), tmp_path / "out", "nanogpt")  # nanoGPT's file beside it is not looked at
    found = restore("resume", str(tmp_path / "out"))
    assert found.config == expected.model_args and found.step == 12
    assert same_tensors(found.model, expected.model) and same_tensors(found.optimizer, expected.optimizer)
    assert found.state["optimizer_step"] == 12 and found.run_config == expected.config
    assert found.tokenizer().decode([0, 19]) == "at"
    assert found.source.endswith("step_00000012, iteration 12")


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for step in (5, 6):
        content = checkpoint.load(formats.write(char_weights(), tmp_path / f"source{step}", "native"))
        content.step = step
        checkpoint.save(tmp_path / "out", content, keep_last=9)
    model = tmp_path / "out/checkpoints/step_00000006/model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    found = restore("resume", str(tmp_path / "out"))
    assert found.step == 5 and len(caplog.messages) == 1 and "step_00000006" in caplog.text


def test_resume_imports_nanogpts_checkpoint_and_says_so(tmp_path: Path):
    expected = char_weights()
    formats.write(expected, tmp_path / "out", "nanogpt")
    found = restore("resume", str(tmp_path / "out"), str(dataset(tmp_path / "data")))
    assert "nanoGPT" in found.source and "iteration 12" in found.source
    assert same_tensors(found.model, expected.model) and same_tensors(found.optimizer, expected.optimizer)
    assert found.state == {"optimizer_step": 12, "best_val_loss": 2.5}
    assert found.run_config["dataset"] == "tiny" and found.tokenizer_json == CHAR


@pytest.mark.parametrize("form", ["native", "nanogpt", "hf", "llmc"])
def test_a_path_of_each_format(tmp_path: Path, form: formats.Format):
    activation = "gelu_tanh" if form == "llmc" else "gelu"
    expected = random_weights(bias=True, activation=activation, vocab_size=128)
    path = formats.write(expected, tmp_path / ("model.bin" if form == "llmc" else "x"), form)
    found = restore(str(path), "not looked at")
    assert same_tensors(found.model, expected.model) and str(path) in found.source
    assert found.optimizer is None  # to start from: only resume goes on with it
    if form == "native":
        assert same_tensors(restore(str(tmp_path / "x"), "").model, expected.model), "the run as well as its step"


def test_a_hub_name_comes_before_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = random_weights(bias=True, vocab_size=50257)
    formats.write(expected, tmp_path / "cache", "hf")
    fetched = []
    monkeypatch.setattr(huggingface, "_fetch", lambda repository: fetched.append(repository) or tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    for name in ("gpt2", "openai-community/gpt2"):
        found = restore(name, "out")
        assert same_tensors(found.model, expected.model) and "hub" in found.source
    assert fetched == ["openai-community/gpt2"] * 2
    assert found.tokenizer_json == {"kind": "gpt2"}


def test_best_is_the_checkpoint_of_the_lowest_validation_loss(tmp_path: Path):
    """Not the newest, not one that was never evaluated, and not a folder of that name."""
    for step, val_loss in ((5, 2.5), (6, 1.5), (7, 3.5), (8, None)):
        content = checkpoint.load(formats.write(char_weights(seed=step), tmp_path / f"source{step}", "native"))
        content.step, content.state["val_loss"] = step, val_loss
        checkpoint.save(tmp_path / "out", content, keep_last=9)
    (tmp_path / "best").mkdir()
    found = restore("best", str(tmp_path / "out"))
    assert found.step == 6 and same_tensors(found.model, char_weights(seed=6).model)
    assert found.source.endswith("step_00000006, iteration 6")
    assert restore("resume", str(tmp_path / "out")).step == 8


def test_no_best_checkpoint_says_what_there_is(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no best") as error:
        restore("best", str(tmp_path / "out"))
    assert error.value.found == "no checkpoint"
    formats.write(char_weights(), tmp_path / "out", "native")
    with pytest.raises(CheckpointError, match="no best") as error:
        restore("best", str(tmp_path / "out"))
    assert error.value.found == "none with one among 1" and "resume" in error.value.hint


def test_scratch_has_no_weights():
    with pytest.raises(ConfigError, match="scratch"):
        restore("scratch", "out")


@pytest.mark.parametrize(
    "typo, meant", [("gpt2-medum", "gpt2-medium"), ("resum", "resume"), ("bset", "best"), ("gpt-xl", "gpt2-xl")]
)
def test_a_typo_is_answered_with_the_near_names(typo: str, meant: str):
    with pytest.raises(CheckpointError, match=f"did you mean .*'{meant}'") as error:
        restore(typo, "out")
    assert error.value.exit_code == 4


def test_nothing_to_resume_names_what_was_looked_for_and_the_runs_nearby(tmp_path: Path):
    with pytest.raises(CheckpointError) as error:
        restore("resume", str(tmp_path / "out"))
    assert "checkpoints/step_" in error.value.expected and "ckpt.pt" in error.value.expected
    assert "nanogpt_fast.train" in error.value.hint
    formats.write(char_weights(), tmp_path / "out-shakespeare", "native")
    with pytest.raises(CheckpointError) as error:
        restore("resume", str(tmp_path / "out"))
    assert str(tmp_path / "out-shakespeare") in error.value.found and "out-shakespeare" not in error.value.hint


def test_a_path_without_weights(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no weights in a known form"):
        restore(str(tmp_path), "out")


def test_all_checkpoints_damaged_is_an_error_even_beside_nanogpts(tmp_path: Path):
    step = formats.write(char_weights(), tmp_path / "out", "native")
    formats.write(char_weights(), tmp_path / "out", "nanogpt")
    (step / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint can be used"):
        restore("resume", str(tmp_path / "out"))


# ---- the tokenizer ----


def with_dataset(name: object, tmp_path: Path, vocab_size: int = 20) -> str:
    """The path of a ckpt.pt whose configuration names this dataset."""
    path = formats.write(random_weights(vocab_size=vocab_size), tmp_path / "x", "nanogpt")
    saved = torch.load(path, weights_only=True)
    saved["config"]["dataset"] = name
    torch.save(saved, path)
    return str(path)


def test_the_checkpoints_tokenizer_comes_before_the_datasets(tmp_path: Path):
    formats.write(char_weights(tokenizer={"kind": "char", "itos": LETTERS[::-1]}), tmp_path / "out", "native")
    found = restore("resume", str(tmp_path / "out"), str(dataset(tmp_path / "data")))
    assert found.tokenizer().decode([0]) == "t"


@pytest.mark.parametrize("name", ["../secret", "/etc", "a/b", "..", "", 7, None])
def test_a_dataset_name_from_a_checkpoint_is_never_followed_as_a_path(tmp_path: Path, name: object):
    dataset(tmp_path, "secret")
    (tmp_path / "data").mkdir()
    found = restore(with_dataset(name, tmp_path), "out", str(tmp_path / "data"))
    assert found.tokenizer_json is None
    with pytest.raises(DataError, match="unknown"):
        found.tokenizer()


def test_no_code_in_a_datasets_pickle_runs(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    (tmp_path / "data/tiny").mkdir(parents=True)
    (tmp_path / "data/tiny/meta.pkl").write_bytes(pickle.dumps(Evil()))
    found = restore(with_dataset("tiny", tmp_path), "out", str(tmp_path / "data"))
    assert found.tokenizer_json is None and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("vocab_size, kind", [(50257, "gpt2"), (50304, "gpt2"), (65, None)])
def test_without_a_dataset_gpt2s_vocabulary_is_told_by_its_size(tmp_path: Path, vocab_size: int, kind: str | None):
    found = restore(with_dataset("gone", tmp_path, vocab_size), "out", str(tmp_path / "data"))
    assert (found.tokenizer_json or {}).get("kind") == kind


def test_a_tokenizer_too_large_for_the_model(tmp_path: Path):
    formats.write(random_weights(vocab_size=19), tmp_path / "out", "nanogpt")
    found = restore("resume", str(tmp_path / "out"), str(dataset(tmp_path / "data")))
    with pytest.raises(DataError, match="more ids") as error:
        found.tokenizer()
    assert error.value.expected == "at most 19" and error.value.found.startswith("20")


def test_a_padded_vocabulary_fits(tmp_path: Path):
    formats.write(random_weights(vocab_size=64, tokenizer=CHAR), tmp_path / "out", "native")
    assert isinstance(restore("resume", str(tmp_path / "out")).tokenizer(), CharTokenizer)


def test_a_crafted_shape_is_refused(tmp_path: Path):
    step = formats.write(char_weights(), tmp_path / "out", "native")
    content = checkpoint.load(step)
    content.model_args["n_layer"] = -1
    checkpoint.save(tmp_path / "out", content, keep_last=2)
    with pytest.raises(CheckpointError, match="n_layer"):
        restore("resume", str(tmp_path / "out"))


# ---- the model ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_built_model_computes_what_the_weights_say(tmp_path: Path, dtype: torch.dtype):
    loaded = random_weights(bias=True, tokenizer={"kind": "gpt2"})
    formats.write(loaded, tmp_path / "out", "native")
    model = build_model(restore("resume", str(tmp_path / "out")), torch.device("cpu"), dtype, dropout=0.25)
    assert not model.training and model.config.dropout == 0.25
    assert {p.dtype for p in model.parameters() if p.dim() > 1} == {dtype}
    assert {p.dtype for p in model.parameters() if p.dim() == 1} == {torch.float32}
    twin = Twin(loaded.model_args).double()
    for name, parameter in twin.named().items():
        parameter.data.copy_(loaded.model[name])
    idx = torch.randint(100, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, nll = model(idx[:, :-1], idx[:, 1:])
        expected = twin(idx[:, :-1], idx[:, 1:]).item()
    assert nll.mean().item() == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-2)


def test_state_is_json(tmp_path: Path):
    formats.write(char_weights(), tmp_path / "out", "nanogpt")
    json.dumps(restore("resume", str(tmp_path / "out")).state, allow_nan=False)
