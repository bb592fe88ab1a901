"""Directories that can prove they are whole: every file's size and SHA-256 in manifest.json, written last.

A manifest comes from whoever made the directory, so it is not trusted: it may name known files only (no paths),
and each must be a regular file (no link that leads elsewhere, no pipe to hang on).
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.files import read_small, sha256_of

MANIFEST = "manifest.json"
FORMAT_VERSION = SHARED_VERSION = 2  # 1: all in one file each; 2: in shares
THREADS = 16  # that hash, or write, side by side

Chunks = Iterable[bytes | memoryview]
FilesOf = Callable[[Mapping[str, Any]], tuple[Collection[str], Collection[str]]]


def write_files(
    folder: Path,
    contents: Mapping[str, Chunks],
    facts: Mapping[str, Any],
    others: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Write {name: chunks} into `folder` and then the manifest, everything fsynced. Raises OSError.

    others: entries of files that others have written there, durably.

    Hashed while written, so nothing is read back; the files side by side: 124M parameters with their moments
    (1.5 GB) take about 1 s on two idle cores, disk permitting.
    """
    with ThreadPoolExecutor(min(THREADS, len(contents))) as pool:
        entries = list(pool.map(lambda item: write_file(folder / item[0], item[1]), contents.items()))
    version = SHARED_VERSION if others else 1
    manifest = {"format_version": version, **facts, "files": {**dict(zip(contents, entries)), **(others or {})}}
    write_file(folder / MANIFEST, [json.dumps(manifest, indent=1).encode()])


def write_file(path: Path, chunks: Chunks) -> dict[str, Any]:
    """A new file of these chunks, fsynced; its manifest entry. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def read_manifest(folder: Path, files_of: FilesOf) -> dict[str, Any]:
    """The manifest, once its files are there in the sizes it says. Raises CheckpointError, naming the file.

    files_of: of a manifest, the names that must and those that may be listed; ValueError where it contradicts itself.
    Extra files in the folder are nobody's business; extra names in the manifest are refused.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"there is no {MANIFEST}",
            where=str(folder),
            expected=f"a checkpoint's directory with {MANIFEST} in it",
            found=f"a {'file' if folder.is_file() else 'directory without one' if folder.is_dir() else 'missing path'}",
            hint=f"resume this run with --init_from=resume --out_dir={folder}"
            if (folder / "checkpoints").is_dir()
            else "",
        )
    manifest = read_json(path)
    version = manifest.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            "the checkpoint was written by a newer version",
            where=str(path),
            expected=f"format {FORMAT_VERSION} or older",
            found=f"format {version}, created by {manifest.get('created_by', 'an unknown program')}",
            hint="update nanogpt_fast",
        )
    files = manifest.get("files")
    if version not in (1, SHARED_VERSION) or not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise CheckpointError(f"{MANIFEST} is damaged", where=str(path), expected="format_version, step and files")
    try:
        required, optional = files_of(manifest)
    except ValueError as error:
        raise CheckpointError(f"{MANIFEST} is damaged", where=str(path), found=str(error)) from error
    allowed = {*required, *optional}
    if strange := [name for name in files if name not in allowed] or [n for n in required if n not in files]:
        raise CheckpointError(
            f"{MANIFEST} does not list a checkpoint's files",
            where=str(path),
            expected=", and at most ".join(" and ".join(sorted(names)) for names in (required, optional) if names),
            found=f"{strange[0]!r} {'listed' if strange[0] in files else 'not listed'}",
        )
    for name, entry in files.items():
        _check_size(folder / name, entry["bytes"])
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError when it is none."""
    try:
        value = json.loads(read_small(path))  # NaN, which JSON has not, is a loss that an older version saved
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path.name} is damaged", where=str(path), expected="JSON", found=str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} is damaged", where=str(path), expected="a JSON object")
    return value


def verify(folder: Path, manifest: Mapping[str, Any], names: Collection[str]) -> None:
    """Hash the named files side by side, in blocks (hashlib drops the GIL); CheckpointError for the first wrong one."""
    with ThreadPoolExecutor(min(THREADS, len(names))) as pool:
        for name, found in zip(names, pool.map(lambda name: sha256_of(folder / name), names)):
            expected = manifest["files"][name]["sha256"]
            if found != expected:
                raise CheckpointError(
                    f"{name} is damaged",
                    where=str(folder / name),
                    expected=f"sha256 {expected[:16]}...",
                    found=f"sha256 {found[:16]}...",
                    hint="use an earlier checkpoint: --init_from=resume finds the newest sound one",
                )


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        and re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]) is not None
    )


def _check_size(path: Path, expected: int) -> None:
    try:
        info = path.lstat()
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing", where=str(path), expected=f"{expected:,} bytes") from None
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path.name} is not a regular file", where=str(path))
    if info.st_size != expected:
        how = "empty" if info.st_size == 0 else "cut short" if info.st_size < expected else "too long"
        raise CheckpointError(
            f"{path.name} is {how}",
            where=str(path),
            expected=f"{expected:,} bytes",
            found=f"{info.st_size:,} bytes",
        )
