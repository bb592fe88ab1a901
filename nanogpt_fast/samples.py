"""Samples of a model, printed as they come: what the command `sample` does once its flags are read."""

import json
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from nanogpt_fast.data.tokenizer import Tokenizer
from nanogpt_fast.distributed import resolve_device, resolve_dtype
from nanogpt_fast.draw import Draw, Generators
from nanogpt_fast.errors import DataError, printable
from nanogpt_fast.generate import Text, continued, prompt_ids
from nanogpt_fast.graphs import Graphs
from nanogpt_fast.ops import exact_device
from nanogpt_fast.prompts import Prompt, read_prompt, read_prompts
from nanogpt_fast.restore import build_model, restore
from nanogpt_fast.settings.sampling import SampleConfig, stop_strings
from nanogpt_fast.verdict import ops_known


class Job(NamedTuple):
    """A sample to draw: the index-th of its prompt's. seed: of the generator that draws it."""

    prompt_index: int
    prompt: str
    ids: list[int]
    index: int
    seed: int


def write_samples(config: SampleConfig) -> None:
    """num_samples of every prompt on stdout, in nanoGPT's form or as JSON lines; what they are of, and how fast, on
    stderr. All prompts are read and encoded before the first sample."""
    prompts = read_prompts(config.prompts, config.field) if config.prompts else [Prompt(read_prompt(config.start), "")]
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device, comparable=True)
    graphs = Graphs(device, config.cuda_graph)
    restored = restore(config.init_from, config.out_dir, config.data_dir, optimizer=False, activation=config.activation)
    tokenizer = restored.tokenizer()
    model = build_model(restored, device, dtype, ops_known(config.kernels, restored.config, device, dtype))
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    print(f"sampling from {printable(restored.source)}, {device}, {str(dtype).removeprefix('torch.')}", file=sys.stderr)
    if cropped := crop_note([len(ids) for ids in encoded], restored.config.block_size):
        print(cropped, file=sys.stderr)

    jobs = [
        Job(number, prompt.text, ids, index, config.seed_of(number, index))
        for number, (prompt, ids) in enumerate(zip(prompts, encoded))
        for index in range(config.num_samples)
    ]
    draw = Draw(config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty)
    stop, as_json, home = stop_strings(config.stop), config.format == "jsonl", exact_device(device)
    shared = torch.Generator(home).manual_seed(config.seed)
    tokens, began = 0, time.perf_counter()
    for first in range(0, len(jobs), config.batch_size):
        batch = jobs[first : first + config.batch_size]
        texts = [Text(tokenizer, config.max_new_tokens, stop, config.stop_at_eot) for _ in batch]
        generator: Generators = shared
        if config.own_seeds:
            generator = [torch.Generator(home).manual_seed(job.seed) for job in batch]
        pieces = continued(model, tokenizer, [job.ids for job in batch], texts, draw, generator, graphs, as_json)
        if config.stream and len(batch) == 1 and not as_json:
            write_piecewise(batch[0].prompt, pieces)
        else:
            write_whole(batch, texts, pieces, config)
        tokens += sum(len(text.ids) for text in texts)
    seconds = time.perf_counter() - began
    print(f"{tokens:,} tokens in {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s", file=sys.stderr)


def encode(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The prompt's ids; an error names its line."""
    try:
        return prompt_ids(tokenizer, prompt.text)
    except DataError as error:
        where = ", ".join(filter(None, (prompt.where, error.where)))
        raise error.at(where) from error


def crop_note(lengths: list[int], block_size: int) -> str:
    """What to say of prompts that are longer than what a model sees."""
    longer = sum(length > block_size for length in lengths)
    if len(lengths) == 1 and longer:
        return f"the prompt has {lengths[0]} tokens; the model sees the last {block_size}"
    if longer:
        return f"{longer} of {len(lengths)} prompts are longer than {block_size} tokens; the model sees the last ones"
    return ""


def write_piecewise(prompt: str, pieces: Iterator[tuple[int, str]]) -> None:
    """nanoGPT's form of a sample, each piece as soon as it is there."""
    print(printable(prompt), end="", flush=True)
    for _, piece in pieces:
        if piece:
            print(printable(piece), end="", flush=True)
    print("\n---------------", flush=True)


def write_whole(batch: list[Job], texts: list[Text], pieces: Iterator[tuple[int, str]], config: SampleConfig) -> None:
    """A batch's samples in its order, when all have ended. A JSON object and its line's end are one write: whoever
    interrupts this leaves whole lines."""
    parts: list[list[str]] = [[] for _ in batch]
    for row, piece in pieces:
        parts[row].append(piece)
    for job, text, part in zip(batch, texts, parts):
        if config.format == "text":
            print(f"{printable(job.prompt)}{printable(''.join(part))}\n---------------", flush=True)
            continue
        row = {
            "prompt_index": job.prompt_index,
            "sample_index": job.index,
            "prompt": job.prompt,
            "text": "".join(part),
            "tokens": len(text.ids),
            "finish_reason": text.finish_reason,
            "logprob": text.logprob,
            "seed": job.seed,
        }
        sys.stdout.write(json.dumps(row) + "\n")  # ASCII, escapes and all: nothing in it drives a terminal
        sys.stdout.flush()
