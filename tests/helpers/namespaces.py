"""Several "nodes" on one machine: network namespaces on a bridge of their own, each with its host name and one card.

    with Nodes(2) as nodes:
        runs = [nodes.start(node, ["torchrun", ...]) for node in range(2)]
        nodes.slow(1, "50mbit")     # what node 1 sends; nodes.cut(1) pulls its cable, nodes.mend(1) makes all good
        runs[0].communicate(timeout=60)

Nothing outside the namespaces is touched, and none of them reaches the machine's own network: addresses, names and the
bridge exist inside alone. Leaving the block ends every process in them and removes them. Linux, root and iproute2.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

# In namespaces of mounts and of names too, so that node-0 is found by name, as on a cluster.
ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


def missing() -> str:
    """Why there can be no namespaces here; nothing where they can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if lacking := [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]:
        return f"no {' and no '.join(lacking)} here"
    try:
        with Nodes(2) as nodes:
            nodes.slow(0, "100mbit")
            nodes.start(0, ["true"]).wait(10)
    except (OSError, subprocess.SubprocessError) as error:
        return f"no network namespaces here: {getattr(error, 'stderr', '') or error}"
    return ""


class Nodes:
    """`count` nodes, named node-0, node-1, ..., at 10.77.0.1, 10.77.0.2, ..."""

    def __init__(self, count: int):
        self.count = count
        name = f"ng{uuid.uuid4().hex[:8]}"
        self._switch, self._names = f"{name}-switch", [f"{name}-{node}" for node in range(count)]
        self._folder: Path | None = None
        self._started: list[subprocess.Popen[str]] = []

    def address(self, node: int) -> str:
        return f"10.77.0.{node + 1}"

    def __enter__(self) -> "Nodes":
        try:
            self._make()
        except BaseException:
            self._clear()
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        self._clear()

    def _make(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="nodes-"))
        names = "".join(f"{self.address(node)} node-{node}\n" for node in range(self.count))
        (self._folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for node, name in enumerate(self._names):
            port = f"port{node}"
            _ip("netns", "add", name)
            _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self._switch)
            _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{self.address(node)}/24", "dev", "eth0")
            for card in ("lo", "eth0"):
                _ip("-n", name, "link", "set", card, "up")

    def _clear(self) -> None:
        for process in self._started:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for name in (*self._names, self._switch):
            _end_all(name)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)  # some may not have been made
        for process in self._started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            for stream in (process.stdout, process.stderr):
                if stream:
                    stream.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, node: int, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """command on that node, its output in pipes; options are Popen's."""
        assert self._folder
        enter = ["ip", "netns", "exec", self._names[node], "unshare", "--mount", "--uts", "sh", "-c", ENTER, "sh"]
        line = [*enter, f"node-{node}", str(self._folder / "hosts"), *command]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        process: subprocess.Popen[str] = subprocess.Popen(line, **{**streams, **options})
        self._started.append(process)
        return process

    def end(self, node: int) -> None:
        """All that runs there is killed, as when its power fails."""
        _end_all(self._names[node])

    def sent(self, node: int) -> int:
        """Bytes that have left its card."""
        return int(self._in(node, "cat", "/sys/class/net/eth0/statistics/tx_bytes"))

    # ---- what happens to a node's cable ----

    def slow(self, node: int, rate: str) -> None:
        """What it sends, limited to rate ("50mbit"); what it receives is not."""
        shape = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
        self._in(node, "tc", "qdisc", "replace", "dev", "eth0", *shape)

    def cut(self, node: int) -> None:
        """Its packets go nowhere, and nobody is told; also not that the card is down, as where a switch dies."""
        _ip("-n", self._switch, "link", "set", f"port{node}", "nomaster")

    def mend(self, node: int) -> None:
        """The cable as it was made."""
        _ip("-n", self._switch, "link", "set", f"port{node}", "master", "bridge")
        subprocess.run(
            ["ip", "netns", "exec", self._names[node], "tc", "qdisc", "delete", "dev", "eth0", "root"],
            capture_output=True,  # it may never have been slow
        )

    def _in(self, node: int, *command: str) -> str:
        words = ["ip", "netns", "exec", self._names[node], *command]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _end_all(name: str) -> None:
    """The processes in a namespace of ours, those included that left their group."""
    for _ in range(50):
        told = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
        if not told:
            return
        for pid in told:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)
