"""The captured step on a GPU: bit for bit the eager one, and a host that does not wait for it."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from nanogpt_fast.distributed import World
from nanogpt_fast.graphs import Graphs, Mode
from nanogpt_fast.guards import LossGuard
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import REFERENCE, Ops
from nanogpt_fast.optim import AdamW, FlatParameters
from nanogpt_fast.scoring import Forward, score
from nanogpt_fast.settings.config import GPTConfig, OptimConfig
from nanogpt_fast.step import TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SHAPE = GPTConfig(block_size=128, vocab_size=1024, n_layer=2, n_head=4, n_embd=256, bias=True, dropout=0.1)


def ops_named(name: str) -> Ops:
    from nanogpt_fast.ops import TRITON

    return {"reference": REFERENCE, "triton": TRITON}[name]


def build(
    mode: Mode,
    ops: Ops,
    dtype: torch.dtype,
    shape: GPTConfig = SHAPE,
    world: World | None = None,
    sharded: bool = False,
) -> TrainStep:
    device = torch.device("cuda", 0)
    model, world = GPT(shape, ops), world or World(device=device)
    model.init_weights(torch.Generator().manual_seed(0))
    flat = FlatParameters(model.train(), dtype, device, world, sharded=sharded, bucket_mb=1.0)
    optimizer = AdamW(flat, OptimConfig(), ops, dtype == torch.float16)
    guard = LossGuard(6.0, 16, device)
    return TrainStep(model, optimizer, world, 1337, graphs=Graphs(device, mode), guard=guard)


def batch(iteration: int, accumulation: int = 2, size: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(iteration)
    shape = (accumulation, size, SHAPE.block_size + 1)
    return torch.randint(SHAPE.vocab_size, shape, generator=generator).to(torch.uint16).pin_memory()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_graph_equals_eager_for_a_hundred_steps(dtype: torch.dtype):
    """With dropout, a rate that changes, and a batch that grows by a micro-batch half way: bit for bit."""
    eager, captured = (build(mode, ops_named("triton"), dtype) for mode in ("off", "on"))
    for iteration in range(100):
        tokens, lr = batch(iteration, 2 if iteration < 50 else 3), 1e-3 / (1 + iteration)
        for step in (eager, captured):
            step.optimizer.set_lr(lr)
        ours, theirs = captured(tokens, iteration), eager(tokens, iteration)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)  # float16 may refuse a step
    assert torch.equal(eager.optimizer.flat.master, captured.optimizer.flat.master)
    assert captured.graphs.active


class OneRank(World):
    """A rank that is the only one, and does what several do."""

    @property
    def alone(self) -> bool:
        return False


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """NCCL wants a GPU a rank: one GPU has one."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("nccl") / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield OneRank(0, 1, torch.device("cuda", 0))
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "zero1"])
def test_nccls_collectives_are_captured(one_rank: World, sharded: bool):
    """Buckets summed within the backward pass, parameters gathered within the forward: bit for bit the eager step."""
    ops = ops_named("triton")
    eager, captured = (build(mode, ops, torch.bfloat16, world=one_rank, sharded=sharded) for mode in ("off", "on"))
    alone = build("on", ops, torch.bfloat16)
    assert len(captured.optimizer.flat.buckets) > 2 and captured.exchange.sharded == sharded
    for iteration in range(20):
        for step in (eager, captured, alone):
            step.optimizer.set_lr(1e-3)
        ours, theirs, one = (step(batch(iteration, 3), iteration) for step in (captured, eager, alone))
        assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.grad_norm, theirs.grad_norm)
        torch.testing.assert_close(ours.loss, one.loss, rtol=1e-3, atol=0)  # its norm is summed in another order
    assert captured.graphs.active and torch.equal(eager.optimizer.flat.master, captured.optimizer.flat.master)


def test_the_reference_ops_can_be_captured():
    """torch's own backward of attention and embedding adds atomically: near the eager losses, not their bits."""
    eager, captured = (build(mode, REFERENCE, torch.bfloat16) for mode in ("off", "on"))
    for iteration in range(10):
        for step in (eager, captured):
            step.optimizer.set_lr(1e-3)
        ours, theirs = captured(batch(iteration), iteration), eager(batch(iteration), iteration)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-3, atol=0)
    assert captured.graphs.active


def test_a_refused_step_is_refused_in_the_graph_too():
    step = build("on", ops_named("triton"), torch.bfloat16)
    step.optimizer.set_lr(1e-3)
    for iteration in range(6):
        step(batch(iteration), iteration)
    before = step.optimizer.flat.master.clone()
    step.optimizer.flat.grad[5] = float("nan")
    step(batch(6), 6)
    assert step.read().get().refused and torch.equal(before, step.optimizer.flat.master)
    step(batch(7), 7)
    assert not step.read().get().refused and not torch.equal(before, step.optimizer.flat.master)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_an_evaluation_replayed_is_the_same(name: str):
    """Batches of two shapes, in turn; then again after the parameters have changed."""
    step = build("off", ops_named(name), torch.bfloat16)
    model, device = step.model, torch.device("cuda", 0)
    forward = Forward(model, None, Graphs(device, "on"))
    for _ in range(2):
        batches = [(t[0, :, :-1].long(), t[0, :, 1:].long()) for t in (batch(i, size=3 + i % 2) for i in range(12))]
        assert score(model, batches, forward=forward) == score(model, batches)
        step.optimizer.set_lr(1e-2)
        step(batch(0), 0)


def test_the_host_does_not_wait():
    """A step is given to the GPU while the one before is still at work: torch.cuda says so of each synchronisation."""
    step = build("on", ops_named("triton"), torch.bfloat16, dataclasses.replace(SHAPE, n_layer=4))
    tokens = batch(0)
    for iteration in range(6):
        step(tokens, iteration)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for iteration in range(6, 12):
            step.optimizer.set_lr(1e-3 / iteration)
            step(tokens, iteration)
            reading = step.read()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reading.get().bad_steps == 0
