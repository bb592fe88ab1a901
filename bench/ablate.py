"""Does it matter? A grid of training flags times seeds, run through the trainer, and what came of it.

    python bench/ablate.py                          the studies, their arms, what is done and what is left
    python bench/ablate.py init clip --seeds 5      runs them; Ctrl-C keeps what is done, the same command goes on
    python bench/ablate.py all --report             tables of what is there
    python bench/ablate.py init --config gpt2_124m --dataset openwebtext --iters 20000   the same question on a GPU
    python bench/ablate.py finetune --config finetune_shakespeare --dataset shakespeare --before gpt2 --iters 50

A run is `python -m nanogpt_fast.train` in a process of its own; several at a time where there are cores (--jobs; on a
GPU one). Without --dataset the text is this Python's own (ablation_texts.py), prepared once into the user's cache: it
needs no network, and depends on the Python version, so its hash is part of a run's key. Results are JSON lines, one a
run, in --out; docs/ablations.md is made of them by bench/ablation_page.py. A run that diverged is a result; one that
failed (no memory, a kill) is shown as that, and made again by the next command.
"""

import argparse
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

import ablation_report
import ablation_study
import ablation_texts
import initial_weights
import machine
from ablation_study import POINTS, SMALL, Run, Study, Terms

from nanogpt_fast.child import PR_SET_PDEATHSIG
from nanogpt_fast.command import run_command
from nanogpt_fast.data.dataset import read_meta
from nanogpt_fast.errors import ConfigError
from nanogpt_fast.files import user_cache
from nanogpt_fast.settings import cli
from nanogpt_fast.settings.config import Config, GPTConfig
from nanogpt_fast.weights.canonical import GPT2_PADDED

RESULTS = machine.ROOT / "bench/results/ablations"
ITERS = 1000  # of a run, unless --iters says more
TAIL = 600  # characters of a failed run's last words
SETTLED = ("ok", "diverged")  # what a run came to that running it again would not change
Keyed = tuple[Run, str, str]  # a run, its data's hash, its key
PLACES = {"seed", "out_dir", "data_dir", "init_from"}  # of a configuration: in a run's key otherwise, or nowhere


def terms_of(args: argparse.Namespace) -> Terms:
    """What every run of the command has in common."""
    common = {"eval_mode": "full", "log_interval": 10, "always_save_checkpoint": False, "eval_iters": 10}
    common |= {"data_order": "shuffle", "dataset": "stdlib"}
    always = {"dataset": args.dataset} if args.dataset else {}
    config = preset_of(args)
    return Terms(args.iters, common, always, args.config == SMALL, config.data.gradient_accumulation_steps)


def preset_of(args: argparse.Namespace) -> Config:
    return cli.load_config(["--config", args.config])


def command_of(
    run: Run, args: argparse.Namespace, out_dir: Path, init_from: str = "", before: bool = False
) -> list[str]:
    """The trainer's; before: that of the run which this one begins from the end of."""
    flags = {**(run.before if before else run.flags), "seed": run.seed, "data_dir": args.data_dir, "out_dir": out_dir}
    flags |= {"init_from": init_from} if init_from else {}
    return [sys.executable, "-m", "nanogpt_fast.train", "--config", args.config, *as_words(flags)]


def as_words(flags: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in flags.items()]


class Runner:
    """Makes runs, several at a time. shapes: of arms that begin from weights of ours, by (study, arm)."""

    def __init__(self, args: argparse.Namespace, shapes: Mapping[tuple[str, str], GPTConfig]):
        self.args, self.shapes = args, shapes
        self.children: set[subprocess.Popen[str]] = set()
        self.lock, self.stopped = threading.Lock(), False
        self.threads = max(1, machine.available_cores() // args.jobs)
        # ROOT's own code, whatever else of that name is installed
        folders = [machine.ROOT, machine.ROOT / "kernels", *filter(None, [os.environ.get("PYTHONPATH")])]
        self.env = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
        }
        self.folder = tempfile.TemporaryDirectory(prefix="ablate-")
        self.begun: dict[str, threading.Lock] = {}  # by the name of a folder: whoever holds it makes what is in there

    def make(self, run: Run) -> dict[str, Any]:
        """What a run came to; one that diverged or broke is a result too."""
        began, first = time.perf_counter(), {}
        with tempfile.TemporaryDirectory(dir=self.folder.name) as folder:
            out, init_from = Path(folder) / "out", ""
            if run.arm.weights:
                shape = self.shapes[run.study, run.arm.name]
                init_from = str(initial_weights.write(run.arm.weights, shape, run.seed, Path(folder) / "initial"))
            elif run.arm.after and self.args.before:
                init_from = self.args.before
            elif run.before:
                init_from, first = self._end_of_before(run)
                if first.get("status"):
                    return first
            code, said, cpu_s = self._train(command_of(run, self.args, out, init_from))
            found = ablation_report.figures(machine.read_lines(out / "metrics.jsonl"))
        status = "ok" if code == 0 else {6: "diverged"}.get(code, "failed")
        last_words = {"said": said[-TAIL:]} if code else {}
        seconds = {"seconds": time.perf_counter() - began, "cpu_s": cpu_s, "threads": self.threads, **first}
        return {"status": status, "exit_code": code, **seconds, **found, **last_words}

    def _end_of_before(self, run: Run) -> tuple[str, dict[str, Any]]:
        """(Checkpoint of the run that this one begins from, what its making took or came to). All arms of a seed share
        it; the first that comes makes it, the others wait."""
        name = run.key("before", run.before)
        with self.lock:
            lock = self.begun.setdefault(name, threading.Lock())
        with lock:
            folder = Path(self.folder.name) / name
            if folder.exists():
                return str(folder), {}
            made = folder.with_suffix(".part")
            code, said, cpu_s = self._train(command_of(run, self.args, made, before=True))
            if code:
                said = f"the run before it: {said[-TAIL:]}"
                return "", {"status": "failed", "exit_code": code, "said": said, "before_cpu_s": cpu_s}
            made.rename(folder)
            return str(folder), {"before_cpu_s": cpu_s}

    def _train(self, command: list[str]) -> tuple[int, str, float]:
        """(Exit code, what it said, seconds of CPUs that it took: a run that is stopped for a while takes none)."""
        with self.lock:
            if self.stopped:
                return 130, "", 0.0
            child = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace",
                start_new_session=True,  # Ctrl-C is ours to answer
                preexec_fn=_die_with_parent if LIBC else None,
            )  # fmt: skip
            self.children.add(child)
        assert child.stdout is not None
        with child.stdout:
            said = child.stdout.read()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # its number stays its own until `stop` cannot see it
        with self.lock:
            self.children.discard(child)
            _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        return child.returncode, said, used.ru_utime + used.ru_stime

    def stop(self) -> None:
        """End what runs: a cut-off run is made again from its beginning."""
        with self.lock:
            self.stopped = True
            for child in self.children:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # found here: after a fork little may be done


def _die_with_parent() -> None:
    """A runner that is killed takes its runs along: they would hold the GPU beside those of the next command."""
    assert LIBC is not None
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def config_of(flags: dict[str, Any], args: argparse.Namespace) -> Config:
    """A run's whole configuration."""
    return cli.load_config(["--config", args.config, *as_words({**flags, "data_dir": args.data_dir})])


def shape_of(config: Config) -> GPTConfig:
    """The model that it trains."""
    meta = read_meta(Path(config.data.data_dir) / config.data.dataset)
    return config.shape(config.model.vocab_size or (meta.vocab_size if meta else GPT2_PADDED))


def settings_of(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """The run's configuration as its key has it: what differs from train's defaults, so that a flag which train gets
    one day leaves the keys as they are."""
    flat, plain = config_of(run.flags, args).flat(), Config().flat()
    return {key: value for key, value in flat.items() if key not in PLACES and value != plain[key]}


def keyed(runs: list[Run], args: argparse.Namespace) -> list[Keyed]:
    """Runs with their data's hash and their key."""
    digests: dict[str, str] = {}
    settings: dict[str, dict[str, Any]] = {}
    found = []
    for run in runs:
        if run.arm.name not in settings:
            settings[run.arm.name] = settings_of(run, args)
        begins = {"before": args.before} if run.arm.after and args.before else {}
        names = [run.flags["dataset"], *([run.before["dataset"]] if run.before and not begins else [])]
        for name in names:
            digests[name] = digests.get(name) or ablation_texts.digest(name, Path(args.data_dir))
        data = "+".join(digests[name] for name in names)
        found.append((run, data, run.key(data, settings[run.arm.name] | begins)))
    return found


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", help="names, or `all`; none lists them")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--iters", type=int, default=ITERS, help=f"of a run, {POINTS}, {2 * POINTS}, ...; schedules follow"
    )
    parser.add_argument("--before", default="", help="checkpoint to finetune, as --init_from has it, for `finetune`")
    add_place(parser, RESULTS)
    parser.add_argument("--report", action="store_true", help="tables of what is there; runs nothing")
    parser.add_argument("--dry_run", action="store_true", help="print the runs' commands")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.iters < POINTS or args.iters % POINTS:
        expected = f"--seeds >= 1, --iters a multiple of {POINTS}"
        raise ConfigError("a number is out of range", expected=expected, found=" ".join(argv))
    args.studies = ablation_study.names() if args.studies == ["all"] else args.studies
    return settled(args)


def add_place(parser: argparse.ArgumentParser, results: Path) -> None:
    """Flags that say where runs are made, and of what."""
    parser.add_argument("--jobs", type=int, help="runs at a time; default a core each, one on a GPU")
    parser.add_argument("--config", default=SMALL, help="the preset or file that runs change")
    parser.add_argument("--dataset", help="a prepared one; default the library's text")
    parser.add_argument("--data_dir", help="its parent")
    parser.add_argument("--out", type=Path, default=results, help="folder of the results")


def settled(args: argparse.Namespace) -> argparse.Namespace:
    """With add_place's defaults, which depend on one another. Raises ConfigError."""
    if args.jobs is not None and args.jobs < 1:
        raise ConfigError("--jobs is out of range", expected=">= 1", found=str(args.jobs))
    args.data_dir = args.data_dir or ("data" if args.dataset else str(user_cache("ablate")))
    args.on_cpu = preset_of(args).system.device == "cpu"
    args.jobs = args.jobs or (machine.available_cores() if args.on_cpu else 1)
    return args


def main(argv: list[str]) -> int:
    args = parsed(argv)
    listed = [ablation_study.load(name) for name in args.studies or ablation_study.names()]
    if args.report:
        for study in listed:
            print("\n".join(ablation_report.text(study, machine.read_lines(args.out / f"{study.name}.jsonl"))), "\n")
        return 0
    left: list[Keyed] = []
    for study in listed:
        needs_checkpoint = any(arm.after for arm in study.arms)
        if needs_checkpoint and not args.before and (args.config != SMALL or args.dataset):
            if args.studies != [study.name]:
                continue
            hint = "--before gpt2, or a checkpoint's path"
            raise ConfigError(f"{study.name} begins from a checkpoint", where=f"--config {args.config}", hint=hint)
        rows = machine.read_lines(args.out / f"{study.name}.jsonl")
        done = {row["key"] for row in rows if row.get("status") in SETTLED}
        wanted = keyed(ablation_study.runs(study, args.seeds, terms_of(args)), args)
        missing = [one for one in wanted if one[2] not in done]
        print("\n".join(listing(study, len(wanted), len(missing), rows, args)))
        left += missing
    if args.dry_run:
        for run, _, _ in left:
            if run.before and not args.before:
                print(shlex.join(command_of(run, args, Path("BEFORE"), before=True)))
            begins = (args.before or "BEFORE") if run.arm.after else f"({run.arm.weights})" * bool(run.arm.weights)
            print(shlex.join(command_of(run, args, Path("OUT"), begins)))
    elif args.studies:
        all_of_them(left, args, lambda run: {"iters": args.iters})
    return 0


def listing(study: Study, wanted: int, missing: int, rows: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    took = sorted(row["seconds"] for row in rows if row.get("status") == "ok" and row["config"] == args.config)
    time_left = f", about {took[len(took) // 2] * missing / args.jobs / 60:.0f} min left" if took and missing else ""
    return [
        f"{study.name:10} {wanted - missing:3} of {wanted:3} runs are there{time_left}: {study.question}",
        f"{'':10} {'; '.join(arm.name + ' (baseline)' * (arm.name == study.baseline) for arm in study.arms)}",
    ]


def all_of_them(left: list[Keyed], args: argparse.Namespace, more: Callable[[Run], dict[str, Any]]) -> None:
    """The runs, and a line of each as it ends; more: what its row has beside the outcome."""
    # Here, not in the threads: parsing flags takes the whole process's stdout for a while.
    shapes = {(run.study, run.arm.name): shape_of(config_of(run.flags, args)) for run, _, _ in left if run.arm.weights}
    runner, began = Runner(args, shapes), time.perf_counter()
    own = {"bench": "ablation", "config": args.config, "jobs": args.jobs}
    facts = machine.machine_facts("cpu" if args.on_cpu else "") | own
    for path in args.out.glob("*.jsonl"):
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):  # a kill cut its last line off
            with path.open("a") as file:
                file.write("\n")
    pool = ThreadPoolExecutor(args.jobs)
    try:
        pending = {pool.submit(runner.make, run): (run, data, key) for run, data, key in left}
        for done, future in enumerate(as_completed(pending), 1):
            (run, data, key), found = pending[future], future.result()
            told = {"study": run.study, "arm": run.arm.name, "seed": run.seed, "key": key, "flags": run.flags}
            told |= {"weights": run.arm.weights} if run.arm.weights else {}
            told |= {"before": args.before or run.before} if run.arm.after else {}
            lines = machine.Lines(args.out / f"{run.study}.jsonl", **facts, data=data)
            lines.write(**told, **more(run), **found)
            loss = f"{found['val_loss']:.4f}" if found.get("val_loss") is not None else "-"
            eta = (time.perf_counter() - began) / done * (len(left) - done) / 60
            what = f"{run.study}, {run.arm.name}, seed {run.seed}: {found['status']}, val loss {loss}"
            print(f"{done}/{len(left)} {what}, {eta:.0f} min to go", flush=True)
    except BaseException:
        runner.stop()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()
    runner.folder.cleanup()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_command(main, again="finished runs are kept; the same command goes on with the rest")
