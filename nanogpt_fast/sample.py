"""Sample from a model: `python -m nanogpt_fast.sample --out_dir=out --start="..."`. Flags are nanoGPT's."""

import errno
import io
import math
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from nanogpt_fast.command import run_command
from nanogpt_fast.data.text_files import decoded
from nanogpt_fast.distributed import resolve_device, resolve_dtype
from nanogpt_fast.errors import ConfigError, did_you_mean, printable
from nanogpt_fast.files import read_small
from nanogpt_fast.generate import prompt_ids, sample_text
from nanogpt_fast.graphs import Graphs
from nanogpt_fast.ops import exact_device
from nanogpt_fast.restore import build_model, restore
from nanogpt_fast.settings import cli
from nanogpt_fast.settings.config import require_range
from nanogpt_fast.verdict import ops_known

PROMPT_BYTES = 16 << 20  # of a prompt's file; it is held whole
LEAST_TEMPERATURE = 1e-30  # float32 logits are divided by it: beyond 1e38 they are infinite, their softmax NaN


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """nanoGPT's sample.py, and a few more."""

    init_from: str = "resume"  # resume or best (of out_dir), gpt2 ... gpt2-xl, or a path
    out_dir: str = "out"  # the run to sample from
    start: Annotated[str, tyro.conf.arg(help_behavior_hint=r"(default: '\n')")] = "\n"
    """the prompt; <|endoftext|> in it counts; FILE:prompt.txt reads a file"""
    num_samples: int = 10  # samples to draw
    max_new_tokens: int = 500  # tokens a sample
    temperature: float = 0.8  # below 1 less random, above 1 more; 0 takes the likeliest token
    top_k: int = 200  # draw among so many likeliest tokens; 0 among all
    seed: int = 1337  # of the draws
    device: str = "auto"  # auto | cpu | cuda | cuda:0 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on the CPU and MPS
    compile: bool = False  # nanoGPT's; no effect here, where the cache grows with each token
    cuda_graph: Literal["auto", "on", "off"] = "auto"  # replay a token's step as a graph; on: fail where that cannot be
    kernels: str = "auto"  # auto | triton | reference, and single ops: triton,attention=reference
    activation: Literal["", "gelu", "gelu_tanh"] = ""  # instead of the file's; nanoGPT's before June 2023: gelu_tanh
    data_dir: str = "data"  # where the tokenizer is looked up when the checkpoint has none
    stream: bool = True  # print text as it is generated, not sample by sample
    stop_at_eot: bool = False  # end a sample at <|endoftext|>
    debug: bool = False  # tracebacks instead of short errors

    def __post_init__(self) -> None:
        for key in ("num_samples", "max_new_tokens", "top_k", "seed"):
            require_range(getattr(self, key) >= 0, key, "a whole number >= 0", getattr(self, key))
        ok = math.isfinite(self.temperature) and (self.temperature == 0.0 or self.temperature >= LEAST_TEMPERATURE)
        rule = f"a finite number >= {LEAST_TEMPERATURE:g}, or 0 for the likeliest token"
        require_range(ok, "temperature", rule, self.temperature)


def read_prompt(start: str) -> str:
    """--start, or the text of the file it names: UTF-8, at most PROMPT_BYTES. Raises ConfigError, DataError."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:")).expanduser()
    try:
        return "".join(decoded(io.BytesIO(read_small(path, PROMPT_BYTES)), str(path)))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        near = []
        with suppress(OSError, ValueError):
            near = [p.name for p in path.parent.iterdir() if p.name != path.name]
        long = getattr(error, "errno", None) == errno.EFBIG
        raise ConfigError(
            f"the prompt file cannot be read{did_you_mean(path.name, near)}",
            where=f"--start={start}",
            found=getattr(error, "strerror", None) or str(error),
            hint="a model sees its last block_size tokens alone: tail -c 100000 FILE > PROMPT" if long else "",
        ) from None


def main(argv: list[str]) -> None:
    """Print num_samples samples, each with its prompt and nanoGPT's separator after it."""
    description = "Print text that a model continues from --start."
    config = cli.parse(SampleConfig, argv, prog="python -m nanogpt_fast.sample", description=description)
    prompt = read_prompt(config.start)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device, comparable=True)
    graphs = Graphs(device, config.cuda_graph)
    restored = restore(config.init_from, config.out_dir, config.data_dir, optimizer=False, activation=config.activation)
    tokenizer = restored.tokenizer()
    model = build_model(restored, device, dtype, ops_known(config.kernels, restored.config, device, dtype))
    ids, block_size = prompt_ids(tokenizer, prompt), restored.config.block_size
    print(f"sampling from {printable(restored.source)}, {device}, {str(dtype).removeprefix('torch.')}", file=sys.stderr)
    if len(ids) > block_size:
        print(f"the prompt has {len(ids)} tokens; the model sees the last {block_size}", file=sys.stderr)
    generator = torch.Generator(exact_device(device)).manual_seed(config.seed)
    drawn: list[int] = []
    began = time.perf_counter()
    for _ in range(config.num_samples):
        pieces = sample_text(
            model,
            tokenizer,
            prompt,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            seed=generator,
            stop_at_eot=config.stop_at_eot,
            drawn=drawn,
            graphs=graphs,
        )
        print(printable(prompt), end="", flush=config.stream)
        for piece in pieces if config.stream else ["".join(pieces)]:
            print(printable(piece), end="", flush=config.stream)
        print("\n---------------", flush=True)
    seconds = time.perf_counter() - began
    print(f"{len(drawn):,} tokens in {seconds:.2f} s, {len(drawn) / seconds:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run_command(main, again="the samples end here; the same command draws the same ones again")
