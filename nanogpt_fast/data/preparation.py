"""Preparing a dataset: read the text that a name or --source stands for, encode it, write the folder.

Single texts are split by position (the last tenth is val), as nanoGPT does. Collections are split by document: a
hash of (seed, document number) decides, so the order never changes and the stream is read once. Documents end with
<|endoftext|>, in a character dataset with a blank line.
"""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tyro.conf import Positional, arg

from nanogpt_fast import __version__
from nanogpt_fast.data.dataset import Meta, check_name, is_complete, read_meta
from nanogpt_fast.data.documents import (
    PLAIN,
    SUFFIXES,
    Documents,
    FileDocuments,
    TextDocuments,
    fetch,
    find_files,
    hub_documents,
    read_text,
    stdlib_documents,
)
from nanogpt_fast.data.encode import (
    CHAR_SEPARATOR,
    Encoder,
    batches_by_document,
    batches_by_position,
    document_end,
    encode_batches,
)
from nanogpt_fast.data.recipes import RECIPES, Download, Recipe
from nanogpt_fast.data.token_writer import PARTIAL, Format, TokenWriter, disk_errors, locked, stale_files
from nanogpt_fast.data.tokenizer import CharTokenizer, Tokenizer, gpt2_tokenizer
from nanogpt_fast.errors import ConfigError, DataError, did_you_mean
from nanogpt_fast.files import write_atomic
from nanogpt_fast.settings.config import require_range

INLINE_BYTES = 32 << 20  # below this much text (2.5 s of GPT-2 encoding) worker processes cost more than they save
COMMIT_TOKENS = 10_000_000  # an interrupted preparation loses at most so many


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to prepare, from what, and where to."""

    name: Annotated[Positional[str], arg(metavar="NAME")]  # a dataset of the list below, or yours with --source
    source: str = ""  # the text: a file, a folder or a quoted glob
    out: str = ""  # the dataset's folder; data/NAME where not given
    tokenizer: Literal["auto", "char", "gpt2"] = "auto"  # auto: what the name says, GPT-2 for your own text
    format: Format = "bin"  # bin: nanoGPT's train.bin and val.bin; llmc: shards with a header, as llm.c reads them
    vocab_bpe: str = ""  # GPT-2's vocab.bpe, where it is not found by itself
    val_fraction: float = 0.0  # share that becomes val; 0: 0.1, and 0.0005 for the large sets
    seed: int = 2357  # of the split by documents
    num_proc: int = 0  # processes that tokenize; 0: half of the cores
    field: str = "text"  # of .jsonl, .parquet and hub rows: the field that holds the text
    subset: str = ""  # hub: another subset, like sample-100BT
    shard_tokens: int = 100_000_000  # tokens a shard (llmc)
    max_tokens: int = 0  # stop after about so many tokens; 0: all
    verify: bool = False  # only check the files against the SHA-256 list in meta.json
    force: bool = False  # replace what is there
    debug: bool = False  # tracebacks instead of short errors

    def __post_init__(self) -> None:
        for key, ok, rule in (
            ("val_fraction", 0 <= self.val_fraction < 1, "0 < val_fraction < 1, or 0 for the default"),
            ("num_proc", self.num_proc >= 0, ">= 0"),
            ("shard_tokens", 1 <= self.shard_tokens < 2**31, "1 .. 2^31 - 1 (llm.c's header is int32)"),
            ("max_tokens", self.max_tokens >= 0, ">= 0"),
        ):
            require_range(ok, key, rule, getattr(self, key))

    @property
    def folder(self) -> Path:
        return Path(self.out).expanduser() if self.out else Path("data", check_name(self.name))

    @property
    def recipe(self) -> Recipe:
        """What the name stands for; a name of your own with a --source is `text`."""
        if self.name not in RECIPES and not self.source:
            raise DataError(
                f"there is no dataset {self.name!r}{did_you_mean(self.name, RECIPES)}",
                expected=", ".join(RECIPES),
                hint=f"for your own text: python -m nanogpt_fast.prepare {check_name(self.name)} --source FILE",
            )
        return RECIPES.get(self.name, RECIPES["text"])

    @property
    def tokenizer_kind(self) -> str:
        return self.recipe.tokenizer if self.tokenizer == "auto" else self.tokenizer


def prepare(config: PrepareConfig, *, wait: float = 0.0) -> Meta:
    """Write the dataset's folder, or return what it holds when the same settings made it.

    wait: seconds to wait for another process that is preparing the same folder. Raises DataError, ConfigError.
    """
    folder, recipe = config.folder, config.recipe
    with locked(folder, wait):
        source = _open_source(config)
        by_position = isinstance(source, TextDocuments) and len(source.texts) == 1
        settings: dict[str, Any] = {
            "fingerprint": source.fingerprint,
            "tokenizer": config.tokenizer_kind,
            "format": config.format,
            "split": "position" if by_position else "document",
            "val_fraction": config.val_fraction or recipe.val_fraction,
            "seed": config.seed,
            "field": config.field,
            "max_tokens": config.max_tokens,
        } | ({"shard_tokens": config.shard_tokens} if config.format == "llmc" else {})
        if not config.force and (found := _already_there(folder, settings)):
            return found
        tokenizer = _make_tokenizer(config, source)
        writer = TokenWriter(folder, config.format, config.shard_tokens, settings)
        try:
            _encode(config, source, tokenizer, writer, settings)
            return writer.publish(
                tokenizer.vocab_size, tokenizer.to_json(), source.description, f"nanogpt_fast {__version__}"
            )
        except BaseException:  # Ctrl-C too
            writer.abandon()
            raise


def ensure(name: str, data_dir: str | Path) -> Path:
    """The dataset's folder, data_dir/name. `stdlib`, and no other, is prepared when it is missing."""
    folder = Path(data_dir, name)
    if name == "stdlib" and not is_complete(folder):
        prepare(PrepareConfig(name=name, out=str(folder)), wait=300)
    return folder


def _already_there(folder: Path, settings: dict[str, Any]) -> Meta | None:
    """The folder's meta when the same settings made it, None where it must be made (again); else DataError."""
    stale = stale_files(folder)
    if not stale or (not (folder / "meta.json").exists() and (folder / PARTIAL).exists()):
        return None  # the second: cut off while publishing
    meta = read_meta(folder)
    if meta is not None and meta.settings == settings:
        return meta if is_complete(folder) else None  # a token file is gone or cut short
    changed = {key: value for key, value in settings.items() if meta and meta.settings.get(key) != value}
    raise DataError(
        "the folder holds token files made otherwise",
        where=", ".join(str(path) for path in stale[:4]),
        expected=", ".join(f"{key} {value}" for key, value in changed.items()),
        found=", ".join(f"{key} {meta.settings.get(key)}" for key in changed) if meta else "",
        hint="replace them with --force, or write elsewhere with --out FOLDER",
    )


def _open_source(config: PrepareConfig) -> Documents:
    """The text that a name, or --source, stands for."""
    recipe = config.recipe
    if config.name == "stdlib":
        if config.source:
            raise ConfigError(
                "stdlib has no --source", hint=f"python -m nanogpt_fast.prepare text --source {config.source}"
            )
        return stdlib_documents()
    if recipe.download:
        return _one_text(config, recipe.download)
    if config.source:
        paths = find_files(config.source)
        if len(paths) == 1 and (paths[0].suffix in PLAIN or paths[0].suffix not in SUFFIXES):
            return TextDocuments([read_text(paths[0])], config.source)
        return FileDocuments(paths, config.source, config.field)
    if recipe.repository:
        return hub_documents(recipe.repository, config.subset or recipe.subset, config.field)
    hint = f"python -m nanogpt_fast.prepare {config.name} --source FILE"
    raise DataError(f"{config.name} needs your text", expected="--source with a file, a folder or a glob", hint=hint)


def _one_text(config: PrepareConfig, download: Download) -> TextDocuments:
    """--source, else the folder's input.txt (nanoGPT keeps it there), else the download."""
    kept = config.folder / "input.txt"
    if config.source:
        path, *more = find_files(config.source)
        if more:
            hint = f"python -m nanogpt_fast.prepare text --source {config.source}"
            raise DataError(f"{config.name} is one file", found=f"{1 + len(more)} in {config.source}", hint=hint)
        text = read_text(path)
        if not kept.exists():
            with disk_errors(kept):
                write_atomic(kept, text.encode())
        return TextDocuments([text], config.source)
    if not kept.exists():
        otherwise = f"download it elsewhere, then: python -m nanogpt_fast.prepare {config.name} --source input.txt"
        fetch(download.url, kept, download.sha256, otherwise=otherwise)
    return TextDocuments([read_text(kept)], "Tiny Shakespeare")


def _make_tokenizer(config: PrepareConfig, source: Documents) -> Tokenizer:
    if config.tokenizer_kind == "gpt2":
        return gpt2_tokenizer(Path(config.vocab_bpe).expanduser() if config.vocab_bpe else None)
    if source.nbytes is None:
        hint = "--tokenizer=gpt2"
        raise ConfigError("a character vocabulary needs the whole text first; this one is streamed", hint=hint)
    single = isinstance(source, TextDocuments) and len(source.texts) == 1
    chars = set() if single else set(CHAR_SEPARATOR)
    for text in source.read():
        chars.update(text)
    return CharTokenizer(sorted(chars))


def _encode(
    config: PrepareConfig, source: Documents, tokenizer: Tokenizer, writer: TokenWriter, settings: dict[str, Any]
) -> None:
    """Read, encode and write everything, committing every COMMIT_TOKENS."""
    small = source.nbytes is not None and source.nbytes < INLINE_BYTES
    num_proc = config.num_proc or (1 if small else min(16, max(1, (os.cpu_count() or 2) // 2)))
    if settings["split"] == "position":
        assert isinstance(source, TextDocuments)
        batches = batches_by_position(source.texts[0], settings["val_fraction"], writer.documents)
        encoder = Encoder(tokenizer)
    else:
        share = (config.seed, settings["val_fraction"])
        batches = batches_by_document(source, *share, writer.documents, writer.state)
        encoder = Encoder(tokenizer, document_end(tokenizer))
    with contextlib.closing(encode_batches(batches, encoder, num_proc)) as encoded, _Meter(source, writer) as meter:
        for batch, tokens in encoded:
            for split, ids in tokens.items():
                writer.write(split, ids)
            if writer.tokens - writer.committed >= COMMIT_TOKENS:
                writer.commit(batch.documents, batch.state)
            meter.update(batch.documents, batch.chars)
            if config.max_tokens and writer.tokens >= config.max_tokens:
                break
    if not writer.tokens:
        raise DataError("the source is empty", where=source.description, found="no text", hint="give another --source")


class _Meter:
    """Documents, tokens and tokens/s while preparing: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, source: Documents, writer: TokenWriter):
        self.writer, self.first = writer, writer.tokens
        self.began = self.told = time.perf_counter()
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("", total=source.nbytes)

    def __enter__(self) -> "_Meter":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, documents: int, chars: int) -> None:
        now = time.perf_counter()
        rate = (self.writer.tokens - self.first) / max(now - self.began, 1e-9)
        text = f"{documents:,} documents, {self.writer.tokens:,} tokens, {rate:,.0f} tokens/s"
        self.bar.update(self.task, advance=chars, description=text)
        if not self.console.is_terminal and now - self.told > 10:
            self.told = now
            print(text, file=self.console.file, flush=True)
