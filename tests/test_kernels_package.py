"""`from nanogpt_kernels import attention` is the op, whatever was imported before, and is loaded when it is named; and
copies of the package live beside one another, as Hugging Face's kernel hub loads them."""

import ast
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import build_hub
import nanogpt_kernels
import pytest

import nanogpt_fast

PACKAGE = Path(nanogpt_kernels.__file__).parent
LAZILY = """
import sys
import nanogpt_kernels
from nanogpt_kernels import launch_rows  # a submodule of that name
assert set(nanogpt_kernels.__all__) <= set(dir(nanogpt_kernels))
assert not hasattr(nanogpt_kernels, "layernrom") and not hasattr(nanogpt_kernels, "residual")
assert not {"torch", "triton"} & set(sys.modules)
from nanogpt_kernels import layernorm
assert "nanogpt_kernels.ops.norm" in sys.modules and "nanogpt_kernels.ops.attention" not in sys.modules
"""
FILES = """
import nanogpt_kernels.ops.attention.forward, nanogpt_kernels.ops.embedding, nanogpt_kernels.ops.linear
import nanogpt_kernels.ops.norm as file
from nanogpt_kernels.ops import cross_entropy, linear_cross_entropy, mlp
"""
NAMES = """
from nanogpt_kernels import *
from nanogpt_kernels import attention
import nanogpt_kernels
assert attention is nanogpt_kernels.attention
"""
CHECK = """
import importlib, types, nanogpt_kernels
for name in nanogpt_kernels.__all__:
    op = getattr(nanogpt_kernels, name)
    assert isinstance(op, types.FunctionType), op
    assert op.__name__ == {"layernorm": "norm"}.get(name, name), op
    assert op is getattr(importlib.import_module(op.__module__), op.__name__)
    assert isinstance(sys.modules[op.__module__], types.ModuleType)
"""


@pytest.mark.parametrize("code", [LAZILY, FILES + NAMES, NAMES + FILES], ids=["lazily", "files first", "names first"])
def test_a_name_is_the_op_in_every_order_of_imports(code: str):
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", "import sys\n" + code + CHECK]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_type_checkers_are_told_every_name():
    """The imports that only they see, the names that exist, and the functions in ops/ agree."""
    (guarded,) = (n for n in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(n, ast.If))
    told = {alias.name: n.module for n in guarded.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert sorted(told) == sorted(nanogpt_kernels.__all__)
    files = {name: f"ops.{file}" for name, file in nanogpt_kernels._FILE_OF.items()}
    assert told == files


def test_the_packages_have_one_version():
    assert nanogpt_kernels.__version__ == nanogpt_fast.__version__


COPIES = """
import importlib.util, json, sys, torch
from pathlib import Path

def load(file, name):  # as the hub's importer does
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]

variants = [Path(path) for path in sys.argv[1:]]
copies = [load(v / "__init__.py", json.loads((v / "metadata.json").read_text())["id"]) for v in variants]
assert len({copy.__name__ for copy in copies}) == 2
copies.append(load(variants[0] / "nanogpt_kernels" / "__init__.py", "nanogpt_kernels"))  # as older ones do
x, w = torch.randn(3, 40), torch.rand(40)
y, *others = [copy.layernorm(x.clone().requires_grad_(), w, None) for copy in copies]
assert torch.allclose(y, torch.layer_norm(x, (40,), w), atol=1e-5)
assert all(torch.equal(y, other) for other in others) and all(out.grad_fn is not None for out in (y, *others))
assert copies[0].layernorm is not copies[1].layernorm and copies[0].layernorm is copies[2].layernorm
for copy in copies[:2]:
    assert hasattr(getattr(torch.ops, copy.__name__), "norm_fwd")
    sys.modules[copy.__name__ + ".ops.norm"].norm_fwd(x, None, None, w, None, 1e-5, 0.0, None, 0, x.dtype, True)
assert not any(name.startswith("nanogpt_kernels.") for name in sys.modules)  # nothing came from elsewhere
"""


def test_the_hubs_folder_loads_twice_beside_itself(tmp_path: Path):
    first = build_hub.build(tmp_path / "first")
    edited = tmp_path / "second/build/torch-cuda"
    shutil.copytree(first, edited)
    (edited / "primitives.py").write_text((edited / "primitives.py").read_text() + "\n# of a later version\n")
    files = {str(p.relative_to(edited)): "" for p in edited.rglob("*.py")}
    (edited / "metadata.json").write_text(json.dumps(build_hub.metadata(files)))
    env = {**os.environ, "PYTHONPATH": "", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-I", "-c", COPIES, str(first), str(edited)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_the_hubs_metadata_says_what_the_folder_holds(tmp_path: Path):
    variant = build_hub.build(tmp_path / "hub")
    told = json.loads((variant / "metadata.json").read_text())
    found = {p.relative_to(variant).as_posix(): p.read_bytes() for p in variant.rglob("*") if p.is_file()}
    assert set(told["digest"]["files"]) == set(found) - {"metadata.json"}
    for path, digest in told["digest"]["files"].items():
        assert base64.b64decode(digest) == hashlib.sha256(found[path]).digest(), path
    assert told["id"].isidentifier() and told["backend"]["archs"] == ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
    assert (tmp_path / "hub/LICENSE").exists() and "library_name: kernels" in (tmp_path / "hub/README.md").read_text()
