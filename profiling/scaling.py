"""A training step on N GPUs, before there are any: its compute on one GPU, its collectives, and what of them hides.

The step of one rank is played through, not given by a formula: compute in its order, collectives in theirs on one
stream beside it, each begun when what it sends is ready and the one before has ended.

    ddp     float32 gradients are all-reduced in buckets of whole blocks, last to first, in the last micro-step alone,
            each once the lowest block in it has finished its backward, a head of its own before them all. The
            embeddings' bucket and the vectors come after the backward and hide behind nothing; then a few bytes
            (loss, votes, norm); then AdamW on everything.
    zero1   the same buckets are reduce-scattered, the vectors all-reduced; AdamW on a share; the 16-bit parameters are
            gathered in forward order at the next iteration's start, beside its first forward pass.

Compute is the floor of roofline.step_work, op by op, times what a GPU needs over its floor (Rate). interconnect.py has
the collectives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from interconnect import Fabric, Transfer
from measured_roof import Roof
from roofline import floor_of, step_work
from work import FULL, HALF, Work, adamw_bytes, grad_norm_bytes

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.hardware import flops_per_token
from nanogpt_fast.memory import Plan, peak
from nanogpt_fast.optim import BUCKET, joined_blocks
from nanogpt_fast.settings.config import GPTConfig

REPORT_BYTES = 32  # loss, votes to stop and to save, squared norm: float64 each
PARALLEL = ("ddp", "zero1")
# AdamW, norm and zeroing run at what a copy reaches of the data sheet's bandwidth: 2.95 of 3.35 TB/s (bounds.MEASURED).
COPY_SHARE = 2.95 / 3.35


# ---- compute of one GPU ----


@dataclass(frozen=True)
class Rate:
    """What a GPU's compute takes: its floor times `over`, and `layer` seconds for each layer's forward and backward
    however few tokens it has."""

    over: float = 1.0
    layer: float = 0.0
    source: str = "the floor by the data sheet: a bound, not an expectation"


# GPT-2 124M's steps in a row on an H100, bench/results/h100/2026-11-27-3849647.jsonl (ms of 524,288 tokens): 899.4 in
# micro-batches of 64, 902.6 of 32, 985.4 of 4. The first and the last give both numbers, and the second within 1%.
MEASURED = Rate(1.60, 59e-6, "as GPT-2 124M was measured on an H100: 1.6 times the floor, and 59 us a layer")


@dataclass(frozen=True)
class Compute:
    """Seconds of a micro-step's parts, on one GPU."""

    embed: float  # forward
    block: float
    head: float  # both ways: linear_cross_entropy makes its gradients in forward
    block_backward: float
    embed_backward: float
    layers: int

    @property
    def micro_step(self) -> float:
        return self.embed + self.embed_backward + self.head + self.layers * (self.block + self.block_backward)


FORWARD = {"qkv", "attention", "attention projection", "fc + GELU", "MLP projection", "residual + LayerNorm"}
HEAD = {"head", "head, dgrad", "head, wgrad", "cross-entropy in place"}
EMBEDDING, ONCE = "embedding, both ways", "gradient norm, AdamW, zeroing"


def phases(works: Mapping[str, Work]) -> dict[str, list[Work]]:
    """The ops of step_work by when they run."""
    found: dict[str, list[Work]] = {"forward": [], "backward": [], "head": [], "embedding": [], "once": []}
    for op, work in works.items():
        phase = "forward" if op in FORWARD else "head" if op in HEAD else "backward"
        found[{EMBEDDING: "embedding", ONCE: "once"}.get(op, phase)].append(work)
    return found


def compute_of(shape: GPTConfig, batch: int, roof: Roof, rate: Rate, recompute: str = "none") -> Compute:
    """Of a micro-step of `batch` sequences; with recompute "block" a block's backward runs its forward again."""
    parts = phases(step_work(shape, batch, 1, deterministic=True))
    seconds = {name: sum(floor_of(w, roof)[0] for w in works) * rate.over for name, works in parts.items()}
    block = seconds["forward"] / shape.n_layer + rate.layer / 3
    return Compute(
        embed=seconds["embedding"] * 2 / 3,  # two rows of three, work.embedding_bytes
        block=block,
        head=seconds["head"],
        block_backward=seconds["backward"] / shape.n_layer + rate.layer * 2 / 3 + (recompute == "block") * block,
        embed_backward=seconds["embedding"] / 3,
        layers=shape.n_layer,
    )


def update_seconds(shape: GPTConfig, ranks: int, roof: Roof, parallel: str = "ddp") -> float:
    """Gradient norm, AdamW and zeroing: of everything, or of a rank's share of the matrices; all of g is zeroed."""
    assert roof.bandwidth, roof
    matrices, vectors = matrix_elements(shape), vector_elements(shape)
    own = vectors + (matrices / ranks if parallel == "zero1" else matrices)
    moved = (grad_norm_bytes(1) + adamw_bytes(1, HALF)) * own + FULL * (matrices + vectors)
    return moved / (roof.bandwidth * COPY_SHARE)


def rate_of_mfu(
    mfu: float, shape: GPTConfig, batch: int, micro_steps: int, roof: Roof, recompute: str = "none"
) -> Rate:
    """The Rate at which a step on one GPU has this MFU (nanoGPT's count). ConfigError for one above the floor's."""
    assert roof.flops, roof
    tokens = batch * micro_steps * shape.block_size
    wanted = flops_per_token(shape)["nanogpt"] * tokens / (roof.flops * mfu)
    floor = compute_of(shape, batch, roof, Rate(), recompute).micro_step * micro_steps
    once = update_seconds(shape, 1, roof)
    if wanted < floor + once:
        most = flops_per_token(shape)["nanogpt"] * tokens / (roof.flops * (floor + once))
        raise ConfigError(
            "no step is so fast", where=f"--mfu={mfu:g}", expected=f"above 0, at most {most:.3f}, the floor's MFU"
        )
    return Rate((wanted - once) / floor, 0.0, f"supposed: an MFU of {mfu:.1%} on one GPU (nanoGPT's count)")


# ---- what is sent ----


def matrix_elements(shape: GPTConfig) -> int:
    return 12 * shape.n_embd**2 * shape.n_layer + embedding_elements(shape) + shape.head_params


def embedding_elements(shape: GPTConfig) -> int:
    return (shape.vocab_size + shape.block_size) * shape.n_embd


def vector_elements(shape: GPTConfig) -> int:
    return shape.num_params(non_embedding=False) - matrix_elements(shape)


def buckets(shape: GPTConfig, bucket_mb: float = BUCKET) -> list[range]:
    """Blocks that are reduced together, in the order of backward."""
    return joined_blocks([12 * shape.n_embd**2] * shape.n_layer, bucket_mb * 1e6 / FULL)


@dataclass(frozen=True)
class Step:
    """A rank's step. bare: seconds that compute waited for collectives, by what it waited for."""

    seconds: float
    compute: float  # of the micro-steps
    update: float
    communication: float  # of all collectives, whether hidden or not
    bare: dict[str, float]
    latency: dict[str, float]  # the share of latency in what it waited for
    sent: float  # bytes a rank, by rings

    @property
    def hidden(self) -> float:
        return self.communication - sum(self.bare.values())


QUEUE, LAST, REPORT, GATHER = "blocks' buckets", "last bucket", "report", "gathers"  # QUEUE: a head of its own too


@dataclass
class _Streams:
    """Compute and the stream of collectives beside it."""

    now: float = 0.0  # of compute
    free: float = 0.0  # of the collectives
    sent: list[tuple[str, Transfer]] = field(default_factory=list)
    bare: dict[str, float] = field(default_factory=lambda: dict.fromkeys((QUEUE, LAST, REPORT, GATHER), 0.0))

    def send(self, what: str, transfer: Transfer) -> float:
        """When it has ended, begun now or after the one before."""
        self.free = max(self.now, self.free) + transfer.seconds
        self.sent.append((what, transfer))
        return self.free

    def wait(self, what: str, until: float) -> None:
        self.bare[what] += max(0.0, until - self.now)
        self.now = max(self.now, until)


def play(
    compute: Compute,
    update: float,
    shape: GPTConfig,
    fabric: Fabric,
    ranks: int,
    micro_steps: int,
    parallel: str = "ddp",
    reduce_bytes: int = FULL,
    bucket_mb: float = BUCKET,
) -> Step:
    """One iteration of many, from the first micro-step's start to the update's end."""
    streams, groups = _Streams(), buckets(shape, bucket_mb)
    zero1, block = parallel == "zero1", 12 * shape.n_embd**2
    reduce = fabric.reduce_scatter if zero1 else fabric.all_reduce
    gathered: dict[int, float] = {}  # {a bucket's first block: when it is there}
    head = [(shape.n_layer, shape.head_params)] if shape.head_params else []
    if zero1:  # -1 stands for the embeddings, which come first
        blocks = [(group[0], block * len(group)) for group in reversed(groups)]
        for first, elements in ((-1, embedding_elements(shape)), *blocks, *head):
            gathered[first] = streams.send(GATHER, fabric.all_gather(HALF * elements, ranks))
    for micro_step in range(micro_steps):
        forward = [compute.block] * shape.n_layer + [compute.head]
        for i, seconds in enumerate([compute.embed, *forward], start=-1):
            streams.wait(GATHER, gathered.get(i, 0.0))
            streams.now += seconds
        backward = [(0.0, elements) for _, elements in head]  # its gradient is made in forward
        backward += [(compute.block_backward * len(group), block * len(group)) for group in groups]
        for seconds, elements in backward:
            streams.now += seconds
            if micro_step == micro_steps - 1:
                streams.send(QUEUE, reduce(reduce_bytes * elements, ranks))
        streams.now += compute.embed_backward
    streams.wait(QUEUE, streams.free)
    streams.send(LAST, reduce(reduce_bytes * embedding_elements(shape), ranks))
    streams.send(LAST, fabric.all_reduce(FULL * vector_elements(shape), ranks))
    streams.wait(LAST, streams.free)
    streams.wait(REPORT, streams.send(REPORT, fabric.all_reduce(REPORT_BYTES, ranks)))
    return Step(
        seconds=streams.now + update,
        compute=compute.micro_step * micro_steps,
        update=update,
        communication=sum(t.seconds for _, t in streams.sent),
        bare=streams.bare,
        latency={what: _latency(what, streams.sent) for what in streams.bare},
        sent=sum(t.sent for _, t in streams.sent),
    )


def _latency(what: str, sent: Sequence[tuple[str, Transfer]]) -> float:
    of = [t for name, t in sent if name == what]
    return sum(t.latency for t in of) / (sum(t.seconds for t in of) or 1.0)


# ---- how N ranks share an iteration ----


@dataclass(frozen=True)
class Share:
    """A rank's part of an iteration; flags: what keeps the tokens where the configuration's numbers do not divide."""

    batch: int
    micro_steps: int
    flags: str = ""


def strong_share(batch: int, accumulation: int, ranks: int) -> Share:
    """The same sequences an iteration over all ranks: fewer micro-steps, and where ranks do not divide them, smaller
    ones. ConfigError where they do not divide the sequences."""
    if accumulation % ranks == 0:
        return Share(batch, accumulation // ranks)
    sequences = batch * accumulation
    if sequences % ranks:
        fits = [n for n in range(1, sequences + 1) if sequences % n == 0]
        near = [*[n for n in fits if n < ranks][-1:], *[n for n in fits if n > ranks][:1]]
        raise ConfigError(
            f"{sequences} sequences an iteration do not divide by {ranks} ranks",
            where=f"batch_size {batch} x gradient_accumulation_steps {accumulation}",
            expected=f"{' or '.join(map(str, near))} ranks, or another batch",
            hint=f"--gradient_accumulation_steps={max(1, round(accumulation / ranks)) * ranks}",
        )
    own = sequences // ranks
    smaller = max(n for n in range(1, min(batch, own) + 1) if own % n == 0)
    flags = f"--batch_size={smaller} --gradient_accumulation_steps={sequences // smaller}"
    return Share(smaller, own // smaller, flags)


def weak_share(batch: int, accumulation: int, first: int) -> Share:
    """A rank's micro-steps as it has them among `first`: more ranks, more tokens an iteration. ConfigError where those
    do not divide the micro-batches."""
    if accumulation % first:
        raise ConfigError(
            "gradient_accumulation_steps counts the micro-batches of all ranks and must divide by their number",
            where=f"gradient_accumulation_steps = {accumulation}, {first} ranks",
            expected=f"a multiple of {first}",
            hint=f"--gradient_accumulation_steps={-(-accumulation // first) * first}",
        )
    return Share(batch, accumulation // first)


# ---- memory ----


@cache
def whole_memory(plan: Plan) -> int:
    return sum(peak(plan).values())


def rank_memory(plan: Plan, share: Share, ranks: int, parallel: str) -> int:
    """Bytes that a rank holds at its step's peak, by memory.peak; NCCL's own buffers are not counted."""
    batch = {"batch_size": share.batch, "micro_batches": share.micro_steps}
    return whole_memory(replace(plan, ranks=ranks if parallel == "zero1" else 1, parallel=parallel, **batch))
