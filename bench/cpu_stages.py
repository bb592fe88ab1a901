"""What bench/run.py runs on a machine without a GPU, in order of value, and what it can then not show."""

import sys
from pathlib import Path

import machine
from gpu_stages import SECONDS, Stage

JOB = ("--device=cpu", "--config=shakespeare_char_cpu", "--vocab_size=65")  # nanoGPT README's CPU command
WRAPPED = ("nanogpt+fabric", "nanogpt+accelerate", "hf+fabric", "hf+accelerate")
CANNOT = (
    "the Triton kernels, which need a CUDA GPU: on a CPU the trainer runs the reference ops",
    "CUDA graphs, launch gaps, communication, joules a token",
    "MFU against a data sheet: a CPU's is against its own measured product",
)


def cpu_stages(out: Path, quick: bool, peers: bool) -> list[Stage]:
    """quick: fewer arms and rounds, under five minutes on two cores. Without peers ours alone."""

    def stage(name: str, seconds: tuple[float, float], script: str, *args: str) -> Stage:
        command = [sys.executable, str(machine.ROOT / "bench" / script), *args, "--out", str(out)]
        return Stage(name, command, seconds[0] if quick else seconds[1], suite=name.partition("-")[0])

    def arms(*ours: str, theirs: tuple[str, ...] = (), compiled: tuple[str, ...] = ()) -> list[str]:
        return ["--arms", *ours, *(theirs if peers else ()), *(() if quick else compiled)]

    step = ("step.py", *JOB, "--total_s", SECONDS, "--rounds")
    ops = ("ops.py", "--device=cpu", "--dtype=float32", "--sizes=cpu", "--peers", "all" if peers else "none")
    fast, alone = ["--quick"] if quick else [], [] if peers else ["--arms", "ours", "ours, no cache"]
    compiled = ("reference+compile", "nanogpt+compile") if peers else ("reference+compile",)
    found = [
        stage("environment", (40, 60), "environment.py", "--device=cpu", "--seconds", "8" if quick else "30"),
        stage("step", (70, 400), *step, "10" if quick else "20",
              *arms("reference", theirs=("nanogpt", "hf"), compiled=compiled)),
        stage("profile", (60, 60), "profile_stage.py", *JOB),
        stage("step-trainers", (100, 400), *step, "5" if quick else "20", *arms("nanogpt", theirs=(*WRAPPED, "hf"))),
        stage("sample", (45, 180), "sampling.py", *JOB, *fast, *alone),
        stage("loader", (40, 180), "loader.py", *fast),
        stage("ops", (60, 600), *ops, *(["--no_compile", "--rounds=5"] if quick else [])),
        stage("train", (90, 1500), "against_nanogpt.py", *arms("ours", theirs=("nanogpt",)),
              *(["--iterations=200", "--rounds=1"] if quick else [])),
    ]  # fmt: skip
    return [one for one in found if peers or one.name != "step-trainers"]
