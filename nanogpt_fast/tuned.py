"""Launch rows that were measured on this GPU, in the user's cache: `nanogpt_fast.tune` writes them, a run takes them.

A file a GPU, software and kind of run (`facts_for`), an entry for what one row is kept for. A run takes those that it
reaches, rank 0's on every rank, before its kernels are verified: a verdict is on them too.
"""

import datetime
import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import torch

from nanogpt_fast import assembler
from nanogpt_fast.distributed import World
from nanogpt_fast.errors import NanogptError
from nanogpt_fast.files import load_json, user_cache, write_json
from nanogpt_fast.hardware import capability_of
from nanogpt_fast.launch_plan import reached
from nanogpt_fast.ops import (
    assembler_path,
    keep_rows,
    keeping,
    kept_rows,
    kernel_sources,
    row_as_json,
    row_from_json,
    select_ops,
)
from nanogpt_fast.proof import Setup

log = logging.getLogger(__name__)
LOCK_S = 10.0
INTERPRETED = 90  # whose rows the interpreter takes
AGAIN = "`python -m nanogpt_fast.tune` measures anew"


def facts_of(device: torch.device) -> dict[str, str]:
    """What was measured with: anything else, and it is measured anew. ImportError, RuntimeError without Triton."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": assembler.version_of(assembler_path(device)),
        "kernels": kernel_sources(),
    }


def facts_for(setup: Setup, device: torch.device) -> dict[str, str]:
    """facts_of, and what compiles a kernel otherwise and is in no key: a row that was checked beside dropout need not
    fit without."""
    products = f" {torch.get_float32_matmul_precision()}" * (setup.dtype == "float32")
    masks = f"{', dropout' * (setup.shape.dropout > 0)}{', documents' * setup.documents}"
    return {**facts_of(device), "run": f"{setup.dtype}{products}{masks}"}


@functools.cache
def _driver() -> str:
    """The NVIDIA driver's version, "" without one."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return str(assembler.driver_cuda() or "")
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "")


# ---- the cache ----


@dataclass(frozen=True)
class Entry:
    """A kept row. row: ops.row_as_json's; ratio: its time over that of the shipped row; of: the call that was timed."""

    row: dict[str, Any]
    ratio: float
    of: str
    date: str = ""


def path_of(facts: Mapping[str, str]) -> Path:
    """RuntimeError where there is no home."""
    gpu = re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return user_cache("rows") / f"{gpu}-{digest}.json"


def read(facts: Mapping[str, str], say: Callable[[str], None] = lambda line: None) -> dict[Any, Entry]:
    """{launch.Key: entry} of exactly these facts. A file that cannot be read, or one of this GPU with other software,
    is as good as none, and said."""
    try:
        path = path_of(facts)
        if not path.exists():
            others = list(path.parent.glob(f"{path.stem[:-8]}????????.json"))
            if others:
                say(f"rows tuned with other software, or for another dtype or masks, are left out: {AGAIN}")
            return {}
        found = load_json(path)
        entries = [Entry(**entry) for entry in found["rows"]]
        rows = dict(row_from_json(entry.row) for entry in entries)
        with keeping(rows):  # refuses what is none
            return dict(zip(rows, entries)) if found["facts"] == facts else {}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        say(f"the rows tuned on this GPU cannot be read ({type(error).__name__}: {error}): {AGAIN}")
        return {}


def write(facts: Mapping[str, str], changes: Mapping[Any, Entry | None]) -> None:
    """Keep these entries, beside what is kept already or by another process meanwhile; None: no longer. A cache that
    cannot be written is a warning."""
    try:
        path = path_of(facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(str(path.with_suffix(".lock")), timeout=LOCK_S):
            entries = {**read(facts), **changes}
            write_json(path, {"facts": dict(facts), "rows": [asdict(entry) for entry in entries.values() if entry]})
    except (OSError, RuntimeError, NotImplementedError) as error:  # RuntimeError: there is no home
        log.warning("the tuned launch rows cannot be kept: %s", error)


def entry_of(key: Any, row: Any, ratio: float, of: str) -> Entry:
    """Of today."""
    return Entry(row_as_json(key, row), round(ratio, 4), of, datetime.date.today().isoformat())


# ---- which rows a run takes ----


def take(rows: str, kernels: str, setup: Setup, world: World, say: Callable[[str], None]) -> None:
    """Have the launches of this process take what --rows names for such a run: "tuned" or "shipped"; --kernels says
    whether any can be launched. All ranks take rank 0's."""
    keep_rows({})
    ours = "triton" in kernels or (kernels.split(",")[0].strip() == "auto" and world.device.type == "cuda")
    if rows == "shipped" or not ours:
        return
    keep_rows(_found(kernels, setup, world.device, say) if world.is_main else {})
    agree(world)
    if kernels.split(",")[0].strip() != "auto" and kept_rows():  # of auto the verdict's line says so
        say(f"kernels: {kernels}{words()}")


def _found(kernels: str, setup: Setup, device: torch.device, say: Callable[[str], None]) -> dict[Any, Any]:
    """Those in the cache that the run reaches."""
    try:
        rows = {key: row_from_json(entry.row)[1] for key, entry in read(facts_for(setup, device), say).items()}
        if not rows:
            return {}
        ours = select_ops(kernels, device.type, select_ops("triton", device.type))
        with keeping(rows):
            keys = reached(setup, ours, capability_of(device) or INTERPRETED)
    except (NanogptError, ImportError, RuntimeError, OSError):  # no Triton, no ptxas: whoever needs them says so
        return {}
    except (ValueError, TypeError) as error:  # an op refuses a row
        say(f"the rows tuned on this GPU are left out ({str(error).splitlines()[0]}): {AGAIN}")
        return {}
    return {key: row for key, row in rows.items() if key in keys}


def agree(world: World) -> None:
    """Rank 0's kept rows on every rank."""
    rows = [row_as_json(*pair) for pair in kept_rows().items()]
    keep_rows(dict(map(row_from_json, world.main_object(rows))))


def digest() -> str:
    """16 hex digits over the rows that are kept now, "" for none."""
    rows = sorted((row_as_json(*pair) for pair in kept_rows().items()), key=lambda row: json.dumps(row, sort_keys=True))
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16] if rows else ""


def words() -> str:
    """To go on a line about the kernels."""
    count = len(kept_rows())
    return f", {count} launch row{'s' * (count != 1)} tuned on this GPU" if count else ""
