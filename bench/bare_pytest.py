"""A plugin for pytest on a machine that has torch, Triton and little else: what is missing costs its own tests.

    PYTHONPATH=bench python -m pytest -p bare_pytest ...

Without it a missing package interrupts the whole run at collection, as it should where all are meant to be there.
Property tests skip themselves where hypothesis is missing, files that import another missing package are skipped.
"""

import importlib.util
import sys
import types
from collections.abc import Callable, Generator
from typing import Any

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
    strategies.__getattr__ = _Anything().__getattr__  # type: ignore[method-assign]
    return {"hypothesis": hypothesis, "hypothesis.strategies": strategies}


if importlib.util.find_spec("hypothesis") is None:
    sys.modules.update(stand_in_for_hypothesis())


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, which is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, Any]:
    report = yield
    problem = report.call.excinfo.value.__cause__ if report.failed and report.call and report.call.excinfo else None
    if isinstance(problem, ModuleNotFoundError) and (problem.name or "").partition(".")[0] in OPTIONAL:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {problem.name} is not installed")
    return report
