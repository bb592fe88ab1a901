"""Launch rows tried on a device: is a row right, and how long does the run's own call of its op take with it.

What tune.py's child does, a request a line. Right is what verify.py calls right, of as many tokens as it proves
(launch_plan.proven); and besides, of the run's own tokens, what the present row gives, twice with the same bits.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanogpt_fast.agreement import TOLERANCE, relative_error
from nanogpt_fast.launch_plan import META, Notes, proven
from nanogpt_fast.launch_search import ROUNDS
from nanogpt_fast.ops import Ops, compile_ahead, keeping, row_from_json
from nanogpt_fast.proof import Ballast, Held, Setup, bits, copied, incoming, poison
from nanogpt_fast.timing import Arm, input_sets, interleaved, make_arm

FAILS = "does not run: "  # how the answer begins about a row that no kernel can have, or that this GPU cannot launch
Rows = Mapping[Any, Any]  # {launch.Key: row}: those that are kept meanwhile
Work = Callable[[], Any]
# (rows of each contestant, its calls in turn, rounds, told of each as it begins) -> milliseconds a call of each
Clock = Callable[[Sequence[Rows], Sequence[Sequence[Work]], int, Callable[[int], None]], list[list[float]]]


class Race:
    """The calls of a run, on a device. clock: `replays`, unless another is given."""

    def __init__(self, setup: Setup, device: torch.device, ours: Ops, clock: Clock | None = None):
        self.setup, self.device, self.ours = setup, device, ours
        self.clock = clock or partial(replays, device)
        self.ballast = Ballast(device)
        self.block, self.update, self.small = Notes(ours), Notes(ours), Notes(ours)
        self.block.block(setup, device, setup.rows)
        self.small.block(proven(setup), device, proven(setup).rows)
        self.small.update(proven(setup), device)
        self._expected: tuple[str, dict[str, Tensor]] = "", {}  # the present rows' results of a call

    def call(self, known_by: str) -> Held:
        """Of the block or of the update, whose buffers are as large as the model's: they are there only for as long."""
        if known_by in self.block.calls:
            self.update.calls.clear()
            return self.block.calls[known_by]
        if known_by not in self.update.calls:
            self.update.update(self.setup, self.device)
        return self.update.calls[known_by]

    # ---- is it right ----

    def wrong(self, rows: Rows, present: Rows, small: Sequence[str], known_by: str, repeats: int) -> str:
        """What is wrong with the proven calls `small`, each repeated so often, or with the run's own; "" for none."""
        with keeping(rows):
            for name, held in self.small.calls.items():
                if name not in small:
                    held.__dict__.pop("references", None)  # those of another row's op make room
            for held in (self.small.calls[name] for name in small):
                mine = getattr(self.ours, held.name)
                if found := held.disagreement(mine) or held.repeats(mine, repeats, self.ballast):
                    return f"{held.name}: {found}"
        return self._unlike(rows, present, known_by)

    def _unlike(self, rows: Rows, present: Rows, known_by: str) -> str:
        """Where the run's own call does not give what it gives with the present rows."""
        held = self.call(known_by)
        mine = getattr(self.ours, held.name)
        if self._expected[0] != known_by:
            self._expected = "", {}
            with keeping(present):
                self._expected = known_by, held.results(mine)
        poison(self.device)
        with keeping(rows):
            found, again = held.results(mine), held.results(mine)
        for what, expected in self._expected[1].items():
            if (bits(found[what]) != bits(again[what])).any():
                return f"{held.name}: other bits the second time, of the run's {self.setup.rows:,} tokens: {what}"
            if torch.equal(found[what], expected):
                continue
            error = relative_error(found[what], expected) if expected.any() else math.inf
            if not error <= TOLERANCE[getattr(torch, self.setup.dtype)]:
                return f"{held.name}: relative error {error:.3g} of the run's {self.setup.rows:,} tokens: {what}"
        return ""

    # ---- how long does it take ----

    def times(
        self, known_by: str, backward: bool, sets: Sequence[Rows], rounds: int, began: Callable[[int], None]
    ) -> list[list[float]]:
        """Milliseconds of the run's call, forward or both ways, with each set of rows."""
        works = self._works(known_by, backward)
        found = self.clock(sets, [[partial(_within, rows, work) for work in works] for rows in sets], rounds, began)
        self._forget(known_by)
        return found

    def cost(self, known_by: str, rows: Rows) -> list[float]:
        """Milliseconds of the run's call with these rows: forward, and both ways; of some runs the same."""
        ways = [self._works(known_by, backward) for backward in (False, True)]
        calls = [[partial(_within, rows, work) for work in works] for works in ways]
        found = [sorted(times)[len(times) // 2] for times in self.clock([rows] * 2, calls, ROUNDS, lambda i: None)]
        self._forget(known_by)
        return found

    def _forget(self, known_by: str) -> None:
        """An update that was timed was made on its own buffers: it is drawn anew."""
        if known_by not in self.block.calls:
            self.update.calls.clear()
            self._expected = "", {}

    def _works(self, known_by: str, backward: bool) -> list[Work]:
        """The call on several sets of its inputs, by turns: so they come from memory, as they do in a step."""
        held = self.call(known_by)
        given = [x for x in (*held.args, *held.kwargs.values()) if isinstance(x, Tensor)]
        size = sum(x.numel() * x.element_size() for x in given)
        on_gpu = self.device.type == "cuda"
        sets = input_sets(size, torch.cuda.get_device_properties(self.device).L2_cache_size) if on_gpu else 1
        works: list[Work] = []
        for _ in range(sets):
            copy = partial(copied, differentiate=held.differentiate)
            if sets == 1 and not held.differentiate:
                copy = lambda x: x  # the update's buffers are as large as the model
            args, kwargs = [copy(x) for x in held.args], {name: copy(x) for name, x in held.kwargs.items()}
            works.append(partial(_run, getattr(self.ours, held.name), args, kwargs, held.differentiate, backward))
        return works


def _within(rows: Rows, work: Work) -> None:
    with keeping(rows):
        work()


def _run(op: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], differentiate: bool, backward: bool) -> None:
    with torch.set_grad_enabled(differentiate):
        returned = op(*args, **kwargs)
    outs = [x for x in (returned if isinstance(returned, tuple) else (returned,)) if isinstance(x, Tensor)]
    wanted = [x for x in outs if x.requires_grad]
    if backward and wanted:
        leaves = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
        into = [incoming(x.shape, x.dtype, x.device) for x in wanted]
        torch.autograd.grad(wanted, leaves, into, allow_unused=True)  # unused: what goes into main_grad


def replays(
    device: torch.device,
    rows: Sequence[Rows],
    calls: Sequence[Sequence[Work]],
    rounds: int,
    began: Callable[[int], None],
) -> list[list[float]]:
    """A Clock: captured and replayed in turn. Infinite for what cannot be captured or called."""
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    arms: dict[str, Arm] = {}
    for i, works in enumerate(calls):
        began(i)
        try:
            arms[str(i)] = make_arm(works, pool, device_type=device.type)
        except Exception:
            _sound(device)
    began(-1)
    found = interleaved(arms, rounds)
    return [found.get(str(i), [math.inf] * rounds) for i in range(len(calls))]


def _sound(device: torch.device) -> None:
    """End the process where what failed has broken the CUDA context: nothing that follows would be true."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            sys.exit(str(error).splitlines()[0])


# ---- requests ----


def serve(answer: Callable[..., Any], requests: Iterable[str], say: Callable[[dict[str, Any]], None]) -> None:
    """Answer each line of JSON by {"answer": ...}, and say {"at": i} as the i-th of its sets of rows is begun, -1 after
    all. answer(request, the sets, began)."""
    say({"ready": True})
    for line in requests:
        request = json.loads(line)
        sets = [dict(map(row_from_json, rows)) for rows in request["sets"]]
        say({"answer": answer(request, sets, lambda i: say({"at": i}))})


def raced(race: Race, given: dict[str, Any], sets: list[Rows], began: Callable[[int], None]) -> Any:
    """What the process with the GPU answers."""
    if given["ask"] == "cost":
        return race.cost(given["call"], sets[0])
    if given["ask"] == "times":
        return race.times(given["call"], given["backward"], sets, given["rounds"], began)
    began(1)  # is the second set wrong? the first is the present rows
    try:
        return race.wrong(sets[1], sets[0], given["small"], given["call"], given["repeats"])
    except torch.OutOfMemoryError:
        return f"{FAILS}no room on the GPU to hold it to what it should give"
    except Exception as error:
        _sound(race.device)
        return f"{FAILS}{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


class Compiler:
    """Compiles the calls of a run with other rows, into Triton's cache, where the process with the GPU finds them. In a
    process without: it forks, and what it forks differentiates, which a process that has done so itself cannot have."""

    def __init__(self, setup: Setup, ours: Ops, capability: int):
        self.ours, self.capability = ours, capability
        whole, small = Notes(ours), Notes(ours)
        for notes, of in ((whole, setup), (small, proven(setup))):
            notes.block(of, META, of.rows)
            notes.update(of, META)
        self.calls = {**small.calls, **whole.calls}

    def compiled(self, given: dict[str, Any], sets: list[Rows], began: Callable[[int], None]) -> bool:
        """The calls that are named, with each of the sets, as far as given["limit_s"] allows."""
        compile_ahead(partial(self._work, given["calls"], sets), self.capability, given["limit_s"])
        return True

    def _work(self, calls: list[str], sets: list[Rows]) -> None:
        for rows in sets:
            with keeping(rows), suppress(Exception):  # a row that no kernel can have; whoever launches it will see
                for held in (self.calls[known_by] for known_by in calls):
                    held.results(getattr(self.ours, held.name))
