"""The flags of `doctor`."""

from dataclasses import dataclass
from typing import Literal

from nanogpt_fast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What to look at."""

    device: str = "auto"  # where the smoke run trains: auto | cpu | cuda | cuda:0 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # its precision
    kernels: str = "auto"  # its ops: auto | triton | reference
    data_dir: str = "data"  # where to look for datasets
    smoke: bool = True  # train a tiny model for a moment
    json: bool = False  # the report as JSON
    ranks: bool = False  # under torchrun: measure the network between the ranks, and nothing else
    seconds: float = 20.0  # of --ranks: how long to measure
    slow: float = 3.0  # of --ranks: so many times as slow as usual is a problem
    expect: float = 0.0  # of --ranks: GB/s that two nodes should exchange, all their ranks together; 0: any
    timeout: float = 60.0  # of --ranks: seconds in which a rank must come, and get on
    debug: bool = False  # tracebacks instead of short errors

    def __post_init__(self) -> None:
        for name, least in (("seconds", 0.0), ("slow", 1.0), ("timeout", 0.0)):
            if not getattr(self, name) > least:
                found = f"{name} = {getattr(self, name):g}"
                raise ConfigError(f"{name} is too small", where=found, expected=f"more than {least:g}")
