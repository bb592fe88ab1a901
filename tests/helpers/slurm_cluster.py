"""Slurm itself on the nodes of namespaces.Nodes: one slurmctld, a slurmd a node, GPUs made up of null devices."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from namespaces import Nodes

TOOLS = ("slurmctld", "slurmd", "munged", "sbatch")  # Debian: apt-get install slurmctld slurmd munge slurm-client
CONF = """\
ClusterName=local
SlurmctldHost=node-0
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node-[0-{last}] CPUs=96 RealMemory=1000 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# `ip netns exec` mounts /sys anew, without the cgroups that slurmd looks for and, tracking by /proc, does not use.
SLURMD = "mount -t tmpfs cgroup /sys/fs/cgroup && exec slurmd -D -N node-{}"


def missing() -> str:
    """Why there is no Slurm here; nothing where there is."""
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"no {' and no '.join(lacking)} here" if lacking else ""


class Slurm:
    """On all of `nodes`, its files in `folder`; they end with the nodes."""

    def __init__(self, nodes: Nodes, folder: Path):
        self.nodes, self.env = nodes, {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", *(f"spool-node-{node}" for node in range(nodes.count))):
            (folder / name).mkdir(parents=True)
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, last=nodes.count - 1))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        for gpu in range(8):
            os.mknod(folder / f"gpu{gpu}", 0o20666, os.makedev(1, 3))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        own = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munged.seed"}
        words = [f"--{flag}={folder / name}" for flag, name in own.items()]
        nodes.start(0, ["munged", "--foreground", "--force", f"--key-file={key}", *words])
        for _ in range(100):
            if (folder / "munge.socket").exists():
                break
            time.sleep(0.1)
        nodes.start(0, ["slurmctld", "-D", "-i"], env=self.env)
        for node in range(nodes.count):
            nodes.start(node, ["sh", "-c", SLURMD.format(node)], env=self.env)
        until(lambda: self.run("sinfo --noheader --format=%T").split() == ["idle"], 60)

    def run(self, command: str, **env: str) -> str:
        """Its output, on node 0, where slurmctld is."""
        process = self.nodes.start(0, ["sh", "-c", command], env=self.env | env, stderr=subprocess.STDOUT)
        try:
            return process.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.communicate()[0]

    def state(self, job: str) -> str:
        return self.run(f"squeue --noheader --job={job} --format='%T %r'").strip()


def until(there: Callable[[], object], seconds: float) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.5)
