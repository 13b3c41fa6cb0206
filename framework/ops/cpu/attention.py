"""`npu_fused_infer_attention_score`: attention of whole sequences over given or paged keys, in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from framework.ops.cpu.paged import sequence_rows

WHOLE = 2147483647
_COMPRESSED_MASK = (2048, 2048)


def fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    block_table: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = WHOLE,
    next_tokens: int = WHOLE,
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
        query_rope: TND [T, N, R]; further features of the queries (latent attention).
        key_rope: those of the keys, laid out as `key`; values have none.
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
        unsupported: quantized and prefix arguments; refused unless they have their default.

    Returns:
        The output like `query` (value head size), and fp32 lse [T, N, 1] or [B, N, S, 1] (one zero if it is
        not asked for). A row that sees no key is 0.

    Where every query has one row `sparse_mode` is ignored, as on hardware: of a band it sees all keys.
    """
    given = sorted(name for name, argument in unsupported.items() if isinstance(argument, Tensor) or argument)
    if given:
        raise NotImplementedError(f"npu_fused_infer_attention_score: no CPU kernel for {', '.join(given)}")
    kv_heads = num_key_value_heads or num_heads
    queries = _rows(query, num_heads, input_layout)
    if query_rope is not None:
        queries = torch.cat((queries, _rows(query_rope, num_heads, input_layout)), dim=-1)
    spans = _spans(query, input_layout, actual_seq_lengths)
    if block_table is None:
        stored = tuple(_rows(given, kv_heads, input_layout) for given in (key, value, key_rope) if given is not None)
        keys = _Keys(stored, _spans(key, input_layout, actual_seq_lengths_kv or actual_seq_lengths), None)
    else:
        pages = tuple(_pages(given, kv_heads) for given in (key, value, key_rope) if given is not None)
        keys = _Keys(pages, [(0, length) for length in actual_seq_lengths_kv or ()], block_table.tolist())
    rule = _Rule(scale, sparse_mode, pre_tokens, next_tokens, atten_mask)
    if sparse_mode > 1 and all(last - first == 1 for first, last in spans):
        rule = _Rule(scale, 1, WHOLE, WHOLE, None)
    output = query.new_zeros((*queries.shape[:2], keys.stored[1].shape[-1]))
    lse = torch.zeros(queries.shape[:2] if softmax_lse_flag else 1)
    for index, (first, last) in enumerate(spans):
        part = _sequence(queries[first:last], keys, index, rule)
        output[first:last] = part.output
        if softmax_lse_flag:
            lse[first:last] = part.lse()
    return _in_layout(output, query, input_layout), _lse_in_layout(lse, query, input_layout)


@dataclass(frozen=True, slots=True)
class _Keys:
    """Keys and values of all sequences: rows [R, KV, D] with a span each, or pages with a table each.

    A third tensor holds further features of the keys.
    """

    stored: tuple[Tensor, ...]
    spans: list[tuple[int, int]]
    tables: list[list[int]] | None

    def length(self, index: int) -> int:
        first, last = self.spans[index]
        return last - first

    def from_row(self, index: int, start: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence from row `start` on, fp32 [KV, S - start, D]."""
        first, last = self.spans[index]
        if self.tables is not None:
            keys, values, *rope = sequence_rows(self.stored, self.tables[index], last, start)
        else:
            keys, values, *rope = (rows[first + start : last].transpose(0, 1).float() for rows in self.stored)
        return torch.cat((keys, *rope), dim=-1) if rope else keys, values


@dataclass(frozen=True, slots=True)
class _Rule:
    """Which keys a query row sees: row i keys i + shift - before .. i + shift + after, less the mask."""

    scale: float
    sparse_mode: int
    before: int
    after: int
    mask: Tensor | None

    def __post_init__(self) -> None:
        if self.sparse_mode not in (0, 1, 2, 3, 4):
            raise NotImplementedError(f"npu_fused_infer_attention_score: sparse_mode {self.sparse_mode}")
        # Without its mask hardware ignores sparse_mode and attends to everything: wrong text, no error.
        if self.sparse_mode > 1 and (self.mask is None or self.mask.shape[-2:] != _COMPRESSED_MASK):
            raise ValueError(f"sparse_mode {self.sparse_mode} takes the 2048 x 2048 upper-triangular atten_mask")

    def band(self, rows: int, length: int) -> tuple[int, int, int]:
        """Return shift, before and after for L query rows over S keys."""
        shift = length - rows if self.sparse_mode in (3, 4) else 0
        if self.sparse_mode in (2, 3):
            return shift, WHOLE, 0
        if self.sparse_mode == 1 or (self.sparse_mode == 0 and self.mask is None):
            return 0, WHOLE, WHOLE
        return shift, self.before, self.after

    def given(self, index: int, rows: int, length: int) -> Tensor | None:
        """The caller's mask of one sequence, bool [L, S], True = excluded."""
        if self.mask is None or self.sparse_mode > 1:
            return None
        masks = self.mask.reshape(-1, *self.mask.shape[-2:])
        return masks[index if masks.shape[0] > 1 else 0, :rows, :length].bool()


@dataclass(frozen=True, slots=True)
class _Attended:
    """The output [L, N, Dv] of one sequence, and what its log-sum-exp needs."""

    output: Tensor
    grouped: Tensor
    keys: Tensor
    scale: float
    excluded: Tensor | None

    def lse(self) -> Tensor:
        """[L, N]."""
        scores = torch.matmul(self.grouped * self.scale, self.keys.unsqueeze(1).transpose(2, 3))
        if self.excluded is not None:
            scores = scores.masked_fill(self.excluded, float("-inf"))
        return scores.logsumexp(-1).flatten(0, 1).transpose(0, 1)


def _sequence(query: Tensor, keys: _Keys, index: int, rule: _Rule) -> _Attended:
    """One sequence: query [L, N, D] -> [L, N, Dv] in the query's dtype."""
    rows, heads, size = query.shape
    length = keys.length(index)
    shift, before, after = rule.band(rows, length)
    # Keys before the first row's window are seen by no row: they are not read.
    skipped = min(max(0, shift - before), length)
    own_keys, values = keys.from_row(index, skipped)
    kv_heads = own_keys.shape[0]
    grouped = query.float().view(rows, kv_heads, heads // kv_heads, size).permute(1, 2, 0, 3)
    excluded = _outside(rows, length - skipped, shift - skipped, before, after)
    given = rule.given(index, rows, length)
    if given is not None:
        given = given[:, skipped:]
        excluded = given if excluded is None else given | excluded
    causal = given is None and excluded is not None and (shift, after) == (0, 0) and before >= rows - 1
    bias = None
    if excluded is not None and not causal:
        bias = torch.zeros(excluded.shape).masked_fill_(excluded, float("-inf"))
    attended = functional.scaled_dot_product_attention(
        grouped, _per_head(own_keys, grouped), _per_head(values, grouped), bias, 0.0, causal, scale=rule.scale
    )
    if excluded is not None and not causal and (given is not None or shift < 0):
        attended = attended.masked_fill(excluded.all(1, keepdim=True), 0.0)
    output = attended.permute(2, 0, 1, 3).reshape(rows, heads, -1).to(query.dtype)
    return _Attended(output, grouped, own_keys, rule.scale, excluded)


def _per_head(stored: Tensor, grouped: Tensor) -> Tensor:
    """View [KV, S, D] as [KV, G, S, D]: the G query heads of a KV head read the same memory."""
    return stored.unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)


def _outside(rows: int, length: int, shift: int, before: int, after: int) -> Tensor | None:
    """Return bool [L, S], True outside the band; None when everything is inside."""
    if shift + after >= length - 1 and rows - 1 + shift - before <= 0:
        return None
    distance = torch.arange(length) - torch.arange(shift, shift + rows).unsqueeze(1)
    return (distance > after) | (distance < -before)


def _rows(tensor: Tensor, heads: int, layout: str) -> Tensor:
    """Return [T, heads, D], batch entries one after the other."""
    match layout:
        case "TND":
            return tensor
        case "BSND":
            return tensor.flatten(0, 1)
        case "BNSD":
            return tensor.transpose(1, 2).flatten(0, 1)
        case "BSH":
            return tensor.flatten(0, 1).unflatten(-1, (heads, -1))
    raise NotImplementedError(f"npu_fused_infer_attention_score: layout {layout} has no CPU kernel")


def _spans(tensor: Tensor, layout: str, lengths: list[int] | None) -> list[tuple[int, int]]:
    """First and last row of each sequence in `_rows`: from cumulative ends (TND) or lengths (others)."""
    if layout == "TND":
        ends = lengths or [tensor.shape[0]]
        return list(zip([0, *ends[:-1]], ends, strict=True))
    padded = tensor.shape[2] if layout == "BNSD" else tensor.shape[1]
    return [
        (index * padded, index * padded + (lengths[index] if lengths else padded)) for index in range(tensor.shape[0])
    ]


def _pages(cache: Tensor, kv_heads: int) -> Tensor:
    """View a paged cache as [blocks, block_size, KV, D]."""
    return cache.unflatten(2, (kv_heads, -1)) if cache.dim() == 3 else cache.transpose(1, 2)


def _in_layout(output: Tensor, query: Tensor, layout: str) -> Tensor:
    if layout == "TND":
        return output
    output = output.unflatten(0, (query.shape[0], -1))
    if layout == "BNSD":
        return output.transpose(1, 2).contiguous()
    return output if layout == "BSND" else output.flatten(2)


def _lse_in_layout(lse: Tensor, query: Tensor, layout: str) -> Tensor:
    """[T, N] -> [T, N, 1] or [B, N, S, 1]; [1] stays."""
    if lse.dim() == 1:
        return lse
    if layout == "TND":
        return lse.unsqueeze(-1)
    return lse.unflatten(0, (query.shape[0], -1)).transpose(1, 2).contiguous().unsqueeze(-1)
