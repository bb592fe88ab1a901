"""Which of the ranks is there: each says once a second that it lives and where it is; whoever waits in vain asks.

It goes through the store where the ranks met, from a thread, so a rank that hangs goes on to say where, and one that
was killed or stopped falls silent. No clock of one machine is held against another's: only whether a count has grown.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, TypeVar

import torch.distributed as dist

from nanogpt_fast.errors import DeviceError, printable

T = TypeVar("T")
BEAT = 1.0  # seconds
SILENCE = "is silent"
SILENT = 3.0  # seconds without a beat: dead, stopped or out of reach
LATE = 10.0  # seconds after its time-out at which a collective that has not raised is given up from here
HOME = os.path.dirname(__file__) + os.sep
# Frames of ours in which a rank waits for the others: files whose functions do, or functions.
WAITS = {"distributed.py", "exchange.py", "step.py:get"}


class Pulse:
    """This rank's, and its ear for the others'. limit: seconds after which one that has not come has been waited for
    long enough. Use it from one thread."""

    def __init__(self, store: Any, rank: int, size: int, limit: float):
        self.rank, self.size, self.limit = rank, size, limit
        self._mine, self._asked = (dist.PrefixStore("pulse", store.clone()) for _ in range(2))
        self._gone = False  # the store
        self.at = "its start"  # where the run is, in words
        self._main, self._count, self._waiting = threading.main_thread().ident or 0, 0, 0.0
        self._ended = threading.Event()
        self._say()  # before any collective
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def close(self, why: str = "") -> None:
        """No more beats. why: what ended this rank, for the others to read, who then have some seconds for it."""
        if self._ended.is_set():
            return
        self._ended.set()
        if not self._gone:
            self._ask(lambda: self._leave(why), SILENT + 2 * BEAT)

    def absent(self) -> str:
        """Who does not take part, and where they are, in words; what is known of all where everybody answers."""
        found = self._ask(self._listen, SILENT + 2 * BEAT)
        self._gone = found is None
        return found or "the ranks' store, which rank 0 or torchrun keeps, does not answer"

    def _ask(self, work: Callable[[], T], seconds: float) -> T | None:
        """What work makes of the store; None where that fails, or takes longer: a cable that was pulled is no error."""
        made: list[T] = []

        def run() -> None:
            with suppress(Exception):  # of torch's, a plain RuntimeError in some versions
                made.append(work())

        thread = threading.Thread(target=run, name="pulse asks", daemon=True)
        thread.start()
        thread.join(seconds)
        return made[0] if made else None

    def _leave(self, why: str) -> None:
        self._asked.set(f"end/{self.rank}", why or "its work was done")
        if why and self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            until = time.monotonic() + SILENT + BEAT  # the store ends with this process
            while time.monotonic() < until and not all(map(self._end, range(self.size))):
                time.sleep(0.1)

    def _listen(self) -> str:
        before = {rank: self._read(rank) for rank in range(self.size)}
        until = time.monotonic() + SILENT
        while time.monotonic() < until:
            ends = {rank: end for rank in range(self.size) if (end := self._end(rank)) and rank != self.rank}
            if ends:
                return "; ".join(f"rank {rank} ended: {end}" for rank, end in ends.items())
            time.sleep(0.1)
        after = {rank: self._read(rank) for rank in range(self.size)}
        found = {rank: _in_words(rank, before[rank], after[rank]) for rank in range(self.size) if rank != self.rank}
        missing = [words for words, waits in found.values() if not waits]
        return "; ".join(missing or [words for words, _ in found.values()])

    def _read(self, rank: int) -> dict[str, Any]:
        key = str(rank)
        return json.loads(self._asked.get(key)) if self._asked.check([key]) else {}

    def _end(self, rank: int) -> str:
        key = f"end/{rank}"
        return self._asked.get(key).decode() if self._asked.check([key]) else ""

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                waits = self._say()
            except Exception:  # the store is gone, and with it the run
                return
            self._waiting = self._waiting + BEAT if waits else 0.0
            if self._waiting > self.limit + LATE:
                self._give_up()

    def _say(self) -> bool:
        """A beat; whether the main thread waits for others."""
        self._count += 1
        place, waits = place_of(sys._current_frames().get(self._main))
        said = {"count": self._count, "place": f"{place}, {self.at}", "waits": waits}
        said |= {"pid": os.getpid(), "host": socket.gethostname()}
        self._mine.set(str(self.rank), json.dumps(said))
        return waits

    def _give_up(self) -> None:
        """The main thread waits for a device that waits for a rank: it cannot be told. NCCL's watchdog would end the
        process without a name."""
        place, _ = place_of(sys._current_frames().get(self._main))
        error = lost(self.rank, self.size, f"for {self.limit:.0f} s in {place}, {self.at}", self.absent())
        with suppress(OSError):
            os.write(2, f"error: {error}\n".encode())
        os._exit(error.exit_code)


class RankLost(DeviceError):
    """Another rank does not take part; silent: nothing of it will come any more."""

    @property
    def silent(self) -> bool:
        return SILENCE in self.found


def lost(rank: int, size: int, where: str, found: str) -> RankLost:
    return RankLost(
        "another rank does not answer",
        where=f"rank {rank} of {size}, {where}",
        expected=f"all {size} ranks",
        found=found,
        hint="start again with --init_from=resume (torchrun --max-restarts=N does so by itself)",
    )


def place_of(frame: FrameType | None) -> tuple[str, bool]:
    """(file:line of the innermost frame of ours that does not wait for others, whether one further in does)."""
    waits = False
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(HOME) and name != __file__:
            file = name.removeprefix(HOME)
            if file not in WAITS and f"{file}:{frame.f_code.co_name}" not in WAITS:
                return f"{file}:{frame.f_lineno}", waits
            waits = True
        frame = frame.f_back
    return "no code of ours", waits


def _in_words(rank: int, before: dict[str, Any], after: dict[str, Any]) -> tuple[str, bool]:
    """What became of a rank between two looks, and whether it waits as we do."""
    if not after:
        return f"rank {rank} has never been heard of", False
    who = printable(f"rank {rank} (process {after['pid']} on {after['host']})")
    if before.get("count") == after["count"]:
        return f"{who} {SILENCE}: killed, stopped or out of reach, last in {after['place']}", False
    return f"{who} is in {after['place']}", bool(after["waits"])
