"""A plugin with which pytest is a stage of bench/gpu_session.py.

    PYTHONPATH=bench python -m pytest -p pytest_stage [--results FILE.jsonl] ...

What is missing on a machine that has torch, Triton and little else costs its own tests: property tests skip themselves
without hypothesis, files that import another missing package are skipped. (Without the plugin a missing package
interrupts the run at collection, as it should where all are meant to be there.) Each test's outcome is written when it
is known, so a run that is cut off has said what failed.
"""

import importlib.util
import sys
import types
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import machine
import pytest

OPTIONAL = {"tyro", "rich", "safetensors", "filelock", "expecttest", "tiktoken", "transformers", "nvtx"}  # of files


class _Anything:
    """Whatever is asked of it: itself."""

    def __getattr__(self, name: str) -> "_Anything":
        if name.startswith("__"):  # what Python itself asks modules and functions for
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __or__(self, other: Any) -> "_Anything":
        return self


class _Decorator(_Anything):
    """Called with anything, a decorator that leaves its function alone."""

    def __call__(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        return lambda function: function


def stand_in_for_hypothesis() -> dict[str, types.ModuleType]:
    """{name: module}: its decorators skip their tests."""
    hypothesis, strategies = types.ModuleType("hypothesis"), types.ModuleType("hypothesis.strategies")
    members = {"strategies": strategies, "settings": _Decorator(), "example": _Decorator(), "HealthCheck": _Anything()}
    skip = pytest.mark.skip(reason="hypothesis is not installed")
    for name, member in {**members, "given": lambda *args, **kwargs: skip, "assume": bool}.items():
        setattr(hypothesis, name, member)
    strategies.__getattr__ = _Anything().__getattr__
    return {"hypothesis": hypothesis, "hypothesis.strategies": strategies}


if importlib.util.find_spec("hypothesis") is None:
    sys.modules.update(stand_in_for_hypothesis())


class Results:
    """One line a test that did something: its id, what became of it, seconds, the error's last line."""

    def __init__(self, path: Path):
        self.lines = machine.Lines(path, bench="tests", **machine.machine_facts())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:  # a skip comes in setup, an error there or in teardown
            error = report.longreprtext.strip().splitlines()[-1:] if report.failed else []
            outcome = report.outcome if report.when == "call" or report.skipped else "error"
            self.lines.write(
                test=report.nodeid, status=outcome, seconds=round(report.duration, 2), error="".join(error)
            )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, metavar="FILE", help="append a line of JSON a test")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, which is not installed")
    if (path := config.getoption("--results")) and not hasattr(config, "workerinput"):  # xdist's workers report to us
        config.pluginmanager.register(Results(path))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, Any]:
    report = yield
    problem = report.call.excinfo.value.__cause__ if report.failed and report.call and report.call.excinfo else None
    if isinstance(problem, ModuleNotFoundError) and (problem.name or "").partition(".")[0] in OPTIONAL:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {problem.name} is not installed")
    return report
