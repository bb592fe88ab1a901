"""doctor --ranks on gloo processes: its report, and what it says of ranks that differ, die or never come."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from helpers.ranks import Ended, Ranks

from nanogpt_fast import doctor
from nanogpt_fast.errors import ConfigError
from nanogpt_fast.network.identity import differences, spans, without_addresses
from nanogpt_fast.network.tables import as_text

# Of another rank: a machine that is elsewhere.
ELSEWHERE = "from nanogpt_fast.network import identity; identity.host = lambda: 'elsewhere'"
STOPS = (
    "import os, signal; from nanogpt_fast.network import links; "
    "links.Meter.work = lambda self: os.kill(os.getpid(), signal.{})"
)


@pytest.fixture
def checked(ranks: Ranks) -> Callable[..., list[Ended]]:
    """doctor --ranks on so many ranks, or only some; what became of them."""

    def check(size: int, *flags: str, only: list[int] | None = None, **env: str) -> list[Ended]:
        ranks.start(size, ["doctor", "--ranks", "--device=cpu", *flags], only, **env)
        return ranks.wait()

    return check


def test_two_ranks_measure_and_rank_0_alone_speaks(checked: Callable[..., list[Ended]]):
    env = {"RUN_FIRST": f"1:{ELSEWHERE}", "CLOCK_AHEAD": "1:3600"}
    (code, out, err), second = checked(2, "--json", "--seconds=2", "--slow=30", **env)
    assert code == 0, err
    assert second == (0, "", second[2]) and "error" not in second[2]
    report = json.loads(out)
    assert report["problems"] == [] == report["findings"]
    assert report["ranks"] == {"ranks": 2, "nodes": [[0], [1]], "backend": "gloo"}
    (clock,) = report["clocks"]
    assert clock["ahead_s"] == pytest.approx(3600, abs=0.1) and 0 < clock["within_s"] < 0.1
    assert {(link["from"], link["to"]) for link in report["links"]} == {(0, 1), (1, 0)}
    assert all(0 < link["latency_s"] < link["seconds"] < 1 for link in report["links"])
    sizes = [row["bytes"] for row in report["all_reduce"]]
    assert sizes[0] == 4 and sizes == [4 ** (k + 1) for k in range(len(sizes))] and len(sizes) > 5
    for row in report["all_reduce"]:
        assert row["algbw"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        assert row["busbw"] == pytest.approx(row["algbw"]), "of two ranks they are one"
    assert any("clock of node 1 is 3600.0 s ahead" in note for note in report["notes"])
    assert any("--expect" in note for note in report["notes"])
    assert socket.gethostname() not in json.dumps(report["versions"]) and "host" not in report["versions"]
    text = as_text(report)
    for row in ("  node 1: 1", "between nodes  2 links", "all-reduce          time   algbw GB/s", "no problems found"):
        assert row in text


def test_one_rank_of_torchrun_has_no_links(checked: Callable[..., list[Ended]]):
    ((code, out, err),) = checked(1, "--seconds=1")
    assert code == 0, err
    assert out.splitlines()[0] == "ranks" and out.splitlines()[-1] == "no problems found"


def test_without_torchrun_it_says_how_to_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="one process alone") as error:
        doctor.main(["--ranks"])
    assert "torchrun --standalone" in error.value.hint and error.value.exit_code == 2


@pytest.mark.parametrize("flag", ["--seconds=0", "--slow=1", "--timeout=-1"])
def test_limits_that_are_none(flag: str):
    with pytest.raises(ConfigError, match="too small"):
        doctor.main(["--ranks", flag])


def test_a_rank_with_other_code_is_named_and_nothing_is_measured(checked: Callable[..., list[Ended]]):
    (code, out, err), second = checked(2, RUN_FIRST=f"1:{ELSEWHERE}; identity.fingerprint = lambda: '0123456789'")
    assert (code, out) == (5, "") and second == (5, "", "")
    assert "do not run the same software" in err and "rank 1 (node 1): code 0123456789" in err


def test_ranks_that_never_come_are_named_within_the_timeout(checked: Callable[..., list[Ended]]):
    began = time.monotonic()
    (code, _, err), other = checked(4, "--timeout=4", only=[0, 2])
    assert code == 5 and "ranks 1, 3 of 4 did not come" in err and "within 4 s" in err
    assert other == (5, "", "") and time.monotonic() - began < 40


def one_of(ranks: Ranks, rank: int, *flags: str, **env: str) -> Ended:
    """Of two ranks what became of this one; then the other is killed, which does not end by itself."""
    pids = ranks.start(2, ["doctor", "--ranks", "--device=cpu", *flags], **env)
    while ranks.next_end()[0] != rank:
        pass
    with suppress(ProcessLookupError):
        os.kill(pids[1 - rank], signal.SIGKILL)
    return ranks.wait()[rank]


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="POSIX")
@pytest.mark.parametrize("how", [pytest.param("SIGKILL", marks=pytest.mark.slow), "SIGSTOP"])
def test_a_rank_that_dies_or_hangs_is_named_with_the_place(ranks: Ranks, how: str):
    code, out, err = one_of(ranks, 0, "--timeout=3", RUN_FIRST=f"1:{STOPS.format(how)}")
    assert (code, out) == (5, ""), err
    assert "rank 1 (node 0) of 2 does not answer" in err and "rank 0: computing alone" in err


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="POSIX")
def test_rank_0_that_is_gone_is_said_by_the_others(ranks: Ranks):
    """Its store neither answers nor closes."""
    code, out, err = one_of(ranks, 1, "--timeout=4", RUN_FIRST=f"0:{STOPS.format('SIGSTOP')}")
    assert (code, out) == (5, "") and "rank 1 of 2 does not reach rank 0's store" in err


def test_differences_name_the_odd_ones():
    same = {"torch": "2.13.0", "python": "3.12.1"}
    facts = [same, same, {**same, "torch": "2.12.0"}, {**same, "torch": "2.12.0"}, {**same, "python": "3.11.0"}]
    problems, notes = differences(facts, [0, 0, 1, 1, 2])
    assert problems == ["ranks 2-3 (node 1): torch 2.12.0; the other 3: 2.13.0"]
    assert notes == ["rank 4 (node 2): python 3.11.0; the other 4: 3.12.1"]
    assert differences([same, same], [0, 0]) == ([], [])


def test_spans():
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and spans({3}) == "3"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[../gloo/pair.cc:538] Read error [10.1.2.3]:4567: reset. More.", "Read error [address]: reset"),
        ("cannot connect to (head.example, 29500), remote=[::ffff:10.0.0.1]:22", "cannot connect to [address], "
         "remote=[address]"),
        (f"no route to {socket.gethostname()} at 10.0.0.1", "no route to [host] at [address]"),
    ],
)  # fmt: skip
def test_errors_name_no_host(text: str, shown: str):
    assert without_addresses(RuntimeError(text)) == shown
