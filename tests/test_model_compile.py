"""torch.compile takes the model whole: no graph break, the same loss and gradients, main_grad accumulation included."""

import pytest
import torch

from nanogpt_fast.model import GPT
from nanogpt_fast.optim import FlatParameters
from nanogpt_fast.settings.config import GPTConfig


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_compiled_equals_eager(dtype: torch.dtype):
    """The aot_eager backend traces and differentiates as inductor does, without its half-minute of C++."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=65, bias=True, dropout=0.1))
    model.init_weights(generator)
    flat = FlatParameters(model.train(), dtype, torch.device("cpu"))
    tokens = torch.randint(65, (2, 3, 17), generator=generator)
    grads = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        flat.grad.zero_()
        for i, micro in enumerate(tokens):
            loss, _ = forward(micro[:, :-1], micro[:, 1:], 0.1, torch.tensor([i]))
            loss.backward()
        grads.append(flat.grad.clone())
    # compiled, torch may keep float32 between bfloat16 ops
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert grads[0].norm() > 0
    assert (grads[0] - grads[1]).norm() <= tolerance * grads[0].norm()
