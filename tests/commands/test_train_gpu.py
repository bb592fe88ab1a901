"""The trainer on a GPU, on the reference ops: what only CUDA can show."""

from pathlib import Path

import pytest
import torch
from tiny_run import metrics, train, write_dataset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_learns_on_cuda(tmp_path: Path, dtype: str):
    """Pinned uint16 batches, main_grad accumulated through addmm's out_dtype, the fused update, the loss scale."""
    write_dataset(tmp_path)
    settings = dict(max_iters=150, eval_interval=150, gradient_accumulation_steps=2, bias=True, dtype=dtype)
    train(tmp_path, device="cpu", **(settings | dict(dtype="float32")))
    on_cpu = metrics(tmp_path, "train", "loss")
    train(tmp_path, device="cuda", **settings)
    on_gpu = metrics(tmp_path, "train", "loss")
    first = 1e-5 if dtype == "float32" else 2e-2
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=first)
    assert metrics(tmp_path, "eval", "val_loss")[150] < 2.0


def test_resume_on_cuda_goes_on(tmp_path: Path):
    write_dataset(tmp_path)
    train(tmp_path, device="cuda", dtype="bfloat16", dropout=0.1, max_iters=100, eval_interval=100)
    whole = metrics(tmp_path, "train", "loss")
    train(tmp_path, device="cuda", dtype="bfloat16", dropout=0.1, max_iters=100, eval_interval=50)
    train(tmp_path, device="cuda", dtype="bfloat16", dropout=0.1, max_iters=100, eval_interval=50, init_from="resume")
    assert metrics(tmp_path, "train", "loss")[100] == pytest.approx(whole[100], abs=0.2)
