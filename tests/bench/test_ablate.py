"""bench/ablate.py: order, keys, what is kept after a kill, and the arithmetic of its report."""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import ablate
import ablation_study
import ablation_texts
import initial_weights
import machine
import pytest
import stub_trainer
import torch
from ablation_report import outcomes
from ablation_study import Arm, Run, Study, Terms
from tiny_run import VOCAB, train, write_dataset

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.model import GPT
from nanogpt_fast.schedule import BatchSchedule
from nanogpt_fast.settings import cli
from nanogpt_fast.settings.config import GPTConfig

STUDY = Study("toy", "Is b better?", "", "a", (Arm("a", {}), Arm("b", {"grad_clip": 0.5}), Arm("c", {"bias": True})))

# Arm c's flag makes it end in exit code 6; max_bad_steps is one too.
OUTCOME = """
loss = float(flags["seed"]) - 1337 + float(flags.get("grad_clip", 0))
code = 6 if "bias" in flags else int(flags.get("max_bad_steps", 0))
"""


def stubbed(tmp_path: Path, monkeypatch: Any, study: Study) -> Namespace:
    """Of a command whose trainer is a stub, and whose only study is this one."""
    stub_trainer.use(monkeypatch, tmp_path, OUTCOME)
    monkeypatch.setattr(ablation_study, "load", lambda name: study)
    monkeypatch.setattr(ablation_texts, "digest", lambda name, data_dir: f"hash of {name}")
    return ablate.parsed(["toy", "--seeds=2", "--jobs=2", "--out", str(tmp_path / "out")])


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    return stubbed(tmp_path, monkeypatch, STUDY)


def rows(args: Namespace) -> list[dict[str, Any]]:
    return machine.read_lines(args.out / "toy.jsonl")


def words(args: Namespace) -> list[str]:
    return ["toy", f"--seeds={args.seeds}", "--jobs=2", "--out", str(args.out)]


def test_every_seed_begins_with_another_arm():
    order = [(run.seed - 1337, run.arm.name) for run in ablation_study.runs(STUDY, 3, Terms(5))]
    assert order == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a"), (2, "c"), (2, "a"), (2, "b")]


def test_whose_flags_come_last_and_what_shares_are_of():
    arms = (Arm("a", {"batch_ramp": "25%:50%", "max_iters": "110%"}), Arm("b", {"gradient_accumulation_steps": "50%"}),
            Arm("c", {"warmup_iters": "1%", "grad_clip": 2.0}))  # fmt: skip
    study = Study("toy", "?", "", "a", arms, small={"gradient_accumulation_steps": 4, "dataset": "manual"})
    common = {"grad_clip": 1.0, "dataset": "stdlib"}
    a, b, c = (run.flags for run in ablation_study.runs(study, 1, Terms(1000, common, {})))
    assert (a["batch_ramp"], a["max_iters"], a["lr_decay_iters"], a["eval_interval"]) == ("1:500", 1100, 1100, 220)
    assert a["warmup_iters"] == 55 and a["dataset"] == "manual" and a["grad_clip"] == 1.0
    assert b["gradient_accumulation_steps"] == 2 and b["max_iters"] == 1000
    assert c["warmup_iters"] == 10 and c["grad_clip"] == 2.0
    large = Terms(2000, common, {"dataset": "mine"}, small=False, accumulation=40)
    a, b, c = (run.flags for run in ablation_study.runs(study, 1, large))
    assert (a["batch_ramp"], b["gradient_accumulation_steps"]) == ("10:1000", 20), "shares of the preset's own batch"
    assert "gradient_accumulation_steps" not in c and c["dataset"] == "mine"


def test_a_key_is_what_is_computed():
    run, settings = Run("toy", Arm("a", {}), 1, {}), {"learning_rate": 1.0}
    same = Run("other", Arm("renamed", {}), 1, {})
    others = [Run("toy", Arm("a", {}), 2, {}), Run("toy", Arm("a", {}, weights="gpt2"), 1, {}),
              Run("toy", Arm("a", {}), 1, {}, before={"max_iters": 5})]  # fmt: skip
    keys = {run.key("data", settings), run.key("other data", settings), run.key("data", {"learning_rate": 2.0})}
    assert same.key("data", settings) == run.key("data", settings)
    assert len(keys | {other.key("data", settings) for other in others}) == 6


def test_a_changed_preset_is_another_run_and_a_place_is_not(args: Namespace, tmp_path: Path):
    (tmp_path / "mine.toml").write_text("learning_rate = 1e-3\nmin_lr = 1e-4\n")
    args.config = str(tmp_path / "mine.toml")
    run = ablation_study.runs(STUDY, 1, ablate.terms_of(args))[0]
    before = ablate.settings_of(run, args)
    (tmp_path / "mine.toml").write_text('learning_rate = 1e-3\nmin_lr = 1e-4\nout_dir = "elsewhere"\n')
    assert ablate.settings_of(run, args) == before
    (tmp_path / "mine.toml").write_text("learning_rate = 1e-3\nmin_lr = 1e-4\nn_layer = 3\n")
    assert ablate.settings_of(run, args) == {**before, "n_layer": 3}


def test_runs_are_made_once_and_failures_are_results(args: Namespace, capsys: pytest.CaptureFixture[str]):
    assert ablate.main(words(args)) == 0
    found = {(row["arm"], row["seed"]): row for row in rows(args)}
    assert len(rows(args)) == len(found) == 6
    assert "bench" not in machine.machine_facts("cpu"), "of one command is in what all commands share"
    assert found["b", 1338]["val_loss"] == pytest.approx(1.2) and found["b", 1338]["status"] == "ok"
    assert found["c", 1337]["status"] == "diverged" and "last words" in found["c", 1337]["said"]
    a = found["a", 1337]
    assert a["curve"] == [[0, 0.0], [30, -0.3]] and (a["grad_norm"], a["grad_norm_max"]) == (1.0, 3.0)
    assert a["clipped"] == pytest.approx((100 * 10 + 300 * 20) / 30), "each line's share counts its iterations"
    capsys.readouterr()
    args.seeds = 3
    assert ablate.main(words(args)) == 0
    assert len(rows(args)) == 9 and "6 of   9 runs are there" in capsys.readouterr().out


def test_a_failed_run_is_shown_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """What fails is not the arm's doing."""
    study = Study("toy", "?", "", "a", (Arm("a", {}), Arm("b", {"max_bad_steps": 9})))
    args = stubbed(tmp_path, monkeypatch, study)
    args.seeds = 1
    for count in (2, 3):
        assert ablate.main(words(args)) == 0
        assert len(rows(args)) == count, "what is done is not made again"
    assert sorted((row["arm"], row["status"]) for row in rows(args)) == [("a", "ok"), *[("b", "failed")] * 2]
    assert ablate.main([*words(args), "--report"]) == 0 and "0, 1 failed" in capsys.readouterr().out


def test_what_arms_begin_from_is_made_once_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    after = {"dataset": "first", "max_iters": "200%", "grad_clip": 0.25}
    arms = (Arm("a", {}, after=after), Arm("b", {"grad_clip": 0.5}, after=after), Arm("c", {"grad_clip": 0.75}))
    args = stubbed(tmp_path, monkeypatch, Study("toy", "?", "", "a", arms, small={"dataset": "second"}))
    stubs, trained = ablate.command_of, []

    def noted(*a: Any, **k: Any) -> list[str]:
        trained.append(stubs(*a, **k))
        return trained[-1]

    monkeypatch.setattr(ablate, "command_of", noted)
    assert ablate.main(words(args)) == 0
    first = [command for command in trained if "--dataset=first" in command]
    assert len(trained) == 8 and len(first) == 2, "six runs, and one before them a seed"
    assert all({"--max_iters=2000", "--grad_clip=0.25"} < set(command) for command in first)
    places = {word.partition("=")[2] for command in first for word in command if word.startswith("--out_dir")}
    begins = [word.partition("=")[2] for command in trained for word in command if word.startswith("--init_from")]
    assert len(begins) == 4 and {f"{place}.part" for place in begins} == places, "c begins from scratch"
    found = {(row["arm"], row["seed"]): row for row in rows(args)}
    assert found["a", 1337]["data"] == "hash of second+hash of first"
    assert found["c", 1337]["data"] == "hash of second" and "before" not in found["c", 1337]
    assert sum("before_cpu_s" in row for row in rows(args)) == 2
    assert len(outcomes(ablation_study.load("toy"), rows(args))) == 3, "arms from scratch are compared with the others"
    trained.clear()
    args.seeds = 1
    assert ablate.main([*words(args), "--before=CHECKPOINT"]) == 0
    assert sum("--init_from=CHECKPOINT" in command for command in trained) == len(trained) == 2


def test_what_fails_before_a_run_is_the_run_s_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arms = (Arm("a", {}, after={"max_bad_steps": 7}), Arm("b", {}))
    args = stubbed(tmp_path, monkeypatch, Study("toy", "?", "", "b", arms))
    assert ablate.main(words(args)) == 0
    a = next(row for row in rows(args) if row["arm"] == "a")
    assert (a["status"], a["exit_code"]) == ("failed", 7) and a["said"].startswith("the run before it: last words")


def test_cpu_time_is_the_run_s_own(args: Namespace):
    """A run that is stopped for a while takes no CPU meanwhile, and one that works takes what it works."""
    runner = ablate.Runner(args, {})
    code, said, seconds = runner._train([sys.executable, "-c", "import time; time.sleep(0.5); print('said')"])
    assert (code, said) == (0, "said\n") and 0 < seconds < 0.4
    work = "import time\nwhile time.process_time() < 0.3: pass"
    assert 0.3 <= runner._train([sys.executable, "-c", work])[2] < 2


def test_after_a_kill_the_rest_is_made_and_nothing_twice(args: Namespace, tmp_path: Path):
    """kill -9 of the whole group once two runs are there, and half a line behind them, as a kill may leave it."""
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
import ablate, pytest
from pathlib import Path
from test_ablate import STUDY, stubbed
stubbed(Path({str(tmp_path)!r}), pytest.MonkeyPatch(), STUDY)
ablate.main(["toy", "--seeds=8", "--jobs=2", "--out", {str(args.out)!r}])
"""
    runner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while len(rows(args)) < 2:
            assert runner.poll() is None
            time.sleep(0.01)
    finally:
        os.killpg(runner.pid, signal.SIGKILL)
        runner.wait()
    with open(args.out / "toy.jsonl", "a") as file:
        file.write('{"half": "a li')
    args.seeds = 3
    assert ablate.main(words(args)) == 0
    whole = [line for line in (args.out / "toy.jsonl").read_text().splitlines() if line.endswith("}")]
    assert len(whole) == len(rows(args)), "the half line stands alone"
    found = [(row["arm"], row["seed"]) for row in rows(args)]
    assert len(found) == len(set(found)) and {(arm, 1337 + s) for arm in "abc" for s in range(3)} <= set(found)


@pytest.mark.slow
def test_runs_die_with_a_runner_that_is_killed(args: Namespace, tmp_path: Path):
    """Else they would hold a GPU beside the runs of the next command."""
    if sys.platform != "linux":
        pytest.skip("the kernel's own doing, on Linux")
    said = tmp_path / "pid"
    sleeper = f"import os, pathlib, time; pathlib.Path({str(said)!r}).write_text(str(os.getpid())); time.sleep(60)"
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
import ablate
args = ablate.parsed(["--jobs=1"])
ablate.Runner(args, {{}})._train([sys.executable, "-c", {sleeper!r}])
"""
    runner = subprocess.Popen([sys.executable, "-c", script])
    try:
        while not (said.is_file() and said.read_text()):
            assert runner.poll() is None
            time.sleep(0.01)
    finally:
        runner.kill()
        runner.wait()
    until = time.monotonic() + 10
    while _runs(int(said.read_text())):
        assert time.monotonic() < until
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")  # a zombie whose new parent has not looked yet has ended too
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("name", ablation_study.names())
def test_what_is_shipped_is_whole(name: str):
    """Every arm's flags are train's own, its arms differ, and they see as many tokens."""
    _whole(name, ablate.parsed([name]))
    if name in ("ramp", "finetune"):  # where another preset brings sizes and texts
        _whole(name, ablate.parsed([name, "--config=gpt2_124m", "--dataset=openwebtext", "--before=gpt2"]))


def _whole(name: str, args: Namespace) -> None:
    tokens, settings = [], []
    for run in ablation_study.runs(ablation_study.load(name), 1, ablate.terms_of(args)):
        config = cli.load_config(ablate.command_of(run, args, Path("out"))[3:])
        flat = config.flat()
        assert all(flat[key] == value for key, value in run.arm.flags.items() if "%" not in str(value)), run.arm
        assert not run.arm.weights or run.arm.weights in initial_weights.KINDS
        assert flat["max_iters"] % flat["eval_interval"] == 0, "the last evaluation is at the end"
        tokens.append(BatchSchedule.of(config.data).tokens_before(flat["max_iters"]))
        settings.append((run.arm.weights, run.before, flat))
    assert max(tokens) < 1.005 * min(tokens)
    assert all(one not in settings[:i] for i, one in enumerate(settings)), "two arms are one"


def test_what_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="did you mean 'init'"):
        ablation_study.load("inti")
    for text, said in (("x", "not TOML"), ('question = "q"', "not whole"),
                       ('question="q"\nbaseline="a"\nflag={}\n[arms.a]', "did you mean 'flags'"),
                       ('question="q"\nbaseline="a"\n[arms.a]\nweights="gpt"', "did you mean 'gpt2'")):  # fmt: skip
        (tmp_path / "s.toml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            ablation_study.load("s", tmp_path)
    for argv in (["--seeds=0"], ["--jobs=0"], ["--iters=2"], ["--iters=1001"]):
        with pytest.raises(ConfigError, match="out of range"):
            ablate.parsed(argv)


def test_initial_weights_are_what_they_are_called():
    shape = GPTConfig(block_size=32, vocab_size=96, n_layer=2, n_head=2, n_embd=64, bias=True)
    model = GPT(shape)
    model.init_weights(torch.Generator().manual_seed(3))
    heads, own_head = (
        [kind for kind in initial_weights.KINDS if "head" in kind],
        replace(shape, tie_word_embeddings=False),
    )
    drawn = {kind: initial_weights.initial(kind, shape, 3) for kind in initial_weights.KINDS if kind not in heads}
    wte, fc, proj = "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.h.0.mlp.c_proj.weight"
    for name, parameter in model.named_parameters():
        assert torch.equal(drawn["gpt2"][name], parameter), "train's own, bit for bit"
    torch.testing.assert_close(drawn["unscaled"][proj], 2 * drawn["gpt2"][proj])  # sqrt(2 * 2 layers)
    assert torch.equal(drawn["unscaled"][fc], drawn["gpt2"][fc])
    assert not drawn["zero projections"][proj].any() and torch.equal(drawn["zero projections"][fc], drawn["gpt2"][fc])
    torch.testing.assert_close(drawn["double"][fc], 4 * drawn["half"][fc])
    assert float(drawn["pytorch"][wte].std()) == pytest.approx(1.0, rel=0.05)
    assert float(drawn["pytorch"][proj].abs().max()) == pytest.approx(1 / 16, rel=0.01)  # 1 / sqrt(256)
    assert float(drawn["pytorch, embeddings 0.02"][wte].std()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(drawn["pytorch"]["transformer.h.0.ln_1.weight"], torch.ones(64))
    for kind in heads:
        others = initial_weights.initial(kind, own_head, 3)
        assert float(others.pop("lm_head.weight").std()) == pytest.approx(float(kind.split()[1]), rel=0.05)
        assert others.keys() == drawn["gpt2"].keys()
        assert all(torch.equal(others[n], drawn["gpt2"][n]) for n in others if n != wte), kind
    with pytest.raises(ConfigError, match="is the token embedding"):
        initial_weights.initial("head 0", shape, 3)


def test_gpt_2_s_weights_through_a_checkpoint_are_a_run_from_scratch(tmp_path: Path):
    """To the bit, losses and gradient norms: so what init compares are the weights alone."""
    write_dataset(tmp_path)
    shape, found = GPTConfig(block_size=8, vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=16, bias=False), []
    weights = initial_weights.write("gpt2", shape, 1339, tmp_path / "initial")
    for init_from in ("scratch", str(weights)):
        out = tmp_path / f"out-{len(found)}"
        assert train(tmp_path, seed=1339, init_from=init_from, out_dir=out, dropout=0.1, data_order="shuffle") == 0
        lines = machine.read_lines(out / "metrics.jsonl")
        found.append([(line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"])
    assert found[0] == found[1] and len(found[0]) > 10


def test_the_manual_is_finetuned_in_the_first_text_s_vocabulary(monkeypatch: pytest.MonkeyPatch):
    topics = {"b": "It’s é\n\nsaid  twice", "a": "said\n   twice\n\n    and – indented"}
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", Namespace(topics=topics))
    characters = sorted("\n" + "".join(map(chr, range(32, 127))))
    text = ablation_texts.manual(characters)
    first, *paragraphs = text.rstrip("\n").split("\n\n")
    assert sorted(set(text)) == characters and len(first) == 95
    assert paragraphs == ["said\n   twice", "    and - indented", "It's "], "each paragraph once, where it stands first"
