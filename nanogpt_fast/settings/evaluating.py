"""The flags of `evaluate`."""

from dataclasses import dataclass
from typing import Literal

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.settings.config import require_range


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is evaluated, and on what. --config takes these values from a training configuration."""

    init_from: str = "resume"  # resume or best (of out_dir), gpt2 ... gpt2-xl, or a path
    out_dir: str = "out"  # the run to evaluate
    dataset: str = ""  # a folder in data_dir; by default the one the model was trained on
    data_dir: str = "data"  # parent of the dataset folders
    split: str = ""  # train, val or train,val; by default val, and both with --eval_mode=random
    file: str = ""  # a text file to evaluate on instead
    eval_mode: Literal["full", "random"] = "full"  # the whole split in order, or nanoGPT's random batches
    eval_iters: int = 200  # random batches a split
    batch_size: int = 12  # sequences a batch
    block_size: int = 0  # tokens a sequence; 0 takes the model's
    stride: int = 0  # targets a window when windows overlap: fewer give each more context; 0: they do not overlap
    document_mask: bool | None = None  # attention stays inside a document; by default as the model was trained
    seed: int = 1337  # of the random batches
    device: str = "auto"  # auto | cpu | cuda | cuda:0 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on the CPU
    activation: Literal["", "gelu", "gelu_tanh"] = ""  # instead of the file's; nanoGPT's before June 2023: gelu_tanh
    kernels: str = "auto"  # auto | triton | reference, and single ops: triton,attention=reference
    cuda_graph: Literal["auto", "on", "off"] = "auto"  # replay the forward as a CUDA graph
    tasks: str = ""  # zero-shot tasks instead, with commas: wikitext2,ptb,lambada,... (below), and lm-eval's
    source: str = ""  # of tasks: folders with their files, and NAME=FILE, with commas; else the Hugging Face hub
    limit: int = 0  # of tasks: only the first lines or examples (thousand characters of enwik8, text8)
    num_fewshot: int = -1  # examples before a question, of lm-eval's tasks; -1: as each says
    report: str = ""  # of tasks: a .md, .csv or .jsonl file for the table, written after each task
    json: bool = False  # one JSON object a split, or a figure, instead of the table
    debug: bool = False  # tracebacks instead of short errors

    def __post_init__(self) -> None:
        least = {"eval_iters": 1, "batch_size": 1, "num_fewshot": -1}
        for key in ("eval_iters", "batch_size", "block_size", "stride", "seed", "limit", "num_fewshot"):
            rule = f"a whole number >= {least.get(key, 0)}"
            require_range(getattr(self, key) >= least.get(key, 0), key, rule, getattr(self, key))
        of_tasks = {key: getattr(self, key) for key in ("source", "limit", "report") if getattr(self, key)}
        if of_tasks and not self.tasks:
            key, value = next(iter(of_tasks.items()))
            raise ConfigError(
                f"--{key} is for --tasks", where=f"{key} = {value!r}", expected="--tasks=NAME,... beside it"
            )
        if self.tasks and (self.file or self.split or self.eval_mode == "random"):
            where = (
                f"tasks = {self.tasks!r}, file = {self.file!r}, split = {self.split!r}, eval_mode = {self.eval_mode!r}"
            )
            expected = "--tasks alone, each has its own text"
            raise ConfigError("--tasks and a split or a file are two evaluations", where=where, expected=expected)
