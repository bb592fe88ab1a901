"""nanoGPT's checkpoints of other years, and what else is called ckpt.pt: built as its code of the time built them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from random_weights import random_weights, same_tensors

from nanogpt_fast import convert, sample
from nanogpt_fast.data.meta_pickle import nanogpt_pickle
from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.restore import restore, shape_of
from nanogpt_fast.run import checkpoint
from nanogpt_fast.settings.config import Config
from nanogpt_fast.weights import formats, nanogpt_ckpt
from nanogpt_fast.weights.formats import Weights, read, write

LETTERS = [chr(48 + i) for i in range(tiny_run.VOCAB)]


def tiny(**changes: Any) -> Weights:
    """A model of tiny_run's shape, of 11 layers: as text h.10 sorts before h.2."""
    shape: dict[str, Any] = {"n_layer": 11, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": tiny_run.VOCAB}
    return random_weights(**(shape | changes))


def groups_until_may_2023(weights: Weights) -> list[list[str]]:
    """configure_optimizers as nanoGPT had it before 7fe4a099: whitelisted module kinds, names sorted as text."""
    linear = ("c_attn", "c_proj", "c_fc", "lm_head")
    decay = {n for n in weights.model if n.split(".")[-2] in linear and n.endswith("weight")}
    return [sorted(decay), sorted(set(weights.model) - decay)]


def save(path: Path, weights: Weights, groups: list[list[str]], **changes: Any) -> Path:
    """ckpt.pt with torch's own AdamW in these groups, its moments those of `weights`; a change of None leaves out."""
    params = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in weights.model.items()}
    decays = [0.1, 0.0, 0.0]
    adamw = torch.optim.AdamW(
        [{"params": [params[n] for n in group], "weight_decay": wd} for group, wd in zip(groups, decays)],
        betas=(0.8, 0.97),
    )
    assert weights.optimizer is not None
    for name, parameter in params.items():
        state: dict[str, Any] = {"step": torch.tensor(float(weights.optimizer_step))}
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = weights.optimizer[f"{moment}.{name}"].clone()
        adamw.state[parameter] = state
    args = {key: getattr(weights.model_args, key) for key in nanogpt_ckpt.MODEL_ARGS}
    saved = {
        "model": {"lm_head.weight": weights.model["transformer.wte.weight"]} | weights.model,
        "optimizer": adamw.state_dict(),
        "model_args": args,
        "iter_num": weights.step,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "toy", "dtype": "float32"},
    }
    for key, value in changes.items():
        part = args if key in args else saved
        part.pop(key) if value is None else part.update({key: value})
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved, path)
    return path


def may_2023(folder: Path, tie_word_embeddings: bool = True, **changes: Any) -> tuple[Weights, Path]:
    weights = tiny(activation="gelu_tanh", tie_word_embeddings=tie_word_embeddings)
    return weights, save(folder / "ckpt.pt", weights, groups_until_may_2023(weights), **changes)


def january_2023(folder: Path, **changes: Any) -> tuple[Weights, Path]:
    """No vocab_size, no bias among model_args."""
    return may_2023(folder, vocab_size=None, bias=None, **changes)


def december_2022(folder: Path, **changes: Any) -> tuple[Weights, Path]:
    """The head is not yet the token embedding."""
    return january_2023(folder, tie_word_embeddings=False, **changes)


@pytest.mark.parametrize("made", [may_2023, january_2023, december_2022])
def test_old_forms_are_read_whole(tmp_path, made):
    weights, path = made(tmp_path)
    found = read(path)
    assert found.model_args == weights.model_args and found.activation_known  # tanh: the optimizer's form is the proof
    assert same_tensors(found.model, weights.model) and same_tensors(found.optimizer, weights.optimizer)
    assert (found.step, found.optimizer_step, found.best_val_loss) == (12, 12, 2.5)


def test_a_missing_block_size_is_wpes(tmp_path):
    assert read(may_2023(tmp_path, block_size=None)[1]).model_args.block_size == 8


def test_december_2022_had_neither_config_nor_loss(tmp_path):
    found = read(december_2022(tmp_path, config=None, best_val_loss=None)[1])
    assert found.config == {} and found.best_val_loss == math.inf


def test_old_forms_resume_sample_and_convert(tmp_path, monkeypatch, capsys):
    """The first update after a resume moves every parameter as the moments that it came with say."""
    monkeypatch.chdir(tmp_path)
    weights, _ = january_2023(tmp_path / "out")
    tiny_run.write_dataset(tmp_path)
    (tmp_path / "data/toy/meta.pkl").write_bytes(nanogpt_pickle(LETTERS))
    sample.main(["--out_dir=out", "--num_samples=1", "--max_new_tokens=5", "--start=0", "--device=cpu"])
    convert.main(["out", "hf", "--to=hf"])
    assert read("hf").model_args.activation == "gelu_tanh"
    convert.main(["out", "new", "--to=native"])
    convert.main(["new", "back.pt", "--to=nanogpt"])
    for found in (read("new"), read("back.pt")):
        assert same_tensors(found.model, weights.model) and same_tensors(found.optimizer, weights.optimizer)
        assert found.model_args.activation == "gelu_tanh"
    assert tiny_run.train(tmp_path, init_from="resume", max_iters=12, beta1=0.8, beta2=0.97, eval_interval=13) == 0
    assert "tanh" in capsys.readouterr().out
    after = checkpoint.load(checkpoint.list_steps(tmp_path / "out")[13])
    assert weights.optimizer is not None and after.state["optimizer_step"] == 13
    for name in weights.model:  # moments of the scale 1e-3, and 0.2 of a gradient clipped to norm 1
        theirs, ours = weights.optimizer[f"exp_avg.{name}"], after.optimizer[f"exp_avg.{name}"]
        assert (ours - 0.8 * theirs).norm() < 0.2 + 1e-6, name
    moved = torch.cat([(after.model[n] - weights.model[n]).flatten() for n in weights.model])
    told = torch.cat([weights.optimizer[f"exp_avg.{n}"].flatten() for n in weights.model])
    assert moved.isfinite().all() and torch.corrcoef(torch.stack([moved, told]))[0, 1] < -0.1


UNKNOWN = {
    "one group": lambda names: [names],
    "three groups": lambda names: [names[:2], names[2:5], names[5:]],
    "moved between groups": lambda names: [names[:5], names[5:]],
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_optimizer_costs_a_warning_and_only_where_it_is_asked_for(tmp_path, caplog, case):
    weights = tiny()
    path = save(tmp_path / "ckpt.pt", weights, UNKNOWN[case](list(weights.model)))
    found = read(path)
    assert found.optimizer is None and found.optimizer_step == 0 and same_tensors(found.model, weights.model)
    assert "its state is left out" in caplog.text
    caplog.clear()
    assert restore("resume", str(tmp_path), optimizer=False).optimizer is None
    assert restore(str(path), "").optimizer is None and not caplog.text


def test_steps_that_differ_and_other_shapes_are_an_unknown_optimizer(tmp_path, caplog):
    path = write(random_weights(), tmp_path / "a.pt", "nanogpt")
    for change, words in (
        (lambda state: state[3].update(step=torch.tensor(99.0)), "different number of times"),
        (lambda state: state[3].update(step="many"), "different number of times"),
        (lambda state: state[0].update(exp_avg=torch.zeros(3, 3)), "wte.weight"),
        (lambda state: state[0].pop("exp_avg_sq"), "wte.weight"),
        (lambda state: state.pop(4), "state for 27 of 28"),
    ):
        saved = torch.load(path, weights_only=True)
        change(saved["optimizer"]["state"])
        torch.save(saved, tmp_path / "b.pt")
        caplog.clear()
        assert read(tmp_path / "b.pt").optimizer is None and words in caplog.text


def test_a_damaged_optimizer_stops_nobody_who_does_not_need_it(tmp_path):
    path = write(random_weights(), tmp_path / "out", "nanogpt")
    saved = torch.load(path, weights_only=True)
    saved["optimizer"]["state"][0]["exp_avg"][0, 0] = float("nan")
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match="NaN"):
        restore("resume", str(tmp_path / "out"))
    assert restore("resume", str(tmp_path / "out"), optimizer=False).step == 12
    convert.main([str(path), str(tmp_path / "hf"), "--to=hf"])


# ---- which GELU ----


def test_gelu_is_assumed_where_nothing_tells_and_may_be_said(tmp_path, caplog, capsys):
    weights = tiny()
    path = save(tmp_path / "out/ckpt.pt", weights, list(nanogpt_ckpt.optimizer_names(weights.model_args)))
    found = read(path)
    assert found.model_args.activation == "gelu" and not found.activation_known
    assert not caplog.text  # saved after October 2023
    convert.main([str(path), str(tmp_path / "a.pt"), "--to=nanogpt"])
    assert "--activation=gelu_tanh" in capsys.readouterr().out
    convert.main([str(path), str(tmp_path / "b.pt"), "--to=nanogpt", "--activation=gelu_tanh"])
    assert "tanh GELU" in capsys.readouterr().out
    assert read(tmp_path / "b.pt").model_args.activation == "gelu_tanh" and read(tmp_path / "a.pt").activation_known
    assert restore("resume", str(tmp_path / "out"), activation="gelu_tanh").config.activation == "gelu_tanh"
    for asked in ("gelu", "gelu_tanh"):  # a training run's flag
        restored = restore("resume", str(tmp_path / "out"))
        shape = shape_of(Config().replace(block_size=8, activation=asked), restored, None, lambda _: None)
        assert shape.activation == restored.config.activation == asked
    known = restore(str(write(tiny(), tmp_path / "run", "native")), "")
    assert shape_of(Config().replace(block_size=8, activation="gelu_tanh"), known, None, print).activation == "gelu"


def test_a_file_from_before_torch_2_1_makes_it_a_warning(tmp_path, caplog):
    weights = tiny()
    path = save(tmp_path / "ckpt.pt", weights, list(nanogpt_ckpt.optimizer_names(weights.model_args)))
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    assert read(path).model_args.activation == "gelu"
    assert "14 June 2023" in caplog.text and "--activation=gelu_tanh" in caplog.text


# ---- what else is called ckpt.pt ----


GPTConfig = type("GPTConfig", (), {"__module__": "__main__"})  # as a script's class is pickled


@pytest.fixture(autouse=True)
def script(monkeypatch):
    monkeypatch.setattr("__main__.GPTConfig", GPTConfig, raising=False)


def test_numpys_numbers_are_read(tmp_path):
    _, path = may_2023(tmp_path, iter_num=np.int64(7), best_val_loss=np.float32(1.5), n_layer=np.int32(11))
    found = read(path)
    assert (found.step, found.best_val_loss, found.model_args.n_layer) == (7, 1.5, 11)
    assert type(found.step) is int and type(found.model_args.n_layer) is int


def test_a_dtype_in_the_configuration_becomes_a_word(tmp_path):
    config = {"dtype": torch.bfloat16, "dataset": "toy", "loss": float("inf"), "shape": [1, 2]}
    assert read(may_2023(tmp_path, config=config)[1]).config == {"dtype": "bfloat16", "dataset": "toy"}


def refusal(tmp_path: Path, saved: Any) -> str:
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError) as refused:
        read(tmp_path / "ckpt.pt")
    return str(refused.value)


def test_build_nanogpts_checkpoint_is_named_with_the_way_out(tmp_path):
    weights = tiny()
    text = refusal(tmp_path, {"model": weights.model, "config": GPTConfig(), "step": 5, "val_loss": 3.0})
    assert "build-nanogpt" in text and "GPTConfig" in text and "type('GPTConfig'" in text and "was run" in text
    text = refusal(tmp_path, {"model": weights.model, "config": {"n_layer": 11}, "step": 5})
    assert "under `config`" in text and "model_args" in text


def test_the_way_out_works(tmp_path, monkeypatch):
    """The command that the refusal prints, run."""
    weights = tiny()
    args = {k: getattr(weights.model_args, k) for k in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    config = GPTConfig()
    vars(config).update(args)
    text = refusal(tmp_path, {"model": weights.model, "config": config, "step": 5})
    code = text.split('python -c "')[1].rstrip().removesuffix('"')
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    found = read(tmp_path / "ckpt.pt")
    assert same_tensors(found.model, weights.model)
    assert (found.step, found.model_args.activation) == (5, "gelu_tanh")


def test_a_state_dict_alone_is_named_with_the_shape_that_it_tells(tmp_path):
    text = refusal(tmp_path, tiny().model)
    assert "a state_dict alone" in text and "n_head" in text
    assert f"n_layer=11, n_embd=16, block_size=8, vocab_size={tiny_run.VOCAB}" in text


def test_hugging_faces_file_under_this_name_is_named(tmp_path):
    hf = {n: t.t() if n.endswith(("c_attn.weight", "c_fc.weight")) else t for n, t in tiny().model.items()}
    text = refusal(tmp_path, {n.removeprefix("transformer."): t.contiguous() for n, t in hf.items()})
    assert "Hugging Face" in text and "pytorch_model.bin" in text and "config.json" in text


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_file_of_a_folder_is_answered_with_the_folder(tmp_path, name):
    folder = write(random_weights(), tmp_path / "hf", "hf")
    with pytest.raises(CheckpointError) as refused:
        formats.sniff(folder / name)
    assert str(folder) in refused.value.hint and name in refused.value.found
