"""Every kernel compiles ahead of time as the rules of profiling/resources.py want it, and the rules can be broken."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
OTHER_TRITON = "3.6.0"

resources = pytest.importorskip("resources", reason="needs Triton")
ARCHES = [f"sm_{arch}" for arch in resources.ARCHITECTURES]


def run_compiler(script: str, *args: str, path: str = "", timeout: float = 3600) -> subprocess.CompletedProcess[str]:
    """A script in a process without the interpreter; `path` comes first on its module path."""
    folders = [path, ROOT, ROOT / "kernels", ROOT / "profiling"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(f) for f in folders if f)}
    env.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, str(ROOT / script), *args], env=env, capture_output=True, text=True, timeout=timeout
    )


def jit_kernels() -> set[str]:
    """Names of all kernels in nanogpt_kernels: jit functions called _..._kernel."""
    files = (ROOT / "kernels/nanogpt_kernels").rglob("*.py")
    functions = (
        node for f in files for node in ast.walk(ast.parse(f.read_text())) if isinstance(node, ast.FunctionDef)
    )
    return {f.name for f in functions if f.name.endswith("_kernel") and f.decorator_list}


def assert_rules_hold(tmp_path: Path, *args: str, path: str = "") -> None:
    """resources.py finds nothing wrong, and has seen every kernel there is."""
    report = tmp_path / "report.json"
    run = run_compiler("profiling/resources.py", *args, "--json", str(report), path=path)
    assert run.returncode == 0, run.stdout + run.stderr
    compiled = json.loads(report.read_text())["kernels"]
    assert jit_kernels() == {k["kernel"] for k in compiled}
    assert all(k["registers"] > 0 for k in compiled)


@pytest.mark.timeout(900)
def test_every_kernel_at_every_launch_row_on_sm_90(tmp_path: Path):
    """About 75 s of one core when Triton's cache is cold."""
    assert_rules_hold(tmp_path, "--core")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", ARCHES)
def test_every_call_on_every_architecture(arch: str, tmp_path: Path):
    assert_rules_hold(tmp_path, "--arch", arch)


@pytest.fixture(scope="session")
def other_triton(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the oldest Triton that setup.py allows."""
    folder = tmp_path_factory.mktemp("triton")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    install = subprocess.run([*command, f"triton=={OTHER_TRITON}"], capture_output=True, text=True)
    if install.returncode != 0:
        pytest.skip(f"pip cannot install triton {OTHER_TRITON}: {install.stderr.strip().splitlines()[-1]}")
    return str(folder)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", ARCHES)
def test_every_call_on_every_architecture_by_another_triton(arch: str, other_triton: str, tmp_path: Path):
    assert_rules_hold(tmp_path, "--arch", arch, path=other_triton)


@pytest.mark.parametrize("name", ["%offset", "%offset.1"], ids=["plain", "dotted"])  # Triton 3.8 names values so
def test_a_carried_offset_that_wraps_is_found_by_any_name(name: str):
    from offset_ranges import wrapping_offsets

    ttir = f"""
      %sum:2 = scf.for %i = %zero to %n step %one iter_args({name} = %zero, %acc.0 = %cst) -> (i32, f32)  : i32 {{
        %next.2 = arith.addi {name}, %step : i32
        %place = tt.addptr %base, %next.2 : !tt.ptr<f32>, i32
        scf.yield %next.2, %acc.0 : i32, f32
      }}
    """
    found = wrapping_offsets(ttir, {"zero": 0, "one": 1, "n": 9, "step": 4}, (1,))
    assert found == [f"%next.2 = arith.addi {name}, %step : i32"]


def test_the_rules_see_what_breaks_them():
    run = run_compiler("tests/helpers/bad_kernels.py")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    verdicts = found["verdicts"]
    assert verdicts.pop("spills BLOCK=16384").startswith("SPILL ")
    assert verdicts.pop("multiplies M=16 N=64 K=64") == "NO WGMMA"
    assert verdicts.pop("multiplies M=128 N=128 K=512") == "SMEM over 227 KB"
    assert verdicts.pop("attends in 3") == "SERIAL WGMMA" and verdicts.pop("attends in 2") == "ok"
    for name in ("wraps", "wraps_before_widening", "wraps_in_a_loop"):
        wraps = verdicts.pop(f"{name} BLOCK=64")
        assert wraps.startswith("WRAPS %") and "arith.muli" in wraps, (name, wraps)
    assert verdicts.pop("over budget").startswith("BUDGET registers ")
    assert verdicts.pop("without budget") == "BUDGET has no entry"
    edited = re.fullmatch(r"BUDGET instructions in its loop (\d+) > (\d+), BUDGET instructions \d+ > \d+",
                          verdicts.pop("edited"))  # fmt: skip
    assert edited and int(edited[1]) > int(edited[2]) > 0, "one more multiplication an element went unseen"
    assert verdicts.pop("unedited") == "ok"
    assert verdicts.pop("without instructions") == "BUDGET has no entry for its instructions"
    assert verdicts == {"multiplies M=64 N=64 K=64": "ok", "does_not_wrap BLOCK=64": "ok", "within budget": "ok"}
    assert any(row.startswith("cross_entropy: no call takes the row of sm_80") for row in found["untaken"])
    sizes = [(64, 64, 64), (16, 64, 64), (128, 128, 512)]  # by wgmma, by mma.sync, by eight warps
    assert found["products"] == {f"M={m} N={n} K={k}": m * n * k for m, n, k in sizes}


def test_the_interpreter_is_refused():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, str(ROOT / "profiling/resources.py")]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 2 and "unset it" in run.stderr


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        (90, 128, 0, 8, 2),  # 65536 / (128 x 256): registers
        (90, 32, 0, 4, 16),  # 64 warps / 4
        (90, 16, 0, 1, 32),  # no more than 32 blocks
        (90, 32, 113 * 1024, 4, 2),  # 228 KB / (113 + 1)
        (90, 255, 227 * 1024, 8, 1),
        (86, 16, 0, 1, 16),
        (89, 40, 0, 4, 12),  # 48 warps / 4
        (80, 168, 0, 4, 3),  # 65536 / 5376 = 12 warps
    ],
)
def test_blocks_that_fit_on_an_sm(arch: int, registers: int, shared: int, warps: int, blocks: int):
    """By hand from the rules of CUDA's occupancy calculator."""
    kernel = SimpleNamespace(registers=registers, shared=shared, num_warps=warps)
    assert resources.blocks_held(kernel, arch) == blocks
