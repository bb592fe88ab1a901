"""--recompute: backward rebuilds what forward did not keep, and no loss and no gradient changes by a bit."""

import pytest
import torch

from nanogpt_fast.model import GPT
from nanogpt_fast.ops import REFERENCE, Ops
from nanogpt_fast.optim import FlatParameters
from nanogpt_fast.settings.config import GPTConfig


def losses_and_gradient(
    recompute: str, dtype: torch.dtype, *, ops: Ops = REFERENCE, residual: torch.dtype | None = None,
    dropout: float = 0.1, activation: str = "gelu", documents: bool = True,
    compiled: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Two micro-batches, a dropout counter that moves between them, documents in the first: one vector."""
    generator = torch.Generator().manual_seed(0)
    shape = GPTConfig(
        n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=33, dropout=dropout, activation=activation
    )
    model = GPT(shape, ops, residual, recompute)
    model.init_weights(generator)
    flat = FlatParameters(model.train(), dtype, torch.device("cpu"))
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    doc_ids = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]] * 2) if documents and not compiled else None
    seed, values = torch.tensor([7]), []
    for micro in torch.randint(33, (2, 2, 9), generator=generator):
        loss, nll = forward(micro[:, :-1], micro[:, 1:], torch.tensor(0.1), seed, doc_ids)
        loss.backward()
        values += [loss.detach().reshape(1), nll]
        seed += 1
        doc_ids = None
    return torch.cat([*values, flat.grad])


@pytest.mark.parametrize("recompute", ["mlp", "block"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    "dtype, residual",
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, None)],
    ids=str,
)
def test_the_bits_stay(dtype: torch.dtype, residual: torch.dtype | None, activation: str, recompute: str):
    want, got = (losses_and_gradient(r, dtype, residual=residual, activation=activation) for r in ("none", recompute))
    assert want.isfinite().all() and want[-1000:].any() and torch.equal(want, got)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the interpreter; on a GPU test_triton_model.py")
def test_the_bits_stay_with_the_triton_ops():
    """Of a block; of the MLP alone tests/ops/test_mlp.py holds it."""
    from nanogpt_fast.ops import TRITON

    want, got = (losses_and_gradient(r, torch.float32, ops=TRITON) for r in ("none", "block"))
    assert want[-1000:].any() and torch.equal(want, got)


@pytest.mark.slow
def test_a_compiled_model_rebuilds_blocks_too():
    got = losses_and_gradient("block", torch.float32, compiled=True)
    want = losses_and_gradient("none", torch.float32, documents=False)
    assert (got - want).norm() <= 1e-6 * want.norm()


def kept_bytes(recompute: str, n_layer: int) -> int:
    """Allocated and not freed by a forward whose loss lives."""
    shape = GPTConfig(n_layer=n_layer, n_head=2, n_embd=64, block_size=32, vocab_size=33, bias=False)
    model = GPT(shape, REFERENCE, None, recompute)
    model.init_weights(torch.Generator().manual_seed(0))
    flat = FlatParameters(model.train(), torch.float32, torch.device("cpu"))
    ids = torch.zeros(4, 32, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True) as profiler:
        _loss, _ = model(ids, ids)
    assert flat.grad.abs().sum() == 0, "no backward yet"
    return sum(e.self_device_memory_usage + e.self_cpu_memory_usage for e in profiler.key_averages())


def test_a_layer_keeps_less_by_what_is_rebuilt():
    """In float32, C = 64, 128 tokens: 16 C of a layer (two streams, two norms' outputs, qkv, o, pre and act) with the
    norms' mean and rstd and attention's lse; without act 4 C less; of a rebuilt block its stream alone."""
    tokens, C, statistics = 4 * 32, 64, 4 * (2 * 2 + 2)
    a_layer = {r: kept_bytes(r, 3) - kept_bytes(r, 2) for r in ("none", "mlp", "block")}
    assert a_layer == {
        "none": tokens * (4 * 16 * C + statistics),
        "mlp": tokens * (4 * 12 * C + statistics),
        "block": tokens * 4 * C,
    }


def test_nothing_is_rebuilt_where_nothing_is_differentiated(monkeypatch: pytest.MonkeyPatch):
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=5), recompute="block")
    model.init_weights(torch.Generator().manual_seed(0))
    monkeypatch.setattr(GPT, "_rebuilt_block", lambda *_: pytest.fail("rebuilds"))
    with torch.no_grad():
        assert model.logits(torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()
