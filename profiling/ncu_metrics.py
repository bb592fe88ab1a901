"""Nsight Compute's metrics of each Triton kernel of an op, or of a training step, by nsight-python.

    python profiling/ncu_metrics.py norm [--sizes 124m 350m] [--batch 64] [--metrics NAME ...] [--csv FILE]
    python profiling/ncu_metrics.py step --config gpt2_124m [--flag=value ...]

Not run on a GPU yet. It needs one, Nsight Compute 2026.2.1 or later, and `pip install nsight-python` (written against
1.1.0, of whose documented calls it makes analyze.kernel, annotate and to_dataframe). An annotation there holds one
kernel: Triton's launch hooks open one around each launch, so cuBLAS's products and torch's kernels are in none and are
not measured (docs/profiling.md has ncu itself for those). An op runs forward and backward on random input of GPT-2's
sizes; a step is one micro-step and the update, on random tokens, with --kernels=triton. Everything runs once unmeasured
first, for Triton to compile.

Metrics are those of `ncu --query-metrics`. "ERR_NVGPUCTRPERM" means that counters need root, or
NVreg_RestrictProfilingToAdminUsers=0.
"""
# Not nsight.py: a script's folder comes first on the path, and `import nsight` would find the script.

import argparse
import importlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import op_inputs
import torch
from torch import Tensor

from nanogpt_fast.command import run_command
from nanogpt_fast.errors import DeviceError
from nanogpt_fast.settings.cli import load_config

OPS = ("embedding", "norm", "add_norm", "dropout_add", "attention", "qkv_attention", "mlp", "bias_gelu",
       "linear_cross_entropy", "cross_entropy", "grad_norm", "adamw_")  # fmt: skip
METRICS = ["gpu__time_duration.sum", "dram__bytes.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
           "sm__throughput.avg.pct_of_peak_sustained_elapsed"]  # fmt: skip
SHOWN = ["Annotation", "size", "Metric", "AvgValue", "Unit", "RelativeStdDevPct"]  # of to_dataframe's columns

Run = Callable[[str], None]  # launches everything once, at a size


# ---- what runs ----


def op_run(op: str, batch: int, dtype: torch.dtype) -> Run:
    """The op forward and backward, on the current GPU; a size is a GPT-2's."""
    import nanogpt_kernels

    function = getattr(nanogpt_kernels, op)

    @cache
    def arguments(size: str) -> tuple[Any, ...]:
        return getattr(op_inputs, op)(op_inputs.Setting(op_inputs.gpt2(size, batch), dtype, main_grad=True))

    def run(size: str) -> None:
        out = function(*arguments(size))
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, Tensor) and o.requires_grad]
        if outs:
            torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])

    return run


def step_run(flags: Sequence[str]) -> Run:
    """One micro-step and the update of the configuration that the flags ask for; the size is only its name."""
    import built_step

    built = built_step.build(load_config(["--kernels=triton", *flags], prog="python profiling/ncu_metrics.py step"))
    return lambda _: built.step(built.batch[:1], 0) and None


# ---- how it is measured ----


def checked() -> Any:
    """The package nsight. DeviceError where it, Nsight Compute or a GPU is missing."""
    where = "profiling/ncu_metrics.py"
    try:
        nsight = importlib.import_module("nsight")
    except ImportError as error:
        raise DeviceError(
            f"nsight-python cannot be imported: {error}", where=where, expected="nsight-python 1.1 or later",
            hint="pip install nsight-python",
        ) from None  # fmt: skip
    if shutil.which("ncu") is None:
        raise DeviceError(
            "Nsight Compute's ncu is not on the PATH", where=where, expected="ncu 2026.2.1 or later",
            hint="install Nsight Compute (the CUDA toolkit 13.3 has it), or add its folder to PATH",
        )  # fmt: skip
    if not torch.cuda.is_available():
        raise DeviceError(
            "ncu measures kernels on a CUDA GPU, and torch sees none", where=where,
            expected="torch.cuda.is_available()",
            hint="python profiling/roofline.py counts bytes and FLOPs without one",
        )  # fmt: skip
    return nsight


@contextmanager
def annotated_launches(nsight: Any) -> Iterator[None]:
    """Within it each Triton launch has an annotation of its own, named by its place in the order and its kernel."""
    from triton import knobs

    opened, order = [], iter(range(10**9))

    def enter(metadata: Any) -> None:
        opened.append(nsight.annotate(f"{next(order):03d} {metadata.get()['name']}"))
        opened[-1].__enter__()

    def leave(metadata: Any) -> None:
        opened.pop().__exit__(None, None, None)

    knobs.runtime.launch_enter_hook.add(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    try:
        yield
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
        knobs.runtime.launch_exit_hook.remove(leave)


def collected(nsight: Any, run: Run, sizes: Sequence[str], metrics: Sequence[str], runs: int) -> Any:
    """nsight-python's data frame: a row a kernel, size and metric. DeviceError for what ncu refuses."""
    for size in sizes:
        run(size)
    torch.cuda.synchronize()

    @nsight.analyze.kernel(configs=[(size,) for size in sizes], metrics=list(metrics), runs=runs)
    def launches(size: str) -> None:
        # nsight-python keeps the names in use for each thread, so backward may not launch from one of its own
        with annotated_launches(nsight), torch.autograd.set_multithreading_enabled(False):
            run(size)

    failures = nsight.exceptions
    refused = (failures.ProfilerException, failures.NCUNotAvailableError, failures.ThermalControlError)
    try:
        return launches().to_dataframe()
    except refused as error:
        raise DeviceError(
            f"Nsight Compute did not measure: {error}",
            where=f"--metrics {' '.join(metrics)}",
            hint="ncu --query-metrics lists the metrics; counters may need root (docs/profiling.md)",
        ) from error


def parsed(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and for `step` the flags of its configuration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=[*OPS, "step"], metavar="WHAT", help=f"step, or one of {', '.join(OPS)}")
    parser.add_argument("--sizes", nargs="+", choices=op_inputs.GPT2, default=["124m"], help="of an op (default 124m)")
    parser.add_argument("--batch", type=int, default=8, help="of an op: sequences of 1024 tokens (default 8)")
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of an op")
    parser.add_argument("--metrics", nargs="+", default=METRICS, help=f"default: {' '.join(METRICS)}")
    parser.add_argument("--runs", type=int, default=3, help="of each size (default 3)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the whole table there as well")
    args, flags = parser.parse_known_args(argv)
    if args.what != "step" and flags:
        parser.error(f"unknown: {' '.join(flags)} (only `step` takes train's flags)")
    if args.batch < 1 or args.runs < 1:
        parser.error("--batch and --runs: at least 1")
    return args, flags


def main(argv: list[str]) -> None:
    args, flags = parsed(argv)
    nsight = checked()
    if args.what == "step":
        run, sizes = step_run(flags), ["step"]
    else:
        run, sizes = op_run(args.what, args.batch, getattr(torch, args.precision)), args.sizes
    found = collected(nsight, run, sizes, args.metrics, args.runs)
    print(found.to_string(columns=SHOWN, index=False))
    if args.csv:
        found.to_csv(args.csv, index=False)
        print(f"written to {args.csv}")


if __name__ == "__main__":
    run_command(main)
