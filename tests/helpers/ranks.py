"""Ranks as processes, forked from one that holds torch: 0.2 s for a few of them, not two for each.

with Ranks() as ranks:
    results = ranks.run(2, "train", sharded=True)      # of rank_jobs.train(world, sharded=True), by rank
    started = ranks.start(2, ["train", "--config", ...])    # a command as torchrun starts it
    os.kill(started[1], signal.SIGTERM)
    ended = ranks.wait()                                # by rank: exit code, standard output, standard error
"""

import importlib
import json
import os
import queue
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanogpt_fast.distributed import join

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
LONGEST = 180  # seconds that ranks may take


class Ended(NamedTuple):
    """What became of a rank's command. code: as subprocess has it, -9 for a kill."""

    code: int
    out: str
    err: str


class Ranks:
    """Context manager around the process that forks."""

    def __enter__(self) -> "Ranks":
        self._home = tempfile.TemporaryDirectory()
        self._folder, self._lines = Path(self._home.name), queue.Queue[str]()
        self._left, self._running, self._pids = dict[int, int](), 0, list[int]()
        command = [sys.executable, __file__, self._home.name]
        self._server = subprocess.Popen(command, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.wait()
        self._home.cleanup()

    def _read(self) -> None:
        assert self._server.stdout
        for line in self._server.stdout:
            self._lines.put(line)

    def _ask(self, size: int, **what: Any) -> list[int]:
        assert self._server.stdin
        for pid in self._pids if self._running else []:  # of a test that failed
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._codes()
        print(json.dumps({"size": size, **what}), file=self._server.stdin, flush=True)
        started: dict[str, int] = json.loads(self._lines.get(timeout=LONGEST))
        self._left = {int(rank): 0 for rank in started}
        self._running, self._pids = len(started), list(started.values())
        return self._pids

    def next_end(self) -> tuple[int, int]:
        """(rank, exit code) of the next that ends."""
        rank, code = json.loads(self._lines.get(timeout=LONGEST))
        self._left[rank] = code
        self._running -= 1
        return rank, code

    def _codes(self) -> dict[int, int]:
        while self._running:
            self.next_end()
        return self._left

    def run(self, size: int, job: str, **settings: Any) -> list[Any]:
        """What rank_jobs.<job>(world, **settings) returned on each of `size` ranks; 0: without torchrun's variables."""
        self._ask(size, job=job, settings=settings)
        codes = self._codes()
        assert not any(codes.values()), f"exit codes {codes}; standard error says why"
        return [torch.load(self._folder / str(rank)) for rank in range(max(1, size))]

    def start(self, size: int, words: list[str], only: list[int] | None = None, /, **env: str) -> list[int]:
        """The command of these words on each of `size` ranks, or only some, with these variables too; their process
        ids."""
        return self._ask(size, words=words, only=only, env=env)

    def wait(self) -> list[Ended]:
        """What became of the ranks that were started."""
        codes = self._codes()
        said = {rank: [(self._folder / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in codes}
        return [Ended(code, *said[rank]) for rank, code in codes.items()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(folder: Path) -> None:
    """Fork the ranks of each line of stdin: their process ids on stdout, and of each that ends its rank and code."""
    sys.path.insert(0, str(ROOT / "tests/helpers"))
    importlib.import_module("rank_jobs")
    for name in ("train", "training", "doctor", "examination", "network.check"):
        importlib.import_module(f"nanogpt_fast.{name}")
    said = os.dup(1)
    os.dup2(2, 1)
    for line in iter(sys.stdin.readline, ""):
        asked = json.loads(line)
        for old in folder.iterdir():
            old.unlink()
        if asked.get("settings", {}).get("recompute") == "block":
            importlib.import_module("torch._dynamo")  # which torch.utils.checkpoint would import on every rank
        port, children = str(free_port()), {}
        for rank in asked.get("only") or range(max(1, asked["size"])):
            if not (pid := os.fork()):
                if asked["size"]:
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(asked["size"])}
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **asked.get("env", {})}
                become(folder / str(rank), asked)
            children[rank] = pid
        os.write(said, f"{json.dumps(children)}\n".encode())
        rank_of = {pid: rank for rank, pid in children.items()}
        for _ in children:
            pid, status = os.wait()
            os.write(said, f"{json.dumps([rank_of[pid], os.waitstatus_to_exitcode(status)])}\n".encode())


def become(result: Path, asked: dict[str, Any]) -> None:
    """A rank, until its end, which is this process's."""
    signal.alarm(LONGEST)
    torch.set_num_threads(1)
    code = 1
    try:
        if "words" in asked:
            code = command(result, *asked["words"])
        else:
            world = join("cpu", "nccl", max(1, asked["size"]))
            job = getattr(importlib.import_module("rank_jobs"), asked["job"])
            torch.save(job(world, **asked["settings"]), result)
            world.close()
            world.close()  # which may be said twice
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def command(result: Path, name: str, *flags: str) -> int:
    """The command as `python -m` runs it, signals as a shell leaves them; its exit code."""
    for number, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(result.with_suffix(f".{suffix}"), os.O_WRONLY | os.O_CREAT), number)
    for signal_name in ("SIGTERM", "SIGHUP", "SIGUSR1"):
        signal.signal(getattr(signal, signal_name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[1:] = flags
    importlib.import_module("rank_faults").plant()
    sys.modules.pop(f"nanogpt_fast.{name}", None)
    try:
        runpy.run_module(f"nanogpt_fast.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
