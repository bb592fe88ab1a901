"""Named ranges: nothing while they are off, layer and op while they are on, and never another loss."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nanogpt_fast.distributed import World
from nanogpt_fast.errors import ConfigError
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import REFERENCE
from nanogpt_fast.optim import AdamW, FlatParameters
from nanogpt_fast.run import ranges
from nanogpt_fast.settings.config import GPTConfig, OptimConfig
from nanogpt_fast.step import TrainStep

SHAPE = GPTConfig(block_size=8, vocab_size=29, n_layer=2, n_head=2, n_embd=16, dropout=0.1, bias=True)


def training_step() -> TrainStep:
    model = GPT(SHAPE).train()
    model.init_weights(torch.Generator().manual_seed(1))
    flat = FlatParameters(model, torch.float32, torch.device("cpu"))
    optimizer = AdamW(flat, OptimConfig(), REFERENCE)
    optimizer.set_lr(1e-3)
    return TrainStep(model, optimizer, World(), seed=3)


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(29, (2, 4, 9), generator=generator) for _ in range(count)]


def recorded(names: list[str]) -> ranges.Opener:
    @contextmanager
    def opener(name: str) -> Iterator[None]:
        names.append(name)
        yield

    return opener


def test_a_span_is_nothing_while_ranges_are_off():
    assert ranges.span("a") is ranges.span("b")  # one object, made once
    with ranges.on(recorded(names := [])), ranges.span("a"), ranges.span("b"):
        pass
    with ranges.span("c"):
        pass
    assert names == ["a", "b"]


def test_ranges_are_off_again_after_an_error():
    step = training_step()
    with pytest.raises(ZeroDivisionError), ranges.on(recorded([]), step.model):
        raise ZeroDivisionError
    assert step.model.ops is REFERENCE and ranges.span("a") is ranges.span("b")


def test_a_step_names_its_parts_its_layers_and_its_ops():
    step = training_step()
    with ranges.on(recorded(names := []), step.model):
        step(batches(1)[0], 0)
    layer = ["qkv_attention", "linear", "add_norm", "mlp", "add_norm"]
    forward = ["forward", "embedding", "norm", *(f"h{i}.{op}" for i in (0, 1) for op in layer), "linear_cross_entropy"]
    assert names == ["step", *[*forward, "backward"] * 2, "gradient norm", "update"]


def test_losses_are_the_same_bits_with_ranges():
    plain, ranged = training_step(), training_step()
    for i, batch in enumerate(batches()):
        expected = plain(batch, i)
        with ranges.on(model=ranged.model), profile(activities=[ProfilerActivity.CPU]):
            found = ranged(batch, i)
        assert torch.equal(found.loss, expected.loss) and torch.equal(found.grad_norm, expected.grad_norm)
    assert torch.equal(plain.optimizer.flat.master, ranged.optimizer.flat.master)


def test_a_compiled_model_keeps_its_ops_and_is_not_compiled_again():
    """The backend "eager" captures the graph and needs no compiler."""
    step = training_step()
    graphs = []
    step.model.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    first = step(batches(1)[0], 0)
    captured = len(graphs)
    assert captured
    with ranges.on(recorded(names := []), step.model):
        assert step.model.ops is REFERENCE
        step(batches(1)[0], 1)
    assert len(graphs) == captured and "forward" in names and not any("mlp" in name for name in names)
    assert torch.equal(first.loss, training_step()(batches(1)[0], 0).loss)


def test_nvtx_comes_from_the_package_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    package = ModuleType("nvtx")
    package.annotate = recorded(names := [])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvtx", package)
    with ranges.on(ranges.nvtx_opener()), ranges.span("step"):
        pass
    assert names == ["step"]
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ConfigError, match="pip install nvtx"):
        ranges.nvtx_opener()
