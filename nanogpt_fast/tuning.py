"""The tuning of a run's launch rows: which first and for how long, and what is kept.

A child process has the GPU (launch_race): a row that crashes or hangs it costs that row. The search is launch_search's,
run here; candidates are compiled here too, on all cores, in a process that never touches the GPU.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nanogpt_fast.child import DIED, Child
from nanogpt_fast.errors import DeviceError
from nanogpt_fast.launch_plan import Case, as_proven, cases_of, proven
from nanogpt_fast.launch_race import FAILS
from nanogpt_fast.launch_search import GAIN, LAST_ROUNDS, MOST, Arena, Walk, point, ratio, search
from nanogpt_fast.ops import Ops, keeping, kept_rows, launched_by, row_as_json
from nanogpt_fast.proof import REPEATS, Setup

START_S, REQUEST_S = 180.0, 90.0  # that a child has to begin, and for a request
LEAST_S = 8.0  # for an op: less is not worth a beginning
WHOLE_S = 15.0  # kept for the last look
TRIED = 10  # repeats of a row that is tried; one that is kept has proof.REPEATS
STARTS = 20  # of children, at most


class Died(Exception):
    """The child ended, and how; at: what it was at."""

    def __init__(self, how: str, at: int):
        super().__init__(how)
        self.how, self.at = how, at


class Remote:
    """launch_race.serve in a process of its own, begun anew after one that a row has ended."""

    def __init__(self, command: Sequence[str], does: str):
        self.command, self.does, self.starts, self._how = command, does, 0, ""
        self._child: Child | None = None

    def ask(self, what: str, sets: Sequence[dict[Any, Any]], within_s: float = REQUEST_S, **details: Any) -> Any:
        """Its answer about these sets of kept rows. Died where it ended first; DeviceError where it does not begin."""
        if self._child is None:
            self._child = self._started()
        rows = [[row_as_json(*pair) for pair in kept.items()] for kept in sets]
        self._child.send({"ask": what, "sets": rows, **details})
        at = -1
        for event in self._child.events(within_s):
            at = event.get("at", at)
            if "answer" in event:
                return event["answer"]
        self._how = self._child.how
        self.end()
        raise Died(self._how, at)

    def _started(self) -> Child:
        self.starts += 1
        how = f"{STARTS} of them, the last with {self._how}"
        if self.starts <= STARTS:
            child = Child(self.command)
            if any("ready" in event for event in child.events(START_S)):
                return child
            child.end()
            how = child.how
        raise DeviceError(
            f"the process that {self.does} launch rows does not start, or ends too often",
            where="a child of nanogpt_fast.tune",
            expected="it answers",
            found=how,
            hint="`python -m nanogpt_fast.verify` with the same flags says whether the kernels run on this GPU",
        )

    def end(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


@dataclass
class Target:
    """A launch row to better. cost: milliseconds an iteration of the calls that reach it, shared with the other rows
    that they reach; case, backward: the call that is timed; small: the calls that are proven."""

    key: Any
    present: Any
    cost: float
    case: Case
    backward: bool
    small: list[str]
    arena: "RowArena | None" = None
    walk: Walk | None = None
    refused: dict[str, str] = field(default_factory=dict)  # {row as shown: why}
    lost: str = ""  # why it is left alone

    @property
    def name(self) -> str:
        return f"{self.key.op} ({self.case.op}, size {self.key.size:,})"


@dataclass(frozen=True)
class Kept:
    """A row that is better than the one before. ratio: its time over that one's."""

    target: Target
    row: Any
    ratio: float


class Lost(Exception):
    """A target that is left alone from here on, and why."""


class RowArena(Arena):
    """Where the rows of one target are tried."""

    def __init__(self, tuning: "Tuning", target: Target):
        self.tuning, self.target = tuning, target
        self.launch_op, self.present = target.key.op, target.present
        self._launched = [self._launches(self.present)]
        self._centre: dict[str, Any] = {}  # around which a quicker row was said to be

    def fitting(self, rows: list[Any], until: float) -> list[Any]:
        """Those that launch something else than any before; compiled ahead as far as there is time."""
        good, launched = [], list(self._launched)
        for row in rows:
            if row.choices.get("chunk_rows", 0) > self.present.choices.get("chunk_rows", 0):
                continue  # more memory than the run was planned with
            try:
                launches = self._launches(row)
            except Exception:  # an op's contract, a tile that no descriptor can have
                continue
            if launches not in launched:
                launched.append(launches)
                good.append(row)
        calls = [self.target.case.known_by, *self.target.small]
        limit_s = max(1.0, until - time.monotonic())
        with suppress(Died, DeviceError):  # then it is compiled where it is launched
            sets = [*map(self._rows, good)]
            self.tuning.compiler.ask("compile", sets, limit_s + 10.0, calls=calls, limit_s=limit_s)
        return good

    def right(self, row: Any, to_keep: bool = False) -> str:
        """What is wrong with a row; a process that it ended is. to_keep: the same bits as often as verify.py asks."""
        self._launched.append(self._launches(row))
        target, repeats = self.target, REPEATS if to_keep else TRIED
        sets, small, call = [self._rows(self.present), self._rows(row)], target.small, target.case.known_by
        try:
            return self.tuning.racer.ask("wrong", sets, small=small, call=call, repeats=repeats)
        except Died as died:
            return DIED.format(how=died.how)

    def times(self, rows: Sequence[Any], rounds: int) -> list[list[float]]:
        """Infinite for a row that ended the process; Lost where the first one did, or nobody knows which."""
        found, left, again = [[math.inf] * rounds for _ in rows], list(range(len(rows))), True
        details: dict[str, Any] = dict(call=self.target.case.known_by, backward=self.target.backward, rounds=rounds)
        while len(left) > 1:
            try:
                times = self.tuning.racer.ask("times", [self._rows(rows[i]) for i in left], **details)
            except Died as died:
                if died.at > 0:
                    self.tell(rows[left.pop(died.at)], DIED.format(how=died.how))
                elif again:
                    again = False
                else:
                    raise Lost(DIED.format(how=died.how)) from None
                continue
            for i, span in zip(left, times):
                found[i] = span
            if math.inf in found[0]:
                raise Lost("its present row could not be timed")
            return found
        return [[1.0] * rounds, *found[1:]]  # beside it nothing is left

    def tell(self, row: Any, status: str, **figures: Any) -> None:
        if status == "timed":
            if figures["ratio"] <= GAIN and figures["centre"] != self._centre:  # the quickest comes first
                self._centre = figures["centre"]
                self.tuning.say(f"    {changes(row, self.present)}: {figures['ratio']:.3f} of the best so far")
        elif status != "best" and not status.startswith(FAILS):
            self.target.refused[changes(row, self.present)] = status
            self.tuning.say(f"    refused {changes(row, self.present)}: {status}")

    def _rows(self, row: Any) -> dict[Any, Any]:
        """All that are kept while this one is tried."""
        return as_proven({**self.tuning.kept, self.target.key: row}, self.tuning.small_keys)

    def _launches(self, row: Any) -> list[Any]:
        case, tuning = self.target.case, self.tuning
        with keeping(self._rows(row)):
            return launched_by(partial(case.held.results, getattr(tuning.ours, case.op)), tuning.capability)


def changes(row: Any, before: Any) -> str:
    """What a row does otherwise, as BLOCK_M 64 -> 128."""
    old = point(before)
    return ", ".join(f"{name} {old[name]} -> {value}" for name, value in point(row).items() if value != old[name])


class Tuning:
    """The launch rows of a run. kept: those in place of the shipped ones, as found so far."""

    def __init__(
        self,
        setup: Setup,
        ours: Ops,
        capability: int,
        micro_batches: int,
        racer: Remote,
        compiler: Remote,
        say: Callable[[str], None] = print,
    ):
        self.ours, self.capability, self.racer, self.compiler, self.say = ours, capability, racer, compiler, say
        self.kept: dict[Any, Any] = kept_rows()
        self.cases = [case for case in cases_of(setup, ours, capability, micro_batches) if case.keys]
        self.small = cases_of(proven(setup), ours, capability)
        self.small_keys = {key for case in self.small for key in case.keys}
        self.costs: dict[str, list[float]] = {}  # {call: milliseconds forward, and both ways}

    # ---- what to tune ----

    def targets(self) -> list[Target]:
        """Every row that the run reaches, the dearest first, as the calls take now; without what cannot be timed."""
        calls = [case.known_by for case in (*self.cases, *self.small)]
        with suppress(Died):  # then it is compiled where it is launched
            sets = [as_proven(self.kept, self.small_keys)]
            self.compiler.ask("compile", sets, START_S, calls=calls, limit_s=START_S - 10.0)
        for case in self.cases:
            try:
                self.costs[case.known_by] = self.racer.ask("cost", [self.kept], call=case.known_by)
            except Died as died:
                self.say(f"  {case.op} is left alone: {DIED.format(how=died.how)}")
        return targets_of([case for case in self.cases if case.known_by in self.costs], self.costs, self.small)

    # ---- tuning ----

    def run(self, targets: list[Target], until: float, keep: Callable[[Kept], None]) -> None:
        """Give each of them its share of the time by its cost, again and again while time is left and rows are."""
        while left := [target for target in targets if not target.lost and not (target.walk and target.walk.done)]:
            for i, target in enumerate(left):
                now = time.monotonic()
                if now + LEAST_S > until:
                    return
                share = (until - now) * target.cost / max(1e-9, sum(other.cost for other in left[i:]))
                self._tune(target, min(until, now + max(LEAST_S, share)), keep)

    def _tune(self, target: Target, until: float, keep: Callable[[Kept], None]) -> None:
        """One visit: on from where the last one ended. A better row is proven as often as verify.py does, and kept."""
        try:
            if target.arena is None:
                target.arena = RowArena(self, target)
                if problem := target.arena.right(target.present):
                    raise Lost(
                        problem if problem.startswith(FAILS) else f"its present row is not right here: {problem}"
                    )
            before = target.walk.best if target.walk else target.present
            target.walk = walk = search(target.arena, until, MOST, target.walk)
            if walk.best != before and (problem := target.arena.right(walk.best, to_keep=True)):
                target.arena.tell(walk.best, problem)
                walk.best, walk.ratio, walk.done = before, 1.0, True
        except Lost as lost:
            target.lost = str(lost)
            self.say(f"  {target.name} is left alone: {lost}")
            return
        if walk.best == before:
            others = "no row" if before == target.present else "no other"
            self.say(f"  {target.name}: {others} is quicker, of {walk.tried} tried")
            return
        self.kept[target.key] = walk.best
        self.say(f"  {target.name}: {walk.ratio:.3f} of the time by {changes(walk.best, target.present)}: kept")
        keep(Kept(target, walk.best, walk.ratio))

    def whole(self) -> tuple[float, float, dict[str, float]]:
        """Milliseconds an iteration of all calls with the shipped rows and with the kept ones, and {op: kept over
        shipped} of those that the kept rows reach. Died where a call ended the process."""
        shipped, kept, ratios = 0.0, 0.0, {}
        for case in self.cases:
            if case.known_by not in self.costs:
                continue
            if case.keys & self.kept.keys():
                details: dict[str, Any] = dict(call=case.known_by, backward=True, rounds=LAST_ROUNDS)
                before, after = self.racer.ask("times", [{}, self.kept], **details)
                ratios[case.op] = ratio(after, before)
                spans = statistics.median(before), statistics.median(after)
            else:
                spans = (self.costs[case.known_by][1],) * 2
            shipped, kept = shipped + case.calls * spans[0], kept + case.calls * spans[1]
        return shipped, kept, ratios


def targets_of(cases: Sequence[Case], costs: Mapping[str, Sequence[float]], small: Sequence[Case]) -> list[Target]:
    """What each row's calls cost, the dearest first; of a way the rows that it reaches bear equal parts. The call that
    is timed is the one of which the row bears most: forward, if it is reached there."""
    shares: dict[Any, dict[str, float]] = {}
    for case in cases:
        forward, both = costs.get(case.known_by, (1.0, 2.0))
        for rows, ms in ((case.forward, forward), (case.backward, max(0.0, both - forward))):
            keys = [key for key, row in rows.items() if row.blocks]  # without tiles it is a choice between kernels
            for key in keys:
                shares.setdefault(key, {})[case.known_by] = case.calls * ms / len(keys)
    found, small_keys = [], {key for case in small for key in case.keys}
    for key, share in shares.items():
        case = next(case for case in cases if case.known_by == max(share, key=lambda name: share[name]))
        present = (case.forward if key in case.forward else case.backward)[key]
        same = as_proven({key: present}, small_keys).keys()
        proofs = [case.known_by for case in small if case.keys & same]
        found.append(Target(key, present, sum(share.values()), case, key not in case.forward, proofs))
    return sorted(found, key=lambda target: -target.cost)
