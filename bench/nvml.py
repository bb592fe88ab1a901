"""What the driver tells of the GPU that torch computes on: limits, clocks, temperature, power, energy.

By nvidia-ml-py (`pip install 'nanogpt-fast[bench]'`), which asks the driver without starting a process; where it is
missing, by one call of nvidia-smi, which has no energy counter. `source()` says which it was. Whatever a card, a driver
or a container does not tell is None, and `facts()["untold"]` says why. Nothing here sets anything.
"""

import functools
import importlib.metadata
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

GET = "nvidia-ml-py is not installed: pip install 'nanogpt-fast[bench]'"
REASONS = {  # bits of nvml.h's nvmlClocksEventReasons
    0x1: "idle",
    0x2: "applications clocks setting",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown by software",
    0x40: "thermal slowdown by hardware",
    0x80: "power brake",
    0x100: "display clocks setting",
    0x200: "board limit",
    0x400: "reliability",
}
SWITCH = {0: "disabled", 1: "enabled"}


def reasons_in_words(bits: int) -> str:
    """Why the clocks are not higher, as in "power cap, board limit"; "none" for no reason."""
    words = [word for bit, word in REASONS.items() if bits & bit]
    if unknown := bits & ~sum(REASONS):
        words.append(f"{unknown:#x}")
    return ", ".join(words) or "none"


# ---- what is asked: {field: (by NVML: (pynvml, handle) -> value, by nvidia-smi: its field and what it means)} ----


def _reasons(nv: Any, handle: Any) -> str:
    try:
        return reasons_in_words(nv.nvmlDeviceGetCurrentClocksEventReasons(handle))
    except (AttributeError, nv.NVMLError):  # by its former name: the package or the driver is older
        return reasons_in_words(nv.nvmlDeviceGetCurrentClocksThrottleReasons(handle))


def _watts(milliwatts: int) -> float:
    return milliwatts / 1e3


ByNvml = Callable[[Any, Any], Any]
Field = tuple[ByNvml, str, Callable[[str], Any]]
FACTS: dict[str, Field] = {
    "name": (lambda nv, h: nv.nvmlDeviceGetName(h), "name", str),
    "uuid": (lambda nv, h: nv.nvmlDeviceGetUUID(h), "uuid", str),
    "driver": (lambda nv, h: nv.nvmlSystemGetDriverVersion(), "driver_version", str),
    "vbios": (lambda nv, h: nv.nvmlDeviceGetVbiosVersion(h), "vbios_version", str),
    "power_limit_w": (lambda nv, h: _watts(nv.nvmlDeviceGetEnforcedPowerLimit(h)), "enforced.power.limit", float),
    "power_default_w": (
        lambda nv, h: _watts(nv.nvmlDeviceGetPowerManagementDefaultLimit(h)),
        "power.default_limit",
        float,
    ),
    "sm_mhz_max": (lambda nv, h: nv.nvmlDeviceGetMaxClockInfo(h, nv.NVML_CLOCK_SM), "clocks.max.sm", float),
    "mem_mhz_max": (lambda nv, h: nv.nvmlDeviceGetMaxClockInfo(h, nv.NVML_CLOCK_MEM), "clocks.max.mem", float),
    "ecc": (lambda nv, h: SWITCH.get(nv.nvmlDeviceGetEccMode(h)[0]), "ecc.mode.current", str.lower),
    "mig": (lambda nv, h: SWITCH.get(nv.nvmlDeviceGetMigMode(h)[0]), "mig.mode.current", str.lower),
    "persistence": (lambda nv, h: SWITCH.get(nv.nvmlDeviceGetPersistenceMode(h)), "persistence_mode", str.lower),
}
STATE: dict[str, Field] = {
    "sm_mhz": (lambda nv, h: nv.nvmlDeviceGetClockInfo(h, nv.NVML_CLOCK_SM), "clocks.sm", float),
    "mem_mhz": (lambda nv, h: nv.nvmlDeviceGetClockInfo(h, nv.NVML_CLOCK_MEM), "clocks.mem", float),
    "celsius": (lambda nv, h: nv.nvmlDeviceGetTemperature(h, nv.NVML_TEMPERATURE_GPU), "temperature.gpu", float),
    "watts": (lambda nv, h: _watts(nv.nvmlDeviceGetPowerUsage(h)), "power.draw", float),
    "throttle": (_reasons, "clocks_throttle_reasons.active", lambda text: reasons_in_words(int(text, 16))),
}


# ---- the current device, by either way ----


@dataclass(frozen=True)
class Card:
    """A GPU that can be asked. nv: the module pynvml, None for nvidia-smi; handle: NVML's, or nvidia-smi's --id."""

    nv: Any
    handle: Any
    source: str


def _uuids(index: int) -> list[str]:
    """What torch's device may be called by the driver: CUDA_VISIBLE_DEVICES reorders numbers, not these."""
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return [f"GPU-{uuid}", f"MIG-{uuid}"] if uuid is not None else []


def _by_nvml(index: int) -> Card:
    """ImportError without the package, NVMLError without a driver that answers."""
    import pynvml

    pynvml.nvmlInit()
    handle = None
    for uuid in _uuids(index):
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError:
            continue
        if uuid.startswith("MIG-"):  # a slice has no clocks and no power of its own
            handle = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        break
    if handle is None:
        if os.environ.get("CUDA_VISIBLE_DEVICES"):
            raise LookupError("NVML knows no GPU of the UUID that torch gives, and CUDA_VISIBLE_DEVICES is set")
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    return Card(pynvml, handle, f"nvidia-ml-py {importlib.metadata.version('nvidia-ml-py')}")


@functools.cache
def _card(index: int) -> Card:
    try:
        return _by_nvml(index)
    except ImportError:
        why = GET
    except Exception as problem:  # pynvml.NVMLError, LookupError: the tool may know more
        why = f"nvidia-ml-py: {problem}"
    return Card(None, next(iter(_uuids(index)), None), f"nvidia-smi ({why})")


def current() -> Card:
    """Of torch's current device. RuntimeError where torch sees no GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    return _card(torch.cuda.current_device())


def source() -> str:
    """Who answers here: nvidia-ml-py by its version, or nvidia-smi and why."""
    return current().source if torch.cuda.is_available() else "nobody: torch sees no GPU"


def _run(command: Sequence[str]) -> str:
    """Standard output; "" where the tool is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _ask_smi(card: Card, fields: dict[str, Field]) -> tuple[dict[str, Any], dict[str, str]]:
    """One call; a second without what older and newer tools name differently, where the first is refused."""
    for asked in (fields, {name: field for name, field in fields.items() if name not in ("throttle", "mig")}):
        query = ["nvidia-smi", f"--query-gpu={','.join(field[1] for field in asked.values())}"]
        query.append("--format=csv,noheader,nounits")
        lines = _run([*query, f"--id={card.handle}"] if card.handle else query).splitlines()
        lines = lines or _run(query).splitlines()  # a tool that does not know the UUID
        if len(lines) == 1:
            break
    else:
        return dict.fromkeys(fields), dict.fromkeys(fields, f"nvidia-smi does not answer for this GPU; {card.source}")
    found, untold = dict.fromkeys(fields), {name: "nvidia-smi" for name in fields if name not in asked}
    for (name, (_, _, convert)), text in zip(asked.items(), lines[0].split(",")):
        try:
            found[name] = None if text.strip().startswith("[") else convert(text.strip())  # "[N/A]"
        except ValueError:
            untold[name] = text.strip()
        if found[name] is None:
            untold.setdefault(name, text.strip())
    return found, untold


def _ask(fields: dict[str, Field]) -> tuple[dict[str, Any], dict[str, str]]:
    """({field: value or None}, {field: why it is None})."""
    card = current()
    if card.nv is None:
        return _ask_smi(card, fields)
    found, untold = dict.fromkeys(fields), {}
    for name, (by_nvml, _, _) in fields.items():
        try:
            found[name] = by_nvml(card.nv, card.handle)
        except (card.nv.NVMLError, AttributeError) as problem:  # not on this card, or not in this version
            untold[name] = str(problem)
    return found, untold


def facts() -> dict[str, Any]:
    """FACTS of the current GPU, watts and MHz; "source": who told; "untold": {field: reason}, where there are such.
    {"source": reason} alone without a GPU."""
    if not torch.cuda.is_available():
        return {"source": source()}
    found, untold = _ask(FACTS)
    return {**found, "source": source(), **({"untold": untold} if untold else {})}


def state() -> dict[str, Any]:
    """STATE of the current GPU as it is now: MHz, degrees Celsius, watts, and why the clocks are not higher. Ask while
    it is busy: an idle GPU's clocks say nothing. {} without a GPU."""
    return _ask(STATE)[0] if torch.cuda.is_available() else {}


# ---- energy ----


@dataclass
class Energy:
    """Of a span: joules, or None and why not."""

    joules: float | None = None
    why: str = ""


def energy_joules() -> float:
    """The current GPU's counter since its driver was loaded. LookupError, with the reason, where there is none."""
    if not torch.cuda.is_available():
        raise LookupError("torch sees no GPU")
    card = current()
    if card.nv is None:
        raise LookupError(f"energy needs nvidia-ml-py; here it is {card.source}")
    try:
        return card.nv.nvmlDeviceGetTotalEnergyConsumption(card.handle) / 1e3
    except card.nv.NVMLError as problem:
        raise LookupError(f"this GPU has no energy counter: {problem}") from None


@contextmanager
def energy() -> Iterator[Energy]:
    """What the whole card draws during the block, other processes' share included; the device is waited for at both
    ends. Make spans last a second or more: the counter moves in steps of some milliseconds."""
    spent = Energy()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    try:
        began = energy_joules()
    except LookupError as problem:
        spent.why = str(problem)
        yield spent
        return
    yield spent
    torch.cuda.synchronize()
    try:
        spent.joules = energy_joules() - began
    except LookupError as problem:
        spent.why = str(problem)
