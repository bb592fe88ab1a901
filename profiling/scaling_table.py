"""roofline.py's --world: a configuration's step on N GPUs, what binds it, and what a budget of tokens costs there."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from config_roofline import dtype_of, vocab_size_of
from interconnect import BOARDS, Fabric, fabric, in_words
from measured_roof import Roof
from roofline import print_beside, rates, supposed_roof
from scaling import (
    GATHER,
    LAST,
    MEASURED,
    QUEUE,
    REPORT,
    Rate,
    Share,
    Step,
    buckets,
    compute_of,
    play,
    rank_memory,
    rate_of_mfu,
    strong_share,
    update_seconds,
    weak_share,
)
from work import FULL, HALF

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.gpus import CHOICES, GPUS
from nanogpt_fast.hardware import flops_per_token
from nanogpt_fast.memory import RESERVE, Plan, plan_of
from nanogpt_fast.ops import expected, select_ops
from nanogpt_fast.optim import BUCKET
from nanogpt_fast.schedule import BatchSchedule
from nanogpt_fast.settings.cli import load_config
from nanogpt_fast.settings.config import GPTConfig

WORLDS = tuple(2**n for n in range(11))  # of a bare --world: 1 to 1,024
LOSS = 0.02  # of an even share's speed: below it nothing binds but compute
# Energy of all over that of the GPUs at their limit: an assumption. A DGX H100 may draw 10.2 kW (its data sheet), 1.8
# times what its GPUs may; training draws less of both, and cooling comes on top.
OVERHEAD = 1.5
BEND = 0.9  # of the smallest world's speed a GPU


def worlds_of(words: Sequence[str]) -> list[int]:
    """Ascending. ConfigError for what is no number of GPUs."""
    bad = [word for word in words if not (word.isdigit() and 1 <= int(word) <= 2**20)]
    if bad:
        raise ConfigError("no number of GPUs", where=f"--world {bad[0]}", expected="whole numbers from 1 to 1,048,576")
    return sorted({int(word) for word in words}) if words else list(WORLDS)


# ---- one run on N GPUs ----


@dataclass(frozen=True, kw_only=True)
class Run:
    """A configuration on a kind of machine: all that a row is made from."""

    gpu: str  # a key of gpus.CHOICES
    shape: GPTConfig
    batch: int
    accumulation: int
    roof: Roof
    rate: Rate
    fabric: Fabric
    parallel: str = "ddp"
    reduce_bytes: int = FULL
    recompute: str = "none"
    bucket_mb: float = BUCKET
    memory: Plan | None = None

    def step(self, ranks: int, share: Share) -> Step:
        compute = compute_of(self.shape, share.batch, self.roof, self.rate, self.recompute)
        update = update_seconds(self.shape, ranks, self.roof, self.parallel)
        return play(compute, update, self.shape, self.fabric, ranks, share.micro_steps, self.parallel,
                    self.reduce_bytes, self.bucket_mb)  # fmt: skip

    def row(self, ranks: int, share: Share) -> "Row":
        held = rank_memory(self.memory, share, ranks, self.parallel) if self.memory else 0
        return Row(ranks, share, self.step(ranks, share), self.shape, self.gpu, held, self.parallel)


@dataclass(frozen=True)
class Row:
    ranks: int
    share: Share
    step: Step
    shape: GPTConfig
    gpu: str
    memory: int = 0  # bytes a rank
    parallel: str = "ddp"

    @property
    def tokens(self) -> int:
        """An iteration's."""
        return self.ranks * self.share.batch * self.share.micro_steps * self.shape.block_size

    @property
    def speed(self) -> float:
        """Tokens/s of all GPUs."""
        return self.tokens / self.step.seconds

    @property
    def mfu(self) -> float:
        peak = GPUS[CHOICES[self.gpu]].tflops * 1e12 * self.ranks
        return flops_per_token(self.shape)["nanogpt"] * self.speed / peak

    @property
    def fits(self) -> bool:
        return self.memory <= (1 - RESERVE) * GPUS[CHOICES[self.gpu]].gib * 2**30

    def hours(self, budget: float) -> float:
        return budget / self.speed / 3600

    def kwh(self, budget: float, overhead: float) -> float:
        return self.hours(budget) * self.ranks * BOARDS[self.gpu].watts / 1000 * overhead

    def efficiency(self, first: "Row") -> float:
        """Speed a GPU, of that of the first row."""
        return self.speed / self.ranks / (first.speed / first.ranks)

    def losses(self, first: "Row") -> dict[str, float]:
        """{what: share of the step} that the first row does not lose, or not as much of."""
        step, tokens = self.step, self.tokens / self.ranks
        rate = first.step.compute / (first.tokens / first.ranks)
        update = first.step.update / (first.tokens / first.ranks)
        found = {**step.bare, SMALL: step.compute - rate * tokens, UPDATE: step.update - update * tokens}
        base = {what: seconds / first.step.seconds for what, seconds in first.step.bare.items()}
        return {what: seconds / step.seconds - base.get(what, 0.0) for what, seconds in found.items()}

    def binds(self, first: "Row") -> str:
        """What costs most of what the first row has and this one has not, in a few words."""
        losses = self.losses(first)
        what = max(losses, key=lambda name: losses[name])
        if self.efficiency(first) > 1 - LOSS:
            return "compute"
        if what in (SMALL, UPDATE):
            return what
        return f"{what}, {'latency' if self.step.latency[what] > 0.5 else 'bandwidth'}"


SMALL, UPDATE = "small micro-batch", "update"
MEANS = {
    SMALL: "micro-batches of {batch} keep a GPU less busy than those of {first}",
    UPDATE: "the update stays as long while the rest shrinks{shared}",
    QUEUE: "the blocks' gradients take longer to send than the backward that they hide behind",
    LAST: "the embeddings' and vectors' gradients come after the backward, and nothing hides them",
    REPORT: "the report is a collective of its own, and the update waits for it",
    GATHER: "the first forward pass waits for parameters",
}
NOT_IN_IT = (
    "not in it: stragglers, other traffic, evaluations, saves, the compute that collectives slow down beside them;\n"
    "from 16 to 128 GPUs published runs lost 2 to 6 points of speed that it does not predict (--published)"
)
COLUMNS = ("GPUs", "micro-steps", "K tokens", "step ms", "compute", "update", "hidden", "bare", "K tokens/s", "MFU",
           "efficiency", "GiB a rank", "hours", "kWh", "binds")  # fmt: skip


def cells(row: Row, first: Row, budget: float, overhead: float) -> list[str]:
    step, share = row.step, row.share
    bare = sum(step.bare.values())
    return [
        f"{row.ranks:,}", f"{share.micro_steps} x {share.batch}", f"{row.tokens / 1e3:,.0f}",
        f"{step.seconds * 1e3:,.2f}", f"{step.compute * 1e3:,.2f}", f"{step.update * 1e3:.2f}",
        f"{step.hidden * 1e3:.2f}", f"{bare * 1e3:.2f}",
        f"{row.speed / 1e3:,.0f}", f"{row.mfu:.1%}", f"{row.efficiency(first):.1%}",
        f"{row.memory / 2**30:.1f}{'' if row.fits else ' (too much)'}", f"{row.hours(budget):,.3g}",
        f"{row.kwh(budget, overhead):,.0f}", row.binds(first),
    ]  # fmt: skip


@dataclass(frozen=True)
class Table:
    """The rows of one scaling; refused: numbers of GPUs that the batch does not divide by, and why."""

    scaling: str
    rows: list[Row]
    refused: dict[int, ConfigError]

    @property
    def bend(self) -> Row | None:
        """The first row below BEND of the smallest world's speed a GPU."""
        return next((row for row in self.rows if row.efficiency(self.rows[0]) < BEND), None)

    def remarks(self) -> list[str]:
        """Where it bends, and why; what keeps the tokens; which numbers of GPUs have no row."""
        first, found = self.rows[0], []
        if (row := self.bend) is not None:
            found.append(
                f"- bends at {row.ranks:,} GPUs: {row.efficiency(first):.1%} of the first row's speed a GPU, by"
            )
            losses = {what: share for what, share in row.losses(first).items() if share > 0.005}
            shared = "" if row.parallel == "zero1" else " (zero1 shares it)"
            for what in sorted(losses, key=lambda name: -losses[name]):
                means = MEANS[what].format(batch=row.share.batch, first=first.share.batch, shared=shared)
                of_it = f", of which latency is {row.step.latency[what]:.0%}" if what in row.step.latency else ""
                found.append(f"  - {losses[what]:.1%} of the step{of_it}: {means}")
        else:
            last = self.rows[-1]
            found.append(
                f"- no bend: {last.efficiency(first):.1%} of the first row's speed a GPU at {last.ranks:,} GPUs"
            )
        if kept := [f"{row.ranks:,} GPUs by {row.share.flags}" for row in self.rows if row.share.flags]:
            found.append(f"- the micro-batches do not divide by the ranks, the sequences do: {'; '.join(kept)}")
        if self.refused:
            n, error = next(iter(self.refused.items()))
            others = f" (nor by {', '.join(f'{m:,}' for m in list(self.refused)[1:])})" if len(self.refused) > 1 else ""
            found.append(f"- {error.what}{others}: {error.expected}, as {error.hint}")
        if too_much := [f"{row.ranks:,}" for row in self.rows if not row.fits]:
            found.append(f"- too much memory for {CHOICES[first.gpu]} less {RESERVE:.0%} on {', '.join(too_much)} GPUs")
        return found


def table_of(run: Run, worlds: Sequence[int], scaling: str) -> Table:
    """Of strong scaling the ranks share the configuration's batch; of weak scaling each keeps the micro-steps that it
    has on a node, or on as many of `worlds` in it as divide them. ConfigError where no row is left."""
    rows, refused, kept = [], {}, None
    if scaling == "weak":
        within = [n for n in worlds if n <= run.fabric.node and run.accumulation % n == 0]
        kept = weak_share(run.batch, run.accumulation, within[-1] if within else worlds[0])
    for ranks in worlds:
        try:
            rows.append(run.row(ranks, kept or strong_share(run.batch, run.accumulation, ranks)))
        except ConfigError as error:
            refused[ranks] = error
    if not rows:
        raise next(iter(refused.values()))
    return Table(scaling, rows, refused)


# ---- the command ----


def rate_of(word: str, shape: GPTConfig, batch: int, micro_steps: int, roof: Roof, gpu: str, recompute: str) -> Rate:
    """--mfu's: measured, floor, or a share of the peak. ConfigError for anything else."""
    if word == "measured":
        carried = "" if gpu == "h100" else f"; supposed of {CHOICES[gpu]}, which has not been timed"
        return replace(MEASURED, source=MEASURED.source + carried)
    if word == "floor":
        return Rate()
    try:
        mfu = float(word)
    except ValueError:
        mfu = math.nan
    if not mfu > 0:
        raise ConfigError("no MFU", where=f"--mfu={word}", expected="a share of the peak, as 0.5; floor; measured")
    return rate_of_mfu(mfu, shape, batch, micro_steps, roof, recompute)


def show_world(args: argparse.Namespace, flags: list[str]) -> None:
    """Print everything of --world, on each of --gpu."""
    worlds, link, parallel = worlds_of(args.world), args.link or "ib", args.parallel or "ddp"
    reduce_dtype, overhead = args.reduce_dtype or "float32", args.overhead or OVERHEAD
    bucket_mb = args.bucket_mb or BUCKET
    config = load_config(["--config", args.config, *flags], prog="python profiling/roofline.py")
    shape, dtype = config.shape(vocab_size_of(config, without_data=GPTConfig.vocab_size)), dtype_of(config)
    for name in ("overhead", "budget", "nic", "bucket_mb"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise ConfigError("out of range", where=f"--{name}={getattr(args, name):g}", expected="more than 0")
    of_run = BatchSchedule.of(config.data).tokens_before(config.optim.max_iters)
    budget, batch, accumulation = args.budget or of_run, config.data.batch_size, config.data.gradient_accumulation_steps
    recompute, drawn = config.system.recompute, []
    for gpu in args.gpu:
        name, roof, joined = CHOICES[gpu], supposed_roof(CHOICES[gpu], args), fabric(link, gpu, args.nic)
        if link == "nvlink" and worlds[-1] > joined.node:
            raise ConfigError(
                f"NVLink joins {joined.node} of {name}",
                where=f"--world {worlds[-1]} --link=nvlink",
                expected=f"at most {joined.node} GPUs",
                hint="--link=ib, or ethernet, between nodes",
            )
        run = Run(
            gpu=gpu, shape=shape, batch=batch, accumulation=accumulation, roof=roof, fabric=joined,
            rate=rate_of(args.mfu or "measured", shape, batch, accumulation, roof, gpu, recompute), parallel=parallel,
            reduce_bytes=FULL if reduce_dtype == "float32" else HALF, recompute=recompute,
            memory=plan_of(config, shape, select_ops(config.system.kernels, "cuda", expected(GPUS[name].capability)),
                           dtype, GPUS[name]),
            bucket_mb=bucket_mb,
        )  # fmt: skip
        groups = buckets(shape, bucket_mb)
        print(f"{args.config} on {rates(name, roof, args)}\n"
              f"compute:  {run.rate.source}\n"
              f"network:  {in_words(link, joined)}; NCCL's own constants (interconnect.py)\n"
              f"sent:     {parallel}, {reduce_dtype} gradients in {len(groups)} buckets of blocks and a last "
              f"one; {run.step(worlds[-1], Share(batch, 1)).sent / 1e9:.2f} GB a rank and step\n"
              f"budget:   {budget:,.0f} tokens; {BOARDS[gpu].watts} W a GPU (data sheet) times {overhead:g} for "
              "what is around it (an assumption)")  # fmt: skip
        for scaling in (args.scaling,) if args.scaling else ("strong", "weak"):
            table = table_of(run, worlds, scaling)
            first = table.rows[0]
            shared = f"{first.tokens:,} tokens an iteration, shared by all"
            each = f"{first.tokens // first.ranks:,} tokens an iteration for each GPU"
            print(f"\n{scaling} scaling: {shared if scaling == 'strong' else each}\n")
            print_beside(list(COLUMNS), [cells(row, first, budget, overhead) for row in table.rows])
            print("\n" + "\n".join(table.remarks()))
            drawn.append((f"{gpu}, {scaling}", table))
        print(f"\n{NOT_IN_IT}\n")
    if args.plot:
        from scaling_plot import draw

        Path(args.plot).write_bytes(draw(drawn))
        print(f"wrote {args.plot}")
