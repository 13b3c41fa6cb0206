"""One matmul for each expert with rows: rows sorted by expert, one weight an expert."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from framework.ops import packing
from framework.ops.cpu import packed
from framework.ops.cpu.expert_products import FLOATS, Call, plan
from framework.ops.dtypes import FLOAT4_E2M1FN_X2, FLOAT8_E8M0FNU, canonical
from framework.ops.meta_moe import grouped_features

_CUMULATIVE, _COUNTS, _PAIRS = range(3)
_ONE_OUTPUT = (2, 3)
_BY_ROWS = 0
_OUTPUTS = (*FLOATS, torch.int32)

Group = tuple[int, int, int]  # an expert with rows, their first and their end


def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    scale: Sequence[Tensor] | None = None,
    offset: Sequence[Tensor] | None = None,
    antiquant_scale: Sequence[Tensor] | None = None,
    antiquant_offset: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    activation_input: Sequence[Tensor] | None = None,
    activation_quant_scale: Sequence[Tensor] | None = None,
    activation_quant_offset: Sequence[Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: list[int] | None = None,
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[Tensor]:
    """Return [x_e @ w_e (+ bias_e)] for the rows x_e of every expert e; what the operands are chooses the arithmetic.

    Accumulation is in fp32 or int32, the last step is one rounding. Formulas are those of torch_npu 2.13; fp32
    activations and fp32 output of quantized operands are taken, too. Experts without rows are not touched.

    x, weight and their scales, `e` the expert (its index in the first dimension, or in a list of E tensors):

    - float [T, K] by float [E, K, N].
    - int8 by int8: (sum + int32 bias) * scale[e] [N] * per_token_scale [T] + float bias. Without a scale and with
      output_dtype int32: the sums.
    - int32 [T, K/8] (int4) by int32 [E, K, N/8]: the same; scale has fp32 bits in int64 [E, N].
    - int8 by int32 [E, K, N/8]: scale [E, G, N], bias fp32 [E, N], which is 8 * sum over K of weight * scale where
      nothing else is to be added.
    - float by int32 [E, K, N/8] or int8 [E, K, N]: (code + antiquant_offset) * antiquant_scale, [E, N] or [E, G, N],
      both steps rounded to x's dtype. An operand of `layout.stack_experts` has a fast form with one rounding.
    - MX: e4m3 or e5m2 [T, K], fp4 uint8 [T, K/2], per_token_scale e8m0 [T, ceil(K/64), 2]; weight the view
      [E, K, N] of [E, N, K] (fp4 [E, K/2, N]), its e8m0 [E, ceil(K/64), N, 2] in scale or antiquant_scale.

    Args:
        x: one tensor.
        weight: one tensor [E, ..], or E tensors.
        bias: [E, N].
        scale: see above.
        offset: not offered here.
        antiquant_scale: see above.
        antiquant_offset: see above.
        per_token_scale: see above.
        group_list: int64 [E]; type 2 [E, 2]. Rows after the last group are zeros here, undefined on hardware.
        activation_input: not offered here.
        activation_quant_scale: not offered here.
        activation_quant_offset: not offered here.
        split_item: 2 or 3: one output.
        group_type: 0: groups of rows.
        group_list_type: 0 cumulative ends, 1 counts, 2 pairs (expert, count).
        act_type: 0.
        tuning_config: hardware only, ignored.
        output_dtype: None means x's dtype, for float x.
        x_dtype: fp4 carriers: 296.
        weight_dtype: fp4 carriers: 296.
        scale_dtype: e8m0: 293.
        per_token_scale_dtype: e8m0: 293.

    Returns:
        [[T, N]].
    """
    if len(x) != 1 or group_list is None or split_item not in _ONE_OUTPUT or group_type != _BY_ROWS:
        raise NotImplementedError("npu_grouped_matmul: one x, a group_list, split_item 2 or 3, group_type 0")
    if act_type or offset or activation_input or activation_quant_scale or activation_quant_offset:
        raise NotImplementedError("npu_grouped_matmul: activations, offset and quantized output have no CPU kernel")
    for number in (scale_dtype, per_token_scale_dtype):
        if number is not None and canonical(number) != FLOAT8_E8M0FNU:
            raise ValueError(f"npu_grouped_matmul: byte scales are e8m0 (293), not {number}")
    output = x[0].dtype if output_dtype is None else packing.carrier(output_dtype)
    if output not in _OUTPUTS:
        raise ValueError(f"npu_grouped_matmul: output_dtype is bf16, fp16, fp32 or int32, not {output}")
    stacked = len(weight) == 1 and weight[0].dim() == 3

    def by_expert(values: Sequence[Tensor] | None) -> Tensor | Sequence[Tensor] | None:
        return (values[0] if stacked else values) if values else None

    call = Call(
        x=x[0],
        weight=weight[0] if stacked else weight,
        forms=packed.private_experts(weight[0]) if stacked else tuple(map(packed.private, weight)),
        output=output,
        bias=by_expert(bias),
        scale=by_expert(scale or antiquant_scale),
        offset=by_expert(antiquant_offset),
        token_scale=per_token_scale[0] if per_token_scale else None,
        is_weight_only=bool(antiquant_scale) and x[0].dtype in FLOATS,
        fp4=(_is_fp4(x_dtype), _is_fp4(weight_dtype)),
    )
    return [_run(call, groups(group_list, group_list_type or _CUMULATIVE, x[0].shape[0]))]


def groups(group_list: Tensor, kind: int, rows: int) -> list[Group]:
    """Return (expert, first row, end) of every expert with rows.

    Args:
        group_list: int64 [E], or [E, 2] of kind 2.
        kind: 0 cumulative ends, 1 counts, 2 pairs (expert, count).
        rows: how many there are.

    Raises:
        ValueError: the groups go down, or beyond the rows.
    """
    values = group_list.tolist()
    if kind == _CUMULATIVE:
        values = [end - first for first, end in pairwise([0, *values])]
    elif kind not in (_COUNTS, _PAIRS):
        raise ValueError(f"npu_grouped_matmul: group_list_type {kind} is not 0, 1 or 2")
    found, end = [], 0
    for expert, count in values if kind == _PAIRS else enumerate(values):
        if count:
            found.append((expert, end, end + count))
            end += count
        if count < 0 or end > rows:
            raise ValueError(f"npu_grouped_matmul: group_list of type {kind} does not fit {rows} rows: {values}")
    return found


def _run(call: Call, found: list[Group]) -> Tensor:
    chosen = plan(call)
    total, end = chosen.rows.shape[0], found[-1][2] if found else 0
    products = [chosen.product(chosen.rows[first:last], expert) for expert, first, last in found]
    if not found:
        return torch.zeros((total, grouped_features(call.x, call.weight[0])), dtype=call.output)
    if end < total:
        products.append(products[0].new_zeros((total - end, products[0].shape[1])))
    y = torch.cat(products) if len(products) > 1 else products[0]
    if chosen.token_scale is not None:
        y.mul_(chosen.token_scale.reshape(-1, 1))
    if chosen.bias is not None:
        for expert, first, last in found:
            y[first:last] += chosen.bias[expert]
    return y.to(call.output)


def _is_fp4(number: int | None) -> bool:
    return number is not None and canonical(number) == FLOAT4_E2M1FN_X2
