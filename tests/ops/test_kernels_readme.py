"""kernels/README.md's example runs as it stands there."""

import re
from pathlib import Path

from kernel_case import DEVICE

README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"


def test_the_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
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
