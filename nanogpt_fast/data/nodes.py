"""The parts of a dataset that several machines prepare, and how they become one.

`--node=2/8` writes the tokens of the second of eight runs of the source's files to FOLDER/parts/2of8, a folder like a
dataset's, with one file. Every document ends with <|endoftext|> there, so the parts, one behind the other, tell each
document's number in the whole, which decides its split: `join` copies them into train and val as one machine writes
them, byte for byte, whatever the number of nodes.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanogpt_fast.data.dataset import PARTIAL, PARTS, Meta, is_complete, made_otherwise, read_meta
from nanogpt_fast.data.progress import Meter
from nanogpt_fast.data.token_writer import SPLITS, FolderBusy, TokenWriter, locked
from nanogpt_fast.data.tokenizer import Tokenizer
from nanogpt_fast.errors import ConfigError, DataError
from nanogpt_fast.files import open_regular

SPLIT = "part"  # the one of a part, before train and val are told apart
READ_BYTES = 8 << 20  # of a part at once
RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))  # set by torchrun, by srun; from 0 on

log = logging.getLogger(__name__)


class Node(NamedTuple):
    """Machine `number` of 1 .. `of`."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def folder(self, dataset: Path) -> Path:
        return dataset / PARTS / f"{self.number}of{self.of}"


def node_of(text: str, environ: Mapping[str, str] = os.environ) -> Node:
    """What --node says, K/N or env. Raises ConfigError."""
    found = text
    if text == "env":
        rank, size = next((names for names in RANKS if all(map(environ.get, names))), RANKS[0])
        found = f"{rank} {environ.get(rank, 'not set')}, {size} {environ.get(size, 'not set')}"
        rank, size = environ.get(rank, ""), environ.get(size, "")
        text = f"{int(rank) + 1}/{size}" if rank.isdecimal() else ""
    digits = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text)
    node = Node(*map(int, digits.groups())) if digits else Node(1, 0)
    if node.number > node.of:
        raise ConfigError(
            "--node does not say which machine this is",
            expected="K/N, 1 <= K <= N, such as --node=2/8; or env, where torchrun or srun started this",
            found=found,
        )
    return node


@contextlib.contextmanager
def claimed(dataset: Path, node: Node) -> Iterator[None]:
    """One process at a time is this node; what stays empty is removed."""
    try:
        with locked(node.folder(dataset), 0):
            yield
    except FolderBusy:
        raise DataError(
            f"another process is node {node} of this dataset",
            where=str(node.folder(dataset)),
            hint=f"wait until it is done; every machine has its own K in --node=K/{node.of}",
        ) from None
    finally:
        with contextlib.suppress(OSError):
            (dataset / PARTS).rmdir()
            dataset.rmdir()


def made(part: Path) -> Meta | None:
    """A finished part's meta.json; None where a file is missing or cut, or it cannot be read."""
    try:
        return read_meta(part) if is_complete(part) else None
    except DataError:
        return None


def unfinished(dataset: Path, of: int) -> dict[Node, str]:
    """The parts that cannot be joined yet, and what is there of each."""
    states = {}
    for node in (Node(number, of) for number in range(1, of + 1)):
        part = node.folder(dataset)
        if made(part) is None:
            damaged = "damaged" if (part / "meta.json").exists() else "not here"
            states[node] = "unfinished" if (part / PARTIAL).exists() else damaged
    return states


def listed(states: dict[Node, str]) -> str:
    """The nodes behind unfinished parts, in words."""
    rows = [f"{node} ({state})" for node, state in states.items()]
    return ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


def give_up_others(dataset: Path, of: int, force: bool) -> None:
    """Refuse to begin beside the parts of another number of nodes; force removes them."""
    others = {count: folders for count, folders in _by_count(dataset).items() if count != of}
    if others and not force:
        count, folders = next(iter(others.items()))
        raise DataError(
            "the parts of another number of nodes are here",
            where=", ".join(str(folder) for folder in folders[:4]),
            expected=f"--node=K/{count}",
            found=f"--node=K/{of}",
            hint=f"go on with K/{count}, any machine can be any K; --force gives up those parts",
        )
    remove(folder for folders in others.values() for folder in folders)


def remove(folders: Iterable[Path]) -> None:
    """Parts that are no longer wanted, but for those that somebody is writing."""
    for folder in list(folders):
        with contextlib.suppress(FolderBusy), locked(folder, 0):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()


def remove_all(dataset: Path) -> None:
    remove(folder for folders in _by_count(dataset).values() for folder in folders)


def _by_count(dataset: Path) -> dict[int, list[Path]]:
    """The folders of parts, by the number of nodes."""
    counts: dict[int, list[Path]] = {}
    for folder in sorted((dataset / PARTS).glob("*of*")):
        if found := re.fullmatch(r"[1-9]\d*of([1-9]\d*)", folder.name):
            counts.setdefault(int(found[1]), []).append(folder)
    return counts


def ready(dataset: Path, settings: dict[str, Any], listing: str | None) -> dict[Node, Meta]:
    """The parts of all nodes. DataError where one is missing, or was made with other settings or from other text.

    listing: of the source here, None where it is not asked; then the parts must agree among themselves.
    """
    counts = _by_count(dataset)
    if len(counts) != 1:
        raise DataError(
            "there are parts for several numbers of nodes" if counts else "there are no parts to join",
            where=str(dataset / PARTS),
            expected="the folders 1ofN to NofN",
            found=", ".join(f"{len(folders)} of {count}" for count, folders in counts.items()),
            hint="move the others away" if counts else "make them with --node=1/N to --node=N/N, and copy them to here",
        )
    (of,) = counts
    if states := unfinished(dataset, of):
        raise DataError(
            f"{len(states)} of {of} parts cannot be joined yet",
            where=str(dataset / PARTS),
            found=listed(states),
            hint=f"the same command with --node={next(iter(states))} for --join makes, or ends, that one",
        )
    parts = {node: meta for number in range(1, of + 1) if (meta := made((node := Node(number, of)).folder(dataset)))}
    copied = []
    for node, meta in parts.items():
        wanted = settings | {"node": str(node), "listing": listing or parts[Node(1, of)].settings.get("listing")}
        if listing and meta.settings.get("fingerprint") != settings["fingerprint"]:  # it has the times of files
            wanted["fingerprint"] = meta.settings.get("fingerprint")
            copied.append(str(node))
        if meta.settings != wanted:
            hint = f"make it again: the same command with --node={node} --force"
            raise made_otherwise("a part was made otherwise", [node.folder(dataset)], wanted, meta, hint)
    if copied:
        log.warning(
            "part %s: the source's files had other times there than here, and the same names and sizes; right if they "
            "are copies, but if one was changed since, make the part again with --force", ", ".join(copied[:8]),
        )  # fmt: skip
    return parts


def join(
    dataset: Path,
    parts: dict[Node, Meta],
    tokenizer: Tokenizer,
    split_of: Callable[[int], str],
    writer: TokenWriter,
) -> None:
    """Write the documents of all parts into their splits, those after `writer.documents`; what a part gave is kept when
    its SHA-256 was right."""
    files = [(node, file) for node, meta in parts.items() for file in meta.splits[SPLIT].files]
    done, total, number = 0, sum(file.bytes for _, file in files), 0
    with Meter("joining", total) as meter:
        for node, file in files:
            path = node.folder(dataset) / file.name
            digest = hashlib.sha256()
            with open_regular(path) as opened:
                while data := opened.read(READ_BYTES):
                    digest.update(data)
                    tokens = np.frombuffer(data, dtype="<u2")
                    ends = np.flatnonzero(tokens == tokenizer.eot) + 1
                    lengths = np.diff(ends, prepend=0, append=len(tokens))  # the last one goes on in the next piece
                    numbers = range(number, number + len(lengths))
                    splits = [split_of(n) if n >= writer.documents else "" for n in numbers]
                    for split in SPLITS:
                        writer.write(split, tokens[np.repeat([each == split for each in splits], lengths)])
                    number += len(ends)
                    meter.at(done := done + len(data), total, f"{number:,} documents")
            if digest.hexdigest() != file.sha256:
                raise DataError(
                    "a part is not as it was made",
                    where=str(path),
                    expected=f"SHA-256 {file.sha256}",
                    found=f"SHA-256 {digest.hexdigest()}",
                    hint=f"copy it anew, or make it again: the same command with --node={node} --force",
                )
            writer.mark(number, None)
            writer.commit()
