"""tune's child processes: rows that crash and hang them, what they answer, and what they compile."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import interpreter
import pytest
from tune_case import CPU, OP, SETUP, few_rows, soon, target_of, tuning_of

from nanogpt_fast import ops, tune, tuning
from nanogpt_fast.child import Child
from nanogpt_fast.errors import DeviceError
from nanogpt_fast.launch_plan import cases_of, proven
from nanogpt_fast.ops import row_as_json
from nanogpt_fast.tuning import Died, Remote
from nanogpt_fast.verdict import given_to_child

__all__ = ["few_rows"]
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("few_rows")

SAYS = """
import json, os, sys, time
say = lambda **event: print(json.dumps(event), flush=True)
say(ready=True)
for line in sys.stdin:
    asked = json.loads(line)
    blocks = [next((row["blocks"]["BLOCK"] for row in rows if row["op"] == "grad_norm"), 0) for rows in asked["sets"]]
    if asked["ask"] == "wrong":
        say(at=1)
        {wrong}
        say(answer="")
    elif asked["ask"] == "times":
        for i, block in enumerate(blocks):
            say(at=i)
            {times}
        say(at=-1)
        say(answer=[[block or 4096.0] * asked["rounds"] for block in blocks])
    else:
        say(answer=[1.0, 2.0] if asked["ask"] == "cost" else True)
"""


def child_that(wrong: str = "pass", times: str = "pass") -> Remote:
    return Remote([sys.executable, "-c", SAYS.format(wrong=wrong, times=times)], "times")


@pytest.mark.parametrize("where", ["wrong", "times"])
def test_a_row_that_ends_the_process_costs_itself_alone(where: str):
    """256 would be quickest, if it did not."""
    block = {"wrong": "blocks[1]", "times": "block"}[where]
    remote = child_that(**{where: f"os._exit(7) if {block} == 256 else 0"})
    found, said = tuning_of(ops.TRITON, remote)
    target = target_of(found)
    try:
        found.run([target], soon(), lambda kept: None)
    finally:
        remote.end()
    assert found.kept[target.key].blocks == {"BLOCK": 512}
    dead = {name: why for name, why in target.refused.items() if "exit code 7" in why}
    assert list(dead) == ["BLOCK 4096 -> 256"] and remote.starts == 2, (target.refused, said)


def test_a_row_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch):
    remote = child_that(wrong="time.sleep(60) if blocks[1] == 2048 else 0")
    found, _ = tuning_of(ops.TRITON, remote)
    arena = tuning.RowArena(found, target_of(found))
    stock = remote.ask
    monkeypatch.setattr(remote, "ask", lambda what, sets, **details: stock(what, sets, 0.3, **details))
    present = arena.present
    try:
        assert arena.right(present) == ""
        slow = dataclasses.replace(present, blocks={"BLOCK": 2048})
        assert "no end within" in arena.right(slow) and arena.right(present) == ""
    finally:
        remote.end()


def test_a_child_that_does_not_start_is_an_error():
    remote = Remote([sys.executable, "-c", "import sys; sys.exit('no such GPU')"], "times")
    with pytest.raises(DeviceError, match="does not start") as caught:
        remote.ask("cost", [{}])
    assert "no such GPU" in caught.value.found
    with pytest.raises(Died, match="exit code 3"):
        ends = "print('{\"ready\": 1}', flush=True); input(); exit(3)"
        Remote([sys.executable, "-c", ends], "times").ask("cost", [{}])


FORKS = """
import os, sys, time
sys.path[:0] = sys.argv[1:]
from nanogpt_kernels.ahead import compile_ahead
print('{"ready": 1}', flush=True)
compile_ahead(lambda: (print('{"inside": 1}', flush=True), os.write(2, b"%d" % os.getpid()), time.sleep(60)), 90)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_child_that_is_ended_leaves_no_compiling_behind():
    """Its compiling is in a session of its own; and what that prints is no event."""
    child = Child([sys.executable, "-c", FORKS, *(p for p in sys.path if p)])
    events = child.events(60.0)
    assert next(events) == {"ready": 1}
    until = time.monotonic() + 60.0
    while not (pid := _said(child)) and time.monotonic() < until:
        time.sleep(0.05)
    began = time.monotonic()
    child.end()
    assert time.monotonic() - began < 5.0
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() - began < 10.0, "it goes on"
        time.sleep(0.05)
    assert list(events) == []


def _said(child: Child) -> str:
    child._errors.seek(0)
    return child._errors.read().decode()


def test_the_real_child_answers(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """In this process: the interpreter needs its numpy shim. A row that no kernel can have does not run."""
    interpreter.install()
    (small,) = (case for case in cases_of(proven(SETUP), ops.TRITON, 90) if case.op == OP)
    (case,) = (case for case in cases_of(SETUP, ops.TRITON, 90) if case.op == OP)
    ((key, present),) = case.forward.items()
    bad = dataclasses.replace(present, blocks={"BLOCK": 3})
    sets = [[row_as_json(key, present)], [row_as_json(key, bad)]]
    asked = [dict(ask="wrong", call=case.known_by, small=[small.known_by], repeats=1, sets=sets[:1] * 2),
             dict(ask="wrong", call=case.known_by, small=[], repeats=1, sets=sets)]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(line) + "\n" for line in asked)))
    given = given_to_child(SETUP, CPU) | {"kernels": "auto", "role": "race"}
    assert tune.main(["--child", json.dumps(given)]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said[:3] == [{"ready": True}, {"at": 1}, {"answer": ""}]
    assert said[3] == {"at": 1} and said[4]["answer"].startswith("does not run: "), said


COMPILED = """
import glob, json, os, sys, time
from dataclasses import replace
import torch
from nanogpt_fast import ops
from nanogpt_fast.proof import Setup
from nanogpt_fast.settings.config import GPTConfig
from nanogpt_fast.tuning import Remote, RowArena, Tuning, targets_of
from nanogpt_fast.verdict import given_to_child

setup = Setup(GPTConfig(n_layer=1, n_head=2, n_embd=128, block_size=64, vocab_size=500), "bfloat16", rows=128)
given = given_to_child(setup, torch.device("cpu")) | {"capability": 90, "kernels": "auto", "role": "compile"}
remote = Remote([sys.executable, "-m", "nanogpt_fast.tune", "--child", json.dumps(given)], "times")
tuning = Tuning(setup, ops.TRITON, 90, 1, remote, remote)
target = next(t for t in targets_of(tuning.cases, {}, tuning.small) if t.key.op == "grad_norm")
rows = [replace(target.present, blocks={"BLOCK": block}) for block in (3, 512, 1024)]
assert RowArena(tuning, target).fitting(rows, time.monotonic() + 200) == rows  # what no kernel can be is seen later
remote.end()
found = glob.glob(os.environ["TRITON_CACHE_DIR"] + "/*/_grad_norm_partial_kernel.cubin")
assert len(found) == 2, found
"""


@pytest.mark.slow
def test_rows_are_compiled_on_all_cores_without_a_gpu(tmp_path: Path):
    """By the real process, into Triton's cache; one that no kernel can have does not keep the others."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
