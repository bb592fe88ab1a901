"""Launch rows, recording, overriding, and what ops refuse."""

import warnings

import kernel_case
import pytest
import torch
import triton
import triton.language as tl
from kernel_case import DEVICE
from nanogpt_kernels import contract, launch, registry
from nanogpt_kernels.contract import ContractError, require
from nanogpt_kernels.launch import TABLE, Row
from nanogpt_kernels.launch_rows import ARCHITECTURES, UNMEASURED
from nanogpt_kernels.registry import OPS

from nanogpt_fast.gpus import GPUS


@triton.jit
def _fill_kernel(y_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, at, mask=at < N)


ROWS = (
    Row(80, dict(BLOCK=16), num_warps=4, itemsize=2, up_to=64),
    Row(80, dict(BLOCK=32), num_warps=4, itemsize=2, up_to=128),
    Row(80, dict(BLOCK=8), num_warps=4, choices=dict(a=1, b=2)),
    Row(90, dict(BLOCK=64), num_warps=8, itemsize=2),
)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(TABLE, "fill", ROWS)


def meta(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(4, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    "arch, dtype, size, block",
    [
        (80, torch.bfloat16, 1, 16), (80, torch.bfloat16, 64, 16), (80, torch.bfloat16, 65, 32),
        (80, torch.bfloat16, 129, 8), (80, torch.float32, 1, 8),  # what no narrower row serves falls to the widest
        (86, torch.float16, 64, 16), (90, torch.bfloat16, 10**9, 64), (100, torch.bfloat16, 1, 64),
    ],
)  # fmt: skip
def test_the_nearest_row_from_below(table: None, arch: int, dtype: torch.dtype, size: int, block: int):
    with launch.recording(arch):
        assert launch.pick("fill", meta(dtype), size).blocks == dict(BLOCK=block)


def test_no_row_is_a_contract_error(table: None, monkeypatch: pytest.MonkeyPatch):
    with launch.recording(75), pytest.raises(ContractError, match=r"compute capability 8.0"):
        launch.pick("fill", meta(torch.bfloat16), 1)
    monkeypatch.setitem(TABLE, "fill", ROWS[:2])
    with launch.recording(80), pytest.raises(ContractError, match="no launch shape for size 999"):
        launch.pick("fill", meta(torch.bfloat16), 999)


def test_an_unlisted_gpu_is_said_once(table: None):
    launch._say_unlisted.cache_clear()
    with launch.recording(121):
        with pytest.warns(UserWarning, match="sm_121 is not listed"):
            launch.pick("fill", meta(torch.bfloat16), 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            launch.pick("fill", meta(torch.bfloat16), 1)


def test_override_replaces_single_entries_and_ends(table: None):
    with launch.recording(80):
        with launch.override("fill", blocks=dict(BLOCK=128), choices=dict(b=3), num_warps=2):
            with launch.override("fill", num_warps=1, choices=dict(a=7)):
                inner = launch.pick("fill", meta(torch.float32), 1)
                assert (inner.num_warps, inner.blocks, inner.choices) == (1, dict(BLOCK=128), dict(a=7, b=3))
            row = launch.pick("fill", meta(torch.float32), 1)
        assert (row.blocks, row.choices, row.num_warps) == (dict(BLOCK=128), dict(a=1, b=3), 2)
        assert launch.pick("fill", meta(torch.float32), 1) == ROWS[2]


def test_recording_collects_instead_of_launching(table: None):
    y = torch.empty(100, device="meta")
    with launch.recording(80) as calls:
        row = launch.pick("fill", y, 100)
        launch.launch("fill", _fill_kernel, (13,), y, 100, row=row)
    (call,) = calls
    assert (call.op, call.grid, call.options["BLOCK"], call.options["num_warps"]) == ("fill", (13,), 8, 4)
    assert call.options["enable_fp_fusion"] is True and "maxnreg" not in call.options
    launch.launch("fill", _fill_kernel, (13,), y, 100, row=row)  # outside: nothing happens, nothing is kept
    assert len(calls) == 1


def test_a_row_bounds_the_registers(table: None):
    y = torch.full((100,), -1.0, device=DEVICE)
    with launch.recording(80) as calls, launch.override("fill", max_registers=64):
        for x in (y, torch.empty(100, device="meta")):  # launched, then recorded
            launch.launch("fill", _fill_kernel, (13,), x, 100, row=launch.pick("fill", x, 100))
    assert torch.equal(y, torch.arange(100.0, device=DEVICE)) and calls[0].options["maxnreg"] == 64


def test_launching(table: None):
    y = torch.full((100,), -1.0, device=DEVICE)
    launch.launch("fill", _fill_kernel, (0,), y, 100, BLOCK=16)
    assert (y == -1).all()
    launch.launch("fill", _fill_kernel, (triton.cdiv(100, 16),), y, 100, BLOCK=16)
    assert torch.equal(y, torch.arange(100.0, device=DEVICE))


def test_compiled_kernels_refuse_the_cpu():
    compiled = triton.runtime.jit.JITFunction(_fill_kernel.fn)
    with pytest.raises(ContractError, match="need a CUDA device"):
        launch.launch("fill", compiled, (1,), torch.empty(4), 4, BLOCK=4)


@pytest.mark.parametrize("op", sorted(TABLE))
def test_every_row_says_where_it_comes_from(op: str):
    """Later rows of an op are never unreachable: no two serve the same architecture, itemsize and size."""
    rows = TABLE[op]
    assert rows, f"{op} has no row"
    assert len({(row.arch, row.itemsize, row.up_to) for row in rows}) == len(rows)
    for row in rows:
        assert row.source == UNMEASURED or row.source.startswith(("measured on ", "reasoned: ")), row
        assert row.arch in ARCHITECTURES and row.num_warps in (1, 2, 4, 8, 16, 32)
        assert all(isinstance(v, int) and v & (v - 1) == 0 for v in row.blocks.values()), row


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_architecture_has_the_multiprocessors_of_a_card_that_is_sold(arch: int):
    """The trainer's table of GPUs is another package's: here is where the two must agree."""
    assert ARCHITECTURES[arch].sms in {gpu.sms for gpu in GPUS.values() if gpu.capability == arch}


# ---- contracts ----


def test_a_broken_rule_names_operands():
    x = torch.empty(2, 6, dtype=torch.bfloat16, device=DEVICE)[:, ::2]
    with pytest.raises(ContractError) as caught:
        require(False, "norm", "the last dimension of r must be w's", r=x, eps=1e-5)
    lines = str(caught.value).splitlines()
    assert lines[0] == "norm: the last dimension of r must be w's"
    assert lines[1].startswith(f"  r: [2, 3] bfloat16 on {DEVICE}") and "strides (6, 2)" in lines[1]
    assert lines[2] == "  eps: 1e-05"
    require(True, "norm", "never said")


def test_devices_and_dtypes():
    with pytest.raises(ContractError, match="different devices"):
        contract.require_same_device("op", a=torch.empty(1), b=torch.empty(1, device="meta"), c=None)
    with pytest.raises(ContractError, match="w must be float32, bfloat16 or float16"):
        contract.require_float("op", x=torch.empty(1), w=torch.empty(1, dtype=torch.float64))


def test_values_are_checked_only_when_asked():
    ids = torch.tensor([[0, 4], [5, -1]], device=DEVICE)
    contract.require_in_range("embedding", "idx", ids, 5)
    with contract.checked():
        contract.require_in_range("embedding", "idx", ids, 6, ignore=-1)
        with pytest.raises(ContractError, match=r"idx must be in \[0, 5\), but idx\[1, 0\] is 5"):
            contract.require_in_range("embedding", "idx", ids, 5)
    assert not contract.checking_values()


# ---- registration ----


def test_an_op_is_its_own_fake():
    @registry.register("test_double(Tensor x) -> Tensor")
    def double(x: torch.Tensor) -> torch.Tensor:
        require(x.dim() == 1, "double", "x must be a vector", x=x)
        return 2 * x

    x = torch.arange(3.0, device=DEVICE)
    assert torch.equal(double(x), 2 * x)
    assert double(x.to("meta")).shape == (3,)
    torch.library.opcheck(OPS.test_double.default, (x,))
    with pytest.raises(ContractError):
        double(torch.ones(1, 1, device="meta"))


def test_a_second_derivative_is_refused():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @registry.once
        def backward(ctx, *grads):
            return 2 * grads[0]

    x = torch.ones(3, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(Double.apply(x).sum(), x)
    assert torch.equal(grad, torch.full_like(x, 2.0))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(Double.apply(x).sum(), x, create_graph=True)


def test_guards_are_what_they_say():
    with kernel_case.guarded():
        assert torch.empty(3).isnan().all() and torch.empty((2, 2), dtype=torch.int64).min() > 10**15
        assert torch.empty_like(torch.zeros(2, 3)).shape == (2, 3) and torch.ones(2).new_empty(4).isnan().all()
