"""A plan, in words: what a budget or a model comes to, where each figure is from, and the command that trains it."""

import json
import math
import shlex
from dataclasses import asdict
from typing import Any

from nanogpt_fast.columns import columns
from nanogpt_fast.data.splits import dataset_folder, open_split
from nanogpt_fast.dry_run import gpu_named, span
from nanogpt_fast.errors import ConfigError, NanogptError, printable
from nanogpt_fast.published_runs import RUNS, UNIQUE, data_named, published
from nanogpt_fast.run_plan import (
    MEASURED_MFU,
    Data,
    Machine,
    RunPlan,
    best_shape,
    cost_of,
    gpt3_row,
    machine,
    nearest,
    outside,
    params_of,
    planned,
    with_vocabulary,
)
from nanogpt_fast.scaling_laws import AS_GOOD_AS_NEW, LAWS, REFIT, ROWS, along, critical_batch
from nanogpt_fast.settings.cli import load_config
from nanogpt_fast.settings.config import DataConfig, GPTConfig
from nanogpt_fast.settings.planning import PROG, PlanFlags


def told_of(flags: PlanFlags) -> str:
    """What is printed: a plan, or published runs. Raises NanogptError."""
    if flags.published:
        mfu = flags.mfu or MEASURED_MFU
        return json.dumps(published_json(mfu)) if flags.json else beside(mfu)
    gpu = gpu_named(flags.gpu, "gpu")
    at = machine(gpu, flags.gpus, flags.mfu)
    data, told = data_of(flags)
    flops = flags.flops or flags.hours * 3600 * at.rate
    shape = fixed(flags)
    if shape is None:
        shape = (
            best_shape(flops, data)
            if flops
            else nearest(REFIT.params_for(flags.tokens), f"--tokens={flags.tokens:g}, whose best size is")
        )
    plan = planned(shape, tokens_of(flags, flops, shape), data, at, flags.model)
    return json.dumps(as_json(plan)) if flags.json else "\n".join(report(plan, told, flags, flops))


def fixed(flags: PlanFlags) -> GPTConfig | None:
    """The model that is given; None: it is to be found."""
    if flags.params:
        return nearest(flags.params, "--params")
    if not flags.model:
        return None
    config = load_config([flags.model], prog=PROG)
    if config.run.eval_only or config.run.init_from != "scratch":
        raise ConfigError(
            "a plan is of a run from scratch",
            where=f"--model={flags.model}: eval_only = {config.run.eval_only}, init_from = {config.run.init_from!r}",
            expected="a configuration that trains a new model",
        )
    return with_vocabulary(config.shape(config.model.vocab_size))


def tokens_of(flags: PlanFlags, flops: float, shape: GPTConfig) -> float:
    """Those of the budget; without one, those that the law gives a model of this size."""
    return flags.tokens or (flops / cost_of(shape) if flops else REFIT.tokens_for(params_of(shape)))


def data_of(flags: PlanFlags) -> tuple[Data, str]:
    """(what is trained on, how its size is known)."""
    known = data_named(flags.dataset)
    unique, told = UNIQUE.get(known or ""), f"by its published size: data_dir {flags.data_dir} has none"
    where = DataConfig(dataset=flags.dataset, data_dir=flags.data_dir)
    if dataset_folder(where) is not None:
        try:
            with open_split(where, "train") as train:
                unique, told = float(sum(file.n_tokens for file in train.files)), "counted"
        except NanogptError as error:
            told = f"{told} that can be read ({error.what})"
    if unique is None and flags.epochs:
        raise ConfigError(
            "how many tokens the dataset has is not known, so neither are --epochs",
            where=f"--dataset={flags.dataset}, --data_dir={flags.data_dir}",
            expected="a prepared dataset",
            hint="python -m nanogpt_fast.prepare, or --tokens in place of --epochs",
        )
    return Data(flags.dataset, known, unique, flags.epochs or math.inf, flags.data_dir), told


# ---- what is printed ----


def count(number: float) -> str:
    """124.4M, 10.3B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:,.0f}"


def report(plan: RunPlan, told: str, flags: PlanFlags, budget: float) -> list[str]:
    """The plan, a line a decision, each with where it comes from; budget: FLOPs that there are, 0 for no such limit."""
    shape, params, expected = plan.shape, params_of(plan.shape), plan.expected
    inside = count(params - shape.vocab_size * shape.n_embd)
    rows = [
        ("model", f"{count(params)} parameters: {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, "
         f"vocabulary {shape.vocab_size:,}; {inside} without the token embedding"),
        ("tokens", f"{count(plan.tokens)}, {plan.tokens / params:.3g} a parameter"),
        ("compute", f"{plan.flops:.3g} FLOPs, {cost_of(shape) / 1e9:.3g} GFLOP a token: "
         f"{plan.flops / (6 * (params - shape.head_params) * plan.tokens) - 1:.0%} more than 6 N D"),
        ("best size", f"by 6 N D, {spread_of_sizes(plan.flops)}"),
        ("batch", f"{plan.batch:,} tokens x {plan.iterations:,} iterations; {why_batch(plan, flags)}"),
        ("rate", f"{plan.learning_rate:g}, {why_rate(plan, flags)}"),
        ("time", f"{span(plan.hours * 3600)} on {plan.at.gpus} {plan.at.gpu} at an MFU of {plan.at.mfu:.0%}"),
        ("", f"MFU: {plan.at.mfu_source}{several(plan.at)}"),
        ("memory", plan.memory),
        ("data", passes_of(plan, told)),
        ("loss", f"{expected.loss:.2f} nats a token, {expected.low:.2f} to {expected.high:.2f} by other laws"),
        ("", whose_loss(plan)),
    ]  # fmt: skip
    if budget and plan.flops < 0.97 * budget:
        rows.append(("", f"{1 - plan.flops / budget:.0%} of the budget is left: --epochs allows no more tokens"))
    if outside(shape, plan.tokens):
        rows.append(("", "beyond the runs that the law was fitted to (70M to 16B parameters on 5B to 500B tokens)"))
    lines = [f"{label:<10}{printable(text)}" for label, text in rows]
    header = ["the same FLOPs", "parameters", "tokens", "loss", "FLOPs to this plan's loss"]
    table = [header, *(alternative_row(plan, i) for i in range(len(plan.alternatives)))]
    return [*lines, "", *columns(table), "", shlex.join(plan.command)]


def several(at: Machine) -> str:
    if at.gpus == 1:
        return ""
    return "; as fast each as one (docs/scaling.md)" + ("; docs/cluster.md starts several nodes" if at.gpus > 8 else "")


def alternative_row(plan: RunPlan, index: int) -> list[str]:
    other, own = plan.alternatives[index], plan.alternatives[1]
    match = "never" if math.isinf(other.flops_to_match) else f"{other.flops_to_match / plan.flops:.2f} x"
    name = ("half the size", "the plan", "twice the size")[index]
    loss = f"{other.loss:.3f}" if other is own else f"{other.loss:.3f} ({other.loss - own.loss:+.3f})"
    return [name, count(params_of(other.shape)), count(other.tokens), loss, match]


def spread_of_sizes(flops: float) -> str:
    """Where other fits put the best size for as many FLOPs, by 6 N D."""
    found = {law.name: law.optimum(flops)[0] for law in LAWS} | {
        name: along(rows, flops)[0] for name, rows in ROWS.items()
    }
    own = found.pop(REFIT.name)
    low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    return f"{count(own)} ({REFIT.name}); others {count(found[low])} ({low}) to {count(found[high])} ({high})"


def why_batch(plan: RunPlan, flags: PlanFlags) -> str:
    if flags.model:
        return f"{flags.model}'s"
    row, most = gpt3_row(params_of(plan.shape)), critical_batch(plan.expected.loss)
    if most < row[1]:
        return f"below the critical batch of that loss, {count(most)} (arXiv 2001.08361)"
    return f"GPT-3's of {count(row[0])} (arXiv 2005.14165, table 2.1)"


def why_rate(plan: RunPlan, flags: PlanFlags) -> str:
    if flags.model:
        return f"{flags.model}'s"
    return f"GPT-3's of {count(gpt3_row(params_of(plan.shape))[0])}, down to a tenth by a cosine"


def passes_of(plan: RunPlan, told: str) -> str:
    passes = plan.passes
    if passes is None:
        return f"{plan.data.dataset}: how many tokens it has is not known; taken to be enough for one pass"
    text = f"{plan.data.dataset}: {count(plan.data.unique or 0)} tokens ({told}), seen {passes:.3g} times"
    more = "; past about 4 passes a repetition is worth less, counted so (arXiv 2305.16264)"
    return text + (more if passes > AS_GOOD_AS_NEW else "")


def whose_loss(plan: RunPlan) -> str:
    """What the loss is a loss of."""
    expected = plan.expected
    if not expected.runs:
        return (f"of {REFIT.data}: no published run says how far {plan.data.dataset} lies from it, "
                "and another data set's or tokenizer's loss may be tenths away")  # fmt: skip
    return (f"the law of {REFIT.source.split(':')[0]} {expected.added:+.2f}, by which {' and '.join(expected.runs)} "
            f"{'lie' if len(expected.runs) > 1 else 'lies'} above it on {expected.data} (--published)")  # fmt: skip


def beside(mfu: float) -> str:
    """The table of --published, and its sources."""
    header, rows = published(mfu)
    sources = [f"{run.name}: loss {run.loss_source}; time {run.hours_source}" for run in RUNS]
    return "\n".join([*columns([header, *rows]), "", *sources])


def published_json(mfu: float) -> list[dict[str, str]]:
    header, rows = published(mfu)
    return [dict(zip(header, row)) for row in rows]


def as_json(plan: RunPlan) -> dict[str, Any]:
    """The plan as data; what is not finite is null."""
    at: Machine = plan.at
    found = {
        "model": {**asdict(plan.shape), "params": params_of(plan.shape)},
        "tokens": plan.tokens,
        "tokens_per_iter": plan.batch,
        "iterations": plan.iterations,
        "learning_rate": plan.learning_rate,
        "flops": plan.flops,
        "hours": plan.hours,
        "gpu": at.gpu,
        "gpus": at.gpus,
        "mfu": at.mfu,
        "mfu_source": at.mfu_source,
        "memory": plan.memory,
        "passes": plan.passes,
        "loss": asdict(plan.expected),
        "alternatives": [
            {"params": params_of(a.shape), "tokens": a.tokens, "loss": a.loss,
             "flops_to_match": a.flops_to_match if math.isfinite(a.flops_to_match) else None}
            for a in plan.alternatives
        ],
        "command": plan.command,
    }  # fmt: skip
    return found
