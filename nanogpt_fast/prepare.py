"""Turn text into token files: python -m nanogpt_fast.prepare NAME"""

import time
from pathlib import Path

from nanogpt_fast.command import run_command
from nanogpt_fast.data.dataset import PARTS, Meta, is_complete, verify
from nanogpt_fast.data.nodes import SPLIT, Node, listed, made, node_of, unfinished
from nanogpt_fast.data.preparation import PrepareConfig, prepare, prepare_part
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
                    under that name

many machines:
  the same command on each, with its own K of N: openwebtext --node=2/8. Each
  reads whole files of the source and writes FOLDER/parts/KofN; killed, it goes
  on where it stopped. On a shared folder the last one joins the parts, into
  the files that one machine writes. On disks of their own: copy FOLDER/parts/*
  to one of them, then the same command with --join for --node. A machine that
  is lost: any other can be its K. Slurm, torchrun: --node=env. docs/prepare.md"""

FEW_TOKENS = 1_000_000  # fewer are no text to train GPT-2 124M on from scratch


def _summary(config: PrepareConfig, meta: Meta, note: str) -> str:
    folder = config.folder
    rows = [f"{folder}: {meta.source}, {meta.tokenizer['kind']} tokens, vocabulary {meta.vocab_size:,}"]
    for name, split in meta.splits.items():
        size = sum(file.bytes for file in split.files)
        rows.append(f"  {name:<6}{split.tokens:>15,} tokens {size:>15,} bytes in {len(split.files)} file(s)")
    return "\n".join([*rows, f"  {note}", _next(config, meta)])


def _part_summary(config: PrepareConfig, node: Node, seconds: float) -> str:
    part = made(node.folder(config.folder))
    tokens = part.splits[SPLIT].tokens if part else 0
    missing = listed(unfinished(config.folder, node.of))
    return (
        f"{config.folder}: part {node} is done, {tokens:,} tokens, {seconds:.1f} s\n"
        f"  {f'still missing here: {missing}' if missing else 'all parts are here'}\n"
        "next: "
        + ("the last node joins them; " * bool(missing and not config.force))
        + f"with all in {config.folder / PARTS}, --join in place of --node does"
    )


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
    node = node_of(config.node) if config.node else None
    there = not config.force and is_complete(config.folder)
    began = time.perf_counter()
    meta = prepare_part(config, node) if node else prepare(config)
    seconds = time.perf_counter() - began
    if node and not meta:
        print(_part_summary(config, node, seconds))
    else:
        assert meta
        total = sum(split.tokens for split in meta.splits.values())
        note = f"{seconds:.1f} s, {total / seconds:,.0f} tokens/s"
        if node or config.join:
            note = f"{seconds:.1f} s, joined from {f'{node.of} ' if node else ''}parts"
        print(_summary(config, meta, "already prepared; --force makes it again" if there else note))
    return 0


if __name__ == "__main__":
    run_command(main, again="the same command goes on where it stopped")
