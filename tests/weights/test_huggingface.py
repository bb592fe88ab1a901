"""Hugging Face GPT-2 folders, in and out, proven by transformers' own logits."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from random_weights import random_weights, same_tensors
from safetensors.torch import load_file, save_file

from nanogpt_fast.data.tokenizer import find_vocab_bpe
from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.model import GPT
from nanogpt_fast.weights.canonical import Weights
from nanogpt_fast.weights.formats import read, write

transformers = pytest.importorskip("transformers")


def theirs(**changes):
    """A small random GPT2LMHeadModel; biases and LayerNorms random too, as transformers starts them at 0 and 1."""
    torch.manual_seed(0)
    shape = {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 100, "n_positions": 16}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(shape | special | changes))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.5)
    return model


def ours(weights: Weights) -> GPT:
    model = GPT(weights.model_args)
    model.load_state_dict(weights.model)
    return model.eval()


def ids(vocab_size: int = 100) -> torch.Tensor:
    return torch.randint(vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def largest_difference(their_model, our_model: GPT, vocab_size: int = 100) -> float:
    their_logits = their_model(ids(vocab_size)).logits
    assert their_logits.abs().max() > 1  # else a small difference would say nothing
    return float((their_logits - our_model.logits(ids(vocab_size))[..., :vocab_size]).abs().max())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    theirs().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu"])
def test_import_gives_their_logits(tmp_path, activation):
    model = theirs(activation_function=activation)
    model.save_pretrained(tmp_path)
    assert largest_difference(model, ours(read(tmp_path))) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu_tanh"},
        {"bias": False},
        {"bias": False, "norm_bias": True},
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": False, "vocab_size": 50304, "n_layer": 1},
    ],
    ids=str,
)
def test_export_gives_our_logits(tmp_path, changes):
    weights = random_weights(**changes)
    write(weights, tmp_path / "hf", "hf")
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert largest_difference(loaded.eval(), ours(weights), weights.used_vocab) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_keeps_every_bit(tmp_path, tied):
    weights = random_weights(tie_word_embeddings=tied)
    found = read(write(weights, tmp_path / "hf", "hf"))
    assert same_tensors(found.model, weights.model)
    assert found.model_args == weights.model_args


def test_padded_vocabulary_is_cut_to_gpt2s(tmp_path):
    weights = random_weights(vocab_size=50304, n_layer=1)
    write(weights, tmp_path / "hf", "hf")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    assert loaded.config.vocab_size == 50257
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (50256, 50256)
    assert largest_difference(loaded, ours(weights), 50257) < 1e-5


def test_generation_token_for_token(tmp_path):
    weights = random_weights(block_size=48, activation="gelu_tanh")
    write(weights, tmp_path / "hf", "hf")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    prompt = ids()[:2, :8]
    expected = loaded.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert expected.unique().numel() > 10  # not one token for ever
    assert torch.equal(ours(weights).generate(prompt, 40, temperature=0.0), expected)


def test_names_without_prefix_and_masks_as_openais_files_have(folder):
    tensors = load_file(folder / "model.safetensors")
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    plain["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    expected = read(folder)
    save_file(plain, folder / "model.safetensors")  # no metadata either
    assert same_tensors(read(folder).model, expected.model)


@pytest.mark.parametrize("form", ["shards", "bin"])
def test_other_weight_files(tmp_path, form):
    model = theirs()
    if form == "shards":
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    else:
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # holds lm_head.weight, tied
    assert largest_difference(model, ours(read(tmp_path))) < 1e-5


def test_shard_outside_the_folder_is_refused(tmp_path):
    theirs().save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    moved = sorted(set(names.values()))[0]
    (tmp_path / "hf" / moved).rename(tmp_path / moved)
    with pytest.raises(CheckpointError, match="missing"):
        read(tmp_path / "hf")
    redirected = {name: f"../{file}" if file == moved else file for name, file in names.items()}
    index.write_text(json.dumps({"weight_map": redirected}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        read(tmp_path / "hf")


def test_code_in_pytorch_model_bin_is_not_run(folder, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was_here"),)

    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        read(folder)
    assert not (tmp_path / "was_here").exists()


REFUSED = {
    "model_type": "llama",
    "layer_norm_epsilon": 1e-6,
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
    "reorder_and_upcast_attn": True,
    "add_cross_attention": True,
    "tie_word_embeddings": "no",
    "n_inner": 128,
    "activation_function": "relu",
    "n_head": 5,
    "n_layer": None,
    "vocab_size": "many",
}


@pytest.mark.parametrize("option", REFUSED)
def test_option_that_makes_another_model_is_refused_by_name(folder, option):
    edit_config(folder, **{option: REFUSED[option]})
    with pytest.raises(CheckpointError, match=option):
        read(folder)


def test_n_inner_spelt_out_is_accepted(folder):
    expected = read(folder)
    edit_config(folder, n_inner=256)
    assert same_tensors(read(folder).model, expected.model)


def test_a_head_of_its_own_is_read_where_the_configuration_says_so(tmp_path):
    model = theirs(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    assert largest_difference(model, ours(read(tmp_path))) < 1e-5
    edit_config(tmp_path, tie_word_embeddings=True)  # the tensors tell
    with pytest.raises(CheckpointError, match="not the token embedding"):
        read(tmp_path)


def test_damaged_folder_names_the_file(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        read(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read(folder)


def test_nan_is_refused_with_its_name(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][5, 7] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight"):
        read(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_export(tmp_path, dtype):
    weights = random_weights()
    write(weights, tmp_path / "hf", "hf", dtype=dtype)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert {t.dtype for t in load_file(tmp_path / "hf" / "model.safetensors").values()} == {dtype}
    found = read(tmp_path / "hf").model
    assert all(torch.equal(found[n], t.to(dtype).float()) for n, t in weights.model.items())


def test_float16_overflow_is_refused_and_leaves_nothing(tmp_path):
    weights = random_weights()
    weights.model["transformer.wpe.weight"][0, 0] = 1e5
    with pytest.raises(CheckpointError, match="too large"):
        write(weights, tmp_path / "hf", "hf", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_everyone_may_read_the_export(tmp_path):
    write(random_weights(), tmp_path / "hf", "hf")
    for file in (tmp_path / "hf").iterdir():
        assert file.stat().st_mode & 0o777 == 0o644, file.name


def test_gpt2_tokenizer_goes_along(tmp_path):
    find_vocab_bpe()  # the development extra brings the file
    write(random_weights(vocab_size=50304, n_layer=1), tmp_path / "hf", "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Hello world gazed, 1234 caf\u00e9 \u732b"
    assert tokenizer("Hello world gazed")["input_ids"] == [15496, 995, 50255]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (len(tokenizer), tokenizer.eos_token_id) == (50257, 50256)


def test_character_model_gets_its_table_and_the_card_says_so(tmp_path):
    itos = [chr(n) for n in range(32, 122)]
    folder = write(random_weights(tokenizer={"kind": "char", "itos": itos}), tmp_path / "hf", "hf")
    assert json.loads((folder / "meta.json").read_text())["tokenizer"]["itos"] == itos
    assert not (folder / "vocab.json").exists()
    assert "AutoTokenizer" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(itos)  # 100 rows were padded


def test_card_tells_the_training_and_nothing_of_the_machine(tmp_path):
    weights = random_weights()
    run = {"batch_size": 4, "gradient_accumulation_steps": 2, "block_size": 16, "out_dir": "/home/me/out"}
    weights.config.update(run)
    card = (write(weights, tmp_path / "hf", "hf") / "README.md").read_text()
    for row in ("dataset | tiny", "tokens seen | 1,536", "best validation loss | 2.5000", "learning_rate | 0.001"):
        assert row in card
    weights.config["dataset"], weights.state["samples_seen"] = "/mnt/secret/*.bin", 50
    assert "tokens seen | 800" in (write(weights, tmp_path / "counted", "hf") / "README.md").read_text()
    card += (write(weights, tmp_path / "hf2", "hf") / "README.md").read_text()
    for private in ("/home", "/mnt", str(tmp_path), socket.gethostname()):
        assert private not in card
