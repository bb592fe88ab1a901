"""Turn text into token files: python -m nanogpt_fast.prepare NAME"""

import time
from pathlib import Path

from nanogpt_fast.command import run_command
from nanogpt_fast.data.dataset import Meta, is_complete, verify
from nanogpt_fast.data.preparation import PrepareConfig, prepare
from nanogpt_fast.data.token_format import HEADER_BYTES
from nanogpt_fast.data.token_writer import TOKEN_BYTES
from nanogpt_fast.settings import cli

_DATASETS = """\
datasets:
  stdlib            the sources of Python's own library: no download
  shakespeare_char  Tiny Shakespeare, a token a character; nanoGPT's very bytes
  shakespeare       Tiny Shakespeare in GPT-2 tokens
  openwebtext, fineweb, finewebedu
                    streamed from the Hugging Face hub (extra `data`)
  text              your own: --source FILE, FOLDER or GLOB (.txt .md .py, and
                    with --field the rows of .jsonl .json .csv .parquet; packed
                    too: .gz .zst); any other NAME with --source is the same,
                    under that name"""

FEW_TOKENS = 1_000_000  # fewer are no text to train GPT-2 124M on from scratch


def _summary(config: PrepareConfig, meta: Meta, seconds: float | None) -> str:
    folder = config.folder
    rows = [f"{folder}: {meta.source}, {meta.tokenizer['kind']} tokens, vocabulary {meta.vocab_size:,}"]
    for name, split in meta.splits.items():
        size = sum(file.bytes for file in split.files)
        rows.append(f"  {name:<6}{split.tokens:>15,} tokens {size:>15,} bytes in {len(split.files)} file(s)")
    total = sum(split.tokens for split in meta.splits.values())
    rate = "already prepared; --force makes it again" if seconds is None else ""
    rows.append(f"  {rate or f'{seconds:.1f} s, {total / (seconds or 1):,.0f} tokens/s'}")
    return "\n".join([*rows, _next(config, meta)])


def _next(config: PrepareConfig, meta: Meta) -> str:
    """The training command that these tokens are enough for."""
    folder, header = config.folder, HEADER_BYTES if config.format == "llmc" else 0
    longest = [max((file.bytes - header) // TOKEN_BYTES for file in split.files) for split in meta.splits.values()]
    room = min(longest) - 1  # a sample is block_size + 1 tokens of one file
    if room < 1:
        return "next: more text, this has no two tokens for either split"
    preset = config.recipe.preset if config.tokenizer_kind == config.recipe.tokenizer else "shakespeare_char"
    flags = f" --dataset={folder.name}" + ("" if folder.parent == Path("data") else f" --data_dir={folder.parent}")
    if preset == "gpt2_124m" and meta.splits["train"].tokens < FEW_TOKENS:
        preset, flags = "quickstart", f"{flags} --out_dir=out-{folder.name}"
    if room < cli.load_config(["--config", preset], prog="prepare").data.block_size:
        flags += f" --block_size={room}"
    return f"next: python -m nanogpt_fast.train --config {preset}{flags}"


def main(argv: list[str]) -> int:
    prog = "python -m nanogpt_fast.prepare"
    config = cli.parse(PrepareConfig, argv, prog=prog, description="Turn text into token files.", epilog=_DATASETS)
    if config.verify:
        meta = verify(config.folder)
        print(f"{config.folder}: {sum(len(split.files) for split in meta.splits.values())} files are as prepared")
        return 0
    there = not config.force and is_complete(config.folder)
    began = time.perf_counter()
    meta = prepare(config)
    print(_summary(config, meta, None if there else time.perf_counter() - began))
    return 0


if __name__ == "__main__":
    run_command(main, again="the same command goes on where it stopped")
