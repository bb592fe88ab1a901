"""Whether a results file is ready to be sent: what it lacks, and how to get that. `bench/compare.py --check FILE`."""

import datetime
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from compare_rows import STOCK, Row, day, machine_name, number, on_gpu, read, seconds_of, step_results, text

ALWAYS = ("bench", "time", "run", "commit", "dirty", "tree", "python", "torch", "triton", "cuda", "status", "device")
OF_DEVICE = {"cuda": ("gpu", "driver", "power_limit_w"), "cpu": ("cpu", "cores", "threads")}
MAY_BE_NULL = ("cuda", "power_limit_w", "driver")  # a CPU build of torch; what a container does not tell
STEP = ("config", "arm", "how")
FIGURES = ("batch_size", "accumulation", "tokens", "block_size", "params", "ms_s", "q1", "q3", "tokens_per_s", "loss")
STEP_OK = ("dtype", *FIGURES)
PRIVATE = re.compile(r"(/home/|/Users/|[A-Za-z]:\\Users\\|/root/)[^\s\"']*")
RUN = "python bench/run.py --suite step --nanogpt DIR --out DIR"


def main(path: Path) -> int:
    """Print what the file holds and lacks; 0 where it can be sent, 3 where it lacks something. DataError where it is
    missing or empty."""
    results = read([path])
    missing = [*results.notes, *lacks(path, results.rows)]
    steps = [r for r in step_results(results.rows) if r.ok]
    print(f"{path}: {len(results.rows)} rows, {len(steps)} steps with a time, {', '.join(names(results.rows))}")
    for row in failed(results.rows):
        what = text(row, "arm") or text(row, "name") or text(row, "op")
        print(f"kept as it is: {text(row, 'bench')} {what}: {text(row, 'status')}")
    for problem in missing:
        print(f"- {problem}")
    if not missing:
        print("nothing is missing: it can be sent (bench/README.md, Send your results)")
    return 3 if missing else 0


def names(rows: Sequence[Row]) -> list[str]:
    return sorted({machine_name(row) for row in rows})


def failed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if text(row, "status") not in ("", "ok")]


def lacks(path: Path, rows: Sequence[Row]) -> Iterator[str]:
    """One sentence for each thing to mend, and how."""
    yield from _fields(rows)
    yield from _one_of_each(rows)
    yield from _steps(rows)
    yield from _roof(rows)
    if not any(row.get("bench") == "environment" for row in rows):
        yield "no row of the machine: python bench/environment.py --out DIR, and add its lines"
    yield from _private(rows)
    yield from _name(path, rows)


def _fields(rows: Sequence[Row]) -> Iterator[str]:
    without: dict[str, list[int]] = {}
    for row in rows:
        fields = [*ALWAYS, *OF_DEVICE.get(text(row, "device"), ())]
        fields += STEP if row.get("bench") == "step" else ()
        fields += STEP_OK if row.get("bench") == "step" and text(row, "status") == "ok" else ()
        for key in fields:
            absent = key not in row or (row[key] is None and key not in MAY_BE_NULL)
            if absent or (key in FIGURES and number(row, key) is None):
                without.setdefault(key, []).append(row["line"])
    alike: dict[tuple[int, ...], list[str]] = {}
    for key, lines in without.items():
        alike.setdefault(tuple(lines), []).append(key)
    for lines, keys in alike.items():
        at = ", ".join(map(str, lines[:5])) + (f" and {len(lines) - 5} more" if len(lines) > 5 else "")
        what = f"no {', '.join(keys)} in line{'s' * (len(lines) > 1)} {at}"
        yield f"{what}: an older commit wrote it, or a figure was lost; run it again from this one"


def _one_of_each(rows: Sequence[Row]) -> Iterator[str]:
    if len(names(rows)) > 1:
        yield f"rows of several machines ({', '.join(names(rows))}): a file for each"
    commits = sorted({text(row, "commit") for row in rows if text(row, "commit")})
    if len(commits) > 1:
        yield f"rows of several commits ({', '.join(commits)}): a file for each"
    if any(row.get("dirty") is True for row in rows):
        yield "measured with uncommitted changes (dirty): commit or stash them and run it again"
    if "unknown" in commits:
        yield "the commit is unknown: run it in a git checkout, not in an unpacked archive"


def _steps(rows: Sequence[Row]) -> Iterator[str]:
    turns = [r for r in rows if r.get("bench") == "step" and r.get("how") == "in turn" and text(r, "status") == "ok"]
    if not turns:
        yield f"no step that was timed in turn with others: {RUN}"
        return
    if not any(text(r, "arm") in STOCK for r in turns):
        yield f"stock nanoGPT was not timed in turn, so there is no ratio: {RUN} (karpathy/nanoGPT)"
    if any(not seconds_of(r) for r in turns):
        yield f"no seconds by round in a row in turn, so it cannot be paired: {RUN}"
    arms = [r for r in rows if r.get("bench") == "step"]
    if not any(isinstance(r.get("loss_after"), dict) for r in arms):
        yield f"no loss after some steps (loss_after): {RUN}"
    if any(text(r, "device") == "cuda" for r in turns) and not any(number(r, "joules_per_token") for r in arms):
        yield "no joules a token: pip install 'nanogpt-fast[bench]' and run it again, or say that the card counts none"


def _roof(rows: Sequence[Row]) -> Iterator[str]:
    good = [r for r in rows if r.get("bench") == "roof" and text(r, "status") == "ok"]
    products = [r for r in good if r.get("what") == "gemm"]
    how = "python bench/roof.py --out DIR, and add its lines"
    if not any(r.get("what") == "copy" for r in good):
        yield f"no measured copy: {how}"
    steps = [r for r in rows if r.get("bench") == "step" and text(r, "status") == "ok"]
    for dtype in sorted({text(r, "dtype") for r in steps if text(r, "dtype")}):
        kinds = {text(r, "of") for r in products if text(r, "dtype") == dtype}
        if not kinds:
            yield f"no measured product in {dtype}, so no share of it: {how} (--dtype {dtype})"
        elif lost := [kind for kind in ("sweep", "model") if kind not in kinds]:
            yield f"no products of the {' and the '.join(lost)} in {dtype}: {how} (--dtype {dtype})"


def _private(rows: Sequence[Row]) -> Iterator[str]:
    found = {match[0] for row in rows for k, v in row.items() if k != "file" for match in PRIVATE.finditer(str(v))}
    if found:
        yield f"paths of your machine are in it, look whether you want to show them: {', '.join(sorted(found)[:3])}"


def slug(name: str) -> str:
    """A machine's name as a folder: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def _name(path: Path, rows: Sequence[Row]) -> Iterator[str]:
    dates = sorted(day(row) for row in rows if re.fullmatch(r"\d{4}-\d\d-\d\d", day(row)))
    commits = sorted({text(row, "commit") for row in rows if text(row, "commit")})
    date = dates[0] if dates else datetime.date.today().isoformat()
    gpus = sorted({machine_name(row) for row in rows if on_gpu(row)})
    folder = slug(gpus[0]) if gpus else "cpu"
    wanted = f"{folder}/{date}-{commits[0][:7] if commits else 'COMMIT'}.jsonl"
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)-([0-9a-f]{7,40})\.jsonl", path.name)
    fits = match and match[1] in dates and any(c.startswith(match[2]) or match[2].startswith(c) for c in commits)
    if not fits or path.resolve().parent.name != folder:
        yield f"its place and name: bench/results/{wanted}"
