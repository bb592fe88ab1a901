"""python -m nanogpt_fast.plan: the run of a budget, what it says of it, the command for train, what it refuses."""

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from nanogpt_fast import plan as command
from nanogpt_fast import run_plan
from nanogpt_fast.errors import ConfigError
from nanogpt_fast.gpus import CHOICES, GPUS
from nanogpt_fast.hardware import flops_per_token
from nanogpt_fast.published_runs import FINEWEB, OWT, RUNS
from nanogpt_fast.run_plan import SHAPES, Data, batch_tokens, best_shape, closest, machine, params_of, shape_of
from nanogpt_fast.scaling_laws import REFIT
from nanogpt_fast.settings.cli import load_config, parse
from nanogpt_fast.settings.config import GPTConfig
from nanogpt_fast.settings.planning import EXAMPLES, PROG, PlanFlags

ROOT = Path(__file__).resolve().parents[2]
ENOUGH = Data("fineweb", FINEWEB, None, math.inf)
MODULE = "nanogpt_fast.train"


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    """Every micro-batch fits: the prediction takes seconds, and one test has it."""
    monkeypatch.setattr(run_plan, "largest_batch", lambda plan, budget: max(plan.batch_sizes))
    monkeypatch.setattr(run_plan, "peak", lambda plan: {"all": 2**30})


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    command.main(list(words))
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    return json.loads(shown(capsys, "--json", *words), parse_constant=pytest.fail)


# ---- shapes, batches ----


def test_gpt2s_own_sizes_are_among_the_shapes():
    own = {12: (12, 768), 16: (24, 1024), 20: (36, 1280), 25: (48, 1600)}
    assert {heads: (shape_of(heads).n_layer, shape_of(heads).n_embd) for heads in own} == own
    assert [params_of(shape_of(heads)) for heads in own] == [124373760, 354599936, 773582080, 1556840000]
    counts = [params_of(shape) for shape in SHAPES]
    assert counts == sorted(counts) and all(b / a < 1.4 for a, b in zip(counts[4:], counts[5:]))
    assert all(shape.n_embd == 64 * shape.n_head for shape in SHAPES)


@pytest.mark.parametrize("flops", [1e17, 1e18, 1e20, 1e21])
def test_the_best_shape_is_near_the_closed_form(flops: float):
    """Of FLOPs as the shape has them, which are more than 6 N D, so somewhat smaller."""
    found = best_shape(flops, ENOUGH)
    each = flops_per_token(found)["nanogpt"] / params_of(found)
    assert abs(math.log(params_of(found) / REFIT.optimum(flops, each)[0])) < math.log(1.35)
    beside = [SHAPES[SHAPES.index(found) + step] for step in (-1, 1)]
    losses = [REFIT.loss(params_of(s), flops / flops_per_token(s)["nanogpt"]) for s in (found, *beside)]
    assert losses[0] == min(losses)


def test_little_data_ask_for_a_larger_model():
    few = replace(ENOUGH, unique=1e9, passes=2.0)
    assert params_of(best_shape(2e19, few)) > 2 * params_of(best_shape(2e19, ENOUGH))


def test_batches_are_gpt3s_and_below_the_critical_one():
    assert [batch_tokens(n, 2.8, 1) for n in (124e6, 774e6, 1.56e9)] == [2**19, 2**19, 2**20]  # llm.c's scripts'
    assert batch_tokens(124e6, 4.5, 1) == 2**17 and batch_tokens(124e6, 3.2, 6) == 85 * 6 * 1024


def test_the_mfu_is_the_measured_one():
    rows = [
        json.loads(line) for line in (ROOT / "bench/results/h100/2026-11-27-3849647.jsonl").read_text().splitlines()
    ]
    page = (ROOT / "docs/performance.md").read_text()
    assert rows and re.search(r"\| triton\+graph \| [\d.]+ \| [\d. to]+ \| 579,980 \| 50\.1% \|", page)
    assert round(579_980 * flops_per_token(shape_of(12))["nanogpt"] / 989e12, 2) == run_plan.MEASURED_MFU
    assert "assumption" not in machine(CHOICES["h100"], 1, 0.0).mfu_source
    assert "assumption" in machine(CHOICES["a100"], 1, 0.0).mfu_source and machine("x", 1, 0.4).mfu_source == "given"


# ---- the command ----


@pytest.mark.parametrize(
    "words",
    [
        ["--hours=24", "--gpu=h100", "--gpus=8"],
        ["--tokens=3e9", "--gpu=rtx4090"],
        ["--params=1.5e9", "--flops=1e20", "--gpus=6"],
        ["--config=gpt2_350m", "--hours=5", "--gpus=16", "--data_dir=elsewhere"],
    ],
)
def test_train_takes_the_command(words: list[str], quick: None, capsys: pytest.CaptureFixture[str]):
    found, line = as_json(capsys, *words), shown(capsys, *words).splitlines()[-1]
    assert shlex.split(line) == found["command"]
    launcher, _, flags = line.partition(f" -m {MODULE} ")
    config = load_config(shlex.split(flags))
    shape = config.shape(50304)
    assert {**found["model"]} == {**vars(shape), "params": shape.num_params(non_embedding=False)}
    assert config.tokens_per_iter == found["tokens_per_iter"] and config.optim.max_iters == found["iterations"]
    assert found["tokens"] == found["tokens_per_iter"] * found["iterations"]
    assert config.optim.learning_rate == found["learning_rate"]
    assert "--config" in words[0] or config.optim.min_lr == pytest.approx(config.optim.learning_rate / 10)
    assert config.optim.warmup_iters < config.optim.lr_decay_iters == config.optim.max_iters
    ranks = found["gpus"]
    assert config.data.gradient_accumulation_steps % ranks == 0 and config.data.batch_size <= 64
    peak = GPUS[found["gpu"]].tflops * 1e12 * ranks * found["mfu"]
    flops = found["tokens"] * flops_per_token(shape)["nanogpt"]
    assert found["hours"] == pytest.approx(flops / peak / 3600) and found["flops"] == pytest.approx(flops)
    nodes = {1: "python", 6: "torchrun --standalone --nproc_per_node=6", 8: "torchrun --standalone --nproc_per_node=8",
             16: "torchrun --nnodes=2 --nproc_per_node=8"}  # fmt: skip
    assert launcher == nodes[ranks]
    given = dict(word.lstrip("-").split("=") for word in words)
    for key in ("hours", "tokens", "flops"):
        if key in given:
            assert found[key] == pytest.approx(float(given[key]), rel=0.01)
    assert ("--data_dir=elsewhere" in line) == ("data_dir" in given)


def test_what_it_says(quick: None, capsys: pytest.CaptureFixture[str]):
    out = shown(capsys, "--flops=1e19", "--dataset=fineweb")
    lines = {line[:10].strip(): line[10:] for line in out.splitlines() if line[:10].strip()}
    assert lines["model"].startswith("219.4M parameters: 18 layers, 14 heads, 896 wide, vocabulary 50,304")
    assert "15% more than 6 N D" in lines["compute"] and "524,288 tokens x 12,638 iterations" in lines["batch"]
    assert "262.2M (Besiroglu, refit); others 228M (Hoffmann, as printed) to 295M (approach 2)" in out
    assert lines["loss"] == "3.24 nats a token, 3.21 to 3.25 by other laws"
    assert "by which llm.c 124M and llm.c 350M lie above it on FineWeb" in out
    assert lines["time"] == "5.62 hours on 1 NVIDIA H100 80GB HBM3 at an MFU of 50%"
    rows = re.findall(r"^(half the size|the plan|twice the size) .* (\S+) x$", out, re.MULTILINE)
    assert [name for name, _ in rows] == ["half the size", "the plan", "twice the size"]
    assert float(rows[1][1]) == 1.0 < min(float(rows[0][1]), float(rows[2][1]))


def test_a_loss_of_other_data_says_so(quick: None, capsys: pytest.CaptureFixture[str]):
    out = shown(capsys, "--flops=1e19", "--dataset=mine")
    assert "of MassiveText, 32,000 SentencePiece tokens: no published run says how far mine lies from it" in out
    assert not as_json(capsys, "--flops=1e19", "--dataset=mine")["loss"]["runs"]


def test_passes_over_the_data(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Counted where the dataset is there; known of OpenWebText where it is not."""
    folder = tmp_path / "data/owt_small"
    folder.mkdir(parents=True)
    (folder / "train.bin").write_bytes(bytes(2 * 4_000_000))
    out = shown(capsys, "--model=gpt2_124m", "--tokens=1e8", "--dataset=owt_small")
    assert "owt_small: 4M tokens (counted), seen 24.9 times; past about 4 passes" in out
    out = shown(capsys, "--model=gpt2_124m", "--tokens=1e8", "--dataset=owt_small", "--epochs=3")
    assert "seen 2.95 times" in out and "beyond the runs" in out
    out = shown(capsys, "--params=3e8", "--flops=1e20", "--epochs=1")
    assert "9.036B tokens (by its published size" in out and re.search(r"8\d% of the budget is left: --epochs", out)
    assert OWT in as_json(capsys, "--flops=1e19")["loss"]["data"]


def test_memory_is_predicted_and_decides_the_micro_batch(capsys: pytest.CaptureFixture[str]):
    """A small model on a small GPU: the real prediction."""
    found = as_json(capsys, "--params=2e7", "--tokens=1e8", "--gpu=rtx3090")
    assert re.fullmatch(r"\d+\.\d\d GiB of 24 GiB a GPU at the peak, predicted", found["memory"])
    assert "--batch_size=64" in found["command"] or "--batch_size=32" in found["command"]


def test_what_does_not_fit_says_what_would_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    tried = []
    monkeypatch.setattr(run_plan, "largest_batch", lambda plan, budget: tried.append((plan.parallel, plan.recompute)))
    monkeypatch.setattr(run_plan, "relief", lambda plan, budget: "a smaller model")
    monkeypatch.setattr(run_plan, "peak", lambda plan: {"all": 99 * 2**30})
    found = as_json(capsys, "--params=1.5e9", "--tokens=1e9", "--gpus=2", "--gpu=l4" if "l4" in CHOICES else "")
    assert found["memory"] == "does not fit: 99.00 GiB of 24 GiB a GPU; a smaller model"
    assert tried == [("ddp", "none"), ("ddp", "block"), ("zero1", "none"), ("zero1", "block")]


def test_published_runs_beside_what_is_expected(capsys: pytest.CaptureFixture[str]):
    out = shown(capsys, "--published")
    for run in RUNS:
        assert out.count(run.name) == 2 and run.loss_source in out
    rows = json.loads(shown(capsys, "--published", "--json", "--mfu=0.25"))
    of = {row["run"]: row for row in rows}
    assert of["llm.c 124M"]["loss"] == "3.2722" and of["llm.c 1558M"]["expected"] == "-" == of["llm.c 1558M"]["loss"]
    assert float(of["llm.c 1558M"]["at 25%"]) == pytest.approx(48.4, rel=0.01)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "neither a budget nor a model"),
        (["--gpu=h10", "--hours=1"], "unknown GPU 'h10', did you mean 'h100'"),
        (["--flop=1e19"], "did you mean"),
        (["--flops=1e19", "--hours=2"], "more than one budget"),
        (["--params=1e9", "--model=gpt2_124m"], "more than one model"),
        (["--tokens=-1"], "--tokens is out of range"),
        (["--flops=inf"], "--flops is out of range"),
        (["--mfu=50", "--hours=1"], "--mfu is out of range"),
        (["--gpus=12", "--hours=1"], "nodes of 8"),
        (["--flops=1e10"], "below all of GPT-2's kind"),
        (["--flops=1e30", "--dataset=x"], "above all of GPT-2's kind"),
        (["--flops=1e22", "--epochs=1"], "the data are the limit"),
        (["--params=1e12"], "no shape of GPT-2's kind"),
        (["--tokens=1e5"], "--tokens=100000, whose best size is"),
        (["--model=eval_gpt2"], "a plan is of a run from scratch"),
        (["--model=gpt2_12m"], "did you mean"),
        (["--model=gpt2_124m", "--gpus=7"], "not shared by so many GPUs evenly"),
        (["--model=gpt2_124m", "--tokens=1e6"], "too few iterations"),
        (["--flops=1e19", "--dataset=fineweb", "--epochs=2"], "so neither are --epochs"),
    ],
)
def test_what_it_refuses(words: list[str], said: str):
    with pytest.raises(ConfigError) as error:
        command.main(words)
    assert said in str(error.value) and error.value.exit_code == 2


def test_examples_of_its_help_parse():
    for line in EXAMPLES.splitlines()[1:]:
        words = shlex.split(line.replace("--config", "--model"))[3:]
        assert parse(PlanFlags, words, prog=PROG)
    assert closest(124e6) == shape_of(12) == GPTConfig(bias=False)
