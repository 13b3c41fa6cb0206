"""Weight-only quantized matmul, int4 packing, and the format cast that does nothing here."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.ops import packing
from framework.ops.cpu import packed


def format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """Return the input: only the physical tiling changes on hardware."""
    return input


def format_cast_like(
    input: Tensor, dst: Tensor, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """Return the input: only the physical tiling changes on hardware."""
    return input


def convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    """Pack int32 codes [.., N] eight to an int32 along the last dimension, the first in the low bits.

    Codes beyond four bits are masked, not saturated.
    """
    if weight.dtype is not torch.int32 or weight.shape[-1] % 8:
        raise ValueError(f"int4 packing takes int32 codes, last dimension a multiple of 8, not {weight.shape}")
    return packing.pack_int4(weight)


def weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    """Return x @ ((codes + offset) * scale) + bias with fp32 accumulation, in x's dtype.

    Both steps of the dequantization round to x's dtype. A weight from `layout.device_layout` goes through
    its fast kernel instead: one rounding, scale and offset as they were given to `device_layout`.

    Args:
        x: [M, K] bf16, fp16 or fp32.
        weight: int32 [K, N/8] (low nibble first), the transposed view of int32 [N, K/8], or int8 [K, N].
        antiquant_scale: [1], [N], [1, N] or [G, N].
        antiquant_offset: the same shape, or None.
        quant_scale: int8 output, not offered here.
        quant_offset: int8 output, not offered here.
        bias: [N] or [1, N], added in fp32.
        antiquant_group_size: K / G, or 0 for one group.
        inner_precise: hardware only, ignored.
        weight_dtype: for fp8 and fp4 carriers, not offered here.

    Returns:
        [M, N] in x's dtype.
    """
    if quant_scale is not None or quant_offset is not None or weight_dtype is not None:
        raise NotImplementedError("npu_weight_quant_batchmatmul: quantized output and fp8/fp4 weights")
    form: packed.CpuWeight | None = getattr(weight, "_cpu_weight", None)
    if form is not None:
        y = packed.multiply(x, form)
        return y if bias is None else (y.float() + bias.float()).to(x.dtype)
    dense = dequantize(weight, antiquant_scale, antiquant_offset, antiquant_group_size, x.shape[-1], x.dtype)
    total = x.float() @ dense.float()
    if bias is not None:
        total += bias.float()
    return total.to(x.dtype)


def dequantize(
    weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int, k: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight [K, N] in `dtype`, rounded to it after the addition and after the product."""
    codes = weight if weight.dtype is torch.int8 else _unpack(weight, k)
    values = codes.to(dtype)
    if offset is not None:
        values = values + _over_rows(offset, group_size, k).to(dtype)
    return values * _over_rows(scale, group_size, k).to(dtype)


def _unpack(weight: Tensor, k: int) -> Tensor:
    """Int32 carriers to int8 codes [K, N]."""
    if weight.shape[0] == k:
        return packing.unpack_int4(weight)
    return packing.unpack_int4(weight.transpose(0, 1)).transpose(0, 1)


def _over_rows(parameter: Tensor, group_size: int, k: int) -> Tensor:
    """Give each of K rows its group's parameters: [K, N] or broadcastable to it."""
    if parameter.dim() < 2 or parameter.shape[0] == 1:
        return parameter
    return parameter.repeat_interleave(group_size, dim=0)[:k]
