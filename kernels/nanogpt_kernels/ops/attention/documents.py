"""Which tokens a tile may meet, so that attention does not compute tiles of other documents.

A document is all tokens of one id in a sequence; ids are any integers in any order, and equality decides. Of a tile's
ids let `lowest` and `highest` be the extremes. No query of the tile has a key before
    first = the first token of the sequence whose id is >= lowest,
as all ids before it are lower than every id of the tile; and no key of it has a query from
    end = 1 + the last token of the sequence whose id is <= highest
on, as all ids from there on are higher. Where ids ascend, as packed documents' do, these bounds are exact: where the
first token's document begins, and where the last one's ends. In any other order they are safe and skip less; within
them attention compares ids. A program owns a tile, and reads the ids of its whole sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import cdiv, launch


@triton.jit
def _document_spans_kernel(
    doc_ids_ptr,  # [B, T] int32 or int64
    first_ptr,  # [B, tiles] int32
    end_ptr,  # [B, tiles] int32
    tiles,
    T,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    doc_ids_ptr += b * T
    own = tl.load(doc_ids_ptr + tl.minimum(tile * ROWS + tl.arange(0, ROWS), T - 1))  # the last token again, beyond T
    lowest, highest = tl.min(own, 0), tl.max(own, 0)
    first, end = T, 0
    for j in range(0, T, BLOCK_T):
        at = tl.minimum(j + tl.arange(0, BLOCK_T), T - 1)
        ids = tl.load(doc_ids_ptr + at)
        first = tl.minimum(first, tl.min(tl.where(ids >= lowest, at, T), 0))
        end = tl.maximum(end, tl.max(tl.where(ids <= highest, at + 1, 0), 0))
    tl.store(first_ptr + tl.program_id(0), first)
    tl.store(end_ptr + tl.program_id(0), end)


def document_spans(doc_ids: Tensor | None, ROWS: int) -> tuple[Tensor | None, Tensor | None]:
    """(first, end), int32 [B, tiles] each, of the tiles of ROWS tokens of doc_ids [B, T], contiguous; or two Nones."""
    if doc_ids is None:
        return None, None
    B, T = doc_ids.shape
    tiles = cdiv(T, ROWS)
    first, end = (torch.empty((B, tiles), dtype=torch.int32, device=doc_ids.device) for _ in range(2))
    launch(
        "document_spans", _document_spans_kernel, (B * tiles,), doc_ids, first, end, tiles, T,
        ROWS=ROWS, BLOCK_T=1024, num_warps=4,
    )  # fmt: skip
    return first, end
