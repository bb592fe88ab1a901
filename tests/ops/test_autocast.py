"""torch.autocast around the Triton ops changes nothing: they compute in their operands' dtypes."""

import pytest
import torch
from kernel_case import DEVICE

from nanogpt_fast.model import GPT
from nanogpt_fast.ops import TRITON
from nanogpt_fast.settings.config import GPTConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_under_autocast(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=67, bias=True), TRITON)
    model.init_weights(generator)
    model = model.to(DEVICE)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.to(dtype)
    tokens = torch.randint(67, (1, 9), generator=generator).to(DEVICE)
    results = []
    for enabled in (False, True):
        with torch.autocast(DEVICE.type, torch.float16 if dtype == torch.bfloat16 else torch.bfloat16, enabled=enabled):
            loss, nll = model(tokens[:, :-1], tokens[:, 1:], 1.0)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            cached = model.generate(tokens[:, :2], 2, temperature=0.0)
        results.append([loss, nll, cached, *grads])
    for plain, under in zip(*results):
        assert plain.dtype == under.dtype and torch.equal(plain, under)
