"""Rows of results files with made-up figures, for the tests of bench/compare.py."""

import json
from pathlib import Path
from typing import Any

import compare_rows

GPU = {"device": "cuda", "gpu": "Made-up GPU <b>80GB</b>", "driver": "1.2", "power_limit_w": 400.0}
CPU = {"device": "cpu", "cpu": "Made-up CPU", "cores": 2, "threads": 2, "cpu_flags": ["avx2"]}
FACTS = {
    "time": "2026-01-02T03:04:05+00:00", "run": "r1", "commit": "abcdef0123", "dirty": False, "tree": "t1",
    "python": "3.12.0", "torch": "2.11.0", "triton": "3.6.0", "cuda": "12.8", "status": "ok",
}  # fmt: skip


def step(arm: str, seconds: list[float], **changes: Any) -> dict[str, Any]:
    """A step of 1000 tokens, timed in turn."""
    q1, median, q3 = compare_rows.quartiles(seconds)
    return {
        **FACTS, **GPU, "bench": "step", "config": "tiny", "arm": arm, "how": "in turn", "batch_size": 5,
        "accumulation": 2, "tokens": 1000, "block_size": 100, "params": 2_000_000, "dtype": "bfloat16",
        "residual_dtype": "bfloat16", "graph": True, "loss": 4.0, "seconds": seconds, "rounds": len(seconds),
        "ms_s": median, "q1": q1, "q3": q3, "tokens_per_s": 1000 / median, "mfu_nanogpt": 0.25, "mfu_llmc": 0.2,
        "peak": "100 TFLOP/s", "tflops": 25.0, "peak_gb": 2.147483648, "joules_per_token": 0.0015,
        "loss_after": {"steps": 20, "loss": 3.5}, **changes,
    }  # fmt: skip


def gemm(of: str, tflops: float, ms: float, **changes: Any) -> dict[str, Any]:
    return {**FACTS, **GPU, "bench": "roof", "what": "gemm", "of": of, "name": f"{of} {tflops}", "dtype": "bfloat16",
            "shape": [1, 2, 3], "tflops": tflops, "ms": ms, **changes}  # fmt: skip


def written(path: Path, *rows: dict[str, Any], end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + end)
    return path


def results(path: Path, *rows: dict[str, Any]) -> list[compare_rows.Result]:
    return compare_rows.step_results(compare_rows.read([written(path, *rows)]).rows)


def old(arm: str, round_number: int, wall_s: float) -> dict[str, Any]:
    return {"arm": arm, "date": "2026-01-01", "torch": "2.13.0", "cores": 2, "cpu": "Made-up CPU", "python": "3.11.7",
            "round": round_number, "wall_s": wall_s, "cpu_s": 9.0, "val_loss": 1.5, "iter_ms": 30.0}  # fmt: skip


def sample(arm: str, seconds: list[float], **changes: Any) -> dict[str, Any]:
    """Of bench/sampling.py: 10 new tokens a round."""
    q1, median, q3 = (value * 100 for value in compare_rows.quartiles(seconds))
    return {**FACTS, **CPU, "bench": "sample", "config": "tiny", "arm": arm, "prompt": 4, "new_tokens": 10,
            "dtype": "float32", "seconds": seconds, "ms_token": median, "q1": q1, "q3": q3,
            "tokens_per_s": 1e3 / median, **changes}  # fmt: skip


def loader(worker: str, **changes: Any) -> dict[str, Any]:
    """Of bench/loader.py's table by who reads."""
    return {**FACTS, **CPU, "bench": "loader", "table": "worker", "format": "made-up .bin", "order": "shuffle",
            "worker": worker, "batch_size": 8, "block_size": 16, "us_batch": 64.0, "wait_us": 9.0,
            "tokens_per_s": 2e6, **changes}  # fmt: skip


def profile(ms: dict[str, float], **changes: Any) -> list[dict[str, Any]]:
    """Of bench/profile_stage.py: a row a part, with half its time as floor, and one of the whole step."""
    total, row = sum(ms.values()), {**FACTS, **CPU, "bench": "profile", "config": "tiny", "dtype": "float32", **changes}
    parts = [{**row, "part": part, "ms": t, "share": t / total, "floor_ms": t / 2, "of_floor": 0.5}
             for part, t in ms.items()]  # fmt: skip
    return [*parts, {**row, "part": "step", "ms": total, "text": "A made-up step.", "advice": "make it up faster."}]
