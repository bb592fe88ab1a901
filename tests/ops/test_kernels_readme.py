"""kernels/README.md's examples run as they stand there, and ours compute what they replace."""

import re
from pathlib import Path
from typing import Any

import nanogpt_kernels
import pytest
import torch
from kernel_case import DEVICE, randn

README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
REPLACEMENTS = [block for block in BLOCKS if "# ours" in block]


def test_the_example_runs():
    code = next(block for block in BLOCKS if "# ours" not in block)
    assert 'device, dtype = "cuda"' in code
    names: dict = {}
    exec(code.replace('device, dtype = "cuda"', f'device, dtype = "{DEVICE.type}"'), names)
    loss, V = names["loss"], names["V"]
    assert loss.isfinite() and loss > 0
    for name in ("qkv", "w", "head"):
        assert names[name].grad.isfinite().all() and names[name].grad.any()
    assert names["head"].size(0) == V


def test_every_op_file_is_in_the_table():
    table = README.read_text()
    for path in (README.parent / "nanogpt_kernels/ops").iterdir():
        known = path.stem in {"__init__", "__pycache__", "column_sums"} or f"{path.name}" in table
        assert known, path.name


def operands() -> dict[str, Any]:
    """What the page's replacements are written in."""
    B, T, H, D, V = 2, 5, 2, 4, 19
    C = H * D
    matrices = dict(w_qkv=(3 * C, C), w_fc=(4 * C, C), w_proj=(C, 4 * C), head=(V, C), wte=(V, C), wpe=(T, C))
    vectors = dict(g=(C,), b=(C,), bias=(C,), b_qkv=(3 * C,), b_fc=(4 * C,), weight=(37,))
    wide = dict(x=(B, T, C), r=(B, T, C), delta=(B, T, C), qkv=(B, T, 3 * C), logits=(B, T, V))
    shapes = matrices | vectors | wide
    made: dict[str, Any] = {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    made["weight"].grad = randn(37, seed=99).detach()
    made |= {name: torch.zeros(37, device=DEVICE) for name in ("exp_avg", "exp_avg_sq")}
    ids = torch.arange(B * T, device=DEVICE).view(B, T)
    made |= dict(idx=ids % V, targets=(ids * 3) % V, seed=torch.tensor([1], device=DEVICE), site=0, p=0.0)
    ops = {name: getattr(nanogpt_kernels, name) for name in nanogpt_kernels.__all__}
    return ops | made | dict(B=B, T=T, H=H, D=D, C=C, V=V, F=torch.nn.functional, torch=torch)


@pytest.mark.parametrize("block", REPLACEMENTS, ids=lambda block: re.findall(r"(\w+)\(", block.split("# ours")[1])[0])
def test_ours_computes_what_it_replaces(block: str):
    torchs, ours = block.split("# ours\n")
    assert len(ours.splitlines()) <= 3
    result = ["weight", *re.findall(r"^(\w+) = ", torchs, re.MULTILINE)][-1]
    found = []
    for code in (torchs, ours):
        names = operands()
        inputs = {name: t for name, t in names.items() if isinstance(t, torch.Tensor) and t.requires_grad}
        exec(code, names)
        out = names[result]
        grads: tuple[Any, ...] = ()
        if result != "weight":
            grads = torch.autograd.grad(out.square().sum(), list(inputs.values()), allow_unused=True)
            assert any(grad is not None for grad in grads)
        found.append((out.detach(), *grads))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_every_op_is_in_a_replacement():
    ours = "\n".join(block.split("# ours")[1] for block in REPLACEMENTS)
    others = {"norm", "cached_attention"}  # layernorm's other name; generation's
    assert {op for op in nanogpt_kernels.__all__ if not re.search(rf"\b{op}\(", ours)} == others
