"""roofline.py's --config: what a step of a configuration launches on each GPU, the floor of each launch, and the bytes
beside the plan's."""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import byte_plan
import torch
from built_step import vocab_size_of
from measured_roof import Roof
from roofline import CHOICES, SPEED, floor_of, print_beside, rates, speed, speed_cells, supposed_roof
from step_launches import Launch, Launches, recorded
from work import Work

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.gpus import GPUS
from nanogpt_fast.settings.cli import load_config
from nanogpt_fast.settings.config import Config, GPTConfig

SMALL = 1e-3  # of a step's floor: torch's kernels below it share a line


@dataclass(frozen=True)
class Sum:
    """Launches together: how many, their work, and the seconds of each one's own floor added up."""

    launches: int = 0
    work: Work = Work()
    seconds: float = 0.0

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(self.launches + other.launches, self.work + other.work, self.seconds + other.seconds)

    def cells(self) -> list[str]:
        numbers = self.work.flops / 1e12, self.work.bytes / 1e9, self.seconds * 1e3
        return [f"{self.launches:,}", f"{numbers[0]:.2f}", f"{numbers[1]:.2f}", f"{numbers[2]:.3f}"]


CELLS = ("launches", "TFLOP", "GB", "floor ms")


def summed(launches: Counter[Launch], roof: Roof) -> Sum:
    """Of all of them."""
    found = Sum()
    for one, times in launches.items():
        w = one.work
        work = Work(w.flops * times, w.bytes * times, w.exps * times)
        found += Sum(times, work, floor_of(w, roof)[0] * times)
    return found


def lines(found: Launches, micro_steps: int, roof: Roof) -> Iterator[list[str]]:
    """A row a kind of launch, dearest first: its cells of a step, launches a micro-step, what binds it."""
    step = found.step(micro_steps)
    total = summed(step, roof)
    groups: dict[tuple[str, str], Counter[Launch]] = {}
    for one, times in step.items():
        small = one.kind == "torch" and floor_of(one.work, roof)[0] * times < SMALL * total.seconds
        groups.setdefault((one.kind, "small ones" if small else one.name), Counter())[one] = times
    sums = {key: summed(group, roof) for key, group in groups.items()}
    for (kind, name), of in sorted(sums.items(), key=lambda pair: -pair[1].seconds):
        often = sum(found.micro_step[one] for one in groups[kind, name])
        yield [f"{kind}: {name}", f"{often:,}", *of.cells(), f"{of.seconds / total.seconds:.1%}",
               floor_of(of.work, roof)[1]]  # fmt: skip
    parts = summed(found.micro_step, roof)
    yield ["a step", f"{parts.launches:,}", *total.cells(), "100.0%", ""]


def print_plan(config: Config, shape: GPTConfig, step: Counter[Launch]) -> None:
    """The bytes of a step's launches beside byte_plan.PLAN's, by group."""
    rows = []
    groups = byte_plan.compared(step, shape, config.tokens_per_iter)
    for group, (launched, planned) in groups.items():
        ratio = f"{launched / planned:.3f}" if planned else "-"
        rows.append([group, f"{launched / 1e9:,.1f}", f"{planned / 1e9:,.1f}", ratio])
    print_beside(["bytes", "launched GB", "planned GB", "ratio"], rows)
    launched, planned = groups["total"]
    over = launched > byte_plan.LIMIT * planned
    apart = any(one.name == "bias_gelu_fwd" for one in step)
    hint = "; --gelu inside shows the rows' other choice" if apart else ""
    print(f"\n{'OVER' if over else 'within'} the limit of {byte_plan.LIMIT} of the plan{hint if over else ''}")


def dtype_of(config: Config) -> torch.dtype:
    """bfloat16 for `auto`; ConfigError for float32, of which gpus.py has no peak."""
    name = "bfloat16" if config.system.dtype == "auto" else config.system.dtype
    if name == "float32":
        raise ConfigError(
            "the data sheets' peaks are of 16-bit products", where="dtype = float32", hint="--dtype=bfloat16"
        )
    return getattr(torch, name)


def show_config(args: argparse.Namespace, flags: list[str]) -> None:
    """Print everything for --config and the flags after it, on each of --gpu."""
    config = load_config(["--config", args.config, *flags], prog="python profiling/roofline.py")
    shape, dtype = config.shape(vocab_size_of(config, without_data=GPTConfig.vocab_size)), dtype_of(config)
    micro_steps, tokens = config.data.gradient_accumulation_steps, config.tokens_per_iter
    fused = None if args.gelu is None else args.gelu == "inside"
    record = cache(lambda arch: recorded(config, shape, dtype, arch, fused))
    print(f"{args.config}: {micro_steps} x {config.data.batch_size} x {shape.block_size} = {tokens:,} tokens a step, "
          f"vocabulary {shape.vocab_size:,}, {str(dtype).removeprefix('torch.')}")  # fmt: skip
    rows = []
    for gpu in args.gpu:
        name, roof = CHOICES[gpu], supposed_roof(CHOICES[gpu], args)
        arch = GPUS[name].capability or 0
        found = record(arch)
        step = found.step(micro_steps)
        whole, micro = summed(step, roof), summed(found.micro_step, roof)
        if len(args.gpu) == 1:
            print(f"{rates(name, roof, args)}; sm_{arch}'s launch rows\n")
            print_beside(["of a step", "a micro-step", *CELLS, "share", "bound"], [*lines(found, micro_steps, roof)])
            print(f"\na micro-step: {in_words(micro)}\nonce a step:  {in_words(summed(found.once, roof))}\n"
                  f"a step:       {in_words(whole)}\n"
                  f"{speed(shape, tokens, whole.seconds, gpu)}. A bound, not a measurement.\n")  # fmt: skip
            print_plan(config, shape, step)
            if args.compiled:
                from compiled_step import show_compiled  # after the rest is shown: it compiles for up to a minute

                show_compiled(found, micro_steps, arch, name, config.data.batch_size, args.measured)
        launched, planned = byte_plan.compared(step, shape, tokens)["total"]
        rows.append([gpu, f"sm_{arch}", *micro.cells(), *whole.cells(), f"{launched / planned:.3f}",
                     *speed_cells(shape, tokens, whole.seconds, gpu)])  # fmt: skip
    if len(args.gpu) > 1:
        header = ["GPU", "rows", *(f"{cell}{of}" for of in (" of a micro-step", "") for cell in CELLS)]
        print()
        print_turned([*header, "bytes / plan", *SPEED], rows)


def in_words(of: Sum) -> str:
    launches, tflop, gb, ms = of.cells()
    return f"{launches} launches, {tflop} TFLOP, {gb} GB, {ms} ms at least"


def print_turned(header: list[str], rows: list[list[str]]) -> None:
    """A column a row."""
    columns = [list(column) for column in zip(header, *rows)]
    print_beside(columns[0], columns[1:])
