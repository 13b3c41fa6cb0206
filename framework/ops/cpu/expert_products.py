"""The arithmetic of grouped matmuls: what one expert's rows are multiplied by, for every kind of operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from framework.ops import packing
from framework.ops.cpu import matmul, mx, packed
from framework.ops.cpu.quant_matmul import int4_codes, int8_product
from framework.ops.linear import linear

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_SHIFT = 8
# Up to so many rows times groups, one product for all groups is faster than one for each.
_FEW_ROWS = 64

# Rows of one expert and its index -> its product.
_Product = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class Call:
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


class Plan(NamedTuple):
    """Rows as `product` takes them, and what is applied to all products: first the scale, then the bias."""

    rows: Tensor
    product: _Product
    token_scale: Tensor | None = None
    bias: Tensor | Sequence[Tensor] | None = None


def plan(call: Call) -> Plan:
    """Choose the arithmetic by the operands' dtypes."""
    if call.x.dtype in FLOATS:
        return Plan(call.x, _weight_only(call) if call.is_weight_only else _float(call), bias=call.bias)
    if call.x.dtype is torch.int8 and call.weight[0].dtype is torch.int32:
        return Plan(call.x, _int8_by_int4(call), call.token_scale)
    if call.x.dtype in (torch.int8, torch.int32):
        return _integers(call)
    return _mx(call)


def _float(call: Call) -> _Product:
    def product(rows: Tensor, expert: int) -> Tensor:
        weight = call.weight[expert].t()
        return linear(rows, weight) if call.bias is None else linear(rows.float(), weight.float())

    return product


def _weight_only(call: Call) -> _Product:
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


def _integers(call: Call) -> Plan:
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
        return Plan(rows, product)
    return Plan(rows, product, call.token_scale, None if added is not None else call.bias)


def _int8_by_int4(call: Call) -> _Product:
    """Sums of x @ (weight * scale) and the bias less 8 * sum over K of weight * scale.

    Hardware multiplies x - 8 in halves of four bits, which the bias restores.
    """
    bias = call.bias
    if bias is None:
        raise ValueError("npu_grouped_matmul: int8 by int4 needs a bias, 8 * the sum of weight * scale over K")

    def product(rows: Tensor, expert: int) -> Tensor:
        codes, scale = _codes(call, expert, rows.shape[1]), call.scale_of(expert)
        scale = scale.view(-1, scale.shape[-1])
        form, count = call.form(expert), scale.shape[0]
        sums = None if form is None else form.sums.get(count)
        if sums is None:
            sums = _by_groups(rows.new_ones((1, rows.shape[1])), codes, count).squeeze(1)
            if form is not None:
                form.sums[count] = sums
        y = _scaled(rows, codes, scale)
        return y.add_(bias[expert] - _SHIFT * (sums * scale).sum(0))

    return product


def _scaled(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """fp32 x @ (codes * scale): int8 [M, K] and [K, N], fp32 [G, N]."""
    count = scale.shape[0]
    if rows.shape[0] * count <= _FEW_ROWS:
        return (_by_groups(rows, codes, count) * scale.unsqueeze(1)).sum(0)
    y = torch.zeros((rows.shape[0], codes.shape[1]))
    for x, weight, factor in zip(rows.chunk(count, 1), codes.chunk(count), scale, strict=True):
        y.addcmul_(int8_product(x.contiguous(), weight).float(), factor)
    return y


def _by_groups(rows: Tensor, codes: Tensor, count: int) -> Tensor:
    """int32 sums of each of `count` groups of K, [G, M, N], in one product that reads the codes once.

    Row (g, m) of its operand is row m with all but group g zero.
    """
    (tokens, k), n = rows.shape, codes.shape[1]
    if count == 1:
        return int8_product(rows, codes).unsqueeze(0)
    apart = rows.new_zeros((count, tokens, count, k // count))
    apart.diagonal(dim1=0, dim2=2).copy_(rows.view(tokens, count, -1).transpose(1, 2))
    return int8_product(apart.view(-1, k), codes).view(count, tokens, n)


def _codes(call: Call, expert: int, k: int) -> Tensor:
    """int8 codes [K, N] of one weight."""
    form, weight = call.form(expert), call.weight[expert]
    if form is not None:
        return form.codes.t()
    return weight if weight.dtype is torch.int8 else int4_codes(weight, k)


def _mx(call: Call) -> Plan:
    if call.token_scale is None or call.scale is None:
        raise ValueError(f"npu_grouped_matmul: {call.x.dtype} needs scales of both operands")
    element, weight_element = map(_element, (call.x, call.weight[0]), call.fp4)
    values = mx.Operand(call.x, call.token_scale, element).values()
    output = call.output if call.bias is None else torch.float32

    def product(rows: Tensor, expert: int) -> Tensor:
        assert call.scale is not None
        weight, scale = call.weight[expert].t(), call.scale[expert].transpose(0, 1)
        # The rows' values are made once for all experts; then they are a form as a weight's.
        x = mx.Operand(rows, rows, element, form=packed.CpuWeight("dense", rows))
        return mx.multiply(x, mx.Operand(weight, scale, weight_element, form=call.form(expert)), None, output)

    return Plan(values, product, bias=call.bias)


def _element(codes: Tensor, is_fp4: bool) -> mx.Element:
    if is_fp4:
        return mx.ELEMENTS["e2m1"]
    if codes.dtype not in mx.ELEMENT_OF_DTYPE:
        raise ValueError(f"npu_grouped_matmul: {codes.dtype} holds MX elements only with dtype number 296 (fp4)")
    return mx.ELEMENT_OF_DTYPE[codes.dtype]
