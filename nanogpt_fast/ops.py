"""The ops a model is built from, as an argument: GPT(config, ops=TRITON). There is no global switch.

REFERENCE is plain PyTorch and needs torch alone. TRITON is our own kernels; Triton is imported when it is first named.
"""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nanogpt_kernels
import torch
from nanogpt_kernels import reference
from nanogpt_kernels.contract import GRAD_NORM, LOSS_SCALE, LR, MAX_NORM, STEP, stand_for  # slots of adamw_'s scalars
from nanogpt_kernels.reference import exact_device as exact_device

from nanogpt_fast import assembler
from nanogpt_fast.errors import ConfigError, DeviceError, did_you_mean

if TYPE_CHECKING:
    TRITON: "Ops"

__all__ = [
    "GRAD_NORM",
    "LOSS_SCALE",
    "LR",
    "MAX_HEAD",
    "MAX_NORM",
    "OLDEST",
    "OP_FILES",
    "OP_NAMES",
    "REFERENCE",
    "STEP",
    "TRITON",
    "Op",
    "Ops",
    "assembler_path",
    "compile_ahead",
    "exact_device",
    "expected",
    "inside_of",
    "keep_rows",
    "keeping",
    "kept_rows",
    "kernel_sources",
    "launched_by",
    "reproducible",
    "require_heads",
    "row_as_json",
    "row_from_json",
    "rows_asked",
    "select_ops",
    "without_data",
]

Op = Callable[..., Any]


@dataclass(frozen=True)
class Ops:
    """One function an op; nanogpt_kernels.reference holds the signatures and what each computes."""

    embedding: Op
    norm: Op
    add_norm: Op
    qkv_attention: Op
    cached_attention: Op
    linear: Op
    mlp: Op
    linear_cross_entropy: Op
    grad_norm: Op
    adamw_: Op


ROW_FIELDS = ("blocks", "num_warps", "num_stages", "max_registers", "choices")  # of a launch row: what is searched
OLDEST = 80  # compute capability that our kernels are written for
MAX_HEAD = 128  # the widest head that their attention has tiles for: MAX_D of ops/attention/forward.py
OP_NAMES = tuple(f.name for f in dataclasses.fields(Ops))
OP_FILES = {  # {file of nanogpt_kernels/ops: its ops}; --kernels takes the names of both
    "embedding": ("embedding",),
    "norm": ("norm", "add_norm"),
    "attention": ("qkv_attention", "cached_attention"),
    "linear": ("linear",),
    "mlp": ("mlp",),
    "linear_cross_entropy": ("linear_cross_entropy",),
    "adamw": ("grad_norm", "adamw_"),
}
REFERENCE = Ops(**{name: getattr(reference, name) for name in OP_NAMES})


def __getattr__(name: str) -> Any:
    """TRITON, made on first use."""
    if name != "TRITON":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    assembler.prefer_extra()
    globals()["TRITON"] = triton_ops = Ops(**{op: getattr(nanogpt_kernels, op) for op in OP_NAMES})
    return triton_ops


def assembler_path(device: torch.device) -> str:
    """The ptxas that Triton takes for this device. ImportError without Triton, RuntimeError where it has none."""
    assembler.prefer_extra()
    from triton import knobs

    blackwell = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10
    return (knobs.nvidia.ptxas_blackwell if blackwell else knobs.nvidia.ptxas).path


def kernel_sources() -> str:
    """16 hex digits over nanogpt_kernels' files."""
    root, digest = Path(nanogpt_kernels.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@contextmanager
def without_data(ops: Ops, device_type: str, capability: int | None) -> Iterator[None]:
    """Within it, these ops on tensors of device "meta" allocate what they would on a device of this type and CUDA
    compute capability (90 for sm_90; None: no CUDA device)."""
    with ExitStack() as stack:
        stack.enter_context(stand_for(device_type))
        if capability is not None and ops != REFERENCE:
            from nanogpt_kernels.launch import recording

            stack.enter_context(recording(capability, keep=False))
        yield


@contextmanager
def reproducible() -> Iterator[None]:
    """Within it the Triton ops add in a fixed order, whatever their launch rows choose."""
    with ExitStack() as stack:
        if "nanogpt_kernels.launch" in sys.modules:
            from nanogpt_kernels.launch import TABLE, override

            for op in (op for op, rows in TABLE.items() if any(row.choices.get("atomic") for row in rows)):
                stack.enter_context(override(op, choices={"atomic": False}))
        yield


# ---- launch rows ----


def rows_asked(work: Callable[[], Any], capability: int) -> dict[Any, Any]:
    """{launch.Key: row} that work() takes on a CUDA device of this compute capability; its tensors are on "meta"."""
    from nanogpt_kernels.launch import recording

    with stand_for("cuda"), recording(capability, keep=False) as found:
        work()
    return found.asked


def launched_by(work: Callable[[], Any], capability: int) -> list[Any]:
    """What work() would launch there, as it is compared: work that launches the same is the same."""
    from nanogpt_kernels.launch import recording

    def described(x: Any) -> Any:
        shape = getattr(x, "shape", None)
        return x if shape is None else [*shape, *x.strides] if hasattr(x, "base") else [*shape, x.dtype, *x.stride()]

    with stand_for("cuda"), recording(capability) as calls:
        work()
    return [(c.op, c.kernel.__name__, c.grid, [*map(described, c.args)], c.options) for c in calls]


def kept_rows() -> dict[Any, Any]:
    """{launch.Key: row}: the rows that are taken before the shipped ones; {} while Triton is not imported."""
    launch = sys.modules.get("nanogpt_kernels.launch")
    return launch.kept() if launch else {}


def keep_rows(rows: Mapping[Any, Any]) -> None:
    """Take these from now on. ValueError for what is no launch row of its op."""
    if rows or "nanogpt_kernels.launch" in sys.modules:
        from nanogpt_kernels import launch

        launch.keep(rows)


@contextmanager
def keeping(rows: Mapping[Any, Any]) -> Iterator[None]:
    """Within it these are the kept rows."""
    before = kept_rows()
    keep_rows(rows)
    try:
        yield
    finally:
        keep_rows(before)


def row_as_json(key: Any, row: Any) -> dict[str, Any]:
    """A launch row and what it is kept for."""
    return {**key._asdict(), **{name: getattr(row, name) for name in ROW_FIELDS}}


def row_from_json(found: dict[str, Any]) -> tuple[Any, Any]:
    """(launch.Key, row) of row_as_json's. KeyError, TypeError or ValueError for anything else."""
    from nanogpt_kernels.launch import Key, Row

    key = Key(*(found[name] for name in Key._fields))
    return key, Row(key.arch, itemsize=key.itemsize, **{name: found[name] for name in ROW_FIELDS})


def compile_ahead(work: Callable[[], Any], capability: int, limit_s: float = 120.0) -> None:
    """Compile, on all cores, what work() would launch on a device of this CUDA compute capability; its tensors are on
    "meta". Before the process touches a GPU, and before it differentiates anything, after which torch's autograd
    refuses to in a fork: nanogpt_kernels/ahead.py."""
    from nanogpt_kernels.ahead import compile_ahead

    with stand_for("cuda"):
        compile_ahead(work, capability, limit_s)


def inside_of(name: str) -> Callable[..., Any] | None:
    """The Python function that a registered op, `NAMESPACE::NAME`, consists of; None for ops of others."""
    registry = sys.modules.get("nanogpt_kernels.registry")
    return registry.FUNCTIONS.get(name) if registry else None


def select_ops(spec: str, device_type: str, auto: Ops = REFERENCE) -> Ops:
    """The ops named by --kernels: auto | triton | reference, then single ones, as in triton,attention=reference.

    auto: what it stands for here (verdict.py knows what a GPU has shown).
    """
    base, *single = (part.strip() for part in spec.split(","))
    sets: dict[str, Callable[[], Ops]] = {
        "auto": lambda: auto,
        "reference": lambda: REFERENCE,
        "triton": lambda: _triton(spec, device_type),
    }
    pairs = [(name, source) for name, _, source in (part.partition("=") for part in single)]
    for name, known in [(base, sets), *((n, [*OP_FILES, *OP_NAMES]) for n, _ in pairs), *((s, sets) for _, s in pairs)]:
        _known(name, known, spec)  # before any set is made: a typo is reported where there is no GPU too
    chosen = sets[base]()
    for name, source in pairs:
        ops = sets[source]()
        chosen = dataclasses.replace(chosen, **{op: getattr(ops, op) for op in OP_FILES.get(name, (name,))})
    return chosen


def require_heads(ops: Ops, head_size: int) -> None:
    """ConfigError for a head that these ops' attention does not take."""
    if ops.qkv_attention is not REFERENCE.qkv_attention and head_size > MAX_HEAD:
        raise ConfigError(
            "the Triton attention has no tiles for such heads",
            where=f"n_embd / n_head = {head_size}",
            expected=f"at most {MAX_HEAD}",
            hint="more heads (--n_head), or --kernels=triton,attention=reference",
        )


def expected(capability: int | None) -> Ops:
    """What `auto` will be at this CUDA compute capability (as in sm_90: 90; None: no CUDA device), as far as can be
    told without trying: ours from OLDEST on, where Triton can be imported."""
    if (capability or 0) < OLDEST:
        return REFERENCE
    try:
        return _triton("auto", "cuda")
    except DeviceError:
        return REFERENCE


def _known(name: str, known: Iterable[str], spec: str) -> None:
    if name not in known:
        raise ConfigError(
            f"unknown kernels {name!r}{did_you_mean(name, known)}",
            where=f"--kernels={spec}",
            expected="auto, triton or reference, then perhaps OP=triton or OP=reference; OP is one of "
            + ", ".join(dict.fromkeys([*OP_FILES, *OP_NAMES])),
            hint="--kernels=reference, or for one op: --kernels=triton,attention=reference",
        )


def _triton(spec: str, device_type: str) -> Ops:
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        raise DeviceError(
            "the Triton ops need a CUDA device",
            where=f"--kernels={spec}",
            expected="cuda",
            found=device_type,
            hint="--kernels=reference (TRITON_INTERPRET=1 interprets them on the CPU, about a hundred times slower)",
        )
    try:
        return sys.modules[__name__].TRITON
    except ImportError as error:
        raise DeviceError(
            f"Triton cannot be imported: {error}",
            where=f"--kernels={spec}",
            expected="triton >= 3.6 (Linux)",
            hint="pip install 'triton>=3.6', or --kernels=reference",
        ) from error
