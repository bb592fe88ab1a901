"""llm.c's model file: bytes, header, and the loss that llm.c itself computes from it."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from random_weights import random_weights, same_tensors

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.model import GPT
from nanogpt_fast.weights.formats import read, write


def header(path: Path) -> list[int]:
    return np.fromfile(path, "<i4", 256).tolist()


def test_float32_round_trip_keeps_every_bit(tmp_path):
    weights = random_weights(activation="gelu_tanh")
    found = read(write(weights, tmp_path / "m.bin", "llmc"))
    assert found.model_args == weights.model_args
    assert same_tensors(found.model, weights.model)
    again = write(found, tmp_path / "again.bin", "llmc")
    assert again.read_bytes() == (tmp_path / "m.bin").read_bytes()


def test_bfloat16_round_trip_rounds_once(tmp_path):
    weights = random_weights(activation="gelu_tanh")
    found = read(write(weights, tmp_path / "m.bin", "llmc", dtype=torch.bfloat16))
    assert same_tensors(found.model, {n: t.bfloat16().float() for n, t in weights.model.items()})
    again = write(found, tmp_path / "again.bin", "llmc", dtype=torch.bfloat16)
    assert again.read_bytes() == (tmp_path / "m.bin").read_bytes()


@pytest.mark.parametrize(("dtype", "version", "width"), [(torch.float32, 3, 4), (torch.bfloat16, 5, 2)])
def test_header_and_every_tensors_place(tmp_path, dtype, version, width):
    """The payload rebuilt by hand, from llm.c's fill_in_parameter_sizes: stacked over layers, wte padded to 128."""
    weights = random_weights(activation="gelu_tanh")
    path, m = write(weights, tmp_path / "m.bin", "llmc", dtype=dtype), weights.model
    assert header(path) == [20240326, version, 16, 100, 2, 4, 64, 128] + [0] * 248

    def layers(name: str) -> list[torch.Tensor]:
        return [m[f"transformer.h.{i}.{name}"] for i in range(2)]

    expected = [m["transformer.wte.weight"], torch.zeros(28, 64), m["transformer.wpe.weight"]]
    for name in (
        "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
        "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
    ):  # fmt: skip
        expected += layers(name)
    expected += [m["transformer.ln_f.weight"], m["transformer.ln_f.bias"]]
    flat = torch.cat([t.flatten() for t in expected]).to(dtype)
    payload = path.read_bytes()[1024:]
    assert len(payload) == flat.numel() * width
    assert payload == flat.view(torch.uint8).numpy().tobytes()


def test_missing_biases_become_zeros_and_padding_is_cut(tmp_path):
    weights = random_weights(bias=False, vocab_size=50304, n_layer=1)
    path = write(weights, tmp_path / "m.bin", "llmc")
    assert header(path)[3] == 50257 and header(path)[7] == 50304
    assert not np.fromfile(path, "<f4", offset=1024)[50257 * 64 : 50304 * 64].any()
    found = read(path)
    assert found.model_args.bias and found.model_args.vocab_size == 50257
    for name, tensor in found.model.items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        else:
            assert torch.equal(tensor, weights.model[name][: len(tensor)]), name


def test_every_parameter_is_its_own_storage(tmp_path):
    found = read(write(random_weights(), tmp_path / "m.bin", "llmc"))
    for name, tensor in found.model.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (1, 2, "version"),
        (2, 17, "does not have the size"),
        (4, 0, "n_layer is missing or no size"),
        (5, 5, "makes no GPT"),
        (6, -64, "n_embd is missing or no size"),
        (7, 64, "smaller than the vocabulary"),
    ],
)
def test_damaged_header_is_an_error(tmp_path, field, value, message):
    path = write(random_weights(), tmp_path / "m.bin", "llmc")
    with path.open("r+b") as file:
        file.seek(4 * field)
        file.write(int(value).to_bytes(4, "little", signed=True))
    with pytest.raises(CheckpointError, match=message):
        read(path)


@pytest.mark.parametrize("change", [-1, -5000, 4])
def test_cut_off_or_longer_file_is_an_error(tmp_path, change):
    path = write(random_weights(), tmp_path / "m.bin", "llmc")
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(CheckpointError, match="does not have the size"):
        read(path)


def test_header_cut_off(tmp_path):
    path = write(random_weights(), tmp_path / "m.bin", "llmc")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not an llm.c model file"):
        read(path)


def test_nan_is_refused_with_its_name(tmp_path):
    weights = random_weights()
    weights.model["transformer.h.1.attn.c_attn.bias"][7] = float("nan")
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.attn\.c_attn\.bias"):
        read(write(weights, tmp_path / "m.bin", "llmc"))


PROBE = r"""
#define TESTING
#include "train_gpt2.c"
int main(int argc, char **argv) {
    GPT2 model;
    gpt2_build_from_checkpoint(&model, argv[1]);
    int x[32];
    for (int i = 0; i < 32; i++) x[i] = (i * 37) % model.config.vocab_size;
    gpt2_forward(&model, x, x, 2, 16);
    FILE *out = fopen(argv[2], "wb");
    fwrite(model.acts.logits, sizeof(float), 32 * model.config.padded_vocab_size, out);
    fclose(out);
    return 0;
}
"""


@pytest.mark.skipif(
    "LLMC_DIR" not in os.environ or shutil.which("cc") is None,
    reason="LLMC_DIR names no checkout of karpathy/llm.c, or there is no C compiler",
)
@pytest.mark.parametrize("bias", [True, False])
def test_llmc_computes_our_logits(tmp_path, bias):
    weights = random_weights(activation="gelu_tanh", bias=bias)
    write(weights, tmp_path / "m.bin", "llmc")
    (tmp_path / "probe.c").write_text(PROBE)
    build = ["cc", "-O1", "-std=gnu11", "-w", f"-I{os.environ['LLMC_DIR']}", "probe.c", "-o", "probe", "-lm"]
    subprocess.run(build, cwd=tmp_path, check=True)
    subprocess.run(["./probe", "m.bin", "logits.bin"], cwd=tmp_path, check=True, capture_output=True)
    theirs = torch.from_numpy(np.fromfile(tmp_path / "logits.bin", "<f4")).view(2, 16, 128)
    model = GPT(weights.model_args)
    model.load_state_dict(weights.model)
    with torch.no_grad():
        expected = model.logits((torch.arange(32) * 37 % 100).view(2, 16))
    assert expected.abs().max() > 1
    assert (theirs[..., :100] - expected).abs().max() < 1e-5
