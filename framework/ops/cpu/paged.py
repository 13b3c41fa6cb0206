"""Rows of a paged KV cache, and decode attention over them. All arithmetic in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOAT32 = torch.float32
_ZERO = torch.zeros(1, 1, 1)
_baddbmm, _bmm, _softmax = torch.baddbmm, torch.bmm, torch.softmax


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """Decode attention: one query row per sequence over its first context_lens[t] cached rows.

    Args:
        query: [T, N, D].
        key_cache: [blocks, block_size, KV, D], contiguous; fp32 is fastest, whatever the query's dtype.
        value_cache: [blocks, block_size, KV, Dv], contiguous.
        num_kv_heads: KV; query head n reads KV head n // (N / KV).
        num_heads: N.
        scale_value: factor of the scores.
        block_table: int32 [T, max_blocks].
        context_lens: int32 [T] on the host; includes the current token. 0: the output is 0.
        out: [T, N, Dv], written.
        workspace: hardware only, ignored.
    """
    tokens, heads, size = query.shape
    group = heads // num_kv_heads
    # The query heads of one KV head are the rows of one product: no copies of keys and values.
    queries = query.float().view(tokens * num_kv_heads, group, size)
    outputs = out.view(tokens * num_kv_heads, group, -1)
    one = tokens == 1
    tables = block_table.tolist()
    for row, length in enumerate(context_lens.tolist()):
        first = row * num_kv_heads
        own = queries if one else queries.narrow(0, first, num_kv_heads)
        result = outputs if one else outputs.narrow(0, first, num_kv_heads)
        if length == 0:
            result.zero_()
            continue
        keys, values = sequence_rows((key_cache, value_cache), tables[row], length)
        scores = _baddbmm(_ZERO, own, keys.transpose(1, 2), beta=0, alpha=scale_value)
        result.copy_(_bmm(_softmax(scores, -1), values))


def sequence_rows(caches: tuple[Tensor, ...], pages: list[int], length: int, start: int = 0) -> tuple[Tensor, ...]:
    """Return rows start..length of one sequence as fp32 [KV, length - start, D], from each cache.

    Views of fp32 caches [blocks, block_size, KV, D] where the pages follow one another; else copies.
    """
    block_size = caches[0].shape[1]
    first_page = start // block_size
    used = pages[first_page : -(-length // block_size)]
    first = used[0]
    rows, start = length - start, start - first_page * block_size
    if len(used) > 1 and used != list(range(first, first + len(used))):
        index = torch.tensor(used)
        return tuple(_rows(cache.index_select(0, index), start, rows) for cache in caches)
    if not all(cache.is_contiguous() for cache in caches):
        return tuple(_rows(cache.narrow(0, first, len(used)).contiguous(), start, rows) for cache in caches)
    start += first * block_size
    return tuple([_rows(cache, start, rows) for cache in caches])


def _rows(cache: Tensor, start: int, rows: int) -> Tensor:
    _, _, kv_heads, size = cache.shape
    width = kv_heads * size
    view = cache.as_strided((kv_heads, rows, size), (size, width, 1), cache.storage_offset() + start * width)
    return view if view.dtype is _FLOAT32 else view.float()
