"""Attention over the paged cache (decode) and over given or paged keys (prefill). All in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_COMPRESSED_MASK = 2048


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
        key_cache: [blocks, block_size, KV, D], contiguous; its dtype may differ from the query's.
        value_cache: [blocks, block_size, KV, Dv].
        num_kv_heads: KV; query head n reads KV head n // (N / KV).
        num_heads: N.
        scale_value: factor of the scores.
        block_table: int32 [T, max_blocks].
        context_lens: int32 [T] on the host; includes the current token.
        out: [T, N, Dv], written.
        workspace: hardware only, ignored.
    """
    for row, (pages, length) in enumerate(zip(block_table.tolist(), context_lens.tolist(), strict=True)):
        keys = _paged_rows(key_cache, pages, length)
        values = _paged_rows(value_cache, pages, length)
        _decode_one(query[row], keys, values, num_kv_heads, scale_value, out[row])


def fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    softmax_lse_flag: bool = False,
    **unsupported: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale * q k^T + mask) v and, when asked, the log-sum-exp of the scores.

    Args:
        query: by `input_layout`: TND [T, N, D], BSND, BNSD or BSH.
        key: as the query with KV heads; paged: [blocks, block_size, KV * D] or [blocks, KV, block_size, D].
        value: as the key.
        atten_mask: bool or int8, 1 = excluded. Sparse modes 2, 3, 4 take the fixed 2048 x 2048 mask.
        actual_seq_lengths: TND: cumulative query ends; else query rows per batch entry.
        actual_seq_lengths_kv: TND without pages: cumulative ends; else rows per sequence.
        block_table: int32 [B, max_blocks] for a paged cache.
        num_heads: N.
        scale: factor of the scores.
        pre_tokens: keys before the diagonal that a row sees (modes 0 and 4).
        next_tokens: keys after the diagonal that a row sees (modes 0 and 4).
        input_layout: TND, BSND, BNSD or BSH.
        num_key_value_heads: KV; 0 means N.
        sparse_mode: 0 given mask and a band from the top left, 1 given mask, 2 causal from the top left,
            3 causal from the bottom right, 4 band from the bottom right.
        inner_precise: hardware only, ignored.
        block_size: rows of a page.
        softmax_lse_flag: return the log-sum-exp.
        unsupported: quantized, prefix and rope arguments; refused unless they have their default.

    Returns:
        The output like `query` (value head size), and fp32 lse [T, N, 1] or [B, N, S, 1] (zeros [1] if not
        asked for).

    Hardware ignores `sparse_mode` for a query of one row (outside TND); here a band holds there, too.
    """
    given = sorted(name for name, argument in unsupported.items() if argument)
    if given:
        raise NotImplementedError(f"npu_fused_infer_attention_score: no CPU kernel for {', '.join(given)}")
    kv_heads = num_key_value_heads or num_heads
    band = _band(sparse_mode, pre_tokens, next_tokens, atten_mask)
    mask = atten_mask if sparse_mode in (0, 1) else None
    if input_layout == "TND":
        rows = _Ragged(actual_seq_lengths, actual_seq_lengths_kv, block_table)
        parts = []
        for index, (start, end, length) in enumerate(rows.bounds(query, key)):
            keys = rows.keys(key, index, length, kv_heads)
            values = rows.keys(value, index, length, kv_heads)
            own = mask if mask is None or mask.dim() == 2 else mask[index].squeeze(0)
            parts.append(_prefill_one(query[start:end], keys, values, scale, band, own, softmax_lse_flag))
        output = torch.cat([part for part, _ in parts])
        lse = torch.cat([part for _, part in parts]).unsqueeze(-1) if softmax_lse_flag else None
    else:
        output, lse = _rectangular(
            _Batch(query, key, value, num_heads, kv_heads, input_layout),
            (actual_seq_lengths, actual_seq_lengths_kv, block_table),
            (scale, band, mask, softmax_lse_flag),
        )
    return output, torch.zeros(1) if lse is None else lse


@dataclass(frozen=True, slots=True)
class _Band:
    """Row i sees keys i + shift - before .. i + shift + after.

    `shift` is S - L when counted from the bottom right, else 0.
    """

    before: int
    after: int
    bottom_right: bool


@dataclass(frozen=True, slots=True)
class _Ragged:
    """Sequences laid end to end."""

    query_ends: list[int] | None
    kv_lengths: list[int] | None
    block_table: Tensor | None

    def bounds(self, query: Tensor, key: Tensor) -> list[tuple[int, int, int]]:
        """Query start, query end and number of keys (paged) or key end of each sequence."""
        ends = self.query_ends or [query.shape[0]]
        lengths = self.kv_lengths or ([key.shape[0]] if self.query_ends is None else ends)
        return list(zip([0, *ends[:-1]], ends, lengths, strict=True))

    def keys(self, cache: Tensor, index: int, length: int, kv_heads: int) -> Tensor:
        """Keys or values of one sequence as fp32 [KV, S, D]."""
        if self.block_table is not None:
            return _paged_rows(_pages(cache, kv_heads), self.block_table[index].tolist(), length)
        lengths = self.kv_lengths or self.query_ends
        start = 0 if index == 0 or lengths is None else lengths[index - 1]
        return cache[start:length].transpose(0, 1).float()


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rectangular inputs and how to read them."""

    query: Tensor
    key: Tensor
    value: Tensor
    heads: int
    kv_heads: int
    layout: str


def _rectangular(batch: _Batch, lengths: Any, how: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
    query_lengths, kv_lengths, block_table = lengths
    scale, band, mask, with_lse = how
    queries = _heads_last(batch.query, batch.heads, batch.layout)
    outputs, lses = [], []
    for index, query in enumerate(queries):
        if block_table is not None:
            pages = block_table[index].tolist()
            keys = _paged_rows(_pages(batch.key, batch.kv_heads), pages, kv_lengths[index])
            values = _paged_rows(_pages(batch.value, batch.kv_heads), pages, kv_lengths[index])
        else:
            keys, values = (
                _heads_last(tensor, batch.kv_heads, batch.layout)[index].transpose(0, 1).float()
                for tensor in (batch.key, batch.value)
            )
            if kv_lengths is not None:
                keys, values = keys[:, : kv_lengths[index]], values[:, : kv_lengths[index]]
        rows = query.shape[0] if query_lengths is None else query_lengths[index]
        own = mask
        if mask is not None:
            own = mask.reshape(-1, *mask.shape[-2:])
            own = own[index if own.shape[0] > 1 else 0][:rows, : keys.shape[1]]
        output, lse = _prefill_one(query[:rows], keys, values, scale, band, own, with_lse)
        padding = query.shape[0] - rows
        outputs.append(functional.pad(output, (0, 0, 0, 0, 0, padding)))
        if with_lse:
            lses.append(functional.pad(lse, (0, 0, 0, padding)).transpose(0, 1).unsqueeze(-1))
    stacked = torch.stack(outputs)
    if batch.layout == "BNSD":
        stacked = stacked.transpose(1, 2).contiguous()
    elif batch.layout == "BSH":
        stacked = stacked.flatten(2)
    return stacked, torch.stack(lses) if with_lse else None


def _heads_last(tensor: Tensor, heads: int, layout: str) -> Tensor:
    """View as [B, S, heads, D]."""
    match layout:
        case "BSND":
            return tensor
        case "BNSD":
            return tensor.transpose(1, 2)
        case "BSH":
            return tensor.unflatten(-1, (heads, -1))
    raise NotImplementedError(f"npu_fused_infer_attention_score: layout {layout} has no CPU kernel")


def _band(sparse_mode: int, before: int, after: int, mask: Tensor | None) -> _Band | None:
    if sparse_mode not in (0, 1, 2, 3, 4):
        raise NotImplementedError(f"npu_fused_infer_attention_score: sparse_mode {sparse_mode}")
    if sparse_mode == 1 or (sparse_mode == 0 and mask is None):
        return None
    if sparse_mode == 0:
        return _Band(before, after, bottom_right=False)
    # Without a mask hardware ignores sparse_mode and attends to everything: wrong text, no error.
    if mask is None or tuple(mask.shape[-2:]) != (_COMPRESSED_MASK, _COMPRESSED_MASK):
        raise ValueError(f"sparse_mode {sparse_mode} takes the 2048 x 2048 upper-triangular atten_mask")
    if sparse_mode == 4:
        return _Band(before, after, bottom_right=True)
    return _Band(2147483647, 0, bottom_right=sparse_mode == 3)


def _pages(cache: Tensor, kv_heads: int) -> Tensor:
    """View a paged cache as [blocks, block_size, KV, D]."""
    return cache.unflatten(2, (kv_heads, -1)) if cache.dim() == 3 else cache.transpose(1, 2)


def _paged_rows(cache: Tensor, pages: list[int], length: int) -> Tensor:
    """Return the first `length` rows of a sequence as fp32 [KV, length, D]; a view where pages follow on."""
    block_size = cache.shape[1]
    used = pages[: -(-length // block_size)]
    first = used[0] if used else 0
    if used == list(range(first, first + len(used))):
        rows = cache[first : first + len(used)].flatten(0, 1)
    else:
        rows = cache.index_select(0, torch.tensor(used)).flatten(0, 1)
    return rows[:length].transpose(0, 1).float()


def _decode_one(
    query: Tensor, keys: Tensor, values: Tensor, kv_heads: int, scale: float, out: Tensor
) -> None:
    """One query row [N, D] over [KV, S, D]: the query heads of a KV head are the rows of one product."""
    grouped = query.float().view(kv_heads, -1, query.shape[-1]).mul(scale)
    weights = torch.bmm(grouped, keys.transpose(1, 2)).softmax(-1)
    out.copy_(torch.bmm(weights, values).view(out.shape))


def _prefill_one(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    band: _Band | None,
    mask: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """One sequence: query [L, N, D], keys [KV, S, D] -> [L, N, Dv] in the query's dtype and lse [L, N]."""
    rows, heads, head_size = query.shape
    kv_heads, length, _ = keys.shape
    if band is not None:
        # Keys before the first row's window are seen by no row.
        shift = length - rows if band.bottom_right else 0
        skipped = min(max(0, shift - band.before), length)
        keys, values = keys[:, skipped:], values[:, skipped:]
        mask = None if mask is None else mask[:, skipped:]
        excluded = _outside(band, rows, length - skipped, shift - skipped)
        mask = excluded if mask is None else (mask.bool() if excluded is None else mask.bool() | excluded)
    elif mask is not None:
        mask = mask.bool()
    grouped = query.float().view(rows, kv_heads, heads // kv_heads, head_size).permute(1, 2, 0, 3)
    scores = torch.matmul(grouped * scale, keys.unsqueeze(1).transpose(2, 3))
    if mask is not None:
        scores = scores.masked_fill(mask, float("-inf"))
    lse = scores.logsumexp(-1) if with_lse else scores
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights.nan_to_num(0.0)
    output = torch.matmul(weights, values.unsqueeze(1)).permute(2, 0, 1, 3)
    lse_rows = lse.flatten(0, 1).transpose(0, 1) if with_lse else lse
    return output.reshape(rows, heads, values.shape[-1]).to(query.dtype), lse_rows


def _outside(band: _Band, rows: int, length: int, shift: int) -> Tensor | None:
    """Return bool [rows, length], True outside the band; None when everything is inside."""
    if shift + band.after >= length - 1 and rows - 1 + shift - band.before <= 0:
        return None
    distance = torch.arange(length) - torch.arange(shift, shift + rows).unsqueeze(1)
    return (distance > band.after) | (distance < -band.before)
