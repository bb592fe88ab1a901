"""The stages of bench/gpu_session.py in order of value: each a command for a GPU, and one to rehearse it on the CPU."""

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import machine
from step import SWITCHED
from warm_cache import RACED

BENCH, TESTS = machine.ROOT / "bench", machine.ROOT / "tests"
SECONDS = "{seconds}"  # in a stage's command: the time it is given, less 15 s to start and to end in
DEAREST = "{dearest}"  # in a stage's command: the launch ops of the dearest kernels in the profiled step
SHIPPED = (  # with the launch rows as they are, each op in each dtype; other tests make tiles small
    "test_triton_model.py::test_loss_and_every_gradient",  # all that a model is built from
    *(f"test_attention_shipped.py::test_bfloat16[300-64-{form}-{masks}]"
      for form in ("deterministic", "atomic") for masks in ("plain", "documents and dropout")),
    "test_attention_shipped.py::test_float32[64-plain]",
    "test_attention_shipped.py::test_float16",
    "test_cross_entropy.py::test_gpt2_s_vocabulary_by_the_shipped_tiles",
    *(f"test_norm.py::test_widths[768-torch.{dtype}]" for dtype in ("float32", "bfloat16", "float16")),
    "test_adamw.py::test_parameters_are_the_rounded_master",
    *(f"test_adamw.py::test_norm[1500-torch.{dtype}]" for dtype in ("float32", "bfloat16", "float16")),
    *(f"test_mlp.py::test_main_grad[torch.{dtype}-fused]" for dtype in ("bfloat16", "float16")),
    *(f"test_qkv_attention.py::test_cached_equals_whole[mixed-torch.{dtype}]"
      for dtype in ("float32", "bfloat16", "float16")),
)  # fmt: skip
SLICES = {  # of the GPU tests, by the beginning of the file's name; what no slice takes comes last
    "attention": ("attention", "cached_attention", "qkv"),
    "cross_entropy": ("cross_entropy", "linear_cross_entropy"),
    "norm": ("norm", "add_norm"),
    "mlp": ("mlp", "bias_gelu", "gemm"),
    "embedding_adamw": ("embedding", "adamw", "grad_norm"),
}


@dataclass(frozen=True)
class Stage:
    """command: in a process of its own, from the repository's root. missing: why it cannot run here. rehearsal: the
    command for the CPU. env: a variable that is None is unset. suite: of bench/run.py."""

    name: str
    command: Sequence[str]
    limit_s: float
    least_s: float = 15.0  # not worth starting with less
    env: dict[str, str | None] = field(default_factory=dict)
    missing: str = ""
    rehearsal: Sequence[str] = ()
    suite: str = "kernels"  # of bench/run.py


def gpu_test_slices() -> dict[str, list[str]]:
    """{slice: files} of tests that run on a GPU: those of the Triton ops (tests/ops), and those marked so."""
    found: dict[str, list[str]] = {name: [] for name in (*SLICES, "others")}
    for path in sorted(TESTS.rglob("test_*.py")):
        if path.parent != TESTS / "ops" and "mark.gpu" not in path.read_text():
            continue
        stem = f"{path.stem.removeprefix('test_')}."
        name = next((name for name, starts in SLICES.items() if stem.startswith(starts)), "others")
        found[name].append(str(path.relative_to(machine.ROOT)))
    return {name: files for name, files in found.items() if files}


def shipped_tests() -> list[str]:
    """SHIPPED as pytest takes them."""
    found = []
    for test in SHIPPED:
        file, _, name = test.partition("::")
        found.append(f"{next(TESTS.rglob(file)).relative_to(machine.ROOT)}::{name}")
    return found


def captured_tests() -> list[str]:
    """The tests of CUDA graphs: the step, evaluations, decoding."""
    return [str(path.relative_to(machine.ROOT)) for path in sorted(TESTS.glob("test_*_gpu.py"))]


def all_stages(out: Path, arch: int = 90, ptxas: Path | None = None, sanitizer: Path | None = None) -> list[Stage]:
    """In order of value. ptxas: an assembler to take instead of Triton's own, and to race beside it."""

    def script(name: str, *args: str) -> list[str]:
        return [sys.executable, str(BENCH / name), *args, "--out", str(out)]

    def pytest(*args: str) -> list[str]:
        own = ["-p", "no:cacheprovider", "-p", "pytest_stage", "--results", str(out / "tests.jsonl")]
        return [sys.executable, "-m", "pytest", "-rfE", "--tb=short", *own, *args]

    def small(name: str, batch_size: int) -> Stage:
        return Stage(name, script("step.py", f"--batch_size={batch_size}", "--rounds=3", "--total_s", SECONDS, "--arms",
                                  "triton+graph", "triton"), 45, suite="step",
                     rehearsal=script("step.py", *on_cpu, *one_step, "--batch_size=1", "--arms", "triton"))  # fmt: skip

    on_cpu, one_step = ("--device=cpu", "--dtype=float32"), ("--tiny", "--accumulation=1", "--warmup=0", "--steps=1")
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # a test's time is compiling: on several cores
    on_gpu = ["-m", "gpu", "--maxfail=40", *parallel]  # so many failures say enough, and a GPU's minutes are few
    tool = sanitizer or shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    memcheck = [str(tool or "compute-sanitizer"), "--tool", "memcheck", "--error-exitcode", "9"]
    race = ("race.py", "--device=cpu", "--dtype=float32", "--size=tiny", "--repeats=2", "--ballast_mb=0")
    checked = ("ops.py", "norm", "--check", "--sizes=tiny", *on_cpu)
    ops, run = ("ops.py", "--resume", "--sizes"), ("against_nanogpt.py", "--job")
    triton = importlib.util.find_spec("triton")
    own = Path(triton.origin if triton and triton.origin else "").parent / "backends/nvidia/bin"  # Triton's assemblers
    ours: dict[str, str | None] = {
        "TRITON_PTXAS_PATH": f"{own}/ptxas",
        "TRITON_PTXAS_BLACKWELL_PATH": f"{own}/ptxas-blackwell",
    }
    tests = [
        Stage(f"tests-{name}", pytest(*on_gpu, *files), 150, rehearsal=pytest("--collect-only", *files))
        for name, files in gpu_test_slices().items()
    ]
    stages = [
        Stage("environment", script("environment.py"), 30, suite="environment",
              rehearsal=script("environment.py", "--device=cpu", "--seconds=2")),
        Stage("compile", script("warm_cache.py", f"--arch={arch}", "--total_s=30"), 45, suite="compile",
              rehearsal=script("warm_cache.py", "--parts=race", "--most=2")),
        Stage("step", script("step.py", "--profile", "--total_s", SECONDS, "--arms", *SWITCHED), 80, suite="step",
              rehearsal=script("step.py", "--profile", *on_cpu, *one_step, "--batch_size=1", "--arms", "triton")),
        Stage("ops", script(*ops, "124m", "--peers", "none", "--no_compile"), 90, suite="ops",
              rehearsal=script(*checked, "--peers=none")),
        Stage("shipped", pytest(*on_gpu, *shipped_tests()), 60,
              rehearsal=pytest("-k", "test_widths and float32", *shipped_tests())),
        Stage("captured", pytest(*on_gpu, *captured_tests()), 60,
              rehearsal=pytest("--collect-only", *captured_tests())),
        small("step-small", 4),
        Stage("race", script("race.py", *RACED), 40, rehearsal=script(*race, "embedding")),
        Stage("race-own-ptxas", script("race.py", *RACED), 40, env=ours, rehearsal=script(*race, "norm"),
              missing="" if ptxas else "needs a second assembler: --ptxas PATH"),
        Stage("memcheck", [*memcheck, *script("memcheck.py")], 45, rehearsal=script("memcheck.py", *on_cpu, "--most=1"),
              missing="" if tool else "compute-sanitizer is not installed: --sanitizer PATH",
              env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),  # else it sees one large allocation, not a tensor's end
        Stage("tune", script("tune.py", DEAREST, "--total_s", SECONDS), 90, least_s=45,
              rehearsal=script("tune.py", "adamw", "--dry_run")),
        Stage("step-peers", script("step.py", "--total_s", SECONDS, "--arms", "triton", "nanogpt+compile",
                                   "reference+compile"), 120, suite="step",
              rehearsal=script("step.py", *on_cpu, *one_step, "--arms", "reference", "nanogpt")),
        Stage("profile", script("profile_stage.py"), 60, suite="profile",
              rehearsal=script("profile_stage.py", "--device=cpu", "--tiny", "--steps=2")),
        small("step-16", 16),
        *(Stage(f"train-{job}", script(*run, job, "--rounds=1", "--arms", "ours", "nanogpt"), 260, least_s=90,
                suite="train", missing="" if importlib.util.find_spec("tyro") else "needs tyro",
                rehearsal=script(*run, job, "--dry_run"))
          for job in ("gpt2_124m", "shakespeare_char")),
        Stage("peers", script(*ops, "124m"), 180, suite="ops", rehearsal=script(*checked, "--peers=pytorch")),
        *tests,
        Stage("race-all", script("race.py"), 120, rehearsal=script(*race, "grad_norm")),
        Stage("race-dropout", script("race.py", "--p=0.1", "--repeats=300"), 90,
              rehearsal=script(*race, "dropout_add", "--p=0.1")),
        Stage("ops-1558m", script(*ops, "1558m"), 180, suite="ops",
              rehearsal=script(*checked, "--peers=pytorch", "--no_bias")),
        *(Stage(f"step-{size}", script("step.py", "--config", f"gpt2_{size}", "--total_s", SECONDS, "--arms", "triton",
                                       "nanogpt+compile"), 150, suite="step",
                rehearsal=script("step.py", "--config", f"gpt2_{size}", *on_cpu, *one_step, "--arms", "reference"))
          for size in ("350m", "774m", "1558m")),
        Stage("sample", script("sampling.py", "--quick"), 90, suite="sample",
              rehearsal=script("sampling.py", "--device=cpu", "--tiny", "--arms", "ours", "ours, no cache")),
        Stage("loader", script("loader.py", "--quick"), 60, suite="loader", rehearsal=script("loader.py", "--tiny")),
    ]  # fmt: skip
    named = assembled_by(ptxas) if ptxas else {}
    return [replace(stage, env={**named, **stage.env}) for stage in stages]


def assembled_by(ptxas: Path) -> dict[str, str | None]:
    """The environment in which Triton takes this assembler."""
    return {"TRITON_PTXAS_PATH": str(ptxas), "TRITON_PTXAS_BLACKWELL_PATH": str(ptxas)}


INTERPRETED = """
import runpy, sys
sys.path += {folders}
import interpreter
interpreter.install()  # Triton 3.6's own does not take numpy 2.4's arrays
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def in_rehearsal(stage: Stage) -> Stage:
    """The stage as it runs without a GPU: ops interpreted, as tests do it, but where something is compiled."""
    compiles, pytest = stage.name in ("compile", "tune"), "pytest" in stage.rehearsal
    python, *words = stage.rehearsal
    folders = [str(next(TESTS.rglob("interpreter.py")).parent), str(machine.ROOT / "profiling")]
    interpreted = [python, "-c", INTERPRETED.format(folders=folders), *words]
    command = stage.rehearsal if compiles or pytest else interpreted
    env = {**stage.env, "TRITON_INTERPRET": None if compiles else "1"}
    return replace(stage, command=command, missing="", env=env)
