"""What a rank says of itself to the others, and what all must have alike; hosts are told apart without their names."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import socket
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl

from nanogpt_fast import __version__
from nanogpt_fast.privacy import private

PACKAGES = ("nanogpt_fast", "nanogpt_kernels")
MUST = ("nanogpt_fast", "code", "torch", "NCCL", "CUDA", "triton")  # else ranks may compute apart, or never meet
ADDRESS = re.compile(r"\[[0-9a-fA-F:.%]+\](:\d+)?|\(\S+, \d+\)|\b\d{1,3}(\.\d{1,3}){3}(:\d+)?")  # as torch writes them
VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "TP_", "OMP_NUM_THREADS")


def facts_of(device: torch.device) -> dict[str, Any]:
    """Of this rank; `host` tells nodes apart and is for nobody's eyes."""
    facts = {"nanogpt_fast": __version__, "code": fingerprint(), "torch": torch.__version__}
    facts |= {"NCCL": "none", "CUDA": torch.version.cuda or "none", "triton": _version("triton")}
    facts |= {"python": platform.python_version(), "device": "CPU"}
    if device.type == "cuda":
        facts["NCCL"] = ".".join(map(str, nccl.version()))
        facts["device"] = torch.cuda.get_device_name(device)
    settings = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(VARIABLES)]
    return {**facts, "variables": ADDRESS.sub("[address]", " ".join(settings)) or "none", "host": host()}


def fingerprint() -> str:
    """SHA-256 over our files as they are imported, ten digits of it: a checkout that was not updated shows, with git
    or without."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for root in map(Path, (spec and spec.submodule_search_locations) or ()):
            for path in sorted(root.rglob("*.py")):
                digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def host() -> str:
    """Equal for ranks that share a machine and its network, different for containers with a network of their own."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # Linux alone has them
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(os.stat("/proc/self/ns/net").st_ino)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def differences(facts: Sequence[dict[str, Any]], node_of: Sequence[int]) -> tuple[list[str], list[str]]:
    """What not all ranks have alike: problems, and what may well be meant (Python, the device, settings)."""
    problems: list[str] = []
    notes: list[str] = []
    for key in facts[0]:
        values = [str(of[key]) for of in facts]
        most, count = Counter(values).most_common(1)[0]  # of a tie, rank 0's
        for other in dict.fromkeys(value for value in values if value != most):
            ranks = [rank for rank, value in enumerate(values) if value == other]
            text = f"{ranks_named(ranks, node_of)}: {key} {other}; the other {len(values) - len(ranks)}: {most}"
            if count + len(ranks) < len(values):
                text = f"{ranks_named(ranks, node_of)}: {key} {other}; most: {most}"
            (problems if key in MUST else notes).append(private(text))
    return problems, notes


def ranks_named(ranks: Collection[int], node_of: Sequence[int] = ()) -> str:
    """`ranks 2-3 (node 1)`."""
    if not ranks:
        return "no rank"
    text = f"{'rank' if len(ranks) == 1 else 'ranks'} {spans(ranks)}"
    nodes = {node_of[rank] for rank in ranks} if node_of else set()
    return f"{text} ({'node' if len(nodes) == 1 else 'nodes'} {spans(nodes)})" if nodes else text


def spans(numbers: Collection[int]) -> str:
    """`0-3, 5`."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def without_addresses(error: BaseException) -> str:
    """The first sentence of what torch says, without the hosts that it names."""
    text = (next(iter(str(error).splitlines()), "") or type(error).__name__).split(". ")[0]
    text = re.sub(r"^\[\S+\] ", "", text)  # gloo's own file and line
    text = ADDRESS.sub("[address]", text)
    return private(text.replace(socket.gethostname(), "[host]"))[:200]
