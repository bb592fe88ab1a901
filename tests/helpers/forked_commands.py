"""Commands as processes of their own, to be killed: forked from one process that holds torch, 0.1 s each, not 2 s.

What runs is the module as `python -m` runs it, in a session of its own, signals as a shell leaves them. One at a time.
"""

import gc
import importlib
import json
import os
import queue
import runpy
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

LONGEST = 60.0  # seconds that a command may take: the slowest here needs 4
COMMANDS = (
    "train", "training", "evaluate", "evaluation", "sample", "samples", "prepare", "convert", "conversion",
)  # fmt: skip
# {place: (module, attribute)}: a call of it begins the place.
PLACES = {
    "startup": ("nanogpt_fast.command", "_guarded"),  # the imports are done, nothing else
    "a step": ("nanogpt_fast.step", "TrainStep.__call__"),
    "an evaluation": ("nanogpt_fast.trainer", "estimate_loss"),
    "a save": ("nanogpt_fast.run.checkpoint", "save"),
    "the final sample": ("nanogpt_fast.generate", "sample_text"),
}


class Ended(NamedTuple):
    """What became of a command. code: as subprocess has it, -9 for a kill; seconds: from its start, or the signal."""

    code: int
    out: str
    err: str
    seconds: float


class Forker:
    """Context manager; start() a command in cwd, end() it by a signal or wait for it."""

    def __init__(self, env: dict[str, str]):
        self.cwd, self._lines = Path(), queue.Queue[str]()
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._read, daemon=True).start()
        assert self._next() == "ready"
        self.pid = 0

    def __enter__(self) -> "Forker":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.wait()

    def _read(self) -> None:
        assert self._server.stdout
        for line in self._server.stdout:
            self._lines.put(line.strip())

    def _next(self) -> str:
        return self._lines.get(timeout=LONGEST)

    def start(self, words: list[str], place: str = "", turn: int = 1, quick: bool = False, **patches: Any) -> None:
        """words: the command's name and its flags. place: wait until it is reached for the turn-th time. quick: without
        Python's taking itself down, which is half of its time. patches: values of module-level names."""
        assert self._server.stdin
        asked = dict(words=words, cwd=str(self.cwd), place=place, turn=turn, quick=quick, patches=patches)
        print(json.dumps(asked), file=self._server.stdin, flush=True)
        self.pid, self._began = int(self._next()), time.perf_counter()
        if place:
            assert (line := self._next()) == "at", f"{place} was not reached: {line}"

    def run(self, words: list[str], quick: bool = False, **patches: Any) -> Ended:
        self.start(words, quick=quick, **patches)
        return self.wait()

    def end(self, number: int, after: float, group: bool) -> Ended:
        """Signal it after so many seconds: its whole group, as a terminal does, or itself alone."""
        time.sleep(after)
        self._began = time.perf_counter()
        with suppress(ProcessLookupError):  # it was done first
            (os.killpg if group else os.kill)(self.pid, number)
        return self.wait()

    def wait(self) -> Ended:
        code = int(self._next())
        seconds = time.perf_counter() - self._began
        out, err = ((self.cwd / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        return Ended(code, out, err, seconds)

    def left_alive(self) -> bool:
        """Whether anything of the command's session lives 5 s after its end: a worker that lost its parent."""
        for _ in range(100):
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return False
            time.sleep(0.05)
        return True


def serve() -> None:
    """Fork a child for each line of stdin; its pid, `at` and exit code on stdout, a line each."""
    said = os.dup(1)
    for name in COMMANDS:
        importlib.import_module(f"nanogpt_fast.{name}")
    os.write(said, b"ready\n")
    gc.collect()
    gc.freeze()  # else a child that ends copies all of torch to look for garbage: 1.4 s instead of 0.5
    for line in iter(sys.stdin.readline, ""):
        if not (pid := os.fork()):
            become(json.loads(line), said)
            return
        os.write(said, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())


def become(asked: dict[str, Any], said: int) -> None:
    """The child: the command until its end, which is this process's."""
    os.setsid()
    os.write(said, f"{os.getpid()}\n".encode())
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(asked["cwd"])
    for number, name in enumerate((os.devnull, "stdout", "stderr")):
        fd = os.open(name, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if number else 0))
        os.dup2(fd, number)
        os.close(fd)
    if asked["place"]:
        announce(*PLACES[asked["place"]], asked["turn"], said)
    for where, value in asked["patches"].items():
        module, _, attribute = where.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    command, *sys.argv[1:] = asked["words"]
    del sys.modules[f"nanogpt_fast.{command}"]
    try:
        runpy.run_module(f"nanogpt_fast.{command}", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if asked["quick"]:
            os._exit(int(stop.code or 0))
        raise


def announce(module: str, attribute: str, turn: int, said: int) -> None:
    """Say `at` when the function is called for the turn-th time."""
    owner: Any = importlib.import_module(module)
    *path, name = attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == turn:
            os.write(said, b"at\n")
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    serve()
