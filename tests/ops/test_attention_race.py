"""bench/race.py on attention: at the tiles it ships with, over lengths that fill them and lengths that do not.

wgmma with operands in registers is where ptxas before 13 can go wrong on Hopper (triton-lang/triton#11781); small tiles
do not use it.
"""

from dataclasses import replace

import cases
import kernel_case
import pytest
import race
from op_inputs import Setting


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(kernel_case.DEVICE.type != "cuda", reason="needs a CUDA GPU: races do not show elsewhere")
@pytest.mark.parametrize("op", ["attention", "qkv_attention"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("T", [1024, 1000])
def test_many_runs_give_the_same_bits(op: str, p: float, T: int):
    at = Setting(replace(cases.SHAPES["race"], T=T), device=kernel_case.DEVICE, p=p)
    counts = race.race(op, at, 300, race.Ballast(at.device, 512))
    assert len(counts) > 1 and not any(counts.values()), f"runs that differ: {counts}; see TRITON_PTXAS_PATH"
