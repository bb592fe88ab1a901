"""An evaluation, from its configuration to its table: splits, files or tasks through a model that init_from names."""

import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape

from nanogpt_fast.data.bpe import extends_gpt2
from nanogpt_fast.data.dataset import check_name, read_meta
from nanogpt_fast.data.encode import cut
from nanogpt_fast.data.progress import Meter
from nanogpt_fast.data.splits import dataset_folder, open_split
from nanogpt_fast.data.text_files import read_chunks
from nanogpt_fast.data.tokenizer import end_of_text, from_json
from nanogpt_fast.data.tokens import TokenSource
from nanogpt_fast.distributed import keep_freed_memory, resolve_device, resolve_dtype
from nanogpt_fast.errors import ConfigError, DataError, printable
from nanogpt_fast.graphs import Graphs
from nanogpt_fast.model import GPT
from nanogpt_fast.restore import Restored, build_model, restore
from nanogpt_fast.score_table import PUBLISHED, Row, json_lines, table
from nanogpt_fast.scoring import (
    Batch,
    Forward,
    all_targets,
    random_targets,
    score,
    stack_for,
    strided_targets,
)
from nanogpt_fast.settings.config import DataConfig
from nanogpt_fast.settings.evaluating import EvaluateConfig
from nanogpt_fast.verdict import ops_known
from nanogpt_fast.zeroshot.tasks import Tasks


def evaluate(config: EvaluateConfig) -> None:
    """Evaluate and print a table, or JSON lines. Raises NanogptError."""
    tasks = (
        Tasks(config.tasks, config.source, config.limit, config.num_fewshot, config.report) if config.tasks else None
    )
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
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
