"""Evaluate a model: `python -m nanogpt_fast.evaluate --out_dir=out [--split=val | --file=TEXT]`.

Loss in nats a token, perplexity, and bits per byte of the text behind the tokens, which compares models whatever
their tokenizers. Over a whole split in order, or over nanoGPT's random batches (--eval_mode=random). With --tasks the
table of GPT-2's paper, and lm-eval's tasks (zeroshot/, docs/evaluate.md).
"""

import shlex
import sys
import tempfile
import textwrap
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.markup import escape

from nanogpt_fast.command import run_command
from nanogpt_fast.data.bpe import extends_gpt2
from nanogpt_fast.data.dataset import check_name, read_meta
from nanogpt_fast.data.encode import cut
from nanogpt_fast.data.progress import Meter
from nanogpt_fast.data.splits import dataset_folder, open_split
from nanogpt_fast.data.text_files import read_chunks
from nanogpt_fast.data.tokenizer import end_of_text, from_json
from nanogpt_fast.data.tokens import TokenSource
from nanogpt_fast.distributed import resolve_device, resolve_dtype
from nanogpt_fast.errors import ConfigError, DataError, printable
from nanogpt_fast.graphs import Graphs
from nanogpt_fast.model import GPT
from nanogpt_fast.restore import Restored, build_model, restore
from nanogpt_fast.score_table import PUBLISHED, Row, json_lines, table
from nanogpt_fast.scoring import (
    Batch,
    Forward,
    Mode,
    all_targets,
    random_targets,
    score,
    stack_for,
    strided_targets,
)
from nanogpt_fast.settings import cli
from nanogpt_fast.settings.config import DataConfig, require_range
from nanogpt_fast.verdict import ops_known
from nanogpt_fast.zeroshot.tasks import OURS, Tasks

PROG = "python -m nanogpt_fast.evaluate"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is evaluated, and on what. --config takes these values from a training configuration."""

    init_from: str = "resume"  # resume or best (of out_dir), gpt2 ... gpt2-xl, or a path
    out_dir: str = "out"  # the run to evaluate
    dataset: str = ""  # a folder in data_dir; by default the one the model was trained on
    data_dir: str = "data"  # parent of the dataset folders
    split: str = ""  # train, val or train,val; by default val, and both with --eval_mode=random
    file: str = ""  # a text file to evaluate on instead
    eval_mode: Mode = "full"  # the whole split in order, or nanoGPT's random batches
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


def main(argv: list[str]) -> None:
    """Evaluate and print a table, or JSON lines."""
    config = parse_config(argv)
    tasks = (
        Tasks(config.tasks, config.source, config.limit, config.num_fewshot, config.report) if config.tasks else None
    )
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device, comparable=True)
    restored = restore(config.init_from, config.out_dir, config.data_dir, optimizer=False, activation=config.activation)
    config = resolve_windows(config, restored) if tasks else resolve(config, restored)
    masked = bool(config.document_mask)
    model = build_model(restored, device, dtype, ops_known(config.kernels, restored.config, device, dtype, masked))
    if tasks:
        facts = {"model": restored.source, "windows": f"{config.block_size} tokens, {config.stride} apart",
                 "device": str(device), "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
        report = tasks.run(model, restored.tokenizer(), block_size=config.block_size, stride=config.stride, facts=facts)
        print(printable(report.in_form(".jsonl").rstrip() if config.json else "\n".join(report.lines())))
        return
    generator = torch.Generator().manual_seed(config.seed)
    with ExitStack() as stack:
        sources, tokenizer_json = open_sources(config, restored, stack)
        token_bytes = bytes_of(tokenizer_json, restored.config.vocab_size)
        eot = end_of_text(tokenizer_json or {}, restored.config.vocab_size) if config.document_mask else None
        forward, rows = Forward(model, eot, Graphs(device, config.cuda_graph)), []
        for split, source in sources.items():
            began = time.perf_counter()
            batches = shown(split, targets_of(config, source, model, generator), targets_in(config, source))
            result = score(model, batches, token_bytes, forward)
            rows.append(Row(split, result, time.perf_counter() - began))
    facts = {
        "model": restored.source,
        "data": config.file or config.dataset,
        "mode": config.eval_mode,
        "block_size": config.block_size,
        "stride": config.stride,
        "document_mask": config.document_mask,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }
    published = PUBLISHED.get(config.init_from, {}) if config.dataset == "openwebtext" and not config.file else {}
    lines = json_lines(facts, rows, published) if config.json else table(facts, rows, published)
    print(printable("\n".join(lines)))


def parse_config(argv: list[str]) -> EvaluateConfig:
    """The flags, over the values that `--config NAME` (or a leading NAME) shares with a training configuration."""
    trained: list[str] = []
    rest: list[str] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        if word.partition("=")[0] == "--config":
            trained += [word, words.popleft()] if word == "--config" and words else [word]
        else:
            (rest if rest or word.startswith("-") else trained).append(word)  # bare words are names at the start only
    default = None
    if trained:
        flat = cli.load_config(trained, prog=PROG).flat()
        flat.pop("activation")  # of a model from scratch; here it would overrule the weights'
        shared = {f.name: flat[f.name] for f in fields(EvaluateConfig) if f.name in flat}
        if shared["init_from"] == "scratch":
            shared["init_from"] = "resume"  # the run it would train is the run to evaluate
        default = EvaluateConfig(**shared)
    description = "Evaluate a model: loss in nats a token, perplexity, bits per byte."
    epilog = "--config NAME (or a leading NAME) takes values from a training\nconfiguration.\n\n" + textwrap.fill(
        f"tasks: {', '.join(OURS)}; with pip install 'nanogpt-fast[eval]' those of lm-eval: lambada_openai, hellaswag, "
        "wikitext ... (lm-eval ls tasks). docs/evaluate.md", 80)  # fmt: skip
    return cli.parse(EvaluateConfig, rest, prog=PROG, description=description, epilog=epilog, default=default)


def resolve_windows(config: EvaluateConfig, restored: Restored) -> EvaluateConfig:
    """The same with block_size and stride filled in. Raises ConfigError."""
    longest = restored.config.block_size
    block_size = config.block_size or longest
    stride = config.stride or block_size
    if block_size > longest or stride > block_size:
        key = "block_size" if block_size > longest else "stride"
        raise ConfigError(
            f"--{key} is too long",
            where=f"block_size = {block_size}, stride = {stride}, {restored.source}",
            expected=f"stride <= block_size <= {longest}, the model's positions",
        )
    return replace(config, block_size=block_size, stride=stride)


def resolve(config: EvaluateConfig, restored: Restored) -> EvaluateConfig:
    """The same with dataset, split, block_size, stride and document_mask filled in. Raises ConfigError."""
    config, masked = resolve_windows(config, restored), config.document_mask
    if (stride := config.stride) < config.block_size and config.eval_mode == "random":
        raise ConfigError("--stride is for --eval_mode=full", where=f"stride = {stride}, eval_mode = 'random'")
    dataset = config.dataset or restored.run_config.get("dataset")
    if not config.file and not dataset:
        raise ConfigError(
            "nothing says what to evaluate on",
            where=restored.source,
            expected="--dataset=NAME or --file=TEXT",
            hint="--dataset=openwebtext",
        )
    if not config.file and not config.dataset:
        try:
            check_name(str(dataset))
        except DataError as error:  # a path that a file chose is not opened unasked
            hint = f"if you know these data: --dataset={shlex.quote(str(dataset))}"
            raise DataError(error.what, where=restored.source, expected=error.expected, hint=hint) from None
    return replace(
        config,
        dataset=str(dataset or ""),
        split=config.split or ("val" if config.eval_mode == "full" else "train,val"),
        document_mask=restored.run_config.get("document_mask") is True if masked is None else masked,
    )


def open_sources(
    config: EvaluateConfig, restored: Restored, stack: ExitStack
) -> tuple[dict[str, TokenSource], dict[str, Any] | None]:
    """({split: tokens}, tokenizer of the data). Raises DataError for data of another tokenizer than the model's."""
    if config.file:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "tokens.bin")
        source, tokenizer = Path(config.file).expanduser(), restored.tokenizer()
        texts = ((text, False) for text in read_chunks(source))
        with open(path, "wb") as tokens:
            for text, _ in cut(texts, tokenizer.boundary):
                tokenizer.encode_ordinary(text).astype("<u2").tofile(tokens)
            if not tokens.tell():
                raise DataError("the text is empty", where=config.file)
        return {source.name: stack.enter_context(TokenSource([str(path)]))}, restored.tokenizer_json
    data = DataConfig(dataset=config.dataset, data_dir=config.data_dir)
    splits = [name.strip() for name in config.split.split(",")]
    sources = {name: open_split(data, name, required=True) for name in splits}  # type: ignore[call-overload]
    for source in sources.values():
        stack.enter_context(source)
    folder = dataset_folder(data)
    meta = read_meta(folder) if folder else None
    theirs, ours = meta.tokenizer if meta else {"kind": "gpt2"}, restored.tokenizer_json
    if ours is not None and theirs != ours and not (extends_gpt2(ours) and theirs.get("kind") == "gpt2"):
        raise DataError(
            "the data were prepared with another tokenizer than the model's",
            where=f"{folder or config.dataset}, {restored.source}",
            expected=_named(ours),
            found=_named(theirs),
            hint="--dataset=NAME of data for this model, or --file=TEXT",
        )
    return sources, theirs


def _named(tokenizer_json: dict[str, Any]) -> str:
    itos = tokenizer_json.get("itos")
    return f"{len(itos)} characters, {''.join(map(str, itos))[:60]!r}" if itos else str(tokenizer_json.get("kind"))


def bytes_of(tokenizer_json: dict[str, Any] | None, vocab_size: int) -> np.ndarray | None:
    """Bytes of text behind each of the model's ids, 0 for the unused; None when the tokenizer is not to be had."""
    if tokenizer_json is None:
        return None
    try:
        known = from_json(tokenizer_json).token_bytes()
    except DataError as error:  # GPT-2's vocabulary may be out of reach; the loss needs none
        print(f"no bits per byte: {error.what}", file=sys.stderr)
        return None
    return np.pad(known, (0, max(0, vocab_size - len(known))))


def targets_of(config: EvaluateConfig, source: TokenSource, model: GPT, generator: torch.Generator) -> Iterator[Batch]:
    """The batches that the flags ask for."""
    B, T, vocab_size = config.batch_size, config.block_size, model.config.vocab_size
    stack = stack_for(model, B, T)
    if config.eval_mode == "random":
        draws = {"eval_iters": config.eval_iters, "generator": generator, "stack": stack}
        return random_targets(source, vocab_size, batch_size=B, block_size=T, **draws)
    if config.stride < T:
        return strided_targets(source, vocab_size, batch_size=stack * B, block_size=T, stride=config.stride)
    return all_targets(source, vocab_size, batch_size=stack * B, block_size=T)


def targets_in(config: EvaluateConfig, source: TokenSource) -> int:
    """How many targets those batches have, nearly."""
    random = config.eval_iters * config.batch_size * config.block_size
    return random if config.eval_mode == "random" else sum(max(0, file.n_tokens - 1) for file in source.files)


def shown(split: str, batches: Iterator[Batch], total: int) -> Iterator[Batch]:
    """The batches, and how far they are on stderr: a bar on a terminal, a line every 10 s elsewhere."""
    done = 0
    with Meter(escape(printable(split)), total) as meter:
        for batch in batches:
            yield batch
            count = int((batch[1] >= 0).sum())
            done += count
            left = meter.seconds * (total / max(1, done) - 1)
            meter.advance(count, f"{done:,} of {total:,} tokens, {max(0.0, left):,.0f} s to go")


if __name__ == "__main__":
    run_command(main, again="nothing is kept of it; the same command evaluates anew")
