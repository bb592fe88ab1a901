"""--document_mask: packed windows give the losses and gradients of their documents, each run by itself."""

import dataclasses

import pytest
import torch
from kernel_case import DEVICE
from separate_documents import separately
from torch import Tensor

from nanogpt_fast.model import GPT, document_ids
from nanogpt_fast.ops import REFERENCE, TRITON, Ops
from nanogpt_fast.settings.config import GPTConfig

EOT = 7
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=20, vocab_size=29)
ENDS = [[], [0], [19], [3, 4, 11], [0, 1, 18, 19]]  # where EOT is, of each window


def windows() -> Tensor:
    """int64 [5, 21]; EOT where ENDS says and nowhere else among the inputs."""
    tokens = torch.randint(8, 29, (len(ENDS), 21), generator=torch.Generator().manual_seed(1))
    for row, ends in zip(tokens, ENDS):
        row[ends] = EOT
    return tokens.to(DEVICE)


def build(ops: Ops, dtype: torch.dtype) -> GPT:
    model = GPT(SHAPE, ops)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # scores far from uniform: a key too many must show
        for block in model.blocks:
            block.attn.c_attn.weight.mul_(10)
    return model.to(DEVICE, dtype)


def gradients(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_the_ids_count_the_ends_before_a_token():
    ids = document_ids(windows()[:, :-1], EOT)
    assert ids.dtype == torch.int32 and ids.is_contiguous()
    assert ids[3].tolist() == [0] * 4 + [1] + [2] * 7 + [3] * 8
    assert ids[4].tolist() == [0, 1] + [2] * 17 + [3]
    assert not ids[[0, 2]].any() and ids[1].tolist() == [0] + [1] * 19


@pytest.mark.parametrize("ops", [REFERENCE, TRITON], ids=["reference", "triton"])
def test_packed_documents_are_the_documents_alone(ops: Ops):
    tokens = windows()
    idx, targets = tokens[:, :-1], tokens[:, 1:]
    model, exact = build(ops, torch.float32), build(REFERENCE, torch.float64)
    loss, nll = model(idx, targets, 0.01, doc_ids=document_ids(idx, EOT))
    loss64, nll64 = separately(exact, idx, targets, EOT, 0.01)
    torch.testing.assert_close(nll.double(), nll64, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-5, atol=0)
    found, expected = gradients(model, loss), gradients(exact, loss64)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found[name].double(), gradient, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_another_document_reaches_no_loss_and_a_mask_matters():
    """Tokens before the last document change: not one bit after it. Without a mask all of it moves."""
    tokens = windows()[3:4]
    other = tokens.clone()
    other[0, :11] = torch.where(other[0, :11] == EOT, EOT, other[0, :11] % 20 + 8)
    model = build(REFERENCE, torch.float32)
    nll = [
        [model(t[:, :-1], tokens[:, 1:], doc_ids=ids)[1][12:] for t in (tokens, other)]
        for ids in (document_ids(tokens[:, :-1], EOT), None)
    ]
    assert torch.equal(*nll[0]) and not torch.equal(*nll[1])


def test_dropout_masks_stay_where_they_are():
    """The mask of attention's probabilities is of (seed, site, element), whatever the documents: one document, with
    ids or without, is the same."""
    idx = windows()[:1, :-1]
    model = GPT(dataclasses.replace(SHAPE, dropout=0.2), REFERENCE)
    model.init_weights(torch.Generator().manual_seed(0))
    seed = torch.tensor([5])
    model = model.to(DEVICE).train()
    both = [model(idx, idx, 1.0, seed.to(DEVICE), ids)[1] for ids in (None, document_ids(idx, EOT))]
    torch.testing.assert_close(*both, rtol=1e-6, atol=0)
