"""From a budget to a run: the one of GPT-2's shapes whose loss is least, its batch, rates, hours, memory and flags.

The FLOPs of a budget are nanoGPT's count of the very shape (hardware.flops_per_token), which MFU divides by too, and
not 6 N D, which leaves attention out: of N = 124M and T = 1024 a seventh more.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import torch

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.gpus import CHOICES, GPUS
from nanogpt_fast.hardware import flops_per_token, peak_flops
from nanogpt_fast.memory import RESERVE, Plan, largest_batch, peak, plan_of, readable, relief
from nanogpt_fast.ops import expected as taken
from nanogpt_fast.ops import select_ops
from nanogpt_fast.published_runs import Expected, expected
from nanogpt_fast.scaling_laws import REFIT, critical_batch, effective_tokens, tokens_worth
from nanogpt_fast.settings.cli import load_config
from nanogpt_fast.settings.config import GPTConfig

# ---- shapes ----

MOST_HEADS = 40  # 6.7B parameters
BLOCK, VOCAB = 1024, 50304


@cache
def shape_of(heads: int) -> GPTConfig:
    """GPT-2's shape with so many heads of 64. Its layers are those of GPT-2's own sizes (12 heads 12, 16 24, 20 36, 25
    48) and lie on lines between them; below, as many layers as heads, the 124M's width a layer; above, on the last
    line."""
    layers = heads if heads <= 12 else 3 * heads - 24 if heads <= 20 else round(2.4 * heads - 12)
    return GPTConfig(block_size=BLOCK, vocab_size=VOCAB, n_layer=layers, n_head=heads, n_embd=64 * heads, bias=False)


SHAPES = tuple(shape_of(heads) for heads in range(1, MOST_HEADS + 1))


@cache
def params_of(shape: GPTConfig) -> int:
    """All parameters, as the laws count them."""
    return shape.num_params(non_embedding=False)


@cache
def cost_of(shape: GPTConfig) -> float:
    """FLOPs a token, forward and backward."""
    return flops_per_token(shape)["nanogpt"]


def closest(params: float) -> GPTConfig:
    """The shape whose parameters are the fewest times more, or less, than these."""
    return min(SHAPES, key=lambda shape: abs(math.log(params_of(shape) / params)))


def nearest(params: float, where: str) -> GPTConfig:
    """The shape of about so many parameters. ConfigError for a number far from all."""
    low, high = params_of(SHAPES[0]), params_of(SHAPES[-1])
    if not low / 1.5 <= params <= high * 1.5:
        raise ConfigError(
            "no shape of GPT-2's kind has about so many parameters",
            where=f"{where}: {params:.3g}",
            expected=f"{low:.2g} to {high:.2g}",
        )
    return closest(params)


# ---- what there is ----


@dataclass(frozen=True)
class Machine:
    """GPUs and how busy they are kept; several are taken to be as fast each as one."""

    gpu: str  # a key of gpus.GPUS
    gpus: int
    mfu: float
    mfu_source: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if GPUS[self.gpu].bfloat16 else torch.float16

    @property
    def rate(self) -> float:
        """Model FLOPs a second of all."""
        rated = peak_flops(self.gpu, str(self.dtype).removeprefix("torch."))
        assert rated is not None, self.gpu  # every row of GPUS has one of the two
        return rated[0] * self.gpus * self.mfu


# triton+graph in bench/results/h100/2026-11-27-3849647.jsonl, GPT-2 124M: docs/performance.md, "One H100, measured".
MEASURED_ON, MEASURED_MFU = CHOICES["h100"], 0.50


def machine(gpu: str, gpus: int, mfu: float) -> Machine:
    """mfu 0: as measured on one H100."""
    if mfu:
        return Machine(gpu, gpus, mfu, "given")
    source = "measured on one H100, GPT-2 124M (docs/performance.md); another size may differ"
    if gpu != MEASURED_ON:
        source = (
            "an assumption, an H100's of GPT-2 124M: on 8 A100 nanoGPT published 29%, llm.c 60% (bench/published.toml)"
        )
    return Machine(gpu, gpus, MEASURED_MFU, source)


@dataclass(frozen=True)
class Data:
    """What is trained on."""

    dataset: str
    data: str | None  # the data set of published_runs; None: no runs on it
    unique: float | None  # tokens; None: not known, and taken to be enough
    passes: float  # over them, at most; inf: as many as there is budget
    data_dir: str = "data"

    @property
    def most(self) -> float:
        return math.inf if self.unique is None else self.unique * self.passes

    def loss(self, params: float, tokens: float) -> Expected:
        return expected(params, effective_tokens(tokens, self.unique), self.data)


def best_shape(flops: float, data: Data) -> GPTConfig:
    """The shape of the least expected loss for a budget. ConfigError where that is beyond all shapes."""
    found = min(SHAPES, key=lambda shape: data.loss(params_of(shape), min(flops / cost_of(shape), data.most)).loss)
    if found in (SHAPES[0], SHAPES[-1]):
        edges = [REFIT.tokens_for(params_of(shape)) * cost_of(shape) for shape in (SHAPES[1], SHAPES[-2])]
        raise ConfigError(
            f"the best size of that budget is {'below' if found is SHAPES[0] else 'above'} all of GPT-2's kind",
            where=f"{flops:.3g} FLOPs",
            expected=f"about {edges[0]:.1g} to {edges[1]:.1g} FLOPs, or --params beside it",
            hint="the data are the limit: more --epochs, or more data" if data.most * cost_of(found) < flops else "",
        )
    return found


# ---- batch and rates ----

# Brown et al. 2020 (GPT-3, arXiv 2005.14165), table 2.1: parameters, tokens a batch, learning rate. Its 0.5M and so on
# are taken as powers of two, as llm.c's scripts do (run_gpt2_124M.sh to run_gpt2_1558M.sh: 524,288 three times,
# 1,048,576).
GPT3 = (
    (125e6, 2**19, 6e-4),
    (350e6, 2**19, 3e-4),
    (760e6, 2**19, 2.5e-4),
    (1.3e9, 2**20, 2e-4),
    (2.7e9, 2**20, 1.6e-4),
    (6.7e9, 2**21, 1.2e-4),
)
WARM_UP = 375e6  # tokens: the same paper, appendix B; 715 iterations of 2^19, llm.c's scripts have 700


def gpt3_row(params: float) -> tuple[float, int, float]:
    return min(GPT3, key=lambda row: abs(math.log(row[0] / params)))


def batch_tokens(params: float, loss: float, gpus: int) -> int:
    """A power of two, GPT-3's by size and no more than the critical batch at that loss; then a multiple of the GPUs."""
    wanted = min(gpt3_row(params)[1], 2 ** int(math.log2(critical_batch(loss))))
    return max(1, round(wanted / BLOCK / gpus)) * gpus * BLOCK


# ---- memory ----

LARGEST = 64  # sequences a micro-batch: more fill no GPU better (docs/performance.md has 64, 32 and 4)


def fitting(flags: Iterable[str], shape: GPTConfig, at: Machine) -> tuple[Plan, list[str], str]:
    """(the step, flags that it takes, what it holds): the largest micro-batch that fits, with a block's activations
    rebuilt, or sharded too, only where it must be. flags: train's, a sequence a micro-batch."""
    gpu = GPUS[at.gpu]
    budget = (1 - RESERVE) * gpu.gib * 2**30
    ops = select_ops("auto", "cuda", taken(gpu.capability))
    sharded = [["--parallel=zero1"], ["--parallel=zero1", "--recompute=block"]] if at.gpus > 1 else []
    plan, more = None, []
    for more in ([], ["--recompute=block"], *sharded):
        plan = plan_of(load_config([*flags, *more]), shape, ops, at.dtype, gpu, at.gpus)
        if fits := largest_batch(plan, budget):
            plan = plan.with_batch(max(n for n in plan.batch_sizes if n <= min(fits, LARGEST)))
            held = sum(peak(plan).values())
            return plan, more, f"{readable(held)} of {gpu.gib} GiB a GPU at the peak, predicted"
    assert plan is not None
    held = sum(peak(plan).values())
    said = f"does not fit: {readable(held)} of {gpu.gib} GiB a GPU; {relief(plan, budget)}"
    return plan, more, said


# ---- the plan ----


@dataclass(frozen=True)
class Alternative:
    """Another size for the same FLOPs."""

    shape: GPTConfig
    tokens: float
    loss: float
    flops_to_match: float  # that it takes to reach the plan's own loss; inf: it never does


@dataclass(frozen=True)
class RunPlan:
    """A run, before it is one."""

    shape: GPTConfig
    data: Data
    at: Machine
    iterations: int
    batch: int  # tokens an iteration
    learning_rate: float
    expected: Expected
    alternatives: tuple[Alternative, ...]
    memory: str
    flags: tuple[str, ...]  # train's

    @property
    def tokens(self) -> int:
        return self.iterations * self.batch

    @property
    def flops(self) -> float:
        return self.tokens * cost_of(self.shape)

    @property
    def hours(self) -> float:
        return self.flops / self.at.rate / 3600

    @property
    def passes(self) -> float | None:
        return None if self.data.unique is None else self.tokens / self.data.unique

    @property
    def command(self) -> list[str]:
        nodes = -(-self.at.gpus // 8)
        several = ["--standalone"] if nodes == 1 else [f"--nnodes={nodes}"]
        launcher = (
            ["torchrun", *several, f"--nproc_per_node={min(8, self.at.gpus)}"] if self.at.gpus > 1 else ["python"]
        )
        return [*launcher, "-m", "nanogpt_fast.train", *self.flags]


def others(shape: GPTConfig, flops: float, data: Data) -> tuple[Alternative, ...]:
    """The plan's own shape, half and twice its parameters, at the same FLOPs."""
    loss = data.loss(params_of(shape), flops / cost_of(shape)).loss
    found = []
    for size in (0.5, 1.0, 2.0):
        other = shape if size == 1 else closest(size * params_of(shape))
        tokens, params = flops / cost_of(other), params_of(other)
        enough = tokens_worth(REFIT.tokens_to_reach(params, loss - data.loss(params, 1.0).added), data.unique)
        found.append(Alternative(other, tokens, data.loss(params, tokens).loss, enough * cost_of(other)))
    return tuple(found)


def planned(shape: GPTConfig, tokens: float, data: Data, at: Machine, model: str = "") -> RunPlan:
    """The run of a shape over about so many tokens, or as many as the data's passes allow; model: a preset whose batch
    and rates are kept."""
    params, tokens = params_of(shape), min(tokens, data.most)
    chosen = data.loss(params, tokens)
    if model:
        preset = load_config([model])
        batch, rate, base = preset.tokens_per_iter, preset.optim.learning_rate, ["--config", model]
        sequences = preset.data.batch_size * preset.data.gradient_accumulation_steps
    else:
        batch, rate = batch_tokens(params, chosen.loss, at.gpus), gpt3_row(params)[2]
        sequences = batch // BLOCK
        base = [f"--n_layer={shape.n_layer}", f"--n_head={shape.n_head}", f"--n_embd={shape.n_embd}",
                f"--learning_rate={rate:g}", f"--min_lr={rate / 10:g}"]  # fmt: skip
    iterations = round(tokens / batch)
    if iterations < 10:
        raise ConfigError(
            "that budget is a run of too few iterations",
            where=f"{tokens:,.0f} tokens, {batch:,} an iteration",
            expected=f"{10 * batch:,} tokens and more, or a smaller model (--params)",
        )
    if sequences % at.gpus:
        raise ConfigError(
            "the sequences of an iteration are not shared by so many GPUs evenly",
            where=f"--gpus={at.gpus}, {sequences} sequences of {model or 'an iteration'}",
            expected="a divisor of them",
        )
    warm_up = max(1, min(round(WARM_UP / batch), iterations // 10))
    base += [f"--max_iters={iterations}", f"--lr_decay_iters={iterations}", f"--warmup_iters={warm_up}",
             f"--eval_interval={min(1000, max(1, iterations // 10))}", f"--dataset={data.dataset}"]  # fmt: skip
    base += [f"--data_dir={data.data_dir}"] if data.data_dir != "data" else []
    alone = [*base, "--batch_size=1", f"--gradient_accumulation_steps={sequences}"]
    plan, more, said = fitting(alone, shape, at)
    micro = [f"--batch_size={plan.batch_size}", f"--gradient_accumulation_steps={sequences // plan.batch_size}"]
    return RunPlan(
        shape=shape,
        data=data,
        at=at,
        iterations=iterations,
        batch=batch,
        learning_rate=rate,
        expected=data.loss(params, iterations * batch),
        alternatives=others(shape, iterations * batch * cost_of(shape), data),
        memory=said,
        flags=(*base, *micro, *more),
    )


def outside(shape: GPTConfig, tokens: float) -> bool:
    """Whether the law says this of sizes or tokens that its runs did not have: 70M to 16B on 5B to 500B (the abstract
    of arXiv 2203.15556)."""
    return not (70e6 <= params_of(shape) <= 16e9 and 5e9 <= tokens <= 500e9)


def with_vocabulary(shape: GPTConfig) -> GPTConfig:
    """A preset's shape with GPT-2's vocabulary where it leaves that to the dataset."""
    return shape if shape.vocab_size else replace(shape, vocab_size=VOCAB)
