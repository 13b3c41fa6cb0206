"""Shape functions of the quantizing operators and their matmuls."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.ops import packing
from framework.ops.dtypes import BFLOAT16, FLOAT4_E2M1FN_X2, INT4, INT8, canonical


def _codes(input: Tensor, number: int) -> Tensor:
    """Codes of the input's elements in their carrier along the last dimension."""
    per_element = {INT4: 8, FLOAT4_E2M1FN_X2: 2}.get(canonical(number), 1)
    return input.new_empty((*input.shape[:-1], input.shape[-1] // per_element), dtype=packing.carrier(number))


def _quantize(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True
) -> Tensor:
    return _codes(input, dtype)


def _dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    scale = input.new_empty(input.shape[:-1], dtype=torch.float32)
    return _codes(input, INT8 if dst_type is None else dst_type), scale


def _trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int | None = 0) -> Tensor:
    longest = scale if offset is None or offset.numel() <= scale.numel() else offset
    return longest.new_empty(longest.shape, dtype=torch.int64)


def _quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    features = x2.shape[-1]
    k = x1.shape[-1] * (8 if x1.dtype is torch.int32 else 1)
    if x2.dtype is torch.int32 and x2.shape[-2] == k:
        features *= 8
    return x1.new_empty(
        (*x1.shape[:-1], features), dtype=packing.carrier(INT8 if output_dtype is None else output_dtype)
    )


def _mx_scale(input: Tensor, axis: int = -1) -> Tensor:
    shape = list(input.shape)
    shape[axis] = -(-shape[axis] // 64)
    return input.new_empty((*shape, 2), dtype=torch.uint8)


def _dynamic_mx_quant(
    input: Tensor,
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = FLOAT4_E2M1FN_X2,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return _codes(input, dst_type), _mx_scale(input, axis)


def _dynamic_dual_level_mx_quant(
    input: Tensor, *, smooth_scale: Tensor | None = None, round_mode: str = "rint"
) -> tuple[Tensor, Tensor, Tensor]:
    level0 = input.new_empty((*input.shape[:-1], -(-input.shape[-1] // 512)), dtype=torch.float32)
    return _codes(input, FLOAT4_E2M1FN_X2), level0, _mx_scale(input)


def _dual_level_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    x1_level0_scale: Tensor,
    x2_level0_scale: Tensor,
    x1_level1_scale: Tensor,
    x2_level1_scale: Tensor,
    *,
    bias: Tensor | None = None,
    output_dtype: int = 15,
) -> Tensor:
    return x1.new_empty((x1.shape[0], x2.shape[0]), dtype=packing.carrier(output_dtype))


def _dtype_cast(input: Tensor, dtype: int, input_dtype: int | None = None) -> Tensor:
    shape = list(input.shape)
    if input_dtype is not None and canonical(input_dtype) == FLOAT4_E2M1FN_X2:
        shape[-1] *= 2
    return _codes(input.new_empty(shape), dtype)


def _anti_mx_quant(
    x: Tensor, mxscale: Tensor, *, axis: int | None = -1, dst_type: int | None = 15, src_type: int | None = 292
) -> Tensor:
    return _dtype_cast(x, BFLOAT16 if dst_type is None else dst_type, src_type)


KERNELS = {
    "npu::npu_quantize": _quantize,
    "npu::npu_dynamic_quant": _dynamic_quant,
    "npu::npu_trans_quant_param": _trans_quant_param,
    "npu::npu_quant_matmul": _quant_matmul,
    "npu::npu_dynamic_mx_quant": _dynamic_mx_quant,
    "npu::npu_anti_mx_quant": _anti_mx_quant,
    "npu::npu_dynamic_dual_level_mx_quant": _dynamic_dual_level_mx_quant,
    "npu::npu_dual_level_quant_matmul": _dual_level_quant_matmul,
    "npu::npu_dtype_cast": _dtype_cast,
}
