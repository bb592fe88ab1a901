"""TrainStep: accumulation, dropout counters, precisions, refused updates, and the same bits every time."""

import dataclasses
import math

import pytest
import torch
from separate_documents import separately
from torch import Tensor

from nanogpt_fast.distributed import World
from nanogpt_fast.memory import Unheard
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import REFERENCE
from nanogpt_fast.optim import STEP, AdamW, FlatParameters
from nanogpt_fast.schedule import BatchSchedule
from nanogpt_fast.settings.config import GPTConfig, OptimConfig
from nanogpt_fast.step import TrainStep

CONFIG = GPTConfig(block_size=8, vocab_size=29, n_layer=2, n_head=2, n_embd=16, bias=True)


def make(
    dtype: torch.dtype = torch.float32,
    *,
    dropout: float = 0.0,
    seed: int = 1337,
    world: World | None = None,
    batches: BatchSchedule | None = None,
    eot: int | None = None,
) -> TrainStep:
    model = GPT(dataclasses.replace(CONFIG, dropout=dropout))
    model.init_weights(torch.Generator().manual_seed(0))
    flat = FlatParameters(model.train(), dtype, torch.device("cpu"))
    optimizer = AdamW(flat, OptimConfig(weight_decay=0.1), REFERENCE, scale_loss=dtype == torch.float16)
    optimizer.set_lr(1e-2)
    return TrainStep(model, optimizer, world or World(), seed, batches, eot)


def batch(accumulation: int, size: int, seed: int = 0) -> Tensor:
    """Token ids as the loader gives them: uint16 [A, B, T + 1]."""
    shape = (accumulation, size, CONFIG.block_size + 1)
    return torch.randint(29, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint16)


def master(step: TrainStep) -> Tensor:
    return step.optimizer.flat.master


@pytest.mark.parametrize("accumulation", [2, 6])
def test_accumulation_equals_one_big_batch(accumulation: int):
    """Micro-batches of equal size: the mean of means is the mean. Gradients to float32 rounding."""
    whole, parts = make(), make()
    for iteration in range(3):
        tokens = batch(1, 6, seed=iteration)
        a, b = whole(tokens, iteration), parts(tokens.view(accumulation, 6 // accumulation, -1), iteration)
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(master(whole), master(parts), rtol=1e-4, atol=1e-5)


def test_gradient_is_the_mean_losss_against_float64():
    """What reaches AdamW, against autograd in float64 of the plain mean cross-entropy over all micro-batches."""
    step, tokens = make(), batch(3, 2)
    other = GPT(CONFIG)
    other.init_weights(torch.Generator().manual_seed(0))
    other.double()
    flat, ids = step.optimizer.flat, tokens.long().flatten(0, 1)
    loss = other(ids[:, :-1], ids[:, 1:], 1.0 / (6 * CONFIG.block_size))[0]
    loss.backward()
    got: dict[str, Tensor] = {}

    def keep(*_: object) -> Tensor:
        got.update({n: t.clone() for n, t in flat.named(flat.grad).items()})
        return torch.zeros(())

    step.optimizer.step = keep  # type: ignore[method-assign]
    result = step(tokens, 0)
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-6, atol=0)
    for name, parameter in other.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            got[name].double(), parameter.grad, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


PRECISIONS = [(torch.float32, 0.2), (torch.bfloat16, 0.2), (torch.float16, 0.2)]


@pytest.mark.parametrize(("dtype", "dropout"), PRECISIONS, ids=lambda v: str(v))
def test_every_precision_learns_a_batch_by_heart(dtype: torch.dtype, dropout: float):
    step, tokens = make(dtype, dropout=dropout), batch(2, 2)
    losses = [step(tokens, iteration).loss.item() for iteration in range(25)]
    assert abs(losses[0] - math.log(29)) < 0.1, "a fresh model knows nothing"
    assert losses[-1] < 0.6 * losses[0]
    assert step.optimizer.scalars[STEP] == 25 and step.optimizer.bad_steps == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_near_float32(dtype: torch.dtype):
    exact, low = make(), make(dtype)
    for iteration in range(5):
        a, b = exact(batch(2, 2, seed=iteration), iteration), low(batch(2, 2, seed=iteration), iteration)
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=0.01)
        assert a.grad_norm.item() == pytest.approx(b.grad_norm.item(), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_bad_gradient_skips_the_update_and_nothing_else(dtype: torch.dtype):
    """An infinite element of the gradient: parameters, moments and step count keep their bits; the scale halves."""
    step = make(dtype)
    step(batch(1, 2), 0)
    flat, optimizer = step.optimizer.flat, step.optimizer
    kept = (flat.master, flat.params, optimizer.m, optimizer.v, optimizer.scalars[STEP])
    before, scale = [t.clone() for t in kept], float(optimizer.loss_scale)
    flat.grad[3] = math.inf  # as if the first micro-batch had overflowed
    result = step(batch(1, 2, seed=1), 1)
    assert not torch.isfinite(result.grad_norm) and torch.isfinite(result.loss)
    assert all(torch.equal(a, b) for a, b in zip(before, kept))
    assert float(optimizer.loss_scale) == (scale / 2 if dtype == torch.float16 else scale)
    assert torch.isfinite(step(batch(1, 2, seed=2), 2).grad_norm) and not torch.equal(before[0], flat.master)


def test_float16_finds_its_scale():
    """A scale that overflows float16's logits gradient: steps are refused until it fits, then training goes on."""
    step = make(torch.float16)
    step.optimizer.loss_scale.fill_(2.0**40)
    finite = [bool(torch.isfinite(step(batch(1, 2, seed=i), i).grad_norm)) for i in range(30)]
    refused = finite.index(True)
    assert 0 < refused < 30 and all(finite[refused:])
    assert float(step.optimizer.loss_scale) == 2.0 ** (40 - refused)


# ---- dropout ----


def counters(
    world: World, accumulation: int, iteration: int, seed: int = 1337, batches: BatchSchedule | None = None
) -> list[int]:
    """The seeds that the model's micro-batches are given."""
    step, seen = make(dropout=0.1, seed=seed, world=world, batches=batches), []
    forward = step.model.forward

    def spy(*args: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(int(args[3]))
        return forward(*args)

    step.model.forward = spy  # type: ignore[method-assign, assignment]
    step(batch(accumulation, 1), iteration)
    return seen


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_dropout_counters_do_not_depend_on_the_ranks(ranks: int):
    """Micro-batch i of iteration n has one number however the ranks share them; no number comes twice."""
    seen = [
        number
        for iteration in range(3)
        for rank in range(ranks)
        for number in counters(Unheard(rank, ranks), 4 // ranks, iteration)
    ]
    assert seen == [(1337 << 32) + i for i in range(12)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_dropout_counters_go_on_where_a_growing_batch_left_off(ranks: int):
    ramp, seen = BatchSchedule(2, 8, 5), []
    for iteration in range(7):
        mine = ramp.accumulation_at(iteration) // ranks
        for rank in range(ranks):
            seen += counters(Unheard(rank, ranks), mine, iteration, batches=ramp)
    assert seen == [(1337 << 32) + i for i in range(2 + 2 + 4 + 4 + 6 + 8 + 8)]


def test_a_schedule_that_never_changes_numbers_them_as_none_does():
    constant = BatchSchedule(4, 4, 0)
    assert counters(Unheard(1, 2), 2, 600_000, batches=constant) == counters(Unheard(1, 2), 2, 600_000)


def test_runs_of_different_seeds_share_no_counter():
    """The seed is the high half: a run's 2^32 micro-batches end before the next seed's begin."""
    assert counters(Unheard(), 1, 0, seed=1)[0] - counters(Unheard(), 1, 0, seed=0)[0] == 2**32
    assert 0 <= counters(Unheard(), 1, 0, seed=2**63 - 1)[0] < 2**63


def test_masks_change_from_one_micro_batch_to_the_next():
    """The same tokens twice in a step: equal losses would mean one mask for both."""
    step, losses = make(dropout=0.5), []
    forward = step.model.forward

    def spy(*args: Tensor) -> tuple[Tensor, Tensor]:
        loss, nll = forward(*args)
        losses.append(loss.item())
        return loss, nll

    step.model.forward = spy  # type: ignore[method-assign]
    step(batch(1, 2).expand(3, -1, -1), 0)
    assert len(set(losses)) == 3


# ---- reproducibility ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_the_same_bits(dtype: torch.dtype):
    first, second = make(dtype, dropout=0.2), make(dtype, dropout=0.2)
    for iteration in range(4):
        torch.manual_seed(iteration)  # torch's own generator takes no part
        a = first(batch(2, 3, seed=iteration), iteration)
        torch.manual_seed(99)
        b = second(batch(2, 3, seed=iteration), iteration)
        assert torch.equal(a.loss, b.loss) and torch.equal(a.grad_norm, b.grad_norm)
    assert torch.equal(master(first), master(second))


def test_a_step_depends_on_its_iteration_alone():
    """Resuming at iteration 5 in a new process draws the masks that the first one would have drawn."""
    first, second = make(dropout=0.3), make(dropout=0.3)
    for iteration in range(5):
        first(batch(2, 2, seed=iteration), iteration)
    master(second).copy_(master(first))
    second.optimizer.load_state_dict(*first.optimizer.state_dict())
    first(batch(2, 2, seed=5), 5)
    second(batch(2, 2, seed=5), 5)
    assert torch.equal(master(first), master(second))


def test_with_a_mask_the_update_is_that_of_separate_documents():
    """Loss, and the gradient's norm before clipping, against every document's own forward in float64."""
    eot, tokens = 7, batch(2, 3)
    tokens[:, :, 3] = tokens[0, 0, 5] = eot
    step, exact = make(eot=eot), make().model
    for parameter in exact.parameters():
        del parameter.main_grad  # type: ignore[attr-defined]
        parameter.data, parameter.grad = parameter.data.double(), None
    ids = tokens.long().flatten(0, 1)
    loss, _ = separately(exact, ids[:, :-1], ids[:, 1:], eot, 1 / (6 * CONFIG.block_size))
    loss.backward()
    norm = math.hypot(*(float(p.grad.norm()) for p in exact.parameters() if p.grad is not None))
    result = step(tokens, 0)
    torch.testing.assert_close(result.loss.double(), loss.detach(), rtol=1e-6, atol=0)
    assert float(result.grad_norm) == pytest.approx(norm, rel=1e-5)
    assert float(make()(tokens, 0).grad_norm) != pytest.approx(norm, rel=1e-3), "a mask matters here"


def test_figures_are_those_of_their_step():
    """Read after the next step has run, which writes over the report on the device."""
    step = make()
    result, reading = step(batch(1, 2, seed=1), 0), step.read()
    step(batch(1, 2, seed=2), 1)
    report = reading.get()
    assert (report.loss, report.grad_norm) == (result.loss.item(), result.grad_norm.item())
    assert report.loss != step.read().get().loss and report.loss_scale == 1.0 and report.stop == 0.0


def test_loss_is_this_ranks_mean():
    step, tokens = make(), batch(3, 2)
    ids = tokens.long().flatten(0, 1)
    with torch.no_grad():
        want = step.model(ids[:, :-1], ids[:, 1:])[1].mean()
    torch.testing.assert_close(step(tokens, 0).loss.float(), want)
