"""The machine's facts and floors, JSON lines, tables: what every script here needs.

Import it (or harness) first: it puts the repository's root, kernels/ and profiling/, whose parts are used here, on
sys.path, so a bare checkout needs no PYTHONPATH.
"""

import contextlib
import datetime
import functools
import hashlib
import json
import math
import os
import platform
import secrets
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "profiling"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nvml
import torch
from work import EXPONENTIALS_A_CLOCK, Work

from nanogpt_fast import assembler, files
from nanogpt_fast.columns import columns
from nanogpt_fast.errors import DeviceError
from nanogpt_fast.gpus import GPUS
from nanogpt_fast.hardware import peak_flops

ROOT = Path(__file__).resolve().parent.parent
assembler.prefer_extra()  # as the trainer does; --ptxas and Triton's variables go before it

# Instruction sets beside the baseline whose presence changes a product's rate.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")

# ---- the machine ----


def require_cuda(what: str) -> torch.device:
    """The current CUDA device; DeviceError (exit code 5) where there is none."""
    if not torch.cuda.is_available():
        raise DeviceError(
            f"{what} needs a CUDA GPU, and torch sees none",
            expected="torch.cuda.is_available()",
            found=f"torch {torch.__version__} on {platform.machine()}",
            hint="--dry_run lists what would run; times are only taken on a GPU",
        )
    return torch.device("cuda", torch.cuda.current_device())


def output_of(command: Sequence[str], timeout: float = 20.0) -> str:
    """A command's standard output, or "" where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@functools.cache
def tree_hash() -> str:
    """12 hex digits over the contents of all Python files and configs: a checkout without git has an identity too."""
    digest = hashlib.sha256()
    for folder in ("kernels", "nanogpt_fast", "bench", "profiling", "tests", "configs"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".toml") and path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def ptxas(arch: int = 90) -> dict[str, str]:
    """The assembler that Triton takes for sm_`arch`: {"path", "version"}."""
    try:
        from triton import knobs

        path = (knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas).path
    except (ImportError, RuntimeError) as problem:  # no Triton, or one without it
        return {"path": "none", "version": f"none ({problem})"}
    return {"path": path, "version": assembler.version_of(path)}


@functools.cache
def run_id() -> str:
    """8 hex digits: which process wrote a line."""
    return secrets.token_hex(4)


@functools.cache
def machine_facts(device: str = "") -> dict[str, Any]:
    """What every result line carries. device: type of the one that computes, by default cuda where torch sees it."""
    git = ["git", "-C", str(ROOT)]
    commit = output_of([*git, "rev-parse", "--short=10", "HEAD"])
    facts: dict[str, Any] = {
        "run": run_id(),
        "commit": commit or "unknown",
        "dirty": bool(output_of([*git, "status", "--porcelain", "--untracked-files=no"])) if commit else None,
        "tree": tree_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "cuda": torch.version.cuda,
        "device": device or ("cuda" if torch.cuda.is_available() else "cpu"),
    }
    if facts["device"] != "cuda":
        return facts | cpu_facts()
    card = gpu_facts()
    return (
        facts | {"gpu": torch.cuda.get_device_name()} | {name: card.get(name) for name in ("driver", "power_limit_w")}
    )


def cpu_facts() -> dict[str, Any]:
    """The CPU's model, the cores this process may use, torch's threads, and the instruction sets that decide speed."""
    flags = files.cpuinfo("flags").split()
    return {
        "cpu": files.cpu_name(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
    }


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float | None:
    """Processes that ran or waited to, over the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


@functools.cache
def cache_bytes() -> int:
    """The largest cache that a core of this CPU sees, bytes; 32 MiB where nothing tells."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return max(sizes, default=32 << 20)


@functools.cache
def gpu_facts() -> dict[str, Any]:
    """nvml.facts, asked once."""
    return nvml.facts()


def gpu_state() -> dict[str, Any]:
    """Clocks (MHz), temperature, power and throttle reasons as they are now: ask while the GPU is busy. {} without a
    GPU."""
    return nvml.state()


def highest_clock() -> float | None:
    """Of the multiprocessors, Hz."""
    clock = gpu_facts().get("sm_mhz_max")
    return clock * 1e6 if clock else None


def floor_ms(work: Work, dtype: torch.dtype) -> tuple[float, str] | None:
    """(milliseconds, what binds) that the data sheet allows on the current GPU, exponentials beside the products; None
    for one not listed."""
    name = torch.cuda.get_device_name()
    peak, gpu = peak_flops(name, str(dtype).removeprefix("torch.")), GPUS.get(name)
    if gpu is None or (peak is None and work.flops > 0):
        return None
    clock = highest_clock() if work.exps else None
    exp_rate = EXPONENTIALS_A_CLOCK * gpu.sms * clock if clock else math.inf
    seconds = work.seconds(peak[0] if peak else math.inf, gpu.gbps * 1e9, exp_rate)
    binding = max(seconds, key=lambda limit: seconds[limit])
    return seconds[binding] * 1e3, binding


# ---- results ----


class Lines:
    """JSON lines appended to a file, each on the disk before the next is measured; without a path they are dropped."""

    def __init__(self, path: Path | None, **facts: Any):
        self.path, self.facts = path, facts
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **fields: Any) -> None:
        if self.path is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = json.dumps({**self.facts, "time": now, **fields}, default=str)
        with self.path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of such a file; one cut off by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Text in columns: the first one left, the others right."""
    cells = [[str(c) for c in header]] + [[_shown(c) for c in row] for row in rows]
    return "\n".join(columns(cells))


def _shown(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
