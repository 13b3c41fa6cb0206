"""One matmul for each expert with rows: rows sorted by expert, one weight an expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from framework.ops import packing
from framework.ops.cpu import matmul, mx, packed
from framework.ops.cpu.quant_matmul import int4_codes, int8_product
from framework.ops.dtypes import FLOAT4_E2M1FN_X2, FLOAT8_E8M0FNU, canonical
from framework.ops.linear import linear
from framework.ops.meta_moe import grouped_features

_CUMULATIVE, _COUNTS, _PAIRS = range(3)
_ONE_OUTPUT = (2, 3)
_BY_ROWS = 0
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_OUTPUTS = (*_FLOATS, torch.int32)
_SHIFT = 8

Group = tuple[int, int, int]  # an expert with rows, their first and their end
# Rows of one expert and its index -> its product.
_Product = Callable[[Tensor, int], Tensor]


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

    call = _Call(
        x=x[0],
        weight=weight[0] if stacked else weight,
        forms=packed.private_experts(weight[0]) if stacked else tuple(map(packed.private, weight)),
        output=output,
        bias=by_expert(bias),
        scale=by_expert(scale or antiquant_scale),
        offset=by_expert(antiquant_offset),
        token_scale=per_token_scale[0] if per_token_scale else None,
        is_weight_only=bool(antiquant_scale) and x[0].dtype in _FLOATS,
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


@dataclass(frozen=True, slots=True)
class _Call:
    """The operands; those of the weights are indexed by expert."""

    x: Tensor
    weight: Tensor | Sequence[Tensor]
    forms: Sequence[packed.CpuWeight | None] | None
    output: torch.dtype
    bias: Tensor | Sequence[Tensor] | None
    scale: Tensor | Sequence[Tensor] | None
    offset: Tensor | Sequence[Tensor] | None
    token_scale: Tensor | None
    is_weight_only: bool
    fp4: tuple[bool, bool]  # x, weight

    def form(self, expert: int) -> packed.CpuWeight | None:
        """The CPU's own form of one weight."""
        return None if self.forms is None else self.forms[expert]

    def scale_of(self, expert: int) -> Tensor:
        """The fp32 scale of one weight: int64 words hold its bits."""
        if self.scale is None:
            raise ValueError(f"npu_grouped_matmul: {self.x.dtype} by {self.weight[0].dtype} needs a scale")
        scale = self.scale[expert]
        return scale.to(torch.int32).view(torch.float32) if scale.dtype is torch.int64 else scale.float()


class _Plan(NamedTuple):
    """Rows as `product` takes them, and what is applied to all products: first the scale, then the bias."""

    rows: Tensor
    product: _Product
    token_scale: Tensor | None = None
    bias: Tensor | Sequence[Tensor] | None = None


def _run(call: _Call, found: list[Group]) -> Tensor:
    plan = _plan(call)
    total, end = plan.rows.shape[0], found[-1][2] if found else 0
    products = [plan.product(plan.rows[first:last], expert) for expert, first, last in found]
    if not found:
        return torch.zeros((total, grouped_features(call.x, call.weight[0])), dtype=call.output)
    if end < total:
        products.append(products[0].new_zeros((total - end, products[0].shape[1])))
    y = torch.cat(products) if len(products) > 1 else products[0]
    if plan.token_scale is not None:
        y.mul_(plan.token_scale.reshape(-1, 1))
    if plan.bias is not None:
        for expert, first, last in found:
            y[first:last] += plan.bias[expert]
    return y.to(call.output)


def _plan(call: _Call) -> _Plan:
    """Choose the arithmetic by the operands' dtypes."""
    if call.x.dtype in _FLOATS:
        return _Plan(call.x, _weight_only(call) if call.is_weight_only else _float(call), bias=call.bias)
    if call.x.dtype is torch.int8 and call.weight[0].dtype is torch.int32:
        return _Plan(call.x, _int8_by_int4(call), call.token_scale)
    if call.x.dtype in (torch.int8, torch.int32):
        return _integers(call)
    return _mx(call)


def _float(call: _Call) -> _Product:
    def product(rows: Tensor, expert: int) -> Tensor:
        weight = call.weight[expert].t()
        return linear(rows, weight) if call.bias is None else linear(rows.float(), weight.float())

    return product


def _weight_only(call: _Call) -> _Product:
    dtype, k = call.x.dtype, call.x.shape[1]

    def product(rows: Tensor, expert: int) -> Tensor:
        form = call.form(expert)
        if form is not None:
            y = packed.multiply(rows, form)
        else:
            assert call.scale is not None
            scale, offset = call.scale[expert], None if call.offset is None else call.offset[expert]
            group_size = k // scale.shape[0] if scale.dim() == 2 else k
            dense = matmul.dequantize(call.weight[expert], scale, offset, group_size, k, dtype).t()
            y = linear(rows, dense) if call.bias is None else linear(rows.float(), dense.float())
        return y if call.bias is None else y.float()

    return product


def _integers(call: _Call) -> _Plan:
    """int8 by int8, int4 by int4."""
    rows = packing.unpack_int4(call.x) if call.x.dtype is torch.int32 else call.x
    is_raw = call.output is torch.int32
    added = call.bias if call.bias is not None and call.bias[0].dtype is torch.int32 else None

    def product(rows: Tensor, expert: int) -> Tensor:
        total = int8_product(rows, _codes(call, expert, rows.shape[1]))
        if added is not None:
            total += added[expert]
        return total if is_raw else total * call.scale_of(expert)

    if is_raw:
        return _Plan(rows, product)
    return _Plan(rows, product, call.token_scale, None if added is not None else call.bias)


def _int8_by_int4(call: _Call) -> _Product:
    """Sums of x @ (weight * scale) and the bias less 8 * sum over K of weight * scale.

    Hardware multiplies x - 8 in halves of four bits, which the bias restores. One more row of ones makes that sum.
    """
    bias = call.bias
    if bias is None:
        raise ValueError("npu_grouped_matmul: int8 by int4 needs a bias, 8 * the sum of weight * scale over K")

    def product(rows: Tensor, expert: int) -> Tensor:
        count, k = rows.shape
        rows = torch.cat((rows, rows.new_ones((1, k))))
        codes, scale = _codes(call, expert, k), call.scale_of(expert)
        scale = scale.view(-1, scale.shape[-1])
        parts = zip(rows.chunk(scale.shape[0], 1), codes.chunk(scale.shape[0]), scale, strict=True)
        y = torch.zeros((), dtype=torch.float32)
        for x, weight, factor in parts:
            y = y + int8_product(x.contiguous(), weight) * factor
        return y[:count] + (bias[expert] - _SHIFT * y[count])

    return product


def _codes(call: _Call, expert: int, k: int) -> Tensor:
    """int8 codes [K, N] of one weight."""
    form, weight = call.form(expert), call.weight[expert]
    if form is not None:
        return form.codes.t()
    return weight if weight.dtype is torch.int8 else int4_codes(weight, k)


def _mx(call: _Call) -> _Plan:
    if call.token_scale is None or call.scale is None:
        raise ValueError(f"npu_grouped_matmul: {call.x.dtype} needs scales of both operands")
    element, weight_element = (
        mx.ELEMENTS["e2m1"] if fp4 else mx.ELEMENT_OF_DTYPE[codes.dtype]
        for fp4, codes in zip(call.fp4, (call.x, call.weight[0]), strict=True)
    )
    values = mx.Operand(call.x, call.token_scale, element).values()
    output = call.output if call.bias is None else torch.float32

    def product(rows: Tensor, expert: int) -> Tensor:
        assert call.scale is not None
        weight, scale = call.weight[expert].t(), call.scale[expert].transpose(0, 1)
        # The rows' values are made once for all experts; then they are a form as a weight's.
        x = mx.Operand(rows, rows, element, form=packed.CpuWeight("dense", rows))
        return mx.multiply(x, mx.Operand(weight, scale, weight_element, form=call.form(expert)), None, output)

    return _Plan(values, product, bias=call.bias)


def _is_fp4(number: int | None) -> bool:
    return number is not None and canonical(number) == FLOAT4_E2M1FN_X2
