"""Flat parameters, decay segments, the loss scale, and optimizer state."""

import copy
import dataclasses
import math
import re

import pytest
import torch
from torch import nn

from nanogpt_fast.memory import Unheard
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import LOSS_SCALE, LR, REFERENCE, STEP
from nanogpt_fast.optim import ALIGNMENT, AdamW, FlatParameters
from nanogpt_fast.settings.config import GPTConfig, OptimConfig

CONFIG = GPTConfig(block_size=8, vocab_size=37, n_layer=2, n_head=2, n_embd=12, bias=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def flat_model(dtype: torch.dtype = torch.float32, config: GPTConfig = CONFIG) -> tuple[GPT, FlatParameters]:
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model, FlatParameters(model, dtype, torch.device("cpu"))


def adamw(scale_loss: bool = False, dtype: torch.dtype = torch.float32, **changes: float) -> tuple[GPT, AdamW]:
    model, flat = flat_model(dtype)
    return model, AdamW(flat, OptimConfig(**changes), REFERENCE, scale_loss)  # type: ignore[arg-type]


def fill_gradient(optimizer: AdamW, seed: int) -> None:
    """Random where parameters are, zero in the gaps, as a backward leaves it; loss scale in."""
    generator = torch.Generator().manual_seed(seed)
    for view in optimizer.flat.named(optimizer.flat.grad).values():
        view.copy_(torch.randn(view.shape, generator=generator) * optimizer.loss_scale)


# ---- layout ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"tie_word_embeddings": False}], ids=str)
def test_layout(dtype: torch.dtype, changes: dict[str, bool]):
    config = dataclasses.replace(CONFIG, **changes)
    model, flat = flat_model(dtype, config)
    assert list(flat.slices) == list(config.parameter_shapes())
    assert [start * 2 % 256 for start, _ in flat.slices.values()] == [0] * len(flat.slices)
    matrices, vectors = ([n for n, s in flat.shapes.items() if (len(s) > 1) == wanted] for wanted in (True, False))
    spans = [flat.slices[name] for name in [*matrices, *vectors]]
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:])), "overlap, or not in order"
    length = len(flat.master)
    assert length % ALIGNMENT == 0 and 0 <= length - spans[-1][1] < ALIGNMENT
    assert flat.vectors == slice(flat.slices[vectors[0]][0], length)
    assert len(flat.grad) == len(flat.params) == length
    assert flat.master.dtype == flat.grad.dtype == torch.float32 and flat.params.dtype == dtype
    assert (flat.params is flat.master) == (dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_are_views(dtype: torch.dtype):
    """Matrices of params in the compute dtype, vectors of the float32 master; all share memory with the buffers."""
    model, flat = flat_model(dtype)
    plain = GPT(CONFIG)
    plain.init_weights(torch.Generator().manual_seed(0))
    for (name, parameter), original in zip(model.named_parameters(), plain.parameters()):
        buffer = flat.params if parameter.dim() > 1 else flat.master
        assert parameter.dtype == buffer.dtype
        assert parameter.data_ptr() == buffer.data_ptr() + flat.slices[name][0] * buffer.element_size()
        assert torch.equal(parameter, original.to(parameter.dtype)), name
        assert torch.equal(flat.view(flat.master, name), original), name
        main_grad = parameter.main_grad  # type: ignore[attr-defined]
        assert main_grad.shape == parameter.shape and main_grad.dtype == torch.float32
        assert main_grad.data_ptr() == flat.grad.data_ptr() + flat.slices[name][0] * 4
        assert parameter.grad is (main_grad if parameter.dtype == torch.float32 else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_lands_in_the_flat_gradient(dtype: torch.dtype):
    """No parameter is missed, nothing is written between them, and no .grad is replaced by a tensor of its own."""
    model, flat = flat_model(dtype)
    idx = torch.arange(16).view(2, 8)
    model.train()(idx, idx + 1)[0].backward()
    used = torch.zeros(len(flat.grad), dtype=torch.bool)
    for name, view in flat.named(flat.grad).items():
        assert (view != 0).any(), f"{name} got no gradient"
        used[slice(*flat.slices[name])] = True
    assert (flat.grad[~used] == 0).all()
    for parameter in model.parameters():
        main_grad = parameter.main_grad  # type: ignore[attr-defined]
        assert parameter.grad is None or parameter.grad.data_ptr() == main_grad.data_ptr()


# ---- buckets and shares ----


def test_buckets_are_whole_blocks_joined_from_the_last():
    """Between them and the vectors, every element of the buffers is in one."""
    config = dataclasses.replace(CONFIG, n_layer=5)
    block = 4 * sum(math.prod(s) for n, s in config.parameter_shapes().items() if ".h.0." in n and len(s) > 1) / 1e6
    for size, firsts in ((0.5, [-1, 0, 1, 2, 3, 4]), (1.5, [-1, 0, 1, 3]), (2.0, [-1, 0, 1, 3]), (99.0, [-1, 0])):
        flat = FlatParameters(GPT(config), torch.float32, torch.device("cpu"), bucket_mb=size * block)
        assert [bucket.first for bucket in flat.buckets] == firsts
        bounds = [0, *(x for bucket in flat.buckets for x in (bucket.start, bucket.end)), flat.vectors.start]
        assert bounds[::2] == bounds[1::2], "no gap"
        for name, shape in flat.shapes.items():
            (start, end), place = flat.slices[name], re.search(r"\.h\.(\d+)\.", name)
            (bucket,) = [b for b in flat.buckets if b.start <= start and end <= b.end] or [None]
            assert (bucket is None) == (len(shape) == 1), name
            if bucket:
                assert (bucket.first == -1) == (place is None) and (not place or bucket.first <= int(place[1])), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_shares_are_the_whole_once(ranks: int, dtype: torch.dtype):
    """Every rank's master, and moments that are loaded into it, together are one process's; vectors are on each, and
    of a frozen one everything."""
    _, whole = adamw(dtype=dtype)
    flat, generator = whole.flat, torch.Generator().manual_seed(1)
    saved, numbers = whole.state_dict()
    saved = {name: torch.randn(t.shape, generator=generator) for name, t in saved.items()}
    names, held = list(flat.slices), 0
    found = {name: torch.zeros(math.prod(flat.shapes[name])) for name in names}
    for rank in range(ranks):
        model = GPT(CONFIG)
        model.init_weights(torch.Generator().manual_seed(0))
        world = Unheard(rank, ranks)
        ours = FlatParameters(model, dtype, world.device, world, sharded=True, bucket_mb=1e-3)
        optimizer = AdamW(ours, OptimConfig(), REFERENCE)
        optimizer.load_state_dict(saved, numbers)
        assert ours.params is not ours.master and len(optimizer.m) == len(optimizer.v) == len(ours.master)
        held += len(ours.master) - (ours.vectors.stop - ours.vectors.start)
        assert all((bucket.end - bucket.start) % (ranks * ALIGNMENT) == 0 for bucket in ours.buckets)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.float(), flat.view(flat.master, name).to(parameter.dtype).float()), name
            (start, end), moment = ours.slices[name], saved[f"exp_avg.{name}"].flatten()
            for piece in ours.pieces:
                low, high = max(start, piece.flat.start), min(end, piece.flat.stop)
                if low < high:
                    at = slice(piece.held.start + low - piece.flat.start, piece.held.start + high - piece.flat.start)
                    assert torch.equal(optimizer.m[at], moment[low - start : high - start]), name
                    found[name][low - start : high - start] = ours.master[at]
            if parameter.dim() == 1:
                assert parameter.untyped_storage().data_ptr() == ours.master.untyped_storage().data_ptr()
    assert held == ours.vectors.start
    model.init_weights(torch.Generator().manual_seed(0))
    alone = FlatParameters(model, dtype, world.device, world, sharded=True, frozen=True)
    assert not alone.sharded, "an evaluation gathers nothing"
    assert all(
        torch.equal(p.float(), flat.view(flat.master, n).to(p.dtype).float()) for n, p in model.named_parameters()
    )
    for name in names:
        assert torch.equal(found[name].view(flat.shapes[name]), flat.view(flat.master, name)), name


# ---- decay ----


@pytest.mark.parametrize("bias", [True, False])
def test_decay_is_nanogpts_rule(bias: bool):
    """Runs cover [0, N) without gap or overlap; tensors of two and more dimensions decay, the others do not."""
    model, flat = flat_model(config=dataclasses.replace(CONFIG, bias=bias))
    runs = flat.decay_segments(0.1)
    assert runs[0][0] == 0 and runs[-1][1] == len(flat.master)
    assert all(a[1] == b[0] and a[2] != b[2] for a, b in zip(runs, runs[1:]))
    decay = torch.cat([torch.full((end - start,), d) for start, end, d in runs])
    for name, parameter in model.named_parameters():
        assert (flat.view(decay, name) == (0.1 if parameter.dim() >= 2 else 0.0)).all(), name


def test_no_decay_is_one_segment():
    _, flat = flat_model()
    assert flat.decay_segments(0.0) == [(0, len(flat.master), 0.0)]


# ---- steps ----


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_steps_equal_torch_on_named_parameters(grad_clip: float):
    """nanoGPT's two groups and torch's clipping, parameter by parameter, over a hundred steps."""
    model, ours = adamw(grad_clip=grad_clip, weight_decay=0.2)
    other = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    groups = [
        {"params": [p for p in other if p.dim() >= 2], "weight_decay": 0.2},
        {"params": [p for p in other if p.dim() < 2], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), foreach=False, fused=False)
    ours.set_lr(1e-3)
    for seed in range(100):
        fill_gradient(ours, seed)
        for p, g in zip(other, ours.flat.named(ours.flat.grad).values()):
            p.grad = g.clone()
        want = torch.nn.utils.get_total_norm([p.grad for p in other if p.grad is not None])
        if grad_clip:
            nn.utils.clip_grad_norm_(other, grad_clip)
        theirs.step()
        torch.testing.assert_close(ours.step().float(), want)
        assert (ours.flat.grad == 0).all(), "the step zeroes the gradient"
    for got, want in zip(model.parameters(), other):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_bfloat16_parameters_follow_the_master():
    model, optimizer = adamw(dtype=torch.bfloat16)
    optimizer.set_lr(1e-2)
    fill_gradient(optimizer, 0)
    optimizer.step()
    flat = optimizer.flat
    assert torch.equal(flat.params, flat.master.bfloat16())
    assert torch.equal(model.transformer.wte.weight, flat.view(flat.master, "transformer.wte.weight").bfloat16())


def test_norm_is_reported_before_clipping_and_without_the_loss_scale():
    _, optimizer = adamw(scale_loss=True)
    fill_gradient(optimizer, 1)
    want = optimizer.flat.grad.double().norm() / 65536
    torch.testing.assert_close(optimizer.step(), want, rtol=1e-6, atol=0)


# ---- the loss scale ----


def test_loss_scale_halves_on_a_bad_gradient_and_doubles_after_the_interval(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(AdamW, "GROWTH_INTERVAL", 3)
    _, optimizer = adamw(scale_loss=True)
    scales, bad = [], []
    for good in [True, True, False, True, True, True, True, True, True, False, False]:
        optimizer.flat.grad[0] = 1.0 if good else math.inf
        norm = optimizer.step()
        assert bool(torch.isfinite(norm)) == good
        scales.append(float(optimizer.loss_scale))
        bad.append(int(optimizer.bad_steps))
    s = 65536.0
    assert scales == [s, s, s / 2, s / 2, s / 2, s, s, s, 2 * s, s, s / 2]
    assert bad == [0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 2]
    assert optimizer.scalars[STEP] == 8


def test_loss_scale_follows_torchs_scaler(monkeypatch: pytest.MonkeyPatch):
    """The same good and bad steps through torch.amp.GradScaler's update rule."""
    monkeypatch.setattr(AdamW, "GROWTH_INTERVAL", 4)
    _, optimizer = adamw(scale_loss=True)
    scale, growth = torch.tensor([65536.0]), torch.zeros(1, dtype=torch.int32)
    for step in range(24):
        bad = step % 11 in (3, 4)
        optimizer.flat.grad[0] = math.nan if bad else 1.0
        optimizer.step()
        torch._amp_update_scale_(scale, growth, torch.tensor([float(bad)]), 2.0, 0.5, 4)
        assert float(optimizer.loss_scale) == scale.item() and int(optimizer.good_steps) == growth.item()


def test_without_a_loss_scale_a_bad_gradient_is_counted_only():
    _, optimizer = adamw()
    before = copy.deepcopy((optimizer.flat.master, optimizer.m, optimizer.v))
    optimizer.flat.grad[5] = math.nan
    assert not torch.isfinite(optimizer.step())
    assert all(torch.equal(a, b) for a, b in zip(before, (optimizer.flat.master, optimizer.m, optimizer.v)))
    assert optimizer.loss_scale == 1.0 and optimizer.bad_steps == 1 and (optimizer.flat.grad == 0).all()


# ---- state ----


def test_state_round_trip_continues_bit_for_bit():
    model, first = adamw(scale_loss=True, dtype=torch.float16)
    other, second = adamw(scale_loss=True, dtype=torch.float16)
    for optimizer in (first, second):
        optimizer.set_lr(1e-3)
    for seed in range(3):
        fill_gradient(first, seed)
        first.step()
    first.flat.grad[0] = math.inf
    first.step()
    tensors, numbers = first.state_dict()
    names = list(CONFIG.parameter_shapes())
    assert list(tensors) == [f"exp_avg.{n}" for n in names] + [f"exp_avg_sq.{n}" for n in names]
    assert {n: tuple(tensors[f"exp_avg.{n}"].shape) for n in names} == CONFIG.parameter_shapes()
    assert numbers == {"optimizer_step": 3, "good_steps": 0, "loss_scale": 32768.0}
    second.flat.master.copy_(first.flat.master)
    second.load_state_dict(copy.deepcopy(tensors), dict(numbers))
    for optimizer in (first, second):
        fill_gradient(optimizer, 9)
        optimizer.step()
    assert torch.equal(first.flat.master, second.flat.master) and torch.equal(first.flat.params, second.flat.params)
    assert torch.equal(first.m, second.m) and torch.equal(first.v, second.v)
    assert torch.equal(first.scalars, second.scalars) and torch.equal(first.good_steps, second.good_steps)


def test_loss_scale_of_a_float16_run_is_not_taken_by_another():
    _, half = adamw(scale_loss=True)
    _, full = adamw(scale_loss=False)
    full.load_state_dict(*half.state_dict())
    assert full.scalars[LOSS_SCALE] == 1.0
    tensors, _ = full.state_dict()
    half.load_state_dict(tensors, {"optimizer_step": 7})
    assert half.scalars[LOSS_SCALE] == 65536.0 and half.scalars[STEP] == 7


def test_set_lr_reaches_the_update():
    model, optimizer = adamw()
    optimizer.set_lr(0.0)
    before = optimizer.flat.master.clone()
    fill_gradient(optimizer, 0)
    optimizer.step()
    assert optimizer.scalars[LR] == 0.0 and torch.equal(optimizer.flat.master, before)


def test_a_scale_free_run_resumed_in_float16_starts_with_a_fresh_scale():
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=8))
    model.init_weights(torch.Generator().manual_seed(0))
    flat = FlatParameters(model, torch.float32, torch.device("cpu"))
    tensors, numbers = AdamW(flat, OptimConfig(), REFERENCE).state_dict()
    assert "loss_scale" not in numbers
    scaled = AdamW(flat, OptimConfig(), REFERENCE, scale_loss=True)
    scaled.load_state_dict(tensors, numbers)
    assert float(scaled.loss_scale) == 65536.0
