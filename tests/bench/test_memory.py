"""profiling/memory.py: who holds what, from hand-made events and from a real step, whose sum is the allocator's."""

import json
import sys
from pathlib import Path
from typing import Any

import memory
import pytest
from memory import Change, Holder, changes, table, timeline

from nanogpt_fast.errors import DataError, DeviceError

FLAGS = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=4", "--device=cpu",
         "--gradient_accumulation_steps=1", "--dtype=float32", "--vocab_size=29"]  # fmt: skip


def event(name: str, start: float, end: float, sequence: int = -1) -> dict[str, Any]:
    args = {"Sequence number": sequence}
    return {"ph": "X", "cat": "cpu_op", "name": name, "pid": 1, "tid": 1, "ts": start, "dur": end - start, "args": args}


def block(time: float, address: int, size: int, total: int, device: int = 0) -> dict[str, Any]:
    args = {"Addr": address, "Bytes": size, "Total Allocated": total, "Device Type": device, "Ev Idx": int(time)}
    return {"ph": "i", "name": "[memory]", "pid": 1, "tid": 1, "ts": time, "args": args}


RECORDS = [
    event("forward", 10, 30),
    event("h0.mlp", 11, 20),
    event("aten::mm", 12, 15, sequence=4),
    event("backward", 30, 50),
    event("autograd::engine::evaluate_function: MmBackward0", 31, 40, sequence=4),
    event("update", 60, 70),
    block(1, 100, 1000, 1000),  # the parameters, by their address
    block(2, 200, 50, 1050),  # while building
    block(13, 300, 400, 1450),  # h0.mlp's forward
    block(25, 400, 70, 1520),  # forward, outside an op
    block(32, 500, 300, 1820),  # h0.mlp's backward: the peak
    block(33, 300, -400, 1420),
    block(61, 600, 10, 1430),
    block(62, 999, -7, 1423),  # allocated before anything was counted
    block(63, 700, 5000, 5000, device=1),  # another device
]


def test_blocks_are_named_by_their_address_or_their_range():
    found = changes(RECORDS, 0, {100: "parameters"})
    assert [c.holder for c in found] == [
        Holder("parameters"),
        Holder("other"),
        Holder("activations", "mlp", "h0"),
        Holder("activations"),
        Holder("backward", "mlp", "h0"),
        Holder("activations", "mlp", "h0"),  # what is freed is whose it was
        Holder("update"),
        Holder("other"),
    ]


def test_the_peak_and_who_holds_it():
    line = timeline(changes(RECORDS, 0, {100: "parameters"}))
    assert line.peak == line.peak_total == 1820 == sum(line.holders.values())
    assert line.holders[Holder("activations", "mlp", "h0")] == 400
    assert [line.held[kind][-1] for kind in ("parameters", "activations", "backward", "update")] == [1000, 70, 300, 10]
    shown = table(line)
    assert "1820" not in shown and "0.00" in shown and "parameters" in shown and "  mlp" in shown


def test_an_address_used_again_is_another_block():
    holders = [Holder("activations", "mlp", f"h{i}") for i in (0, 1)]
    sizes = [(0, 10), (0, -10), (1, 30), (1, -30)]
    line = timeline([Change(i, 5, size, 0, holders[of]) for i, (of, size) in enumerate(sizes)])
    assert line.peak == 30 and line.holders == {holders[1]: 30} and line.held["activations"] == [10, 0, 30, 0]
    with pytest.raises(DataError, match="no memory events"):
        timeline([])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "out"
    memory.main(["--steps=2", f"--out={folder}", *FLAGS])
    return folder


def test_a_real_steps_holders_add_up_to_what_is_allocated(kept: Path):
    found = json.loads((kept / "holders.json").read_text())
    assert sum(row["bytes"] for row in found["holders"]) == found["peak_bytes"] == found["allocator_bytes"]
    kinds: dict[str, int] = {}
    for row in found["holders"]:
        kinds[row["kind"]] = kinds.get(row["kind"], 0) + row["bytes"]
    assert kinds["optimizer"] == 2 * kinds["parameters"] == 2 * kinds["gradients"]
    rows, C = 4 * 16, 32  # qkv, packed, of both layers: 3 C a token, beside o and the softmax's statistics
    attention = {row["layer"]: row["bytes"] for row in found["holders"] if row["op"] == "qkv_attention"}
    assert attention["h0"] == attention["h1"] >= 4 * rows * 4 * C
    assert kinds["activations"] > kinds["parameters"] / 4


def test_the_picture(kept: Path):
    pytest.importorskip("matplotlib")
    assert (kept / "memory.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_or_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    memory.main(["--steps=1", f"--out={tmp_path / 'a'}", *FLAGS])
    assert "pip install" in capsys.readouterr().out and not (tmp_path / "a/memory.png").exists()
    memory.main(["--steps=1", *FLAGS])
    shown = capsys.readouterr().out
    assert "activations" in shown and "--dry_run foretells" in shown and "--out DIR" in shown


def test_a_device_without_memory_events_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import torch

    monkeypatch.setattr(memory, "resolve_device", lambda name: torch.device("mps"))
    with pytest.raises(DeviceError, match="no memory events"):
        memory.recorded(FLAGS, 1, tmp_path)
