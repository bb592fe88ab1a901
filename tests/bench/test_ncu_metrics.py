"""profiling/ncu_metrics.py without a GPU: its arguments, its errors, and what it asks of a stand-in for nsight."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import kernel_case
import ncu_metrics
import op_inputs
import pytest
import torch
from triton import knobs

from nanogpt_fast.errors import DeviceError


class Frame:
    """A data frame that was asked for its text and its file."""

    def __init__(self, rows: list[tuple[str, str]]):
        self.rows = rows

    def to_string(self, columns: list[str], index: bool) -> str:
        assert columns[:2] == ["Annotation", "size"] and not index
        return "\n".join(map(" ".join, self.rows))

    def to_csv(self, path: Path, index: bool) -> None:
        path.write_text(self.to_string(ncu_metrics.SHOWN, index))


class StandIn(ModuleType):
    """nsight-python's rules: configs come as positional arguments, `runs` times each; an annotation is entered neither
    inside another nor twice in a run; the decorated function gives results, not its own value."""

    class ProfilerException(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("nsight")
        self.asked: dict[str, Any] = {}
        self.rows: list[tuple[str, str]] = []
        self.in_run: list[str] = []
        self.inside, self.fails = False, False
        self.analyze = SimpleNamespace(kernel=self.kernel)
        failures = ("ProfilerException", "NCUNotAvailableError", "ThermalControlError")
        self.exceptions = SimpleNamespace(**dict.fromkeys(failures, self.ProfilerException))

    def kernel(self, **asked: Any) -> Any:
        self.asked = asked

        def decorated(function: Any) -> Any:
            def profile() -> Any:
                if self.fails:
                    raise self.ProfilerException("Invalid value for 'metrics'")
                for config in asked["configs"]:
                    for _ in range(asked["runs"]):
                        self.in_run = []
                        assert function(*config) is None
                        self.rows += [(name, *config) for name in self.in_run]
                return SimpleNamespace(to_dataframe=lambda: Frame(self.rows))

            return profile

        return decorated

    def annotate(self, name: str) -> Any:
        module = self

        class Annotation:
            def __enter__(self) -> None:
                assert not module.inside and name not in module.in_run
                module.inside = True
                module.in_run.append(name)

            def __exit__(self, *_: Any) -> None:
                module.inside = False

        return Annotation()


@pytest.fixture
def nsight(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "nsight", module)
    monkeypatch.setattr(ncu_metrics.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return module


def launching(*kernels: str) -> ncu_metrics.Run:
    """Launches such kernels, as far as Triton's hooks see."""

    def run(size: str) -> None:
        for name in kernels:
            metadata = SimpleNamespace(get=lambda name=name: {"name": name})
            knobs.runtime.launch_enter_hook(metadata)
            knobs.runtime.launch_exit_hook(metadata)

    return run


def test_each_launch_has_an_annotation_of_its_own(nsight: StandIn, tmp_path: Path, monkeypatch: Any, capsys: Any):
    monkeypatch.setattr(ncu_metrics, "op_run", lambda *asked: launching(f"{asked[0]}_fwd", "sums", "sums"))
    argv = ["norm", "--sizes", "124m", "774m", "--metrics", "a.sum", "--runs", "2", "--csv", str(tmp_path / "x.csv")]
    ncu_metrics.main(argv)
    assert nsight.asked == {"configs": [("124m",), ("774m",)], "metrics": ["a.sum"], "runs": 2}
    names = ["000 norm_fwd", "001 sums", "002 sums"]
    assert nsight.rows == [(name, size) for size in ("124m", "774m") for _ in range(2) for name in names]
    assert not knobs.runtime.launch_enter_hook.calls and not knobs.runtime.launch_exit_hook.calls
    assert "001 sums 774m" in capsys.readouterr().out and "001 sums 774m" in (tmp_path / "x.csv").read_text()


def test_what_ncu_refuses_is_said(nsight: StandIn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ncu_metrics, "op_run", lambda *_: launching("k"))
    nsight.fails = True
    with pytest.raises(DeviceError, match="Invalid value for 'metrics'") as error:
        ncu_metrics.main(["norm", "--metrics", "nonsense"])
    assert "ncu --query-metrics" in error.value.hint and error.value.exit_code == 5


def test_a_step_is_the_configuration_s_with_our_kernels(nsight: StandIn, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    monkeypatch.setattr(ncu_metrics, "step_run", lambda flags: seen.append(flags) or launching("adamw"))
    ncu_metrics.main(["step", "--config", "gpt2_124m", "--batch_size=4"])
    assert seen == [["--config", "gpt2_124m", "--batch_size=4"]] and nsight.rows[0] == ("000 adamw", "step")


def test_a_step_is_one_micro_step_and_the_update(monkeypatch: pytest.MonkeyPatch):
    import built_step

    asked: list[Any] = []
    built = SimpleNamespace(batch=torch.zeros(3, 2, 5), step=lambda batch, i: asked.append(batch.shape) or (1, 2))
    monkeypatch.setattr(built_step, "build", lambda config: asked.append(config.system.kernels) or built)
    assert ncu_metrics.step_run(["--config", "shakespeare_char"])("") is None
    assert asked == ["triton", (1, 2, 5)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on the CPU, in the interpreter")
def test_an_op_runs_both_ways(monkeypatch: pytest.MonkeyPatch):
    """Weights' gradients are added to main_grad, as in training."""
    made: list[Any] = []
    small = op_inputs.Shape(B=1, T=4, C=8, H=1, V=16, N=32)
    at = op_inputs.Setting(small, torch.float32, kernel_case.DEVICE, main_grad=True)
    inputs = op_inputs.norm
    monkeypatch.setattr(op_inputs, "norm", lambda s: made.append(s) or made.append(inputs(at)) or made[-1])
    run = ncu_metrics.op_run("norm", 64, torch.bfloat16)
    for _ in range(2):
        run("350m")
    asked, (_, weight, _) = made  # once a size
    assert (asked.shape, asked.dtype, asked.main_grad) == (op_inputs.gpt2("350m", 64), torch.bfloat16, True)
    assert weight.main_grad.abs().sum() > 0


@pytest.mark.parametrize(
    "argv", [["nothing"], ["norm", "--config", "x"], ["norm", "--runs", "0"], ["norm", "--sizes", "1g"]]
)
def test_bad_arguments(argv: list[str]):
    with pytest.raises(SystemExit) as stop:
        ncu_metrics.parsed(argv)
    assert stop.value.code == 2


def test_ops_are_those_that_have_inputs():
    import nanogpt_kernels

    assert all(callable(getattr(op_inputs, op)) and callable(getattr(nanogpt_kernels, op)) for op in ncu_metrics.OPS)


def test_what_is_missing_is_named(nsight: StandIn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="torch sees none"):
        ncu_metrics.main(["norm"])
    monkeypatch.setattr(ncu_metrics.shutil, "which", lambda name: None)
    with pytest.raises(DeviceError, match="ncu is not on the PATH"):
        ncu_metrics.main(["norm"])
    monkeypatch.setitem(sys.modules, "nsight", None)
    with pytest.raises(DeviceError, match="nsight-python cannot be imported") as error:
        ncu_metrics.main(["norm"])
    assert error.value.hint == "pip install nsight-python" and error.value.exit_code == 5
