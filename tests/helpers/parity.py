"""The two-reference rule (nanogpt_fast/agreement.py) as an assertion."""

from torch import Tensor

from nanogpt_fast.agreement import FACTOR as FACTOR
from nanogpt_fast.agreement import disagreement


def assert_parity(ours: Tensor, same_dtype: Tensor, ref64: Tensor, *, tiny: float, what: str = "result") -> None:
    """Raise AssertionError, `what` first, where the rule does not hold."""
    wrong = disagreement(ours, same_dtype, ref64, tiny=tiny)
    assert not wrong, f"{what}: {wrong}"
