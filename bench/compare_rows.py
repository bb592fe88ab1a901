"""Result files as bench/compare.py sees them: reading them, which rows belong together, what follows from them.

A file is JSON lines of several kinds (`bench`: step, roof, environment, ...). A step's arms are compared within one run
only, round by round; a roof holds for the steps of its own file, machine and dtype. Needs no torch.
"""

import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanogpt_fast.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]  # one line, with "file" (its path) and "line" (its number) added
STOCK = ("nanogpt+compile", "nanogpt")  # what an arm is held against, the first that the run has
NOT_RECORDED = "not recorded"
NOTHING = (0.0, 0.0, 0.0)  # in place of quartiles
HOW = "python bench/run.py --out DIR writes such files; name one, or a folder of them"


# ---- reading ----


@dataclass
class Results:
    """The rows of some files in the order they were written, and what could not be read."""

    rows: list[Row] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find(paths: Sequence[Path]) -> list[Path]:
    """The .jsonl files named, and those below the folders named, each once. DataError for a path that does not exist
    and for a folder without one."""
    found: dict[Path, Path] = {}
    for path in paths:
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        if not path.exists() or not files:
            what = "no results below this folder" if path.exists() else "no such results file or folder"
            raise DataError(what, where=str(path), expected="JSON lines (*.jsonl)", hint=HOW)
        found |= {file.resolve(): file for file in files}
    return list(found.values())


def read(paths: Sequence[Path]) -> Results:
    """All rows of the files found there. A line that is no JSON object, as a kill cuts one off, is left out and noted;
    so is a row that an earlier file has already. DataError where not one row is left, or a file cannot be read."""
    results = Results(files=find(paths))
    seen: set[str] = set()  # lines of earlier files
    for path in results.files:
        again, own = 0, set()
        for number, line in enumerate(lines_of(path), 1):
            if not line.strip():
                continue
            if line in seen:
                again += 1
                continue
            own.add(line)
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                results.rows.append({**row, "file": str(path), "line": number})
            else:
                results.notes.append(f"{path}:{number} is no JSON object (cut off?) and is left out: {line[:40]}")
        seen |= own
        if again:
            results.notes.append(f"{path}: {again} rows are in an earlier file too and count once")
    if not results.rows:
        raise DataError("the results hold no row", where=", ".join(map(str, paths)), expected="JSON lines", hint=HOW)
    return results


def lines_of(path: Path) -> list[str]:
    """The file's lines. DataError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise DataError("the results cannot be read", where=str(path), found=error.strerror or str(error)) from None


# ---- one row ----


def number(row: Row | None, key: str) -> float | None:
    """A finite number of the row, else None."""
    value = (row or {}).get(key)
    return (
        float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )


def text(row: Row | None, key: str) -> str:
    value = (row or {}).get(key)
    return "" if value is None else str(value)


def seconds_of(row: Row | None) -> list[float]:
    """Seconds of each round, [] where the row has none or one that is no time."""
    values = (row or {}).get("seconds")
    values = values if isinstance(values, list) else []
    good = all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < math.inf for v in values)
    return [float(v) for v in values] if good else []


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile), as bench/harness.py counts them."""
    kept = list(values)
    if len(kept) < 2:
        return kept[0], kept[0], kept[0]
    q1, median, q3 = statistics.quantiles(kept, n=4, method="inclusive")
    return q1, median, q3


def machine_name(row: Row) -> str:
    """The exact GPU, or the CPU where that computed."""
    return text(row, "gpu") if on_gpu(row) else text(row, "cpu") or NOT_RECORDED


def on_gpu(row: Row) -> bool:
    return text(row, "gpu") != "" and text(row, "device") != "cpu"


def machine(row: Row) -> tuple[Any, ...]:
    """What must be equal for two rows to come from one kind of machine. Equal names need not be one machine: a virtual
    CPU may be called "AMD EPYC" whatever it is, so its cores and instruction sets count too."""
    flags = row.get("cpu_flags")
    beside = (
        [number(row, "power_limit_w")]
        if on_gpu(row)
        else [number(row, "cores"), number(row, "threads"), *(map(str, flags) if isinstance(flags, list) else ())]
    )
    return machine_name(row), *beside


def form(row: Row) -> str:
    """SXM, PCIe, NVL, OAM or card by the GPU's exact name; "" where the name does not tell."""
    name = machine_name(row)
    for word, shown in (("SXM", "SXM"), ("PCIE", "PCIe"), ("NVL", "NVL"), ("GEFORCE", "card"), ("RTX", "card")):
        if word in name.upper():
            return shown
    return {"NVIDIA H100 80GB HBM3": "SXM", "NVIDIA H200": "SXM", "AMD Instinct MI300X": "OAM"}.get(name, "")


def commit(row: Row) -> str:
    """The commit, marked where files differed from it."""
    name = text(row, "commit") or NOT_RECORDED
    return f"{name} + changes" if row.get("dirty") is True else name


def is_ok(row: Row) -> bool:
    return text(row, "status") == "ok"


# ---- steps ----


@dataclass
class Result:
    """One arm's step as it is compared. stock: the row of the same run that it is held against; best, own: measured
    TFLOP/s of the best product and of the model's own products."""

    row: Row
    alone: Row | None = None
    stock: Row | None = None
    best: float | None = None
    own: float | None = None
    ptxas: str = ""

    @property
    def ok(self) -> bool:
        return self.reason == ""

    @property
    def reason(self) -> str:
        """Why there is no figure, "" where there is one."""
        if not is_ok(self.row):
            return text(self.row, "status") or "the row has no status"
        return "" if number(self.row, "ms_s") and number(self.row, "tokens_per_s") else "the row has no time"

    def value(self, key: str) -> float | None:
        """A number of the row, or of the arm's row alone where only that one has it."""
        own = number(self.row, key)
        return number(self.alone, key) if own is None else own

    def tokens_per_s(self) -> tuple[float, float, float] | None:
        """(first quartile, median, third quartile); the slow quartile of the time is the low one of the speed."""
        if not self.ok:
            return None
        median, time = number(self.row, "tokens_per_s") or 0.0, number(self.row, "ms_s") or 0.0
        q1, q3 = number(self.row, "q1") or time, number(self.row, "q3") or time
        return median * time / q3, median, median * time / q1

    def rounds(self) -> int | None:
        count = len(seconds_of(self.row)) or number(self.row, "rounds") or number(self.row, "steps")
        return int(count) if count else None

    def against_stock(self) -> tuple[float, float, float] | None:
        """Quartiles over the rounds of stock's seconds over this arm's in the same round: above 1 is faster."""
        return speedup(self.stock, self.row)


def speedup(before: Row | None, after: Row) -> tuple[float, float, float] | None:
    """Quartiles over common rounds of before's seconds over after's; None without such."""
    pairs = list(zip(seconds_of(before), seconds_of(after)))
    return quartiles(b / a for b, a in pairs) if pairs else None


def comparison_key(row: Row) -> tuple[Any, ...]:
    """What rows share that were timed in turn: the run and its work."""
    return tuple(text(row, key) for key in ("file", "run", "config", "tokens", "block_size", "dtype"))


def step_results(rows: Sequence[Row]) -> list[Result]:
    """The steps to show, by machine, model and time: of an arm that was timed in turn only that row, else its row
    alone; every row that failed. The newest run of a machine and model comes first, and in it the fastest arm."""
    steps = [row for row in rows if row.get("bench") == "step" and row.get("arm")]
    turns: list[tuple[tuple[Any, ...], dict[str, Row]]] = []  # rounds of a run: an arm that comes again begins another
    latest: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in steps:
        if row.get("how") == "in turn":
            key = comparison_key(row)
            if key not in latest or text(row, "arm") in latest[key]:
                latest[key] = {}
                turns.append((key, latest[key]))
            latest[key][text(row, "arm")] = row
    shown: list[Result] = []
    for key, arms in turns:
        stock = next(
            (arms[name] for name in STOCK if name in arms and seconds_of(arms[name]) and is_ok(arms[name])), None
        )
        for name, row in arms.items():
            alone = [r for r in steps if r.get("how") != "in turn" and comparison_key(r) == key and r["arm"] == name]
            shown.append(Result(row, alone=next(iter(alone), None), stock=stock if is_ok(row) else None))
    in_turn = {(*comparison_key(r.row), text(r.row, "arm")) for r in shown if r.ok}
    for row in steps:
        if row.get("how") != "in turn" and not (is_ok(row) and (*comparison_key(row), text(row, "arm")) in in_turn):
            shown.append(Result(row))
    for result in shown:
        result.best, result.own = roof_of(result.row, rows)
        result.ptxas = ptxas_of(result.row, rows)
    return ordered(shown)


def ordered(results: Sequence[Result]) -> list[Result]:
    """By machine (GPUs first), model (small ones first) and run (the newest first); in it the fastest arm of a dtype
    first, what failed last."""
    newest: dict[tuple[Any, ...], str] = {}  # time of a run's last row
    size: dict[str, float] = {}  # of a model: a row that failed does not say it
    for r in results:
        run, config = comparison_key(r.row)[:3], text(r.row, "config")
        newest[run] = max(newest.get(run, ""), text(r.row, "time"))
        size[config] = max(size.get(config, 0.0), number(r.row, "params") or 0.0)

    def place(r: Result) -> tuple[Any, ...]:
        config = text(r.row, "config")
        return not on_gpu(r.row), machine_name(r.row), size[config], config

    def in_run(r: Result) -> tuple[Any, ...]:
        return not r.ok, comparison_key(r.row), -(number(r.row, "tokens_per_s") or 0.0)

    shown = sorted(sorted(results, key=in_run), key=lambda r: comparison_key(r.row)[:3])
    shown.sort(key=lambda r: newest[comparison_key(r.row)[:3]], reverse=True)
    return sorted(shown, key=place)


def roof_of(row: Row, rows: Sequence[Row]) -> tuple[float | None, float | None]:
    """(TFLOP/s of the best product, of the model's own products one after another), of the row's file, machine and
    dtype. Products of another config or micro-batch are not the model's own."""
    products = [
        r for r in rows
        if r.get("bench") == "roof" and r.get("what") == "gemm" and is_ok(r) and r["file"] == row["file"]
        and machine_name(r) == machine_name(row) and r.get("dtype") == row.get("dtype") and number(r, "tflops")
    ]  # fmt: skip
    best = max((number(r, "tflops") or 0.0 for r in products), default=None)
    own: dict[str, tuple[float, float]] = {}  # {product: (ms, TFLOP)}, the last time each was measured
    for r in products:
        matches = all(r.get(key) in (None, row.get(key)) for key in ("config", "batch_size"))
        ms, tflops = number(r, "ms"), number(r, "tflops") or 0.0
        if r.get("of") == "model" and ms and matches:
            own[str((r.get("name"), r.get("shape")))] = ms, tflops * ms / 1e3
    time = sum(ms for ms, _ in own.values())
    return best, sum(tflop for _, tflop in own.values()) / time * 1e3 if time else None


def ptxas_of(row: Row, rows: Sequence[Row]) -> str:
    """The assembler's version: the row's, or that of its file's environment."""
    for r in (row, *(r for r in rows if r.get("bench") == "environment" and r["file"] == row["file"])):
        found = r.get("ptxas")
        version = found.get("version") if isinstance(found, dict) else found
        if version:
            return str(version)
    return ""


# ---- whole runs ----


@dataclass
class WholeRun:
    """An arm's whole training runs of one file: wall seconds a round, and its share of stock nanoGPT's, by round."""

    first: Row
    rows: list[Row]
    share: tuple[float, float, float] | None


def whole_runs(rows: Sequence[Row]) -> list[WholeRun]:
    """Rows of whole trainings (bench "train", or those older than that key), by file and arm, the newest file first."""
    trained = [r for r in rows if r.get("bench") == "train" or ("bench" not in r and number(r, "wall_s"))]
    groups: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for r in trained:
        key = r["file"], text(r, "run"), text(r, "config"), machine_name(r)
        groups.setdefault(key, {}).setdefault(text(r, "arm") or NOT_RECORDED, []).append(r)
    found: list[WholeRun] = []
    for arms in groups.values():
        stock = {r.get("round"): number(r, "wall_s") for name in reversed(STOCK) for r in arms.get(name, ())}
        for own in arms.values():
            pairs = [(number(r, "wall_s"), stock.get(r.get("round"))) for r in own]
            shares = [a / b for a, b in pairs if a and b]
            found.append(WholeRun(own[0], own, quartiles(shares) if shares else None))
    return sorted(found, key=lambda w: day(w.first), reverse=True)


def day(row: Row) -> str:
    """The date, as 2026-11-27."""
    return (text(row, "time") or text(row, "date"))[:10]
