"""Shape functions of the operators of expert layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from framework.ops import packing
from framework.ops.dtypes import FLOAT4_E2M1FN_X2, canonical

_MX_DTYPES = {2: torch.float8_e5m2, 3: torch.float8_e4m3fn}


def grouped_features(x: Tensor, weight: Tensor) -> int:
    """Return N of weight [.., K, N], or of int4 carriers [.., K, N/8] or [.., K/8, N]; x [T, K] or [T, K/8]."""
    n = weight.shape[-1]
    k = x.shape[-1] * (8 if x.dtype is torch.int32 else 1)
    return 8 * n if weight.dtype is torch.int32 and weight.shape[-2] == k else n


def _gating(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    chosen = x.new_empty((x.shape[0], k), dtype=torch.int32)
    return x.new_empty(chosen.shape), chosen, torch.empty_like(chosen)


def _gating_biased(x: Tensor, k: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    weights, chosen, _row_index = _gating(x, None, k)
    return weights, chosen, x.new_empty(x.shape, dtype=torch.float32)


def _init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    active_num: int = -1,
    expert_num: int = -1,
    expert_tokens_num_type: int = 0,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    **_: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = expert_idx.numel()
    rows = min(active_num, total) if active_num > 0 else total
    first, end = active_expert_range or (0, expert_num)
    pairs = (2,) if expert_tokens_num_type == 2 else ()
    is_mx = quant_mode in _MX_DTYPES
    dtype = x.dtype if quant_mode == -1 else _MX_DTYPES.get(quant_mode, torch.int8)
    scale_shape = (rows, 2 * -(-x.shape[1] // 64)) if is_mx else (rows,)
    return (
        x.new_empty((rows, x.shape[1]), dtype=dtype),
        x.new_empty(total, dtype=torch.int32),
        x.new_empty((end - first, *pairs), dtype=torch.int64),
        x.new_empty(scale_shape, dtype=torch.float8_e8m0fnu if is_mx else torch.float32),
    )


def _init_routing(x: Tensor, row_idx: Tensor, expert_idx: Tensor, active_num: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, k = expert_idx.shape
    places = x.new_empty(tokens * k, dtype=torch.int32)
    return x.new_empty((min(tokens, active_num) * k, x.shape[1])), places, torch.empty_like(places)


def _compute_expert_tokens(sorted_expert_for_source_row: Tensor, num_expert: int) -> Tensor:
    return sorted_expert_for_source_row.new_empty(num_expert, dtype=torch.int32)


def _finalize_routing(
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
    top_k = scales.shape[1] if scales is not None else k or 1
    tokens = expanded_src_to_dst_row.shape[0] // top_k
    return expanded_permuted_rows.new_empty((tokens, expanded_permuted_rows.shape[-1]))


def _token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:
    tokens = sorted_indices.shape[0] if probs is None else probs.shape[0]
    return permuted_tokens.new_empty((tokens, permuted_tokens.shape[1]))


def _grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    output_dtype: int | None = None,
    **_: Any,  # noqa: ANN401
) -> list[Tensor]:
    dtype = x[0].dtype if output_dtype is None else packing.carrier(output_dtype)
    return [x[0].new_empty((x[0].shape[0], grouped_features(x[0], weight[0])), dtype=dtype)]


def _grouped_matmul_swiglu_quant_v2(
    x: Tensor,
    weight: list[Tensor],
    weight_scale: list[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    *,
    quant_mode: int | None = 0,
    quant_dtype: int | None = 1,
    **_: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor]:
    rows, half = x.shape[0], grouped_features(x, weight[0]) // 2
    number = 1 if quant_dtype is None else quant_dtype
    columns = half // 2 if canonical(number) == FLOAT4_E2M1FN_X2 else half
    codes = x.new_empty((rows, columns), dtype=packing.carrier(number))
    if quant_mode == 2:
        return codes, x.new_empty((rows, -(-half // 64), 2), dtype=torch.uint8)
    return codes, x.new_empty(rows, dtype=torch.float32)


def _dequant_swiglu_quant(x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    rows, columns = x.shape
    return x.new_empty((rows, columns // 2), dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)


KERNELS = {
    "npu::npu_moe_gating_top_k_softmax": _gating,
    "npu::npu_moe_gating_top_k": _gating_biased,
    "npu::npu_moe_init_routing_v2": _init_routing_v2,
    "npu::npu_moe_init_routing": _init_routing,
    "npu::npu_moe_compute_expert_tokens": _compute_expert_tokens,
    "npu::npu_moe_finalize_routing": _finalize_routing,
    "npu::npu_moe_token_unpermute": _token_unpermute,
    "npu::npu_grouped_matmul": _grouped_matmul,
    "npu::npu_grouped_matmul_swiglu_quant_v2": _grouped_matmul_swiglu_quant_v2,
    "npu::npu_dequant_swiglu_quant": _dequant_swiglu_quant,
}
