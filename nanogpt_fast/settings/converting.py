"""The flags of `convert`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from nanogpt_fast.errors import ConfigError

DTYPES: dict[str, tuple[str, ...]] = {
    "native": ("float32",),
    "nanogpt": ("float32",),
    "hf": ("float32", "bfloat16", "float16"),
    "llmc": ("float32", "bfloat16"),
}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What is read, and what it becomes."""

    src: Annotated[Positional[str], arg(metavar="SRC")]
    """out_dir or step folder, ckpt.pt, Hugging Face folder, llm.c model.bin, or gpt2 ... gpt2-xl"""
    dst: Annotated[Positional[str], arg(metavar="DST")]
    """native, hf: a folder; nanogpt: NAME.pt or a folder for ckpt.pt; llmc: a file"""
    to: Literal["native", "nanogpt", "hf", "llmc"]  # the form to write
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the written weights
    data_dir: str = "data"  # where the dataset SRC was trained on is looked for, for its character table
    activation: Literal["", "gelu", "gelu_tanh"] = ""  # instead of what SRC says; nanoGPT's before June 2023: gelu_tanh
    force: bool = False  # replace DST, where an export wrote it
    debug: bool = False  # tracebacks instead of short errors

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES[self.to]:
            raise ConfigError(
                f"{self.to} files are not written in this dtype",
                where=f"dtype = {self.dtype!r}, to = {self.to!r}",
                expected=", ".join(DTYPES[self.to]),
            )
