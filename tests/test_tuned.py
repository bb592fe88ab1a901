"""launch.keep, the user's cache of launch rows, and which of them a run takes, on one rank and on two."""

import dataclasses
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nanogpt_kernels import launch
from nanogpt_kernels.launch import Key, Row

from nanogpt_fast import ops, tuned, verdict
from nanogpt_fast.distributed import World
from nanogpt_fast.files import user_cache
from nanogpt_fast.launch_plan import META, Notes, as_proven, cases_of, proven, reached
from nanogpt_fast.memory import Plan, peak
from nanogpt_fast.ops import keeping, kept_rows, row_as_json, row_from_json
from nanogpt_fast.proof import Setup
from nanogpt_fast.settings.config import GPTConfig

CPU = torch.device("cpu")
SHAPE = GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=8, vocab_size=48, bias=False)
SETUP = Setup(SHAPE, "float32", rows=16)
KEY = Key("norm_fwd", 90, 4, 16)
ROW = Row(90, dict(ROWS=2, BLOCK_C=128), num_warps=2, choices=dict(programs_per_sm=3))
ELSEWHERE = Key("norm_fwd", 90, 4, 32)
REAL_FACTS_OF = tuned.facts_of
FACTS = {"gpu": "A GPU", "driver": "1", "torch": "2", "triton": "3", "ptxas": "13", "kernels": "k"}
OF_RUN = FACTS | {"run": "float32 highest"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "facts_of", lambda device: FACTS)
    yield
    launch.keep({})


def entry(key: Key = KEY, row: Row = ROW, ratio: float = 0.9) -> tuned.Entry:
    return tuned.entry_of(key, row, ratio, "norm, forward")


# ---- launch.keep ----


def picked(dtype: torch.dtype, size: int, arch: int = 90) -> Row:
    with launch.recording(arch):
        return launch.pick("norm_fwd", torch.empty(1, dtype=dtype, device="meta"), size)


def test_a_kept_row_is_taken_for_exactly_its_key():
    shipped = {at: picked(*at) for at in [(torch.float32, 16, 90), (torch.float32, 32, 90), (torch.bfloat16, 16, 90),
                                          (torch.float32, 16, 100)]}  # fmt: skip
    with keeping({KEY: ROW}):
        assert picked(torch.float32, 16) is ROW
        assert [at for at, row in shipped.items() if picked(*at) is not row] == [(torch.float32, 16, 90)]
        with launch.override("norm_fwd", num_warps=8):
            assert picked(torch.float32, 16) == dataclasses.replace(ROW, num_warps=8)
        with launch.recording(90) as calls:  # what memory.py, compile_ahead and the proof see
            launch.pick("norm_fwd", torch.empty(1, device="meta"), 16)
        assert calls.rows == [("norm_fwd", ROW)] and calls.asked == {KEY: ROW}
    assert picked(torch.float32, 16) is shipped[torch.float32, 16, 90] and kept_rows() == {}


@pytest.mark.parametrize(
    "changes",
    [
        dict(blocks=dict(ROWS=2)), dict(blocks=dict(ROWS=2, BLOCK_C=0)), dict(blocks=dict(ROWS=2, BLOCK_C="128")),
        dict(choices={}), dict(choices=dict(programs_per_sm=True)), dict(num_warps=3), dict(num_stages=0),
        dict(max_registers=0),
    ],
)  # fmt: skip
def test_what_is_no_row_of_its_op_is_refused(changes: dict[str, Any]):
    with pytest.raises(ValueError, match="norm_fwd is not launched so"):
        launch.keep({KEY: dataclasses.replace(ROW, **changes)})
    assert kept_rows() == {}


def test_memory_is_predicted_with_the_kept_rows():
    """chunk_rows rows of logits exist at a time: a kept row that says more of them is seen."""
    shape = dataclasses.replace(SHAPE, vocab_size=4096)
    plan = Plan(shape=shape, ops=ops.TRITON, dtype=torch.bfloat16, residual_dtype=None, recompute="none", batch_size=64,
                micro_batches=1, device_type="cuda", capability=90)  # fmt: skip
    key = Key("cross_entropy", 90, 2, 4096)
    held = []
    for chunk in (64, 512):
        with launch.recording(90):
            row = launch.pick("cross_entropy", torch.empty(1, dtype=torch.bfloat16, device="meta"), 4096)
        with keeping({key: dataclasses.replace(row, choices=row.choices | {"chunk_rows": chunk})}):
            held.append(sum(peak(plan).values()))
    assert held[1] - held[0] == pytest.approx((512 - 64) * 4096 * 2, rel=0.1)


# ---- what a run reaches ----


def test_a_run_s_calls_are_counted_and_its_update_is_as_wide_as_the_model():
    cases = {case.op: case for case in cases_of(SETUP, ops.TRITON, 90, micro_batches=5)}
    assert {op: case.calls for op, case in cases.items()} == {
        "embedding": 5, "norm": 5, "qkv_attention": 15, "linear": 15, "add_norm": 30, "mlp": 15,
        "linear_cross_entropy": 5, "grad_norm": 1, "adamw_": 1,
    }  # fmt: skip
    notes = Notes(ops.TRITON)
    notes.update(SETUP, META)
    (size,) = {key.size for op in ("grad_norm", "adamw_") for key in cases[op].keys}
    assert size == notes.calls[cases["grad_norm"].known_by].args[0].numel() >= SHAPE.num_params(non_embedding=False)
    assert {key.op for key in cases["mlp"].forward} == {"bias_gelu_fwd"}
    assert {key.op for key in cases["mlp"].backward} == {"bias_gelu_bwd"}
    asked = {key for case in cases.values() for key in case.keys}
    assert asked <= reached(SETUP, ops.TRITON, 90)


def test_the_update_is_proven_at_fewer_parameters_by_the_same_row():
    wide = Setup(dataclasses.replace(SHAPE, n_layer=12, n_embd=64, vocab_size=500), "float32", rows=16)
    asked = {key for case in cases_of(proven(wide), ops.TRITON, 90) for key in case.keys}
    (key,) = (key for key in reached(wide, ops.TRITON, 90) if key.op == "adamw")
    (small,) = (key for key in asked if key.op == "adamw")
    row = launch.TABLE["adamw"][0]
    assert small.size < key.size and as_proven({key: row}, asked) == {key: row, small: row}
    assert as_proven({KEY: ROW}, asked) == {KEY: ROW}


# ---- the cache ----


def test_what_is_kept_comes_back_beside_what_others_keep():
    assert tuned.read(FACTS) == {}
    tuned.write(FACTS, {KEY: entry()})
    tuned.write(FACTS, {ELSEWHERE: entry(ELSEWHERE, ratio=0.8)})  # as another process would
    found = tuned.read(FACTS)
    assert found == {KEY: entry(), ELSEWHERE: entry(ELSEWHERE, ratio=0.8)}
    assert row_from_json(found[KEY].row) == (KEY, dataclasses.replace(ROW, itemsize=4))
    tuned.write(FACTS, {KEY: None})
    assert tuned.read(FACTS).keys() == {ELSEWHERE}


@pytest.mark.parametrize("name", FACTS)
def test_any_other_fact_is_another_cache(name: str):
    said: list[str] = []
    tuned.write(FACTS, {KEY: entry()})
    assert tuned.read(FACTS | {name: "another"}, said.append) == {}
    assert len(said) == (name != "gpu"), said  # of another GPU nothing is known: no word is due


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"facts": {}}', '{"rows": [{"row": {}}]}', '{"rows": [{"row": 1, "ratio": 1, "of": ""}]}']
)
def test_a_damaged_cache_is_none_in_one_line(text: str):
    tuned.write(FACTS, {KEY: entry()})
    tuned.path_of(FACTS).write_text(text)
    said: list[str] = []
    assert tuned.read(FACTS, said.append) == {} and len(said) == 1 and "nanogpt_fast.tune" in said[0]
    tuned.write(FACTS, {KEY: entry()})
    assert tuned.read(FACTS) == {KEY: entry()}


def test_a_row_that_no_kernel_has_spoils_its_file():
    tuned.write(FACTS, {KEY: entry(row=dataclasses.replace(ROW, blocks=dict(ROWS=2)))})
    said: list[str] = []
    assert tuned.read(FACTS, said.append) == {} and "not launched so" in said[0]


# ---- which rows a run takes ----


def test_a_run_takes_what_it_reaches(capsys: pytest.CaptureFixture):
    tuned.write(OF_RUN, {KEY: entry(), ELSEWHERE: entry(ELSEWHERE)})
    said: list[str] = []
    tuned.take("tuned", "triton", SETUP, World(), said.append)
    assert kept_rows().keys() == {KEY} and said == ["kernels: triton, 1 launch row tuned on this GPU"]
    with_rows = verdict.facts_of(SETUP, CPU)
    assert verdict.child_command(SETUP, CPU, [])[-1].count('"norm_fwd"') == 1
    for rows, kernels in (("shipped", "triton"), ("tuned", "reference"), ("tuned", "auto")):  # auto on a CPU
        tuned.take(rows, kernels, SETUP, World(), said.append)
        assert kept_rows() == {} and len(said) == 1
    shipped = verdict.facts_of(SETUP, CPU)
    assert {name for name in shipped if shipped[name] != with_rows[name]} == {"launch_rows"}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """One that has a GPU of sm_90, a row tuned for SETUP, and a verdict on the shipped rows: right."""
    assert ops.TRITON
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for module in (verdict, tuned):
        monkeypatch.setattr(module, "capability_of", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    tuned.write(OF_RUN, {KEY: entry()})
    world = World(device=torch.device("cuda"))
    verdict.remember(verdict.Verdict(verdict.facts_of(SETUP, world.device), made="2026-11-27"))
    return world


def test_a_model_that_is_sampled_from_takes_rows_whose_verdict_is_known(world: World):
    said: list[str] = []
    for tuned_too in (False, True):
        assert verdict.ops_of_run("auto", SETUP, world, said.append, check=False) == ops.TRITON
        assert kept_rows().keys() == ({KEY} if tuned_too else set())
        assert ("1 launch row tuned" in said[-1]) == tuned_too
        with keeping({KEY: row_from_json(entry().row)[1]}):
            verdict.remember(verdict.Verdict(verdict.facts_of(SETUP, world.device), made="2026-11-27"))


def test_rows_with_which_an_op_is_wrong_are_left_and_the_op_is_not(world: World):
    said: list[str] = []
    with keeping({KEY: row_from_json(entry().row)[1]}):
        wrong = verdict.Verdict(verdict.facts_of(SETUP, world.device), {"norm": "off"}, made="2026-11-27")
        verdict.remember(wrong)
    assert verdict.ops_of_run("auto", SETUP, world, said.append) == ops.TRITON
    assert kept_rows() == {} and "so the shipped ones are taken" in said[-2] and "tuned" not in said[-1]


def test_rows_are_for_the_dtype_and_masks_that_they_were_checked_with():
    tuned.write(OF_RUN, {KEY: entry()})
    for other in (
        dataclasses.replace(SETUP, documents=True),
        dataclasses.replace(SETUP, shape=dataclasses.replace(SHAPE, dropout=0.1)),
    ):
        tuned.take("tuned", "triton", other, World(), lambda line: None)
        assert kept_rows() == {}


def as_rank(rank: int, folder: Path, found: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    said: list[str] = []
    tuned.take("tuned", "triton", SETUP, World(rank, 2), said.append if rank == 0 else lambda line: None)
    found.put((rank, [row_as_json(*pair) for pair in kept_rows().items()], said))
    dist.destroy_process_group()


def test_two_ranks_take_rank_0_s_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Their caches differ, as on two nodes: rank 1's has another row."""
    context = multiprocessing.get_context("fork")
    found, ranks = context.Queue(), []
    for rank, row in enumerate((ROW, dataclasses.replace(ROW, num_warps=8))):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(rank)))
        tuned.write(OF_RUN, {KEY: entry(row=row)})
        ranks.append(context.Process(target=as_rank, args=(rank, tmp_path, found)))
        ranks[-1].start()
    told = sorted(found.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join(60)
    expected = [json.loads(json.dumps(row_as_json(KEY, ROW)))]
    assert [rows for _, rows, _ in told] == [expected, expected] and len(told[0][2]) == 1


def test_the_cache_lies_beside_the_verdicts():
    assert tuned.path_of(OF_RUN).parent == user_cache("rows") and tuned.path_of(OF_RUN).name.startswith("a-gpu-")


def test_the_facts_are_all_that_a_row_depends_on(monkeypatch: pytest.MonkeyPatch):
    """Each of the chip, the software and our own sources, as they are now."""
    device, before = torch.device("cpu"), REAL_FACTS_OF(torch.device("cpu"))
    assert before.keys() == {"gpu", "driver", "torch", "triton", "ptxas", "kernels"}
    for name, value in (("kernel_sources", "other kernels"), ("_driver", "another driver")):
        monkeypatch.setattr(tuned, name, lambda value=value: value)
    monkeypatch.setattr(torch, "__version__", "another torch")
    changed = {name: value for name, value in REAL_FACTS_OF(device).items() if value != before[name]}
    assert changed == {"kernels": "other kernels", "driver": "another driver", "torch": "another torch"}
