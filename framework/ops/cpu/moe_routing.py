"""Rows to the experts that they chose, and back.

Two conventions that must not be mixed. v1 orders indices by columns: entry j * M + i is choice j of token i. v2 and
`token_unpermute` order them by rows: entry i * k + j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framework.ops.cpu import mx, quantize
from framework.ops.dtypes import INT8

_UNQUANTIZED, _STATIC, _DYNAMIC = -1, 0, 1
_MX_ELEMENTS = {2: "e5m2", 3: "e4m3"}
_CUMULATIVE, _COUNTS, _PAIRS = range(3)
_DROPPED = -1
# Values gathered at a time: 1 MB of fp32, which is then summed from the cache.
_CHUNK_VALUES = 1 << 18


def init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: list[int] | tuple[int, ...] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Repeat every row for its k experts, sorted by expert (stable), and say where each went.

    Args:
        x: [M, H].
        expert_idx: int32 [M, k].
        scale: quant_mode -1: fp32 [M], carried along; 0: factor [1]; 1: smoothing factors [1, H], or [E, H] of
            the experts in the range.
        offset: quant_mode 0: [1].
        active_num: rows that are returned; 0 and -1: all.
        expert_capacity: dropping only.
        expert_num: E.
        drop_pad_mode: 0, nothing is dropped.
        expert_tokens_num_type: 0 cumulative, 1 counts, 2 pairs (expert, count) of experts with rows, then (0, 0).
        expert_tokens_num_flag: hardware fills the third output only then.
        quant_mode: -1 none; 0 static int8; 1 int8 by rows; 2 and 3 MX fp8, e5m2 and e4m3.
        active_expert_range: [first, end) of the experts that take rows; [] for all. The others' rows are zeros here
            and undefined on hardware.
        row_idx_type: 0: entry i * k + j is the row of choice j of token i, -1 outside the range; 1: the inverse.
        x_dtype: for carriers; not offered here.

    Returns:
        Rows [M * k, H]; int32 [M * k]; int64 [end - first] (pairs: [.., 2]); scales: fp32 [M * k], MX
        float8_e8m0fnu [M * k, 2 * ceil(H / 64)].
    """
    if drop_pad_mode or x_dtype is not None or quant_mode not in (_UNQUANTIZED, _STATIC, _DYNAMIC, *_MX_ELEMENTS):
        raise NotImplementedError(f"npu_moe_init_routing_v2: {drop_pad_mode=}, {quant_mode=}, {x_dtype=}")
    top_k = expert_idx.shape[1]
    first, end = active_expert_range or (0, expert_num)
    chosen = expert_idx.flatten()
    inside = None
    if first > 0 or end < expert_num:
        inside = (chosen >= first) & (chosen < end)
        chosen = chosen.masked_fill(~inside, expert_num)
    experts, order = torch.sort(chosen, stable=True)
    counts = torch.bincount(chosen, minlength=expert_num)[first:end]
    valid = order.shape[0] if inside is None else int(counts.sum())
    rows = min(active_num, order.shape[0]) if active_num > 0 else order.shape[0]
    taken = order[: min(valid, rows)]
    smooth_of = (experts[: taken.shape[0]] - first).long()
    values, scales = _expand(x, taken // top_k, smooth_of, scale, offset, quant_mode)
    places = _scattered(order, valid) if row_idx_type == 0 else _marked(order, valid)
    return _padded(values, rows), places, _token_numbers(counts, expert_tokens_num_type, first), _padded(scales, rows)


def init_routing(x: Tensor, row_idx: Tensor, expert_idx: Tensor, active_num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Repeat every row for its k experts, sorted by expert (stable), in the order of v1.

    Args:
        x: [M, H].
        row_idx: int32 [M, k] of j * M + i.
        expert_idx: int32 [M, k].
        active_num: tokens whose rows are returned.

    Returns:
        Rows [min(M, active_num) * k, H]; int32 [M * k], whose entry j * M + i is the row of choice j of token i;
        int32 [M * k] experts in order.
    """
    tokens, top_k = expert_idx.shape
    experts, order = torch.sort(expert_idx.flatten(), stable=True)
    sources = row_idx.flatten()[order].long()
    rows = x.index_select(0, sources[: min(tokens, active_num) * top_k] % tokens)
    return rows, _scattered(sources, sources.shape[0]), experts


def compute_expert_tokens(sorted_expert_for_source_row: Tensor, num_expert: int) -> Tensor:
    """Return int32 [E]: the end of each expert's rows among int32 [T] experts in order."""
    experts = torch.arange(num_expert, dtype=sorted_expert_for_source_row.dtype)
    return torch.searchsorted(sorted_expert_for_source_row, experts, right=True, out_int32=True)


def finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """Return skip1 + skip2 + the sum over choices of scale * (row + its expert's bias), in fp32, rounded once.

    Args:
        expanded_permuted_rows: [T, H] (dropping: [E, capacity, H]).
        skip1: [M, H] or None.
        skip2: [M, H] or None.
        bias: [E, H] or None.
        scales: [M, k]; None means ones.
        expanded_src_to_dst_row: int32 [M * k] rows; -1 contributes nothing.
        export_for_source_row: int32 [M, k] experts, for the bias.
        drop_pad_mode: 0 and 1: entries in the order of columns (v1); 2 and 3: of rows (v2).
        k: choices of a token, where scales is None.

    Returns:
        [M, H] in the rows' dtype.
    """
    top_k = scales.shape[1] if scales is not None else k or 1
    rows = expanded_permuted_rows.flatten(0, -2)
    by_row = drop_pad_mode in (2, 3)
    places = expanded_src_to_dst_row.view(-1, top_k) if by_row else expanded_src_to_dst_row.view(top_k, -1).t()
    weights = (torch.ones(places.shape) if scales is None else scales.float()).masked_fill(places == _DROPPED, 0.0)
    y = _combined(rows, places.clamp(min=0), weights)
    if bias is not None:
        if export_for_source_row is None:
            raise ValueError("npu_moe_finalize_routing: a bias needs the experts, export_for_source_row")
        y += _combined(bias, export_for_source_row, weights)
    for skip in (skip1, skip2):
        if skip is not None:
            y += skip
    return y.to(rows.dtype)


def token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:
    """Return the sum over choices of prob * row, in fp32, rounded once.

    Args:
        permuted_tokens: [T, H].
        sorted_indices: int32 [M * k], entry i * k + j is the row of choice j of token i.
        probs: [M, k]; None means k = 1 and ones.
        padded_mode: False.
        restore_shape: padded mode only.

    Returns:
        [M, H] in the rows' dtype.
    """
    if padded_mode:
        raise NotImplementedError("npu_moe_token_unpermute: padded_mode has no CPU kernel")
    if probs is None:
        return permuted_tokens.index_select(0, sorted_indices)
    return _combined(permuted_tokens, sorted_indices.view(probs.shape), probs.float()).to(permuted_tokens.dtype)


def _combined(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The sum over j of weights[i, j] * rows[places[i, j]]: [T, H], [M, k], fp32 [M, k] -> fp32 [M, H]."""
    (tokens, top_k), width = places.shape, rows.shape[1]
    y = torch.empty((tokens, width))
    step = max(_CHUNK_VALUES // (top_k * width), 1)
    for first in range(0, tokens, step):
        part = slice(first, first + step)
        values = rows.index_select(0, places[part].flatten()).float().view(-1, top_k, width)
        torch.bmm(weights[part].unsqueeze(1), values, out=y[part].unsqueeze(1))
    return y


def _expand(
    x: Tensor, sources: Tensor, experts: Tensor, scale: Tensor | None, offset: Tensor | None, mode: int
) -> tuple[Tensor, Tensor]:
    """The rows for `sources`, quantized, and their scales. A token is quantized once unless experts smooth it."""
    if mode == _STATIC:
        if scale is None:
            raise ValueError("npu_moe_init_routing_v2: static quantization needs a scale")
        codes = quantize.quantize(x, scale, offset, INT8, -1, False)
        return codes.index_select(0, sources), torch.zeros(sources.shape[0])
    if mode == _DYNAMIC and scale is not None and scale.shape[0] > 1:
        return quantize.dynamic_quant(x.index_select(0, sources).float() * scale.float().index_select(0, experts))
    if mode == _DYNAMIC:
        codes, scales = quantize.dynamic_quant(x, smooth_scales=None if scale is None else scale.flatten())
    elif mode in _MX_ELEMENTS:
        codes, pairs = mx.quantize(x, _MX_ELEMENTS[mode])
        scales = pairs.flatten(1)
    elif scale is None:
        return x.index_select(0, sources), torch.zeros(sources.shape[0])
    else:
        codes, scales = x, scale
    row_scales = scales.index_select(0, sources)
    if mode in _MX_ELEMENTS:
        row_scales = row_scales.view(torch.float8_e8m0fnu)
    return codes.index_select(0, sources), row_scales


def _padded(values: Tensor, rows: int) -> Tensor:
    """The values with rows of zeros after them."""
    if values.shape[0] == rows:
        return values
    padded = values.new_zeros((rows, *values.shape[1:]))
    padded[: values.shape[0]] = values
    return padded


def _scattered(order: Tensor, valid: int) -> Tensor:
    """int32: entry order[i] is i, or -1 from `valid` on."""
    positions = torch.arange(order.shape[0], dtype=torch.int32)
    positions[valid:] = _DROPPED
    return torch.empty_like(positions).scatter_(0, order, positions)


def _marked(order: Tensor, valid: int) -> Tensor:
    """int32: the order, -1 from `valid` on."""
    marked = order.int()
    marked[valid:] = _DROPPED
    return marked


def _token_numbers(counts: Tensor, kind: int, first: int) -> Tensor:
    if kind == _COUNTS:
        return counts
    if kind == _CUMULATIVE:
        return counts.cumsum(0)
    if kind != _PAIRS:
        raise ValueError(f"npu_moe_init_routing_v2: expert_tokens_num_type {kind} is not 0, 1 or 2")
    pairs = torch.zeros((counts.shape[0], 2), dtype=torch.int64)
    used = counts.nonzero().flatten()
    pairs[: used.shape[0]] = torch.stack((used + first, counts[used]), dim=1)
    return pairs
