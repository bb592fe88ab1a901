"""Names the rank that falls silent while ranks measure, and ends the others.

Threads look on: a call into NCCL that waits for ever can be interrupted by nothing else. When a rank gets no further
for `timeout` seconds, or fails, every rank that lives says through the store where it is; rank 0 says who did not.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from nanogpt_fast.errors import DeviceError
from nanogpt_fast.network.identity import ranks_named, without_addresses
from nanogpt_fast.network.roll_call import GRACE, RollCall

LOOK = 0.25  # seconds


class Watch:
    """`with Watch(call) as watch: watch.at("here")`. What goes wrong inside ends the process, with exit code 5."""

    def __init__(self, call: RollCall):
        self.call, self.place = call, "the start"
        self.since = self._answered = time.monotonic()
        self._asked, self._over, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._ask, self._look)]

    def __enter__(self) -> "Watch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError):  # a collective that lost its peer; ours speak for themselves
            self._report(without_addresses(error))
        self._over.set()
        for thread in self._threads:
            thread.join(GRACE)

    def at(self, place: str) -> None:
        """This rank gets on; it is now here."""
        self.place, self.since = place, time.monotonic()

    def _ask(self) -> None:
        """Is somebody in trouble? A thread of its own: a store whose host was stopped, not ended, never answers."""
        while not self._over.wait(LOOK):
            try:
                if self.call.beside.check(["trouble"]):
                    return self._asked.set()
            except RuntimeError as error:  # rank 0's node is gone, or this rank has ended
                if not self._over.wait(GRACE):
                    _end(self.call.unreachable(error))
            self._answered = time.monotonic()

    def _look(self) -> None:
        while not self._over.wait(LOOK):
            now, asked = time.monotonic(), self._asked.is_set()
            if asked or now - self.since > self.call.timeout:
                self._report("" if asked else f"no progress within {self.call.timeout:g} s")
            if now - self._answered > self.call.timeout + GRACE:
                _end(self.call.unreachable(TimeoutError("no answer")))

    def _report(self, found: str) -> NoReturn:
        """Say where this rank is; rank 0 hears all, and says who did not answer, or where all wait."""
        call, store = self.call, self.call.beside
        late = threading.Timer(5 * GRACE, _end, [call.unreachable(TimeoutError("no answer"))])
        late.daemon = True
        late.start()
        with self._lock:  # the thread and the one that measures may both come here; the first one ends the process
            try:
                store.set(f"place/{call.rank}", json.dumps([self.place, found]))
                store.set("trouble", "")
                if not call.is_main:
                    self._hear_rank_0()
                silent = call.missing("place", GRACE, store)
                told = [rank for rank in range(call.size) if rank not in silent]
                places = {rank: json.loads(store.get(f"place/{rank}")) for rank in told}
            except RuntimeError as error:
                _end(call.unreachable(error))
            said = trouble(silent, places, call.node_of)
            with suppress(RuntimeError):
                store.set("said", "")
            call.leave(without=silent)
            _end(said)

    def _hear_rank_0(self) -> NoReturn:
        """It speaks for all, unless torchrun's agent holds the store and rank 0 itself is what is gone."""
        call = self.call
        if not _within(3 * GRACE, lambda: call.beside.check(["said"])):
            _end(trouble([0], {call.rank: (self.place, "")}, call.node_of))
        call.leave()
        _end(None)


def _within(seconds: float, there: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def trouble(silent: list[int], places: dict[int, tuple[str, str]], node_of: list[int]) -> DeviceError:
    """The error of ranks that do not answer, or of all that do and still wait. places: {rank: (where, why)}."""
    at: dict[str, list[int]] = {}
    for rank, (place, _) in places.items():
        at.setdefault(place, []).append(rank)
    where = "; ".join(f"{ranks_named(ranks)}: {place}" for place, ranks in list(at.items())[:8])
    found = next((why for _, why in places.values() if why), "")
    if not silent:
        what = "all ranks live, but some do not reach each other"
        return DeviceError(
            what, where=where, found=found, hint="that link, or the interface that was chosen (docs/cluster.md)"
        )
    verb = "does" if len(silent) == 1 else "do"
    what = f"{ranks_named(silent, node_of)} of {len(node_of)} {verb} not answer"
    return DeviceError(what, where=where, found=found, hint="the log there says why it ended, if it has")


def _end(error: DeviceError | None) -> NoReturn:
    """From any thread, whatever NCCL does: Python's own way out would wait for it."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        if error:
            print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(DeviceError.exit_code)
