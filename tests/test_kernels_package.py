"""`from nanogpt_kernels import attention` is the op, whatever was imported before, and is loaded when it is named."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import nanogpt_kernels
import pytest

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
    files = {name: f"nanogpt_kernels.ops.{file}" for name, file in nanogpt_kernels._FILE_OF.items()}
    assert told == files
