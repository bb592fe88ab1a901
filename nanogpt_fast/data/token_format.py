"""What a token file is: its layout, told by its first bytes, and its length, checked against its header.

nanogpt   headerless little-endian uint16, nanoGPT's train.bin
llm.c     256 int32 of header [magic, version, tokens, 0...], then uint16 (20240520 v1) or uint32 (20240801 v7)
npy       a 1-D array of uint16, uint32 or int32, as build-nanogpt saves it
"""

import io
import os
import reprlib
from dataclasses import dataclass

import numpy as np

from nanogpt_fast.data.recipes import prepare_command
from nanogpt_fast.errors import DataError
from nanogpt_fast.files import open_regular

HEADER_BYTES = 1024
SAMPLE_BYTES = 4096  # looked at, at a file's beginning and in its middle
LLMC_UINT16, LLMC_UINT32 = 20240520, 20240801  # magic numbers
LLMC_LAYOUTS = {LLMC_UINT16: (1, "<u2"), LLMC_UINT32: (7, "<u4")}  # magic: (version, dtype)


@dataclass(frozen=True)
class TokenFile:
    """One file as it was when it was opened; `identity` is (bytes, mtime in ns, inode)."""

    path: str
    layout: str  # nanogpt | llm.c | npy
    dtype: str  # <u2, <u4 or <i4
    offset: int  # bytes before the first token
    n_tokens: int
    identity: tuple[int, int, int]


def inspect(path: str) -> TokenFile:
    """Open, sniff and measure one token file; DataError says what is wrong with it."""
    try:
        with open_regular(path) as file:
            head, identity = file.read(4 * HEADER_BYTES), identity_of(os.fstat(file.fileno()))
    except OSError as error:
        raise unreadable(path, error, f"look at it with: ls -l {path}") from error
    layout, dtype, offset, claimed = _sniff(path, head, identity[0])
    size = np.dtype(dtype).itemsize
    if layout == "nanogpt" and identity[0] % size:
        raise DataError(
            "a headerless token file has an odd length",
            where=path,
            expected=f"a multiple of {size} bytes ({np.dtype(dtype).name} tokens)",
            found=f"{identity[0]} bytes",
            hint="it was cut off while it was written or copied: prepare it again",
        )
    if claimed >= 0 and offset + claimed * size != identity[0]:
        raise DataError(
            "a token file is truncated" if offset + claimed * size > identity[0] else "a token file has trailing bytes",
            where=path,
            expected=f"{offset} bytes of header + {claimed:,} tokens of {size} bytes = {offset + claimed * size} bytes",
            found=f"{identity[0]} bytes",
            hint="download or prepare this shard again",
        )
    return TokenFile(path, layout, dtype, offset, (identity[0] - offset) // size, identity)


def _sniff(path: str, head: bytes, size: int) -> tuple[str, str, int, int]:
    """(layout, dtype, bytes of header, tokens that the header claims or -1)."""
    if size == 0:
        raise DataError(
            "a token file is empty", where=path, found="0 bytes", hint=prepare_command(os.path.dirname(path))
        )
    if head.startswith(b"\x93NUMPY"):
        return _sniff_npy(path, head)
    words = np.frombuffer(head[: min(len(head), HEADER_BYTES) // 4 * 4], "<i4").tolist() + [0] * 3
    magic, version, count = words[:3]
    if magic in LLMC_LAYOUTS:
        known_version, dtype = LLMC_LAYOUTS[magic]
        if version != known_version:
            raise DataError(
                "a token file's header has an unknown version",
                where=path,
                expected=f"version {known_version} for magic {magic}",
                found=f"version {version}",
                hint="write the shard again with a tool that makes this version",
            )
        return "llm.c", dtype, HEADER_BYTES, max(count, 0)
    bare_header = count > 0 and size in (HEADER_BYTES + 2 * count, HEADER_BYTES + 4 * count) and not any(words[3:])
    dated = 20240101 <= magic <= 20241231  # llm.c's magics are dates; no pair of GPT-2 tokens reads so
    if dated or bare_header:
        raise DataError(
            "a token file's header has the wrong magic number",
            where=path,
            expected=" or ".join(map(str, LLMC_LAYOUTS)) + ", or no header at all (nanoGPT)",
            found=str(magic) + (" (llm.c: a model, tokenizer, state or evaluation file)" if dated else ""),
            hint=prepare_command(os.path.dirname(path)),
        )
    if len(head) >= 64 and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        raise DataError(
            "a token file holds text, not tokens",
            where=path,
            found=repr(head[:40].decode()),
            hint=prepare_command(os.path.dirname(path)),
        )
    return "nanogpt", "<u2", 0, -1


def _sniff_npy(path: str, head: bytes) -> tuple[str, str, int, int]:
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = reader(stream)
        count = shape[0] if len(shape) == 1 else -1
    except Exception as error:  # what numpy, ast and tokenize raise between them
        raise DataError(
            "a .npy header cannot be read",
            where=path,
            found=str(error)[:300],
            hint=prepare_command(os.path.dirname(path)),
        ) from error
    if count < 0 or dtype.str not in ("<u2", "<u4", "<i4"):
        raise DataError(
            "a .npy file does not hold tokens",
            where=path,
            expected="one dimension of uint16, uint32 or int32, little-endian",
            found=reprlib.repr(f"shape {shape}, {dtype}"),
            hint="save it as np.save(path, tokens.astype(np.uint16))",
        )
    return "npy", dtype.str, stream.tell(), count


def refuse_wide(file: TokenFile) -> None:
    """DataError for a headerless file whose tokens look like the halves of four-byte ids: every second is next to zero
    in all that is looked at, and the others are not. For files that nothing else says the form of."""
    if file.layout != "nanogpt":
        return
    try:
        with open_regular(file.path) as opened:
            sample = opened.read(SAMPLE_BYTES)
            opened.seek(file.identity[0] // 2 // 8 * 8)
            sample += opened.read(SAMPLE_BYTES)
    except OSError as error:
        raise unreadable(file.path, error, f"look at it with: ls -l {file.path}") from error
    low, high = np.frombuffer(sample[: len(sample) // 4 * 4], "<u2").reshape(-1, 2).T
    if file.identity[0] % 4 or len(low) < 64 or high.max() > 15 or low.max() <= 15 or len(np.unique(low)) < 8:
        return
    raise DataError(
        "a headerless token file seems to hold four-byte ids",
        where=file.path,
        expected="uint16 ids, as nanoGPT writes them",
        found=f"every second of {2 * len(low):,} ids looked at is at most {high.max()}",
        hint="if they are uint32: save them as .npy, python -c \"import numpy as n; n.save('train.npy', "
        "n.fromfile('train.bin', '<u4'))\"; if not, prepare the text with nanogpt_fast, whose meta.json says so",
    )


def identity_of(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def unreadable(path: str, error: OSError, hint: str) -> DataError:
    gone = isinstance(error, FileNotFoundError)
    what = "a token file is gone" if gone else "a token file cannot be read"
    return DataError(what, where=path, found=error.strerror or str(error), hint=hint)
