"""Files of weights that anybody may have made: only regular ones are opened, nothing in them is run, and no size that
they state is believed before their own bytes bear it out."""

import os
import pickle
import re
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanogpt_fast.errors import CheckpointError
from nanogpt_fast.files import load_json

_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


def file_bytes(path: Path) -> int:
    """The size of a regular file, links followed. Raises CheckpointError: a pipe would hang, a device never end."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # the latter of a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError("the file cannot be read", where=str(path), found=reason) from error
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "a device")
        raise CheckpointError("not a regular file", where=str(path), expected="a file", found=kind)
    return found.st_size


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file. Raises CheckpointError."""
    try:
        found = load_json(path)
    except OSError as error:
        raise CheckpointError("cannot be read", where=str(path), found=error.strerror or str(error)) from error
    except ValueError as error:
        raise CheckpointError("cannot be read as JSON", where=str(path), found=str(error)[:200]) from error
    if not isinstance(found, dict):
        raise CheckpointError("holds no JSON object", where=str(path), found=type(found).__name__)
    return found


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """{name: tensor}, mapped from the file. Raises CheckpointError."""
    file_bytes(path)
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, OSError, and torch's of a header that makes no sense
        raise CheckpointError("the file is damaged or cut off", where=str(path), found=_first_line(error)) from error


def load_pickle(path: Path) -> Any:
    """torch.load that runs no code from the file; mapped, not copied, where the file's form allows it.

    numpy's numbers are read as Python's. Raises CheckpointError, which names an object that is refused.
    """
    file_bytes(path)
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:  # torch compresses nothing; what unpacks to more than it is could
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("a compressed archive")
        with torch.serialization.safe_globals(_NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not named:
            raise CheckpointError("the file is damaged or is no torch file", where=str(path)) from error
        raise _refused(path, named[1]) from error
    except Exception as error:  # what a damaged pickle raises is torch's, zipfile's and Python's, without a list
        raise CheckpointError(
            "the file is damaged, cut off or no torch file", where=str(path), found=_first_line(error)
        ) from error


def _refused(path: Path, name: str) -> CheckpointError:
    if name.endswith(".GPTConfig"):  # build-nanogpt's train_gpt2.py pickles the object; its GELU is the tanh form
        return CheckpointError(
            "a checkpoint of build-nanogpt: its configuration is a Python object, and nothing in it was run",
            where=str(path),
            expected="model_args as a plain dict, as nanoGPT writes it",
            found=f"the Python object {name}",
            hint="if you trust its author: python -c \"import torch; GPTConfig = type('GPTConfig', (), {}); "
            f"c = torch.load('{path}', weights_only=False); torch.save({{'model': c['model'], 'model_args': "
            "{**vars(c['config']), 'bias': True}, 'config': {'activation': 'gelu_tanh'}, 'iter_num': c['step']}, "
            "'ckpt.pt')\"",
        )
    return CheckpointError(
        "the file holds more than tensors and plain values; refused, and nothing in it was run",
        where=str(path),
        expected="tensors, numbers, strings, lists and dicts",
        found=f"the Python object {name}",
        hint="if you trust its author, save it again without that object",
    )


def saved_before_torch_2_1(path: Path) -> bool:
    """Whether torch.save was older than October 2023: its archives did not name the byte order yet."""
    if not zipfile.is_zipfile(path):
        return True
    with zipfile.ZipFile(path) as archive:
        return not any(name.endswith("/byteorder") for name in archive.namelist())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


class _NumpyType:
    """Stands for numpy.dtype in a pickle: numbers alone, of which numpy makes no objects."""

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        if not (isinstance(name, str) and re.fullmatch(r"b1|[iu][1248]|f[248]", name)):
            raise ValueError(f"numpy's type {name!r:.50}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", "|"):
            raise ValueError("numpy's numbers in another byte order")


def _numpy_scalar(kind: _NumpyType, data: bytes) -> int | float | bool:
    """Stands for numpy's own, which would unpickle objects."""
    if not (isinstance(kind, _NumpyType) and isinstance(data, bytes) and len(data) == kind.dtype.itemsize):
        raise ValueError("a number of numpy's that is none")
    return np.frombuffer(data, kind.dtype)[0].item()


_NUMPY: list[Any] = [
    (_NumpyType, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]
