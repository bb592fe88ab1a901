"""bench/nvml.py on a made-up driver: what it asks of nvidia-ml-py and of nvidia-smi, and what it says without them."""

import importlib.metadata
import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import machine
import nvml
import pytest
import torch

UUID = "8f9e0d1c-0000-1111-2222-333344445555"
SOURCE = Path(inspect.getfile(nvml)).read_text()
ASKED = sorted(set(re.findall(r"\b(?:nv|pynvml)\.((?:nvml|NVML)\w+)", SOURCE)))


class NVMLError(Exception):
    pass


class FakePynvml:
    """The functions of nvidia-ml-py that bench/nvml.py calls, on a machine of two GPUs; `torch` computes on the second,
    which CUDA_VISIBLE_DEVICES made its device 0. Methods named in `refused` raise, as on a card without the counter."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, refused: tuple[str, ...] = (), reasons: int = 0x4):
        self.refused, self.reasons, self.millijoules, self.initialised = refused, reasons, 5_000_000, 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "refused"):

            def refuse(*_: Any) -> Any:
                raise NVMLError("Not Supported")

            return refuse
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None:
        self.initialised += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != f"GPU-{UUID}":
            raise NVMLError("Not Found")
        return "second"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return ["first", "second"][index]

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95.05"

    def of(self, handle: str, value: Any) -> Any:
        assert handle == "second", "another GPU was asked"
        return value

    def nvmlDeviceGetName(self, handle: str) -> str:
        return self.of(handle, "NVIDIA H100 80GB HBM3")

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return self.of(handle, f"GPU-{UUID}")

    def nvmlDeviceGetVbiosVersion(self, handle: str) -> str:
        return self.of(handle, "96.00")

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return self.of(handle, 650_000)

    def nvmlDeviceGetPowerManagementDefaultLimit(self, handle: str) -> int:
        return self.of(handle, 700_000)

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
        return self.of(handle, {1: 1980, 2: 2619}[kind])

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return self.of(handle, {1: 1410, 2: 2600}[kind])

    def nvmlDeviceGetEccMode(self, handle: str) -> list[int]:
        return self.of(handle, [1, 1])

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        return self.of(handle, [0, 0])

    def nvmlDeviceGetPersistenceMode(self, handle: str) -> int:
        return self.of(handle, 1)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return self.of(handle, 61)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self.of(handle, 648_500)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self.of(handle, self.reasons)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self.of(handle, 0x40)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self.of(handle, self.millijoules)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """torch on device 0 of that UUID; install(a module or None) is what `import pynvml` finds."""

    def install(fake: FakePynvml | None) -> FakePynvml | None:
        monkeypatch.setitem(sys.modules, "pynvml", fake)  # None: ImportError
        nvml._card.cache_clear()
        machine.gpu_facts.cache_clear()
        return fake

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=UUID))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "13.615.71")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    yield install
    nvml._card.cache_clear()
    machine.gpu_facts.cache_clear()


def test_every_call_is_one_of_the_real_package():
    real = pytest.importorskip("pynvml", reason="pip install 'nanogpt-fast[bench]'")
    assert len(ASKED) > 20 and "nvmlDeviceGetTotalEnergyConsumption" in ASKED
    assert not [name for name in ASKED if not hasattr(real, name)]
    given = {"nvmlInit": 0, "nvmlSystemGetDriverVersion": 0}
    two = ("nvmlDeviceGetClockInfo", "nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetTemperature")
    for name in (name for name in ASKED if name.startswith("nvml")):
        count = given.get(name, 2 if name in two else 1)
        inspect.signature(getattr(real, name)).bind(*range(count))
        assert hasattr(FakePynvml, name) or "Mig" in name, f"the made-up driver lacks {name}"
    bits = {value for name, value in vars(real).items()
            if re.match("nvmlClocks(Event|Throttle)Reason[A-Z]", name) and name[-3:] not in ("All", "one")}  # fmt: skip
    assert bits == set(nvml.REASONS)


def test_facts_are_of_the_gpu_that_torch_computes_on(gpu: Any):
    fake = gpu(FakePynvml())
    assert nvml.facts() == {
        "name": "NVIDIA H100 80GB HBM3", "uuid": f"GPU-{UUID}", "driver": "580.95.05", "vbios": "96.00",
        "power_limit_w": 650.0, "power_default_w": 700.0, "sm_mhz_max": 1980, "mem_mhz_max": 2619,
        "ecc": "enabled", "mig": "disabled", "persistence": "enabled", "source": "nvidia-ml-py 13.615.71",
    }  # fmt: skip
    state = {"sm_mhz": 1410, "mem_mhz": 2600, "celsius": 61, "watts": 648.5, "throttle": "power cap"}
    assert machine.gpu_state() == state and machine.highest_clock() == 1980e6
    assert fake.initialised == 1


def test_a_uuid_that_nobody_knows_is_not_another_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="other"))
    monkeypatch.setattr(nvml, "_run", lambda command: "" if "--id=GPU-other" in command else "a\nb")
    gpu(FakePynvml())
    assert nvml.facts()["name"] is None and "CUDA_VISIBLE_DEVICES" in nvml.facts()["untold"]["name"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)  # then numbers are the driver's, or near it
    gpu(FakePynvml())
    assert nvml.facts()["name"] == "NVIDIA H100 80GB HBM3"


def test_a_slice_of_a_gpu_is_asked_for_its_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch):
    fake = gpu(FakePynvml())
    handles = {f"MIG-{UUID}": "slice"}
    monkeypatch.setattr(fake, "nvmlDeviceGetHandleByUUID", lambda uuid: handles[uuid] if uuid in handles else _raise())
    parent = {"slice": "second"}
    monkeypatch.setattr(fake, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", parent.__getitem__, raising=False)
    assert nvml.state()["watts"] == 648.5


def _raise() -> None:
    raise NVMLError("Not Found")


def test_what_a_card_does_not_tell_is_null_with_the_reason(gpu: Any):
    refused = ("nvmlDeviceGetEccMode", "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetCurrentClocksEventReasons")
    gpu(FakePynvml(refused=refused))
    facts = nvml.facts()
    assert facts["ecc"] is None and facts["power_limit_w"] is None and facts["sm_mhz_max"] == 1980
    assert facts["untold"] == {"ecc": "Not Supported", "power_limit_w": "Not Supported"}
    assert nvml.state()["throttle"] == "thermal slowdown by hardware"  # by the reasons' former name


def test_reasons_in_words():
    assert nvml.reasons_in_words(0) == "none"
    assert nvml.reasons_in_words(0x4 | 0x40) == "power cap, thermal slowdown by hardware"
    assert nvml.reasons_in_words(0x8 | 0x1000) == "hardware slowdown, 0x1000"


# ---- without the package ----

TOLD = {"name": "NVIDIA L4", "uuid": f"GPU-{UUID}", "driver_version": "570.1", "vbios_version": "95.04",
        "enforced.power.limit": "72.00", "power.default_limit": "[N/A]", "clocks.max.sm": "2040",
        "clocks.max.mem": "6251", "ecc.mode.current": "Enabled", "mig.mode.current": "[N/A]",
        "persistence_mode": "Disabled", "clocks.sm": "1590", "clocks.mem": "6250", "temperature.gpu": "40",
        "power.draw": "[Unknown Error]", "clocks_throttle_reasons.active": "0x0000000000000005"}  # fmt: skip


def smi(calls: list[list[str]], unknown: str = "") -> Any:
    def run(command: list[str]) -> str:
        calls.append(command)
        fields = command[1].removeprefix("--query-gpu=").split(",")
        if f"--id=GPU-{UUID}" not in command:
            return "of the first GPU\nof the second"
        return "" if unknown in fields else ", ".join(TOLD[field] for field in fields)

    return run


def test_without_the_package_nvidia_smi_is_called_once(gpu: Any, monkeypatch: pytest.MonkeyPatch):
    gpu(None)
    calls: list[list[str]] = []
    monkeypatch.setattr(nvml, "_run", smi(calls))
    facts = nvml.facts()
    assert len(calls) == 1 and calls[0][0] == "nvidia-smi"
    assert facts["name"] == "NVIDIA L4" and facts["power_limit_w"] == 72.0 and facts["persistence"] == "disabled"
    assert facts["power_default_w"] is None and facts["untold"] == {"power_default_w": "[N/A]", "mig": "[N/A]"}
    assert facts["source"] == f"nvidia-smi ({nvml.GET})"
    assert nvml.state() == {"sm_mhz": 1590.0, "mem_mhz": 6250.0, "celsius": 40.0, "watts": None,
                            "throttle": "idle, power cap"}  # fmt: skip


def test_a_tool_that_refuses_a_field_is_asked_for_the_others(gpu: Any, monkeypatch: pytest.MonkeyPatch):
    gpu(None)
    monkeypatch.setattr(nvml, "_run", smi([], unknown="clocks_throttle_reasons.active"))
    state = nvml.state()
    assert state["throttle"] is None and state["sm_mhz"] == 1590.0


def test_without_either_everything_is_null_with_the_reason(gpu: Any, monkeypatch: pytest.MonkeyPatch):
    gpu(None)
    monkeypatch.setattr(nvml, "_run", lambda command: "")
    facts = nvml.facts()
    assert all(facts[name] is None and nvml.GET in facts["untold"][name] for name in nvml.FACTS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert nvml.facts() == {"source": "nobody: torch sees no GPU"} and nvml.state() == {}


# ---- energy ----


def test_energy_of_a_span(gpu: Any):
    fake = gpu(FakePynvml())
    with nvml.energy() as spent:
        fake.millijoules += 12_500
    assert (spent.joules, spent.why) == (12.5, "")


def test_energy_waits_for_the_device(gpu: Any, monkeypatch: pytest.MonkeyPatch):
    fake = gpu(FakePynvml())
    enqueued = [700]

    def synchronize() -> None:
        fake.millijoules += sum(enqueued)
        enqueued.clear()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with nvml.energy() as spent:
        enqueued.append(2000)
    assert spent.joules == 2.0


def test_without_a_counter_energy_is_none_and_says_why(gpu: Any, monkeypatch: pytest.MonkeyPatch):
    gpu(FakePynvml(refused=("nvmlDeviceGetTotalEnergyConsumption",)))
    with nvml.energy() as spent:
        pass
    assert spent.joules is None and "no energy counter: Not Supported" in spent.why
    gpu(None)
    with nvml.energy() as spent:
        pass
    assert spent.joules is None and "pip install" in spent.why
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with nvml.energy() as spent:
        pass
    assert spent.joules is None and "no GPU" in spent.why


# ---- what every line carries ----


def test_lines_of_a_gpu_and_of_a_cpu(gpu: Any, monkeypatch: pytest.MonkeyPatch):
    gpu(FakePynvml())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    facts = machine.machine_facts.__wrapped__("cuda")
    assert (facts["gpu"], facts["driver"], facts["power_limit_w"]) == ("NVIDIA H100 80GB HBM3", "580.95.05", 650.0)
    assert facts["device"] == "cuda" and "cpu" not in facts
    facts = machine.machine_facts.__wrapped__("cpu")
    assert facts["device"] == "cpu" and "gpu" not in facts
    assert facts["cores"] >= 1 and facts["threads"] == torch.get_num_threads() and facts["cpu"]
    assert facts["run"] == machine.run_id() and re.fullmatch("[0-9a-f]{8}", facts["run"])
    assert facts.keys() >= {"commit", "dirty", "tree", "python", "torch", "triton", "cuda"}


def test_the_cpu_by_its_own_words(monkeypatch: pytest.MonkeyPatch):
    told = "processor\t: 0\nmodel name\t: AMD EPYC 9R14\nflags\t\t: fpu avx2 avx512f avx512_bf16 sse2\n"
    monkeypatch.setattr(Path, "read_text", lambda path: told)
    facts = machine.cpu_facts()
    assert facts["cpu"] == "AMD EPYC 9R14" and facts["cpu_flags"] == ["avx2", "avx512f", "avx512_bf16"]


def test_a_changed_tree_is_dirty(monkeypatch: pytest.MonkeyPatch):
    told = {"rev-parse": "abc", "status": " M bench/machine.py"}
    monkeypatch.setattr(machine, "output_of", lambda command: told.get(command[3], ""))
    assert machine.machine_facts.__wrapped__("cpu")["dirty"] is True
    told["status"] = ""
    assert machine.machine_facts.__wrapped__("cpu")["dirty"] is False
    told["rev-parse"] = ""  # no git: nobody knows
    assert machine.machine_facts.__wrapped__("cpu")["dirty"] is None
