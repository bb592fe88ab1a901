"""What torch does around ops: forward-mode AD, checkpointing, dynamic compilation, export, hooks, FSDP2."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nanogpt_kernels as kernels
import pytest
import torch
import torch.distributed as dist
from kernel_case import DEVICE, randn
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from nanogpt_fast.model import GPT
from nanogpt_fast.ops import REFERENCE, TRITON, Ops
from nanogpt_fast.settings.config import GPTConfig

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=67, dropout=0.0, bias=True)
OP_SETS = pytest.mark.parametrize("ops", [TRITON, REFERENCE], ids=["triton", "reference"])


def build(ops: Ops, **changes: Any) -> GPT:
    model = GPT(GPTConfig(**(vars(SHAPE) | changes)), ops)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.to(DEVICE)


def tokens(batch: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(67, (batch, 9), generator=torch.Generator().manual_seed(batch)).to(DEVICE)
    return ids[:, :-1], ids[:, 1:]


C, V = 8, 11
IDS = torch.tensor([[1, 3, 0, 10]], device=DEVICE)


def _ones(*shape: int) -> Tensor:
    return torch.ones(*shape, device=DEVICE)


ON_FLOATS: dict[str, Callable[[Tensor], Any]] = {  # each op of x [1, 4, C], all else constant
    "norm": lambda x: kernels.norm(x, _ones(C), None),
    "add_norm": lambda x: kernels.add_norm(_ones(1, 4, C), x, None, _ones(C), None, 1e-5, 0.0, None, 0),
    "dropout_add": lambda x: kernels.dropout_add(x, _ones(1, 4, C), None, 0.0, None, 0),
    "attention": lambda x: kernels.attention(x.repeat(1, 1, 3).view(1, 4, 3, 2, C // 2), 0.0, None, 0),
    "qkv_attention": lambda x: kernels.qkv_attention(x, _ones(3 * C, C), None, 2, 0.0, None, 0),
    "linear": lambda x: kernels.linear(x, _ones(5, C)),
    "bias_gelu": lambda x: kernels.bias_gelu(x, None),
    "mlp": lambda x: kernels.mlp(x, _ones(16, C), None, _ones(C, 16)),
    "cross_entropy": lambda x: kernels.cross_entropy(x[0], IDS[0] % C),
    "linear_cross_entropy": lambda x: kernels.linear_cross_entropy(x, _ones(V, C), IDS),
    "embedding": lambda x: kernels.embedding(IDS % 4, x[0], _ones(8, C), 0.0, None, 0),
}


@pytest.mark.parametrize("op", ON_FLOATS)
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused_by_name(op: str, grad: bool):
    """torch drops a tangent silently where a registered op has no gradient to record."""
    x, tangent, call = randn(1, 4, C).detach(), randn(1, 4, C, seed=1).detach(), ON_FLOATS[op]
    call(x)
    with torch.set_grad_enabled(grad):
        with pytest.raises(RuntimeError, match=f"^{op}: .*forward-mode"):
            torch.func.jvp(call, (x,), (tangent,))
        with forward_ad.dual_level():
            with pytest.raises(RuntimeError, match=f"^{op}: .*forward-mode"):
                call(forward_ad.make_dual(x, tangent))
            call(x)  # a level is no tangent


@OP_SETS
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_checkpointed_head_adds_to_main_grad_once(ops: Ops, reentrant: bool | None):
    """Non-reentrant checkpointing calls forward twice with gradients on, and the head writes w's there."""
    hidden, w, targets = randn(6, C), torch.nn.Parameter(randn(V, C, seed=1).detach()), torch.arange(6, device=DEVICE)
    w.main_grad = torch.full((V, C), 0.25, device=DEVICE)  # type: ignore[attr-defined]
    exact = w.detach().double().requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    (torch.nn.functional.cross_entropy(exact_hidden @ exact.t(), targets, reduction="sum") * 3.0).backward()

    def head(h: Tensor) -> Tensor:
        return ops.linear_cross_entropy(h, w, targets, 3.0)[0]

    loss = head(hidden) if reentrant is None else checkpoint(head, hidden, use_reentrant=reentrant)
    loss.backward()
    assert hidden.grad is not None and exact_hidden.grad is not None and exact.grad is not None and w.grad is None
    torch.testing.assert_close(w.main_grad.double() - 0.25, exact.grad, rtol=1e-4, atol=1e-5)  # type: ignore[attr-defined]
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=1e-4, atol=1e-5)


def test_a_kept_main_grad_is_scaled_by_the_losss_gradient():
    """What backward adds, it multiplies by what arrives, which need not be 1 then."""
    hidden, w, targets = randn(6, C), torch.nn.Parameter(randn(V, C, seed=1).detach()), torch.arange(6, device=DEVICE)
    results = []
    for scale in (1.0, 0.5):
        w.main_grad, hidden.grad = torch.zeros(V, C, device=DEVICE), None  # type: ignore[attr-defined]
        loss = checkpoint(lambda h: kernels.linear_cross_entropy(h, w, targets)[0], hidden, use_reentrant=False)
        (loss * scale).backward()
        results.append((w.main_grad, hidden.grad))  # type: ignore[attr-defined]
    for whole, half in zip(*results):
        torch.testing.assert_close(half, whole * 0.5)


EPS = 1e-5


def test_a_dynamic_compilation_takes_a_global_number_twice():
    """torch 2.13 fails on one that reaches two autograd.Functions."""
    x, w = randn(4, C), randn(C)

    def twice(x: Tensor, w: Tensor) -> Tensor:
        return kernels.norm(kernels.norm(x, w, None, EPS), w, None, EPS)

    torch._dynamo.reset()
    compiled = torch.compile(twice, dynamic=True, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (4, 7):
            x = randn(rows, C)
            got, want = (torch.autograd.grad(f(x, w).pow(3).sum(), (x, w)) for f in (compiled, twice))
            torch.testing.assert_close(got, want)


@pytest.mark.slow  # half a minute of tracing
@OP_SETS
def test_a_dynamic_compilation_takes_the_model_whole(ops: Ops):
    model = build(ops, dropout=0.1, n_layer=1).train()
    seed = torch.tensor([3], device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 5, 3):
            grads = []
            for forward in (model, compiled):
                model.zero_grad()
                loss, _ = forward(*tokens(batch), 0.5, seed)
                loss.backward()
                grads.append([loss.detach(), *(p.grad for p in model.parameters())])
            for one, other in zip(*grads):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@OP_SETS
def test_an_exported_model_takes_any_batch(ops: Ops):
    """With gradients on, as torch.export leaves them: a registered op's body is not differentiated."""
    model = build(ops, n_layer=1).eval()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, tokens(3), dynamic_shapes={"idx": batch, "targets": batch})
    for size in (2, 5):
        for got, want in zip(program.module()(*tokens(size)), model(*tokens(size))):
            assert torch.equal(got, want) and got.size() == want.size()


def test_the_default_dtype_changes_nothing():
    """adamw_ makes its table of decays once, of Python numbers."""
    results = []
    for dtype in (torch.float32, torch.float64):
        segments = [(0, 100 + dtype.itemsize, 0.1)]  # a table of its own: it is cached
        master, m, v, grad = (randn(120, seed=i).detach() for i in range(4))
        scalars = torch.tensor([1e-2, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64, device=DEVICE)
        torch.set_default_dtype(dtype)
        try:
            kernels.adamw_(None, master, m, v.abs_(), grad, scalars, segments, 0.9, 0.95, 1e-8)
        finally:
            torch.set_default_dtype(torch.float32)
        results.append((master[:100], m[:100], v[:100]))
    for one, other in zip(*results):
        assert torch.equal(one, other)


@OP_SETS
def test_hooks_of_blocks_and_branches_fire(ops: Ops):
    model, seen = build(ops), list[str]()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    model(*tokens(2))
    block = ["attn", "mlp", ""]
    assert seen == [f"transformer.h.{i}{'.' * bool(part)}{part}" for i in range(2) for part in block] + [""]
    seen.clear()
    model.generate(tokens(1)[0][:, :3], 2)
    assert seen.count("transformer.h.1") == 2  # with and without cached keys


def sharded(rank: int, world: int, path: str) -> None:
    """A model sharded a block equals a whole one: loss and gradients, each rank with a batch of its own."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    try:
        for ops in (TRITON, REFERENCE):
            whole, model = build(ops).cpu(), build(ops).cpu()
            vectors = {p for p in model.parameters() if p.dim() == 1}  # an add_norm's belong to two blocks: replicated
            shard = functools.partial(fully_shard, mesh=init_device_mesh("cpu", (world,)), ignored_params=vectors)
            for block in model.blocks:
                shard(block)
            shard(model)
            for batch in range(2, 2 + world):
                (whole(*(t.cpu() for t in tokens(batch)))[0] / world).backward()
            model(*(t.cpu() for t in tokens(2 + rank)))[0].backward()
            for (name, got), want in zip(model.named_parameters(), whole.parameters()):
                assert isinstance(got, DTensor) == (got.dim() > 1), name
                assert got.grad is not None and want.grad is not None, name
                grad = got.grad
                if isinstance(grad, DTensor):
                    grad = grad.full_tensor()
                else:
                    dist.all_reduce(grad.div_(world))
                torch.testing.assert_close(grad, want.grad, rtol=1e-5, atol=1e-6, msg=name)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="compiled ops take no CPU tensors, and one GPU is no shard")
def test_fsdp2_of_one_rank(tmp_path: Path):
    sharded(0, 1, str(tmp_path / "meet"))


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="compiled ops take no CPU tensors, and one GPU is no shard")
def test_fsdp2_of_two_ranks(tmp_path: Path):
    torch.multiprocessing.spawn(sharded, (2, str(tmp_path / "meet")), nprocs=2)
