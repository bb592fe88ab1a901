"""The import law, the names we must not take, and file lengths: ARCHITECTURE.md as tests."""

import ast
import graphlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).resolve().parent.parent
TRAINER, KERNELS = ROOT / "nanogpt_fast", ROOT / "kernels/nanogpt_kernels"
MAX_LINES = 350
# Scripts put their own folder first on sys.path: a file of one of these names would shadow the module.
FORBIDDEN = {"kernels", "nvtx", "torch", "triton", "profile", "trace", "statistics", "logging", "tokenize", "random",
             "types", "copy", "queue", "select"}  # fmt: skip


def floors() -> dict[str, int]:
    """{room: floor} read from ARCHITECTURE.md's list, so that the page cannot go stale. A room is a folder of
    nanogpt_fast, written `name/`, or a file that stands at its top."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^    (\d+)  ([a-z0-9_/ ]+)$", text, re.MULTILINE)
    return {name.rstrip("/"): int(floor) for floor, names in rows for name in names.split()}


def room_of(path: Path) -> str:
    return path.relative_to(TRAINER).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    """The dotted name of a file of nanogpt_fast."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def python_files(*folders: str) -> list[Path]:
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]


TRAINER_FILES, KERNEL_FILES = python_files("nanogpt_fast"), python_files("kernels/nanogpt_kernels")


def imports(path: Path) -> set[str]:
    """Dotted names imported anywhere in a file, `from a import b` as a and a.b; those of nanogpt_kernels, which imports
    relatively, in full."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [*_package_of(path, node.level), node.module]))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def _package_of(path: Path, level: int) -> tuple[str, ...]:
    """What `level` dots stand for in a file of nanogpt_kernels."""
    parts = path.relative_to(KERNELS.parent).parts if level else ()
    return parts[: len(parts) - level]


def test_architecture_lists_every_room():
    found = {room_of(p) for p in TRAINER_FILES}
    assert set(floors()) == found - {"__init__"}
    folders = {f"{room_of(p)}/" for p in TRAINER_FILES if p.parent != TRAINER}
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert all(re.search(rf"^    \d+  .*\b{folder}", text, re.MULTILINE) for folder in folders)


@pytest.mark.parametrize("path", TRAINER_FILES, ids=module_of)
def test_a_room_imports_only_rooms_on_floors_below(path: Path):
    floor, own = floors(), room_of(path)
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("nanogpt_fast.")} - {own}
    wrong = {name for name in ours & set(floor) if floor[name] >= floor.get(own, 0)}
    assert not wrong, f"{path} imports {sorted(wrong)}, which ARCHITECTURE.md lists on its line or after it"


def test_inside_a_room_imports_make_no_circle():
    modules = {module_of(p): p for p in TRAINER_FILES}
    graph = {name: (imports(path) & set(modules)) - {name} for name, path in modules.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_basenames_are_unique():
    stems = [p.stem for p in python_files("nanogpt_fast", "tests") if p.stem not in ("__init__", "conftest")]
    assert not {stem for stem in stems if stems.count(stem) > 1}


def test_every_folder_of_the_packages_is_a_package_and_setup_finds_it():
    """A folder without __init__.py would be missing in a wheel, and only there."""
    packages = {module_of(p.parent / "x").removesuffix(".x") for p in TRAINER_FILES}
    packages |= {".".join(p.parent.relative_to(KERNELS.parent).parts) for p in KERNEL_FILES}
    found = {
        *find_packages(str(ROOT), include=["nanogpt_fast", "nanogpt_fast.*"]),
        *find_packages(str(ROOT / "kernels")),
    }
    assert packages == found


def test_only_ops_imports_the_kernels():
    users = {p.name for p in TRAINER_FILES if any(n.split(".")[0] == "nanogpt_kernels" for n in imports(p))}
    assert users == {"ops.py"}


def test_kernels_import_torch_and_triton_only_and_one_another_relatively():
    """Relatively, because a copy may be imported by any name: vendored, or by Hugging Face's kernel hub."""
    allowed = {"torch", "triton"} | set(sys.stdlib_module_names)
    for path in KERNEL_FILES:
        assert {name.split(".")[0] for name in imports(path)} <= allowed | {"nanogpt_kernels"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.ImportFrom) or node.level or (node.module or "").split(".")[0] in allowed, (
                path
            )


SHARED_OP_FILES = {"linear", "column_sums"}
FAMILIES = {"attention": {"attention"}, "linear_cross_entropy": {"cross_entropy"}, "mlp": {"gemm_gelu"}}


def test_op_files_import_what_they_stand_on_and_one_another_only_within_a_family():
    for path in KERNEL_FILES:
        own = path.relative_to(KERNELS).with_suffix("").parts
        used = {tuple(name.split(".")[1:3]) for name in imports(path) if name.startswith("nanogpt_kernels.")}
        op_files = {parts[1] for parts in used if parts[0] == "ops" and len(parts) > 1}
        if own[0] == "ops":
            assert op_files <= SHARED_OP_FILES | FAMILIES.get(own[1], set()), path
        elif own != ("__init__",):  # which names them, lazily
            assert not op_files, path
        assert own == ("launch",) or not any(parts[0] == "launch_rows" for parts in used), path
        assert not any(parts[0] == "reference" for parts in used), path


def test_nobody_imports_bench_or_profiling():
    for path in python_files("nanogpt_fast", "kernels", "bench", "profiling"):
        assert not {name.split(".")[0] for name in imports(path)} & {"bench", "profiling"}, path


def test_profiling_imports_nothing_of_bench():
    """bench imports profiling's parts by name (bench/machine.py puts the folder on sys.path), never the reverse."""
    theirs = {path.stem for path in python_files("bench")}
    for path in python_files("profiling"):
        assert not {name.split(".")[0] for name in imports(path)} & theirs, path


def test_no_file_is_too_long():
    long = {str(p.relative_to(ROOT)): n for p in python_files("nanogpt_fast", "kernels", "bench", "profiling", "tests")
            if (n := len(p.read_text().splitlines())) > MAX_LINES}  # fmt: skip
    assert not long


def test_no_forbidden_names():
    assert not [p for p in python_files("bench", "profiling", "nanogpt_fast") if p.stem in FORBIDDEN]
    assert not (ROOT / "kernels/__init__.py").exists() and not (ROOT / "profiling/__init__.py").exists()
    assert not (ROOT / "tests/kernels").exists()


def test_kernels_folder_shadows_no_installed_package():
    """`kernels` is Hugging Face's: from our root, importing it must not find a package of ours."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    origin = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert str(ROOT) not in origin


def test_importing_touches_no_gpu_and_no_environment():
    modules = [*map(module_of, TRAINER_FILES), "nanogpt_kernels.reference"]
    code = (
        "import os, sys, importlib, torch\nbefore = dict(os.environ)\n"
        f"for m in {modules}: importlib.import_module(m)\n"
        "assert dict(os.environ) == before, 'environment changed'\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not {'transformers', 'datasets', 'tiktoken', 'matplotlib', 'wandb', 'triton'} & set(sys.modules), "
        "sorted({'transformers', 'datasets', 'tiktoken', 'matplotlib', 'wandb', 'triton'} & set(sys.modules))\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def outside_constraints() -> str:
    """The first package of constraints.txt that is installed in another version than it names, or nothing."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        name, series = line.split("==")
        installed = [d.version for d in importlib.metadata.distributions(name=name)]
        if not (installed and fnmatch(installed[0], series)):
            return f"{name} {installed[0]}" if installed else f"no {name}"
    return ""


PYRIGHT = ["pyright", "--pythonpath", sys.executable]  # else it looks for torch beside the first `python` of PATH


@pytest.mark.parametrize("tool", [["ruff", "check"], ["ruff", "format", "--check"], PYRIGHT], ids=lambda t: t[0])
def test_lint_and_types(tool: list[str]):
    if importlib.util.find_spec(tool[0]) is None:
        pytest.skip(f"{tool[0]} is not installed: pip install -e '.[dev]'")
    if tool is PYRIGHT and (other := outside_constraints()):
        pytest.skip(f"types are checked against the packages of constraints.txt; here is {other}")
    run = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
