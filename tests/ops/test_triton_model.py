"""The whole model on the Triton ops against the reference in float64: loss, every gradient, and training."""

import copy
from dataclasses import replace
from typing import Any

import kernel_case
import pytest
import torch
from kernel_case import DEVICE
from nanogpt_kernels import launch
from parity import assert_parity
from torch import Tensor

from nanogpt_fast.distributed import World
from nanogpt_fast.memory import CUDA_BLOCK, Plan, peak
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import REFERENCE, TRITON, Ops
from nanogpt_fast.optim import AdamW, FlatParameters
from nanogpt_fast.settings.config import GPTConfig, OptimConfig
from nanogpt_fast.step import TrainStep

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=40, block_size=20, vocab_size=67)  # D = 20: no power of two anywhere


OWN_HEAD = {"bias": False, "norm_bias": True, "tie_word_embeddings": False}


def build(
    ops: Ops, dtype: torch.dtype, residual: torch.dtype | None = None, **changes: Any
) -> tuple[GPT, FlatParameters]:
    """(model in training mode, its flat parameters); one initialisation for all, the biases not zero."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(replace(SHAPE, **changes), ops, residual)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model = model.train()
    return model, FlatParameters(model, dtype, DEVICE)


def tokens(*shape: int) -> Tensor:
    return torch.randint(67, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def loss_and_gradients(ops: Ops, dtype: torch.dtype, residual: torch.dtype | None, **changes: Any) -> dict[str, Tensor]:
    model, flat = build(ops, dtype, residual, **changes)
    seed = torch.tensor([5], device=DEVICE)
    for micro in tokens(2, 2, 18):  # two micro-batches: main_grad accumulates
        loss, nll = model(micro[:, :-1], micro[:, 1:], torch.tensor(1 / 34, device=DEVICE), seed)
        loss.backward()
        seed += 1
    return {"loss": loss.detach(), "nll": nll} | {n: t.clone() for n, t in flat.named(flat.grad).items()}


def reference64(dtype: torch.dtype, **changes: Any) -> dict[str, Tensor]:
    """The same from float64 ops on the weights as `dtype` holds them."""
    model, flat = build(REFERENCE, dtype, **changes)
    exact = GPT(model.config, REFERENCE).to(DEVICE, torch.float64).train()
    exact.load_state_dict({n: p.double() for n, p in model.state_dict().items()})
    seed = torch.tensor([5], device=DEVICE)
    for micro in tokens(2, 2, 18):
        loss, nll = exact(micro[:, :-1], micro[:, 1:], 1 / 34, seed)
        loss.backward()
        seed += 1
    grads = {n: p.grad for n, p in exact.named_parameters()}
    return {"loss": loss.detach(), "nll": nll} | grads  # type: ignore[return-value]


DTYPES = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, None)]
CASES = [(*dtypes, changes) for dtypes in DTYPES for changes in ({"bias": False}, {"dropout": 0.2})]
CASES += [(*dtypes, OWN_HEAD) for dtypes in DTYPES[:2]]


@pytest.mark.parametrize("dtype, residual, changes", CASES, ids=str)
def test_loss_and_every_gradient(dtype: torch.dtype, residual: torch.dtype | None, changes: dict[str, Any]):
    """By the two-reference rule, whose same-dtype side is the model on the reference ops."""
    ours = loss_and_gradients(TRITON, dtype, residual, **changes)
    theirs = loss_and_gradients(REFERENCE, dtype, residual, **changes)
    exact = reference64(dtype, **changes)
    assert set(ours) == set(exact)
    # the loss is one number, whose error in 16 bits is luck: hold it to the nll, and the nll to the rule
    torch.testing.assert_close(ours.pop("loss"), ours["nll"].sum() / 34, rtol=1e-6, atol=0)
    for name in ours:
        assert_parity(ours[name], theirs[name], exact[name].double(), tiny=1e-6, what=name)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_ten_steps_stay_together(dtype: torch.dtype):
    """Training on each set of ops: the losses agree to what the dtype leaves after ten updates, and they fall."""
    losses = []
    for ops in (TRITON, REFERENCE):
        model, flat = build(ops, dtype, bias=True, dropout=0.1, n_layer=1)
        optimizer = AdamW(flat, OptimConfig(learning_rate=3e-3), ops)
        step = TrainStep(model, optimizer, World(device=DEVICE), seed=3)
        batch, curve = tokens(1, 2, 13), []
        for iteration in range(10):
            optimizer.set_lr(3e-3)
            curve.append(step(batch, iteration).loss.item())
        losses.append(torch.tensor(curve))
    ours, theirs = losses
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    assert (ours - theirs).abs().max() < tolerance
    assert ours[-1] < ours[0] - 1.0
    assert not torch.equal(ours, theirs), "both curves come from the same ops"


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("main_grad", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_torch_compile_takes_the_model_whole(main_grad: bool, backend: str):
    """fullgraph: no graph break; the gradients of the compiled model are the eager ones."""
    model, flat = build(TRITON, torch.float32, bias=True, dropout=0.1)
    if not main_grad:
        for parameter in model.parameters():
            del parameter.main_grad  # type: ignore[attr-defined]
    grads = []
    for forward in (model, torch.compile(model, backend=backend, fullgraph=True)):
        flat.grad.zero_()
        for parameter in model.parameters():
            parameter.grad = None
        for i, micro in enumerate(tokens(2, 2, 9)):
            seed = torch.tensor([i], device=DEVICE)
            loss, _ = forward(micro[:, :-1], micro[:, 1:], 0.1, seed)
            loss.backward()
        grads.append(
            {n: p.grad for n, p in model.named_parameters()} if not main_grad else flat.named(flat.grad.clone())
        )
    for name, eager in grads[0].items():
        torch.testing.assert_close(grads[1][name], eager, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("recompute, elements", [("none", 14), ("mlp", 10), ("block", 0)])
@pytest.mark.parametrize("residual", [None, torch.float32])
def test_a_layer_keeps(residual: torch.dtype | None, recompute: str, elements: int):
    """By prediction, to the byte. In elements of C: two norms' outputs, packed qkv (3), o, the MLP's pre and act (4
    each), and the residual stream twice; mean and rstd of two norms, attention's lse. A rebuilt block: its stream."""
    plan = Plan(shape=SHAPE, ops=TRITON, dtype=torch.bfloat16, residual_dtype=residual, recompute=recompute,
                batch_size=2, micro_batches=1, device_type="cuda", capability=90)  # fmt: skip
    kept = [peak(replace(plan, shape=replace(SHAPE, n_layer=n, n_embd=512, n_head=8)))["activations"] for n in (4, 5)]
    streams, statistics = (1, 0) if recompute == "block" else (2, 4 * (2 * 2 + 8))
    a_token = 512 * (streams * (4 if residual else 2) + 2 * elements) + statistics
    assert kept[1] - kept[0] == pytest.approx(2 * SHAPE.block_size * a_token, abs=12 * CUDA_BLOCK)


def test_guarded_memory_and_determinism():
    """One micro-batch twice in poisoned memory: the same bits, and nothing written past an end."""
    results = []
    for _ in range(2):
        model, flat = build(TRITON, torch.bfloat16, bias=True, dropout=0.1)
        micro = tokens(2, 12)
        with kernel_case.guarded():
            loss, _ = model(micro[:, :-1], micro[:, 1:], 0.1, torch.tensor([1], device=DEVICE))
            loss.backward()
        results.append(flat.grad.clone())
    assert torch.isfinite(results[0]).all() and torch.equal(*results)


def three_steps(dtype: torch.dtype, captured: bool) -> dict[str, Tensor]:
    """One step to warm up, then three on other batches, eager or as replays of one graph: losses and parameters."""
    model, flat = build(TRITON, dtype, bias=True, dropout=0.1)
    optimizer = AdamW(flat, OptimConfig(), TRITON)
    optimizer.set_lr(3e-3)
    batches, seed, losses = tokens(4, 2, 13), torch.zeros(1, dtype=torch.int64, device=DEVICE), []
    micro, loss = batches[0].clone(), torch.zeros((), device=DEVICE)

    def step() -> None:
        value, _ = model(micro[:, :-1], micro[:, 1:], 1 / 24, seed)
        value.backward()
        optimizer.step()
        loss.copy_(value.detach())

    step()
    run = step
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # on a stream of its own
            step()
        run = graph.replay
    for batch in batches[1:]:
        micro.copy_(batch)
        seed += 1
        run()
        losses.append(loss.clone())
    return {"losses": torch.stack(losses), "master": flat.master, "params": flat.params}


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA GPU: graphs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_replays_of_a_captured_step_give_the_eager_bits(dtype: torch.dtype):
    """Forward, backward, norm and update in one CUDA graph: no op waits for the host or allocates by the data."""
    with launch.override("attention_bwd", choices=dict(atomic=False)):
        eager, captured = three_steps(dtype, captured=False), three_steps(dtype, captured=True)
    assert torch.isfinite(eager["losses"]).all() and len(set(eager["losses"].tolist())) == 3
    for name, value in eager.items():
        assert torch.equal(value, captured[name]), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_operands_on_another_device_than_the_current_one():
    """Kernels go where their operands are."""
    model, _ = build(TRITON, torch.float32, bias=True, dropout=0.1, n_layer=1)
    losses = []
    for device in ("cuda:0", "cuda:1"):
        there, micro = copy.deepcopy(model).to(device), tokens(2, 13).to(device)
        seed = torch.zeros(1, dtype=torch.int64, device=device)
        with torch.no_grad():
            losses.append(there(micro[:, :-1], micro[:, 1:], 1 / 24, seed)[0])
    assert losses[0].item() == losses[1].item()
