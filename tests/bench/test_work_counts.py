"""The FLOPs of bench/cases.py against what torch's own FlopCounterMode counts of the reference ops."""

import cases
import harness
import pytest
import torch
import torch.utils.flop_counter as flop_counter
from nanogpt_kernels import reference
from op_inputs import Setting, Shape
from work import Work

CPU, SHAPE = torch.device("cpu"), Shape(B=2, T=32, C=16, H=2, V=40, N=100)


def counted(op: str) -> tuple[dict[str, int], dict[str, int]]:
    """{operator: FLOPs} of forward, and of forward and backward."""
    at = Setting(SHAPE, dtype=torch.float32, device=CPU)
    found = []
    for backward in (False, True):
        bound = harness.plain(getattr(reference, op)).bind(*cases.CASES[op].inputs(at))
        with flop_counter.FlopCounterMode(display=False) as counter:
            outs = harness.outputs_of(bound.forward())
        if backward and cases.differentiable(op, at):
            with flop_counter.FlopCounterMode(display=False) as counter:
                harness.both(bound, cases.douts_of(outs, at))
        counts = counter.get_flop_counts().get("Global", {})
        found.append({str(name).removeprefix("aten."): flops for name, flops in counts.items()})
    return found[0], found[1]


def work(op: str) -> tuple[Work, Work]:
    forward, backward = cases.CASES[op].work(SHAPE, 4)
    return forward, forward + backward if backward else forward


@pytest.mark.parametrize("op", ["mlp", "linear_cross_entropy"])
def test_products_are_counted_as_torch_counts_them(op: str):
    ours, torch_s = work(op), counted(op)
    assert ours[0].flops > 0
    assert [w.flops for w in ours] == [sum(counts.values()) for counts in torch_s]


@pytest.mark.parametrize("op", ["norm", "add_norm", "bias_gelu", "adamw_", "grad_norm", "embedding", "dropout_add"])
def test_what_makes_no_products_counts_none(op: str):
    if hasattr(reference, op):
        assert not any(sum(counts.values()) for counts in counted(op))
    assert [w.flops for w in work(op)] == [0.0, 0.0]


def test_causal_attention_is_half_of_torch_s_full_square():
    """torch counts all T^2 pairs whatever is_causal says: 2 products forward and 5 backward, where the scores are made
    again. So do we, of half the pairs. These are its formulas; the CPU's fused operator has none and counts nothing."""
    shape = (SHAPE.B, SHAPE.H, SHAPE.T, SHAPE.C // SHAPE.H)
    ours_forward, ours_both = work("attention")
    assert 2 * ours_forward.flops == flop_counter.sdpa_flop_count(shape, shape, shape) > 0
    backward = flop_counter.sdpa_backward_flop_count(shape, shape, shape, shape)
    assert 2 * (ours_both.flops - ours_forward.flops) == backward > 0


def test_qkv_attention_is_its_products_and_attention():
    forward, both = counted("qkv_attention")
    products = [sum(flops for name, flops in counts.items() if "attention" not in name) for counts in (forward, both)]
    attention, ours = work("attention"), work("qkv_attention")
    assert [w.flops - a.flops for w, a in zip(ours, attention)] == products
