"""adamw_ and grad_norm against the reference and a float64 AdamW; what they must not write."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import kernel_case
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import DEVICE, DTYPES, guarded
from nanogpt_kernels import launch, reference
from nanogpt_kernels.contract import GRAD_NORM, LOSS_SCALE, LR, MAX_NORM, STEP, ContractError
from nanogpt_kernels.ops import adamw
from nanogpt_kernels.ops.adamw import adamw_, grad_norm
from nanogpt_kernels.registry import OPS
from parity import assert_parity
from torch import Tensor

N, BETAS, EPS = 700, (0.9, 0.95), 1e-8
Segments = list[tuple[int, int, float]]
ALIGNED: Segments = [(0, 128, 0.1), (128, 256, 0.0), (256, 512, 0.1), (512, 688, 0.3)]
ODD: Segments = [(0, 131, 0.1), (131, 132, 0.0), (132, 132, 0.5), (132, 517, 0.1), (517, 700, 0.3)]


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """Several tiles a segment, several partial sums a norm, several rounds a program."""
    norms = dict(blocks=dict(BLOCK=64), choices=dict(programs_per_sm=1))
    with launch.override("adamw", blocks=dict(BLOCK=128)), launch.override("grad_norm", **norms):
        yield


@dataclass
class Flat:
    """The buffers of one optimizer."""

    master: Tensor
    m: Tensor
    v: Tensor
    scalars: Tensor
    p: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.p, self.master, self.m, self.v) if t is not None]

    def update(self, g: Tensor, segments: Segments = ODD, betas: tuple[float, float] = BETAS) -> None:
        self.scalars[GRAD_NORM] = grad_norm(g).double()
        adamw_(self.p, self.master, self.m, self.v, g, self.scalars, segments, *betas, EPS)


def normal(seed: int, n: int = N) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def flat(p: torch.dtype | None = None, *, n: int = N, max_norm: float = 0.0, loss_scale: float = 1.0) -> Flat:
    scalars = torch.zeros(5, dtype=torch.float64, device=DEVICE)
    scalars[LR], scalars[MAX_NORM], scalars[LOSS_SCALE] = 1e-2, max_norm, loss_scale
    master = normal(0, n)
    return Flat(
        master, torch.zeros_like(master), torch.zeros_like(master), scalars, None if p is None else master.to(p)
    )


class Float64:
    """AdamW by its formulas, in float64."""

    def __init__(self, master: Tensor, segments: Segments):
        self.w, self.t = master.double(), 0
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)
        self.decay = torch.zeros_like(self.w)
        for start, end, decay in segments:
            self.decay[start:end] = decay

    def update(self, g: Tensor, lr: float, max_norm: float, betas: tuple[float, float] = BETAS) -> None:
        g, self.t = g.double(), self.t + 1
        if max_norm:
            g = g * min(1.0, max_norm / (float(g.norm()) + 1e-6))
        self.m = betas[0] * self.m + (1 - betas[0]) * g
        self.v = betas[1] * self.v + (1 - betas[1]) * g * g
        self.w = self.w * (1 - lr * self.decay)
        root = math.sqrt(1 - betas[1] ** self.t)
        self.w = self.w - lr / (1 - betas[0] ** self.t) * self.m / (self.v.sqrt() / root + EPS)


@pytest.mark.parametrize("segments", [ALIGNED, ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0], ids=lambda s: f"loss scale {s:g}")
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6], ids=["no clipping", "clipped", "never clipped"])
def test_twelve_steps(max_norm: float, loss_scale: float, segments: Segments):
    """Against torch's fused op in float32 and the formulas in float64, with a rate that changes."""
    end = segments[-1][1]
    ours, theirs = (flat(n=end, max_norm=max_norm, loss_scale=loss_scale) for _ in range(2))
    exact = Float64(ours.master, segments)
    for step in range(12):
        g, lr = normal(100 + step, end) * (step + 1), 1e-2 / (step + 1)
        ours.scalars[LR] = theirs.scalars[LR] = lr
        ours.update(g * loss_scale, segments)
        theirs.scalars[GRAD_NORM] = reference.grad_norm(g * loss_scale).double()
        reference.adamw_(None, theirs.master, theirs.m, theirs.v, g * loss_scale, theirs.scalars, segments, *BETAS, EPS)
        exact.update(g, lr, max_norm)
    for name, want in (("master", exact.w), ("m", exact.m), ("v", exact.v)):
        assert_parity(getattr(ours, name), getattr(theirs, name), want, tiny=1e-7, what=name)
    assert ours.scalars[STEP] == theirs.scalars[STEP] == 12


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.0), (0.9, 0.999)], ids=str)
@pytest.mark.parametrize("step", [0, 1, 2000, 10**6])
def test_one_step_from_any_state(step: int, betas: tuple[float, float]):
    """Bias corrections from 1 - beta to 1, betas of 0 among them."""
    ours, theirs = flat(), flat()
    exact = Float64(ours.master, ODD)
    for state in (ours, theirs):
        state.m.copy_(normal(1) * 0.1)
        state.v.copy_(normal(2).square())
        state.scalars[STEP] = step
    exact.m, exact.v, exact.t = ours.m.double(), ours.v.double(), step
    ours.update(normal(3), ODD, betas)
    theirs.scalars[GRAD_NORM] = 1.0
    reference.adamw_(None, theirs.master, theirs.m, theirs.v, normal(3), theirs.scalars, ODD, *betas, EPS)
    exact.update(normal(3), 1e-2, 0.0, betas)
    for name, want in (("master", exact.w), ("m", exact.m), ("v", exact.v)):
        assert_parity(getattr(ours, name), getattr(theirs, name), want, tiny=1e-7, what=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_are_the_rounded_master(dtype: torch.dtype):
    ours, alone = flat(dtype), flat()
    for step in range(3):
        ours.update(normal(step))
        alone.update(normal(step))
    assert ours.p is not None and torch.equal(ours.p, ours.master.to(dtype))
    assert torch.equal(ours.master, alone.master) and not torch.equal(ours.p, normal(0).to(dtype))


@pytest.mark.parametrize("max_norm", [0.0, 1.0], ids=["no clipping", "clipping"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_gradient_writes_nothing(bad: float, max_norm: float):
    ours = flat(torch.bfloat16, max_norm=max_norm, loss_scale=8.0)
    ours.update(normal(1))
    before = [t.clone() for t in (*ours.tensors(), ours.scalars[:GRAD_NORM])]
    g = normal(2)
    g[N - 1] = bad
    ours.update(g)
    assert all(torch.equal(a, b) for a, b in zip(before, (*ours.tensors(), ours.scalars[:GRAD_NORM]), strict=True))
    ours.update(normal(3))
    assert ours.scalars[STEP] == 2 and torch.isfinite(ours.master).all()
    assert not torch.equal(before[1], ours.master)


@pytest.mark.parametrize("segments", [[], [(3, 3, 0.1)], [(5, 130, 0.1), (300, 301, 0.0)]], ids=str)
def test_only_segments_are_touched(segments: Segments):
    """Elsewhere every bit stays, in p too; STEP advances with no segment at all, as the reference's does."""
    ours = flat(torch.float16)
    assert ours.p is not None
    ours.p.fill_(7.0)
    before = [t.clone() for t in ours.tensors()]
    ours.update(normal(1), segments)
    covered = torch.zeros(N, dtype=torch.bool, device=DEVICE)
    for start, end, _ in segments:
        covered[start:end] = True
    for a, b in zip(before, ours.tensors(), strict=True):
        assert torch.equal(a[~covered], b[~covered]) and (a[covered] != b[covered]).all()
    assert ours.scalars[STEP] == 1


@settings(max_examples=12, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, N), max_size=6), block=st.sampled_from([16, 64, 512]), shift=st.integers(0, 3))
def test_cutting_into_segments_and_tiles_changes_no_bit(cuts: list[int], block: int, shift: int):
    """Any bounds, any tile, any alignment of the buffers."""
    whole, cut = flat(torch.bfloat16), flat(torch.bfloat16)
    for name in ("master", "m", "v", "p"):
        buffer = torch.full((N + 4,), 99.0, device=DEVICE, dtype=getattr(cut, name).dtype)
        setattr(cut, name, buffer[shift : shift + N].copy_(getattr(cut, name)))
    bounds = sorted({0, N, *cuts})
    whole.update(normal(5), [(0, N, 0.1)])
    with launch.override("adamw", blocks=dict(BLOCK=block)):
        cut.update(normal(5), [(a, b, 0.1) for a, b in zip(bounds, bounds[1:])])
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), cut.tensors(), strict=True))


def test_the_table_of_tiles_is_built_once():
    """A captured graph holds its address; building it copies from the host, which a capture forbids."""
    ours = flat()
    ours.update(normal(1))
    built = adamw._tile_table.cache_info().misses
    ours.update(normal(2))
    assert adamw._tile_table.cache_info().misses == built


def test_nothing_waits_for_the_device():
    """Tensors without data: reading a value from them would raise."""
    with launch.recording(90) as calls:
        x = torch.empty(N, device="meta")
        grad_norm(x)
        adamw_(None, x, x, x, x, torch.empty(5, dtype=torch.float64, device="meta"), ODD, *BETAS)
    assert [call.op for call in calls] == ["grad_norm", "grad_norm", "adamw", "adamw"]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_captured_update_is_the_eager_one():
    eager, captured = flat(torch.bfloat16, max_norm=1.0), flat(torch.bfloat16, max_norm=1.0)
    g = normal(1)
    eager.update(g)
    captured.update(g)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.update(g)
    for step in range(3):
        g.copy_(normal(10 + step))
        eager.scalars[LR] = captured.scalars[LR] = 1e-3 * step
        eager.update(g)
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(eager.tensors(), captured.tensors(), strict=True))
    assert eager.scalars[STEP] == captured.scalars[STEP] == 4


def wrong_cases() -> dict[str, tuple[dict[str, object], str]]:
    return {
        "length": (dict(m=torch.zeros(N - 1, device=DEVICE)), "one length"),
        "strides": (dict(v=torch.zeros(2 * N, device=DEVICE)[::2]), "contiguous"),
        "dtype": (dict(g=torch.zeros(N, dtype=torch.bfloat16, device=DEVICE)), "must be float32"),
        "p": (dict(p=torch.zeros(N, dtype=torch.float64, device=DEVICE)), "p float32, bfloat16"),
        "scalars": (dict(scalars=torch.zeros(5, device=DEVICE)), r"float64 \[5\]"),
        "device": (dict(g=torch.zeros(N, device="meta")), "different devices"),
        "overlap": (dict(segments=[(0, 10, 0.1), (9, 20, 0.1)]), "not overlap"),
        "outside": (dict(segments=[(0, N + 1, 0.1)]), "not overlap"),
        "backwards": (dict(segments=[(20, 10, 0.1)]), "not overlap"),
        "beta": (dict(beta1=1.0), "betas"),
    }


@pytest.mark.parametrize("case", wrong_cases())
def test_contract(case: str):
    changes, message = wrong_cases()[case]
    ours = flat()
    arguments = dict(p=None, master=ours.master, m=ours.m, v=ours.v, g=normal(1), scalars=ours.scalars, segments=ODD,
                     beta1=0.9, beta2=0.95) | changes  # fmt: skip
    with pytest.raises(ContractError, match=message):
        adamw_(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [None, torch.bfloat16], ids=str)
def test_registration(p: torch.dtype | None):
    ours = flat(p)
    ours.scalars[GRAD_NORM] = 1.0
    starts, ends, decays = ([s[i] for s in ODD] for i in range(3))
    torch.library.opcheck(
        OPS.adamw_.default,
        (ours.p, ours.master, ours.m, ours.v, normal(1), ours.scalars, starts, ends, decays, *BETAS, EPS),
    )
    torch.library.opcheck(OPS.grad_norm.default, (normal(1),))


def test_compiled():
    eager, compiled = flat(torch.bfloat16, max_norm=1.0), flat(torch.bfloat16, max_norm=1.0)
    eager.update(normal(1))
    torch.compile(compiled.update, fullgraph=True, backend="aot_eager")(normal(1))
    assert all(torch.equal(a, b) for a, b in zip(eager.tensors(), compiled.tensors(), strict=True))
    assert compiled.scalars[STEP] == 1


# ---- grad_norm ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 63, 64, 1000, 1500])  # 1500: more tiles than the 8 programs
def test_norm(n: int, dtype: torch.dtype):
    g = (normal(n, n) * 3).to(dtype)
    with guarded():
        got = grad_norm(kernel_case.between_margins(g))
    assert got.shape == () and got.device.type == DEVICE.type
    assert_parity(got, torch.linalg.vector_norm(g.float()), g.double().norm(), tiny=1.2e-7, what="norm")
    assert torch.equal(got, grad_norm(g))


def test_norm_of_any_layout():
    g = normal(1, 1200)
    assert_parity(grad_norm(g[1:]), reference.grad_norm(g[1:]), g[1:].double().norm(), tiny=1.2e-7)
    assert torch.equal(grad_norm(g.view(30, 40).t()), grad_norm(g.view(30, 40).t().contiguous()))
    assert grad_norm(g[:0]) == 0.0


@pytest.mark.parametrize("bad", [[math.inf], [math.nan], [-math.inf, math.nan], [1e20], [1e-30]], ids=str)
def test_norm_of_extremes(bad: list[float]):
    """As torch: NaN before infinity, squares over and under float32's range infinite and 0."""
    g = torch.zeros(300, device=DEVICE)
    g[[70 * (i + 1) for i in range(len(bad))]] = torch.tensor(bad, device=DEVICE)
    torch.testing.assert_close(grad_norm(g), torch.linalg.vector_norm(g), equal_nan=True)


def test_programs_together_do_not_overflow():
    """Each program's sum of squares, 2.25e38, fits in float32; all together only in float64."""
    g = torch.zeros(512, device=DEVICE)
    g[::64] = 1.5e19
    torch.testing.assert_close(grad_norm(g), torch.tensor(1.5e19 * math.sqrt(8), device=DEVICE))


def test_norm_refuses_integers():
    with pytest.raises(ContractError, match="g must be float32"):
        grad_norm(torch.zeros(4, dtype=torch.int64, device=DEVICE))
