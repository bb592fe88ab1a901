"""Preparing a dataset: read the text that a name or --source stands for, encode it, write the folder.

Single texts are split by position (the last tenth is val), as nanoGPT does, and so is a handful of documents.
Collections are split by document: a hash of (seed, document number) decides, so the order never changes and the stream
is read once. Documents end with <|endoftext|>, in a character dataset with a blank line.
"""

import contextlib
import functools
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from nanogpt_fast import __version__
from nanogpt_fast.data.dataset import PARTIAL, Meta, check_name, is_complete, made_otherwise, read_meta
from nanogpt_fast.data.documents import Documents, FileDocuments, fetch, find_files, stdlib_documents
from nanogpt_fast.data.encode import (
    CHAR_SEPARATOR,
    Encoder,
    batches_by_document,
    batches_by_position,
    document_end,
    encode_batches,
    is_val,
    val_of_few,
)
from nanogpt_fast.data.hub import hub_documents
from nanogpt_fast.data.nodes import SPLIT, Node, claimed, give_up_others, join, made, ready, remove_all, unfinished
from nanogpt_fast.data.progress import Meter
from nanogpt_fast.data.recipes import RECIPES, Download, Recipe
from nanogpt_fast.data.text_files import has_rows, read_chunks, write_text
from nanogpt_fast.data.token_writer import Format, TokenWriter, disk_errors, locked, stale_files
from nanogpt_fast.data.tokenizer import CharTokenizer, Tokenizer, gpt2_tokenizer
from nanogpt_fast.errors import ConfigError, DataError, did_you_mean
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
    node: str = ""  # K/N: make part K of N, the other parts are other machines'; env: as torchrun or srun says
    join: bool = False  # put the parts of all N together, where no node found all of them in the folder
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
        if self.node and self.join:
            raise ConfigError("--node makes a part, --join puts all together", hint="leave one of them out")

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
    with locked(config.folder, wait):
        return _prepare(config)


def prepare_part(config: PrepareConfig, node: Node) -> Meta | None:
    """Write a node's part of the dataset; the dataset itself where the parts of all nodes are in the folder then.

    None where some are missing, may be older than --force, or the file system has no locks. DataError, ConfigError.
    """
    _refuse_parts(config)
    source = _open_source(config)
    settings, _ = _settings(config, source)
    with claimed(config.folder, node):
        meta = None if config.force else _already_there(config.folder, settings)
        if not meta:
            give_up_others(config.folder, node.of, config.force)
            _prepare_part(config, source, settings, node)
    if not meta and (config.force or unfinished(config.folder, node.of)):
        return None
    with locked(config.folder, -1) as held:  # two nodes may end at once
        if held:  # without locks both would join
            meta = _prepare(replace(config, node="", join=True))
    return meta


def _prepare(config: PrepareConfig) -> Meta:
    if config.join:
        _refuse_parts(config)
    folder = config.folder
    source = _open_source(config)
    settings, split_of = _settings(config, source)
    if not config.force and (found := _already_there(folder, settings)):
        if not any((folder / PARTIAL).glob("*.bin")):  # killed after meta.json was written
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        meta = found
    elif config.join:
        parts = ready(folder, settings, None if source.nbytes is None else source.listing)
        writer = TokenWriter(folder, config.format, config.shard_tokens, settings)
        meta = _published(config, source, writer, lambda t: join(folder, parts, t, split_of, writer))
    else:
        writer = TokenWriter(folder, config.format, config.shard_tokens, settings)
        meta = _published(config, source, writer, lambda t: _encode(config, source, t, writer, split_of))
    if config.join:
        remove_all(folder)
    return meta


def _prepare_part(config: PrepareConfig, source: Documents, settings: dict[str, Any], node: Node) -> None:
    folder, own = node.folder(config.folder), source.part(*node)
    settings = settings | {"node": str(node), "listing": source.listing}
    if not config.force and (meta := made(folder)):
        if meta.settings != settings:
            hint = "--force makes it again; write elsewhere with --out FOLDER"
            raise made_otherwise("this node's part was made otherwise", [folder], settings, meta, hint)
        return
    writer = TokenWriter(folder, "bin", 0, settings, [SPLIT])
    _published(config, own, writer, lambda t: _encode(config, own, t, writer, lambda number: SPLIT))


def _refuse_parts(config: PrepareConfig) -> None:
    """ConfigError for what one machine has to prepare."""
    why = ""
    if config.tokenizer_kind == "char":
        why = "a character vocabulary needs the whole text first"
    elif config.recipe.download:
        why = f"{config.name} is one text"
    elif config.max_tokens:
        why = "--max_tokens counts from the source's beginning"
    if why:
        hint = "leave out --node and --join" + ", or --max_tokens" * bool(config.max_tokens)
        raise ConfigError("this cannot be prepared in parts", where=config.name, found=why, hint=hint)


def _settings(config: PrepareConfig, source: Documents) -> tuple[dict[str, Any], Callable[[int], str]]:
    """What the tokens depend on, and the split of a document by its number."""
    val_fraction = config.val_fraction or config.recipe.val_fraction
    with Meter("reading", source.nbytes):  # a text's content is its fingerprint
        fingerprint = source.fingerprint
    few = None if source.one or source.nbytes is None else val_of_few(source, config.seed, val_fraction)
    by_position = source.one or few == frozenset()
    if by_position and (config.node or config.join):
        found = "one text, or so few documents that they are split by position"
        hint = "leave out --node and --join"
        raise ConfigError("this cannot be prepared in parts", where=source.description, found=found, hint=hint)
    settings: dict[str, Any] = {
        "fingerprint": fingerprint,
        "tokenizer": config.tokenizer_kind,
        "format": config.format,
        "split": "position" if by_position else "document",
        "val_fraction": val_fraction,
        "seed": config.seed,
        "field": config.field,
        "max_tokens": config.max_tokens,
    } | ({"shard_tokens": config.shard_tokens} if config.format == "llmc" else {})
    val = few.__contains__ if few else functools.partial(is_val, seed=config.seed, val_fraction=val_fraction)
    return settings, lambda number: "val" if val(number) else "train"


def _published(
    config: PrepareConfig, source: Documents, writer: TokenWriter, write: Callable[[Tokenizer], None]
) -> Meta:
    """What write(tokenizer) writes, made a folder's files."""
    try:
        if writer.ready:
            return writer.finish()
        tokenizer = _make_tokenizer(config, source)
        write(tokenizer)
        with Meter("hashing", None) as meter:
            return writer.publish(
                tokenizer.vocab_size,
                tokenizer.to_json(),
                source.description,
                f"nanogpt_fast {__version__}",
                lambda done, total: meter.at(done, total, ""),
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
    if meta is not None and meta.settings == settings and not _grown(folder, meta):
        return meta if is_complete(folder) else None  # a token file is gone or cut short
    hint = "write elsewhere with --out FOLDER; --force replaces them"
    raise made_otherwise("the folder holds token files made otherwise", stale, settings, meta, hint)


def _grown(folder: Path, meta: Meta) -> bool:
    """Whether a token file is longer than prepared: somebody's own, which is not replaced unasked."""
    sizes = {folder / file.name: file.bytes for split in meta.splits.values() for file in split.files}
    return any(path.is_file() and path.stat().st_size > size for path, size in sizes.items())


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
        return FileDocuments(paths, config.source, config.field)
    if recipe.repository:
        return hub_documents(recipe.repository, config.subset or recipe.subset, config.field, recipe.revision)
    hint = f"python -m nanogpt_fast.prepare {config.name} --source FILE"
    raise DataError(f"{config.name} needs your text", expected="--source with a file, a folder or a glob", hint=hint)


def _one_text(config: PrepareConfig, download: Download) -> FileDocuments:
    """--source, else the folder's input.txt (nanoGPT keeps it there), else the download."""
    kept = config.folder / "input.txt"
    if config.source:
        path, *more = find_files(config.source)
        if more or has_rows(path):
            hint = f"python -m nanogpt_fast.prepare text --source {config.source}"
            found = f"{1 + len(more)} in {config.source}" if more else f"rows of {path.suffix}"
            raise DataError(f"{config.name} is one text", found=found, hint=hint)
        if not kept.exists():
            with disk_errors(kept):
                write_text(kept, read_chunks(path))
        return FileDocuments([path], config.source)
    if not kept.exists():
        otherwise = f"download it elsewhere, then: python -m nanogpt_fast.prepare {config.name} --source input.txt"
        fetch(download.url, kept, download.sha256, otherwise=otherwise)
    return FileDocuments([kept], "Tiny Shakespeare")


def _make_tokenizer(config: PrepareConfig, source: Documents) -> Tokenizer:
    if config.tokenizer_kind == "gpt2":
        return gpt2_tokenizer(Path(config.vocab_bpe).expanduser() if config.vocab_bpe else None)
    if source.nbytes is None:
        hint = "--tokenizer=gpt2"
        raise ConfigError("a character vocabulary needs the whole text first; this one is streamed", hint=hint)
    chars = set() if source.one else set(CHAR_SEPARATOR)
    with Meter("characters", source.nbytes) as meter:
        for text, _ in source.read():
            chars.update(text)
            meter.advance(len(text), f"{len(chars):,} different characters")
    return CharTokenizer(sorted(chars))


def _encode(
    config: PrepareConfig,
    source: Documents,
    tokenizer: Tokenizer,
    writer: TokenWriter,
    split_of: Callable[[int], str],
) -> None:
    """Read, encode and write everything, committing every COMMIT_TOKENS."""
    small = source.nbytes is not None and source.nbytes < INLINE_BYTES
    num_proc = config.num_proc or (1 if small else min(16, max(1, (os.cpu_count() or 2) // 2)))
    settings, by_position = writer.settings, writer.settings["split"] == "position"
    val_fraction = settings["val_fraction"]
    encoder = Encoder(tokenizer, () if source.one else document_end(tokenizer))
    if by_position:
        chars = sum(len(text) for text, _ in source.read())
        batches = batches_by_position(
            source.read(), tokenizer.boundary, int(chars * (1 - val_fraction)), writer.documents
        )
        if config.max_tokens:  # val lies behind train: each gets its share
            limits = {"val": math.ceil(config.max_tokens * val_fraction)}
            limits["train"] = max(1, config.max_tokens - limits["val"])
            batches = (b for b in batches if writer.splits[b.pieces[0][0]].tokens < limits[b.pieces[0][0]])
    else:
        batches = batches_by_document(source, tokenizer.boundary, split_of, writer.documents, writer.state)
    encoded_batches = encode_batches(batches, encoder, num_proc)
    with contextlib.closing(encoded_batches) as encoded, Meter("tokens", source.nbytes) as meter:
        first = writer.tokens
        for batch, tokens in encoded:
            for split, ids in tokens.items():
                writer.write(split, ids)
            if batch.whole:
                writer.mark(batch.documents, batch.state)
                if writer.tokens - writer.committed >= COMMIT_TOKENS:
                    writer.commit()
                if not by_position and 0 < config.max_tokens <= writer.tokens:
                    break
            documents = "" if by_position else f"{batch.documents:,} documents, "
            rate = (writer.tokens - first) / meter.seconds
            meter.advance(batch.chars, f"{documents}{writer.tokens:,} tokens, {rate:,.0f} tokens/s")
    if not writer.tokens and SPLIT not in writer.splits:
        raise DataError("the source is empty", where=source.description, found="no text", hint="give another --source")
