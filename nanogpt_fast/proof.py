"""A set of ops held to the specification on this device, as a model of a run's widths calls them.

A block of the run's model takes a step, scores, and decodes a token, with a witness in the place of its ops: of every
call it computes ours, plain PyTorch's in the same dtype and plain PyTorch's in float64, values and gradients, and holds
them to the two-reference rule (agreement.py). Then ours is called again and again beside other work, and must give the
same bits: what differs is a race. The model goes on with plain PyTorch's results: a wrong op spoils no other's inputs.
"""

import functools
import inspect
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanogpt_fast.agreement import disagreement
from nanogpt_fast.model import GPT, document_ids
from nanogpt_fast.ops import OP_NAMES, REFERENCE, Ops, reproducible
from nanogpt_fast.optim import AdamW, FlatParameters
from nanogpt_fast.settings.config import GPTConfig, OptimConfig

ROWS = 2048  # tokens of the checked step at least: from here on the products take the forms of large batches
TINY = 1e-6  # of the largest value, for what torch gets exactly right
REPEATS = 50
POISON_MB = 64
SCRATCH = {"adamw_": {"g"}}  # arguments that an op may leave anyhow
EOT_EVERY = 97  # a document ends there, where documents are masked


@dataclass(frozen=True)
class Setup:
    """What is checked: a model's widths and how a run calls its ops. dtype: of parameters and activations, as in
    "bfloat16"; wide_residual: the residual stream is float32; recompute: as --recompute; documents: they are masked;
    rows: tokens of a micro-batch, of which as many are checked, ROWS at most."""

    shape: GPTConfig
    dtype: str = "bfloat16"
    wide_residual: bool = False
    recompute: str = "none"
    documents: bool = False
    rows: int = ROWS


@dataclass
class Check:
    """What was found of one op. wrong: its first fault, "" for none; untried: what kept it from being tried."""

    calls: int = 0
    wrong: str = ""
    untried: str = ""
    seconds: float = 0.0


class Ballast:
    """Other work for a GPU, so that blocks are scheduled differently each time: products and copies of changing size on
    a stream of their own."""

    def __init__(self, device: torch.device, megabytes: int = 256):
        self.on = device.type == "cuda" and megabytes > 0
        if not self.on:
            return
        self.random, self.stream = random.Random(0), torch.cuda.Stream(device)
        self.source = torch.randn(megabytes << 17, device=device)  # half of it in each
        self.sink = torch.empty_like(self.source)
        self.square = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)
        self.product = torch.empty_like(self.square)

    def add(self) -> None:
        """Enqueue a random piece of it, or none."""
        if not self.on:
            return
        with torch.cuda.stream(self.stream):
            kind = self.random.randrange(3)
            if kind == 1:
                n = self.random.randrange(1, self.source.numel())
                self.sink[:n].copy_(self.source[:n])
            elif kind == 2:
                n = self.random.choice((256, 512, 1024, 2048))
                torch.mm(self.square[:n], self.square, out=self.product[:n])


class Witness:
    """Ops that compute by the reference and hold `ours` to it; `checks` is what they found. tell(event, op, text) is
    called as an op's check has "began" and "ended", and when it was "wrong" or "untried": whoever watches knows what a
    crash or a hang was in, and loses nothing by it."""

    def __init__(
        self,
        ours: Ops,
        device: torch.device,
        repeats: int = REPEATS,
        skip: frozenset[str] = frozenset(),
        tell: Callable[[str, str, str], None] = lambda event, op, text: None,
    ):
        self.ours, self.device, self.repeats, self.tell = ours, device, repeats, tell
        self.checks = {name: Check() for name in OP_NAMES if name not in skip}
        self.differentiate = True
        self.ballast = Ballast(device)

    @property
    def ops(self) -> Ops:
        return Ops(**{name: partial(self._called, name) for name in OP_NAMES})

    def _called(self, name: str, *args: Any, **kwargs: Any) -> Any:
        check = self.checks.get(name)
        if check is not None and not check.wrong and not check.untried:
            start = time.perf_counter()
            self.tell("began", name, "")
            try:
                check.wrong = self._compare(name, args, kwargs)
            except torch.OutOfMemoryError:  # float64 takes four times what a run does: nothing is said of the op
                check.untried = "out of memory"
            except Exception as error:  # the next op has its own kernels
                check.wrong = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            for event in ("wrong", "untried"):
                if text := getattr(check, event):
                    self.tell(event, name, text)
            self.tell("ended", name, "")
            check.calls += 1
            check.seconds += time.perf_counter() - start
        return getattr(self.ours if self.device.type == "meta" else REFERENCE, name)(*args, **kwargs)

    def _compare(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        held, mine = Held(name, args, kwargs, self.differentiate), getattr(self.ours, name)
        if self.device.type == "meta":
            return "" if held.results(mine) else "it gave nothing"
        wrong = held.disagreement(mine)
        del held.references  # repeating needs the room
        return wrong or held.repeats(mine, self.repeats, self.ballast)


class Held:
    """One call of an op, and what it should give."""

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], differentiate: bool):
        self.name, self.args, self.kwargs, self.differentiate = name, args, kwargs, differentiate
        self.names = list(inspect.signature(getattr(REFERENCE, name)).parameters)

    def results(self, op: Callable[..., Any], exact: bool = False, backward: bool = True) -> dict[str, Tensor]:
        """What op gives: outputs, arguments that it changed, gradients; exact: on copies in float64."""
        counted = [what if what not in SCRATCH.get(self.name, ()) else "" for what in self.names]
        return _results(op, self.args, self.kwargs, self.differentiate, counted, exact, backward)

    @functools.cached_property
    def references(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Plain PyTorch's results, in the same dtype and in float64."""
        plain = getattr(REFERENCE, self.name)
        return self.results(plain), self.results(plain, exact=True)

    def disagreement(self, mine: Callable[..., Any]) -> str:
        """What is wrong with the results of `mine` by the two-reference rule, "" for nothing."""
        device = next(x.device for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor))
        poison(device)
        first = self.results(mine)
        same_dtype, exact = self.references
        if list(first) != list(same_dtype):
            return f"results {', '.join(first)}, but PyTorch's are {', '.join(same_dtype)}"
        for what, ours in first.items():
            if not ours.is_floating_point():
                wrong = "" if torch.equal(ours, same_dtype[what]) else "integers differ"
            else:
                wrong = disagreement(ours, same_dtype[what], exact[what].double(), tiny=TINY)
            if wrong:
                return f"{what}: {wrong}"
        return ""

    def repeats(self, mine: Callable[..., Any], times: int, ballast: Ballast) -> str:
        """Which results of `mine` did not come out with the same bits each time, beside other work."""
        with reproducible():
            first = {what: bits(x).clone() for what, x in self.results(mine).items()}
            counts = {what: torch.zeros((), dtype=torch.int64, device=x.device) for what, x in first.items()}
            for _ in range(times):
                ballast.add()
                for what, x in self.results(mine).items():
                    counts[what] += (bits(x) != first[what]).any()
        differing = [f"{what} in {int(count)}" for what, count in counts.items() if int(count)]
        return f"other bits, of {times} times: {', '.join(differing)}" if differing else ""


@dataclass(frozen=True)
class Block:
    """A model, of one block unless told, and its optimizer; and what a micro-batch calls the model with."""

    model: GPT
    optimizer: AdamW
    idx: Tensor
    targets: Tensor
    scale: Tensor
    seed: Tensor
    doc_ids: Tensor | None

    @classmethod
    def of(cls, setup: Setup, ops: Ops, device: torch.device, rows: int, n_layer: int = 1) -> "Block":
        """At the setup's widths, with so many rows and more, to whole sequences; on "meta" without data."""
        generator = None if device.type == "meta" else torch.Generator().manual_seed(1)
        model, optimizer = built(setup, ops, device, generator, n_layer)
        T, V = setup.shape.block_size, setup.shape.vocab_size
        B, flat = math.ceil(rows / T), optimizer.flat
        tokens = torch.zeros(B, T + 1, dtype=torch.int64)
        if generator is not None:
            size = (B * T) ** 0.5  # as large as what is added
            flat.grad.copy_(torch.randn(flat.grad.shape, generator=generator) * size)
            tokens = torch.randint(V, (B, T + 1), generator=generator)
        tokens[:, ::EOT_EVERY] = 0
        tokens = tokens.to(device)
        idx, targets = tokens[:, :-1], tokens[:, 1:]
        scale, seed = torch.full((), 1.0 / (B * T), device=device), torch.full((1,), 7, device=device)
        return cls(model, optimizer, idx, targets, scale, seed, document_ids(idx, 0) if setup.documents else None)

    def forward(self) -> None:
        """As training calls the model."""
        self.model.train()(self.idx, self.targets, self.scale, self.seed, self.doc_ids)

    def update(self) -> None:
        self.optimizer.set_lr(1e-3)
        self.optimizer.step()


def exercise(setup: Setup, device: torch.device, witness: Witness) -> None:
    """One block at the setup's widths, through all that calls an op: a step, its update, an evaluation, a token. On
    "meta" the witness's ops are called on tensors without data."""
    block = Block.of(setup, witness.ops, device, min(setup.rows, ROWS))
    model, (B, T), shape = block.model, block.idx.shape, setup.shape
    with torch.no_grad():
        block.forward()
        witness.differentiate = False
        block.update()
        model.eval()(block.idx, block.targets, block.scale, None, block.doc_ids)
        size = (1, 2, B, shape.n_head, T, shape.n_embd // shape.n_head)
        for new, start in ((1, T - 1), (1, torch.full((1,), T // 2, device=device)), (T // 2 + 1, 0)):
            if isinstance(start, Tensor) and device.type == "cpu":
                continue  # it is a graph that reads it
            cache = torch.zeros(size, dtype=getattr(torch, setup.dtype), device=device)
            if device.type != "meta":
                cache.copy_(torch.randn(size, generator=torch.Generator().manual_seed(2)))
            model._next_logits(block.idx[:, :new], cache, start)


def rehearse(setup: Setup, ours: Ops) -> None:
    """What exercise has these ops launch, on tensors without data."""
    meta = torch.device("meta")
    exercise(setup, meta, Witness(ours, meta))


def built(
    setup: Setup, ops: Ops, device: torch.device, generator: torch.Generator | None = None, n_layer: int = 1
) -> tuple[GPT, AdamW]:
    """A model of n_layer blocks, and its optimizer; without a generator the weights are what memory held."""
    dtype = getattr(torch, setup.dtype)
    wide = torch.float32 if setup.wide_residual else None
    with torch.device("meta" if device.type == "meta" else "cpu"):
        model = GPT(replace(setup.shape, n_layer=n_layer), ops, wide, setup.recompute)
    if generator is not None:
        _randomise(model, generator)
    return model, AdamW(FlatParameters(model, dtype, device), OptimConfig(), ops, scale_loss=dtype == torch.float16)


def _randomise(model: GPT, generator: torch.Generator) -> None:
    """Weights that leave activations near 1, and vectors that no op may ignore."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            x = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(x * (0.5 if name.endswith("wpe.weight") else parameter.size(1) ** -0.5))
            else:
                parameter.copy_(x * 0.1 + (0.0 if name.endswith("bias") else 1.0))


def _results(
    op: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    differentiate: bool,
    names: list[str],
    exact: bool = False,
    backward: bool = True,
) -> dict[str, Tensor]:
    """{what: result} of a call on copies: outputs, arguments as the call left them, gradients, unless backward is
    False; exact: all in float64.

    names: the op's parameters, "" for one whose state afterwards does not count. A parameter's gradient is what its
    main_grad has become; incoming gradients are random, of a scalar 1."""
    copies = [copied(arg, differentiate, exact) for arg in args]
    named = {name: copied(arg, differentiate, exact) for name, arg in kwargs.items()}
    given = dict(zip(names, copies)) | named
    with torch.set_grad_enabled(differentiate):
        returned = op(*copies, **named)
    outs = [x for x in (returned if isinstance(returned, tuple) else (returned,)) if isinstance(x, Tensor)]
    found = {f"output {i}": out.detach() for i, out in enumerate(outs)}
    wanted = [out for out in outs if out.requires_grad and backward]
    if wanted:
        torch.autograd.backward(wanted, [incoming(x.shape, x.dtype, x.device) for x in wanted])
    for name, x in given.items():
        if not isinstance(x, Tensor) or not name:
            continue
        if not x.requires_grad:
            found[f"{name} afterwards"] = x
        elif (grad := getattr(x, "main_grad", x.grad)) is not None:
            found[f"gradient of {name}"] = grad
    return found


def copied(arg: Any, differentiate: bool, exact: bool = False) -> Any:
    """A leaf of its own, where a call is differentiated; exact: float64, and float64 for a dtype."""
    if isinstance(arg, torch.dtype):
        return torch.float64 if exact else arg
    if not isinstance(arg, Tensor):
        return arg
    copy = arg.detach().clone(memory_format=torch.preserve_format)
    if not copy.is_floating_point():
        return copy
    copy = copy.double() if exact else copy
    into = getattr(arg, "main_grad", None)
    if differentiate and copy.dim() > 0:
        copy.requires_grad_()
        if into is not None and not exact:
            copy.main_grad = into.clone()  # type: ignore[attr-defined]
            copy.grad = copy.main_grad if copy.dtype == torch.float32 else None  # type: ignore[attr-defined]
        elif into is not None:
            copy.grad = into.double()
    return copy


@functools.cache
def incoming(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The gradient of a result: random multiples of 1/32 up to 2, which every dtype holds; of a scalar 1."""
    if not shape:
        return torch.ones((), dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(shape.numel())
    return (torch.randint(-64, 65, shape, generator=generator) / 32).to(device, dtype)


def bits(x: Tensor) -> Tensor:
    """The same memory as integers: NaN equals NaN, 0 differs from -0."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(kinds[x.element_size()])


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that is handed out next, so that an element nobody writes shows."""
    for count, megabytes in ((8, 1), (1, POISON_MB if device.type == "cuda" else 1)):
        held = [torch.full((megabytes << 18,), math.nan, device=device) for _ in range(count)]
        del held
