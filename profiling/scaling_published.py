"""The model of roofline.py's --world beside what others published: collectives, speeds on 8 GPUs, and more of them.

Three questions, a table each. Does interconnect.py take as long as nccl-tests did? How far is our predicted step from
others' on the same machine: their kernels are not ours, so most of that is compute, and `bare` says how much
communication could explain at most. And with compute set so that the fewest GPUs come out as published: does the model
lose as much speed on more GPUs as they did?
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from interconnect import Fabric, fabric
from measured_roof import Roof, sheet_roof
from op_inputs import GPT2
from roofline import print_beside
from scaling import MEASURED, Rate, Share
from scaling_table import Run
from work import FULL, HALF

from nanogpt_fast.gpus import CHOICES
from nanogpt_fast.settings.config import GPTConfig

GPT2_SHAPES = {name: replace(shape, bias=False) for name, shape in GPT2.items()}
# MosaicML's: llm-foundry scripts/train/yamls/pretrain/mpt-*.yaml; biases, a tied head, vocabulary 50,368. num_params is
# the table's NumParams.
MPT_SHAPES = {
    name: GPTConfig(block_size=1024, vocab_size=50368, n_layer=layers, n_head=heads, n_embd=width, bias=True)
    for name, layers, heads, width in (("125m", 12, 12, 768), ("350m", 24, 16, 1024), ("760m", 24, 12, 1536),
                                       ("1b", 24, 16, 2048))
}  # fmt: skip

Table = tuple[list[str], list[list[str]]]  # header, rows


def roof_of(gpu: str) -> Roof:
    roof = sheet_roof(CHOICES[gpu], "bfloat16")
    assert roof is not None, gpu
    return roof


# ---- collectives ----


@dataclass(frozen=True)
class Timed:
    """An all-reduce of nccl-tests or the like."""

    what: str
    fabric: Fabric
    ranks: int
    size: float  # bytes
    seconds: float
    source: str


def _of_busbw(ranks: int, size: float, busbw: float) -> float:
    """nccl-tests' doc/PERFORMANCE.md: busbw = S/t x 2 (N - 1)/N."""
    return 2 * (ranks - 1) / ranks * size / busbw


_TWO_H100_NODES = "drmysore/nebius-h100-16gpu-benchmark"
TIMED = (
    *(Timed("16 H100, 2 nodes, InfiniBand", fabric("ib", "h100"), 16, mib * 2.0**20, ms / 1e3, _TWO_H100_NODES)
      for mib, ms in ((1, 0.088), (10, 0.157), (100, 0.647), (1024, 4.520))),
    Timed("8 H100, NVLink, rings", fabric("nvlink", "h100"), 8, 2.0**33, _of_busbw(8, 2.0**33, 370e9),
          "NVIDIA/nccl-tests issue 212"),
    Timed("8 H100, NVLink SHARP, as by default", fabric("nvlink", "h100"), 8, 2.0**33, _of_busbw(8, 2.0**33, 480e9),
          "NVIDIA/nccl-tests issue 212"),
    Timed("8 A100, NVLink", fabric("nvlink", "a100"), 8, 2.0**32, _of_busbw(8, 2.0**32, 235e9),
          "stas00/ml-engineering, network"),
    # its GPUs are not named, nor how many a node: N = 8 is what busbw / algbw is of
    Timed("8 GPUs, 2 nodes of 4 HDR cards", Fabric(4, 240e9, 4 * 25e9 * 0.94), 8, 2.0**29, 10052e-6,
          "NVIDIA/nccl-tests issue 252"),
)  # fmt: skip


def collectives() -> Table:
    rows = []
    for timed in TIMED:
        found = timed.fabric.all_reduce(timed.size, timed.ranks).seconds
        rows.append([timed.what, f"{timed.size / 2**20:,.0f}", f"{timed.seconds * 1e3:,.3f}", f"{found * 1e3:,.3f}",
                     f"{found / timed.seconds - 1:+.0%}", timed.source])  # fmt: skip
    return ["all-reduce", "MiB", "published ms", "model ms", "off by", "source"], rows


# ---- speeds on 8 GPUs ----


@dataclass(frozen=True)
class Anchor:
    """A published speed; tokens_per_s a GPU, as bench/published.toml has it, where its source and caveats are."""

    source: str
    model: str
    shape: GPTConfig
    gpu: str
    batch: int
    micro_steps: int  # a rank's
    tokens_per_s: float
    parallel: str = "zero1"
    reduce_bytes: int = HALF
    ranks: int = 8

    def run(self, rate: Rate, link: str = "ib") -> Run:
        return Run(gpu=self.gpu, shape=self.shape, batch=self.batch, accumulation=self.micro_steps * self.ranks,
                   roof=roof_of(self.gpu), rate=rate, fabric=fabric(link, self.gpu), parallel=self.parallel,
                   reduce_bytes=self.reduce_bytes)  # fmt: skip


# Batches: llm.c's scripts (-b, -d; -z 1 is ZeRO-1, gradients are bfloat16), MosaicML's table (its FULL_SHARD gathers
# parameters twice a micro-step; here it is modelled as ZeRO-1), nanoGPT's issue 110 (5 x 12 x 1024 a GPU, float32 DDP).
ANCHORS = (
    Anchor("llm.c", "GPT-2 124M", GPT2_SHAPES["124m"], "a100", 64, 1, 218000),
    Anchor("llm.c", "GPT-2 350M", GPT2_SHAPES["350m"], "a100", 64, 1, 79900),
    Anchor("llm.c", "GPT-2 774M", GPT2_SHAPES["774m"], "a100", 32, 2, 38600),
    Anchor("llm.c", "GPT-2 1558M", GPT2_SHAPES["1558m"], "h100", 16, 8, 46800),
    Anchor("llm.c, timed by modded-nanogpt", "GPT-2 124M", GPT2_SHAPES["124m"], "h100", 64, 1, 475000),
    *(Anchor("MosaicML llm-foundry", model, MPT_SHAPES[model], gpu, batch, micro_steps, speed, reduce_bytes=FULL)
      for model, gpu, batch, micro_steps, speed in (
          ("125m", "a100", 64, 2, 156468), ("350m", "a100", 64, 2, 64813), ("760m", "a100", 48, 2, 29765),
          ("1b", "a100", 18, 4, 22112), ("760m", "h100", 48, 2, 78581), ("1b", "h100", 18, 4, 48910))),
    Anchor("nanoGPT", "GPT-2 124M", GPT2_SHAPES["124m"], "a100", 12, 5, 109000, "ddp", FULL),
    Anchor("nanoGPT", "GPT-2 124M", GPT2_SHAPES["124m"], "a100-40gb", 12, 5, 106700, "ddp", FULL),
)  # fmt: skip


def speeds() -> Table:
    rows = []
    for anchor in ANCHORS:
        share, cells = Share(anchor.batch, anchor.micro_steps), []
        for rate in (MEASURED, Rate()):
            found = anchor.run(rate).row(anchor.ranks, share).speed / anchor.ranks
            cells += [f"{found / 1e3:,.1f}", f"{found / anchor.tokens_per_s - 1:+.0%}"]
        step = anchor.run(MEASURED).step(anchor.ranks, share)
        cells.append(f"{sum(step.bare.values()) / step.seconds:.1%}")
        of = [anchor.source, anchor.model, f"{anchor.ranks} {anchor.gpu}", f"{anchor.micro_steps} x {anchor.batch}"]
        rows.append([*of, f"{anchor.tokens_per_s / 1e3:,.1f}", *cells])
    header = ["source", "model", "GPUs", "micro-steps", "published K tokens/s a GPU", "model, as measured", "off by",
              "model, floor", "off by", "bare"]  # fmt: skip
    return header, rows


# ---- more GPUs ----


@dataclass(frozen=True)
class Curve:
    """Speeds a GPU at several numbers of GPUs, one micro-step of the same sequences a rank: weak scaling."""

    model: str
    gpu: str
    batch: int
    speeds: dict[int, float]  # {GPUs: tokens/s a GPU}
    block_size: int = 2048


# llm-foundry's scripts/train/benchmarking/README.md, T = 2048, one micro-step; the A100s have 1600 Gbit/s of RoCE a
# node by its heading, of the H100s it says nothing. Left out: 1b on 32 A100, 15,555 beside 19,001 on 64.
CURVES = (
    Curve("125m", "a100-40gb", 26, {16: 130535, 32: 127122, 64: 125234, 128: 123936}),
    Curve("350m", "a100-40gb", 18, {16: 55413, 32: 53811, 64: 52689, 128: 51934}),
    Curve("760m", "a100-40gb", 12, {16: 29607, 32: 29648, 64: 29344, 128: 28940}),
    Curve("1b", "a100-40gb", 10, {64: 19001, 128: 18647}),
    Curve("760m", "h100", 24, {16: 68551, 32: 67971}),
    Curve("1b", "h100", 20, {16: 46037, 32: 45130, 64: 44402}),
)


def fitted(run: Run, ranks: int, speed: float) -> Run:
    """The run with compute such that a GPU among `ranks` has this speed; by bisection."""
    low, high = 1.0, 10.0
    for _ in range(40):
        run = replace(run, rate=Rate((low + high) / 2))
        faster = run.row(ranks, Share(run.batch, 1)).speed / ranks > speed
        low, high = (run.rate.over, high) if faster else (low, run.rate.over)
    return run


def curve_runs() -> Iterator[tuple[Curve, Run]]:
    for curve in CURVES:
        shape = replace(MPT_SHAPES[curve.model], block_size=curve.block_size)
        run = Run(gpu=curve.gpu, shape=shape, batch=curve.batch, accumulation=1, roof=roof_of(curve.gpu), rate=Rate(),
                  fabric=fabric("ib", curve.gpu), parallel="zero1")  # fmt: skip
        first = min(curve.speeds)
        yield curve, fitted(run, first, curve.speeds[first])


def more_gpus() -> Table:
    rows = []
    for curve, run in curve_runs():
        first = min(curve.speeds)
        for ranks in list(curve.speeds)[1:]:
            published = curve.speeds[ranks] / curve.speeds[first]
            found = run.row(ranks, Share(curve.batch, 1)).speed / ranks / curve.speeds[first]
            rows.append([f"MPT {curve.model}, {curve.batch} x {curve.block_size}", curve.gpu, f"{first} to {ranks}",
                         f"{published:.1%}", f"{found:.1%}", f"{100 * (found - published):+.1f}"])  # fmt: skip
    return ["model, micro-batch", "GPU", "GPUs", "speed a GPU kept", "model", "points off"], rows


TITLES = {
    "collectives": "collectives by interconnect.py, beside nccl-tests",
    "speeds": "our predicted step, beside others' published speeds (sources: bench/published.toml)",
    "more_gpus": "speed kept on more GPUs, compute fitted to the fewest (MosaicML llm-foundry)",
}
TABLES = {"collectives": collectives, "speeds": speeds, "more_gpus": more_gpus}


def show_published() -> None:
    for name, title in TITLES.items():
        header, rows = TABLES[name]()
        print(f"{title}\n")
        print_beside(header, rows)
        print()
