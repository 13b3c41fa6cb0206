"""Rows of a paged KV cache, and decode attention over them. All arithmetic in fp32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_FLOAT32 = torch.float32
_ZERO = torch.zeros(1, 1, 1)
# Rows of a product that takes sequences of several lengths, over rows that count.
_MOST_PADDED = 1.5
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
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
    # The query heads of one KV head are the rows of one product: no copies of keys and values.
    by_head = num_kv_heads, heads // num_kv_heads, size
    caches, lengths = (key_cache, value_cache), context_lens.tolist()
    if tokens == 1 and lengths[0]:
        attended = _attend(query.float().view(by_head), caches, block_table.tolist()[0], lengths[0], scale_value)
        out.view(num_kv_heads, by_head[1], -1).copy_(attended)
        return
    tables = block_table.tolist()
    queries = query.float().view(tokens, *by_head)
    outputs = torch.zeros(tokens, *by_head[:2], value_cache.shape[3])
    regular = all(cache.dtype is _FLOAT32 and cache.is_contiguous() and cache.shape[3] == size for cache in caches)
    for run in _runs(tuple(map(tuple, tables)), tuple(lengths), *key_cache.shape[:2], regular):
        if run.last - run.first > 1 and _attend_run(queries, caches, run, scale_value, outputs):
            continue
        for row in range(run.first, run.last):
            if lengths[row]:
                _attend(queries[row], caches, tables[row], lengths[row], scale_value, outputs[row])
    out.copy_(outputs.view(out.shape))


@dataclass(frozen=True, slots=True)
class _Run:
    """Sequences first..last of a batch whose pages follow one another and begin at equal distances.

    `mask` [B, 1, 1, longest]: 0, and -inf past a sequence's end; None: all are of one length.
    """

    first: int
    last: int
    page: int
    stride: int
    longest: int
    mask: Tensor | None


@lru_cache(maxsize=4)  # the layers of a step ask alike
def _runs(
    tables: tuple[tuple[int, ...], ...], lengths: tuple[int, ...], blocks: int, block_size: int, regular: bool
) -> tuple[_Run, ...]:
    """Cut a batch into runs; reading a run's sequences to the longest's end costs little more. Else runs of one."""
    direct = [_are_consecutive(pages[: -(-n // block_size)]) for pages, n in zip(tables, lengths, strict=True)]
    runs: list[_Run] = []
    first, count = 0, len(tables)
    while first < count:
        last, stride, longest = first + 1, 0, lengths[first]
        while regular and last < count and direct[first] and direct[last]:
            step, most = tables[last][0] - tables[last - 1][0], max(longest, lengths[last])
            rows = most * (last + 1 - first)
            if step <= 0 or (stride and step != stride) or rows > _MOST_PADDED * sum(lengths[first : last + 1]):
                break
            if tables[last][0] * block_size + most > blocks * block_size:
                break
            last, stride, longest = last + 1, step, most
        runs.append(_Run(first, last, tables[first][0], stride, longest, _mask(lengths[first:last], longest)))
        first = last
    return tuple(runs)


def _are_consecutive(pages: tuple[int, ...]) -> bool:
    return bool(pages) and pages == tuple(range(pages[0], pages[0] + len(pages)))


def _mask(lengths: tuple[int, ...], longest: int) -> Tensor | None:
    if min(lengths) == longest:
        return None
    past = torch.arange(longest) >= torch.tensor(lengths).unsqueeze(1)
    return torch.zeros(past.shape).masked_fill_(past, -torch.inf)[:, None, None]


def _attend_run(queries: Tensor, caches: tuple[Tensor, ...], run: _Run, scale: float, out: Tensor) -> bool:
    """All sequences of a run in one product. False: what stands past an end is no number, and nothing is written."""
    views = []
    for cache in caches:
        _, block_size, kv_heads, size = cache.shape
        width = kv_heads * size
        shape = run.last - run.first, kv_heads, run.longest, size
        offset = cache.storage_offset() + run.page * block_size * width
        views.append(cache.as_strided(shape, (run.stride * block_size * width, size, width, 1), offset))
    attended = _flash(queries[run.first : run.last], *views, 0.0, False, attn_mask=run.mask, scale=scale)[0]
    if not math.isfinite(attended.sum().item()):
        return False
    out[run.first : run.last] = attended
    return True


def _attend(
    query: Tensor,
    caches: tuple[Tensor, ...],
    pages: list[int],
    length: int,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """One sequence: [KV, N / KV, D] -> [KV, N / KV, Dv], fp32."""
    keys, values = sequence_rows(caches, pages, length)
    scores = _baddbmm(_ZERO, query, keys.transpose(1, 2), beta=0, alpha=scale)
    return _bmm(_softmax(scores, -1), values, out=out)


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
