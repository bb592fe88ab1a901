"""The flags of `sample`: nanoGPT's, and those that people know from other engines."""

import ast
import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.settings.config import require_range
from nanogpt_fast.settings.options import shown

LEAST_TEMPERATURE = 1e-30  # float32 logits are divided by it: beyond 1e38 they are infinite, their softmax NaN
_ESCAPE = re.compile(r"\\(?:[nrt\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """nanoGPT's sample.py, and a few more."""

    init_from: str = "resume"  # resume or best (of out_dir), gpt2 ... gpt2-xl, or a path
    out_dir: str = "out"  # the run to sample from
    start: Annotated[str, tyro.conf.arg(help_behavior_hint=r"(default: '\n')")] = "\n"
    """the prompt; <|endoftext|> in it counts; FILE:prompt.txt reads a file"""
    prompts: str = ""  # a file of prompts: a line each, or rows of .jsonl, .csv or .parquet; blank lines are none
    field: str = "prompt"  # of a row in --prompts
    num_samples: int = 10  # samples to draw, of every prompt
    max_new_tokens: int = 500  # tokens a sample
    temperature: float = 0.8  # below 1 less random, above 1 more; 0 takes the likeliest token
    top_k: int = 200  # draw among so many likeliest tokens; 0 among all
    top_p: float = 1.0  # and among the likeliest that together have this probability
    min_p: float = 0.0  # and among those of at least this times the likeliest's probability
    repetition_penalty: float = 1.0  # above 1: what is in the prompt or the text already becomes less likely (CTRL's)
    stop: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(default: none)")] = None
    r"""end a sample before this text: '\n\n', or several: '["\n\n", "User:"]'; \n \t \r \\ \xNN \uNNNN count"""
    stop_at_eot: bool = False  # end a sample at <|endoftext|>
    seed: int = 1337  # of the draws: one sequence for all samples, as nanoGPT has it
    seed_per_sample: bool = False  # a sequence for each: the k-th from 0, through all prompts, has seed + k's
    batch_size: int = 1  # samples drawn together; above 1 each has its own seed, and is printed when all of them end
    format: Literal["text", "jsonl"] = "text"  # jsonl: a JSON object a sample, on a line
    stream: bool = True  # print text as it is generated, not sample by sample
    device: str = "auto"  # auto | cpu | cuda | cuda:0 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on the CPU and MPS
    compile: bool = False  # nanoGPT's; no effect here, where the cache grows with each token
    cuda_graph: Literal["auto", "on", "off"] = "auto"  # replay a token's step as a graph; on: fail where that cannot be
    kernels: str = "auto"  # auto | triton | reference, and single ops: triton,attention=reference
    activation: Literal["", "gelu", "gelu_tanh"] = ""  # instead of the file's; nanoGPT's before June 2023: gelu_tanh
    data_dir: str = "data"  # where the tokenizer is looked up when the checkpoint has none
    debug: bool = False  # tracebacks instead of short errors

    def __post_init__(self) -> None:
        for key in ("num_samples", "max_new_tokens", "top_k", "seed"):
            require_range(getattr(self, key) >= 0, key, "a whole number >= 0", getattr(self, key))
        t, penalty = self.temperature, self.repetition_penalty
        rule = f"a finite number >= {LEAST_TEMPERATURE:g}, or 0 for the likeliest token"
        require_range(math.isfinite(t) and (t == 0.0 or t >= LEAST_TEMPERATURE), "temperature", rule, t)
        require_range(0.0 < self.top_p <= 1.0, "top_p", "above 0, at most 1 (all tokens)", self.top_p)
        require_range(0.0 <= self.min_p <= 1.0, "min_p", "0 (all tokens) to 1 (the likeliest)", self.min_p)
        rule = "0.01 to 100; 1 changes nothing"  # within, a logit over LEAST_TEMPERATURE stays a float32
        require_range(0.01 <= penalty <= 100.0, "repetition_penalty", rule, penalty)
        require_range(self.batch_size >= 1, "batch_size", "a whole number >= 1", self.batch_size)
        if self.prompts and self.start != "\n":
            raise ConfigError(
                "--prompts and --start both say what to continue",
                where=f"--prompts={self.prompts}, --start={shown(self.start)}",
                expected="one of them",
            )
        stop_strings(self.stop)

    @property
    def own_seeds(self) -> bool:
        """Whether every sample has a generator of its own."""
        return self.seed_per_sample or self.batch_size > 1

    def seed_of(self, prompt_index: int, sample_index: int) -> int:
        """Of a sample's own generator, with which it can be drawn again alone; without own_seeds that of all."""
        own = prompt_index * self.num_samples + sample_index
        return (self.seed + own) % 2**63 if self.own_seeds else self.seed


def stop_strings(spec: str | None) -> tuple[str, ...]:
    """The texts that --stop names: a list of strings as Python, TOML and JSON write it, else one text in which a
    shell's backslashes count. Raises ConfigError for an empty one, which every text begins with."""
    if spec is None:
        return ()
    found: object = [_ESCAPE.sub(lambda escape: ast.literal_eval(f'"{escape[0]}"'), spec)]
    if spec.startswith("[") and spec.endswith("]") and len(spec) > 1:
        try:
            found = ast.literal_eval(spec)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            found = None
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text for text in found):
        raise ConfigError(
            "--stop names no text to stop at",
            where=f"--stop={shown(spec)}",
            expected="a text that is not empty, or a list of such",
            found=shown(found) if found is not None else "a list that cannot be read",
            hint="""--stop='\\n\\n', or several: --stop='["\\n\\n", "User:"]'""",
        )
    return tuple(found)
