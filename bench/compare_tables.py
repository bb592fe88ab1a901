"""The tables of bench/compare.py: (header, rows) of cells as bench/page.py takes them, for page and Markdown."""

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_rows import (
    NOT_RECORDED,
    NOTHING,
    Result,
    Row,
    WholeRun,
    commit,
    day,
    form,
    machine,
    machine_name,
    number,
    on_gpu,
    quartiles,
    speedup,
    text,
)
from page import Cell, Link

PUBLISHED = Path(__file__).parent / "published.toml"
GIB = 2.0**30

Table = tuple[list[Any], list[list[Any]]]  # header, rows

# What a column is, and where that is from: shown above the table.
NANOGPT = Link("karpathy/nanoGPT, estimate_mfu", "https://github.com/karpathy/nanoGPT/blob/master/model.py")
PALM = Link("PaLM, appendix B", "https://arxiv.org/abs/2204.02311")
LLMC = Link("karpathy/llm.c, train_gpt2.cu", "https://github.com/karpathy/llm.c/blob/master/train_gpt2.cu")
SYMBOLS = "N parameters, L layers, H heads, Q = C / H, C the width, T the sequence length; a GPT-2's head is tied."
FORMULAS: list[tuple[str, str, Any]] = [
    ("tokens/s", "micro-batch x accumulation x T / seconds of a step; median, and its quartiles", "bench/step.py"),
    ("MFU, nanoGPT", "(6 N + 12 L H Q T) x tokens/s / peak; N without the position embedding, full attention", NANOGPT),
    ("", "the same count", PALM),
    ("MFU, llm.c", "(6 N + 6 L C T) x tokens/s / peak; all N, causal attention", LLMC),
    ("peak", "the dense 16-bit data sheet of the exact GPU; where that says nothing, a measured product",
     "nanogpt_fast/gpus.py"),
    ("TFLOP/s", "(6 N + 12 L H Q T) x tokens/s / 10^12", "nanoGPT's count, as above"),
    ("share of GEMM", "TFLOP/s / the best product measured in the same file, on the same machine, in the same dtype",
     "bench/roof.py"),
    ("share of own GEMMs", "TFLOP/s / (FLOPs of the model's own products / their time, each once)", "bench/roof.py"),
    ("peak GiB", "the most that torch's allocator held, 2^30 bytes", "torch.cuda.max_memory_allocated"),
    ("mJ/token", "thousandths of the joules that the GPU's energy counter gained, a token", "bench/nvml.py"),
    ("times stock", "seconds of stock nanoGPT / seconds of the arm, both of one round; median and quartiles over the "
     "rounds; above 1 is faster", "bench/step.py"),
]  # fmt: skip


@dataclass(frozen=True)
class Column:
    """Of the main table: its heading, what it means, and its cell of a result."""

    name: str
    note: str
    cell: Callable[[Result], Any]


def percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}%"


def spread(found: tuple[float, float, float] | None, digits: int = 3) -> str | None:
    """median (first to third quartile)."""
    return None if found is None else f"{found[1]:.{digits}f} ({found[0]:.{digits}f} to {found[2]:.{digits}f})"


def whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _speed(r: Result) -> Any:
    found = r.tokens_per_s()
    return Cell(in_short(r.reason), note=r.reason, bad=True) if found is None else round(found[1])


def in_short(reason: str) -> str:
    """What kind of failure a status tells of; the whole of it stands in another column."""
    return "out of memory" if "out of memory" in reason else reason.split(":")[0][:20]


def _speed_range(r: Result) -> str | None:
    found = r.tokens_per_s()
    return found and f"{found[0]:,.0f} to {found[2]:,.0f}"


def _timed(r: Result) -> Any:
    if not r.ok:
        return Cell(r.reason, bad=True)
    how = text(r.row, "how") or NOT_RECORDED
    return Cell(how, note="a row alone is not compared with others: machines drift") if how == "alone" else how


def _sizes(r: Result) -> str | None:
    batch, accumulation = whole(number(r.row, "batch_size")), whole(number(r.row, "accumulation"))
    return f"{batch} x {accumulation or 1}" if batch else None


def _dtypes(r: Result) -> str | None:
    dtype, residual = text(r.row, "dtype"), text(r.row, "residual_dtype")
    return f"{dtype}, residual {residual}" if residual and residual != dtype else dtype or None


def _power(r: Result) -> str | None:
    watts = number(r.row, "power_limit_w")
    if watts is None:
        cores, threads = whole(number(r.row, "cores")), whole(number(r.row, "threads"))
        flags = r.row.get("cpu_flags")
        words = [f"{cores} cores" if cores else "", f"{threads} threads" if threads else ""]
        words += list(map(str, flags)) if isinstance(flags, list) and not on_gpu(r.row) else []
        return ", ".join(filter(None, words)) or form(r.row) or None
    return ", ".join(filter(None, [form(r.row), f"{watts:.0f} W"]))


def _mfu(key: str) -> Callable[[Result], Any]:
    def cell(r: Result) -> Any:
        value = number(r.row, key) if r.ok else None
        return (
            None if value is None else Cell(percent(value), note=f"of {text(r.row, 'peak') or 'a peak not recorded'}")
        )

    return cell


def _share(of: Callable[[Result], float | None]) -> Callable[[Result], Any]:
    def cell(r: Result) -> Any:
        rate, top = number(r.row, "tflops") if r.ok else None, of(r)
        return Cell(percent(rate / top), note=f"of {top:.4g} TFLOP/s") if rate and top else None

    return cell


def _millions(value: float | None) -> str | None:
    return None if value is None else f"{value / 1e6:.3g}" if value < 1e9 else f"{value / 1e6:,.0f}"


def _energy(r: Result) -> str | None:
    joules = r.value("joules_per_token") if r.ok else None
    return None if joules is None else f"{1e3 * joules:.2f}"


def _memory(r: Result) -> str | None:
    """peak_gb counts 10^9 bytes."""
    decimal = r.value("peak_gb") if r.ok else None
    return None if decimal is None else f"{decimal * 1e9 / GIB:.2f}"


def _stock(r: Result) -> str | None:
    if not r.ok or r.stock is None:
        return None
    return "itself" if r.stock is r.row else text(r.stock, "arm")


def _times_stock(r: Result) -> Any:
    return 1 if _stock(r) == "itself" else spread(r.against_stock() if r.ok else None)


def _graph(row: Row) -> str | None:
    return ("on" if row["graph"] else "off") if isinstance(row.get("graph"), bool) and on_gpu(row) else None


def _loss(r: Result) -> str | None:
    for row in (r.row, r.alone):
        after = (row or {}).get("loss_after")
        if isinstance(after, dict) and (loss := number(after, "loss")) is not None:
            return f"{loss:.4f} ({whole(number(after, 'steps')) or '?'} steps)"
    return None


COLUMNS = [
    Column("arm", "whose step: our ops, plain PyTorch, stock nanoGPT, ...", lambda r: text(r.row, "arm")),
    Column("GPU or CPU", "its exact name", lambda r: machine_name(r.row)),
    Column("form, power limit", "of a CPU cores, threads and instruction sets", _power),
    Column("model", "", lambda r: text(r.row, "config") or None),
    Column("tokens/s", "median", _speed),
    Column("quartiles of tokens/s", "", _speed_range),
    Column("times stock", "median (quartiles) by round; above 1 is faster", _times_stock),
    Column("stock is", "the arm it is held against", _stock),
    Column("MFU, nanoGPT", "nanoGPT's count of FLOPs", _mfu("mfu_nanogpt")),
    Column("MFU, llm.c", "llm.c's count of FLOPs", _mfu("mfu_llmc")),
    Column("timed, or why not", "in turn with the run's other arms, or alone", _timed),
    Column("n", "steps timed", lambda r: r.rounds() if r.ok else None),
    Column("ms a step", "median", lambda r: 1e3 * (number(r.row, "ms_s") or 0.0) if r.ok else None),
    Column("N, M", "parameters, millions", lambda r: _millions(number(r.row, "params"))),
    Column("T", "tokens of a sequence", lambda r: whole(number(r.row, "block_size"))),
    Column("micro-batch x accumulation", "sequences, and how often a step", _sizes),
    Column("dtype, residual", "of the parameters; of the residual stream where that differs", _dtypes),
    Column("CUDA graph", "", lambda r: _graph(r.row)),
    Column("TFLOP/s", "by nanoGPT's count", lambda r: number(r.row, "tflops") if r.ok else None),
    Column("share of GEMM", "of the best measured product", _share(lambda r: r.best)),
    Column("share of own GEMMs", "of the model's own products", _share(lambda r: r.own)),
    Column("peak GiB", "2^30 bytes", _memory),
    Column("mJ/token", "millijoules", _energy),
    Column("loss after", "so many steps from the same weights on the same batch", _loss),
    Column("date", "UTC", lambda r: day(r.row) or None),
    Column("commit", "", lambda r: commit(r.row)),
    Column("driver", "", lambda r: text(r.row, "driver") or None),
    Column("CUDA", "", lambda r: text(r.row, "cuda") or None),
    Column("torch", "", lambda r: text(r.row, "torch") or None),
    Column("Triton", "", lambda r: text(r.row, "triton") or None),
    Column("ptxas", "", lambda r: r.ptxas or None),
]


def main_table(results: Sequence[Result]) -> tuple[Table, list[str]]:
    """((header, rows), names of the columns left out because no row has a value there)."""
    cells = [[column.cell(r) for column in COLUMNS] for r in results]
    kept = [i for i in range(len(COLUMNS)) if any(row[i] not in (None, "") for row in cells)] or [0]
    header = [Cell(COLUMNS[i].name, note=COLUMNS[i].note) for i in kept]
    left_out = [c.name for i, c in enumerate(COLUMNS) if i not in kept]
    return (header, [[row[i] for i in kept] for row in cells]), left_out


# ---- one machine, several versions ----


@dataclass
class Pair:
    """One arm before and after a change, on machines that nothing recorded tells apart. ratio: speed after over before,
    (low, median, high); paired: round by round in one run, else each from its own median and quartiles."""

    before: Result
    after: Result
    differs: list[str]
    ratio: tuple[float, float, float]
    paired: bool


def version(r: Result) -> dict[str, str]:
    """What may differ between two results that are compared."""
    named = {"commit": commit(r.row), "dtype": _dtypes(r) or "", "tree": text(r.row, "tree")}
    return named | {key: text(r.row, key) for key in ("torch", "triton", "cuda", "driver") if text(r.row, key)}


def same_machine(results: Sequence[Result]) -> list[Pair]:
    """The newest result of each commit and dtype of an arm, model, work and machine against an older one: of the same
    dtype, else of the same commit, else the oldest."""
    groups: dict[tuple[Any, ...], dict[tuple[str, ...], Result]] = {}
    known = [r for r in results if r.ok and machine_name(r.row) != NOT_RECORDED]
    for r in sorted(known, key=lambda r: (text(r.row, "time"), r.row["line"])):
        work = (text(r.row, key) for key in ("config", "params", "block_size", "tokens", "arm"))
        what = version(r)
        groups.setdefault((machine(r.row), *work), {})[what["commit"], what["dtype"], what["tree"]] = r
    pairs = []
    for versions in groups.values():
        kept = list(versions.items())
        for i, ((at, dtype, _), after) in enumerate(kept[1:], 1):
            alike = [r for (_, d, _), r in kept[:i] if d == dtype] or [r for (c, _, _), r in kept[:i] if c == at]
            pairs.append(_pair((alike or [kept[0][1]])[0], after))
    order = {id(r): i for i, r in enumerate(results)}
    return sorted(pairs, key=lambda p: order[id(p.after)])


def _pair(before: Result, after: Result) -> Pair:
    old, new = version(before), version(after)
    differs = [key for key in new if old.get(key) != new[key] and key != "tree"] or ["files (tree)"]
    one_run = text(before.row, "run") != "" and text(before.row, "run") == text(after.row, "run")
    # Two commits under one run are written by a script that interleaves them; two dtypes of a run need not be in turn.
    by_round = speedup(before.row, after.row) if one_run and old["commit"] != new["commit"] else None
    if by_round:
        return Pair(before, after, differs, by_round, True)
    a, b = before.tokens_per_s() or NOTHING, after.tokens_per_s() or NOTHING  # both are ok
    return Pair(before, after, differs, (b[0] / a[2], b[1] / a[1], b[2] / a[0]), False)


def pairs_table(pairs: Sequence[Pair]) -> Table:
    header = ["arm", "machine", "model", "speed, after / before", "how", "differs in", "before", "after",
              "tokens/s before", "tokens/s after", "times stock before", "times stock after"]  # fmt: skip
    rows = []
    for p in pairs:
        how = f"by round, {p.after.rounds()} rounds" if p.paired else "not interleaved"
        rows.append([text(p.after.row, "arm"), machine_name(p.after.row), text(p.after.row, "config"),
                     spread(p.ratio, 3 if p.paired else 2), how, ", ".join(p.differs), label(p.before), label(p.after),
                     _both(p.before), _both(p.after), *map(_times_stock, (p.before, p.after))])  # fmt: skip
    return header, rows


def label(r: Result) -> str:
    return ", ".join(filter(None, [commit(r.row), _dtypes(r), day(r.row)]))


def _both(r: Result) -> str:
    low, median, high = r.tokens_per_s() or NOTHING
    return f"{median:,.0f} ({low:,.0f} to {high:,.0f})"


# ---- whole runs, other kinds, published rows ----


def whole_runs_table(runs: Sequence[WholeRun]) -> Table:
    header = ["arm", "machine", "dtype", "wall s", "of stock nanoGPT's", "n", "ms an iteration", "validation loss",
              "date", "commit or file", "torch", "Python"]  # fmt: skip
    rows = []
    for run in runs:
        first = run.first
        times = [v for r in run.rows if (v := number(r, "wall_s"))]
        ms = [v for r in run.rows if (v := number(r, "iter_ms"))]
        losses = [v for r in run.rows if (v := number(r, "val_loss")) is not None]
        failed = text(first, "status") if not times else ""
        cores = whole(number(first, "cores"))
        rows.append([
            text(first, "arm") or NOT_RECORDED,
            machine_name(first) + (f", {cores} cores" if cores else ""),
            text(first, "dtype") or NOT_RECORDED,
            Cell(failed or "no time", bad=True) if not times else spread(quartiles(times), 1),
            spread(run.share),
            len(times),
            quartiles(ms)[1] if ms else None,
            f"{quartiles(losses)[1]:.4f}" if losses else None,
            day(first) or None,
            commit(first) if text(first, "commit") else Path(first["file"]).stem,
            text(first, "torch") or None,
            text(first, "python") or None,
        ])  # fmt: skip
    return header, rows


def inputs_table(rows: Sequence[Row], files: Sequence[Path]) -> Table:
    """What was read: each file's rows by kind."""
    found = []
    for path in files:
        kinds: dict[str, int] = {}
        for row in (r for r in rows if r["file"] == str(path)):
            kind = text(row, "bench") or ("train, before it had a kind" if number(row, "wall_s") else "unknown")
            kinds[kind] = kinds.get(kind, 0) + 1
        found.append(
            [path.name, sum(kinds.values()), ", ".join(f"{k} {n}" for k, n in sorted(kinds.items())) or "none"]
        )
    return ["file", "rows", "kinds"], found


def published_table(path: Path = PUBLISHED) -> Table:
    header = ["who", "model", "T", "GPUs", "GPU", "dtype", "tokens/s a GPU", "MFU", "what the source says",
              "derived by us", "not like ours because", "source"]  # fmt: skip
    rows = []
    for source in tomllib.loads(path.read_text())["source"]:
        for r in source["rows"]:
            rows.append([source["name"], r["model"], r.get("block_size"), r["gpus"], r["gpu"], r["dtype"],
                         r.get("tokens_per_s"), f"{r['mfu']:g}%" if "mfu" in r else None,
                         r.get("quoted", "the figures themselves"), r.get("derived", "nothing"),
                         source.get("caveat", ""), Link("source", source["url"])])  # fmt: skip
    return header, rows
