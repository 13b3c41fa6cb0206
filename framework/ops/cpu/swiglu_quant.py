"""Gated activation between two quantized matmuls of experts: dequantize, swiglu, quantize."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from framework.ops.cpu import mx, quantize
from framework.ops.cpu.grouped_matmul import grouped_matmul, groups
from framework.ops.dtypes import FLOAT32, INT8, canonical

_DYNAMIC = 1
_PLAIN, _CLIPPED_PAIRS, _CLIPPED_HALVES = range(3)
_COUNTS = 1
_ONE_OUTPUT = 2
_BY_TOKEN, _MX = 0, 2
_LARGEST = 127.0


def dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = _PLAIN,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return s = swiglu((x + bias) * weight_scale * activation_scale) * quant_scale as int8, and its scales.

    Arithmetic in fp32; scale = amax / 127, y = round_even(s * (127 / amax)).

    Args:
        x: [T, 2H] int32 sums, or float.
        weight_scale: fp32 [E, 2H]; without groups [1, 2H].
        activation_scale: fp32 [T] or [T, 1].
        bias: int32 [2H], without groups.
        quant_scale: [E, H] or [1, H] smoothing factors.
        quant_offset: static quantization only; not offered here.
        group_index: int64 [E] counts. Rows after the last group are zeros here, undefined on hardware.
        activate_left: silu acts on the first half; else on the second. Clipped modes: always on the first.
        quant_mode: 1, one scale a row.
        dst_type: None or int8.
        round_mode: None or 0: to nearest even.
        activate_dim: None or -1.
        swiglu_mode: 0 plain; clipped, g = min(a, limit), l = clamp(b, -limit, limit), s = g * sigmoid(alpha * g) *
            (l + glu_bias): 1 with a and b the even and odd columns, 2 the halves.
        clamp_limit: of the clipped modes.
        glu_alpha: of the clipped modes.
        glu_bias: of the clipped modes.

    Returns:
        int8 [T, H], fp32 [T].
    """
    if quant_mode != _DYNAMIC or quant_offset is not None or round_mode or activate_dim not in (None, -1):
        raise NotImplementedError(f"npu_dequant_swiglu_quant: {quant_mode=}, {round_mode=}, {activate_dim=}")
    if dst_type is not None and canonical(dst_type) != INT8:
        raise NotImplementedError(f"npu_dequant_swiglu_quant: {dst_type=} has no CPU kernel")
    found = [(0, 0, x.shape[0])] if group_index is None else groups(group_index, _COUNTS, x.shape[0])
    values = (x if bias is None else x + bias).float()
    if weight_scale is not None:
        values = _times(values, weight_scale, found)
    if activation_scale is not None:
        values = values * activation_scale.reshape(-1, 1)
    if swiglu_mode == _PLAIN:
        first, second = values.chunk(2, -1)
        s = functional.silu(first) * second if activate_left else functional.silu(second) * first
    else:
        pairs = (values[:, ::2], values[:, 1::2]) if swiglu_mode == _CLIPPED_PAIRS else values.chunk(2, -1)
        gate, linear = pairs[0].clamp(max=clamp_limit), pairs[1].clamp(-clamp_limit, clamp_limit)
        s = gate * torch.sigmoid(glu_alpha * gate) * (linear + glu_bias)
    if quant_scale is not None:
        s = _times(s, quant_scale, found)
    s[found[-1][2] if found else 0 :] = 0
    amax = s.abs().amax(-1, keepdim=True)
    # A row of zeros has scale 0 and codes 0.
    codes = (s * (_LARGEST / amax.masked_fill(amax == 0, 1.0))).round_().clamp_(-128, 127)
    return codes.to(torch.int8), amax.squeeze(-1) / _LARGEST


def grouped_matmul_swiglu_quant_v2(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    *,
    smooth_scale: Tensor | None = None,
    weight_assist_matrix: Sequence[Tensor] | None = None,
    bias: Tensor | None = None,
    dequant_mode: int | None = 0,
    dequant_dtype: int | None = 6,
    quant_mode: int | None = 0,
    quant_dtype: int | None = 1,
    group_list_type: int | None = 0,
    tuning_config: list[int] | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    weight_scale_dtype: int | None = None,
    x_scale_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return silu(a) * b of the fp32 halves (a, b) of a grouped matmul, quantized.

    Args:
        x: [T, K] as `grouped_matmul` takes it: int8, int4, MX.
        weight: one tensor, as there.
        weight_scale: one tensor, as there.
        x_scale: fp32 [T]; MX e8m0 [T, ceil(K/64), 2].
        group_list: int64 [E].
        smooth_scale: fp32 [E, N/2] or [E], int4 by int4.
        weight_assist_matrix: fp32 [E, N], int8 by int4: the bias of `grouped_matmul`.
        bias: None.
        dequant_mode: follows from the operands.
        dequant_dtype: float32.
        quant_mode: 0 one scale a row, 2 MX.
        quant_dtype: int8; MX e4m3, e5m2 or fp4.
        group_list_type: 0 cumulative ends, 1 counts.
        tuning_config: hardware only, ignored.
        x_dtype: as there.
        weight_dtype: as there.
        weight_scale_dtype: as there.
        x_scale_dtype: as there.

    Returns:
        [T, N/2] (fp4 [T, N/4]); fp32 [T], MX uint8 [T, ceil(N/128), 2].
    """
    if bias is not None or quant_mode not in (_BY_TOKEN, _MX) or canonical(dequant_dtype or FLOAT32) != FLOAT32:
        raise NotImplementedError(f"npu_grouped_matmul_swiglu_quant_v2: bias, {quant_mode=}, {dequant_dtype=}")
    (product,) = grouped_matmul(
        [x],
        weight,
        scale=weight_scale,
        bias=weight_assist_matrix,
        per_token_scale=[x_scale],
        group_list=group_list,
        split_item=_ONE_OUTPUT,
        group_type=0,
        group_list_type=group_list_type,
        output_dtype=FLOAT32,
        x_dtype=x_dtype,
        weight_dtype=weight_dtype,
    )
    first, second = product.chunk(2, -1)
    s = functional.silu(first).mul_(second)
    if smooth_scale is not None:
        factors = smooth_scale.view(smooth_scale.shape[0], -1)
        s = _times(s, factors, groups(group_list, group_list_type or 0, x.shape[0]))
    target = INT8 if quant_dtype is None else quant_dtype
    if quant_mode == _MX:
        return mx.dynamic_mx_quant(s, dst_type=target)
    return quantize.dynamic_quant(s, dst_type=target)


def _times(values: Tensor, factors: Tensor, found: Sequence[tuple[int, int, int]]) -> Tensor:
    """Rows of every group times its expert's factors [E, ..]; one row of factors is for all."""
    if factors.dim() == 1 or factors.shape[0] == 1:
        return values * factors.float()
    y = torch.zeros_like(values)
    for expert, first, last in found:
        torch.mul(values[first:last], factors[expert].float(), out=y[first:last])
    return y
