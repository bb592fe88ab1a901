"""The best size of a budget, by runs of our own: isoFLOP curves, each point at its own best learning rate.

    python bench/isoflop.py                    the grid: budgets, sizes, what is done and what is left
    python bench/isoflop.py --run              runs it; Ctrl-C keeps what is done, the same command goes on
    python bench/isoflop.py --report           the fits of what is there
    python bench/isoflop.py --run --config gpt2_124m --dataset openwebtext --out DIR \\
        --budgets 1e17 4e17 1.6e18 --shapes 4x256x4 6x384x6 8x512x8 12x768x12 --rates 6e-4 1.2e-3 2.4e-3     on a GPU

Each size is trained with each budget's FLOPs (nanoGPT's count, attention with it), as `python -m nanogpt_fast.train` in
a process of its own: first one seed at every rate, and at half or twice the best where that is at an end; then the
other seeds at the best. So what a size is worth is not mixed up with how well one rate suits it (arXiv 2406.19146). A
size that would see the text more than PASSES times is left out. Runs, keys and results are bench/ablate.py's;
docs/isoflop.md is made of them by bench/isoflop_page.py.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ablate
import ablation_texts
import isoflop_report
import machine
from ablation_study import FIRST_SEED, POINTS, SMALL, Arm, Run

from nanogpt_fast.columns import columns
from nanogpt_fast.command import run_command
from nanogpt_fast.data.dataset import read_meta
from nanogpt_fast.errors import ConfigError
from nanogpt_fast.hardware import flops_per_token

NAME = "isoflop"
RESULTS = machine.ROOT / "bench/results/scaling"
# At SMALL: {FLOPs: shapes, layers x width, around the best}; the preset's four heads throughout.
GRID = {
    4e10: "2x8 2x12 2x16 2x20 2x24",
    1e11: "2x12 2x16 2x20 2x24 2x32 2x40",
    2.5e11: "2x16 2x20 2x24 2x32 2x40 2x48",
    6.3e11: "2x20 2x24 2x32 2x40 2x48 3x48",
    1.6e12: "2x24 2x32 2x40 2x48 3x48 3x64",
    4e12: "2x40 2x48 3x48 3x64 4x64 4x80",
}
SIDES = ("n_layer", "n_embd", "n_head")  # of a shape; without its last the heads are the preset's
RATES = (6e-3, 1.2e-2, 2.4e-2)
PASSES = 2.0


@dataclass(frozen=True, eq=False)
class Point:
    """A size and a budget. flops, tokens: of the whole run; params: all, as the laws count them."""

    budget: float
    shape: str
    params: int
    flops: float
    tokens: int
    flags: dict[str, Any]

    def run(self, rate: float, seed: int) -> Run:
        flags = {**self.flags, "learning_rate": rate, "min_lr": rate / 10}
        return Run(NAME, Arm(f"{self.budget:g} {self.shape} {rate:g}", flags), seed, flags)

    def row(self, unique: int) -> dict[str, Any]:
        """What results have of it, of a text of so many tokens."""
        of_text = round(self.tokens / unique, 4)
        return {
            "budget": self.budget,
            "shape": self.shape,
            "params": self.params,
            "flops": self.flops,
            "of_text": of_text,
        }


Trial = tuple[Point, float, int]  # a point, a rate, a seed


def point(budget: float, shape: str, args: argparse.Namespace) -> Point:
    """What a run of that shape comes to. ConfigError for a shape that is none, and for a budget of too few
    iterations."""
    numbers = shape.split("x")
    if len(numbers) not in (2, 3) or not all(number.isdigit() for number in numbers):
        raise ConfigError("a shape is LAYERSxWIDTH or LAYERSxWIDTHxHEADS", where=f"--shapes {shape}", expected="2x32")
    common = {"eval_mode": "full", "log_interval": 50, "always_save_checkpoint": False, "data_order": "shuffle"}
    flags = {**common, "dataset": args.dataset or "stdlib", **dict(zip(SIDES, map(int, numbers)))}
    config = ablate.config_of(flags, args)
    model = ablate.shape_of(config)
    a_step = config.data.batch_size * config.data.block_size * config.data.gradient_accumulation_steps
    each = flops_per_token(model)["nanogpt"]
    iters = max(1, round(budget / (each * a_step) / POINTS)) * POINTS
    flags |= {"max_iters": iters, "lr_decay_iters": iters, "warmup_iters": iters // 20, "eval_interval": iters}
    tokens = iters * a_step
    if abs(each * tokens / budget - 1) > 0.05:
        least = f">= {each * a_step * POINTS * 10:.2g} FLOPs, or a smaller batch"
        raise ConfigError("the budget is no run of that size", where=f"{budget:g} FLOPs, {shape}", expected=least)
    return Point(budget, shape, model.num_params(non_embedding=False), each * tokens, tokens, flags)


def grid(args: argparse.Namespace) -> list[Point]:
    """Budgets times their shapes."""
    listed = {b: args.shapes or GRID.get(b, "").split() for b in args.budgets or GRID}
    return [point(budget, shape, args) for budget, shapes in listed.items() for shape in shapes]


def unique_tokens(args: argparse.Namespace) -> int:
    """Of the training split. ConfigError for a dataset that does not say."""
    folder = ablation_texts.ensure(args.dataset or "stdlib", Path(args.data_dir))
    meta = read_meta(folder)
    if meta is None or "train" not in meta.splits:
        raise ConfigError("the dataset does not say how many tokens it has", where=str(folder), hint="prepare it anew")
    return meta.splits["train"].tokens


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="make the runs that are not there")
    parser.add_argument("--report", action="store_true", help="fits of what is there; runs nothing")
    parser.add_argument("--budgets", type=float, nargs="+", metavar="FLOPS", help="default the grid's")
    parser.add_argument("--shapes", nargs="+", metavar="LxW", help="layers x width, and x heads where not the preset's")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates to begin with")
    parser.add_argument("--seeds", type=int, default=2)
    ablate.add_place(parser, RESULTS)
    args = parser.parse_args(argv)
    own = (args.config != SMALL or args.dataset) or not set(args.budgets or GRID) <= set(GRID)
    if own and not (args.budgets and args.shapes):
        raise ConfigError("the grid is made for its own preset, text and budgets", expected="--budgets and --shapes")
    if args.seeds < 1 or min([*args.rates, *(args.budgets or [1.0])]) <= 0:
        raise ConfigError("a number is out of range", expected="--seeds >= 1, rates and budgets > 0")
    args.before = ""
    return ablate.settled(args)


def listing(points: Sequence[Point], unique: int) -> list[str]:
    rows = [
        [isoflop_report.flops(one.budget), one.shape, f"{one.params:,}", f"{one.tokens / 1e6:.2f}M",
         f"{one.tokens / unique:.2f}"]
        for one in points
    ]  # fmt: skip
    return columns([["FLOPs", "shape", "N", "D", "passes"], *rows])


def settled_losses(path: Path) -> dict[str, float]:
    """{key: loss, infinite where it diverged} of the runs that are there."""
    rows = [row for row in machine.read_lines(path) if row.get("status") in ablate.SETTLED]
    return {row["key"]: row["val_loss"] if row["status"] == "ok" else math.inf for row in rows}


def best_rate(losses: dict[float, float]) -> float | None:
    """None as long as a run is missing, and where all diverged."""
    if any(math.isnan(loss) for loss in losses.values()) or min(losses.values()) == math.inf:
        return None
    return min(losses, key=lambda rate: losses[rate])


def rate_beyond(losses: dict[float, float]) -> float | None:
    """Half or twice the best rate where that is at an end of several; None where it is between others."""
    best = best_rate(losses)
    if best is None or len(losses) == 1:
        return None
    return best / 2 if best == min(losses) else best * 2 if best == max(losses) else None


def main(argv: list[str]) -> int:
    args = parsed(argv)
    path = args.out / f"{NAME}.jsonl"
    if args.report:
        print("\n".join(isoflop_report.text(machine.read_lines(path))))
        return 0
    unique = unique_tokens(args)
    points = [one for one in grid(args) if one.tokens <= PASSES * unique]
    if not args.run:
        print("\n".join(listing(points, unique)))

    def stage(title: str, trials: list[Trial]) -> Iterator[tuple[Trial, float]]:
        """Makes the trials with --run. Each, and its loss: infinite where it diverged, nan where it is not there."""
        made = {one.run(rate, seed).arm.name: one.row(unique) for one, rate, seed in trials}
        keyed = ablate.keyed([one.run(rate, seed) for one, rate, seed in trials], args)
        done = settled_losses(path)
        print(f"{title}: {sum(key in done for _, _, key in keyed)} of {len(keyed)} runs are there")
        if args.run:
            left = [one for one in keyed if one[2] not in done]
            ablate.all_of_them(left, args, lambda run: made[run.arm.name])
            done = settled_losses(path)
        return zip(trials, (done.get(key, math.nan) for _, _, key in keyed))

    losses: dict[Point, dict[float, float]] = {one: {} for one in points}
    trials = [(one, rate, FIRST_SEED) for one in points for rate in args.rates]
    while trials:
        for (one, rate, _), loss in stage("one seed", trials):
            losses[one][rate] = loss
        trials = [(one, rate, FIRST_SEED) for one, of in losses.items() if (rate := rate_beyond(of))]
    seeds = range(FIRST_SEED + 1, FIRST_SEED + args.seeds)
    best = [(one, rate) for one, of in losses.items() if (rate := best_rate(of))]
    stage("the other seeds, at the best rate", [(one, rate, seed) for seed in seeds for one, rate in best])
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main, again="finished runs are kept; the same command goes on with the rest")
