"""docs/cluster.md: its files parse and its flags exist; its lines train two nodes of two ranks as one process trains,
and the network check there names the node that sends slowly. Nodes are network namespaces (helpers/namespaces.py)."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import namespaces
import pytest
import slurm_cluster
from namespaces import Nodes
from slurm_cluster import Slurm, until
from tiny_run import ENV, ROOT, VOCAB, flags, losses, steps_of, train, wait_for_iteration, write_dataset
from torch.distributed.run import get_args_parser

from nanogpt_fast.settings import cli
from nanogpt_fast.settings.config import GPTConfig
from nanogpt_fast.settings.examining import DoctorConfig

PAGE = (ROOT / "docs/cluster.md").read_text()
FILES = ROOT / "docs/cluster"
SBATCH = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue",
          "open-mode", "output"}  # fmt: skip
VARIABLES = {"NODES": "2", "GPUS": "2", "HEAD": "node-0"}
SETTINGS = dict(gradient_accumulation_steps=4, max_iters=25, eval_interval=25, eval_iters=2, dropout=0.1)


def lines_of(module: str) -> list[str]:
    """The page's torchrun lines for one of our modules, and those of its files, continued lines joined."""
    texts = [*re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL), *(path.read_text() for path in FILES.iterdir())]
    found = [line.strip() for text in texts for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in found if re.search(rf"\btorchrun .*-m {module}\b", line) and not line.startswith("#")]


def on_nodes(kind: str) -> list[str]:
    """The page's lines for several nodes, of c10d's rendezvous or nanoGPT's."""
    mark = "--rdzv_endpoint=$HEAD" if kind == "c10d" else "--master_addr=$HEAD"
    found = [line for line in PAGE.splitlines() if line.startswith("torchrun ") and mark in line]
    return found * 2 if kind == "c10d" else found  # the same on each


# ---- what can be read ----


def test_the_pages_torchrun_lines_have_flags_that_exist(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    lines = lines_of("nanogpt_fast.train") + lines_of("nanogpt_fast.doctor")
    assert len(lines) >= 7
    for line in lines:
        line = re.sub(r"\s&$|\$FLAGS|\"\$@\"", "", line[line.index("torchrun") :]).replace("$HEAD", "node-0")
        words = shlex.split(re.sub(r"\$\{?\w+\}?", "2", line))[1:]
        get_args_parser().parse_args(words)
        module, *ours = words[words.index("-m") + 1 :]
        if module == "nanogpt_fast.doctor":
            assert cli.parse(DoctorConfig, ours, prog="doctor").ranks
        else:
            cli.load_config(ours)


def test_the_flags_that_the_page_names_are_ours():
    """Those of the check, written as `--flag`."""
    known = set(DoctorConfig.__dataclass_fields__)
    check = PAGE.partition("## The network first")[2].partition("\n## ")[0]
    named = set(re.findall(r"`--(\w+)(?:=\d+)?`", check))
    assert {"seconds", "timeout", "slow", "expect", "json"} <= named <= known


def test_the_batch_file_parses_and_asks_slurm_for_what_it_knows():
    path = FILES / "train.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    asked = re.findall(r"^#SBATCH --([\w-]+)", path.read_text(), re.MULTILINE)
    assert set(asked) == SBATCH and len(asked) == len(SBATCH)
    assert "#SBATCH --signal=B:USR1@" in path.read_text(), "without B: it would end torchrun"


def test_the_yaml_files_parse():
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with huggingface_hub")
    sky = yaml.safe_load((FILES / "skypilot.yaml").read_text())
    assert set(sky) == {"name", "num_nodes", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=sky[part], text=True, check=True)
    job = yaml.safe_load((FILES / "trainjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    (script,) = job["spec"]["trainer"]["args"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_every_link_of_the_page_leads_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert {"cluster/train.sbatch", "cluster/skypilot.yaml", "cluster/trainjob.yaml"} <= set(targets)
    assert not [target for target in targets if not (ROOT / "docs" / target).exists()]
    named = re.findall(r"\b(tests/[\w/]+\.py)\b", PAGE)
    assert not [name for name in named if not (ROOT / name).exists()]


# ---- what is run ----


@pytest.fixture(scope="module")
def nodes_there() -> None:
    if why := namespaces.missing():
        pytest.skip(why)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path)
    return tmp_path


def env_of_nodes() -> dict[str, str]:
    """torchrun on the path, and the page's variables."""
    return {**ENV, **VARIABLES, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run_on(nodes: Nodes, lines: list[str], cwd: Path) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of a shell line a node."""
    started = [nodes.start(n, ["bash", "-c", line], env=env_of_nodes(), cwd=cwd) for n, line in enumerate(lines)]
    told = [process.communicate(timeout=200) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, told)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["c10d", "nanogpt"])
def test_two_nodes_train_what_one_process_does(nodes_there: None, folder: Path, kind: str):
    """By the page's lines, the small run's flags behind them."""
    train(folder, **SETTINGS)
    alone = losses(folder)
    (folder / "out/metrics.jsonl").unlink()
    small = shlex.join(flags(folder, **SETTINGS, schedule="cosine"))
    lines = [f"{line.replace('--config gpt2_124m', '')} {small}" for line in on_nodes(kind)]
    assert len(lines) == 2
    with Nodes(2) as nodes:
        ended = run_on(nodes, lines, folder)
    assert [code for code, _, _ in ended] == [0, 0], ended
    together = losses(folder)
    assert len(together) == len(alone) == 26
    assert max(abs(alone[i] - together[i]) for i in alone) < 1e-4
    assert "iter 25" in ended[0][1] + ended[1][1]


@pytest.mark.slow
def test_the_node_that_sends_slowly_is_named(nodes_there: None, folder: Path):
    line = on_nodes("c10d")[0].partition("-m nanogpt_fast.train")[0] + "-m nanogpt_fast.doctor --ranks --json --slow=10"
    with Nodes(2) as nodes:
        healthy = run_on(nodes, [line] * 2, folder)
        nodes.slow(1, "200mbit")
        slowed = run_on(nodes, [line] * 2, folder)
    reports = [json.loads(next(out for _, out, _ in ended if out)) for ended in (healthy, slowed)]
    assert [code for code, _, _ in healthy] == [0, 0] and reports[0]["problems"] == [], reports[0]["problems"]
    nodes_of = {rank: node for node, own in enumerate(reports[1]["ranks"]["nodes"]) for rank in own}
    assert list(nodes_of.values()) == [0, 0, 1, 1]
    assert all(code for code, _, _ in slowed)
    (finding,) = reports[1]["findings"]  # which of the two came to be node 1 is the rendezvous' choice
    assert finding["what"] in ("the link node 1 -> node 0 is slow", "the link node 0 -> node 1 is slow")
    slow = [link for link in reports[1]["links"] if link["times"] > 10]
    assert len(slow) == 4 and len({(nodes_of[link["from"]], nodes_of[link["to"]]) for link in slow}) == 1
    assert all(link["bytes"] / link["seconds"] < 25e6 for link in slow), "200 Mbit/s are 25 MB/s"


WAITS = """
import runpy, sys, time
from nanogpt_fast.network import links
work = links.Meter.work
def wait(self):
    open(f"at-{self.call.rank}", "w").close()
    time.sleep(3)
    return work(self)
links.Meter.work = wait
runpy.run_module("nanogpt_fast.doctor", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_cable_that_is_pulled_is_said_on_both_sides(nodes_there: None, folder: Path):
    """Of the ranks' ends, not of torchrun's: its agent waits longer for the rendezvous that it lost."""
    (folder / "waits.py").write_text(WAITS)
    line = f"{on_nodes('c10d')[0].partition('-m ')[0]} waits.py --ranks --timeout=5"
    with Nodes(2) as nodes:
        for node in range(2):
            with open(folder / f"said-{node}", "w") as file:
                nodes.start(node, ["bash", "-c", line], env=env_of_nodes(), cwd=folder, stderr=file)
        until(lambda: len(list(folder.glob("at-*"))) == 4, 60)
        nodes.cut(1)
        errors = re.compile(r"^error: .*$", re.MULTILINE)
        until(lambda: all(errors.search((folder / f"said-{node}").read_text()) for node in range(2)), 60)
        said = sorted(errors.findall((folder / f"said-{node}").read_text())[0] for node in range(2))
    assert re.fullmatch(r"error: rank \d of 4 does not reach rank 0's store", said[0])  # where rank 0 is not
    assert said[1] == "error: ranks 2-3 (node 1) of 4 do not answer"


# ---- training on nodes that fail ----

LONG = {**SETTINGS, "max_iters": 3000, "eval_interval": 3000, "log_interval": 10, "learning_rate": 1e-3}


def train_on(nodes: Nodes, folder: Path, torchrun: str = "--nnodes=2", **changes: Any) -> list[Path]:
    """The page's c10d line on every node; where each one's words go."""
    small = shlex.join(flags(folder, **{**LONG, **changes}))
    line = on_nodes("c10d")[0].replace("--nnodes=$NODES", torchrun).replace("--config gpt2_124m", small)
    said = [folder / f"said-{node}" for node in range(nodes.count)]
    for node, file in enumerate(said):
        with file.open("w") as out:
            nodes.start(node, ["bash", "-c", line], env=env_of_nodes(), cwd=folder, stdout=out, stderr=out)
    return said


@pytest.mark.slow
def test_a_cable_pulled_while_they_train_is_said_and_the_run_goes_on(nodes_there: None, folder: Path):
    """Both sides name the ranks of the other; started again with --auto_resume, the run comes to the losses of one that
    was left alone."""
    with Nodes(2) as nodes:
        said = train_on(nodes, folder, timeout=4)
        wait_for_iteration(folder, 50)
        nodes.cut(1)
        error = re.compile(r"another rank does not answer")
        until(lambda: all(error.search(file.read_text()) for file in said), 60)
        words = "".join(file.read_text() for file in said)
        silent = set(re.findall(r"rank (\d) \(process \d+ on [^)]*\) is silent", words))
        assert silent >= {"2", "3"} or silent >= {"0", "1"}, words
        assert "which rank 0 or torchrun keeps, does not answer" in words or len(silent) == 4, words
    (step,) = steps_of(folder)
    end = step + 40
    with Nodes(2) as nodes:
        said = train_on(nodes, folder, auto_resume=True, max_iters=end)
        until(lambda: any("next:\n" in file.read_text() for file in said), 120)
    resumed = losses(folder)
    train(folder, **{**LONG, "out_dir": folder / "alone", "max_iters": end})
    shutil.copytree(folder / "alone", folder / "straight/out")
    alone = losses(folder / "straight")
    assert resumed.keys() == alone.keys() and max(abs(alone[i] - resumed[i]) for i in alone) < 1e-4


@pytest.mark.slow
def test_fewer_nodes_go_on_by_themselves(nodes_there: None, folder: Path):
    """--nnodes=1:2: a node is lost, torchrun starts the other's ranks again, which resume."""
    with Nodes(2) as nodes:
        elastic = "--nnodes=1:2 --max-restarts=5 --rdzv_conf=last_call_timeout=3"
        said = train_on(nodes, folder, torchrun=elastic, timeout=4, eval_interval=40)
        wait_for_iteration(folder, 50)
        nodes.end(1)  # node 0 has the rendezvous
        at = max(losses(folder))
        until(lambda: "started again by torchrun" in said[0].read_text(), 150)
        wait_for_iteration(folder, at + 100)
        words = said[0].read_text()
    assert "is silent" in words and "Resuming training from" in words


BYTES = {"n_layer": 4, "n_embd": 128, "n_head": 4, "gradient_accumulation_steps": 2, "eval_interval": 10_000}


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [2, 8])
def test_the_bytes_on_the_wire_are_those_that_must_move(nodes_there: None, folder: Path, accumulation: int):
    """Two nodes of one rank, counted by their cards: a step sends 2 (N - 1) / N of the gradient, once, however many
    micro-batches it has; the rest is TCP's and below 5%."""
    sent = {}
    steps = (20, 60)
    for count in steps:
        with Nodes(2) as nodes:
            line = on_nodes("c10d")[0].replace("--nproc_per_node=$GPUS", "--nproc_per_node=1")
            changes = {**BYTES, "gradient_accumulation_steps": accumulation, "max_iters": count, "log_interval": 1000}
            words = f"{line.replace('--config gpt2_124m', '')} {shlex.join(flags(folder, **{**LONG, **changes}))}"
            ended = run_on(nodes, [words] * 2, folder)
            assert [code for code, _, _ in ended] == [0, 0], ended
            sent[count] = [nodes.sent(node) for node in range(2)]
    shape = GPTConfig(block_size=8, vocab_size=VOCAB, n_layer=4, n_head=4, n_embd=128, bias=False)
    gradient = 4 * shape.num_params(non_embedding=False)
    for node in range(2):
        a_step = (sent[steps[1]][node] - sent[steps[0]][node]) / (steps[1] - steps[0])
        print(f"node {node}: {a_step:,.0f} bytes a step, the gradient has {gradient:,}")
        assert gradient <= a_step < 1.05 * gradient


# ---- schedulers ----


def at_once(slurm: Slurm, job: str) -> bool:
    """Whether it runs; what was queued again waits for two minutes otherwise, also where it has not quite ended yet."""
    if running := slurm.state(job).startswith("RUNNING"):
        return running
    slurm.run(f"scontrol update JobId={job} StartTime=now")
    return False


@pytest.mark.slow
def test_slurms_batch_file_saves_before_the_end_and_goes_on(nodes_there: None, folder: Path):
    if why := slurm_cluster.missing():
        pytest.skip(why)
    small = flags(folder, gradient_accumulation_steps=4, max_iters=100_000, eval_interval=100_000, log_interval=10)
    small = shlex.join(flag for flag in small if not flag.startswith("--out_dir"))
    env = env_of_nodes() | {"OUT_DIR": str(folder / "out")}

    with Nodes(2) as nodes:
        slurm = Slurm(nodes, folder / "slurm")
        told = slurm.run(f"cd {folder} && sbatch {FILES}/train.sbatch {small}", **env)
        job = told.split()[-1]
        wait_for_iteration(folder, 20)
        slurm.run(f"scancel --batch --signal=USR1 {job}")  # as --signal does before the time limit
        until(lambda: slurm.state(job).startswith("PENDING"), 60)
        (saved,) = steps_of(folder)
        assert saved > 20
        time.sleep(
            3
        )  # Slurm revokes what was granted before to the second: started within it, the job would be refused
        until(lambda: at_once(slurm, job) and max(losses(folder)) > saved + 20, 150)
        slurm.run(f"scancel {job}")
        until(lambda: not slurm.state(job), 60)
    log = (folder / f"nanogpt_fast-{job}.log").read_text()
    assert "no problems found" in log, "the network check came first"
    assert f"step_{saved:08d}, iteration {saved}" in log
    assert len(steps_of(folder)) >= 2, "scancel's own TERM is saved at too"


@pytest.mark.slow
def test_skypilots_run_section_goes_on_from_the_bucket(folder: Path):
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with huggingface_hub")
    run = yaml.safe_load((FILES / "skypilot.yaml").read_text())["run"].replace(". .venv/bin/activate\n", "")
    told = {"NODE_IPS": "127.0.0.1", "NUM_NODES": "1", "NODE_RANK": "0", "NUM_GPUS_PER_NODE": "2"}
    env = env_of_nodes() | {f"SKYPILOT_{key}": value for key, value in told.items()} | {"RUN": "gpt2"}
    for machine, end in (("first", 10), ("second", 20)):
        (folder / machine).mkdir()
        settings = flags(folder, gradient_accumulation_steps=2, max_iters=end, eval_interval=10)
        words = {"FLAGS": " ".join(f for f in settings if "out_dir" not in f), "BUCKET": str(folder / "bucket")}
        process = subprocess.run(
            ["bash", "-c", run], cwd=folder / machine, env=env | words, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
    steps = sorted(path.name for path in (folder / "bucket/gpt2/checkpoints").iterdir())
    assert steps[-1] == "step_00000020" and "iteration 10" in process.stdout
