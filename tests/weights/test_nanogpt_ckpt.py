"""nanoGPT's ckpt.pt, in and out, proven by torch's own AdamW and, where NANOGPT_DIR is set, by nanoGPT's code."""

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from random_weights import random_weights, same_tensors

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.model import GPT
from nanogpt_fast.weights import nanogpt_ckpt
from nanogpt_fast.weights.formats import read, write


def saved_dict(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return write(random_weights(), tmp_path / "ckpt.pt", "nanogpt")


def rewritten(ckpt: Path, change) -> Path:
    """ckpt after change(its dict)."""
    saved = saved_dict(ckpt)
    change(saved)
    torch.save(saved, ckpt)
    return ckpt


def test_tanh_activation_survives_nanogpt_form(tmp_path):
    weights = random_weights(activation="gelu_tanh")
    found = read(write(weights, tmp_path / "ckpt.pt", "nanogpt"))
    assert found.model_args.activation == "gelu_tanh"
    assert found.config == weights.config


def test_ckpt_has_exactly_nanogpts_keys(ckpt):
    saved = saved_dict(ckpt)
    assert list(saved) == ["model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"]
    assert set(saved["model_args"]) == {
        "n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout",
    }  # fmt: skip
    assert saved["model"]["lm_head.weight"].data_ptr() == saved["model"]["transformer.wte.weight"].data_ptr()
    assert saved["best_val_loss"].shape == ()
    assert saved["config"]["dataset"] == "tiny"


def test_optimizer_goes_on_in_torch_as_it_would_have(tmp_path):
    """Train with torch's AdamW in nanoGPT's groups, go through our form and back, and take the next step in both."""
    weights = random_weights()

    def adamw(params: dict[str, torch.nn.Parameter]) -> torch.optim.AdamW:
        decayed, rest = ([p for p in params.values() if (p.dim() > 1) == big] for big in (True, False))
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))

    def step(params: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in params.values():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    params = {n: torch.nn.Parameter(t.clone()) for n, t in weights.model.items()}
    optimizer = adamw(params)
    step(params, optimizer, 1)
    step(params, optimizer, 2)
    model = {n: p.detach() for n, p in params.items()}
    torch.save(
        {
            "model": model | {"lm_head.weight": model["transformer.wte.weight"]},
            "optimizer": optimizer.state_dict(),
            "model_args": {key: getattr(weights.model_args, key) for key in nanogpt_ckpt.MODEL_ARGS},
            "iter_num": 2,
            "best_val_loss": torch.tensor(3.0),
            "config": {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1},
        },
        tmp_path / "theirs.pt",
    )
    found = read(tmp_path / "theirs.pt")
    assert found.optimizer_step == 2 and found.optimizer is not None
    last = "transformer.ln_f.bias"
    assert torch.equal(found.optimizer[f"exp_avg.{last}"], optimizer.state[params[last]]["exp_avg"])

    back = saved_dict(write(found, tmp_path / "ours.pt", "nanogpt"))
    fresh = {n: torch.nn.Parameter(back["model"][n].clone()) for n in params}
    resumed = adamw(fresh)
    resumed.load_state_dict(back["optimizer"])
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    step(params, optimizer, 3)
    step(fresh, resumed, 3)
    for name, parameter in params.items():
        assert torch.equal(parameter, fresh[name]), name


def test_weights_without_moments_give_a_fresh_optimizer(tmp_path):
    saved = saved_dict(write(random_weights(optimizer=False), tmp_path / "ckpt.pt", "nanogpt"))
    assert saved["optimizer"]["state"] == {}
    assert [len(g["params"]) for g in saved["optimizer"]["param_groups"]] == [10, 18]
    assert read(tmp_path / "ckpt.pt").optimizer is None


def test_wrappers_masks_and_half_precision_are_read(ckpt):
    def change(saved: dict) -> None:
        model = {f"_orig_mod.module.{n}": t.bfloat16() for n, t in saved["model"].items()}
        model["_orig_mod.module.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        model["_orig_mod.module.transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        saved["model"] = model

    found, weights = read(rewritten(ckpt, change)), random_weights()
    assert list(found.model) == list(weights.model)
    name = "transformer.h.0.attn.c_attn.bias"  # ends almost as a mask does
    assert torch.equal(found.model[name], weights.model[name].bfloat16().float())


def test_form_before_torch_1_6_is_read(ckpt):
    torch.save(saved_dict(ckpt), ckpt, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(ckpt)
    assert same_tensors(read(ckpt).model, random_weights().model)


def test_views_do_not_drag_their_storage_along(ckpt):
    """nanoGPT's crop_block_size leaves wpe a view of the long one, and saves it so."""

    def crop(saved: dict) -> None:
        saved["model"]["transformer.wpe.weight"] = torch.zeros(100_000, 64)[:16]

    wpe = read(rewritten(ckpt, crop)).model["transformer.wpe.weight"]
    assert wpe.untyped_storage().nbytes() == 16 * 64 * 4


class Payload:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, protocol):
    ckpt, target = tmp_path / "ckpt.pt", tmp_path / "was_here"
    if protocol == "torch":
        torch.save({"model": Payload(target), "model_args": {}}, ckpt)
    else:
        ckpt.write_bytes(pickle.dumps({"model": Payload(target)}, protocol=2))
    with pytest.raises(CheckpointError, match="nothing in it was run") as refused:
        read(ckpt)
    assert "mkdir" in refused.value.found
    assert not target.exists()
    torch.load(ckpt, weights_only=False) if protocol == "torch" else pickle.loads(ckpt.read_bytes())
    assert target.exists()  # the payload is a real one


def _nan(saved: dict) -> None:
    saved["model"]["transformer.h.1.ln_2.weight"][3] = float("nan")


def _inf_moment(saved: dict) -> None:
    saved["optimizer"]["state"][0]["exp_avg_sq"][0, 0] = float("inf")


def _sparse(saved: dict) -> None:
    saved["model"]["transformer.wpe.weight"] = saved["model"]["transformer.wpe.weight"].to_sparse()


def _sparse_moment(saved: dict) -> None:
    saved["optimizer"]["state"][0]["exp_avg"] = saved["optimizer"]["state"][0]["exp_avg"].to_sparse()


def _untied(saved: dict) -> None:
    saved["model"]["lm_head.weight"] = saved["model"]["lm_head.weight"] + 1


DAMAGES = {
    "nan": (_nan, "NaN or infinity", "transformer.h.1.ln_2.weight"),
    "infinite moment": (_inf_moment, "NaN or infinity", "exp_avg_sq.transformer.wte.weight"),
    "sparse": (_sparse, "only dense", "transformer.wpe.weight"),
    "sparse moment": (_sparse_moment, "only dense", "exp_avg.transformer.wte.weight"),
    "untied head": (_untied, "not the token embedding", "lm_head.weight"),
    "missing tensor": (lambda s: s["model"].pop("transformer.ln_f.bias"), "not the model's", "transformer.ln_f.bias"),
    "foreign tensor": (lambda s: s["model"].update(extra=torch.ones(2)), "not the model's", "transformer.extra"),
    "other shape": (lambda s: s["model_args"].update(block_size=8), "another shape", "transformer.wpe.weight"),
    "no size": (lambda s: s["model_args"].update(n_layer="2"), "n_layer is missing or no size", "'2'"),
    "bad heads": (lambda s: s["model_args"].update(n_head=5), "makes no GPT", "n_head = 5"),
    "no weights": (lambda s: s.pop("model"), "not a nanoGPT checkpoint", "iter_num"),
    "model no dict": (lambda s: s.update(model=[1, 2]), "not a nanoGPT checkpoint", "a dict with 'model'"),
    "odd val loss": (lambda s: s.update(best_val_loss="low"), "best_val_loss is no loss", "low"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(ckpt, damage):
    change, what, detail = DAMAGES[damage]
    with pytest.raises(CheckpointError) as refused:
        read(rewritten(ckpt, change))
    assert what in refused.value.what
    assert detail in str(refused.value)
    assert str(ckpt) in refused.value.where


@pytest.mark.parametrize("keep", [3, 40, 2000, -1])
def test_cut_off_file_is_an_error(ckpt, keep):
    ckpt.write_bytes(ckpt.read_bytes()[:keep])
    with pytest.raises(CheckpointError):
        read(ckpt)


needs_nanogpt = pytest.mark.skipif(
    "NANOGPT_DIR" not in os.environ, reason="NANOGPT_DIR names no checkout of karpathy/nanoGPT"
)

RESUME = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from model import GPT, GPTConfig
saved = torch.load(sys.argv[2], map_location="cpu", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
optimizer.load_state_dict(saved["optimizer"])
x = torch.arange(32).view(2, 16)
logits, loss = model(x, x)
before = logits.detach().clone()
loss.backward()
optimizer.step()
saved["model"], saved["optimizer"] = model.state_dict(), optimizer.state_dict()
saved["iter_num"] += 1
torch.save(saved, sys.argv[2])
torch.save(before, sys.argv[3])
"""


@needs_nanogpt
@pytest.mark.parametrize("bias", [True, False])
def test_stock_nanogpt_resumes_and_comes_back(tmp_path, bias):
    weights = random_weights(bias=bias)
    ckpt = write(weights, tmp_path / "ckpt.pt", "nanogpt")
    command = [sys.executable, "-c", RESUME, os.environ["NANOGPT_DIR"], str(ckpt), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    model, x = GPT(weights.model_args), torch.arange(32).view(2, 16)
    model.load_state_dict(weights.model)
    model(x, x, grad_scale=1 / 32)[0].backward()
    with torch.no_grad():
        assert (model.logits(x) - torch.load(tmp_path / "logits.pt")).abs().max() < 1e-5
    found = read(ckpt)
    assert (found.step, found.optimizer_step) == (13, 13)
    assert found.optimizer is not None and weights.optimizer is not None
    for name, parameter in model.named_parameters():
        assert not torch.equal(found.model[name], weights.model[name]), name
        # beta1 = 0.8 came with the checkpoint's groups; each moment must have met its own parameter's gradient
        assert parameter.grad is not None
        expected = 0.8 * weights.optimizer[f"exp_avg.{name}"] + 0.2 * parameter.grad
        assert (found.optimizer[f"exp_avg.{name}"] - expected).abs().max() < 1e-6, name
