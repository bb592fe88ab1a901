"""`pytest bench`: every run is saved under .benchmarks/ and compared with the one before it (pytest-benchmark)."""

import machine
import pytest

SHORT = {"benchmark_max_time": 0.3, "benchmark_min_rounds": 5, "benchmark_calibration_precision": 10}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--config", default="shakespeare_char_cpu", help="whose training step is timed")


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options in its own pytest_configure, which comes last
def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if not hasattr(option, "benchmark_autosave"):
        raise pytest.UsageError("pytest bench needs pytest-benchmark: pip install 'nanogpt-fast[bench]'")
    facts = machine.machine_facts()
    if not option.benchmark_save and not option.benchmark_autosave:
        option.benchmark_autosave = f"{facts['commit']}{'_dirty' * bool(facts['dirty'])}"
    if not option.benchmark_compare:
        option.benchmark_compare = True
    for name, value in SHORT.items():
        if f"--{name.replace('_', '-')}" not in " ".join(config.invocation_params.args):
            setattr(option, name, value)
    option.benchmark_group_by = "fullname"
    option.benchmark_columns = option.benchmark_columns or ["min", "median", "iqr", "rounds"]
