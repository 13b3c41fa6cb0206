"""`npu_quant_matmul`: integer products are exact in int32, everything after them is fp32 with one cast at the end."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from framework.ops import packing
from framework.ops.cpu import mx, packed
from framework.ops.cpu.quantize import nine_bits, offset_of, scale_of, trans_quant_param
from framework.ops.dtypes import FLOAT4_E2M1FN_X2, FLOAT8_E8M0FNU, INT8, canonical

_int_mm = torch._int_mm

# fp32 holds sums of so many products of two bytes exactly.
_EXACT_IN_FLOAT32 = 1024
# Dtypes of the output for which the operator hands an fp32 scale through npu_trans_quant_param.
_TRUNCATING = (torch.float16, torch.int8)
_E8M0 = (torch.uint8, torch.float8_e8m0fnu)


def quant_matmul(
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
    """Return the product of quantized operands, scaled back.

    Integers: (x1 @ x2 + int32 bias) * scale[n] * pertoken_scale[m] + float bias, in this order. MX: the fp32
    product of the dequantized operands + bias. Formulas, truncation of scales and the dtypes that hardware takes
    are those of torch_npu 2.13; output_dtype float32 is taken, too.

    Args:
        x1: [.., M, K] int8, e4m3 or e5m2; int32 [.., M, K/8] (int4), uint8 [.., M, K/2] (fp4).
        x2: [K, N], a transposed view of [N, K] is fastest; int32 [K, N/8] or the view of [N, K/8] (int4); uint8,
            the view of [N, K/2] (fp4). An operand of `operand` in framework.ops.quant_layout has a form of its own.
        scale: fp32 or bf16 [N] or [1]; int64 words; int64 [K/g, N] (int8 by int4 in groups); e8m0
            [ceil(K/64), N, 2], the view of [N, ceil(K/64), 2].
        offset: int8 output: fp32 [1] or [N]; int8 by int4 in groups: fp32 [N], 8 * sum of the weights.
        pertoken_scale: fp32 [M]; e8m0 [.., M, ceil(K/64), 2].
        bias: int32 or float [N].
        output_dtype: None means int8.
        x1_dtype: fp4 carriers: 296.
        x2_dtype: fp4 carriers: 296.
        pertoken_scale_dtype: e8m0: 293.
        scale_dtype: e8m0: 293.
        group_sizes: [gM, gN, gK]; zeros are inferred.
        y_scale: not offered here.

    Returns:
        [.., M, N].
    """
    if y_scale is not None or (group_sizes is not None and 128 in group_sizes) or x2.dim() != 2:
        raise NotImplementedError("npu_quant_matmul: 128-blocks, y_scale and batched weights have no CPU kernel")
    output = packing.carrier(INT8 if output_dtype is None else output_dtype)
    rows = x1.reshape(-1, x1.shape[-1])
    if pertoken_scale is not None and pertoken_scale.dtype in _E8M0:
        for number in (pertoken_scale_dtype, scale_dtype):
            if number is not None and canonical(number) != FLOAT8_E8M0FNU:
                raise ValueError(f"npu_quant_matmul: byte scales are e8m0 (293), not {number}")
        operands = (
            mx.Operand(rows, pertoken_scale.reshape(rows.shape[0], -1, 2), _element(rows, x1_dtype)),
            mx.Operand(x2.t(), scale.transpose(0, 1), _element(x2, x2_dtype), form=packed.private(x2)),
        )
        y = mx.multiply(*operands, bias, output)
    else:
        y = _integer_matmul(rows, x2, scale, offset, pertoken_scale, bias, output)
    return y.view(*x1.shape[:-1], y.shape[-1])


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight in int32, exactly. int8 [M, K] and [K, N]; weight as the view of [N, K] is fastest."""
    # With K = 1 torch's kernel returns memory that it has not written.
    if x.shape[1] > 1 and _int_mm_is_exact():
        return _int_mm(x, weight)
    total = torch.zeros((x.shape[0], weight.shape[1]), dtype=torch.int32)
    for first in range(0, x.shape[1], _EXACT_IN_FLOAT32):
        part = slice(first, first + _EXACT_IN_FLOAT32)
        total += (x[:, part].float() @ weight[part].float()).int()
    return total


def int4_codes(weight: Tensor, k: int) -> Tensor:
    """Return int8 codes [K, N] of int32 carriers [K, N/8], or of the view of [N, K/8]."""
    if weight.shape[0] == k:
        return packing.unpack_int4(weight)
    return packing.unpack_int4(weight.t()).t()


def grouped_product(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Return fp32 x @ (weight * scale of its group) + (offset - 8 * sum of the weight * scale).

    Hardware multiplies x - 8 in halves of four bits and takes offset = 8 * sum(weight * scale) to restore it.

    Args:
        x: int8 [M, K].
        weight: int8 codes [K, N].
        scale: fp32 [G, N].
        offset: fp32 [N], or None for an offset that restores exactly.
    """
    groups = scale.shape[0]
    step = weight.shape[0] // groups
    y = torch.zeros((x.shape[0], weight.shape[1]))
    sums = torch.zeros(weight.shape[1])
    for group in range(groups):
        part = slice(group * step, (group + 1) * step)
        y.addcmul_(int8_product(x[:, part].contiguous(), weight[part]).float(), scale[group])
        if offset is not None:
            sums.addcmul_(weight[part].sum(0, dtype=torch.int32).float(), scale[group])
    return y if offset is None else y.add_(offset - 8 * sums)


def _integer_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output: torch.dtype,
) -> Tensor:
    codes = packing.unpack_int4(x) if x.dtype is torch.int32 else x
    in_groups = x.dtype is torch.int8 and weight.dtype is torch.int32
    form = packed.private(weight)
    if form is not None:
        weight = form.codes.t()
    elif weight.dtype is torch.int32:
        weight = int4_codes(weight, codes.shape[1])
    if in_groups:
        y = grouped_product(codes, weight, _float_bits(scale), offset)
    else:
        total = int8_product(codes, weight)
        if bias is not None and bias.dtype is torch.int32:
            total += bias
        if output is torch.int32:
            return total
        if output is torch.int8:
            return _int8_output(total, scale, offset)
        y = total.float().mul_(_applied_scale(scale, pertoken_scale, output))
    if pertoken_scale is not None:
        y *= pertoken_scale.reshape(-1, 1)
    if bias is not None and bias.dtype is not torch.int32:
        y += bias
    return y.to(output)


def _applied_scale(scale: Tensor, pertoken_scale: Tensor | None, output: torch.dtype) -> Tensor:
    """The fp32 scale that multiplies the sums: int64 words and some fp32 scales keep 19 bits."""
    scale = scale.flatten()
    if scale.dtype is torch.float32 and pertoken_scale is None and output in _TRUNCATING:
        return scale_of(trans_quant_param(scale))
    return scale_of(scale) if scale.dtype is torch.int64 else scale.float()


def _int8_output(total: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    words = scale.flatten() if scale.dtype is torch.int64 else trans_quant_param(scale.flatten().float(), offset)
    y = nine_bits(total.float().mul_(scale_of(words)))
    return y.add_(offset_of(words)).clamp_(-128, 127).to(torch.int8)


def _float_bits(words: Tensor) -> Tensor:
    """The fp32 values whose bits are the low halves of int64 words."""
    return words.to(torch.int32).view(torch.float32)


def _element(codes: Tensor, number: int | None) -> mx.Element:
    if codes.dtype in mx.ELEMENT_OF_DTYPE:
        return mx.ELEMENT_OF_DTYPE[codes.dtype]
    if number is not None and canonical(number) == FLOAT4_E2M1FN_X2:
        return mx.ELEMENTS["e2m1"]
    raise ValueError(f"npu_quant_matmul: {codes.dtype} with dtype number {number} has no MX elements")


@cache
def _int_mm_is_exact() -> bool:
    """Whether torch's int8 product is exact here: kernels without VNNI may saturate 16-bit sums. Tried once."""
    x = torch.tensor([[-128, 127]], dtype=torch.int8).repeat(2, 64)
    weight = torch.tensor([[-128, 127], [127, 127], [-128, -128]], dtype=torch.int8).repeat(11, 64)[:, :128]
    exact = x.long() @ weight.t().long()
    return torch.equal(_int_mm(x, weight.t()).long(), exact)
