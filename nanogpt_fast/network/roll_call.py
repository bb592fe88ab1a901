"""Who is there: all ranks sign in at torchrun's store before any of them waits for another in a collective.

A collective that lacks a rank waits for minutes and names none; the first one under NCCL may wait for ever. The store
is TCP to rank 0's node and needs neither. So what is known of every rank goes there first, and versions that would
not understand each other are found before they meet.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from nanogpt_fast.errors import ConfigError, DeviceError
from nanogpt_fast.network.identity import ranks_named, without_addresses

GRACE = 3.0  # seconds in which a rank that lives answers through the store
PINGS = 5  # a clock's offset is that of the quickest of them
START = "torchrun --standalone --nproc_per_node=2 -m nanogpt_fast.doctor --ranks"


class SaidByRank0(DeviceError):
    """What ends this rank is on rank 0's console; here it needs no words."""


@dataclass
class RollCall:
    """This rank, its way to the store, and who the others are."""

    rank: int
    local_rank: int
    size: int
    timeout: float
    facts: list[dict[str, Any]] = field(default_factory=list)  # of every rank, in order
    node_of: list[int] = field(default_factory=list)  # nodes are numbered by their first rank

    def __post_init__(self) -> None:
        """Connect. Raises ConfigError where nothing says where, DeviceError where nobody answers."""
        host, port = _of_environment("MASTER_ADDR"), int(_of_environment("MASTER_PORT", number=True))
        hosts = self.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun's agent has one
        with self.store_errors():
            wait = timedelta(seconds=self.timeout)
            self._tcp = dist.TCPStore(host, port, None, hosts, wait, wait_for_workers=False, multi_tenant=True)
            beside = self._tcp.clone()  # type: ignore[attr-defined]  # torch 2.11's stubs lack it
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the agent's store outlives a restart
            name = f"nanogpt_fast/{restart}"  # a client each for the thread that measures and for the one that looks on
            self.store, self.beside = dist.PrefixStore(name, self._tcp), dist.PrefixStore(name, beside)

    @classmethod
    def of_environment(cls, timeout: float) -> "RollCall":
        """What torchrun says. Raises ConfigError where nothing does."""
        rank, local_rank, size = (
            int(_of_environment(key, number=True)) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        )
        return cls(rank, local_rank, size, timeout)

    @property
    def is_main(self) -> bool:
        """The rank that judges and speaks."""
        return self.rank == 0

    # ---- signing in ----

    def sign_in(self, own: dict[str, Any]) -> None:
        """Leave what is known of this rank, wait for the others'. Raises DeviceError naming those that do not come."""
        with self.store_errors():
            self.store.set(f"facts/{self.rank}", json.dumps(own))
            if self.is_main:
                missing = self.missing("facts", self.timeout, self.store)
                self.store.set("missing", json.dumps(missing))
            else:
                self.store.wait(["missing"], timedelta(seconds=self.timeout + GRACE))
                missing = json.loads(self.store.get("missing"))
            if missing:
                self.leave(without=missing)
                raise (DeviceError if self.is_main else SaidByRank0)(
                    f"{ranks_named(missing)} of {self.size} did not come",
                    expected=f"all {self.size} ranks within {self.timeout:g} s",
                    found=f"{ranks_named(set(range(self.size)) - set(missing))} alone",
                    hint="the log of that rank's node: was it started, does it reach rank 0's node?",
                )
            self.facts = [json.loads(self.store.get(f"facts/{rank}")) for rank in range(self.size)]
        hosts = [facts.pop("host") for facts in self.facts]
        self.node_of = [list(dict.fromkeys(hosts)).index(host) for host in hosts]
        self._tcp.set_timeout(timedelta(seconds=3 * self.timeout + 3 * GRACE))  # from here on the watch is quicker

    def nodes(self) -> list[list[int]]:
        """The ranks of each node."""
        return [[r for r, at in enumerate(self.node_of) if at == node] for node in range(max(self.node_of) + 1)]

    def missing(self, key: str, seconds: float, store: dist.Store, without: Sequence[int] = ()) -> list[int]:
        """The ranks whose key is still not there after so long."""
        left, deadline = [rank for rank in range(self.size) if rank not in without], time.monotonic() + seconds
        while left := [rank for rank in left if not store.check([f"{key}/{rank}"])]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return left

    def unreachable(self, error: BaseException) -> DeviceError:
        return DeviceError(
            f"rank {self.rank} of {self.size} does not reach rank 0's store",
            where="MASTER_ADDR and MASTER_PORT",
            expected=f"an answer within {self.timeout:g} s",
            found=without_addresses(error),
            hint="did rank 0 end, does its name resolve here, is the port open between the nodes? docs/cluster.md",
        )

    @contextmanager
    def store_errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # DistNetworkError and DistStoreError are RuntimeErrors
            raise self.unreachable(error) from error

    # ---- passing things around ----

    def gather(self, key: str, value: Any) -> list[Any]:
        """Everybody's value on rank 0, an empty list on the others."""
        with self.store_errors():
            self.store.set(f"{key}/{self.rank}", json.dumps(value))
            return [json.loads(self.store.get(f"{key}/{r}")) for r in range(self.size)] if self.is_main else []

    def publish(self, key: str, value: Any = None) -> Any:
        """Rank 0's value on every rank."""
        with self.store_errors():
            if self.is_main:
                self.store.set(key, json.dumps(value))
            return json.loads(self.store.get(key))

    def clocks(self) -> dict[int, tuple[float, float]]:
        """{node: (seconds that its clock is ahead of node 0's, the most that this is wrong by)} on rank 0: questions
        and answers through the store, as NTP has them, with the first rank of every other node in turn."""
        found: dict[int, tuple[float, float]] = {}
        with self.store_errors():
            for node, asked in ((node, ranks[0]) for node, ranks in enumerate(self.nodes()) if node):
                for name in (f"clock/{node}/{ping}" for ping in range(PINGS)):
                    if self.is_main:
                        sent = time.time()
                        self.store.set(f"{name}/asked", "")
                        there = float(self.store.get(f"{name}/told"))
                        came = time.time()
                        offset = there - (sent + came) / 2, (came - sent) / 2
                        found[node] = min(found.get(node, offset), offset, key=lambda pair: pair[1])
                    elif self.rank == asked:
                        self.store.get(f"{name}/asked")
                        self.store.set(f"{name}/told", repr(time.time()))
        return found

    def leave(self, without: Sequence[int] = ()) -> None:
        """The last word. Rank 0 may host the store, so it waits a moment for the others'."""
        with suppress(RuntimeError):
            self.beside.set(f"gone/{self.rank}", "")
            if self.is_main:
                self.missing("gone", GRACE, self.beside, without)


def _of_environment(key: str, number: bool = False) -> str:
    text = os.environ.get(key, "")
    if not text or (number and not text.isdecimal()):
        raise ConfigError(
            "one process alone has no links to check" if not text else f"{key} is no number",
            where="the environment",
            expected=f"{key}, as torchrun sets it",
            found=f"{key}={text!r}" if text else f"no {key}",
            hint=f"{START} (several nodes: docs/cluster.md)",
        )
    return text
